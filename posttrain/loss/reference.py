"""Reference terms: what stands in the denominator of the importance factor ``pi / pi_ref``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.loss.view import TokenView
from posttrain.mixture.control import Control
from posttrain.mixture.schedule import OneMinus, Scalar


@dataclass(frozen=True)
class Current:
    """The current policy itself, detached: the factor is 1 and the gradient is that of ``log pi``.

    Equation: ``pi / sg(pi) = 1``.
    Source: Williams 1992; maximum likelihood; every preference loss.

    Wrong when: the tokens were sampled by older weights or by another engine and nothing else corrects for it.
    """

    @property
    def formula(self) -> str:
        return ""

    def log_ratio(self, view: TokenView) -> Tensor:
        return torch.zeros_like(view.logp)

    def objective(self, view: TokenView, weight: Tensor) -> Tensor:
        """``w * l`` per token: with ratio 1 the objective is a weighted log-likelihood."""
        return torch.where(weight != 0, weight * view.logp, torch.zeros_like(weight))


@dataclass(frozen=True)
class Unit:
    """One: the factor is the probability itself and the gradient is that of ``pi``.

    Equation: ``pi / 1 = exp(l)``.
    Source: DFT, arXiv 2508.05629 (its loss ``sg(p) * (-log p)`` has the gradient of ``-p``).

    Wrong when: the right tokens start improbable: a token at ``p = 0.001`` learns a thousand times slower than under :class:`Current`.
    """

    @property
    def formula(self) -> str:
        return "p"

    def log_ratio(self, view: TokenView) -> Tensor:
        return view.logp


@dataclass(frozen=True)
class Power:
    """A power of the current policy: the factor is ``p**a``.

    Equation: ``pi / sg(pi)**(1 - a) = p**a``, the gradient of ``p**a / a``.
    Source: the probability family of arXiv 2510.00526.

    ``a``: 0 is :class:`Current`, 1 is :class:`Unit`, negative values chase improbable tokens.  A number or a schedule.  ``most``: the largest
    factor; a negative ``a`` needs one, because the weight of an impossible token has no bound.

    Wrong when: ``a`` is large and the right tokens start improbable: at ``a = 10`` a token of ``p = 0.5`` has a thousandth of its weight.
    """

    a: Scalar = 1.0
    most: float | None = None

    def __post_init__(self) -> None:
        if self.most is not None and not self.most > 0:
            raise ValueError(f"reference.Power: most={self.most} bounds the factor, so it must be above 0")
        if not callable(self.a):
            self._require_bound(self.a)

    def _require_bound(self, a: float) -> None:
        if a < 0 and self.most is None:
            raise ValueError(f"reference.Power: a={a:g} is negative, so p**a has no bound: set most, the largest factor (100, for instance)")

    @property
    def formula(self) -> str:
        power = f"p^{number(self.a)}"
        return power if self.most is None else f"min({power}, {self.most:g})"

    def log_ratio(self, view: TokenView) -> Tensor:
        a = view.at(self.a)
        self._require_bound(a)
        power = a * view.logp if a else torch.zeros_like(view.logp)
        return power if self.most is None else power.clamp(max=math.log(self.most))

    def objective(self, view: TokenView, weight: Tensor) -> Tensor:
        a = view.at(self.a)
        return weight / a if a else torch.where(weight != 0, weight * view.logp, torch.zeros_like(weight))


@dataclass(frozen=True)
class Uncertainty:
    """How undecided the policy is between a token and everything else: the factor is ``p (1 - p)``.

    Equation: ``pi / sg(1 / (1 - p)) = p (1 - p)``, the gradient of ``p - p**2 / 2``; 0 at ``p = 0`` and ``p = 1``, most (1/4) at ``p = 1/2``.
    Source: the token weight ``phi`` of CHORD, arXiv 2508.11408.

    Wrong when: the demonstrations hold what the policy finds impossible and must learn: such tokens get no signal.
    """

    @property
    def formula(self) -> str:
        return "p (1-p)"

    def log_ratio(self, view: TokenView) -> Tensor:
        return view.logp + torch.log(-torch.expm1(view.logp.clamp(max=0.0)))

    def objective(self, view: TokenView, weight: Tensor) -> Tensor:
        """``w * l`` per token: a weighted log-likelihood."""
        return torch.where(weight != 0, weight * view.logp, torch.zeros_like(weight))


@dataclass(frozen=True)
class Saturating:
    """A bounded ratio for texts whose author's probabilities are not known: the factor of ``p / (p + gamma)``.

    Equation: the objective is ``A p / (p + gamma)``, so the factor is ``gamma p / (p + gamma)**2``: at most 1/4, at ``p = gamma``.  ``detached``:
    the denominator is ``sg(p) + gamma``, so the factor is ``p / (p + gamma)``, which grows with ``p`` to 1.
    Source: LUFFY, arXiv 2504.14945; detached: ThinkTuning, arXiv 2508.07616.

    ``gamma``: the probability at which a token is learnt fastest, a number or a schedule; far above 1 the factor is ``p / gamma``, as under
    :class:`Unit`.  ``detached``: whether the denominator is part of the derivative.

    Wrong when: the tokens were sampled by a policy whose log-probs are recorded: use their ratio (:class:`Named`).
    """

    gamma: Scalar = 0.1
    detached: bool = False

    def __post_init__(self) -> None:
        if not callable(self.gamma) and not self.gamma > 0:
            raise ValueError(f"reference.Saturating: gamma={self.gamma} must be above 0; at or below 0 the factor has a pole")

    @property
    def formula(self) -> str:
        g = number(self.gamma)
        return f"p / (p + {g})" if self.detached else f"{g} p / (p + {g})^2"

    def _logs(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """``log(p / (p + gamma))`` and ``log(gamma / (p + gamma))``, each ``[N]``."""
        gamma = view.at(self.gamma)
        if not gamma > 0:
            raise ValueError(f"reference.Saturating: gamma is {gamma} at progress {view.batch.progress:g}; it must stay above 0")
        x = view.logp - math.log(gamma)
        return logsigmoid(x), logsigmoid(-x)

    def log_ratio(self, view: TokenView) -> Tensor:
        share, rest = self._logs(view)
        return share if self.detached else share + rest

    def objective(self, view: TokenView, weight: Tensor) -> Tensor:
        """``A p / (p + gamma)``, whose derivative the weight is; detached, the weight itself."""
        return weight if self.detached else weight * torch.exp(-self._logs(view)[1])


@dataclass(frozen=True)
class Named:
    """A recorded policy: the factor is the importance ratio ``r = pi / pi_to``.

    Equation: ``exp(l - log pi_to)`` at the granularity of the stream's likelihood.
    Source: importance sampling; PPO, arXiv 1707.06347.

    ``to``: the log-prob column: ``old`` (the learner's snapshot at the start of the step), ``behaviour`` (the engine that sampled),
    ``base``, ``teacher`` or one of your own.  On a batch the learner has not moved since, an absent ``old`` is the current policy and the
    ratio is 1.

    Wrong when: nothing bounds the ratio (add a mask); or the column was recorded at another temperature.
    """

    to: str = "old"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def live(self) -> bool:
        return True

    @property
    def formula(self) -> str:
        return f"(pi/pi_{self.to})"

    def log_ratio(self, view: TokenView) -> Tensor:
        return view.log_ratio(self.to)


def number(value: Scalar) -> str:
    """A number, the name of what learns it, or a schedule as text."""
    if isinstance(value, OneMinus):
        return f"(1 - {number(value.of)})"
    if isinstance(value, Control):
        return value.name
    return repr(value) if callable(value) else f"{value:g}"
