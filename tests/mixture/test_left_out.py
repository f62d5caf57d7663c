"""What gates, estimators and controllers leave out, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.advantage.exits import Progress, RankDecay
from posttrain.advantage.group import BatchWhiten, GroupAdvantage, statistics
from posttrain.advantage.pick import Among, Extremes, RunningBaseline
from posttrain.advantage.plain import Placed
from posttrain.advantage.shape import ByDirection, ScaleBy, TrustMix
from posttrain.loss import Stream, advantage, aggregate, likelihood, reference
from posttrain.mixture.control import LookAhead, Proportional, Threshold, steer
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Success, answer_of
from posttrain.mixture.rejection import Rejection
from posttrain.mixture.schedule import Cosine
from posttrain.mixture.tagged import OutcomeTag
from posttrain.mixture.turns import WithoutCritique
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Score, Segment, Source
from tests.mixture.conftest import group
from tests.rollout.test_environment import scored


def test_a_second_answer_whose_verifier_failed_is_left_out() -> None:
    whole = scored((0.0, 1.0), (1.0, 0.0), (0.0, 1.0))
    failed = replace(whole.rollouts[1], scores={"turn_1": Score(1.0), "turn_2": Score(None, "error")})
    (learnt,) = WithoutCritique(critiques=False)([replace(whole, rollouts=(whole.rollouts[0], failed, whole.rollouts[2]))], Demos(), 0, 0.0)
    assert [r.advantage for r in learnt.rollouts] == [pytest.approx(2 / 3), None, pytest.approx(2 / 3)], "its first answer still counts in the mean"
    assert len(learnt.rollouts[1].segments) == 3, "and it stays as it was"
    unknown = replace(whole, rollouts=tuple(replace(r, scores={"turn_1": Score(None, "timeout"), "turn_2": Score(1.0)}) for r in whole.rollouts))
    (learnt,) = WithoutCritique(critiques=False)([unknown], Demos(), 0, 0.0)
    assert [r.advantage for r in learnt.rollouts] == [None] * 3 and learnt.dropped == "no_second_answer", "no first answer has a score: no baseline"


def test_a_reward_that_is_no_number_is_an_error_before_it_is_scaled() -> None:
    whole = scored((0.0, 1.0), (0.0, 0.0))
    whole = replace(whole, prompt=replace(whole.prompt, meta={"difficulty": 2.0}))
    assert [r.advantage for r in ScaleBy()([replace(whole, rollouts=tuple(replace(r, advantage=None) for r in whole.rollouts))])[0].rollouts] == [2.0, 0.0]
    with pytest.raises(ValueError, match="nan"):
        ScaleBy()([replace(whole, rollouts=(replace(whole.rollouts[0], reward=math.nan), whole.rollouts[1]))])


MORE = [
    {"keep_whole": "group"}, {"head": "scalar"}, {"contexts": frozenset({"mismatched"})}, {"references": frozenset({"entropy"})},
    {"references": frozenset({"collision"})}, {"own_input": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("more", MORE)
def test_each_thing_that_reads_more_than_a_micro_batch_is_refused(more: dict[str, Any]) -> None:
    control = LookAhead(name="blend", utility="rollouts")
    stream = Stream(["demo"], likelihood.Token(), reference.Current(), advantage.One(), aggregate.TokenMean(), coef=control)
    plain = {"keep_whole": None, "head": "lm", "contexts": frozenset(), "references": frozenset(), "own_input": 0.0}
    control.fits(SimpleNamespace(streams={"rollouts": stream}, needs=SimpleNamespace(**plain)))
    with pytest.raises(ValueError, match="more than that"):
        control.fits(SimpleNamespace(streams={"rollouts": stream}, needs=SimpleNamespace(**plain | more)))


def test_where_nothing_was_sampled_no_token_is_paid() -> None:
    given = Rollout("g", Prompt("q", (1,)), (Segment((5, 6, 7), Source.demo),), finish="given", reward=1.0)
    (found,) = Placed()([Group(given.prompt, (given,))])[0].rollouts
    assert found.paid == (0.0, 0.0, 0.0) and found.advantage == 1.0 and found.placed


def test_controllers_follow_the_mean() -> None:
    control = Proportional(name="c", metric="m/kl", target=1.5, horizon=100, init=1.0)
    one, other = (steer({"c": control}, {}, {"m/kl": pair}, 10) for pair in ((1.6, 1.0), (6.4, 4.0)))
    assert one == other and one != steer({"c": control}, {}, {"m/kl": (6.4, 1.0)}, 10)


def test_a_text_without_a_prompt_is_all_answer() -> None:
    text = Demo("d", (Segment((5, 6), Source.demo), Segment((7,), Source.demo)))
    assert [s.ids for s in answer_of(text)] == [(5, 6), (7,)]
    cut = Demo("d", (Segment((5, 6), Source.demo), Segment((7,), Source.demo)), prompt=Prompt("q", (5,)))
    assert [s.ids for s in answer_of(cut)] == [(6,), (7,)]


def test_every_two_accepted_answers_are_a_pair() -> None:
    out = Rejection(keep=6, beta=1e9)([group("q", 0.1, 0.9, 0.5, 0.4, 0.0, 0.3)], Demos(), 0, 0.0)
    assert [(p.chosen.id, p.rejected.id) for p in out if isinstance(p, Pair)] == [("q/1", "q/0"), ("q/2", "q/3"), ("q/5", "q/4")]


def scores(*rewards: float | None, **named: Score) -> Group:
    found = group("q", *rewards)
    return replace(found, rollouts=tuple(replace(r, scores=named) for r in found.rollouts))


def test_a_reward_at_the_bound_is_not_right() -> None:
    whole = Rollout("c", Prompt("q", (1,)), (Segment((3, 4), Source.policy, logprobs=(-1.0, -1.0), version=0),), reward=1.0)
    exits = [replace(whole, sample_id=f"c@{k}", reward=r, left=("c", k)) for k, r in ((0, 0.5), (1, 0.6))]
    assert [r.reward for r in RankDecay()([Group(whole.prompt, (whole, *exits))])[0].rollouts] == [0.5, 0.0, 1.0]
    mixed = scores(1.0, 0.5, think=Score(0.4))
    assert [r.reward for r in TrustMix()([mixed])[0].rollouts] == [pytest.approx(1.0 + TrustMix().alpha * 0.4), 0.5]


def test_progress_of_no_number_is_an_error() -> None:
    whole = Rollout("c", Prompt("q", (1,)), (Segment((3, 4), Source.policy, logprobs=(-1.0, -1.0), version=0),), reward=1.0)
    with pytest.raises(ValueError, match="nan"):
        Progress(inner=None)([Group(whole.prompt, (whole, replace(whole, sample_id="c@1", reward=math.nan, left=("c", 1))))])


def test_who_failed_has_no_direction_and_no_tag() -> None:
    asked = scores(1.0, None, think=Score(0.4))
    asked = replace(asked, prompt=replace(asked.prompt, meta={"think": 2.0}))
    assert [r.reward for r in ByDirection()([asked])[0].rollouts] == [pytest.approx(0.8), None]
    whole = scores(1.0, 0.0, think=Score(0.4), **{"think/part": Score(7.0)})
    whole = replace(whole, prompt=replace(whole.prompt, meta={"think": 2.0}))
    assert [r.reward for r in ByDirection()([whole])[0].rollouts] == [pytest.approx(0.8)] * 2, "parts of a reward are no rewards"
    unheard = OutcomeTag("good", "bad", success=Success(metric="think"), encode=lambda text: (9,))
    (out,) = unheard([scores(1.0, 1.0, think=Score(None, "error"))], Demos(), 0, 0.0)
    assert out.dropped == "no_verdict" and [r.advantage for r in out.rollouts] == [None, None]


def test_one_number_has_no_variance() -> None:
    (one,) = BatchWhiten(ddof=1)([Group(Prompt("q", (1,)), (replace(group("q", 1.0).rollouts[0], advantage=0.7),))])[0].rollouts
    assert one.advantage == 0.0


def test_statistics_count_those_that_have_an_advantage() -> None:
    found = group("q", 1.0, 0.0, None)
    found = replace(found, rollouts=(replace(found.rollouts[0], advantage=None), replace(found.rollouts[1], advantage=-2.0), replace(found.rollouts[2], advantage=3.0)))
    told = statistics([found])
    assert told["advantage/abs"] == (5.0, 2.0) and told["reward/mean"] == (1.0, 2.0) and told["reward/failed"] == (1.0, 3.0)


def test_a_reward_of_no_number_is_an_error_before_any_is_left_out() -> None:
    with pytest.raises(ValueError, match="nan"):
        Among(GroupAdvantage())([group("q", math.nan, 1.0)])
    with pytest.raises(ValueError, match="nan"):
        RunningBaseline()([group("q", math.nan, 1.0)])


def test_draws_begin_with_the_same_seed() -> None:
    assert Rejection().seed == 0


def test_a_single_peer_does_not_vary() -> None:
    found = GroupAdvantage(scale="loo_std", ddof=1, eps=0.25)([group("q", 1.0, 0.0)])[0]
    assert [r.advantage for r in found.rollouts] == [0.5, -0.5], "what does not vary divides nothing"


def test_a_controller_may_begin_at_either_end() -> None:
    for init in (0.1, 0.9):
        assert Threshold(name="t", metric="m/x", init=init, low=0.1, high=0.9).begin()["value"] == init
    for init in (0.09, 0.91):
        with pytest.raises(ValueError, match=r"init=0\.\d+"):
            Threshold(name="t", metric="m/x", init=init, low=0.1, high=0.9)


def test_settings_at_their_ends() -> None:
    for best, worst in ((-1, 3), (3, -1), (0, 0)):
        with pytest.raises(ValueError, match="must not be negative, and not both 0"):
            Extremes(best, worst)
    assert (Extremes(0, 1).worst, Extremes(1, 0).best) == (1, 1)
    assert LookAhead(name="blend", every=1, warmup=1).every == 1
    for wrong in ({"every": 0}, {"warmup": 0}, {"rate": -0.1}, {"entropy_rate": -0.1}):
        with pytest.raises(ValueError, match="LookAhead"):
            LookAhead(name="blend", **wrong)  # type: ignore[arg-type]
    assert OutcomeTag("good", "bad").max_feedback_tokens == 128


def test_half_a_cosine_goes_from_start_to_end() -> None:
    curve = Cosine(0.9, 0.5, begin=0.2, until=0.6)
    assert [curve(u) for u in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0.9, 0.9, 0.7, 0.5, 0.5])
    assert curve(0.3) == pytest.approx(0.5 + 0.4 * (1 + math.cos(math.pi / 4)) / 2)
