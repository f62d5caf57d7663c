"""Rewards as labels: the answers of a prompt are sorted into right and wrong ones by their implicit score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.loss.view import Metrics, TokenView


@dataclass(frozen=True)
class GroupClassification:
    """Push the right answers of a group up and the wrong ones down, each by its share in a soft maximum over its class.

    Equation: with ``z_i = mean log(pi/pi_to) / tau`` and ``L = log(1 + sum_wrong exp(z)) + log(1 + sum_right exp(-z))`` per group: ``A_i = -dL/dz_i / tau``.
    Source: REAL, arXiv 2602.05630.

    ``to``: the policy the score is relative to.  ``tau``: its temperature; no weight exceeds ``1/tau``.  An answer is right when its advantage column is above
    0, that is with ``advantage=group_center`` when it beats the mean of its group; the size is not looked at.  Groups of one class give 0.

    Wrong when: the aggregation is one for sums over tokens: the score is a mean, which ``GroupSumTokenMean`` belongs to.
    """

    to: str = "old"
    tau: float = 0.5
    coupling = "group"
    live = True
    reads_column = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"GroupClassification: tau={self.tau} must be above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        return f"(+/- softmax over the class of mean log(pi/pi_{self.to})/{self.tau:g})/{self.tau:g}"

    def values(self, view: TokenView) -> Tensor:
        z, right, here = self._parts(view)
        both = self._both(view, right, here)
        toward = torch.where(right, -z, z)
        weight = torch.exp(toward - torch.where(right, self._log_sum(view, -z, right & here), self._log_sum(view, z, ~right & here)))
        return view.spread(torch.where(both, torch.where(right, weight, -weight) / self.tau, 0.0))

    def objective(self, view: TokenView) -> Metrics:
        """The published loss, per group of both classes."""
        z, right, here = self._parts(view)
        both = self._both(view, right, here)
        loss = self._log_sum(view, -z, right & here) + self._log_sum(view, z, ~right & here)
        first = {int(code): i for i, code in reversed(list(enumerate(view.batch.group.tolist()))) if bool(both[i])}
        return {"classification_loss": (float(sum(float(loss[i]) for i in first.values())), float(len(first)))}

    def _parts(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, classes, and which answers take part, each ``[S]``."""
        here = view.seq_len() > 0
        alone = here & (view.batch.group < 0)
        if bool(alone.any()):
            sample = view.batch.sample_ids[int(alone.nonzero()[0])]
            raise ValueError(f"stream {view.name!r}: GroupClassification compares the answers of a group; sample {sample!r} is in none")
        z = torch.where(here, view.seq_mean(view.log_ratio(self.to, level="token")) / self.tau, 0.0)
        return z, view.seq_mean(view.batch.advantage.to(z.dtype)) > 0, here

    @staticmethod
    def _both(view: TokenView, right: Tensor, here: Tensor) -> Tensor:
        group = view.batch.group
        return here & (view.code_count(group, right & here) > 0) & (view.code_count(group, ~right & here) > 0)

    @staticmethod
    def _log_sum(view: TokenView, score: Tensor, of: Tensor) -> Tensor:
        """``log(1 + sum exp(score))`` over the answers ``of`` of each answer's group, ``[S]``."""
        codes = view.batch.group.clamp(min=0)
        size = int(codes.max()) + 1 if len(codes) else 1
        most = torch.zeros(size, dtype=score.dtype, device=score.device).scatter_reduce(0, codes[of], score[of], "amax")
        total = torch.exp(-most).index_add(0, codes[of], torch.exp(score[of] - most[codes[of]]))
        return (most + torch.log(total))[codes]
