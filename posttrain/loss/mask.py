"""Mask terms: which tokens are stable enough to learn from, as a non-negative detached factor on the weight.

Masks multiply and each names the ratio it looks at, ``over / to``, which need not be the ratio that weights the gradient.  Every ratio is
compared in log space, so a log-ratio of a hundred neither overflows nor turns into ``0 * inf``.  ``d`` is the log-ratio at the mask's
``level`` (``None``: that of the stream's likelihood).  A dropped token keeps its place in the denominator unless the aggregation counts
``kept`` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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


def _clamp(d: Tensor, least: float, most: float, what: str) -> Tensor:
    """A log-ratio held between the logarithms of two bounds."""
    return d.clamp(_log(least, f"min of {what}"), _log(most, f"max of {what}"))


def _clamped(ratio: str, least: Scalar, most: Scalar, over: str = "") -> str:
    """``clamp`` as text, shorter without a lower bound."""
    if not callable(least) and least == 0:
        return f"min(1, {number(most)}{over})" if over else f"min({ratio}, {number(most)})"
    return f"clamp({ratio}, {number(least)}, {number(most)}){over}"


def _ordered(term: Any) -> None:
    if not callable(term.min) and not callable(term.max) and term.min > term.max:
        raise ValueError(f"mask.{type(term).__name__}: min={term.min} is above max={term.max}")
    _around_one(term)


def _around_one(term: Any) -> None:
    """Bounds on a ratio are ratios, and the ratio of a policy to itself is 1: an epsilon of a clip, 0.2, is not one."""
    name = f"mask.{type(term).__name__}"
    if not callable(term.max) and term.max < 1:
        raise ValueError(f"{name}: max={term.max} is the largest ratio itself, not a distance from 1, and would act on every token; write {1 + term.max:g}, or null")
    if not callable(term.min) and term.min > 1:
        raise ValueError(f"{name}: min={term.min} is the smallest ratio itself, and would act on a policy that has not moved; it lies between 0 and 1")


def _above_zero(term: Any, *names: str) -> None:
    for name in names:
        value = getattr(term, name)
        if not callable(value) and not value > 0:
            raise ValueError(f"mask.{type(term).__name__}: {name}={value} must be above 0")


TOKEN_RANGE, GEOMETRIC_RANGE = 0.1, 0.01
"""From here on a clip range is one of token ratios; below this, one of geometric means over answers."""


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

    def fits(self, stream: Any) -> None:
        """Raise ``ValueError`` for a range on the scale of another ratio, or written as the ratio itself."""
        level = self.level or stream.likelihood.ratio
        for name, off in (("low", 1.0), ("high", math.inf)):
            value = getattr(self, name)
            if callable(value) or value in (0.0, off):
                continue
            if name == "high" and value >= 1:
                raise ValueError(f"mask.RatioClip: high={value} is a distance from 1, so ratios up to {1 + value:g} would be kept; write {value - 1:g} for {value:g}, or inf")
            if level == "sequence_geometric" and value >= TOKEN_RANGE:
                raise ValueError(
                    f"mask.RatioClip: {name}={value} is a range for the ratio of a token; the geometric mean over an answer stays within a thousandth or so of 1, and "
                    "would never be clipped: 3e-4 and 4e-4 are GSPO's"
                )
            if level == "token" and value < GEOMETRIC_RANGE:
                raise ValueError(
                    f"mask.RatioClip: {name}={value} is a range for the geometric mean over an answer; the ratio of a token leaves it at the first update: 0.2 is usual, "
                    "or set likelihood.ratio=sequence_geometric"
                )

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

    def fits(self, stream: Any) -> None:
        """Raise ``ValueError`` when a clip of the same ratio already ends beyond ``c``."""
        for key, other in stream.masks.items():
            same = isinstance(other, RatioClip) and (other.to, other.over, other.level) == (self.to, self.over, self.level)
            if same and not callable(self.c) and not callable(other.high) and self.c <= 1 + other.high:
                raise ValueError(
                    f"mask.DualClip: c={self.c} must be above 1 + high={1 + other.high:g} of the mask {key!r} on the same ratio"
                )

    @property
    def formula(self) -> str:
        return f"keep(A > 0 or {self.ratio} <= {number(self.c)})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        return (~((advantage < 0) & (d > _log(view.at(self.c), "c of mask.DualClip")))).to(d.dtype)


@dataclass(frozen=True)
class Cap(_Ratio):
    """Cap the ratio: every token keeps a gradient, none with a weight above the cap.

    Equation: ``clamp(r, min, max) / r``, so that ``r`` times the factor is ``clamp(r, min, max)``.
    Source: CISPO, MiniMax-M1, arXiv 2506.13585; the value form of the cap is ScaleRL's, arXiv 2510.13786 (others write ``1 + epsilon``).

    ``max``: the largest ratio.  ``min``: the smallest; 0 leaves small ratios alone, as published.  ``to``, ``over``, ``level``: as in
    :class:`RatioClip`; they should name the ratio the reference uses.

    Wrong when: the reference's ratio is another one: the product is then not capped.
    """

    max: Scalar = 5.0
    to: str = "old"
    over: str = "self"
    level: Level | None = None
    min: Scalar = 0.0

    def __post_init__(self) -> None:
        self._check(max=0.0, min=0.0)
        _ordered(self)

    @property
    def formula(self) -> str:
        return _clamped(self.ratio, self.min, self.max, f" / ({self.ratio})")

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        return _clamp(d, view.at(self.min), view.at(self.max), "mask.Cap") - d


@dataclass(frozen=True)
class Truncate(_Ratio):
    """Truncated importance sampling between the policy that sampled and the learner's snapshot of it.

    Equation: with ``rho = pi_over / pi_to``, ``apply="cap"``: ``clamp(rho, min, max) / rho``, for a reference that already holds ``rho``
    (``to: behaviour``); ``apply="weight"``: ``clamp(rho, min, max)``, for a reference that does not (``to: old``).
    Source: truncated importance sampling, arXiv 1606.02647, as train/rollout correction (Yao et al. 2025).

    ``max``: the largest ``rho``; 1 never amplifies, ``inf`` never truncates.  ``min``: the smallest; 0 leaves small ones alone.  ``to``,
    ``over``: the ratio is ``over / to``.  ``level``: ``sequence`` is the product over the answer, ``sequence_geometric`` its mean; they react
    to length in opposite ways.

    Wrong when: the engine's log-probs are of another distribution than the learner's (temperature, top-p, raw instead of processed).
    """

    max: Scalar = 2.0
    to: str = "behaviour"
    over: str = "old"
    level: Level | None = None
    apply: Literal["cap", "weight"] = "cap"
    min: Scalar = 0.0

    def __post_init__(self) -> None:
        self._check(max=0.0, min=0.0)
        _ordered(self)
        if self.apply not in ("cap", "weight"):
            raise ValueError(f"mask.Truncate: apply={self.apply!r} does not exist; choose cap or weight")

    @property
    def formula(self) -> str:
        return _clamped(self.ratio, self.min, self.max, f" / ({self.ratio})" if self.apply == "cap" else "")

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        rho = self.log_ratio(view)
        bounded = _clamp(rho, view.at(self.min), view.at(self.max), "mask.Truncate")
        return bounded - rho if self.apply == "cap" else bounded


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
        _around_one(self)

    @property
    def formula(self) -> str:
        return f"keep({self.ratio} in [{number(self.min)}, {number(self.max)}])"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        low, high = _log(view.at(self.min), "min of mask.Reject"), _log(view.at(self.max), "max of mask.Reject")
        return ((d >= low) & (d <= high)).to(d.dtype)


@dataclass(frozen=True)
class ProbabilityBand:
    """Keep the tokens whose probability lies in a range.

    Equation: ``[min <= p <= max]``.
    Source: the thresholded objectives of arXiv 2510.00526.

    ``min``, ``max``: bounds on the current probability, numbers or schedules; 0 and 1 switch a side off.

    Wrong when: the objective it comes from is a mean over the survivors: set ``aggregation.denominator=kept``, else a mask that keeps a tenth of
    the tokens also makes the step ten times smaller.
    """

    min: Scalar = 0.0
    max: Scalar = 1.0
    live = True

    def __post_init__(self) -> None:
        for name in ("min", "max"):
            value = getattr(self, name)
            if not callable(value) and not 0 <= value <= 1:
                raise ValueError(f"mask.ProbabilityBand: {name}={value} is a probability, between 0 and 1")
        if not callable(self.min) and not callable(self.max) and self.min > self.max:
            raise ValueError(f"mask.ProbabilityBand: min={self.min} is above max={self.max}: nothing would be kept")

    @property
    def formula(self) -> str:
        return f"keep(p in [{number(self.min)}, {number(self.max)}])"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        p = torch.exp(view.logp)
        return ((p >= view.at(self.min)) & (p <= view.at(self.max))).to(view.logp.dtype)


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


@dataclass(frozen=True)
class SoftGate(_Ratio):
    """Let a token fade out smoothly as its ratio leaves 1, in either direction.

    Equation: ``4 sigmoid(x) (1 - sigmoid(x))`` with ``x = tau (r - 1)``: ``r`` times it is the slope of ``(4 / tau) sigmoid(x)`` in ``log r``.
    Source: SAPO, arXiv 2511.20347.

    ``tau_pos``, ``tau_neg``: how fast, for ``A > 0`` and for the rest; towards 0 nothing fades.  ``to``, ``over``, ``level``: as in
    :class:`RatioClip`.

    Wrong when: a hard clip on the same ratio stands beside it: the clip then decides.
    """

    tau_pos: Scalar = 1.0
    tau_neg: Scalar = 1.05
    to: str = "old"
    over: str = "self"
    level: Level | None = None

    def __post_init__(self) -> None:
        self._check()
        _above_zero(self, "tau_pos", "tau_neg")

    @property
    def formula(self) -> str:
        return f"4 s(1-s) [s = sigmoid(tau ({self.ratio} - 1)), tau = {number(self.tau_pos)} where A > 0, else {number(self.tau_neg)}]"

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        tau = torch.where(advantage > 0, torch.full_like(d, view.at(self.tau_pos)), view.at(self.tau_neg))
        x = tau * torch.expm1(d)
        return math.log(4.0) + logsigmoid(x) + logsigmoid(-x)


@dataclass(frozen=True)
class InnerClip(_Ratio):
    """Clip the log-ratio of each token before the answer's geometric mean is taken of them; drop the tokens that were clipped.

    Equation: with ``c[t] = min(d[t], high)`` where ``A > 0`` and ``max(d[t], -low)`` where ``A < 0``: ``[c[t] = d[t]] * exp(mean c) / r``, so that
    the ratio ``r`` of the reference becomes ``exp(mean c)``.
    Source: GMPO, arXiv 2507.20673.

    ``low``, ``high``: the bounds in log space, 0.4 as published; not the 0.2 of a ratio.  ``to``, ``over``: the log-ratio is ``log(over / to)``, and the
    stream's reference must use the same one.

    Wrong when: the reference is another policy: ``r`` does not cancel.  A clipped token stays in the mean with its clipped value, so this is
    not a geometric ratio plus a token mask.
    """

    low: Scalar = 0.4
    high: Scalar = 0.4
    to: str = "old"
    over: str = "self"
    level = None
    coupling = "sequence"

    def __post_init__(self) -> None:
        self._check(low=0.0, high=0.0)

    @property
    def formula(self) -> str:
        return f"[d unclipped] exp(mean clip(d, -{number(self.low)}, {number(self.high)}))/r [one-sided, d = log {self.ratio}]"

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = view.log_ratio(self.to, self.over, "token")
        up, down = d.clamp(max=view.at(self.high)), d.clamp(min=-view.at(self.low))
        clipped = torch.where(advantage > 0, up, torch.where(advantage < 0, down, d))
        factor = view.spread(view.seq_mean(clipped)) - self.log_ratio(view)
        return torch.where(clipped == d, factor, -torch.inf)


@dataclass(frozen=True)
class Divergence(_Ratio):
    """Drop a token whose *probability* has moved too far in the direction its advantage pushes.

    Equation: with ``p = pi_over``, ``q = pi_to`` of the sampled token: ``tv``: keep while ``p - q <= high`` (``A > 0``) or ``q - p <= low`` (``A < 0``);
    ``kl``: the same for ``q log(q/p) + (1-q) log((1-q)/(1-p))`` on the side the token moves to.
    Source: DPPO (divergence), arXiv 2602.04879; ``one_sided=False`` is a symmetric mask some trainers call by the name of a preference loss.

    ``kind``: total variation or Bernoulli KL.  ``low``, ``high``: bounds on a probability or a divergence, not on a ratio.  ``to``, ``over``: the
    policies compared.  ``one_sided``: only against the push of the advantage; ``False`` drops whatever moved, whatever its sign.

    Wrong when: nothing bounds the ratio: a rare token may grow a hundredfold within a bound of 0.2; add :class:`Cap`.
    """

    kind: Literal["tv", "kl"] = "tv"
    low: Scalar = 0.2
    high: Scalar = 0.2
    to: str = "behaviour"
    over: str = "self"
    one_sided: bool = True
    level = None

    def __post_init__(self) -> None:
        self._check(low=0.0, high=0.0)
        if self.kind not in ("tv", "kl"):
            raise ValueError(f"mask.Divergence: kind={self.kind!r} does not exist; choose tv or kl")
        for key in ("low", "high"):
            bound = getattr(self, key)
            if self.kind == "tv" and not callable(bound) and bound > 1:
                raise ValueError(f"mask.Divergence: {key}={bound} can never act: a probability moves by at most 1 (which switches this side off)")

    @property
    def formula(self) -> str:
        sides = "one-sided" if self.one_sided else "both sides"
        return f"keep({self.kind} of {self.ratio} in [-{number(self.low)}, {number(self.high)}], {sides})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        log_p, log_q = view.select(view.reference(self.over)), view.select(view.reference(self.to))
        p, q = torch.exp(log_p), torch.exp(log_q)
        moved = p - q if self.kind == "tv" else _bernoulli(log_p, log_q) * torch.sign(p - q)
        above, below = moved > view.at(self.high), moved < -view.at(self.low)
        if self.one_sided:
            above, below = above & (advantage > 0), below & (advantage < 0)
        return (~(above | below)).to(p.dtype)


def _bernoulli(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL from ``(q, 1 - q)`` to ``(p, 1 - p)``; the rest terms carry a guard, so that ``p = 1`` is large and not infinite."""
    p, q = torch.exp(log_p), torch.exp(log_q)
    own = torch.where(q > 0, q * (log_q - log_p), torch.zeros_like(q))
    rest_p, rest_q = (1 - p).clamp(min=0), (1 - q).clamp(min=0)
    return own + rest_q * (torch.log(rest_q + 1e-8) - torch.log(rest_p + 1e-8))


@dataclass(frozen=True)
class DropDeadGroups:
    """Drop the groups in which every advantage is 0.

    Equation: ``[some token of the group has A != 0]``.
    Source: dynamic sampling, DAPO, arXiv 2503.14476, where such groups are replaced by new ones.

    Their weights are 0 already, so this acts on what an aggregation counts as ``kept`` and on nothing else.

    Wrong when: KL or entropy should still act on these groups and is expected to leave with them: regularisers look at no mask.  Filtering moves the
    prompts towards a success rate of one half.
    """

    coupling = "group"
    live = True

    @property
    def formula(self) -> str:
        return "keep(group has A != 0)"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        own = (view.seq_sum((advantage != 0).to(view.logp.dtype)) > 0).to(view.logp.dtype)
        grouped = view.batch.group >= 0
        alive = torch.where(grouped, view.code_sum(view.batch.group, own), own) > 0
        return view.spread(alive.to(view.logp.dtype))


@dataclass(frozen=True)
class TopEntropy:
    """Keep the tokens at which the policy was least certain.

    Equation: ``[H[t] >= the k-th largest entropy of the step]``, ``k = ceil(share * N_tok)``; ties are kept.
    Source: arXiv 2506.01939 (the 80/20 rule).

    ``share``: how much is kept, above 0 and at most 1.  The entropy is that of the current policy over the whole vocabulary, without gradient.

    Wrong when: the normaliser is forgotten: with ``aggregation.denominator=kept`` the step is ``1/share`` times larger.
    """

    share: Scalar = 0.2
    coupling = "batch"
    live = True
    needs = frozenset({"entropy"})

    def __post_init__(self) -> None:
        if not callable(self.share) and not 0 < self.share <= 1:
            raise ValueError(f"mask.TopEntropy: share={self.share} is the part of the tokens that is kept, above 0 and at most 1")

    @property
    def formula(self) -> str:
        return f"keep(entropy in the top {number(self.share)})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        view.require_whole("mask.TopEntropy")
        entropy = view.reference("entropy")
        return (entropy >= _kth_largest(entropy[view.on], view.at(self.share))).to(view.logp.dtype)


def _kth_largest(values: Tensor, share: float) -> float:
    """The value that ``ceil(share * n)`` of ``values`` reach; minus infinity when there are none."""
    k = math.ceil(round(share * len(values), 9))
    return float(torch.topk(values, min(max(k, 1), len(values))).values[-1]) if len(values) else -math.inf


@dataclass(frozen=True)
class Disagreement(_Ratio):
    """Drop tokens or whole answers on which two policies differ by more than a bound, in either direction.

    Equation: ``[s <= max]`` with ``rho = pi_over / pi_to`` and ``s = log(rho)**2 / 2`` (``k2``), ``rho - 1 - log rho`` (``k3``) or ``|log rho|`` (``abs``) of the
    token, or its mean, sum or largest value over the answer.
    Source: rejection rules of rollout correction (several frameworks; Yao et al. 2025).

    ``statistic``, ``max``: what is compared with which bound.  ``per``: ``token``, ``mean``, ``sum`` or ``worst``, the last three for whole answers.
    ``to``, ``over``: the ratio is ``over / to``.

    Wrong when: the bound was tuned at another ``per``: a sum grows with the length and a mean does not.
    """

    statistic: Literal["k2", "k3", "abs"] = "k3"
    max: Scalar = 0.1
    per: Literal["token", "mean", "sum", "worst"] = "token"
    to: str = "behaviour"
    over: str = "old"
    level = None

    def __post_init__(self) -> None:
        self._check(max=0.0)
        for name, value, known in (
            ("statistic", self.statistic, ("k2", "k3", "abs")),
            ("per", self.per, ("token", "mean", "sum", "worst")),
        ):
            if value not in known:
                raise ValueError(f"mask.Disagreement: {name}={value!r} does not exist; choose from {', '.join(known)}")

    @property
    def coupling(self) -> str:
        return "token" if self.per == "token" else "sequence"

    @property
    def formula(self) -> str:
        return f"keep({self.statistic} of {self.ratio} per {self.per} <= {number(self.max)})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = view.log_ratio(self.to, self.over, "token")
        s = {"k2": lambda: d * d / 2, "k3": lambda: torch.expm1(d) - d, "abs": d.abs}[self.statistic]()
        if self.per == "worst":
            s = view.spread(view.seq_max(s))
        elif self.per != "token":
            s = view.spread(view.seq_mean(s) if self.per == "mean" else view.seq_sum(s))
        return (s <= view.at(self.max)).to(d.dtype)


@dataclass(frozen=True)
class SecondMoment(_Ratio):
    """Drop the tokens furthest from the sampling policy until the second moment of the log-ratio is within a bound.

    Equation: ``[|d[t]| <= b]`` on the tokens looked at, 1 on the others; ``b`` is the largest ``|d|`` among them for which the mean of ``min(d**2, b**2)``
    (``capped``), or of the ``d**2`` up to ``b**2`` (``remaining``), is at most ``tau``.
    Source: M2PO, arXiv 2510.01161; ``capped`` and ``harmful`` as released.

    ``tau``: the bound on the second moment.  ``rule``: what the tokens beyond ``b`` still contribute.  ``tokens``: ``harmful`` ones, whose ratio has left 1 in
    the direction of their advantage, or ``all``.  ``to``, ``over``: the log-ratio is ``log(over / to)``.

    Wrong when: one outlier is all there is: it alone decides ``b``.  Means over a micro-batch, as in releases, drop other tokens.
    """

    tau: Scalar = 0.04
    rule: Literal["capped", "remaining"] = "capped"
    tokens: Literal["harmful", "all"] = "harmful"
    to: str = "old"
    over: str = "self"
    level = None
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        self._check(tau=0.0)
        if self.rule not in ("capped", "remaining") or self.tokens not in ("harmful", "all"):
            raise ValueError(f"mask.SecondMoment: rule={self.rule!r} is capped or remaining, tokens={self.tokens!r} is harmful or all")

    @property
    def formula(self) -> str:
        return f"keep(|log {self.ratio}| <= b) [b: {self.rule} second moment <= {number(self.tau)}, {self.tokens} tokens]"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        view.require_whole("mask.SecondMoment")
        d = view.log_ratio(self.to, self.over, "token")
        looked_at = view.on if self.tokens == "all" else view.on & (advantage * d > 0)
        bound = self._bound(d[looked_at].abs(), view.at(self.tau))
        return (~(looked_at & (d.abs() > bound))).to(d.dtype)

    def _bound(self, sizes: Tensor, tau: float) -> float:
        """The largest of ``sizes`` that keeps the second moment within ``tau``, 0 when none does."""
        ordered = torch.sort(sizes).values
        squares = ordered.double() ** 2
        within, ranks = torch.cumsum(squares, 0), torch.arange(1, len(squares) + 1, device=squares.device)
        beyond = (len(squares) - ranks) * squares
        moment = (within + beyond) / len(squares) if self.rule == "capped" else within / ranks
        fitting = (moment <= tau).nonzero()[:, 0]
        return float(ordered[int(fitting[-1])]) if len(fitting) else 0.0


@dataclass(frozen=True)
class StaleNegative(_Ratio):
    """Drop whole answers with a negative advantage that the policy has moved away from.

    Equation: ``1 - [A < 0 and mean log(pi_to / pi) > delta]``.
    Source: off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556.

    ``delta``: the mean distance in nats per token; ``inf`` drops nothing.  ``to``: the policy that sampled, ``behaviour`` or ``old``.

    Wrong when: the advantage changes its sign within an answer: tokens, not answers, are then dropped.
    """

    delta: Scalar = 0.5
    to: str = "behaviour"
    over = "self"
    level = "sequence_geometric"

    def __post_init__(self) -> None:
        self._check(delta=0.0)

    @property
    def formula(self) -> str:
        return f"keep(A > 0 or mean log(pi_{self.to}/pi) <= {number(self.delta)})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        return (~((advantage < 0) & (-d > view.at(self.delta)))).to(d.dtype)


@dataclass(frozen=True)
class GammaTaper(_Ratio):
    """A smooth weight of the answer's ratio that is 1 at 1, a little more beside it, and falls to 0 in both directions.

    Equation: ``exp(lam + k log W - lam W)`` with ``W`` the ratio at ``level``; its maximum is at ``k / lam``.
    Source: VESPO, arXiv 2602.10693.  It is a weight of its own, not a correction of one: the stream's reference is the current policy.

    ``pos``, ``neg``: ``[k, lam]`` where ``A >= 0`` and where ``A < 0``.  ``to``, ``over``, ``level``: the ratio is ``over / to``; the product over the answer
    is published.

    Wrong when: the stream's reference already holds the ratio.
    """

    pos: tuple[float, float] = (2.0, 3.0)
    neg: tuple[float, float] = (3.0, 2.0)
    to: str = "old"
    over: str = "self"
    level: Level | None = "sequence"

    def __post_init__(self) -> None:
        self._check()
        for name in ("pos", "neg"):
            pair = tuple(float(x) for x in getattr(self, name))
            if len(pair) != 2 or min(pair) <= 0:
                raise ValueError(f"mask.GammaTaper: {name}={list(pair)} must be two numbers above 0, the power and the rate")
            object.__setattr__(self, name, pair)

    @property
    def formula(self) -> str:
        (k, lam), (k_neg, lam_neg) = self.pos, self.neg
        return f"exp(m + k log W - m W) [W = {self.ratio}, (k, m) = ({k:g}, {lam:g}) where A >= 0, else ({k_neg:g}, {lam_neg:g})]"

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        k, lam = (torch.where(advantage < 0, torch.full_like(d, self.neg[i]), self.pos[i]) for i in (0, 1))
        return torch.where(d > 80.0, -torch.inf, k * d - lam * torch.expm1(d.clamp(max=80.0)))


@dataclass(frozen=True)
class NegativeTaper(_Ratio):
    """Weigh negative advantages by how likely the answer still is; leave positive ones alone.

    Equation: ``min(r, max)`` where ``A < 0``, 1 elsewhere.
    Source: TOPR, arXiv 2503.14286, with the ratio of the whole answer; one framework uses that of the token.

    ``max``: the largest weight, 1 as published.  ``to``, ``over``, ``level``: the ratio is ``over / to``; ``to`` is the policy that sampled, and without it the
    taper is an error, not 1.

    Wrong when: the stream's reference already holds the ratio: it is to be the current policy.
    """

    max: Scalar = 1.0
    to: str = "behaviour"
    over: str = "self"
    level: Level | None = "sequence"

    def __post_init__(self) -> None:
        self._check(max=0.0)

    @property
    def formula(self) -> str:
        return f"(A < 0 ? min({self.ratio}, {number(self.max)}) : 1)"

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = self.log_ratio(view)
        return torch.where(advantage < 0, d.clamp(max=_log(view.at(self.max), "max of mask.NegativeTaper")), torch.zeros_like(d))
