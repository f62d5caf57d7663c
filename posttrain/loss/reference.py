"""Reference terms: what stands in the denominator of the importance factor ``pi / pi_ref``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Scalar


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

    ``a``: 0 is :class:`Current`, 1 is :class:`Unit`, negative values chase improbable tokens.  A number or a schedule.

    Wrong when: ``a`` is negative and the data hold noise: the weight of an impossible token has no bound.
    """

    a: Scalar = 1.0

    @property
    def formula(self) -> str:
        return f"p^{number(self.a)}"

    def log_ratio(self, view: TokenView) -> Tensor:
        a = view.at(self.a)
        return a * view.logp if a else torch.zeros_like(view.logp)

    def objective(self, view: TokenView, weight: Tensor) -> Tensor:
        a = view.at(self.a)
        return weight / a if a else torch.where(weight != 0, weight * view.logp, torch.zeros_like(weight))


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
    """A number or schedule as text."""
    return repr(value) if callable(value) else f"{value:g}"
