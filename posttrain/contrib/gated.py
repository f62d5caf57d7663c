"""A KL that costs nothing up to a threshold, more where the policy is certain, and a threshold that follows how fast the reward rises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class GatedKL:
    """The square of how far the KL is above a threshold, times more the lower the entropy is.

    Equation: ``P = coef (KL - threshold)_+**2 max(least, certain / (H + eps))``, with ``KL <- decay KL + (1 - decay) mean(l - log pi_to)`` and ``H`` the mean
    entropy, both over the step's tokens.  The derivative is ``2 coef (KL - threshold)_+ gate (l - log pi_to)``: the gradient of a reverse KL is estimated
    by ``k2``, its size by ``k1``.
    Source: SAFE, arXiv 2602.04651.  The release adds the penalty as a number, without a gradient, so there it changes what is logged and nothing else; the
    derivative is our reading, and so is that it is not multiplied by ``1 - decay``.

    ``threshold``: nats per token up to which drift is free; a number, a schedule, or a controller such as :class:`RewardVelocity`.  ``coef``: positive is a
    penalty.  ``to``: the policy to stay near.  ``decay``: of the running mean of the KL, which begins at 0 and is part of every checkpoint; 0 takes this
    step's.  ``certain``, ``eps``, ``least``: the gate; 2, 0.1 and 0.5 give 20 at an entropy of 0 and 0.5 from 3.9 nats on.  ``streams``, ``aggregation``: as in
    the other regularisers.

    Wrong when: the KL is expected to stay below the threshold: with the square, a breach of 0.1 nats costs next to nothing.  Or the task needs more drift than
    that: it is then learnt less well, and on a toy of ours with spiky rewards the worst setback was larger than without.
    """

    threshold: Scalar = 0.3
    coef: Scalar = 0.1
    to: str = "base"
    decay: float = 0.9
    certain: float = 2.0
    eps: float = 0.1
    least: float = 0.5
    streams: tuple[str, ...] | None = None
    aggregation: Any = None
    coupling = "batch"
    live = True
    remembers = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"GatedKL: decay={self.decay} keeps a part of the running mean, at least 0 and below 1")
        if not (self.certain >= 0 and self.eps > 0 and self.least >= 0):
            raise ValueError(f"GatedKL: certain={self.certain} and least={self.least} must not be negative, and eps={self.eps} must be above 0: an entropy may be 0")
        if self.to == "self":
            raise ValueError("GatedKL: the KL from the policy to itself is 0; name another policy")
        names = (self.streams,) if isinstance(self.streams, str) else self.streams
        object.__setattr__(self, "streams", None if names is None else tuple(names))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to, "entropy"})

    @property
    def formula(self) -> str:
        gate = f"max({self.least:g}, {self.certain:g}/(H + {self.eps:g}))"
        return f"{number(self.coef)} * (KL(pi, pi_{self.to}) - {number(self.threshold)})_+^2 * {gate}"

    def gradient(self, view: TokenView) -> Tensor:
        return 2.0 * self._excess(view) * self._gate(view) * view.log_ratio(self.to, level="token")

    def value(self, view: TokenView) -> Tensor:
        return torch.full_like(view.logp, self._excess(view) ** 2 * self._gate(view))

    def penalty(self, view: TokenView) -> Tensor:
        """What :meth:`gradient` is the derivative of; its value is another, see the equation."""
        return self._excess(view) * self._gate(view) * view.log_ratio(self.to, level="token") ** 2

    def metrics(self, view: TokenView) -> Metrics:
        """The step's own KL, the running one, the gate, and the mean reward, for a controller to follow."""
        reward = view.batch.rewards.get("reward", torch.full_like(view.seq_len(), torch.nan))
        known = view.member & torch.isfinite(reward)
        return {
            "drift": (float(view.log_ratio(self.to, level="token").sum()), float(view.on.sum())),
            "running": (self._drift(view), 1.0),
            "gate": (self._gate(view), 1.0),
            "reward": (float(reward[known].sum()), float(known.sum())),
        }

    def remember(self, view: TokenView) -> dict[str, float]:
        return {"kl": self._drift(view)}

    def _excess(self, view: TokenView) -> float:
        return max(self._drift(view) - view.at(self.threshold), 0.0)

    def _drift(self, view: TokenView) -> float:
        view.require_whole("GatedKL")
        before, count = view.recall(self, "kl"), float(view.on.sum())
        if not count:
            return before
        return self.decay * before + (1 - self.decay) * float(view.log_ratio(self.to, level="token").detach().sum()) / count

    def _gate(self, view: TokenView) -> float:
        entropy = float(view.select(view.reference("entropy")).sum()) / max(float(view.on.sum()), 1.0)
        return max(self.least, self.certain / (max(entropy, 0.0) + self.eps))


@dataclass(frozen=True)
class RewardVelocity:
    """A proportional, integral and derivative controller on how fast the reward rises: drift is allowed while it pays.

    Equation: ``m <- decay m + (1 - decay) R``, ``e = (m - m_before) - target``, ``S <- clip(S + e, -limit, limit)``,
    ``value = clip(base + kp e + ki S + kd (e - e_before), low, high)``.
    Source: SAFE, arXiv 2602.04651, with the release's numbers.  The release also multiplies by 0.8 to 1.5 according to a phase of the run, which is left out.

    ``name``: under which it is remembered.  ``metric``: the reward.  ``kp``, ``ki``, ``kd``: gains.  ``decay``: of the running mean, which begins at the first
    reward.  ``target``: the rise per optimizer step that leaves the value alone.  ``base``, ``low``, ``high``: of the value.  ``limit``: of the sum of
    errors; beside it the sum does not grow while the value sits at the bound it pushes against (the release only clips it).

    Wrong when: rewards lie between 0 and 1 and gains are these: the running mean rises by some thousandths per step, and the value by some ten-thousandths.
    """

    name: str
    metric: str = "rollouts/kl/reward"
    kp: float = 0.3
    ki: float = 0.01
    kd: float = 0.05
    decay: float = 0.95
    target: float = 0.001
    base: float = 0.3
    low: float = 0.1
    high: float = 0.6
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.low <= self.base <= self.high:
            raise ValueError(f"RewardVelocity: base={self.base} must lie between low={self.low} and high={self.high}")
        if not (0 <= self.decay < 1 and self.limit > 0 and min(self.kp, self.ki, self.kd) >= 0):
            raise ValueError(
                f"RewardVelocity: decay={self.decay} must be at least 0 and below 1, limit={self.limit} above 0, and kp={self.kp}, ki={self.ki}, kd={self.kd} not negative"
            )

    def begin(self) -> dict[str, float]:
        return {"value": self.base, "mean": 0.0, "seen": 0.0, "sum": 0.0, "error": 0.0}

    def step(self, state: Mapping[str, float], measured: float, sequences: int) -> dict[str, float]:
        if not state["seen"]:
            return {**state, "mean": measured, "seen": 1.0}
        mean = self.decay * state["mean"] + (1 - self.decay) * measured
        error = mean - state["mean"] - self.target
        total = min(max(state["sum"] + error, -self.limit), self.limit)
        value = self._at(error, total, state["error"])
        if (value > self.high and error > 0) or (value < self.low and error < 0):
            total = state["sum"]
        return {"value": min(max(value, self.low), self.high), "mean": mean, "seen": 1.0, "sum": total, "error": error}

    def value(self, state: Mapping[str, float]) -> float:
        return state["value"]

    def __call__(self, progress: float) -> float:
        return self.base

    def _at(self, error: float, total: float, before: float) -> float:
        return self.base + self.kp * error + self.ki * total + self.kd * (error - before)
