"""Corners of the estimators: boundaries of settings, failed and unlearnt samples, groups of one or two, guards against nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from posttrain.advantage import (
    Among,
    BatchScale,
    BatchWhiten,
    BestMinusSecond,
    BetaNorm,
    Chain,
    Constant,
    DropOutliers,
    DropRepeats,
    Extremes,
    FreeBaseline,
    GreedyBaseline,
    GroupAdvantage,
    LiveGroups,
    PerReward,
    Placed,
    PositivePart,
    PromptBaseline,
    Reward,
    RunningBaseline,
    statistics,
)
from posttrain.advantage.exits import Progress, RankDecay, Serial, learnt_from
from posttrain.advantage.exits import values as exit_values
from posttrain.advantage.group import learnt_tokens
from posttrain.advantage.shape import ByDirection, Diverse, ScaleBy, TailRisk, TrustMix
from posttrain.data.rows import to_rows
from posttrain.records import Group, Sampling, Score, Segment, Source
from tests.advantage.test_exits import blocks, chain, column, early, serial
from tests.advantage.test_exits import group as group_of
from tests.advantage.test_group import group, values
from tests.advantage.test_shape import asked, rewards, scored

CENTER = GroupAdvantage(scale="none")


def with_members(one: Group, *changes: dict[str, Any]) -> Group:
    """The group, each rollout with its own changes."""
    return replace(one, rollouts=tuple(replace(r, **change) for r, change in zip(one.rollouts, changes, strict=True)))


def with_meta(one: Group, **meta: Any) -> Group:
    return replace(one, prompt=replace(one.prompt, meta=meta))


def advantages(one: Group) -> list[float | None]:
    return [r.advantage for r in one.rollouts]


# -- rewards that are not finite -----------------------------------------------------------------------------------------------------
def spoilt(index: int) -> Group:
    """Three answers of which one earned NaN, with everything an estimator may look for: a greedy one, a column, a score."""
    made = with_meta(group(*(math.nan if i == index else float(i) for i in range(3)), lengths=(1, 2, 3)), difficulty=1.0, v=1.0)
    scores = {name: Score(1.0) for name in ("class", "think", "v")}
    return with_members(made, {"scores": scores, "sampling": Sampling(temperature=0.0)}, {"scores": scores}, {"scores": scores})


@pytest.mark.parametrize(
    "estimator",
    [
        *(BestMinusSecond(), GreedyBaseline(), PromptBaseline("v"), Extremes(1, 1), Among(Reward(), keep=2), RunningBaseline()),
        *(LiveGroups(), BatchScale(), BetaNorm(), PerReward(), DropOutliers(), FreeBaseline()),
        *(Diverse(), TrustMix(), ScaleBy(), TailRisk(), ByDirection({"v": "v"}), RankDecay()),
    ],
    ids=lambda e: type(e).__name__,
)
def test_whoever_reads_rewards_refuses_one_that_is_not_finite(estimator: Any) -> None:
    """The last one is the longest of the group: also an answer that is not compared is looked at."""
    with pytest.raises(ValueError, match=r"reward of sample 'q/2' is (nan|not finite).*must be None"):
        estimator([spoilt(2)])


def test_an_exit_whose_reward_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match="reward of sample 'e0' is nan"):
        Progress()([blocks((1, math.nan))])


# -- within the group ----------------------------------------------------------------------------------------------------------------
def test_a_segment_that_is_not_learnt_has_no_learnt_tokens() -> None:
    (rollout,) = group(1.0, lengths=(3,)).rollouts
    hidden = Segment((1, 1), Source.policy, logprobs=(-1.0, -1.0), version=0, trainable=False)
    assert learnt_tokens(replace(rollout, segments=(*rollout.segments, hidden))) == 3


def test_the_other_of_two_has_no_deviation_and_leaves_the_sample_unscaled() -> None:
    pair = GroupAdvantage("loo", "loo_std", ddof=1, eps=0.5)
    assert values(pair, group(1.0, 0.0)) == [1.0, -1.0]


def test_lengths_of_failed_answers_do_not_count() -> None:
    """(1 * 1 + 3 * 0) / 4 = 1/4; the failed answer of 5 tokens is nowhere."""
    assert values(GroupAdvantage("length_weighted", "none"), group(1.0, None, 0.0, lengths=(1, 5, 3))) == [0.75, None, -0.25]


def test_a_deviation_of_exactly_0_divides_nothing() -> None:
    assert values(GroupAdvantage(eps=0.0, dead_group="formula"), group(3.0, 3.0)) == [0.0, 0.0]
    assert values(GroupAdvantage("none", "std", eps=0.0, dead_group="formula"), group(3.0, 3.0)) == [3.0, 3.0]


# -- the whole step, whitened ----------------------------------------------------------------------------------------------------------
def test_an_answer_without_learnt_tokens_does_not_make_a_step_of_equal_rewards_live() -> None:
    assert values(BatchWhiten("tokens"), group(1.0, 1.0, 0.0, lengths=(2, 3, 0))) == [0.0, 0.0, 0.0]


def test_a_step_without_usable_rewards_comes_back_as_a_list_of_its_own() -> None:
    for estimator in (BatchWhiten(), DropOutliers()):
        given = [group(None)]
        found = estimator(given)
        assert found == given and found is not given
        assert estimator(()) == []


def test_whitening_one_value_alone() -> None:
    """Its variance is 0, with either divisor: what is left to divide by is eps, or nothing."""
    for ddof in (0, 1):
        assert values(BatchWhiten("sequences", center=False, ddof=ddof, eps=0.5), group(3.0)) == [6.0]
        assert values(BatchWhiten("sequences", center=False, ddof=ddof, eps=0.0), group(3.0)) == [3.0]


def test_epsilon_is_added_to_the_deviation_or_under_its_root() -> None:
    """Rewards 1 and 0 deviate by 1/2, with variance 1/4."""
    assert values(BatchWhiten("sequences", eps=0.5), group(1.0, 0.0)) == [0.5, -0.5]
    assert values(BatchWhiten("sequences", eps=2.0, eps_on="variance"), group(1.0, 0.0)) == pytest.approx([1 / 3, -1 / 3])
    assert values(BestMinusSecond("std", ddof=0, eps=0.5), group(1.0, 0.0)) == [1.0, 0.0]


def test_what_is_counted_before_and_beside_advantages() -> None:
    """Three groups, two of them dead, without advantages: nothing failed.  A failed answer with an advantage all the same counts in both."""
    bare = statistics([group(1.0, 1.0), group(0.0, 0.0, name="r"), group(1.0, 0.0, name="s")])
    assert bare["advantage/dead_groups"] == (2.0, 3.0) and bare["reward/failed"] == (0.0, 6.0) and bare["advantage/abs"] == (0.0, 0.0)
    constant = statistics(Constant(0.5)([group(1.0, None)]))
    assert constant["advantage/abs"] == (1.0, 2.0) and constant["reward/failed"] == (1.0, 2.0)


# -- samples singled out --------------------------------------------------------------------------------------------------------------
def test_the_better_of_two() -> None:
    assert values(BestMinusSecond(), group(0.25, 1.0)) == [0.0, 0.75]


def test_one_end_of_a_group_is_enough() -> None:
    one = CENTER([group(0.5, 1.0, 0.0)])
    assert advantages(Extremes(best=0, worst=1)(one)[0]) == [None, None, -0.5]
    assert advantages(Extremes(best=1, worst=0)(one)[0]) == [None, 0.5, None]


def test_ends_are_those_of_the_rewards_whoever_has_an_advantage() -> None:
    """The best answer lost its advantage before; nobody takes its place.  And one without a reward is no end."""
    one = with_members(group(1.0, 0.5, 0.0), {}, {"advantage": 2.0}, {"advantage": 3.0})
    assert advantages(Extremes(best=1, worst=1)([one])[0]) == [None, None, 3.0]
    assert values(Chain({"one": Constant(), "best": Extremes(best=1, worst=0)}), group(0.0, None, 1.0)) == [None, None, 1.0]


def test_the_first_answer_with_a_reward_is_the_first() -> None:
    """Four times the same tokens: that of a failed verifier is nobody's first but is a repeat; one without an advantage is the first all the same."""
    said = group(None, 1.0, None, 1.0)
    assert values(Chain({"one": Constant(), "once": DropRepeats()}), said) == [1.0, 1.0, None, None]
    unlearnt = with_members(said, {}, {}, {}, {"advantage": 1.0})
    assert advantages(DropRepeats()([unlearnt])[0]) == [None, None, None, None]


def test_reward_per_token_of_short_answers() -> None:
    """1/2 of one token, 4/5 of two: 1/2 and 2/5 per token; an empty answer counts as one token."""
    two = group(0.5, 0.8, 0.45, lengths=(1, 2, 1))
    assert values(Among(Reward(), keep=2, by="reward_per_token"), two) == [0.5, None, 0.45]
    assert values(Among(Reward(), keep=2, by="reward_per_token"), group(0.5, 0.1, 0.4, lengths=(0, 1, 1))) == [0.5, None, 0.4]


def test_an_inner_estimator_that_loses_a_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Among(lambda groups: list(groups)[:1])([group(1.0, 0.0), group(1.0, 0.0, name="r")])


def test_a_baseline_without_memory_is_the_last_reward() -> None:
    assert values(RunningBaseline(decay=0.0), group(1.0, 0.25, 0.5)) == [1.0, -0.75, 0.25]


# -- without a comparison ---------------------------------------------------------------------------------------------------------------
def test_a_reward_that_names_no_places_is_paid_at_the_last_sampled_token() -> None:
    tool = Segment((4, 5), Source.tool, turn=1, trainable=False)
    made = group(0.75, None, lengths=(3, 2))
    with_tool, failed = made.rollouts
    (found,) = Placed()([replace(made, rollouts=(replace(with_tool, segments=(*with_tool.segments, tool)), replace(failed, advantage=1.0)))])
    assert found.rollouts[0].paid == (0.0, 0.0, 0.75, 0.0, 0.0) and found.rollouts[0].advantage == 0.75
    assert advantages(found)[1] is None, "no reward, no advantage"
    (row,) = to_rows([found])
    assert list(row.advantage) == [0.0, 0.0, 0.0, 0.75, 0.0, 0.0], "the column of the row, the prompt of one token first"


def test_places_a_reward_names_are_kept_and_nothing_is_paid_where_nothing_was_sampled() -> None:
    named = with_members(group(1.0, lengths=(3,)), {"paid": (0.25, 0.75, 0.0)})
    (row,) = to_rows(Placed()([named]))
    assert list(row.advantage) == [0.0, 0.25, 0.75, 0.0]
    given = with_members(group(1.0), {"segments": (Segment((4, 5), Source.demo),)})
    assert Placed()([given])[0].rollouts[0].paid == (0.0, 0.0)


def test_helped_answers_are_compared_by_reward() -> None:
    """Whatever advantage they come with, or without one."""
    one = group(1.0, 0.0)
    assert values(FreeBaseline(), one) == values(FreeBaseline(), with_members(one, {"advantage": 9.0}, {})) == [0.5, -0.5]


def test_the_positive_part_of_what_has_no_advantage_yet() -> None:
    assert values(PositivePart(), group(1.0, -1.0, None)) == [1.0, 0.0, None]
    assert values(PositivePart(keep_zeros=False), group(0.0, 0.5)) == [None, 0.5]
    assert values(Chain({"one": Constant(), "positive": PositivePart()}), group(1.0, None)) == [1.0, None]


# -- rewards shaped ---------------------------------------------------------------------------------------------------------------------
def test_settings_at_the_edge_of_what_is_allowed() -> None:
    """A floor of 1 leaves every reward; any horizon above 0 is one; the tail may have no weight or a small one, or the baseline no memory."""
    assert rewards(Diverse(floor=1.0), scored("class", [1.0, 1.0, 0.5], [3, 3, 3])) == [1.0, 1.0, 0.5]
    told = scored("think", [1.0, 0.0], [1.0, 0.0])
    assert rewards(TrustMix(horizon=0.5, steps=1), told) == pytest.approx([1 + 0.3 * math.exp(-2), 0.0])
    assert TailRisk(w=0.0).value(2.5) == pytest.approx(-2.5) and TailRisk(w=0.5).value(0.0) == pytest.approx(-5.0)


def refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_settings_just_beyond_what_is_allowed() -> None:
    for settings in ({"a": 0.0}, {"a": 0.8}, {"b": 1.0}, {"w": -0.1}, {"rate": 0.0}):
        refused(lambda settings=settings: TailRisk(**settings), "do not fit together")
    refused(lambda: BestMinusSecond(ddof=3), "ddof=3 0 or 1")
    refused(lambda: BatchScale(ddof=3), "ddof=3 0 or 1")
    refused(lambda: Extremes(best=-1, worst=3), "must not be negative")


def test_trust_compares_the_means_of_unequally_many() -> None:
    """Right answers score 0.2 and 0.4, the wrong one 0.5: exp(0.3 - 0.5).  Then one right and two wrong.  A reward at the threshold is not right."""
    weight = 0.3 * math.exp(-0.2)
    assert rewards(TrustMix(), scored("think", [1.0, 1.0, 0.5], [0.2, 0.4, 0.5])) == pytest.approx([1 + 0.2 * weight, 1 + 0.4 * weight, 0.5])
    assert rewards(TrustMix(), scored("think", [1.0, 0.0, 0.5], [0.3, 0.4, 0.6])) == pytest.approx([1 + 0.3 * weight, 0.0, 0.5])


def test_of_a_failed_answer_no_score_is_read() -> None:
    told = scored("think", [1.0, 0.0, None], [0.6, 0.4, 0.2])
    bare = with_members(told, {}, {}, {"scores": {}})
    assert rewards(TrustMix(), told) == rewards(TrustMix(), bare) == pytest.approx([1.18, 0.0, None])
    directed = with_members(asked(1.0), {}, {"reward": None, "scores": {}}, {}, {})
    assert rewards(ByDirection({"help": "v1"}), directed) == [0.1, None, 0.5, 0.3]
    assert values(ScaleBy(), with_meta(group(1.0, None), difficulty=2.0)) == [2.0, None]


def test_parts_of_a_reward_are_no_direction_of_their_own() -> None:
    """A score whose name has a slash belongs to another: no column is asked for it."""
    made = with_members(group(1.0), {"scores": {"help": Score(0.5), "help/part": Score(7.0)}})
    assert rewards(ByDirection(), with_meta(made, help=2.0)) == [1.0]


def test_a_direction_is_told_in_the_order_of_its_names() -> None:
    made = with_members(group(1.0), {"scores": {name: Score(1.0) for name in "hgfedcba"}})
    with pytest.raises(ValueError, match="its direction is 0 in a, b, c, d, e, f, g, h, which asks for nothing"):
        ByDirection()([with_meta(made, **dict.fromkeys("abcdefgh", 0.0))])


def test_a_question_with_a_failed_answer_fills_no_bundle() -> None:
    """The bundle is made of the first and the last question: scores 2 and 0, which deviate by sqrt 2, rewards 1 and 0, which
    deviate by 1 over it, and A(2) = -4/3, A(0) = -5."""
    term = TailRisk(bundle=2)
    found = values(term, group(1.0, 0.0), group(1.0, None, name="r"), group(None, None, name="s"), group(1.0, 0.0, name="t"))
    assert found[:2] == found[6:] == pytest.approx([-4 / 3, -5.0]) and found[2:6] == [None] * 4
    assert values(TailRisk(bundle=1), group(None, 1.0)) == [None, None]


def test_questions_of_different_size_fill_no_bundle() -> None:
    term = TailRisk(bundle=2)
    assert values(term, group(1.0, 0.0), group(1.0, 0.0, 0.0, name="r")) == [None] * 5 and term.quantiles == [1.0, 4.0]


def test_a_spread_of_a_thousandth_is_none() -> None:
    """Two questions; the first deviates by 0.003 / sqrt 2, which is a spread, or by less than 0.001, which counts 1.  A(0) = -5."""
    for reward, deviation in ((0.003, 0.003 / math.sqrt(2)), (0.0014, 1.0)):
        found = values(TailRisk(bundle=2), group(0.0, reward), group(0.0, 1.0, name="r"))
        assert found[0] == pytest.approx(-5 / (deviation * (1.0 + reward) / math.sqrt(2)))


# -- several groups ---------------------------------------------------------------------------------------------------------------------
def test_two_live_groups_of_three() -> None:
    three = (group(1.0, 0.0), group(1.0, 0.0, name="r"), group(1.0, 1.0, name="s"))
    assert values(Chain({"center": CENTER, "live": LiveGroups()}), *three) == [0.75, -0.75, 0.75, -0.75, 0.0, 0.0]
    assert values(LiveGroups(), group(1.0, 1.0)) == [1.0, 1.0], "without a live group nothing changes"


def test_a_step_that_does_not_vary_is_not_scaled_and_epsilon_joins_the_deviation() -> None:
    assert values(BatchScale(), group(2.0, 2.0)) == [2.0, 2.0]
    assert values(BatchScale(eps=0.5), group(1.0, 0.0)) == [1.0, 0.0]


def test_the_largest_parameters_of_a_beta_distribution_may_be_small() -> None:
    assert BetaNorm(clamp=0.75).parameters([0.5, 0.5]) == (1.25, 1.25)


def test_rewards_are_added_in_the_order_of_their_names() -> None:
    """So that every process finds the same bits: 1e16, eight times 1 which is lost beside it, and -1e16.  Parts of a reward are not added."""
    scores = {"a": Score(1e16), **{name: Score(1.0) for name in "ihgfedcb"}, "j": Score(-1e16), "j/part": Score(0.5)}
    assert values(PerReward(inner=Reward()), with_members(group(1.0), {"scores": scores})) == [0.0]
    with pytest.raises(ValueError, match="weighs k, l, m, n, o, p, q, but the rewards are a, b, c, d, e, f, g, h, i, j, j/part"):
        PerReward(dict.fromkeys("qponmlk", 1.0))([with_members(group(1.0), {"scores": scores})])


def test_a_sample_that_one_reward_leaves_out_keeps_the_others() -> None:
    """The inner estimator keeps the best answer of each reward: the second of a, the first of b."""
    pair = with_members(group(1.0, 1.0), *({"scores": {"a": Score(a), "b": Score(b)}} for a, b in ((0.25, 0.5), (0.75, 0.0))))
    best = Chain({"reward": Reward(), "best": Extremes(best=1, worst=0)})
    assert values(PerReward({"a": 1.0, "b": 2.0}, best), pair) == [1.0, 0.75]


def test_an_advantage_as_far_away_as_allowed_stays() -> None:
    """4 and 0 lie one deviation of 2 from their mean of 2."""
    assert values(DropOutliers(1.0), group(4.0, 0.0)) == [4.0, 0.0] and values(DropOutliers(0.75), group(4.0, 0.0)) == [None, None]


# -- chains that were left --------------------------------------------------------------------------------------------------------------
def test_a_group_is_dropped_only_where_every_chain_is() -> None:
    """The chain whose answers are all wrong comes first."""
    dead, live = chain(0.0, name="c"), chain(1.0, name="d")
    dropping = Serial(Chain({"decay": RankDecay(), "center": GroupAdvantage(scale="none", dead_group="drop")}))
    (found,) = dropping([group_of(dead, live, early(dead, 1, 0.0), early(live, 1, 1.0))])
    assert found.dropped is None and advantages(found) == [None, -0.25, None, 0.25]
    (empty,) = Serial()([group_of()])
    assert empty.dropped is None and empty.rollouts == ()


def test_a_segment_cut_in_two_learns_no_more_than_before() -> None:
    tool, hidden = Segment((5, 6), Source.tool), Segment((7, 8), Source.policy, trainable=False)
    rollout = replace(chain(1.0), segments=(tool, hidden, Segment((9,), Source.policy)))
    assert [s.trainable for s in learnt_from(rollout, 1).segments] == [(False, False), False, True]
    assert [s.trainable for s in learnt_from(rollout, 3).segments] == [(False, False), (False, False), True]


def test_a_reward_at_the_threshold_is_not_right() -> None:
    (found,) = RankDecay(above=0.5)([serial(0.5, 1.0, 1.0)])
    assert [r.reward for r in found.rollouts] == [0.5, 0.0, 1.0], "the chain, then its exits"


def test_a_chain_the_estimator_leaves_out_carries_nothing() -> None:
    """It keeps the two exits: the later of them holds what they share."""
    (found,) = Serial(Extremes(best=2, worst=0))([with_members(serial(1.0, 0.5, 0.0), *({"advantage": a} for a in (3.0, 1.0, -1.0)))])
    whole, one, two = found.rollouts
    assert whole.advantage is None and column(one) == [None, None, None, 1.0]
    assert column(two) == [0.0, -1.0, -1.0, None, None, -1.0]


def test_progress_needs_an_outcome_and_a_reward() -> None:
    best = Chain({"center": CENTER, "best": Extremes(best=1, worst=0)})
    one, two = chain(1.0, name="c"), chain(0.0, name="d")
    (found,) = Progress(best)([group_of(one, two, early(one, 0, 0.0), early(two, 0, 1.0))])
    assert column(found.rollouts[0]) == [1.5] * 5 and advantages(found)[1:] == [None] * 3
    (failed,) = Progress(Constant())([blocks((0, 1.0), reward=None)])
    assert advantages(failed) == [None, None]


def test_before_the_first_exit_nothing_is_paid() -> None:
    """Forced answers behind 2 and 4 of 5 tokens; what is reported is the mean over the three tokens that are learnt."""
    (found,) = Progress(None)([blocks((2, 0.25), (4, 0.5))])
    assert found.rollouts[0].paid == (0.0, 0.0, 0.25, 0.25, 0.5)
    assert found.rollouts[0].advantage == pytest.approx(1 / 3)


def test_the_values_of_a_chain_stand_in_its_order() -> None:
    assert exit_values(blocks((4, 0.5), (0, 0.25))) == [(0, 0.25), (4, 0.5), (5, 1.0)]


def test_what_tokens_earned_and_nobody_placed_hinders_no_chain() -> None:
    """Rewards of pieces stand beside an answer that is judged as a whole."""
    made = with_members(group(1.0, 0.0), {"paid": (0.75, 0.25)}, {"paid": (0.0, 0.0)})
    found = Chain({"center": CENTER, "white": BatchWhiten(over="sequences", eps=0.0)})([made])[0]
    assert advantages(found) == [1.0, -1.0] and not any(r.placed for r in found.rollouts)


def test_given_answers_that_were_scored_have_no_sampled_tokens_to_count() -> None:
    """Whether they have an advantage yet or not; what nobody scored is not looked at."""
    given = (Segment((5, 6), Source.demo),)
    told = with_members(group(1.0, 0.0), {"segments": given, "advantage": None}, {"segments": given, "advantage": None})
    with pytest.raises(ValueError, match=r"BatchWhiten: over=tokens counts sampled tokens, and these answers are given ones; set advantage\.over=sequences"):
        BatchWhiten()([told])
    unscored = with_members(told, {"reward": None, "advantage": 1.0}, {"reward": None, "advantage": 1.0})
    assert BatchWhiten()([unscored]) == [unscored]
