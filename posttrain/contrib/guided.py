"""Answers that carry a teacher's words: a ratio whose denominator knows how good the answer was, and what is not pushed down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.loss.view import TokenView


@dataclass(frozen=True)
class AdvantageSaturating:
    """``p / (sg(p) + gamma)`` with a ``gamma`` that follows the advantage: above 0 it holds improbable tokens back, below 0 it lets go of them less.

    Equation: the factor is ``min(most, p / (p + gamma(A)))``, ``gamma`` linear in ``A`` from ``at_low`` at ``low`` to ``at_high`` at ``high``, constant outside;
    ``most`` where ``p + gamma <= 0``.
    Source: ThinkTuning, arXiv 2508.07616, as intended there: the released clamp has its bounds exchanged and returns -0.001 for every advantage.

    ``low``, ``high``: the range of advantages.  ``at_low``, ``at_high``: gamma at its ends.  ``most``: the largest factor, because a negative gamma has a
    pole at ``p = -gamma``.

    Wrong when: improbable tokens with a negative advantage stay in: drop them (:class:`DropImprobable`), else their factor is ``most``.
    """

    low: float = -4.0
    high: float = 4.0
    at_low: float = -1e-3
    at_high: float = 1e-3
    most: float = 10.0
    reads_column = True

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"AdvantageSaturating: low={self.low} must be below high={self.high}")
        if not self.at_low <= self.at_high:
            raise ValueError(f"AdvantageSaturating: at_low={self.at_low} must not be above at_high={self.at_high}: a better answer is not let go of more")
        if not self.most >= 1:
            raise ValueError(f"AdvantageSaturating: most={self.most} bounds the factor and must be at least 1")

    @property
    def formula(self) -> str:
        return f"min({self.most:g}, p / (p + gamma(A))) [gamma {self.at_low:g}..{self.at_high:g}]"

    def log_ratio(self, view: TokenView) -> Tensor:
        share = ((view.batch.advantage.to(view.logp.dtype) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        p = torch.exp(view.logp)
        below = p + self.at_low + share * (self.at_high - self.at_low)
        bound = math.log(self.most)
        return torch.where(below > 0, (view.logp - torch.log(below.clamp(min=1e-300 if p.dtype == torch.float64 else 1e-38))).clamp(max=bound), bound)


@dataclass(frozen=True)
class DropImprobable:
    """Drop a token whose advantage is negative and which the policy finds improbable anyway.

    Equation: ``1 - [A < 0 and p < min]``.
    Source: ThinkTuning, arXiv 2508.07616 (there such tokens fall back to the clipped ratio).

    ``min``: the probability below which there is nothing left to push down.

    Wrong when: the tokens were sampled by the policy itself: what it sampled, it does not find impossible, and one side of the signal is lost.
    """

    min: float = 0.01
    live = True

    def __post_init__(self) -> None:
        if not 0 <= self.min <= 1:
            raise ValueError(f"DropImprobable: min={self.min} is a probability, between 0 and 1")

    @property
    def formula(self) -> str:
        return f"keep(A > 0 or p >= {self.min:g})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        return (~((advantage < 0) & (torch.exp(view.logp) < self.min))).to(view.logp.dtype)
