"""The estimator that looks at some answers of a group only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain.advantage import Among, GroupAdvantage, Reward
from posttrain.records import Group, Prompt, Rollout, Segment, Source


def group(*answers: tuple[int, float | None]) -> Group:
    prompt = Prompt("q", (0,))
    rollouts = tuple(
        Rollout(str(i), prompt, (Segment((1,) * length, Source.policy, logprobs=(0.0,) * length, version=0),), reward=r) for i, (length, r) in enumerate(answers)
    )
    return Group(prompt, rollouts)


def test_statistics_are_those_of_the_kept() -> None:
    whole = group((9, 1.0), (2, 0.0), (3, 1.0), (1, None), (5, 1.0))
    (out,) = Among(GroupAdvantage(scale="none"), keep=3)([whole])
    assert [r.advantage for r in out.rollouts] == [None, pytest.approx(-2 / 3), pytest.approx(1 / 3), None, pytest.approx(1 / 3)]
    assert [r.reward for r in out.rollouts] == [1.0, 0.0, 1.0, None, 1.0] and out.dropped is None
    (dense,) = Among(Reward(), keep=2, by="reward_per_token")([whole])
    assert [r.advantage for r in dense.rollouts] == [None, None, 1.0, None, 1.0]
    (all_of_them,) = Among(keep=9)([replace(whole)])
    assert [r.advantage for r in all_of_them.rollouts] == [r.advantage for r in GroupAdvantage()([whole])[0].rollouts]
    for wrong in ({"keep": 1}, {"by": "luck"}):
        with pytest.raises(ValueError, match="Among"):
            Among(**wrong)
