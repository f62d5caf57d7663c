"""Advantages from the rewards of a group: one number per sample, above 0 for better than its baseline.

A rollout whose reward is ``None`` (its verifier failed) leaves the statistics of its group and gets no advantage.  A reward that is NaN or
infinite is an error naming the sample.  The numbers are computed in float64.
"""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.records import Group, Rollout, Source

Estimator = Callable[[Sequence[Group]], list[Group]]

CENTERS = ("mean", "loo", "median", "length_weighted", "none")
SCALES = ("none", "std", "loo_std", "mean")


def rewards_of(group: Group) -> list[float]:
    """The usable rewards of a group, in order.  Raises ``ValueError`` naming the sample when one is not finite."""
    for rollout in group.rollouts:
        if rollout.reward is not None and not math.isfinite(rollout.reward):
            raise ValueError(
                f"group {group.id!r}: the reward of sample {rollout.sample_id!r} is {rollout.reward}; a reward that cannot be computed "
                f"must be None "
                "(a Score with status='error'), so that it is masked and counted"
            )
    return [r.reward for r in group.rollouts if r.reward is not None]


def learnt_tokens(rollout: Rollout) -> int:
    """How many sampled tokens of a rollout are learnt from: tool output and tokens marked as untrainable do not count."""
    own = [s for s in rollout.segments if s.source == Source.policy]
    return sum(sum(s.trainable) if isinstance(s.trainable, tuple) else len(s.ids) * s.trainable for s in own)


def _with(group: Group, values: Sequence[float], dropped: str | None = None) -> Group:
    """Put one value on each usable rollout, ``None`` on the others."""
    remaining = iter(values)
    rollouts = tuple(replace(r, advantage=None if r.reward is None else float(next(remaining))) for r in group.rollouts)
    return replace(group, rollouts=rollouts, dropped=dropped if group.dropped is None else group.dropped)


def _variance(values: Sequence[float], ddof: int) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof) if len(values) > ddof else 0.0


@dataclass(frozen=True)
class GroupAdvantage:
    """Rewards compared within their group.

    Equation: ``A_i = (R_i - center) / scale``; ``std`` divides by ``std + eps``, or by ``sqrt(var + eps)`` with ``eps_on="variance"``.
    Source: mean and std: GRPO, arXiv 2402.03300; mean alone: Dr. GRPO, arXiv 2503.20783; leave-one-out: RLOO, arXiv 2402.14740; weighted by
    length: OPO, arXiv 2505.23585; over the mean: MaxRL, arXiv 2602.02710.

    ``center``: ``mean``; ``loo`` (mean of the *other* rewards: ``k/(k-1)`` times ``mean``); ``median``; ``length_weighted`` (``sum T_i R_i / sum
    T_i``, the baseline of least variance when the gradient's norm grows with the length; it holds the sample's own reward, hence a bias of
    order ``1/k``); ``none``.  ``scale``: ``none``; ``std``; ``loo_std`` (of the others; a sample whose peers all agree stays unscaled); ``mean``
    (the group's mean reward, which must not be negative; 0 where it is 0: hard prompts weigh more, towards ``grad log`` of the success
    rate).  ``ddof``: 0 divides the variance by k, 1 by k-1.
    ``eps``, ``eps_on``: the guard against a small deviation and where it stands.  ``singleton``: a group with one usable reward gives 0
    (``zero``), its reward (``raw``) or an error (``error``).  ``dead_group``: all rewards equal (within ``dead_tolerance``) gives 0
    (``zero``), 0 and the group marked as dropped (``drop``), or the plain formula (``formula``: residues of rounding over ``eps``).

    For rewards 1, 0, 0, 0: ``mean/std/ddof 0`` gives 1.732, -0.577 three times; ``ddof 1`` 1.5, -0.5; ``loo`` 1, -1/3.

    Wrong when: the reward scale carries meaning between groups and ``scale`` is not ``none``: every group is stretched to the same spread.
    """

    center: Literal["mean", "loo", "median", "length_weighted", "none"] = "mean"
    scale: Literal["none", "std", "loo_std", "mean"] = "std"
    ddof: int = 0
    eps: float = 1e-6
    eps_on: Literal["std", "variance"] = "std"
    singleton: Literal["zero", "raw", "error"] = "zero"
    dead_group: Literal["zero", "drop", "formula"] = "zero"
    dead_tolerance: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("center", self.center, CENTERS),
            ("scale", self.scale, SCALES),
            ("eps_on", self.eps_on, ("std", "variance")),
            ("singleton", self.singleton, ("zero", "raw", "error")),
            ("dead_group", self.dead_group, ("zero", "drop", "formula")),
            ("ddof", self.ddof, (0, 1)),
        ):
            if value not in known:
                raise ValueError(f"advantage {name}={value!r} does not exist; choose from {', '.join(map(str, known))}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"advantage eps={self.eps} must be finite and not negative")
        if not self.dead_tolerance >= 0:
            raise ValueError(f"advantage dead_tolerance={self.dead_tolerance} must not be negative")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards = rewards_of(group)
        if len(rewards) == 1:
            if self.singleton == "error":
                raise ValueError(
                    f"group {group.id!r} has one usable reward, so it has no baseline; sample more (rollout.n), or set "
                    f"advantage.singleton to zero or raw"
                )
            return _with(group, rewards if self.singleton == "raw" else [0.0])
        compares = self.center != "none" or self.scale != "none"
        if rewards and compares and self.dead_group != "formula" and max(rewards) - min(rewards) <= self.dead_tolerance:
            return _with(group, [0.0] * len(rewards), "all rewards equal" if self.dead_group == "drop" else None)
        if self.scale == "mean" and rewards and min(rewards) < 0:
            raise ValueError(
                f"group {group.id!r} has a reward of {min(rewards)}: advantage.scale=mean divides by the mean reward, so rewards must not be "
                f"negative; shift them, or choose scale=std"
            )
        return _with(group, self.values(rewards, [learnt_tokens(r) for r in group.rollouts if r.reward is not None]))

    def values(self, rewards: Sequence[float], lengths: Sequence[int] | None = None) -> list[float]:
        """The plain formula, for two or more rewards; ``lengths`` (default: all 1) are looked at by ``center=length_weighted``."""
        out = []
        weights = lengths if lengths is not None and sum(lengths) else [1] * len(rewards)
        for i, reward in enumerate(rewards):
            others = [r for j, r in enumerate(rewards) if j != i]
            center = {
                "mean": lambda: math.fsum(rewards) / len(rewards),
                "loo": lambda others=others: math.fsum(others) / len(others),
                "median": lambda: stats.median(rewards),
                "length_weighted": lambda: math.fsum(n * r for n, r in zip(weights, rewards, strict=True)) / sum(weights),
                "none": lambda: 0.0,
            }[self.center]()
            if self.scale == "none":
                scale = 1.0
            elif self.scale == "mean":
                scale = math.fsum(rewards) / len(rewards) or 1.0
            else:
                peers = rewards if self.scale == "std" else others
                variance = _variance(peers, self.ddof)
                scale = math.sqrt(variance + self.eps) if self.eps_on == "variance" else math.sqrt(variance) + self.eps
                if variance == 0.0 and (self.scale == "loo_std" or scale == 0.0):
                    scale = 1.0
            out.append((reward - center) / scale)
        return out


@dataclass(frozen=True)
class Reward:
    """The reward itself, less a constant.

    Equation: ``A_i = R_i - baseline``.
    Source: REINFORCE, Williams 1992; with 0/1 rewards and baseline 0 it is maximum likelihood on the correct samples.

    ``baseline``: the constant.  On-policy it changes the variance, not the mean.

    Wrong when: the samples are off-policy and some advantages are negative: nothing bounds how far a sample is pushed down.
    """

    baseline: float = 0.0

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [_with(group, [r - self.baseline for r in rewards_of(group)]) for group in groups]


@dataclass(frozen=True)
class BatchWhiten:
    """Advantages (or rewards, where none are set) brought to mean 0 and deviation 1 over the whole step.

    Equation: ``(A - mean) / (std + eps)``, or ``/ sqrt(var + eps)`` with ``eps_on="variance"``.
    Source: REINFORCE++, arXiv 2501.03262.

    ``over``: the population: ``tokens`` counts a sample as often as it has sampled tokens, ``sequences`` once.  ``center``: subtract the
    mean. ``ddof``, ``eps``, ``eps_on``: as in :class:`GroupAdvantage`.

    Wrong when: the batch is small or mixes worlds of different reward scale.  A batch of equal values gives 0.
    """

    over: Literal["tokens", "sequences"] = "tokens"
    center: bool = True
    ddof: int = 0
    eps: float = 1e-8
    eps_on: Literal["std", "variance"] = "std"

    def __post_init__(self) -> None:
        if self.over not in ("tokens", "sequences") or self.eps_on not in ("std", "variance") or self.ddof not in (0, 1):
            raise ValueError(
                f"BatchWhiten: over={self.over!r} is tokens or sequences, eps_on={self.eps_on!r} is std or variance, ddof={self.ddof} is "
                f"0 or 1"
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"BatchWhiten: eps={self.eps} must be finite and not negative")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        values = [[_value(r) for r in group.rollouts if r.reward is not None] for group in groups if rewards_of(group) is not None]
        counts = [[self._count(r) for r in group.rollouts if r.reward is not None] for group in groups]
        flat = [(v, n) for vs, ns in zip(values, counts, strict=True) for v, n in zip(vs, ns, strict=True) if n > 0]
        total = sum(n for _, n in flat)
        if not total:
            if any(s.source == Source.demo for g in groups for r in g.rollouts if r.reward is not None for s in r.segments):
                raise ValueError("BatchWhiten: over=tokens counts sampled tokens, and these answers are given ones; set advantage.over=sequences")
            return list(groups)
        mean = math.fsum(v * n for v, n in flat) / total
        variance = math.fsum(n * (v - mean) ** 2 for v, n in flat) / (total - self.ddof) if total > self.ddof else 0.0
        scale = math.sqrt(variance + self.eps) if self.eps_on == "variance" else math.sqrt(variance) + self.eps
        shift = mean if self.center else 0.0
        dead = min(v for v, _ in flat) == max(v for v, _ in flat)
        return [
            _with(g, [0.0 if dead and self.center else (v - shift) / (scale or 1.0) for v in vs])
            for g, vs in zip(groups, values, strict=True)
        ]

    def _count(self, rollout: Rollout) -> int:
        return learnt_tokens(rollout) if self.over == "tokens" else 1


def _value(rollout: Rollout) -> float:
    value = rollout.reward if rollout.advantage is None else rollout.advantage
    assert value is not None
    return value


class Around:
    """An estimator around another one, ``inner``: what that remembers is what it remembers."""

    inner: Any

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state)


@dataclass(frozen=True)
class Chain:
    """Estimators one after the other, in the order of the map: group-centred, then whitened over the batch, for instance.

    One that gives every token a number of its own stands last, or before those that only leave answers out; those that leave some out stand last of
    all.  Raises ``ValueError`` where an answer's number would be changed behind the first, which no token would see, or given again to what the
    others left out.
    """

    steps: Mapping[str, Estimator | None]

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        out = list(groups)
        for place, (name, step) in enumerate((n, s) for n, s in self.steps.items() if s is not None):
            before, out = out, step(out)
            if place:  # the first may be asked anew about groups that have been estimated
                _unseen(name, before, out)
                _again(name, before, out)
        return out

    def state_dict(self) -> dict[str, Any]:
        """What the estimators that remember something carry over a restart, by name."""
        return {name: step.state_dict() for name, step in self.steps.items() if hasattr(step, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state.items():
            self.steps[name].load_state_dict(values)  # type: ignore[union-attr]


def _unseen(name: str, before: Sequence[Group], after: Sequence[Group]) -> None:
    """Raise where a step changed the number of an answer whose tokens have, and keep, numbers of their own."""
    for old, new in zip(before, after, strict=False):
        placed = {r.sample_id: r for r in old.rollouts if r.placed and r.paid is not None}
        for rollout in new.rollouts:
            was = placed.get(rollout.sample_id)
            if was is None or rollout.paid is not was.paid or rollout.advantage in (None, was.advantage):
                continue
            raise ValueError(
                f"advantage.steps.{name} gives sample {rollout.sample_id!r} one number, and the step before has given its tokens numbers of "
                f"their own, which would stand; put {name} first, or leave it out"
            )


def _again(name: str, before: Sequence[Group], after: Sequence[Group]) -> None:
    """Raise where a step gives a number to an answer that the one before left out.  Where nothing has a number yet, nothing was left out."""
    if all(r.advantage is None for g in before for r in g.rollouts):
        return
    for old, new in zip(before, after, strict=False):
        left_out = {r.sample_id for r in old.rollouts if r.advantage is None and r.reward is not None}
        back = [r.sample_id for r in new.rollouts if r.sample_id in left_out and r.advantage is not None]
        if back:
            raise ValueError(f"advantage.steps.{name} gives sample {back[0]!r} a number, which the step before has left out: put {name} first")


def statistics(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """What to watch, as (sum, count): shares of dead and single groups, of failed rewards, mean ``|A|`` and the mean reward."""
    usable = [rewards_of(g) for g in groups]
    advantages = [r.advantage for g in groups for r in g.rollouts if r.advantage is not None]
    rewards = [r for rs in usable for r in rs]
    failed = sum(r.reward is None for g in groups for r in g.rollouts)
    return {
        "advantage/dead_groups": (float(sum(len(r) > 1 and min(r) == max(r) for r in usable)), float(len(groups))),
        "advantage/single_groups": (float(sum(len(r) == 1 for r in usable)), float(len(groups))),
        "advantage/abs": (math.fsum(abs(a) for a in advantages), float(len(advantages))),
        "reward/mean": (math.fsum(rewards), float(len(rewards))),
        "reward/failed": (float(failed), float(len(rewards) + failed)),
    }
