"""Rewards shaped by the group or the run: the published numbers, what stands for the rest, and what is remembered."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest

from posttrain.advantage import Chain, Constant, Extremes, GroupAdvantage
from posttrain.advantage.shape import ByDirection, Diverse, ScaleBy, TailRisk, TrustMix
from posttrain.records import Group, Score
from tests.advantage.test_group import group, values


def scored(name: str, rewards: list[float | None], scores: list[float | None]) -> Group:
    made = group(*rewards)
    told = [
        replace(r, scores={name: Score(s) if s is not None else Score(None, "error")}) for r, s in zip(made.rollouts, scores, strict=True)
    ]
    return replace(made, rollouts=tuple(told))


def rewards(estimator, *groups: Group) -> list[float | None]:
    return [r.reward for g in estimator(groups) for r in g.rollouts]


def test_right_answers_of_classes_of_three_and_one() -> None:
    found = rewards(Diverse(), scored("class", [1.0, 1.0, 1.0, 1.0, 0.0], [7, 7, 7, 2, 7]))
    assert found == pytest.approx([1 / 3] * 3 + [1.0, 0.0])
    assert rewards(Diverse(), scored("class", [1.0] * 4, [3] * 4)) == pytest.approx([0.1] * 4)
    assert rewards(Diverse(), scored("class", [1.0, 0.0], [3, 3])) == pytest.approx([0.1, 0.0])
    assert rewards(Diverse(floor=0.0), scored("class", [0.5, 0.5, -1.0], [1, 2, 3])) == pytest.approx([0.5, 0.5, 0.0])


def test_the_order_of_the_answers_does_not_matter_and_a_failed_class_leaves() -> None:
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        classes = [5, 5, 6, 6]
        found = rewards(Diverse(), scored("class", [1.0] * 4, [classes[i] for i in order]))
        assert found == pytest.approx([2 / 3] * 4)
    assert rewards(Diverse(), scored("class", [1.0, 1.0, 1.0, None], [1, 2, None, 4])) == [1.0, 1.0, None, None]
    chain = Chain({"shape": Diverse(), "center": GroupAdvantage(scale="none")})
    assert values(chain, scored("class", [1.0, 1.0, 0.0], [1, 2, None])) == [0.0, 0.0, None]
    with pytest.raises(ValueError, match="reads the score 'class' of sample 'q/0', which has none"):
        Diverse()([group(1.0)])


def test_trust_falls_where_the_second_reward_prefers_wrong_answers() -> None:
    told = scored("think", [1.0, 1.0, 0.0, 0.0], [0.3, 0.5, 0.5, 0.7])
    assert rewards(TrustMix(), told) == pytest.approx([1 + 0.3 * math.exp(-0.2) * s for s in (0.3, 0.5)] + [0.0, 0.0])
    agreeing = scored("think", [1.0, 0.0], [0.6, 0.4])
    assert rewards(TrustMix(), agreeing) == pytest.approx([1.18, 0.0])
    for equal in ([1.0, 1.0], [0.0, 0.0]):
        assert rewards(TrustMix(), scored("think", equal, [0.9, 0.1])) == equal
    assert rewards(TrustMix(), scored("think", [1.0, 0.0, 1.0], [0.5, 0.1, None])) == pytest.approx([1.15, 0.0, None])


def test_trust_is_annealed_and_remembered() -> None:
    told, term = scored("think", [1.0, 0.0], [1.0, 0.0]), TrustMix(horizon=10.0)
    for step in range(3):
        assert rewards(term, told)[0] == pytest.approx(1 + 0.3 * math.exp(-step / 10))
    resumed = TrustMix(horizon=10.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(term.state_dict())))
    assert rewards(resumed, told)[0] == pytest.approx(1 + 0.3 * math.exp(-0.3))
    late = TrustMix(horizon=10.0, steps=46)
    assert rewards(late, told)[0] == pytest.approx(1.003, abs=1e-4)


def test_where_a_factor_stands_is_the_method() -> None:
    easy, hard = (
        replace(g, prompt=replace(g.prompt, meta={"difficulty": d})) for g, d in ((group(1.0, 0.0), 0.5), (group(1.0, 0.0, name="r"), 2.0))
    )
    center, exact = GroupAdvantage(scale="none"), GroupAdvantage(eps=0.0)
    assert values(Chain({"c": center, "s": ScaleBy()}), easy, hard) == [0.25, -0.25, 1.0, -1.0]
    assert values(Chain({"s": ScaleBy(), "n": exact}), easy, hard) == [1.0, -1.0, 1.0, -1.0], "a normalisation takes it away"
    assert values(Chain({"n": exact, "s": ScaleBy()}), easy, hard) == [0.5, -0.5, 2.0, -2.0]
    for factor in (1.0, 0.0, -1.0):
        told = replace(easy, prompt=replace(easy.prompt, meta={"difficulty": factor}))
        assert values(Chain({"c": center, "s": ScaleBy()}), told) == [factor * a for a in values(center, easy)], "nothing, or turned round: as told"
    with pytest.raises(ValueError, match="'level', not None"):
        ScaleBy("level")([easy])


@pytest.mark.parametrize(("s", "expected"), [(0.0, -5.0), (1.0, -2.0), (2.5, -1.0), (4.0, 0.0), (9.0, 0.0)])
def test_tail_risk_of_a_score(s: float, expected: float) -> None:
    assert TailRisk().value(s) == pytest.approx(expected)


def test_tail_risk_of_a_bundle() -> None:
    made = [group(*r, name=str(i)) for i, r in enumerate([(1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.0)])]
    term = TailRisk()
    found = values(term, *made)
    over, own = 3 / 2**0.5, 0.5**0.5  # scores 4 and 1, rewards 1 and 0
    assert found[:2] == pytest.approx([0.0, -2.0 / over / own]) and found[4:6] == pytest.approx([0.0, -2.0 / over]), (
        "a question without spread counts 1"
    )
    assert found[10:] == [None, None], "the rest fills no bundle"
    assert term.quantiles == pytest.approx([1.0 + 0.1 * (0.2 + 0.2 - 1), 4.0 + 0.1 * (0.8 + 0.8 - 1)])
    resumed = TailRisk()
    resumed.load_state_dict(pickle.loads(pickle.dumps(term.state_dict())))
    assert resumed.quantiles == term.quantiles


def test_equal_quantiles_leave_the_tail_alone() -> None:
    """Where both quantiles meet, the middle is nothing, and nothing is divided by their distance."""
    term = TailRisk(quantiles=[2.0, 2.0])
    assert [term.value(s) for s in (0.0, 1.0, 2.0, 5.0)] == pytest.approx([-1.5 * 2 / 0.2 / 2.5, -1.5 / 0.2 / 2.5, 0.0, 0.0])


def test_the_tracked_quantiles_settle_where_they_belong() -> None:
    term = TailRisk(bundle=1, rate=0.01)
    for step in range(4000):
        term([group(step * 7 % 100 / 100)])
    assert term.quantiles == pytest.approx([0.2, 0.8], abs=0.03)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Diverse(floor=2.0), "between 0 and 1"),
        (lambda: TrustMix(horizon=0.0), "must be above 0"),
        (lambda: TailRisk(a=0.9), "do not fit together"),
        (lambda: TailRisk(bundle=0), "do not fit together"),
    ],
)
def test_impossible_settings_are_refused(make, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


# -- a direction in the prompt ---------------------------------------------------------------------------------------------------------
BEST = {"one": Constant(unscored=False), "best": Extremes(best=1, worst=0)}
DIRECTED = Chain({"direct": ByDirection({"help": "v1", "short": "v2"}), **BEST})


def asked(v1: object, v2: object = 0.0, scores: tuple[tuple[float | None, ...], ...] = ((0.1, 0.9, 0.5, 0.3), (0.4, -0.8, 0.2, 0.7))) -> Group:
    """Four answers with two rewards, whose combined reward is that of the first."""
    made = group(*(0.0 if s is None else s for s in scores[0]))
    told = [
        replace(r, scores={n: Score(s) if s is not None else Score(None, "error") for n, s in zip(("help", "short"), pair, strict=True)})
        for r, *pair in zip(made.rollouts, *scores, strict=True)
    ]
    return replace(made, prompt=replace(made.prompt, meta={"v1": v1, "v2": v2}), rollouts=tuple(told))


def picked(estimator, one: Group) -> list[int]:
    return [i for i, r in enumerate(estimator([one])[0].rollouts) if r.advantage is not None]


def test_the_first_axis_is_the_best_of_the_group_by_the_first_reward() -> None:
    """The whole result, not only who is picked; the second axis is another."""
    found, plain = DIRECTED([asked(1.0)]), Chain(BEST)([asked(1.0)])
    assert [r.advantage for r in found[0].rollouts] == [r.advantage for r in plain[0].rollouts] == [None, 1.0, None, None]
    assert [r.reward for r in found[0].rollouts] == [r.reward for r in plain[0].rollouts]
    assert picked(DIRECTED, asked(0.0, 1.0)) == [3]


def test_a_direction_and_its_opposite_pick_the_two_ends() -> None:
    for v in ((1.0, 0.0), (0.0, 1.0), (0.6, 0.8), (0.8, -0.6)):
        value = [v[0] * a + v[1] * b for a, b in zip((0.1, 0.9, 0.5, 0.3), (0.4, -0.8, 0.2, 0.7), strict=True)]
        assert picked(DIRECTED, asked(*v)) == [value.index(max(value))] and picked(DIRECTED, asked(-v[0], -v[1])) == [value.index(min(value))]
    two = Chain({"direct": ByDirection({"help": "v1", "short": "v2"}), "one": Constant(unscored=False), "best": Extremes(best=2, worst=0)})
    assert picked(two, asked(1.0)) == [1, 2]


def test_a_failed_reward_leaves_and_a_direction_must_be_one() -> None:
    assert picked(DIRECTED, asked(1.0, 0.0, ((0.1, 0.9, 0.5, 0.3), (0.4, None, 0.2, 0.7)))) == [2]
    for v, message in ((("up", 0.0), "needs a number in the column 'v1'"), ((1.0, None), "'v2'"), ((0.0, 0.0), "asks for nothing"), ((math.nan, 1.0), "'v1'")):
        with pytest.raises(ValueError, match=message):
            DIRECTED([asked(*v)])
    with pytest.raises(ValueError, match="reads the score 'other'"):
        ByDirection({"other": "v1"})([asked(1.0)])
    named = asked(0.0)
    named = replace(named, prompt=replace(named.prompt, meta={"help": 0.6, "short": 0.8}))
    assert rewards(ByDirection(), named) == pytest.approx([0.38, -0.1, 0.46, 0.74])
    assert rewards(ByDirection({"short": "help"}), named) == pytest.approx([0.24, -0.48, 0.12, 0.42])
    with pytest.raises(ValueError, match="needs a number in the column 'help'"):
        ByDirection()([asked(1.0)])
