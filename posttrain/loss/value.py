"""Terms of models that answer with a number, reward models and critics: the head's output stands in the place of the log-probability.

``likelihood.Score`` says where it is read; ``advantage.Pairwise`` and ``Pointwise`` with ``score=value`` compare answers, the terms here labels and returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.loss.preference import label_column, reward_column
from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class Towards:
    """Draw the head's number towards a label, column by column.

    Equation: ``logistic``: ``f = -y log sigmoid(r) - (1-y) log sigmoid(-r)``, ``A = y - sigmoid(r)``; ``squared``: ``f = (r - y)**2``, ``A = 2 (y - r)``.
    Source: process reward models, arXiv 2211.14275 and 2305.20050; soft labels from rollouts, Math-Shepherd, arXiv 2312.08935; regression on scores.

    ``f``: the loss.  ``label``: a reward column of the sequence; null takes the advantage column, one label per token (the steps of an answer).

    Wrong when: labels of several sources are on different scales; ``logistic`` refuses labels outside 0 to 1.
    """

    f: Literal["logistic", "squared"] = "logistic"
    label: str | None = "label"
    coupling = "token"
    live = True
    head = "scalar"

    def __post_init__(self) -> None:
        if self.f not in ("logistic", "squared"):
            raise ValueError(f"advantage.Towards: f={self.f!r} does not exist; choose logistic or squared")

    @property
    def reads_column(self) -> bool:
        return self.label is None

    @property
    def formula(self) -> str:
        y = self.label or "y"
        return f"({y} - sigmoid(r))" if self.f == "logistic" else f"2 ({y} - r)"

    def values(self, view: TokenView) -> Tensor:
        y = self._label(view)
        return y - torch.sigmoid(view.logp) if self.f == "logistic" else 2.0 * (y - view.logp)

    def objective(self, view: TokenView) -> Metrics:
        """The published loss and, of labels that say yes or no, the share on the right side, per column."""
        y, r, count = self._label(view), view.logp, float(view.on.sum())
        loss = -y * logsigmoid(r) - (1 - y) * logsigmoid(-r) if self.f == "logistic" else (r - y) ** 2
        out = {"value_loss": (float(view.select(loss).sum()), count)}
        if self.f == "logistic":
            out["accuracy"] = (float(view.select(((r > 0) == (y > 0.5)).to(r.dtype)).sum()), count)
        return out

    def _label(self, view: TokenView) -> Tensor:
        if self.label is not None:
            read = label_column if self.f == "logistic" else reward_column
            return view.spread(read(view, self.label, view.member, "advantage.Towards.label"))
        y = view.select(view.batch.advantage.to(view.logp.dtype))
        bad = view.on & ((y < 0) | (y > 1))
        if self.f == "logistic" and bool(bad.any()):
            where = int(bad.nonzero()[0])
            sample = view.batch.sample_ids[int(view.batch.seq[where])]
            raise ValueError(
                f"stream {view.name!r}: advantage.Towards: a label of sample {sample!r} is {float(y[where]):g}; f=logistic takes labels from 0 to 1: rescale "
                "them where the data are read, or set f=squared"
            )
        return y


@dataclass(frozen=True)
class Return:
    """Draw a critic's value towards the return, at most so far from what it said when the answers were sampled.

    Equation: ``f = 1/2 max((V - G)**2, (clamp(V, V_old - clip, V_old + clip) - G)**2)``, ``A = G - V`` or, where the clamped term is larger, 0.
    Source: PPO, arXiv 1707.06347, as released; the max makes clipping pessimistic.

    ``clip``: how far ``V`` may move from the recorded ``V_old``; null never clips.  A number or a schedule, in units of reward.  ``values_from``: the column
    that holds ``V_old``.  ``G`` is the advantage column.

    Wrong when: rewards are not of the order of 1: ``clip`` is in their units.  Releases differ in the factor 1/2.
    """

    clip: Scalar | None = 0.2
    values_from: str = "value"
    coupling = "token"
    live = True
    head = "scalar"
    reads_column = True

    def __post_init__(self) -> None:
        if self.clip is not None and not callable(self.clip) and not self.clip > 0:
            raise ValueError(f"advantage.Return: clip={self.clip} must be above 0, or null for no clipping")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.clip is None else frozenset({self.values_from})

    @property
    def formula(self) -> str:
        return "(G - V)" + ("" if self.clip is None else f" where |V - V_old| <= {number(self.clip)} or V is worse off")

    def values(self, view: TokenView) -> Tensor:
        target, plain, clipped = self._parts(view)
        return torch.where(clipped > plain, 0.0, target - view.logp)

    def objective(self, view: TokenView) -> Metrics:
        """The published loss, the mean squared error behind it, and the share of columns whose clipped term is larger."""
        _, plain, clipped = self._parts(view)
        count = float(view.on.sum())
        return {
            "value_loss": (0.5 * float(view.select(torch.maximum(plain, clipped)).sum()), count),
            "value_error": (float(view.select(plain).sum()), count),
            "value_clipped": (float(view.select((clipped > plain).to(plain.dtype)).sum()), count),
        }

    def _parts(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
        """The return and the two squared errors, each ``[N]``."""
        target, value = view.select(view.batch.advantage.to(view.logp.dtype)), view.select(view.logp)
        plain = (value - target) ** 2
        if self.clip is None:
            return target, plain, plain
        old, far = view.select(view.reference(self.values_from)), view.at(self.clip)
        return target, plain, (torch.maximum(torch.minimum(value, old + far), old - far) - target) ** 2
