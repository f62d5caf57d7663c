"""Advantages from rewards: the numbers of the method cards, and what groups of one, dead groups and failed rewards give."""

from __future__ import annotations

import itertools
import math
import pickle
import random

import pytest

from posttrain.advantage import BatchWhiten, Chain, GroupAdvantage, Reward, statistics
from posttrain.advantage.group import Estimator
from posttrain.records import Group, Prompt, Rollout, Segment, Source


def group(*rewards: float | None, name: str = "q", lengths: tuple[int, ...] | None = None) -> Group:
    prompt = Prompt(name, (1,))
    lengths = lengths or (1,) * len(rewards)
    return Group(
        prompt,
        tuple(
            Rollout(f"{name}/{i}", prompt, (Segment((1,) * n, Source.policy, logprobs=(-1.0,) * n, version=0),), reward=r)
            for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))
        ),
    )


def values(estimator: Estimator, *groups: Group) -> list[float | None]:
    return [r.advantage for g in estimator(groups) for r in g.rollouts]


THIRD = 1 / 3


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (GroupAdvantage("mean", "std", ddof=0), [1.7320, -0.5774, -0.5774, -0.5774]),
        (GroupAdvantage("mean", "std", ddof=1), [1.5, -0.5, -0.5, -0.5]),
        (GroupAdvantage("mean", "none"), [0.75, -0.25, -0.25, -0.25]),
        (GroupAdvantage("loo", "none"), [1.0, -THIRD, -THIRD, -THIRD]),
        (GroupAdvantage("loo", "loo_std", ddof=1), [1.0, -0.5774, -0.5774, -0.5774]),
        (GroupAdvantage("median", "none"), [1.0, 0.0, 0.0, 0.0]),
        (GroupAdvantage("none", "std"), [2.3094, 0.0, 0.0, 0.0]),
        (Reward(0.25), [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_numbers_of_one_right_answer_in_four(estimator: Estimator, expected: list[float]) -> None:
    assert values(estimator, group(1.0, 0.0, 0.0, 0.0)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("estimator", "k", "p", "expected"),
    [
        *((GroupAdvantage("mean", "none"), k, p, (k - 1) / k) for k, p in ((4, 0.1), (4, 0.25), (4, 0.5), (8, 0.25))),
        *((GroupAdvantage("loo", "none"), k, p, 1.0) for k, p in ((4, 0.1), (4, 0.25), (4, 0.5), (8, 0.25))),
        *(
            (GroupAdvantage("mean", "std", 0, 0.0), k, p, v)
            for k, p, v in ((4, 0.1, 1.6903), (4, 0.25, 1.6450), (4, 0.5, 1.6160), (8, 0.25, 2.0261))
        ),
        *(
            (GroupAdvantage("mean", "std", 1, 0.0), k, p, v)
            for k, p, v in ((4, 0.1, 1.4638), (4, 0.25, 1.4246), (4, 0.5, 1.3995), (8, 0.25, 1.8953))
        ),
        *(
            (GroupAdvantage("loo", "loo_std", 1, 0.0), k, p, v)
            for k, p, v in ((4, 0.1, 1.1977), (4, 0.25, 1.4118), (4, 0.5, 1.5490), (8, 0.25, 2.0546))
        ),
    ],
)
def test_size_of_the_expected_estimator(estimator: Estimator, k: int, p: float, expected: float) -> None:
    """E[sum_i A_i grad log pi_i / k] over the gradient of p, for Bernoulli rewards: exact, by enumeration."""
    total = 0.0
    for rewards in itertools.product((1.0, 0.0), repeat=k):
        probability = math.prod(p if r else 1 - p for r in rewards)
        score = [(1 - p) if r else -p for r in rewards]  # d log prob / d logit
        advantages = values(estimator, group(*rewards))
        total += probability * sum(a * s for a, s in zip(advantages, score, strict=True)) / k  # type: ignore[operator]
    assert total / (p * (1 - p)) == pytest.approx(expected, abs=6e-5)


def test_identities() -> None:
    rng = random.Random(0)
    rewards = [rng.random() for _ in range(6)]
    for estimator in (GroupAdvantage(), GroupAdvantage(scale="none"), GroupAdvantage("loo", "none")):
        assert sum(values(estimator, group(*rewards))) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
    mean, loo = values(GroupAdvantage(scale="none"), group(*rewards)), values(GroupAdvantage("loo", "none"), group(*rewards))
    assert loo == pytest.approx([6 / 5 * a for a in mean])  # type: ignore[operator]
    exact = GroupAdvantage(eps=0.0)
    assert values(exact, group(*rewards)) == pytest.approx(values(exact, group(*(3 * r - 7 for r in rewards))))
    assert values(exact, group(0.2, 0.9)) == pytest.approx([-1.0, 1.0])
    for correct in range(1, 8):
        advantages = values(exact, group(*([1.0] * correct + [0.0] * (8 - correct))))
        p = correct / 8
        assert sum(map(abs, advantages)) / 8 == pytest.approx(2 * math.sqrt(p * (1 - p)))  # type: ignore[arg-type]


def test_where_epsilon_stands() -> None:
    nearly = group(1.0, 1.0 + 1e-9)
    assert values(GroupAdvantage(eps=1e-6), nearly) == pytest.approx([-5e-4, 5e-4], rel=1e-2)
    assert values(GroupAdvantage(eps=1e-6, eps_on="variance"), nearly) == pytest.approx([-5e-7, 5e-7], rel=1e-2)
    assert values(GroupAdvantage(eps=0.0), nearly) == pytest.approx([-1.0, 1.0])
    assert values(GroupAdvantage(eps=0.0, dead_tolerance=1e-6), nearly) == [0.0, 0.0]


def test_a_group_of_one() -> None:
    assert values(GroupAdvantage(singleton="zero"), group(0.7)) == [0.0]
    assert values(GroupAdvantage(singleton="raw"), group(0.7)) == [0.7]
    assert values(GroupAdvantage(singleton="zero"), group(0.7, None)) == [0.0, None]
    with pytest.raises(ValueError, match=r"group 'q' has one usable reward.*rollout\.n.*singleton"):
        values(GroupAdvantage(singleton="error"), group(0.7))


def test_a_dead_group() -> None:
    for estimator in (GroupAdvantage(), GroupAdvantage("loo", "loo_std"), GroupAdvantage("median", "std"), GroupAdvantage("none", "std")):
        assert values(estimator, group(0.1, 0.1, 0.1)) == [0.0, 0.0, 0.0]
    (dropped,) = GroupAdvantage(dead_group="drop")([group(1.0, 1.0)])
    assert dropped.dropped == "all rewards equal" and [r.advantage for r in dropped.rollouts] == [0.0, 0.0]
    (live,) = GroupAdvantage(dead_group="drop")([group(1.0, 0.0)])
    assert live.dropped is None
    assert values(GroupAdvantage("none", "none"), group(1.0, 1.0)) == [1.0, 1.0]
    formula = values(GroupAdvantage(dead_group="formula"), group(0.1, 0.1, 0.1))
    assert formula == pytest.approx([0.0] * 3, abs=1e-9)


def test_failed_rewards_leave_the_statistics() -> None:
    assert values(GroupAdvantage(scale="none"), group(1.0, None, 0.0)) == [0.5, None, -0.5]
    assert values(GroupAdvantage(), group(None, None)) == [None, None]
    assert values(Reward(), group(None, 2.0)) == [None, 2.0]
    assert values(BatchWhiten(eps=0.0), group(1.0, None, 0.0)) == pytest.approx([1.0, None, -1.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", [GroupAdvantage(), Reward(), BatchWhiten()])
def test_a_reward_that_is_not_finite_is_an_error_with_the_sample(bad: float, estimator: Estimator) -> None:
    with pytest.raises(ValueError, match=r"reward of sample 'q/1' is (nan|inf).*must be None"):
        estimator([group(1.0, bad)])


def test_whitening_over_tokens_and_over_sequences() -> None:
    a, b = group(1.0, 0.0, lengths=(1, 3)), group(0.5, 0.25, name="r", lengths=(2, 2))
    lengths = [1, 3, 2, 2]
    tokens = values(BatchWhiten("tokens", eps=0.0), a, b)
    assert sum(n * v for n, v in zip(lengths, tokens, strict=True)) == pytest.approx(0.0, abs=1e-12)  # type: ignore[operator]
    assert sum(n * v * v for n, v in zip(lengths, tokens, strict=True)) / 8 == pytest.approx(1.0)  # type: ignore[operator]
    sequences = values(BatchWhiten("sequences", eps=0.0), a, b)
    assert sum(sequences) == pytest.approx(0.0, abs=1e-12) and sum(v * v for v in sequences) / 4 == pytest.approx(1.0)  # type: ignore
    assert tokens != pytest.approx(sequences)
    unbiased = values(BatchWhiten("sequences", ddof=1, eps=0.0), a, b)
    assert sum(v * v for v in unbiased) / 3 == pytest.approx(1.0)  # type: ignore[operator]
    uncentred = values(BatchWhiten("sequences", center=False, eps=0.0), group(1.0, 0.0))
    assert uncentred == pytest.approx([2.0, 0.0])
    soft = values(BatchWhiten("sequences", eps=0.75, eps_on="variance"), group(1.0, 0.0))
    assert soft == pytest.approx([0.5, -0.5])
    assert values(BatchWhiten(), group(0.1, 0.1), group(0.1, name="r")) == [0.0, 0.0, 0.0]


def test_chain_centres_then_whitens() -> None:
    chain = Chain({"center": GroupAdvantage(scale="none"), "off": None, "whiten": BatchWhiten("sequences", eps=0.0)})
    a, b = group(1.0, 0.0), group(10.0, 4.0, name="r")
    expected = [0.5, -0.5, 3.0, -3.0]
    deviation = math.sqrt(sum(e * e for e in expected) / 4)
    assert values(chain, a, b) == pytest.approx([e / deviation for e in expected])
    one = group(1.0, 0.0, 0.0)
    assert values(chain, one) == pytest.approx(values(GroupAdvantage(eps=0.0), one))


def test_records_are_not_changed_and_estimators_travel() -> None:
    before = group(1.0, 0.0)
    for estimator in (GroupAdvantage(), Reward(1.0), BatchWhiten(), Chain({"a": GroupAdvantage()})):
        copy = pickle.loads(pickle.dumps(estimator))
        assert values(copy, before) == values(estimator, before)
    assert [r.advantage for r in before.rollouts] == [None, None]
    assert GroupAdvantage()([]) == [] and BatchWhiten()([]) == []


def test_statistics() -> None:
    groups = GroupAdvantage(scale="none")([group(1.0, 0.0), group(1.0, 1.0, name="r"), group(0.5, None, name="s")])
    assert statistics(groups) == {
        "advantage/dead_groups": (1.0, 3.0),
        "advantage/single_groups": (1.0, 3.0),
        "advantage/abs": (1.0, 5.0),
        "reward/mean": (3.5, 5.0),
        "reward/failed": (1.0, 6.0),
    }


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"center": "middle"}, "center='middle' does not exist"),
        ({"scale": "mad"}, "scale='mad' does not exist"),
        ({"ddof": 2}, "ddof=2 does not exist"),
        ({"eps": -1.0}, "eps=-1.0 must be finite"),
        ({"eps_on": "mean"}, "eps_on='mean' does not exist"),
        ({"singleton": "drop"}, "singleton='drop' does not exist"),
        ({"dead_group": "skip"}, "dead_group='skip' does not exist"),
        ({"dead_tolerance": -1.0}, "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GroupAdvantage(**settings)


def test_whitening_settings_are_checked() -> None:
    for bad in ({"over": "groups"}, {"eps_on": "x"}, {"ddof": 3}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="BatchWhiten"):
            BatchWhiten(**bad)  # type: ignore[arg-type]
