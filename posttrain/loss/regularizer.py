"""Regularisers: additive terms beside the streams' own weights.

A regulariser acts on every stream, or on those it names in ``streams``, with its own ``aggregation`` or the stream's.  It ignores masks,
token weights and the stream's coefficient: those belong to the policy term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar

Streams = tuple[str, ...] | None


@dataclass(frozen=True)
class KL:
    """A KL penalty estimated from the sampled tokens.

    Equation: with ``d = l - log pi_to``: ``k1 = d``, ``k2 = d**2 / 2``, ``k3 = exp(-d) + d - 1``; the penalty's derivative is ``1``, ``d``,
    ``1 - exp(-d)``.  With ``ratio="token"`` the penalty is ``r * k``, whose derivative is ``r * (k + k')``; for k3 that is ``r * d``.
    Source: Schulman's note on approximating KL; k3 in GRPO, arXiv 2402.03300; gradients: arXiv 2506.09477, 2510.01555.

    ``estimator``: on-policy, k2 as a loss is the *local* reverse KL (pi to base), k3 the local *forward* KL (base to pi), and k1 has
    expectation 0: it is refused without a ratio unless ``force``.  ``to``: the policy to stay near.  ``coef``: positive is a penalty; a
    number or a schedule.  ``ratio``: ``token`` multiplies by ``pi/pi_over`` (``over="old"`` or ``behaviour``) for stale samples.
    ``level``: ``sequence`` applies the estimator to the sum of ``d`` over the answer (k2: the exact reverse KL of sequences).
    ``max_log_ratio``: beyond this ``|d|`` the gradient is 0, and the ``clamped`` metric says how often; without it a huge ``-d`` under k3
    stops the run.

    Wrong when: the KL of whole sequences is meant and ``level`` is ``token``; put k1 in the reward then (``advantage.ColumnMinusKL``).
    """

    estimator: Literal["k1", "k2", "k3"] = "k3"
    to: str = "base"
    coef: Scalar = 0.001
    ratio: Literal["none", "token"] = "none"
    over: str = "old"
    level: Literal["token", "sequence"] = "token"
    max_log_ratio: float | None = None
    force: bool = False
    streams: Streams = None
    aggregation: Any = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.estimator, ("k1", "k2", "k3")),
            ("ratio", self.ratio, ("none", "token")),
            ("level", self.level, ("token", "sequence")),
        ):
            if value not in known:
                raise ValueError(f"regularizer.KL: {name}={value!r} does not exist; choose from {', '.join(known)}")
        if self.estimator == "k1" and self.ratio == "none" and not self.force:
            raise ValueError(
                "regularizer.KL: k1 as a loss has a gradient of expectation 0, it only adds noise; use estimator=k2 (reverse) or k3 "
                "(forward), "
                "put k1 in the reward with advantage.ColumnMinusKL, or set force=true"
            )
        if self.ratio == "token" and self.level == "sequence":
            raise ValueError("regularizer.KL: ratio=token belongs to level=token; a sequence KL would need the ratio of the whole sequence")
        if self.max_log_ratio is not None and not self.max_log_ratio > 0:
            raise ValueError(f"regularizer.KL: max_log_ratio={self.max_log_ratio} must be above 0, or null for none")
        object.__setattr__(self, "streams", _names(self.streams))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to} | ({self.over} if self.ratio == "token" else set())) - {"self"}

    live = True

    @property
    def coupling(self) -> str:
        return self.level

    @property
    def formula(self) -> str:
        d = f"log(pi/pi_{self.to})" if self.level == "token" else f"sum log(pi/pi_{self.to})"
        k = {"k1": "d", "k2": "d^2/2", "k3": "exp(-d) + d - 1"}[self.estimator]
        r = f"pi/pi_{self.over} * " if self.ratio == "token" else ""
        return f"{number(self.coef)} * {r}({k}) [{self.estimator}, d = {d}]"

    def gradient(self, view: TokenView) -> Tensor:
        d, outside = self._difference(view)
        slope = {"k1": torch.ones_like, "k2": lambda x: x, "k3": lambda x: -torch.expm1(-x)}[self.estimator](d)
        if self.ratio == "token":
            r = torch.exp(view.log_ratio(self.over, level="token"))
            slope = r * (d if self.estimator == "k3" else slope + self._estimate(d))
        return torch.where(outside, torch.zeros_like(slope), slope)

    def value(self, view: TokenView) -> Tensor:
        d, _ = self._difference(view)
        return self._estimate(d)

    def penalty(self, view: TokenView) -> Tensor:
        """What :meth:`gradient` is the derivative of: ``[N]``, summing to the penalty without its coefficient."""
        d, _ = self._difference(view)
        k = self._estimate(d)
        if self.ratio == "token":
            k = k * torch.exp(view.log_ratio(self.over, level="token"))
        return k / view.spread(view.seq_len().clamp(min=1)) if self.level == "sequence" else k

    def metrics(self, view: TokenView) -> Metrics:
        if self.max_log_ratio is None:
            return {}
        _, outside = self._difference(view)
        return {"clamped": (float((outside & view.on).sum()), float(view.on.sum()))}

    def _difference(self, view: TokenView) -> tuple[Tensor, Tensor]:
        d = view.log_ratio(self.to, level=self.level)
        if self.max_log_ratio is None:
            return d, torch.zeros_like(d, dtype=torch.bool)
        return d.clamp(-self.max_log_ratio, self.max_log_ratio), d.abs() > self.max_log_ratio

    def _estimate(self, d: Tensor) -> Tensor:
        return {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: torch.expm1(-x) + x}[self.estimator](d)


@dataclass(frozen=True)
class FullKL:
    """The KL over the whole vocabulary, position by position: no sampling noise, at the price of a second row of probabilities.

    Equation: ``reverse``: ``sum_v p_v (log p_v - log q_v)``; ``forward``: ``sum_v q_v (log q_v - log p_v)``, with ``q`` the policy ``to``.
    Source: distillation; ASFT (forward anchor on supervised data).

    ``direction``: reverse seeks modes, forward covers them.  ``to``: ``base`` or ``teacher``.  ``coef``: positive is a penalty.

    Wrong when: the two models do not share a vocabulary; or the KL of sequences is meant: this one holds the prefixes fixed.
    """

    direction: Literal["reverse", "forward"] = "reverse"
    to: str = "base"
    coef: Scalar = 0.001
    streams: Streams = None
    aggregation: Any = None
    sign = 1.0

    def __post_init__(self) -> None:
        if self.direction not in ("reverse", "forward"):
            raise ValueError(f"regularizer.FullKL: direction={self.direction!r} does not exist; choose reverse or forward")
        object.__setattr__(self, "streams", _names(self.streams))

    @property
    def column(self) -> str:
        return f"kl_{self.direction}:{self.to}"

    @property
    def formula(self) -> str:
        ends = f"pi || pi_{self.to}" if self.direction == "reverse" else f"pi_{self.to} || pi"
        return f"{number(self.coef)} * KL({ends})"


@dataclass(frozen=True)
class Entropy:
    """The entropy of the next-token distribution, as a bonus.

    Equation: ``J += coef * H``, ``H = -sum_v p_v log p_v`` over the whole vocabulary at the training temperature.
    Source: Williams and Peng 1991; adaptive form in Skywork-OR1, arXiv 2505.22312; minimisation (negative ``coef``), arXiv 2505.20282.

    ``coef``: positive is a bonus, negative a penalty.  A number or a schedule.

    Wrong when: sampling uses top-p: this is the entropy of the untruncated policy.
    """

    coef: Scalar = 0.001
    streams: Streams = None
    aggregation: Any = None
    sign = -1.0
    column = "entropy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", _names(self.streams))

    @property
    def formula(self) -> str:
        return f"-{number(self.coef)} * H(pi)"


def _names(streams: Any) -> Streams:
    return None if streams is None else ((streams,) if isinstance(streams, str) else tuple(streams))
