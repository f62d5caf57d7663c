"""Advantages that compare nothing: a constant, and the good half of another estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.records import Group, Rollout, Source

GIVEN = (Source.prefix, Source.demo)


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
class Placed:
    """The reward of every token where it was earned, for an advantage that adds up what is still to come (a critic's, with ``rewards: each``).

    Equation: ``r[t] = sum_i w_i r_i[t]``; a reward that names no places is paid at the last token.
    Source: fine-grained human feedback, arXiv 2306.01693.

    Wrong when: the loss takes the column for an advantage as it is: a token then answers for its own reward alone.
    """

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [replace(g, rollouts=tuple(self._one(r) for r in g.rollouts)) for g in groups]

    def _one(self, rollout: Rollout) -> Rollout:
        if rollout.reward is None:
            return replace(rollout, advantage=None)
        if rollout.paid is None:
            sampled = [s.source == Source.policy for s in rollout.segments for _ in s.ids]
            last = max((i for i, own in enumerate(sampled) if own), default=-1)
            rollout = replace(rollout, paid=tuple(rollout.reward if i == last else 0.0 for i in range(len(sampled))))
        return replace(rollout, advantage=rollout.reward, placed=True)


@dataclass(frozen=True)
class FreeBaseline:
    """Rewards compared with those of the answers nobody helped.

    Equation: ``A_i = R_i - mean of R over the answers of the group without given tokens``.
    Source: the prefix advantage of Prefix-RFT, arXiv 2507.01679; its release divides it by the continuations per prefix, one here.

    ``continuation``: of what the policy wrote behind given tokens: ``same`` is the number of the whole answer (our reading), ``reward`` is R without a
    baseline and ``zero`` nothing, the two estimators of the release for a prefix that is continued once; given tokens keep ``A_i``.
    A group without a free answer, or with one answer, gives 0.

    Wrong when: the free answers are always wrong: the baseline is then 0 and every helped answer that is right is pushed up in full.
    """

    continuation: Literal["same", "reward", "zero"] = "same"
    needs_group = True

    def __post_init__(self) -> None:
        if self.continuation not in ("same", "reward", "zero"):
            raise ValueError(f"FreeBaseline: continuation={self.continuation!r} does not exist; choose same, reward or zero")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards = [(r.reward, not any(s.source in GIVEN for s in r.segments)) for r in group.rollouts]
        if bad := [r.sample_id for r in group.rollouts if r.reward is not None and not math.isfinite(r.reward)]:
            raise ValueError(f"the reward of sample {bad[0]!r} is not finite; a reward that cannot be computed must be None")
        free = [reward for reward, alone in rewards if alone and reward is not None]
        usable = sum(reward is not None for reward, _ in rewards)
        base = math.fsum(free) / len(free) if free and usable > 1 else None
        values = [None if reward is None else 0.0 if base is None else reward - base for reward, _ in rewards]
        both = zip(group.rollouts, values, rewards, strict=True)
        return replace(group, rollouts=tuple(self._parts(r, v) if v is not None and not alone and base is not None else replace(r, advantage=v) for r, v, (_, alone) in both))

    def _parts(self, rollout: Rollout, value: float) -> Rollout:
        """A helped answer: one number for the given tokens, another for those behind them."""
        if self.continuation == "same":
            return replace(rollout, advantage=value)
        own = rollout.reward if self.continuation == "reward" else 0.0
        return replace(rollout, advantage=value, placed=True, paid=tuple(value if s.source in GIVEN else own for s in rollout.segments for _ in s.ids))  # type: ignore[misc]


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
