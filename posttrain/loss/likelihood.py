"""Likelihood terms: which likelihood is differentiated, and at which granularity ratios are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.loss.view import LEVELS, Level, TokenView


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
