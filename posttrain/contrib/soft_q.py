"""Logits read as action values: the one kind of term that a shift of all logits of a position changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class TemporalDifference:
    """The squared difference between the logit of a token and the discounted soft value of the next position.

    Equation: ``(V[t] + log pi[t] - gamma V[t+1])**2`` with ``V`` the log-sum-exp of a position's logits, so ``V[t] + log pi[t]`` is the token's logit; the value behind
    the last learnt token is 0.
    Source: inverse soft Q-learning for language models, arXiv 2409.01369 (secondary source).

    ``coef``: lambda, a number or a schedule; no published value was found.  ``gamma``: the discount.  ``streams``, ``aggregation``: as for every regulariser.
    Tokens that are not learnt from are passed over.

    Wrong when: logits are capped or shifted by the model, or the run continues another objective's: only differences of logits meant anything there.
    """

    coef: Scalar = 0.01
    gamma: float = 1.0
    streams: tuple[str, ...] | None = None
    aggregation: Any = None
    sign = 1.0
    column = "logsumexp"
    coupling = "sequence"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"TemporalDifference: gamma={self.gamma} must lie between 0 and 1")
        if self.streams is not None:
            object.__setattr__(self, "streams", (self.streams,) if isinstance(self.streams, str) else tuple(self.streams))

    @property
    def formula(self) -> str:
        return f"{number(self.coef)} * (z - {self.gamma:g} V_next)^2"

    def of_column(self, view: TokenView, logp: Tensor, value: Tensor) -> Tensor:
        """The penalty of every token, with gradient, ``[N]``."""
        return (view.select(logp + value) - self.gamma * view.following(value)) ** 2
