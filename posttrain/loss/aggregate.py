"""Aggregation terms: the constant each token's weight is multiplied by.

Aggregation acts on weights, not on objective values.  Letters: ``N_tok``, ``N_seq``, ``N_grp``, ``N_pair`` count the stream over the whole
optimizer step (all micro-batches, all ranks); ``T_i`` is the number of the stream's tokens in sequence i.  A sequence whose tokens are all
untrainable still counts in ``N_seq``: leaving it out would make the step size depend on the mask.  For two answers of length 1 and 3 the
per-token constants are: token mean 1/4, 1/4; mean of means 1/2, 1/6; mean of sums 1/2, 1/2; constant 1/(2L) for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.loss.view import TokenView

DENOMINATORS = ("own", "weight_sum", "joint", "kept")


@dataclass(frozen=True)
class TokenMean:
    """Every token counts the same.

    Equation: ``1 / N_tok``.
    Source: DAPO, arXiv 2503.14476; maximum likelihood.

    ``denominator``: what is counted. ``own``: the stream's tokens; ``weight_sum``: the sum of its token weights; ``joint``: the tokens of
    all streams together; ``kept``: its tokens that survive the masks (this one must see the whole step, so it costs a second pass).

    Wrong when: answers differ in length and each *answer* should count the same; long answers then dominate.
    """

    denominator: Literal["own", "weight_sum", "joint", "kept"] = "own"

    def __post_init__(self) -> None:
        if self.denominator not in DENOMINATORS:
            raise ValueError(f"aggregate.TokenMean: denominator={self.denominator!r} does not exist; choose from {', '.join(DENOMINATORS)}")

    @property
    def coupling(self) -> str:
        return "batch" if self.denominator == "kept" else "token"

    @property
    def live(self) -> bool:
        return self.denominator == "kept"

    @property
    def formula(self) -> str:
        return {"own": "1/N_tok", "weight_sum": "1/sum(weight)", "joint": "1/N_tok(all streams)", "kept": "1/N_kept"}[self.denominator]

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        if self.denominator == "weight_sum":
            count = view.totals.weight
        elif self.denominator == "joint":
            count = sum(t.tokens for t in (view.step or {view.name: view.totals}).values())
        elif self.denominator == "kept" and kept is not None:
            view.require_whole("aggregate.TokenMean(denominator='kept')")
            count = float((view.on & (kept > 0)).sum())
        else:
            count = view.totals.tokens
        return torch.full_like(view.logp, 1.0 / count if count else 0.0)


@dataclass(frozen=True)
class SequenceMeanTokenMean:
    """Every sequence counts the same, and so does every token inside it.

    Equation: ``1 / (N_seq * T_i)``, or ``1 / (sum_j w_j * T_i)``.
    Source: GRPO as published, arXiv 2402.03300; GSPO, arXiv 2507.18071 (the ``1/T_i`` is the derivative of its geometric mean); the sum of weights:
    OpenChat, arXiv 2309.11235.

    ``denominator``: ``own`` counts sequences; ``weight_sum`` adds up their weights, so that only the proportion of the weights matters.

    Wrong when: long wrong answers should be discouraged as much per token as short ones: here they are discouraged less.
    """

    denominator: Literal["own", "weight_sum"] = "own"
    coupling = "sequence"

    def __post_init__(self) -> None:
        if self.denominator not in ("own", "weight_sum"):
            raise ValueError(f"aggregate.SequenceMeanTokenMean: denominator={self.denominator!r} does not exist; choose own or weight_sum")

    @property
    def formula(self) -> str:
        return "1/(N_seq T_i)" if self.denominator == "own" else "1/(sum(weight_i) T_i)"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        count = view.totals.sequence_weight if self.denominator == "weight_sum" else view.totals.sequences
        return view.spread((1.0 / count if count else 0.0) / view.seq_len().clamp(min=1))


@dataclass(frozen=True)
class SequenceMeanTokenSum:
    """The mean over sequences of sums over tokens: the unbiased gradient of the expected reward.

    Equation: ``1 / N_seq``.
    Source: REINFORCE, RLOO, arXiv 2402.14740; LUSPO is GSPO's ratio with this aggregation.

    Wrong when: the learning rate was tuned for a token mean: the step grows with the length of the answers.
    """

    @property
    def formula(self) -> str:
        return "1/N_seq"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        return torch.full_like(view.logp, 1.0 / max(view.totals.sequences, 1))


@dataclass(frozen=True)
class Constant:
    """A fixed length in the place of the answer's own.

    Equation: ``1 / (N_seq * L)``, or ``1 / L`` with ``per="step"``.
    Source: Dr. GRPO, arXiv 2503.20783; per step: the releases of LUFFY, arXiv 2504.14945, and HPT, arXiv 2509.04419.

    ``length``: ``L``, the generation budget in tokens.  It only scales the gradient; ``L = N_tok / N_seq`` gives the token mean.  ``per``: with
    ``sequence`` every answer has that length; with ``step`` the tokens of the whole step are summed and divided once, so the gradient grows with
    the batch.

    Wrong when: ``length`` is the longest answer of the batch: the step size then depends on what was sampled.
    """

    length: float
    per: Literal["sequence", "step"] = "sequence"

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise ValueError(f"aggregate.Constant: length={self.length} must be above 0; give the generation budget in tokens")
        if self.per not in ("sequence", "step"):
            raise ValueError(f"aggregate.Constant: per={self.per!r} does not exist; choose sequence or step")

    @property
    def formula(self) -> str:
        return f"1/{self.length:g}" if self.per == "step" else f"1/(N_seq * {self.length:g})"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        count = 1 if self.per == "step" else max(view.totals.sequences, 1)
        return torch.full_like(view.logp, 1.0 / (count * self.length))


@dataclass(frozen=True)
class GroupMeanTokenMean:
    """Every group counts the same, and so does every token inside it.

    Equation: ``1 / (N_grp * T_g)``, with ``T_g`` the tokens of the group.
    Source: DAPO's objective as printed, arXiv 2503.14476 (frameworks use the token mean of the step).

    Wrong when: some sequences have no group.  A group must be whole to be counted, so a cut group costs a second pass.
    """

    coupling = "group"
    live = True

    @property
    def formula(self) -> str:
        return "1/(N_grp T_g)"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        length, group = view.seq_len(), view.batch.group
        alone = (length > 0) & (group < 0)
        if bool(alone.any()):
            sample = view.batch.sample_ids[int(alone.nonzero()[0])]
            raise ValueError(
                f"stream {view.name!r}: aggregate.GroupMeanTokenMean needs a group on every sequence; sample {sample!r} has none"
            )
        tokens = view.code_sum(group, length).clamp(min=1)
        return view.spread(1.0 / (view.totals.groups * tokens))


@dataclass(frozen=True)
class GroupSum:
    """The mean over groups of sums over their tokens.

    Equation: ``1 / N_grp``.
    Source: objectives stated per prompt: pass@k, arXiv 2503.19595; group regressions, arXiv 2504.19599.

    Wrong when: the advantages are those of a mean over the group: the step is then larger by the size of the group.
    """

    @property
    def formula(self) -> str:
        return "1/N_grp"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        return torch.full_like(view.logp, 1.0 / max(view.totals.groups, 1))


@dataclass(frozen=True)
class GroupSumTokenMean:
    """The mean over groups of sums over their answers of means over tokens.

    Equation: ``1 / (N_grp * T_i)``.
    Source: objectives stated per prompt on *mean* log-probabilities: rewards as labels, arXiv 2602.05630.

    Wrong when: the score of an answer is a sum over its tokens; use :class:`GroupSum`.
    """

    coupling = "sequence"

    @property
    def formula(self) -> str:
        return "1/(N_grp T_i)"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        return view.spread(1.0 / (max(view.totals.groups, 1) * view.seq_len().clamp(min=1)))


@dataclass(frozen=True)
class PairSum:
    """The mean over preference pairs of sums over tokens.

    Equation: ``1 / N_pair``.
    Source: DPO, arXiv 2305.18290.  For advantages built on *summed* scores.

    Wrong when: the score is a mean over tokens; use :class:`PairTokenMean`.
    """

    @property
    def formula(self) -> str:
        return "1/N_pair"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        return torch.full_like(view.logp, 1.0 / max(view.totals.pairs, 1))


@dataclass(frozen=True)
class PairTokenMean:
    """The mean over preference pairs of means over the tokens of each side.

    Equation: ``1 / (N_pair * T_i)``.
    Source: length-normalised DPO (Tulu 3, arXiv 2411.15124); IPO as implemented by TRL.  For advantages built on *mean* scores.

    Wrong when: the score is a sum over tokens; use :class:`PairSum`.
    """

    coupling = "sequence"

    @property
    def formula(self) -> str:
        return "1/(N_pair T_i)"

    def coefficient(self, view: TokenView, kept: Tensor | None = None) -> Tensor:
        return view.spread(1.0 / (max(view.totals.pairs, 1) * view.seq_len().clamp(min=1)))
