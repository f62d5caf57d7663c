"""How far the engine's log-probs are from the learner's on the tokens the engine sampled.

With d = log pi_learner - log pi_engine per token and the engine as the sampler, ``k1 = -mean d`` and ``k3 = mean(exp(d) - 1 - d)`` both
estimate KL(engine || learner); k3 is never negative.  Before the first update the two are the same function computed twice, so any gap
beyond rounding is a bug: another dtype, temperature, template, stale weights, or log-probs taken before temperature and top-p.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.records import Rollout

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Allowed mean |d| in nats.  Measured against transformers on two-layer random models: at most 3e-6 per token in float32, a mean of
0.003 in bfloat16 (tests/rollout). Deeper models add rounding; a forgotten temperature or a stale model starts near 0.1."""


class MismatchError(RuntimeError):
    """Engine and learner disagree by more than the tolerance."""


@dataclass(frozen=True)
class Mismatch:
    """Numbers over all sampled tokens.  ``worst`` names the sample and token with the largest gap."""

    tokens: int
    mean_abs: float
    max_abs: float
    mean_exp_abs: float
    k1: float
    k3: float
    worst: str = ""

    def metrics(self) -> dict[str, float]:
        names = ("mean_abs", "max_abs", "mean_exp_abs", "k1", "k3")
        return {f"mismatch/{name}": getattr(self, name) for name in names} | {"mismatch/tokens": float(self.tokens)}

    def check(self, tolerance: float) -> None:
        """Raises :class:`MismatchError` when the mean gap exceeds ``tolerance`` or is not a number."""
        if self.mean_abs <= tolerance:
            return
        raise MismatchError(
            f"the engine's and the learner's log-probs of the same {self.tokens} tokens differ by {self.mean_abs:.3g} on average and "
            f"{self.max_abs:.3g} at "
            f"most ({self.worst}); allowed is a mean of {tolerance:g}. Look at: rollout.dtype against model.dtype, the sampling "
            "temperature against the "
            "loss's, top_p or top_k (the learner scores the full distribution), whether the last weight update reached the engine, and "
            "the attention kernel"
        )


def mismatch(behaviour: Tensor, learner: Tensor, where: Sequence[str] | None = None) -> Mismatch:
    """Compare two columns of log-probs, ``[N]`` each; columns where either is NaN (not sampled by an engine) are left out.

    Raises ``ValueError`` when nothing is left to compare.
    """
    both = ~(behaviour.isnan() | learner.isnan())
    if not bool(both.any()):
        raise ValueError("no token has both an engine and a learner log-prob; there is nothing to compare")
    d = (learner[both] - behaviour[both]).double()
    gap = d.abs()
    index = int(both.nonzero()[int(gap.argmax())])
    return Mismatch(
        tokens=int(both.sum()),
        mean_abs=float(gap.mean()),
        max_abs=float(gap.max()),
        mean_exp_abs=float(gap.exp().mean()),
        k1=float(-d.mean()),
        k3=float((d.exp() - 1 - d).mean()),
        worst=where[index] if where is not None else f"column {index}",
    )


def sums(behaviour: Tensor, learner: Tensor) -> dict[str, tuple[float, float]]:
    """The numbers of :class:`Mismatch` over one micro-batch as (sum, count) pairs, to be added up; ``{}`` when nothing was sampled."""
    both = ~(behaviour.isnan() | learner.isnan())
    n = float(both.sum())
    if not n:
        return {}
    d = (learner[both] - behaviour[both]).double()
    gap = d.abs()
    totals = {"mean_abs": gap.sum(), "mean_exp_abs": gap.exp().sum(), "k1": -d.sum(), "k3": (d.exp() - 1 - d).sum()}
    pairs = {f"mismatch/{name}": (float(value), n) for name, value in totals.items()}
    return pairs | {"mismatch/tokens": (n, 0.0), "mismatch/max_abs": (float(gap.max()), n)}


def compare_rollouts(rollouts: Iterable[Rollout], learner: Sequence[Sequence[float]]) -> Mismatch:
    """``learner[i]`` holds the learner's log-probs of all policy tokens of ``rollouts[i]``, in order."""
    behaviour, other, where = [], [], []
    for rollout, values in zip(rollouts, learner, strict=True):
        own = [p for s in rollout.segments if s.logprobs is not None for p in s.logprobs]
        if len(own) != len(values):
            raise ValueError(f"sample {rollout.sample_id!r} has {len(own)} sampled tokens but {len(values)} learner log-probs")
        behaviour += own
        other += values
        where += [f"sample {rollout.sample_id}, token {t}" for t in range(len(own))]
    return mismatch(torch.tensor(behaviour, dtype=torch.float64), torch.tensor(other, dtype=torch.float64), where)
