"""Mask terms: which tokens are stable enough to learn from, as a non-negative detached factor on the weight.

Masks multiply and each names the ratio it looks at, ``over / to``, which need not be the ratio that weights the gradient.  Every ratio is
compared in log space, so a log-ratio of a hundred neither overflows nor turns into ``0 * inf``.  ``d`` is the log-ratio at the mask's
``level`` (``None``: that of the stream's likelihood).  A dropped token keeps its place in the denominator unless the aggregation counts
``kept`` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import LEVELS, Level, TokenView
from posttrain.mixture.schedule import Scalar


class _Ratio:
    """Declarations shared by masks that look at a ratio ``over / to``."""

    to: str
    over: str
    level: Level | None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to, self.over}) - {"self"}

    @property
    def live(self) -> bool:
        return "self" in (self.to, self.over)

    @property
    def coupling(self) -> str:
        return "sequence" if self.level in ("sequence", "sequence_geometric") else "token"

    @property
    def ratio(self) -> str:
        over = "pi" if self.over == "self" else f"pi_{self.over}"
        at = f" per {self.level}" if self.level else ""
        return f"{over}/{'pi' if self.to == 'self' else 'pi_' + self.to}{at}"

    def log_ratio(self, view: TokenView) -> Tensor:
        return view.log_ratio(self.to, self.over, self.level)

    def _check(self, **at_least: float) -> None:
        """Plain numbers are checked at construction, schedules when they are read."""
        name = f"mask.{type(self).__name__}"
        if self.level is not None and self.level not in LEVELS:
            raise ValueError(f"{name}: level={self.level!r} does not exist; choose from {', '.join(LEVELS)}, or null for the likelihood's")
        if self.to == self.over:
            raise ValueError(f"{name}: the ratio {self.over}/{self.to} is always 1; name two different policies")
        for key, low in at_least.items():
            value = getattr(self, key)
            if not callable(value) and not value >= low:
                raise ValueError(f"{name}: {key}={value} must be at least {low:g}")


def _log(value: float, what: str) -> float:
    if value < 0:
        raise ValueError(f"{what} is {value}: the bound of a ratio cannot be below 0")
    return math.log(value) if value > 0 else -math.inf


@dataclass(frozen=True)
class RatioClip(_Ratio):
    """Drop a token whose ratio has already left the range in the direction its advantage pushes.

    Equation: ``1 - [A > 0 and r > 1 + high] - [A < 0 and r < 1 - low]``: exactly where ``min(r A, clip(r, 1 - low, 1 + high) A)`` has no
    gradient.
    Source: PPO, arXiv 1707.06347; ``high > low`` is clip-higher, DAPO, arXiv 2503.14476.

    ``low``, ``high``: distances from 1, numbers or schedules; ``low=1`` and ``high=inf`` switch a side off.  ``to``, ``over``: the ratio is
    ``over / to``.  ``level``: ``token``, ``sequence``, ``sequence_geometric`` or that of the likelihood.

    Wrong when: there is one on-policy update per batch: the ratio is 1 and nothing is ever clipped.  It does not bound ``r`` for ``A < 0``:
    add :class:`DualClip`.
    """

    low: Scalar = 0.2
    high: Scalar = 0.2
    to: str = "old"
    over: str = "self"
    level: Level | None = None

    def __post_init__(self) -> None:
        self._check(low=0.0, high=0.0)
        if not callable(self.low) and self.low > 1:
            raise ValueError(f"mask.RatioClip: low={self.low} must be at most 1, because 1 - low is a ratio; 1 switches the lower side off")

    @property
    def formula(self) -> str:
        low = f"1-{number(self.low)}" if callable(self.low) else number(1 - self.low)
        high = f"1+{number(self.high)}" if callable(self.high) else number(1 + self.high)
        return f"keep({self.ratio} in [{low}, {high}], one-sided)"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        above = d > _log(1.0 + view.at(self.high), "1 + high of mask.RatioClip")
        below = d < _log(1.0 - view.at(self.low), "1 - low of mask.RatioClip")
        return (~(((advantage > 0) & above) | ((advantage < 0) & below))).to(d.dtype)


@dataclass(frozen=True)
class DualClip(_Ratio):
    """Drop a token with a negative advantage whose ratio is huge.

    Equation: ``1 - [A < 0 and r > c]``: where ``max(min(r A, clip(r) A), c A)`` has no gradient.
    Source: arXiv 1912.09729; "two-sided clip" in INTELLECT-2, arXiv 2505.07291.

    ``c``: the bound on the ratio, above the clip's ``1 + high``.  ``to``, ``over``, ``level``: as in :class:`RatioClip`.

    Wrong when: such tokens should still push with a bounded weight: a dropped token has gradient 0, not ``c``; use :class:`Cap`.
    """

    c: Scalar = 3.0
    to: str = "old"
    over: str = "self"
    level: Level | None = None

    def __post_init__(self) -> None:
        self._check()
        if not callable(self.c) and not self.c > 1:
            raise ValueError(f"mask.DualClip: c={self.c} must be above 1 (and above 1 + high of the clip)")

    @property
    def formula(self) -> str:
        return f"keep(A > 0 or {self.ratio} <= {number(self.c)})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        return (~((advantage < 0) & (d > _log(view.at(self.c), "c of mask.DualClip")))).to(d.dtype)


@dataclass(frozen=True)
class Cap(_Ratio):
    """Cap the ratio: every token keeps a gradient, none with a weight above the cap.

    Equation: ``min(1, max / r)``, so that ``r`` times the factor is ``min(r, max)``.
    Source: CISPO, MiniMax-M1, arXiv 2506.13585; the value form of the cap is ScaleRL's, arXiv 2510.13786 (others write ``1 + epsilon``).

    ``max``: the largest ratio.  ``to``, ``over``, ``level``: as in :class:`RatioClip`; they should name the ratio the reference uses.

    Wrong when: the reference's ratio is another one: the product is then not capped.
    """

    max: Scalar = 5.0
    to: str = "old"
    over: str = "self"
    level: Level | None = None

    def __post_init__(self) -> None:
        self._check(max=0.0)

    @property
    def formula(self) -> str:
        return f"min(1, {number(self.max)} / ({self.ratio}))"

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        return (_log(view.at(self.max), "max of mask.Cap") - self.log_ratio(view)).clamp(max=0.0)


@dataclass(frozen=True)
class Truncate(_Ratio):
    """Truncated importance sampling between the policy that sampled and the learner's snapshot of it.

    Equation: with ``rho = pi_over / pi_to``, ``apply="cap"``: ``min(1, max / rho)``, for a reference that already holds ``rho``
    (``to: behaviour``); ``apply="weight"``: ``min(rho, max)``, for a reference that does not (``to: old``).
    Source: truncated importance sampling, arXiv 1606.02647, as train/rollout correction (Yao et al. 2025).

    ``max``: the largest ``rho``; 1 never amplifies, ``inf`` never truncates.  ``to``, ``over``: the ratio is ``over / to``.  ``level``:
    ``sequence`` is the product over the answer, ``sequence_geometric`` its mean; they react to length in opposite ways.

    Wrong when: the engine's log-probs are of another distribution than the learner's (temperature, top-p, raw instead of processed).
    """

    max: Scalar = 2.0
    to: str = "behaviour"
    over: str = "old"
    level: Level | None = None
    apply: Literal["cap", "weight"] = "cap"

    def __post_init__(self) -> None:
        self._check(max=0.0)
        if self.apply not in ("cap", "weight"):
            raise ValueError(f"mask.Truncate: apply={self.apply!r} does not exist; choose cap or weight")

    @property
    def formula(self) -> str:
        most = number(self.max)
        return f"min(1, {most} / ({self.ratio}))" if self.apply == "cap" else f"min({self.ratio}, {most})"

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        rho, bound = self.log_ratio(view), _log(view.at(self.max), "max of mask.Truncate")
        return (bound - rho).clamp(max=0.0) if self.apply == "cap" else rho.clamp(max=bound)


@dataclass(frozen=True)
class Reject(_Ratio):
    """Drop what the sampler and the learner disagree about; keep the rest as it is.

    Equation: ``[min <= pi_over / pi_to <= max]``.
    Source: IcePop, arXiv 2510.18855 (``level="token"``); masked importance sampling (``level="sequence"`` or ``"sequence_geometric"``).

    ``min``, ``max``: bounds of the ratio (some code states them for its inverse); 0 and ``inf`` switch a side off.  ``to``, ``over``, ``level``: the
    ratio is ``over / to`` at this level.

    Wrong when: most tokens are rejected: the run learns from what is left without a word, so watch the ``masked`` metric.
    """

    min: Scalar = 0.5
    max: Scalar = 5.0
    to: str = "behaviour"
    over: str = "old"
    level: Level | None = None

    def __post_init__(self) -> None:
        self._check(min=0.0, max=0.0)
        if not callable(self.min) and not callable(self.max) and self.min > self.max:
            raise ValueError(f"mask.Reject: min={self.min} is above max={self.max}: everything would be rejected")

    @property
    def formula(self) -> str:
        return f"keep({self.ratio} in [{number(self.min)}, {number(self.max)}])"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        low, high = _log(view.at(self.min), "min of mask.Reject"), _log(view.at(self.max), "max of mask.Reject")
        return ((d >= low) & (d <= high)).to(d.dtype)


@dataclass(frozen=True)
class DropTruncated:
    """Drop whole answers that did not end by themselves.

    Equation: ``[finish of the sequence not in reasons]``.
    Source: overlong filtering, DAPO, arXiv 2503.14476.

    ``reasons``: the finish reasons to drop, from ``stop``, ``length``, ``aborted``, ``env_error``, ``given``.

    Wrong when: most answers hit the limit: raise the limit instead.  Their tokens stay in the denominator unless it counts ``kept`` ones.
    """

    reasons: tuple[str, ...] = ("length",)

    def __post_init__(self) -> None:
        reasons = (self.reasons,) if isinstance(self.reasons, str) else tuple(self.reasons)
        known = ("stop", "length", "aborted", "env_error", "given")
        if any(r not in known for r in reasons):
            raise ValueError(f"mask.DropTruncated: reasons={list(reasons)} must come from {', '.join(known)}")
        object.__setattr__(self, "reasons", reasons)

    @property
    def formula(self) -> str:
        return f"keep(finish not in {{{', '.join(self.reasons)}}})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        keep = [finish not in self.reasons for finish in view.batch.finish]
        return view.spread(torch.tensor(keep, dtype=view.logp.dtype, device=view.logp.device))
