"""An advantage from winning against an opponent that nobody samples: a mixture of the policy and its base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar

AGAINST = "against"
"""``{reward}/against/{i}``: the probability of winning against sample ``i`` of the group, as ``reward.judge.PairJudge(each=True)`` reports it."""


@dataclass(frozen=True)
class WinAgainstMixture:
    """The probability of winning against ``pi^(1-mix) pi_to^mix``, less 1/2, estimated from the other answers of the group.

    Equation: ``A_i = sum_j w_j P(i > j) / sum_j w_j - 1/2`` over the other answers ``j`` of the group, ``w_j = (pi_to(y_j) / pi(y_j))^mix``.
    Source: the opponent of Nash-MD, arXiv 2312.00886, whose released trainer samples it token by token with both models in the sampler.  That it is
    estimated from the policy's own answers by importance weights is ours: exact as the group grows, for the mixture over whole answers.

    ``mix``: the base's share in the opponent, a number or a schedule; 0 is the policy itself.  ``to``: the base.  ``of``: the reward with the group's
    comparisons.  An answer that was compared with no other gets 0.

    Wrong when: answers are long and the policy is far from its base: one answer of the group is then the whole opponent (see the metric
    ``opponents``, how many there are in effect).
    """

    mix: Scalar = 0.5
    to: str = "base"
    of: str = "judge"
    coupling = "group"
    live = True
    compares = True

    def __post_init__(self) -> None:
        if not callable(self.mix) and not 0 <= self.mix <= 1:
            raise ValueError(f"WinAgainstMixture: mix={self.mix} is the base's share in the opponent, between 0 and 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        return f"(sum_j w_j P(i > j) / sum_j w_j - 1/2) [w = (pi_{self.to}/pi)^{number(self.mix)} of the other answers, P of {self.of}]"

    def values(self, view: TokenView) -> Tensor:
        share, wins, known = self._opponents(view)
        won = (share * wins).sum(1) - 0.5
        return view.spread(torch.where(known.any(1), won, torch.zeros_like(won)))

    def metrics(self, view: TokenView) -> Metrics:
        """How many opponents an answer has in effect: ``(sum w)^2 / sum w^2``."""
        share, _, known = self._opponents(view)
        told = known.any(1)
        return {"opponents": (float((1.0 / (share**2).sum(1)[told]).sum()), float(told.sum()))}

    def _opponents(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
        """``[S, S]``: the share of each opponent, 0 where there is none; the probability of winning; who was compared with whom."""
        batch, size = view.batch, view.batch.num_sequences
        here, prefix = view.seq_len() > 0, f"{self.of}/{AGAINST}/"
        columns = {name.removeprefix(prefix): column for name, column in batch.rewards.items() if name.startswith(prefix)}
        if bool(here.any()) and not columns:
            raise ValueError(
                f"stream {view.name!r}: WinAgainstMixture reads the rewards {prefix}0, 1, ..., and the batch has {', '.join(sorted(batch.rewards)) or 'none'}; set "
                f"reward=pair_judge and reward.fn.{self.of}.each=true"
            )
        wins = view.logp.new_full((size, size), torch.nan)
        for j, sample in enumerate(batch.sample_ids):
            column = columns.get(sample.rpartition("/")[2])
            if column is not None:
                wins[:, j] = column.to(wins.dtype)
        group = batch.group
        met = (group[:, None] == group) & (group >= 0) & here & here[:, None] & ~torch.eye(size, dtype=torch.bool, device=group.device)
        known = met & ~wins.isnan()
        weight = torch.where(known, -view.at(self.mix) * view.seq_sum(view.log_ratio(self.to, level="token")), -torch.inf)
        share = torch.where(known.any(1, keepdim=True), torch.softmax(torch.where(known.any(1, keepdim=True), weight, 0.0), 1), 0.0)
        return torch.where(known, share, 0.0), torch.where(known, wins, 0.0), known
