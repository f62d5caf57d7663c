"""Advantages that compare nothing: a constant, and the good half of another estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.records import Group, Rollout


@dataclass(frozen=True)
class Constant:
    """The same for every sample: imitate what was sampled.

    Equation: ``A_i = value``.
    Source: self-training on own samples; the samples of a distillation, whose reward is in the loss.

    ``value``: the number.  ``unscored``: whether samples whose verifier failed take part too; they do where no reward is looked at.

    Wrong when: bad samples are in the step: they are imitated like the good ones.
    """

    value: float = 1.0
    unscored: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"advantage value={self.value} must be finite")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [replace(g, rollouts=tuple(self._one(r) for r in g.rollouts)) for g in groups]

    def _one(self, rollout: Rollout) -> Rollout:
        return replace(rollout, advantage=self.value if self.unscored or rollout.reward is not None else None)


@dataclass(frozen=True)
class PositivePart:
    """What is good about a sample: its advantage (or reward, where none is set), and 0 below 0.

    Equation: ``A_i = max(A_i, 0)``.
    Source: rejection sampling, RAFT, arXiv 2504.11343 (all positive samples, not only the best).

    ``keep_zeros``: whether samples at 0 stay in the step and count in its denominators (the step then shrinks with the success rate), or leave it.

    Wrong when: entropy matters: without negative samples it falls faster.
    """

    keep_zeros: bool = True

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [replace(g, rollouts=tuple(self._one(r) for r in g.rollouts)) for g in groups]

    def _one(self, rollout: Rollout) -> Rollout:
        value = rollout.reward if rollout.advantage is None else rollout.advantage
        if rollout.reward is None or value is None:
            return replace(rollout, advantage=None)
        if not math.isfinite(value):
            raise ValueError(f"the advantage of sample {rollout.sample_id!r} is {value}; a reward that cannot be computed must be None")
        return replace(rollout, advantage=value if value > 0 else 0.0 if self.keep_zeros else None)
