"""Edges of estimators and gates: ties, samples whose verifier failed, NaN rewards, what is counted, what is handed back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.advantage.group import BatchWhiten, GroupAdvantage
from posttrain.advantage.pick import Among, BestMinusSecond, Extremes, GreedyBaseline
from posttrain.advantage.plain import FreeBaseline, Placed
from posttrain.advantage.shape import TailRisk, TrustMix
from posttrain.advantage.step import DropOutliers
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference
from posttrain.mixture.context import Corrupt
from posttrain.mixture.demos import Demos
from posttrain.mixture.feasible import Feasible
from posttrain.mixture.gate import Add, Inject, InTurn, PassThrough, Unsolved, changes, is_given
from posttrain.mixture.pairs import BestWorst, GivenAgainstSampled, as_demo
from posttrain.mixture.rejection import Rejection
from posttrain.mixture.route import RightOnly
from posttrain.mixture.schedule import WarmupCosine
from posttrain.mixture.turns import WithoutCritique, _parts
from posttrain.records import Demo, Group, Prompt, Rollout, Row, Sampling, Score, Segment, Source, TokenBatch

Q = Prompt("q", (1, 2), text="q", answer="4")


def group(*rewards: float | None, greedy: int | None = None, prefix: int | None = None, scores: tuple[float, ...] = (), name: str = "q") -> Group:
    rollouts = []
    for i, reward in enumerate(rewards):
        segments: tuple[Segment, ...] = (Segment((5, 6 + i), Source.policy, logprobs=(-1.0, -1.0), version=0),)
        if i == prefix:
            segments = (Segment((9,), Source.prefix), *segments)
        own = {"think": Score(scores[i])} if scores else {}
        sampling = Sampling(temperature=0.0 if i == greedy else 1.0)
        rollouts.append(Rollout(f"{name}/{i}", replace(Q, id=name), segments, reward=reward, scores=own, sampling=sampling))
    return Group(replace(Q, id=name), tuple(rollouts))


def demo(ids: tuple[int, ...] = (7, 8), **rewards: float) -> Demo:
    return Demo("given", (Segment(Q.ids, Source.prompt, trainable=False), Segment(ids, Source.demo)), prompt=Q, rewards=rewards)


class First:
    """Hands out 0, 1, 2, ..."""

    def next(self, count: int) -> list[int]:
        return list(range(count))


def values(one: Any) -> list[float | None]:
    return [r.advantage for r in one.rollouts]


@pytest.mark.parametrize("estimator", [GreedyBaseline(), Extremes(), TrustMix(), BestMinusSecond(), FreeBaseline(), BatchWhiten(), GroupAdvantage(), TailRisk(bundle=1)])
def test_a_reward_that_is_no_number_is_an_error_everywhere(estimator: Any) -> None:
    with pytest.raises(ValueError, match="q/1"):
        estimator([group(1.0, math.nan, 0.0, greedy=0, scores=(1.0, 1.0, 1.0))])


def test_who_has_failed_has_no_rank() -> None:
    """An advantage from before does not make a failed sample the best or the worst."""
    failed = group(None, 1.0, 0.0)
    failed = replace(failed, rollouts=(replace(failed.rollouts[0], advantage=9.0), *(replace(r, advantage=r.reward) for r in failed.rollouts[1:])))
    assert values(Extremes(1, 1)([failed])[0]) == [None, 1.0, 0.0]
    unweighed = group(1.0, 0.0)
    assert values(Extremes(1, 0)([replace(unweighed, rollouts=(replace(unweighed.rollouts[0], advantage=2.0), unweighed.rollouts[1]))])[0]) == [2.0, None]


def test_one_answer_is_not_compared_with_itself() -> None:
    assert values(FreeBaseline()([group(1.0)])[0]) == [0.0]
    assert values(FreeBaseline()([group(1.0, None)])[0]) == [0.0, None]
    assert values(FreeBaseline()([group(1.0, 0.0, prefix=1)])[0]) == [0.0, -1.0]


def test_right_is_above_the_threshold_not_at_it() -> None:
    """With one answer at 0.5 there is nobody right, so thinking is not rewarded."""
    (out,) = TrustMix(alpha=1.0)([group(0.5, 0.0, scores=(1.0, 0.0))])
    assert [r.reward for r in out.rollouts] == [0.5, 0.0]
    (out,) = TrustMix(alpha=1.0)([group(0.6, 0.5, scores=(1.0, 0.0))])
    assert [r.reward for r in out.rollouts] == [pytest.approx(1.6), 0.5]


def test_a_question_with_a_failed_answer_fills_no_bundle() -> None:
    risk = TailRisk(bundle=1)
    out = risk([group(1.0, None, name="a"), group(1.0, 0.0, name="b"), Group(Q, ())])
    assert values(out[0]) == [None, None] and None not in values(out[1]) and values(out[2]) == []


def test_what_is_handed_back_is_a_list_of_its_own() -> None:
    given: list[Group] = []
    assert BatchWhiten()(given) == [] and BatchWhiten()(given) is not given
    unscored = [group(None)]
    assert DropOutliers()(unscored) == unscored and DropOutliers()(unscored) is not unscored


def test_right_answers_alone_are_enough() -> None:
    """A group goes on when the given answer or one of its own is right; with neither it is left out."""
    demos = Demos([demo()], None)
    gate = RightOnly()
    assert gate([group(0.0, 0.0)], demos, 0, 0.0)[0].dropped is None, "the given answer is there"
    assert gate([group(1.0, 0.0)], Demos([], None), 0, 0.0)[0].dropped is None, "an own answer is right"
    assert gate([group(0.0, 0.0)], Demos([], None), 0, 0.0)[0].dropped == "nothing_accepted"
    assert gate([group(0.5, 0.9)], Demos([], None), 0, 0.0)[0].dropped == "nothing_accepted", "a partial credit is no success"


@pytest.mark.parametrize("gate", [GivenAgainstSampled(), RightOnly(), Unsolved(), Inject(GroupAdvantage())])
def test_a_gate_that_takes_demonstrations_asks_for_them(gate: Any) -> None:
    """The run would not load any otherwise."""
    assert gate.uses_demos is True


@pytest.mark.parametrize(("setting", "value"), [("solved", "leave"), ("wrong", "keep"), ("missing", "join")])
def test_a_word_of_another_setting_is_refused(setting: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"mixture.gate.{setting}='{value}' does not exist; choose from"):
        Inject(GroupAdvantage(), **{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("own", "chosen"), [(0.9, "own"), (0.1, "given"), (0.5, None)])
def test_a_tie_with_the_given_answer_makes_no_pair(own: float, chosen: str | None) -> None:
    out = GivenAgainstSampled(chosen="better", given="score")([group(own)], Demos([demo(score=0.5)], None), 0, 0.0)
    pairs = [x for x in out if not isinstance(x, Group)]
    assert len(pairs) == (chosen is not None)
    if pairs:
        assert (pairs[0].chosen.id == "given") == (chosen == "given")


def test_only_gates_that_make_pairs_make_pairs() -> None:
    assert not InTurn({"a": PassThrough(), "b": Add(1)}).makes_pairs and InTurn({"a": PassThrough(), "b": BestWorst()}).makes_pairs


def test_what_a_gate_did_leaves_out_what_was_out_before() -> None:
    was_out, stays, goes = replace(group(1.0), dropped="before"), group(1.0), group(0.0)
    found = changes([was_out, stays, goes], [was_out, stays, replace(goes, dropped="now")])
    assert found["mixture/groups_left_out"] == 1.0
    assert changes([was_out, stays], [was_out, stays])["mixture/groups_left_out"] == 0.0


def test_beyond_the_decay_another_value_may_stand() -> None:
    """Peak at the end of warm-up, valley at the end of the decay, and only behind it what comes after."""
    plan = WarmupCosine(peak=1.0, valley=0.1, warmup=2, decay=4, steps=10, after=0.7)
    assert [plan(s / 10) for s in (0, 1, 2, 6, 6.5, 10)] == pytest.approx([0.0, 0.5, 1.0, 0.1, 0.7, 0.7])
    assert replace(plan, after=None)(1.0) == pytest.approx(0.1)


def batch(advantages: list[float], groups: list[Any], entropy: tuple[float, ...] = ()) -> TokenBatch:
    rows = [
        Row(ids=[1, 2], sources=["prompt", "policy"], logps={"current": [math.nan, -1.0], "old": [math.nan, -1.0], "entropy": [math.nan, e]}, advantage=a, group=g)
        for a, g, e in zip(advantages, groups, entropy or (1.0,) * len(groups), strict=True)
    ]
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


def objective(own: Any) -> Objective:
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), aggregate.TokenMean("kept"), {"own": own})
    return Objective({"rollouts": stream})


def test_dead_groups_leave_together_and_the_ungrouped_by_themselves() -> None:
    one = batch([1.0, 0.0, 0.0, 0.0, 2.0, 0.0], ["a", "a", "b", "b", None, None])
    view = objective(mask.DropDeadGroups()).views(one)["rollouts"]
    assert mask.DropDeadGroups().factor(view, one.advantage).tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_the_top_of_a_step_must_see_the_step() -> None:
    goal = objective(mask.TopEntropy(0.5))
    whole = batch([1.0] * 4, ["a", "a", "b", "b"], (0.1, 0.9, 0.2, 0.8))
    whole = whole.replace(totals=goal.totals(whole))
    assert (goal.weights(whole) != 0).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"mask\.TopEntropy"):
        goal.weights(whole.take([0, 1]))
    assert mask._kth_largest(torch.tensor([]), 0.5) == -math.inf


def test_the_demonstrations_of_a_step() -> None:
    assert sum(isinstance(x, Demo) for x in Add()([], Demos([demo()] * 9, First()), 0, 0.0)) == 8


# -- numbers of single terms -------------------------------------------------------------------------------------------------------
def view_of(own: Any, logps: list[list[float]], **more: Any) -> Any:
    rows = [
        Row(
            ids=[1] * (len(each) + 1), sources=["prompt"] + ["demo"] * len(each), advantage=more.get("advantage", 1.0),
            logps={"current": [math.nan, *each], "base": [math.nan] + [-1.0] * len(each), "teacher": [math.nan] + [-0.5] * len(each)},
        )
        for each in logps
    ]  # fmt: skip
    goal = Objective({"demos": Stream(("demo",), likelihood.Token(), reference.Current(), own, aggregate.TokenMean())})
    return goal.views(TokenBatch.from_sequences(rows, dtype=torch.float64))["demos"]


def test_credit_of_a_log_ratio() -> None:
    """Own, to go, and the whole sequence to every token."""
    for credit, expected in (("own", [0.5, 0.5]), ("to_go", [1.0, 0.5]), ("sequence", [1.0, 1.0])):
        term = advantage.LogRatio("teacher", "base", credit)
        assert term.values(view_of(term, [[-1.0, -2.0]])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("ddof", "size"), [(0, 1.0), (1, math.sqrt(2.0))])
def test_two_values_are_whitened_by_their_own_deviation(ddof: int, size: float) -> None:
    term = advantage.Whiten(advantage.Column(), ddof=ddof, eps=0.0)
    found = term.values(view_of(term, [[-1.0, -1.0]], advantage=[9.0, 0.0, 2.0])).tolist()
    assert found == pytest.approx([-1.0 / size, 1.0 / size])


def test_the_reported_value_of_a_saturating_ratio() -> None:
    """``p / (p + gamma)`` itself, and the weight where the denominator is detached."""
    view = view_of(advantage.One(), [[-1.0, -3.0]])
    p, gamma = torch.exp(view.logp), 0.1
    for detached, expected in ((False, p / (p + gamma)), (True, p / (p + gamma))):
        term = reference.Saturating(gamma, detached=detached)
        torch.testing.assert_close(term.objective(view, torch.exp(term.log_ratio(view))), expected, rtol=1e-12, atol=0)


def test_who_reads_the_advantage_column() -> None:
    from posttrain.loss.value import Return, Towards

    assert Towards(label=None).reads_column and not Towards(label="label").reads_column and Return().reads_column


def test_the_positive_part_of_an_advantage_or_else_of_the_reward() -> None:
    from posttrain.advantage.plain import PositivePart

    plain, weighed = group(1.0, -1.0, None), group(1.0, -1.0)
    weighed = replace(weighed, rollouts=tuple(replace(r, advantage=a) for r, a in zip(weighed.rollouts, (-0.5, 0.5), strict=True)))
    assert values(PositivePart()([plain])[0]) == [1.0, 0.0, None] and values(PositivePart()([weighed])[0]) == [0.0, 0.5]
    assert values(PositivePart(keep_zeros=False)([plain])[0]) == [1.0, None, None]


def test_outliers_are_counted_in_deviations() -> None:
    """Mean 1, deviation 2: 4 + 1 is the bound at two deviations."""
    from posttrain.advantage.step import DropOutliers

    one = group(0.0, 0.0, 0.0, 0.0, 5.0)
    assert values(DropOutliers(2.0)([one])[0]) == [0.0, 0.0, 0.0, 0.0, 5.0] and values(DropOutliers(1.99)([one])[0])[-1] is None


def test_a_controller_that_follows_nobody_is_told_who_there_is() -> None:
    from posttrain.mixture.control import Proportional, steer

    control = Proportional(name="beta", metric="rollouts/kl", init=1.0, target=1.0, horizon=1.0)
    with pytest.raises(ValueError, match=r"follows the metric 'rollouts/kl', which this loss does not report; it reports a/x, b/y, c/z"):
        steer({"beta": control}, {}, {"c/z": (1.0, 1.0), "a/x": (1.0, 1.0), "loss": (1.0, 1.0), "b/y": (1.0, 1.0)}, 4)


def test_whitening_by_the_root_of_variance_and_eps() -> None:
    found = BatchWhiten("sequences", eps=3.0, eps_on="variance")([group(0.0, 2.0)])
    assert values(found[0]) == pytest.approx([-0.5, 0.5])


def test_who_has_nothing_to_learn_does_not_make_a_step_worth_something() -> None:
    """Equal rewards but for an answer without a learnt token: nothing was at stake."""
    whole = group(1.0, 1.0, 5.0)
    silent = replace(whole.rollouts[2], segments=(replace(whole.rollouts[2].segments[0], trainable=False),))
    found = BatchWhiten("tokens", eps=0.0)([replace(whole, rollouts=(*whole.rollouts[:2], silent))])
    assert values(found[0]) == [0.0, 0.0, 0.0]


def test_what_counts_as_given_and_what_a_rollout_hands_on_as_a_text() -> None:
    (one,) = group(1.0).rollouts
    mixed = (*one.segments, Segment((9,), Source.tool))
    assert not is_given(replace(one, segments=mixed, finish="given")) and is_given(replace(one, segments=mixed[1:], finish="given"))
    assert not is_given(replace(one, segments=mixed[1:]))
    assert as_demo(one).rewards == {"reward": 1.0} and as_demo(replace(one, reward=None, advantage=2.0)).rewards == {}


def test_groups_of_two_and_steps_of_one() -> None:
    """The smallest that can be compared are, and one value has no deviation of its own."""
    assert values(BestMinusSecond()([group(0.25, 1.0)])[0]) == [0.0, 0.75]
    assert values(BatchWhiten("sequences", ddof=1)([group(2.0)])[0]) == [0.0]


def test_lengths_are_those_of_the_answers_whose_rewards_count() -> None:
    whole = group(None, 1.0, 0.0)
    sizes = (5, 1, 3)
    grown = [replace(r, segments=(replace(r.segments[0], ids=(7,) * n, logprobs=(-1.0,) * n),)) for r, n in zip(whole.rollouts, sizes, strict=True)]
    assert values(GroupAdvantage("length_weighted", "none")([replace(whole, rollouts=tuple(grown))])[0]) == [None, 0.75, -0.25]


def test_an_empty_answer_has_a_reward_per_token() -> None:
    whole = group(1.0, 0.5, 0.0)
    silent = replace(whole.rollouts[0], segments=())
    kept = Among(keep=2, by="reward_per_token")([replace(whole, rollouts=(silent, *whole.rollouts[1:]))])[0]
    assert [r.advantage is not None for r in kept.rollouts] == [True, True, False]


@pytest.mark.parametrize(("coupling", "live"), [("batch", False), ("token", True)])
def test_what_remembers_must_see_whole_steps_as_they_are(coupling: str, live: bool) -> None:
    term = type("Forgetful", (advantage.Column,), {"remembers": True, "coupling": coupling, "live": live})()
    with pytest.raises(ValueError, match="Forgetful remembers, so it must see whole steps"):
        Objective({"rollouts": Stream(("policy",), likelihood.Token(), reference.Current(), term, aggregate.TokenMean())})


def test_without_places_the_last_sampled_token_is_paid() -> None:
    (one,) = Placed()([group(0.5)])[0].rollouts
    assert one.paid == (0.0, 0.5) and one.placed
    with_reply = replace(one, paid=None, segments=(*one.segments, Segment((9,), Source.tool)))
    assert Placed()([Group(Q, (with_reply,))])[0].rollouts[0].paid == (0.0, 0.5, 0.0)


def test_a_deviation_of_a_thousandth_is_none() -> None:
    assert TailRisk._deviation([0.0, 0.001, 0.002]) == 1.0 and TailRisk._deviation([0.0, 0.0011, 0.0022]) == pytest.approx(0.0011)


@pytest.mark.parametrize("gate", [PassThrough(), Add(0), BestWorst(), Rejection(), Feasible({"honest": 0.5}), WithoutCritique(), Corrupt(9, 0.1), InTurn({})])
def test_a_gate_that_takes_none_does_not_ask(gate: Any) -> None:
    """A run that asked for demonstrations would want a file of them."""
    assert gate.uses_demos is False


def test_one_gate_of_several_is_enough_to_ask_for_demonstrations() -> None:
    both = InTurn({"first": PassThrough(), "second": Unsolved(), "none": None})
    assert both.uses_demos and not both.makes_pairs and InTurn({"a": PassThrough(), "b": BestWorst()}).makes_pairs


def test_every_constraint_must_be_met() -> None:
    whole = group(1.0, 0.0)
    scores = ({"honest": Score(1.0), "kind": Score(0.0)}, {"honest": Score(0.5), "kind": Score(0.5)})
    items = [replace(whole, rollouts=tuple(replace(r, scores=s) for r, s in zip(whole.rollouts, scores, strict=True)))]
    _, pair = Feasible({"honest": 0.5, "kind": 0.5})(items, Demos([], None), 0, 0.0)
    assert (pair.chosen.id, pair.rejected.id) == ("q/1", "q/0"), "the better answer breaks one of the two"


def test_the_prompt_of_a_rollout_that_becomes_a_text_is_not_learnt() -> None:
    (one,) = group(1.0).rollouts
    first, *rest = as_demo(one).segments
    assert first == Segment(one.prompt.ids, Source.prompt, trainable=False) and tuple(rest) == one.segments


@pytest.mark.parametrize(("segments", "finish", "whole"), [("policy tool policy", "stop", True), ("policy tool", "stop", False), ("policy tool policy", "env_error", False), ("policy", "stop", False)])
def test_an_episode_has_a_second_answer_or_not(segments: str, finish: str, whole: bool) -> None:
    (one,) = group(1.0).rollouts
    given = tuple(Segment((5 + i,), Source[word]) for i, word in enumerate(segments.split()))
    assert (_parts(replace(one, segments=given, finish=finish)) is not None) == whole  # type: ignore[arg-type]
