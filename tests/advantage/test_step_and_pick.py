"""Advantages that look at the whole step or single out samples: the numbers of the publications, and what degenerate steps give."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace

import pytest

from posttrain.advantage import (
    BatchScale,
    BatchWhiten,
    BestMinusSecond,
    BetaNorm,
    Chain,
    DropOutliers,
    DropRepeats,
    Extremes,
    GreedyBaseline,
    GroupAdvantage,
    LiveGroups,
    PerReward,
    PromptBaseline,
    RunningBaseline,
    soft_maximum,
)
from posttrain.advantage.group import Estimator
from posttrain.checks import needs_group
from posttrain.data.rows import to_rows
from posttrain.records import Group, Sampling, Score, Segment, Source
from tests.advantage.test_group import group, values

CENTER = GroupAdvantage(scale="none")


def expected_over_gradient(estimator: Estimator, k: int, p: float, mean: bool = True) -> float:
    """E[sum_i A_i grad log pi_i] (over k, for a mean) divided by the gradient of p, for Bernoulli rewards: exact, by enumeration."""
    total = 0.0
    for rewards in itertools.product((1.0, 0.0), repeat=k):
        probability = math.prod(p if r else 1 - p for r in rewards)
        score = [(1 - p) if r else -p for r in rewards]
        total += probability * sum(a * s for a, s in zip(values(estimator, group(*rewards)), score, strict=True))  # type: ignore[operator]
    return total / (p * (1 - p)) / (k if mean else 1)


# -- baselines ---------------------------------------------------------------------------------------------------------------------
def test_length_weighted_baseline() -> None:
    estimator = GroupAdvantage("length_weighted", "none")
    lengths = (10, 30, 20, 40)
    found = values(estimator, group(1.0, 0.0, 1.0, 0.0, lengths=lengths))
    assert found == pytest.approx([0.7, -0.3, 0.7, -0.3])
    assert sum(n * a for n, a in zip(lengths, found, strict=True)) == pytest.approx(0.0, abs=1e-12)  # type: ignore[operator]
    assert sum(found) != pytest.approx(0.0, abs=1e-3)  # type: ignore[arg-type]
    same = group(1.0, 0.0, 0.25, lengths=(5, 5, 5))
    assert values(estimator, same) == pytest.approx(values(CENTER, same))
    longest = values(estimator, group(1.0, 0.0, lengths=(1, 10**6)))
    assert longest == pytest.approx([1.0, 0.0], abs=1e-5)


def test_length_counts_only_what_is_learnt_from() -> None:
    one = group(1.0, 0.0, lengths=(10, 30))
    tool = Segment((1,) * 500, Source.tool)
    hidden = Segment((1,) * 4, Source.policy, logprobs=(-1.0,) * 4, version=0, trainable=(False,) * 4)
    padded = replace(one, rollouts=(replace(one.rollouts[0], segments=(*one.rollouts[0].segments, tool, hidden)), one.rollouts[1]))
    estimator = GroupAdvantage("length_weighted", "none")
    assert values(estimator, padded) == values(estimator, one) == pytest.approx([0.75, -0.25])
    whiten = BatchWhiten("tokens", eps=0.0)
    assert values(whiten, padded) == values(whiten, one)


@pytest.mark.parametrize("empty", [(), (Segment((1,), Source.tool),)])
def test_length_weights_without_any_length(empty: tuple) -> None:
    bare = group(1.0, 0.0)
    bare = replace(bare, rollouts=tuple(replace(r, segments=empty) for r in bare.rollouts))
    assert values(GroupAdvantage("length_weighted", "none"), bare) == [0.5, -0.5]


def test_over_the_mean() -> None:
    estimator = GroupAdvantage("mean", "mean")
    assert values(estimator, group(1.0, 0.0, 0.0, 0.0)) == pytest.approx([3.0, -1.0, -1.0, -1.0])
    assert values(estimator, group(0.0, 0.0)) == values(estimator, group(1.0, 1.0)) == [0.0, 0.0]
    uncentred = GroupAdvantage("none", "mean", dead_group="formula")
    assert values(uncentred, group(0.0, 0.0)) == [0.0, 0.0]
    for p, k, one_term_less, all_terms in (
        (0.25, 4, 2.3125, 2.734375),
        (0.1, 4, 2.71, 3.439),
        (0.5, 4, 1.75, 1.875),
        (0.25, 8, 3.4661, 3.5995),
    ):
        assert expected_over_gradient(estimator, k, p) == pytest.approx(one_term_less, abs=6e-5)
        assert expected_over_gradient(uncentred, k, p) == pytest.approx(all_terms, abs=6e-5)
        assert sum((1 - p) ** j for j in range(k - 1)) == pytest.approx(one_term_less, abs=6e-5)
    assert expected_over_gradient(estimator, 2, 0.3) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"group 'q' has a reward of -0.5.*must not be negative"):
        values(estimator, group(1.0, -0.5))


def test_greedy_baseline() -> None:
    drawn = group(1.0, 0.0, 0.25)
    greedy = replace(drawn.rollouts[2], sampling=Sampling(temperature=0.0))
    told = replace(drawn, rollouts=(*drawn.rollouts[:2], greedy))
    assert values(GreedyBaseline(), told) == [0.75, -0.25, None]
    assert [row.sample_id for row in to_rows(GreedyBaseline()([told]))] == ["q/0", "q/1"]
    failed = replace(told, rollouts=(*told.rollouts[:2], replace(greedy, reward=None)))
    (dropped,) = GreedyBaseline()([failed])
    assert dropped.dropped == "no greedy reward" and to_rows([dropped]) == []
    equal = replace(told, rollouts=(replace(told.rollouts[0], reward=0.25), greedy))
    assert values(GreedyBaseline(), equal) == [0.0, None]
    for count, wrong in ((0, drawn), (2, replace(told, rollouts=(*told.rollouts, greedy)))):
        with pytest.raises(ValueError, match=rf"group 'q' has {count} answers sampled at temperature 0 instead of 1"):
            GreedyBaseline()([wrong])


def test_running_baseline_is_compared_before_it_moves_and_survives() -> None:
    estimator = RunningBaseline(decay=0.5)
    assert values(estimator, group(1.0, 1.0, 0.0)) == [1.0, 0.5, -0.75]
    assert estimator.baselines == {"default": 0.375}
    copy = RunningBaseline(decay=0.5)
    copy.load_state_dict(pickle.loads(pickle.dumps(estimator.state_dict())))
    assert values(copy, group(0.0)) == values(estimator, group(0.0)) == [-0.375]
    other = group(1.0, None, name="r")
    other = replace(other, rollouts=tuple(replace(r, prompt=replace(r.prompt, env="maths")) for r in other.rollouts))
    assert values(estimator, other) == [1.0, None]
    assert values(RunningBaseline(decay=0.5, by="all"), group(1.0), other) == [1.0, 0.5, None]
    chain = Chain({"base": RunningBaseline(0.5), "whiten": BatchWhiten("sequences")})
    chain([group(1.0, 0.0)])
    fresh = Chain({"base": RunningBaseline(0.5), "whiten": BatchWhiten("sequences")})
    fresh.load_state_dict(chain.state_dict())
    assert fresh.steps["base"].baselines == {"default": 0.25}  # type: ignore[union-attr]


def test_a_baseline_known_of_the_prompt() -> None:
    told = group(1.0, 0.0, None)
    told = replace(told, prompt=replace(told.prompt, meta={"v_star": 0.25, "text": "x"}))
    assert values(PromptBaseline("v_star"), told) == [0.75, -0.25, None]
    assert values(PromptBaseline("v_star", floor=0.0), told) == [0.75, 0.0, None]
    for key, shown in (("value", "None"), ("text", "'x'")):
        with pytest.raises(ValueError, match=rf"prompt 'q': .*column '{key}', not {shown}; its other columns are v_star, text"):
            values(PromptBaseline(key), told)


def test_soft_maximum_lies_between_mean_and_maximum() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0]
    assert soft_maximum(rewards, 1e6) == pytest.approx(0.25, abs=1e-6) and soft_maximum(rewards, 1e-3) == pytest.approx(1.0, abs=2e-3)
    assert soft_maximum(rewards, 0.5) == pytest.approx(0.5 * math.log((math.exp(2.0) + 3) / 4))
    assert soft_maximum([0.0] * 8, 0.5) == 0.0 and math.isfinite(soft_maximum([1000.0, -1000.0], 1e-3))
    for bad in (([], 0.5), ([1.0], 0.0)):
        with pytest.raises(ValueError, match="soft_maximum needs rewards"):
            soft_maximum(*bad)


# -- the best of a group -----------------------------------------------------------------------------------------------------------
def test_best_minus_second() -> None:
    assert values(BestMinusSecond(), group(0.5, 0.9, 0.1)) == pytest.approx([0.0, 0.4, 0.0])
    assert values(BestMinusSecond(), group(1.0, 1.0, 0.0)) == [0.0, 0.0, 0.0]
    assert values(BestMinusSecond(), group(1.0)) == [0.0] and values(BestMinusSecond(), group(1.0, None)) == [0.0, None]
    for k, p in ((4, 0.25), (4, 0.1), (8, 0.5)):
        assert expected_over_gradient(BestMinusSecond(), k, p, mean=False) == pytest.approx(k * (1 - p) ** (k - 1))
    assert expected_over_gradient(BestMinusSecond(), 4, 0.25, mean=False) == pytest.approx(1.6875)
    scaled = values(BestMinusSecond("std", ddof=1, eps=0.0), group(1.0, 0.0, 0.0, 0.0))
    assert scaled == pytest.approx([2.0, 0.0, 0.0, 0.0])
    assert expected_over_gradient(BestMinusSecond("std"), 4, 0.25, mean=False) != pytest.approx(1.6875, rel=0.1)


def test_extremes() -> None:
    chain = Chain({"center": CENTER, "extremes": Extremes(best=1, worst=2)})
    assert values(chain, group(0.5, 1.0, 0.0, 0.25, None)) == pytest.approx([None, 0.5625, -0.4375, -0.1875, None])
    assert values(chain, group(1.0, 0.0)) == [0.5, -0.5]
    kept = to_rows(chain([group(0.5, 1.0, 0.0, 0.25)]))
    assert [row.sample_id for row in kept] == ["q/1", "q/2", "q/3"]
    assert chain([group(0.5, 1.0, 0.0, 0.25)])[0].rollouts[0].reward == 0.5


def test_repeats_of_an_answer_count_once() -> None:
    said = group(1.0, 1.0, None, 1.0, 0.0)
    words = ((7,), (8,), (9,), (7,), (9,))
    told = replace(said, rollouts=tuple(replace(r, segments=(replace(r.segments[0], ids=w, logprobs=(-1.0,)),)) for r, w in zip(said.rollouts, words, strict=True)))
    chain = Chain({"center": CENTER, "once": DropRepeats()})
    assert values(CENTER, told) == [0.25, 0.25, None, 0.25, -0.75]
    assert values(chain, told) == [0.25, 0.25, None, None, -0.75], "an answer whose verifier failed is nobody's first"
    assert values(chain, told, replace(told, prompt=replace(told.prompt, id="r")))[5:] == [0.25, 0.25, None, None, -0.75], "other prompts are no repeats"


# -- the whole step ----------------------------------------------------------------------------------------------------------------
def test_live_groups() -> None:
    chain = Chain({"center": CENTER, "live": LiveGroups()})
    live, dead = group(1.0, 0.0), group(1.0, 1.0, name="r")
    assert values(chain, live) == [0.5, -0.5]
    assert values(chain, live, dead) == [1.0, -1.0, 0.0, 0.0]
    assert values(chain, dead, group(0.0, 0.0, name="s")) == [0.0] * 4
    assert values(chain, live, group(None, None, name="t")) == [0.5, -0.5, None, None]
    assert values(Chain({"center": CENTER, "live": LiveGroups(0.1)}), live, group(0.95, 1.0, name="r"))[:2] == [1.0, -1.0]


def test_batch_scale() -> None:
    chain = Chain({"center": CENTER, "scale": BatchScale(eps=0.0)})
    a, b = group(1.0, 0.0), group(1.0, 1.0, name="r")
    deviation = math.sqrt(3) / 4
    assert values(chain, a, b) == pytest.approx([0.5 / deviation, -0.5 / deviation, 0.0, 0.0])
    own = values(Chain({"center": CENTER, "scale": BatchScale("advantage", eps=0.0)}), a, b)
    assert own == pytest.approx([math.sqrt(2), -math.sqrt(2), 0.0, 0.0])
    assert values(chain, b) == [0.0, 0.0]
    assert values(BatchScale("reward", 1, 0.25, "variance"), group(1.0, 0.0)) == pytest.approx([1 / math.sqrt(0.75), 0.0])


def test_beta_norm_limits() -> None:
    for rate in (0.1, 0.25, 0.5):
        assert BetaNorm.value(1.0, rate, 1.0, 1.0) == pytest.approx(1 - rate)
        normed = (1 - rate) / math.sqrt(rate * (1 - rate))
        assert BetaNorm.value(1.0, rate, 1.5, 1.5) == pytest.approx(math.pi / 8 * normed)
    assert BetaNorm.value(0.0, 0.0, 3.0, 2.0) == BetaNorm.value(1.0, 1.0, 3.0, 2.0) == 0.0


def test_beta_norm_fits_the_step() -> None:
    rates = [0.25, 0.5, 0.75, 0.25]
    mean, variance = 0.4375, sum((r - 0.4375) ** 2 for r in rates) / 3
    strength = mean * (1 - mean) / variance - 1
    expected = (1 + mean * strength / 3, 1 + (1 - mean) * strength / 3)
    assert BetaNorm().parameters(rates) == pytest.approx(expected)
    groups = [group(*([1.0] * round(4 * r) + [0.0] * (4 - round(4 * r))), name=str(i)) for i, r in enumerate(rates)]
    found = values(BetaNorm(), *groups)
    density = math.gamma(sum(expected)) / math.gamma(expected[0]) / math.gamma(expected[1])
    assert found[0] == pytest.approx(0.75 / (density * 0.25 ** (expected[0] - 1) * 0.75 ** (expected[1] - 1)))
    assert sum(found) == pytest.approx(0.0, abs=1e-9)  # type: ignore[arg-type]


def test_beta_norm_on_degenerate_steps() -> None:
    assert BetaNorm().parameters([0.5]) == (1.0, 1.0)
    assert values(BetaNorm(), group(1.0, 0.0)) == [0.5, -0.5]
    assert BetaNorm(clamp=30.0).parameters([0.5, 0.5]) == (11.0, 11.0)
    assert BetaNorm().parameters([0.0, 1.0]) == (1.0, 1.0)  # more spread than any beta distribution has
    assert BetaNorm().parameters([0.0, 0.0])[0] == 1.0
    assert values(BetaNorm(), group(1.0, 1.0), group(0.0, None, name="r")) == [0.0, 0.0, 0.0, None]
    with pytest.raises(ValueError, match=r"reward of sample 'q/0' is 0.5.*rewards of 0 and 1"):
        values(BetaNorm(), group(0.5, 1.0))


def rewarded(*vectors: dict[str, float | None], name: str = "q") -> Group:
    made = group(*[sum(v for v in each.values() if v is not None) for each in vectors], name=name)
    scores = [{n: Score(v) if v is not None else Score(None, "error") for n, v in each.items()} for each in vectors]
    return replace(made, rollouts=tuple(replace(r, scores=s) for r, s in zip(made.rollouts, scores, strict=True)))


def test_several_rewards_are_normalised_apart() -> None:
    exact = PerReward(inner=GroupAdvantage(eps=0.0))
    opposed = rewarded({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0})
    assert values(exact, opposed) == [0.0, 0.0]
    half = rewarded({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5})
    assert values(exact, half) == [0.0, 0.0]
    assert values(GroupAdvantage(eps=0.0), half) == pytest.approx([1.0, -1.0])
    saturated = rewarded({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0})
    assert values(exact, saturated) == pytest.approx([1.0, -1.0])
    weighted = PerReward({"a": 1.0, "b": 0.2}, GroupAdvantage(eps=0.0))
    assert values(weighted, opposed) == pytest.approx([0.8, -0.8])
    one = rewarded({"a": 1.0}, {"a": 0.0}, {"a": 0.0})
    assert values(exact, one) == pytest.approx(values(GroupAdvantage(eps=0.0), one))


def test_a_reward_that_failed_on_one_sample_leaves_only_its_own_statistics() -> None:
    exact = PerReward(inner=CENTER)
    partial = rewarded({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": None}, {"a": 0.5, "b": 0.0})
    assert values(exact, partial) == pytest.approx([0.5 + 0.5, -0.5, 0.0 - 0.5])
    unscored = replace(partial, rollouts=(replace(partial.rollouts[0], reward=None), *partial.rollouts[1:]))
    assert values(exact, unscored) == pytest.approx([None, -0.25, 0.25])
    with pytest.raises(ValueError, match=r"weighs c, but the rewards are a, b"):
        values(PerReward({"c": 1.0}), partial)


def test_outliers_leave_the_step() -> None:
    usual = [1.0, -1.0] * 10
    chain = Chain({"whiten": BatchWhiten("sequences", eps=0.0), "outliers": DropOutliers(3.0)})
    assert None not in values(chain, group(*usual))
    found = values(chain, group(*usual, 40.0))
    assert found[-1] is None and found.count(None) == 1
    rows = to_rows(chain([group(*usual, 40.0)]))
    assert len(rows) == 20 and "q/20" not in {row.sample_id for row in rows}
    assert values(DropOutliers(), group(None, 1.0)) == [None, 1.0]
    assert values(DropOutliers(), group(None)) == [None]


def test_the_released_outlier_rule_is_another_one() -> None:
    """Standardised values compared with the raw mean and 3: with rewards around 10 it keeps next to nothing."""
    rewards = [9.0, 11.0] * 10
    standardised = values(BatchWhiten("sequences", eps=0.0), group(*rewards))
    released = [a for a in standardised if 10.0 - 3 <= a <= 10.0 + 3]  # type: ignore[operator]
    ours = values(Chain({"w": BatchWhiten("sequences", eps=0.0), "o": DropOutliers()}), group(*rewards))
    assert released == [] and None not in ours


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: LiveGroups(-1.0), "must not be negative"),
        (lambda: BatchScale("loss"), "of='loss' is reward or advantage"),  # type: ignore[arg-type]
        (lambda: BatchScale(eps=-1.0), "must be finite and not negative"),
        (lambda: BetaNorm(0.0), "must be above 0"),
        (lambda: DropOutliers(0.0), "must be above 0"),
        (lambda: BestMinusSecond("mad"), "scale='mad' is none or std"),  # type: ignore[arg-type]
        (lambda: Extremes(0, 0), "not both 0"),
        (lambda: RunningBaseline(1.0), "below 1"),
    ],
)
def test_impossible_settings_are_refused(make, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_who_compares_the_answers_of_a_group() -> None:
    compares = [CENTER, GroupAdvantage("length_weighted", "none"), BestMinusSecond(), Extremes(), Chain({"c": CENTER, "l": LiveGroups()})]
    assert all(map(needs_group, compares))
    assert not any(map(needs_group, [RunningBaseline(), GreedyBaseline(), BatchWhiten(), Chain({"w": BatchWhiten(), "off": None})]))
