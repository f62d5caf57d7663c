"""Advantage terms: how good a token was, seen from inside the loss.  Above 0 raises the probability.

Estimates that need only rewards (group baselines, whitening) are made before, in ``posttrain.advantage``, and arrive as the batch's column;
the terms here read that column, or the current log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar

SCORES = ("log_ratio_sum", "log_ratio_mean", "logp_sum", "logp_mean")
SHAPES = ("logistic", "squared", "hinge")


@dataclass(frozen=True)
class One:
    """A constant, the same for every token: imitate what is given.

    Equation: ``A = value``.
    Source: maximum likelihood.

    ``value``: 1; 0 leaves only the regularisers, a negative number unlearns.  A number or a schedule.

    Wrong when: the tokens carry advantages: they are ignored.
    """

    value: Scalar = 1.0

    @property
    def formula(self) -> str:
        return "" if self.value == 1.0 else number(self.value)

    def values(self, view: TokenView) -> Tensor:
        return torch.full_like(view.logp, view.at(self.value))


@dataclass(frozen=True)
class Column:
    """The advantage column of the batch, estimated before the batch was packed.

    Equation: ``A = batch.advantage[t]``.
    Source: whatever ``posttrain.advantage`` computed; see there.

    Wrong when: nothing filled the column: it is 1 everywhere by default, and the loss is maximum likelihood.
    """

    reads_column = True

    @property
    def formula(self) -> str:
        return "A"

    def values(self, view: TokenView) -> Tensor:
        return view.batch.advantage.to(view.logp.dtype)


@dataclass(frozen=True)
class ColumnMinusKL:
    """The advantage column less a KL penalty in the *reward*, estimated by k1.

    Equation: ``A[t] - coef * sum_{s in credit(t)} (log pi_over[s] - log pi_to[s])``.
    Source: KL in the reward, RLOO, arXiv 2402.14740, and PPO for language models; reward-to-go is the exact gradient of the sequence KL.

    ``coef``: strength, a number or a schedule.  ``to``: the policy to stay near.  ``over``: whose tokens were sampled: ``old``,
    ``behaviour`` or ``self``.  ``credit``: ``to_go`` (this token and the later ones), ``sequence`` (all of them) or ``own`` (this token
    alone, which equals k2 as a loss: a local KL).  No baseline is taken from the KL part: unbiased, with more variance than a group-centred
    one.

    Wrong when: the tokens are far off-policy and the reference has no importance ratio.
    """

    coef: Scalar = 0.05
    to: str = "base"
    over: str = "old"
    credit: Literal["to_go", "sequence", "own"] = "to_go"
    reads_column = True
    coupling = "sequence"

    def __post_init__(self) -> None:
        if self.credit not in ("to_go", "sequence", "own"):
            raise ValueError(f"advantage.ColumnMinusKL: credit={self.credit!r} does not exist; choose to_go, sequence or own")
        if self.to == self.over:
            raise ValueError(f"advantage.ColumnMinusKL: the KL from {self.over} to itself is 0; name two different policies")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to, self.over}) - {"self"}

    @property
    def live(self) -> bool:
        return "self" in (self.to, self.over)

    @property
    def formula(self) -> str:
        over = "pi" if self.over == "self" else f"pi_{self.over}"
        return f"(A - {number(self.coef)} * sum_{self.credit} log({over}/pi_{self.to}))"

    def values(self, view: TokenView) -> Tensor:
        d = view.log_ratio(self.to, self.over, "token")
        if self.credit != "own":
            total = view.spread(view.seq_sum(d))
            if self.credit == "to_go":
                running = torch.cumsum(d, 0)
                starts = view.batch.cu_seqlens[:-1].clamp(max=max(len(d) - 1, 0))
                before = view.spread((running - d)[starts]) if len(d) else running
                total = total - (running - d - before)
            d = total
        return view.batch.advantage.to(view.logp.dtype) - view.at(self.coef) * d


@dataclass(frozen=True)
class Pairwise:
    """A preference pair: push the chosen answer up and the rejected one down, less and less as the margin is reached.

    Equation: with ``h = score(chosen) - score(rejected)`` and a loss ``f(h)``, ``A = -f'(h)`` on the chosen answer and ``+f'(h)`` on the
    rejected one: ``logistic``: ``f = -log sigmoid(beta h)``; ``squared``: ``f = (h - 1/(2 beta))**2``; ``hinge``: ``f = max(0, 1 - beta
    h)``.
    Source: DPO, arXiv 2305.18290; IPO, arXiv 2310.12036; hinge, arXiv 2309.06657; label smoothing, Mitchell 2023; ``debias``, arXiv
    2403.00409.

    ``f``: the loss.  ``score``: ``log_ratio_sum`` or ``log_ratio_mean`` against ``to``, or ``logp_sum``, ``logp_mean`` without a reference;
    the aggregation must match (``PairSum`` for sums, ``PairTokenMean`` for means).  ``beta``: inverse temperature; with ``squared`` the
    target margin is ``1/(2 beta)``.  ``label_smoothing``: the assumed share of flipped labels, logistic only; ``debias`` makes the smoothed
    loss unbiased for it.

    Wrong when: a pair is cut between micro-batches: an error unless the weights come from the whole step.  ``beta`` is not comparable
    between sums and means (0.1 and 5), nor learning rates between ``logistic`` and ``squared`` (first weights ``beta/2`` and ``1/beta``).
    """

    f: Literal["logistic", "squared", "hinge"] = "logistic"
    score: Literal["log_ratio_sum", "log_ratio_mean", "logp_sum", "logp_mean"] = "log_ratio_sum"
    to: str = "base"
    beta: Scalar = 0.1
    label_smoothing: float = 0.0
    debias: bool = False
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        if self.f not in SHAPES:
            raise ValueError(f"advantage.Pairwise: f={self.f!r} does not exist; choose from {', '.join(SHAPES)}")
        if self.score not in SCORES:
            raise ValueError(f"advantage.Pairwise: score={self.score!r} does not exist; choose from {', '.join(SCORES)}")
        if not callable(self.beta) and not self.beta > 0:
            raise ValueError(f"advantage.Pairwise: beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"advantage.Pairwise: label_smoothing={self.label_smoothing} is a share of flipped labels, between 0 and 1")
        if self.f != "logistic" and (self.label_smoothing or self.debias):
            raise ValueError(f"advantage.Pairwise: label_smoothing and debias act on f=logistic only, not on f={self.f}")
        if self.debias and self.label_smoothing >= 0.5:
            raise ValueError(
                f"advantage.Pairwise: debias needs label_smoothing below 0.5, not {self.label_smoothing}: half-flipped labels say nothing"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to}) if self.score.startswith("log_ratio") else frozenset()

    @property
    def formula(self) -> str:
        beta, e = number(self.beta), self.label_smoothing
        f = {"logistic": f"-log sigmoid({beta} h)", "squared": f"(h - 1/(2*{beta}))^2", "hinge": f"max(0, 1 - {beta} h)"}[self.f]
        if e:
            f += f" smoothed by {e:g}" + (", debiased" if self.debias else "")
        part = f"log(pi/pi_{self.to})" if self.score.startswith("log_ratio") else "log pi"
        return f"(-/+ f'(h)) [f = {f}, h = {self.score.rsplit('_', 1)[1]} {part}, chosen - rejected]"

    def values(self, view: TokenView) -> Tensor:
        h, _ = self._margin(view)
        return view.spread(-view.batch.side.to(h.dtype) * self._slope(h, view.at(self.beta)))

    def objective(self, view: TokenView) -> Metrics:
        """The published loss, the share of pairs ranked right, the margin ``beta h`` and ``beta`` times the score of each side, per pair."""
        h, score = self._margin(view)
        chosen = (view.batch.pair >= 0) & (view.batch.side > 0) & view.in_pair
        rejected = (view.batch.pair >= 0) & (view.batch.side < 0) & view.in_pair
        pairs = float(chosen.sum())
        beta = view.at(self.beta)
        loss = self._loss(h, beta)
        return {
            "preference_loss": (float(loss[chosen].sum()), pairs),
            "margin": (beta * float(h[chosen].sum()), pairs),
            "accuracy": (float((h[chosen] > 0).sum()), pairs),
            "chosen_score": (beta * float(score[chosen].sum()), pairs),
            "rejected_score": (beta * float(score[rejected].sum()), pairs),
        }

    def _margin(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """The margin of each sequence's pair and each sequence's score, both ``[S]``."""
        self._require_pairs(view)
        d = view.log_ratio(self.to, level="token") if self.score.startswith("log_ratio") else view.select(view.logp)
        score = view.seq_sum(d) if self.score.endswith("_sum") else view.seq_mean(d)
        pair, side = view.batch.pair, view.batch.side
        size = int(pair.max()) + 1 if len(pair) and int(pair.max()) >= 0 else 1
        has = pair >= 0
        per_pair = torch.zeros(size, dtype=score.dtype, device=score.device).index_add(0, pair[has], (score * side)[has])
        return torch.where(has, per_pair[pair.clamp(min=0)], torch.zeros_like(score)), score

    def _require_pairs(self, view: TokenView) -> None:
        batch = view.batch
        single = view.member & (batch.pair < 0)
        if bool(single.any()):
            raise ValueError(
                f"stream {view.name!r}: advantage.Pairwise needs preference pairs, but sample "
                f"{batch.sample_ids[int(single.nonzero()[0])]!r} is in none; "
                "give the stream paired=true, or give the rows a pair and a side"
            )
        for side in (1, -1):
            here = view.in_pair & (batch.side == side)
            counts = view.code_count(batch.pair, here)
            wrong = view.in_pair & (counts != 1)
            if bool(wrong.any()):
                where = int(wrong.nonzero()[0])
                raise ValueError(
                    f"stream {view.name!r}: the pair of sample {batch.sample_ids[where]!r} has {int(counts[where])} "
                    f"{'chosen' if side > 0 else 'rejected'} answers here instead of 1; keep pairs whole in a micro-batch, or pass "
                    f"weights= "
                    "computed on the whole step with objective.weights(batch)"
                )

    def _slope(self, h: Tensor, beta: float) -> Tensor:
        """``f'(h)``."""
        if self.f == "squared":
            return 2.0 * (h - 1.0 / (2.0 * beta))
        if self.f == "hinge":
            return -beta * (beta * h < 1.0).to(h.dtype)
        e = self.label_smoothing
        return -beta * (torch.sigmoid(-beta * h) + (e / (1 - 2 * e) if self.debias else -e))

    def _loss(self, h: Tensor, beta: float) -> Tensor:
        if self.f == "squared":
            return (h - 1.0 / (2.0 * beta)) ** 2
        if self.f == "hinge":
            return (1.0 - beta * h).clamp(min=0.0)
        e = self.label_smoothing
        smoothed = -(1 - e) * logsigmoid(beta * h)
        if e:
            smoothed = smoothed + (e if self.debias else -e) * logsigmoid(-beta * h)
        return smoothed / (1 - 2 * e) if self.debias else smoothed
