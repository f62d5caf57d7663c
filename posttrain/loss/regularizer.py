"""Regularisers: additive terms beside the streams' own weights.

A regulariser acts on every stream, or on those it names in ``streams``, with its own ``aggregation`` or the stream's.  It ignores masks,
token weights and the stream's coefficient: those belong to the policy term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.loss.preference import pair_difference, require_pairs
from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar

Streams = tuple[str, ...] | None


@dataclass(frozen=True)
class KL:
    """A KL penalty estimated from the sampled tokens.

    Equation: with ``d = l - log pi_to``: ``k1 = d``, ``k2 = d**2 / 2``, ``k3 = exp(-d) + d - 1``; the penalty's derivative is ``1``, ``d``,
    ``1 - exp(-d)``.  With ``ratio="token"`` the penalty is ``r * k``, whose derivative is ``r * (k + k')``; for k3 that is ``r * d``.
    ``k3_of_to = exp(d) - d - 1``, derivative ``exp(d) - 1``, is k3 on samples of ``to``.
    Source: Schulman's note on approximating KL; k3 in GRPO, arXiv 2402.03300; gradients: arXiv 2506.09477, 2510.01555; the drift from the policy that
    sampled: CPGD, arXiv 2505.12504.

    ``estimator``: on-policy, k2 as a loss is the *local* reverse KL (pi to base), k3 the local *forward* KL (base to pi), and k1 has
    expectation 0: it is refused without a ratio unless ``force``; ``k3_of_to`` is the local forward KL where ``to`` is the policy that sampled the
    tokens.  ``to``: the policy to stay near.  ``coef``: positive is a penalty; a number or a schedule.  ``ratio``, for stale samples of ``over``
    (``old`` or ``behaviour``): ``token`` multiplies by ``pi/pi_over`` and differentiates it too; ``prefix`` multiplies the derivative by the ratio of this
    token and all before it, which is exact, with a variance that grows with the length.
    ``level``: ``sequence`` applies the estimator to the sum of ``d`` over the answer (k2: the exact reverse KL of sequences).
    ``max_log_ratio``: beyond this ``|d|`` the gradient is 0, and the ``clamped`` metric says how often; without it a huge ``-d`` under k3
    stops the run.

    Wrong when: the KL of whole sequences is meant and ``level`` is ``token``; put k1 in the reward then (``advantage.ColumnMinusKL``).
    """

    estimator: Literal["k1", "k2", "k3", "k3_of_to"] = "k3"
    to: str = "base"
    coef: Scalar = 0.001
    ratio: Literal["none", "token", "prefix"] = "none"
    over: str = "old"
    level: Literal["token", "sequence"] = "token"
    max_log_ratio: float | None = None
    force: bool = False
    streams: Streams = None
    aggregation: Any = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.estimator, ("k1", "k2", "k3", "k3_of_to")),
            ("ratio", self.ratio, ("none", "token", "prefix")),
            ("level", self.level, ("token", "sequence")),
        ):
            if value not in known:
                raise ValueError(f"regularizer.KL: {name}={value!r} does not exist; choose from {', '.join(known)}")
        if self.estimator == "k1" and self.ratio != "token" and not self.force:
            raise ValueError(
                "regularizer.KL: k1 as a loss has a gradient of expectation 0, it only adds noise; use estimator=k2 (reverse) or k3 "
                "(forward), "
                "put k1 in the reward with advantage.ColumnMinusKL, or set force=true"
            )
        if self.ratio != "none" and self.level == "sequence":
            raise ValueError(
                f"regularizer.KL: ratio={self.ratio} belongs to level=token; a sequence KL would need the ratio of the whole sequence"
            )
        if self.ratio != "none" and self.estimator == "k3_of_to":
            raise ValueError(f"regularizer.KL: k3_of_to is for tokens sampled by {self.to}, so it takes no ratio; set ratio=none")
        if self.max_log_ratio is not None and not self.max_log_ratio > 0:
            raise ValueError(f"regularizer.KL: max_log_ratio={self.max_log_ratio} must be above 0, or null for none")
        object.__setattr__(self, "streams", _names(self.streams))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to} | ({self.over} if self.ratio != "none" else set())) - {"self"}

    live = True

    @property
    def coupling(self) -> str:
        return "sequence" if self.ratio == "prefix" else self.level

    @property
    def formula(self) -> str:
        d = f"log(pi/pi_{self.to})" if self.level == "token" else f"sum log(pi/pi_{self.to})"
        k = {"k1": "d", "k2": "d^2/2", "k3": "exp(-d) + d - 1", "k3_of_to": "exp(d) - d - 1"}[self.estimator]
        r = {"none": "", "token": f"pi/pi_{self.over} * ", "prefix": f"sg(pi/pi_{self.over} of the prefix) * "}[self.ratio]
        return f"{number(self.coef)} * {r}({k}) [{self.estimator}, d = {d}]"

    def gradient(self, view: TokenView) -> Tensor:
        d, outside = self._difference(view)
        slopes = {"k1": torch.ones_like, "k2": lambda x: x, "k3": lambda x: -torch.expm1(-x), "k3_of_to": torch.expm1}
        slope = slopes[self.estimator](d)
        if self.ratio == "prefix":
            slope = slope * self._prefix_ratio(view)
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
        if self.ratio == "prefix":
            k = k * self._prefix_ratio(view)
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
        estimates = {
            "k1": lambda x: x,
            "k2": lambda x: x * x / 2,
            "k3": lambda x: torch.expm1(-x) + x,
            "k3_of_to": lambda x: torch.expm1(x) - x,
        }
        return estimates[self.estimator](d)

    def _prefix_ratio(self, view: TokenView) -> Tensor:
        d = view.log_ratio(self.over, level="token").detach()
        return torch.exp(view.spread(view.seq_sum(d)) - view.discounted(d) + d)


@dataclass(frozen=True)
class FullKL:
    """The KL over the whole vocabulary, position by position: no sampling noise, at the price of a second row of probabilities.

    Equation: ``reverse``: ``sum_v p_v (log p_v - log q_v)``; ``forward``: ``sum_v q_v (log q_v - log p_v)``, with ``q`` the policy ``to``.
    Source: distillation; ASFT (forward anchor on supervised data).

    ``direction``: reverse seeks modes, forward covers them.  ``to``: ``base``, ``teacher``, or ``stored``: what the data holds of a teacher, its most probable
    tokens and a bucket for the rest (never more than the whole KL).  ``coef``: positive is a penalty.

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
class JensenShannon:
    """The generalised Jensen-Shannon divergence over the whole vocabulary, position by position: bounded, between the two KLs.

    Equation: with ``q`` the policy ``to`` and ``m = beta q + (1 - beta) p``: ``beta KL(q || m) + (1 - beta) KL(p || m)``.
    Source: GKD, arXiv 2306.13649.

    ``beta``: between 0 and 1; divided by ``beta`` it tends to the forward KL as beta falls to 0, divided by ``1 - beta`` to the reverse KL as it
    rises to 1.  ``to``: ``teacher`` or ``base``.  ``coef``: positive is a penalty.

    Wrong when: ``beta`` is near an end and the coefficient was tuned at another one: the gradient shrinks with ``beta (1 - beta)``.
    """

    beta: float = 0.5
    to: str = "teacher"
    coef: Scalar = 1.0
    streams: Streams = None
    aggregation: Any = None
    sign = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"regularizer.JensenShannon: beta={self.beta} must lie between 0 and 1; at the ends the divergence is 0: use "
                "regularizer.FullKL with direction forward (0) or reverse (1)"
            )
        object.__setattr__(self, "streams", _names(self.streams))

    @property
    def column(self) -> str:
        return f"jsd_{self.beta:g}:{self.to}"

    @property
    def formula(self) -> str:
        return f"{number(self.coef)} * JSD_{self.beta:g}(pi_{self.to}, pi)"


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


@dataclass(frozen=True)
class PairCentre:
    """Keep the two numbers of a pair around 0: a reward model's offset is free otherwise.

    Equation: ``P = (r_chosen + r_rejected)**2``, derivative ``2 (r_chosen + r_rejected)`` on both sides.
    Source: arXiv 2312.09244.

    ``coef``: a number or a schedule; 0.01 is usual.

    Wrong when: rewards are meant to carry an offset of their own.
    """

    coef: Scalar = 0.01
    streams: Streams = None
    aggregation: Any = None
    coupling = "group"
    live = True
    head = "scalar"

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", _names(self.streams))

    @property
    def formula(self) -> str:
        return f"{number(self.coef)} * (r_chosen + r_rejected)^2"

    def gradient(self, view: TokenView) -> Tensor:
        return view.spread(2.0 * self._sum(view))

    def penalty(self, view: TokenView) -> Tensor:
        """Once per pair, spread over all its columns."""
        sides = view.code_count(view.batch.pair, view.seq_len() > 0).clamp(min=1)
        return view.spread(self._sum(view) ** 2 / sides / view.seq_len().clamp(min=1))

    def value(self, view: TokenView) -> Tensor:
        return view.spread(self._sum(view) ** 2)

    def _sum(self, view: TokenView) -> Tensor:
        require_pairs(view, "regulariser PairCentre")
        return pair_difference(view, view.seq_sum(view.select(view.logp)) * view.batch.side)


def _names(streams: Any) -> Streams:
    return None if streams is None else ((streams,) if isinstance(streams, str) else tuple(streams))
