"""What gates, estimators and controllers leave out, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.advantage.shape import ScaleBy
from posttrain.loss import Stream, advantage, aggregate, likelihood, reference
from posttrain.mixture.control import LookAhead
from posttrain.mixture.demos import Demos
from posttrain.mixture.turns import WithoutCritique
from posttrain.records import Score
from tests.rollout.test_environment import scored


def test_a_second_answer_whose_verifier_failed_is_left_out() -> None:
    group = scored((0.0, 1.0), (1.0, 0.0), (0.0, 1.0))
    failed = replace(group.rollouts[1], scores={"turn_1": Score(1.0), "turn_2": Score(None, "error")})
    (learnt,) = WithoutCritique(critiques=False)([replace(group, rollouts=(group.rollouts[0], failed, group.rollouts[2]))], Demos(), 0, 0.0)
    assert [r.advantage for r in learnt.rollouts] == [pytest.approx(2 / 3), None, pytest.approx(2 / 3)], "its first answer still counts in the mean"
    assert len(learnt.rollouts[1].segments) == 3, "and it stays as it was"
    unknown = replace(group, rollouts=tuple(replace(r, scores={"turn_1": Score(None, "timeout"), "turn_2": Score(1.0)}) for r in group.rollouts))
    (learnt,) = WithoutCritique(critiques=False)([unknown], Demos(), 0, 0.0)
    assert [r.advantage for r in learnt.rollouts] == [None] * 3 and learnt.dropped == "no_second_answer", "no first answer has a score: no baseline"


def test_a_reward_that_is_no_number_is_an_error_before_it_is_scaled() -> None:
    group = scored((0.0, 1.0), (0.0, 0.0))
    group = replace(group, prompt=replace(group.prompt, meta={"difficulty": 2.0}))
    assert [r.advantage for r in ScaleBy()([replace(group, rollouts=tuple(replace(r, advantage=None) for r in group.rollouts))])[0].rollouts] == [2.0, 0.0]
    with pytest.raises(ValueError, match="nan"):
        ScaleBy()([replace(group, rollouts=(replace(group.rollouts[0], reward=math.nan), group.rollouts[1]))])


@pytest.mark.parametrize("more", [{"keep_whole": "group"}, {"head": "scalar"}, {"contexts": frozenset({"mismatched"})}, {"references": frozenset({"entropy"})}])
def test_each_thing_that_reads_more_than_a_micro_batch_is_refused(more: dict[str, Any]) -> None:
    control = LookAhead(name="blend", utility="rollouts")
    stream = Stream(["demo"], likelihood.Token(), reference.Current(), advantage.One(), aggregate.TokenMean(), coef=control)
    plain = {"keep_whole": None, "head": "lm", "contexts": frozenset(), "references": frozenset()}
    control.fits(SimpleNamespace(streams={"rollouts": stream}, needs=SimpleNamespace(**plain)))
    with pytest.raises(ValueError, match="more than that"):
        control.fits(SimpleNamespace(streams={"rollouts": stream}, needs=SimpleNamespace(**plain | more)))
