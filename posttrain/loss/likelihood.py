"""Likelihood terms: which likelihood is differentiated, and at which granularity ratios are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.loss.view import LEVELS, Level, TokenView

PLACES = ("end", "marked", "before")


@dataclass(frozen=True)
class Token:
    """The log-probability of each token, ``l[t] = log pi(y[t] | y[<t])``.

    Equation: ``f(l) = l``, so ``f'(l) = 1``.
    Source: the identity of the policy gradient; ``sequence_geometric`` ratios are those of arXiv 2507.18071.

    ``ratio``: the granularity of every importance ratio in this stream, read by the reference and by the masks alike: ``token``
    (``exp(d[t])``), ``sequence`` (``exp(sum d)``) or ``sequence_geometric`` (``exp(mean d)``).  ``temperature``: the training temperature
    of the log-probs; it should equal the sampling temperature.

    Wrong when: ``ratio="sequence"`` on long answers (the product ratio leaves any clip range at once); or the temperature differs from the
    one the rollouts were sampled at (every ratio is then off, on-policy ones too).
    """

    ratio: Level = "token"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ratio not in LEVELS:
            raise ValueError(f"likelihood.Token: ratio={self.ratio!r} does not exist; choose from {', '.join(LEVELS)}")
        if not self.temperature > 0:
            raise ValueError(f"likelihood.Token: temperature={self.temperature} must be above 0")

    @property
    def coupling(self) -> str:
        return "token" if self.ratio == "token" else "sequence"

    @property
    def live(self) -> bool:
        return self.ratio != "token"

    @property
    def formula(self) -> str:
        return "grad l" if self.temperature == 1.0 else f"grad l(temperature {self.temperature:g})"

    def derivative(self, view: TokenView) -> Tensor:
        return torch.ones_like(view.logp)


@dataclass(frozen=True)
class Score:
    """The number a scalar head gives at a column, in the place of a log-probability: reward models and critics.

    Equation: ``l[t] = v . h[t] + b`` with ``h`` the last hidden state, so ``f'(l) = 1``; there is no probability and no ratio.
    Source: reward models, arXiv 2203.02155; critics, arXiv 1707.06347.

    ``at``: which columns are read.  ``end``: behind the last trainable token of every sequence; ``marked``: behind every trainable token (the
    ends of steps); ``before``: before every trainable token, the value of the state in which it was chosen.

    Wrong when: answers were cut off: the number is read where the cut is, and ``end`` cannot tell.
    """

    at: Literal["end", "marked", "before"] = "end"
    ratio = "token"
    temperature = 1.0
    head = "scalar"

    def __post_init__(self) -> None:
        if self.at not in PLACES:
            raise ValueError(f"likelihood.Score: at={self.at!r} does not exist; choose from {', '.join(PLACES)}")

    @property
    def formula(self) -> str:
        where = {"end": "the end", "marked": "marked tokens", "before": "every state"}[self.at]
        return f"grad r(at {where})"

    def derivative(self, view: TokenView) -> Tensor:
        return torch.ones_like(view.logp)
