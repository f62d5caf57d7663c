"""Advantages that look at every group of the step: rescaling, whole-step deviations, several rewards, outliers.

They run before the batch is packed, so that what they count is the step, never a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from posttrain.advantage.group import Around, Estimator, GroupAdvantage, _value, _variance, _with, rewards_of
from posttrain.records import Group, Rollout


def _usable(groups: Sequence[Group]) -> list[Rollout]:
    return [r for g in groups if rewards_of(g) is not None for r in g.rollouts if r.reward is not None]


def _scaled(groups: Sequence[Group], factor: float) -> list[Group]:
    """Every advantage (reward, where none is set) times a factor."""
    return [_with(g, [factor * _value(r) for r in g.rollouts if r.reward is not None]) for g in groups]


@dataclass(frozen=True)
class LiveGroups:
    """Make up for the groups that teach nothing: the others weigh more.

    Equation: ``A * N_groups / N_live``, where a group is live when its rewards differ.
    Source: GPG, arXiv 2504.02546 (one framework counts rewards that are not zero instead of live groups).

    ``tolerance``: rewards closer than this are equal.

    Wrong when: dead groups are dropped and replaced by new ones already: the step is then scaled up twice.  Without a live group nothing changes.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"LiveGroups: tolerance={self.tolerance} must not be negative")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        found = [rewards for g in groups if (rewards := rewards_of(g))]
        live = sum(max(rewards) - min(rewards) > self.tolerance for rewards in found)
        return _scaled(groups, len(found) / live if live else 1.0)


@dataclass(frozen=True)
class BatchScale:
    """Advantages divided by one deviation for the whole step; no centre is taken.

    Equation: ``A / (std + eps)``, or ``A / sqrt(var + eps)`` with ``eps_on="variance"``.
    Source: group mean and step deviation: Lite PPO, arXiv 2508.08221.

    ``of``: whose deviation: that of the ``reward`` or that of the ``advantage`` as it arrives, one value per sample.  ``ddof``, ``eps``, ``eps_on``: as in
    :class:`GroupAdvantage`.

    Wrong when: the step mixes rewards of different scale.  A deviation of 0 leaves the advantages alone.
    """

    of: Literal["reward", "advantage"] = "reward"
    ddof: int = 0
    eps: float = 1e-8
    eps_on: Literal["std", "variance"] = "std"

    def __post_init__(self) -> None:
        if self.of not in ("reward", "advantage") or self.eps_on not in ("std", "variance") or self.ddof not in (0, 1):
            raise ValueError(
                f"BatchScale: of={self.of!r} is reward or advantage, eps_on={self.eps_on!r} std or variance, ddof={self.ddof} 0 or 1"
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"BatchScale: eps={self.eps} must be finite and not negative")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        values = [r.reward if self.of == "reward" else _value(r) for r in _usable(groups)]
        variance = _variance(values, self.ddof) if values else 0.0  # type: ignore[arg-type]
        scale = math.sqrt(variance + self.eps) if self.eps_on == "variance" else math.sqrt(variance) + self.eps
        return _scaled(groups, 1.0 / scale if variance else 1.0)


@dataclass(frozen=True)
class BetaNorm:
    """Rewards of 0 and 1, centred in their group and divided by the density of a beta distribution at the group's success rate.

    Equation: ``(R - p) / f(p; alpha, beta)``; ``a, b`` fit a beta distribution to the step's success rates by mean and sample variance,
    ``alpha = 1 + a/3``, ``beta = 1 + b/3``, neither below 1.
    Source: BNPO, arXiv 2506.02864 (elsewhere the same four letters name a token mean).

    ``clamp``: the largest ``a`` and ``b``, reached when all success rates agree.  With ``alpha = beta = 1`` it is ``R - p``; with 1.5 it is GRPO's times
    ``pi/8``.

    Wrong when: rewards are not 0 or 1, which is an error; or the step has few prompts: with one, nothing can be fitted and ``f`` is 1.
    """

    clamp: float = 1e6

    def __post_init__(self) -> None:
        if not self.clamp > 0:
            raise ValueError(f"BetaNorm: clamp={self.clamp} must be above 0")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        for rollout in _usable(groups):
            if rollout.reward not in (0.0, 1.0):
                raise ValueError(
                    f"the reward of sample {rollout.sample_id!r} is {rollout.reward}: advantage BetaNorm is for rewards of 0 and 1; use one "
                    "verifier without shaping, or advantage=group_norm"
                )
        rates = {g.id: math.fsum(rewards) / len(rewards) for g in groups if (rewards := rewards_of(g))}
        alpha, beta = self.parameters(list(rates.values()))
        return [_with(g, [self.value(r, rates[g.id], alpha, beta) for r in rewards_of(g)]) for g in groups]

    def parameters(self, rates: Sequence[float]) -> tuple[float, float]:
        """``alpha`` and ``beta`` for the success rates of a step."""
        if len(rates) < 2:
            return 1.0, 1.0
        mean, variance = math.fsum(rates) / len(rates), _variance(rates, 1)
        strength = mean * (1 - mean) / variance - 1 if variance else math.inf
        a, b = (min(max(m * strength, 0.0), self.clamp) if m else 0.0 for m in (mean, 1 - mean))
        return 1 + a / 3, 1 + b / 3

    @staticmethod
    def value(reward: float, rate: float, alpha: float, beta: float) -> float:
        """The advantage of one reward."""
        if rate in (0.0, 1.0):
            return 0.0
        log_density = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
        log_density += (alpha - 1) * math.log(rate) + (beta - 1) * math.log1p(-rate)
        return (reward - rate) * math.exp(-log_density)


@dataclass(frozen=True)
class PerReward(Around):
    """Every named reward gets its own advantage; their weighted sum is the sample's.

    Equation: ``A_i = sum_n w_n inner(R_n)_i``.
    Source: GDPO, arXiv 2601.05242, which then whitens over the step.

    ``weights``: by reward name; an empty map weighs every reward 1.  ``inner``: the estimator used on each, group-normalised by default.  A reward that does
    not apply to a sample, or failed on it, leaves that reward's statistics and adds 0; a sample without a combined reward still gets none.

    Wrong when: rewards were combined by a product or a gate: the parts are then not what was meant.  A reward that is constant in a group
    adds 0 there, instead of shifting the others.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    inner: Estimator = field(default_factory=GroupAdvantage)

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        present = {name for r in _usable(groups) for name in r.scores}
        missing = sorted(set(self.weights) - present)
        if missing and present:
            raise ValueError(f"advantage PerReward weighs {', '.join(missing)}, but the rewards are {', '.join(sorted(present))}")
        weights = dict(self.weights) or {name: 1.0 for name in sorted(present) if "/" not in name}
        totals = {r.sample_id: 0.0 for r in _usable(groups)}
        for name, weight in weights.items():
            alone = [replace(g, rollouts=tuple(_only(r, name) for r in g.rollouts)) for g in groups]
            for rollout in (r for g in self.inner(alone) for r in g.rollouts if r.advantage is not None):
                totals[rollout.sample_id] += weight * rollout.advantage  # type: ignore[operator]
        return [_with(g, [totals[r.sample_id] for r in g.rollouts if r.reward is not None]) for g in groups]


def _only(rollout: Rollout, name: str) -> Rollout:
    """The rollout as if ``name`` were its only reward."""
    score = rollout.scores.get(name)
    return replace(rollout, reward=score.value if score is not None and rollout.reward is not None else None, advantage=None)


@dataclass(frozen=True)
class DropOutliers:
    """Samples whose advantage lies far from the rest get none, and leave the step.

    Equation: keep while ``|A - mean| <= sigmas * std`` over the step's samples.
    Source: StableReinforce, arXiv 2505.02835 (the symmetric rule is our reading of it).

    ``sigmas``: the distance.  Among n values none can lie further than ``(n - 1) / sqrt(n)`` deviations away: with 3 it takes 11.

    Wrong when: successes are rare: the few right answers are the outliers.
    """

    sigmas: float = 3.0

    def __post_init__(self) -> None:
        if not self.sigmas > 0:
            raise ValueError(f"DropOutliers: sigmas={self.sigmas} must be above 0")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        values = [_value(r) for r in _usable(groups)]
        if not values:
            return list(groups)
        mean, bound = math.fsum(values) / len(values), self.sigmas * math.sqrt(_variance(values, 0))
        return [replace(g, rollouts=tuple(self._judge(r, mean, bound) for r in g.rollouts)) for g in groups]

    @staticmethod
    def _judge(rollout: Rollout, mean: float, bound: float) -> Rollout:
        if rollout.reward is None:
            return rollout
        value = _value(rollout)
        return replace(rollout, advantage=value if abs(value - mean) <= bound else None)
