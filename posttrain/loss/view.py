"""What a term sees: one stream's tokens, detached, with the reductions terms need.

A term never touches the model or the autograd graph.  It is a function of a :class:`TokenView` and returns ``[N]`` numbers; entries outside
``view.on`` are ignored by the caller and may hold anything, NaN included.  Letters: ``N`` columns, ``S`` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.mixture.control import now
from posttrain.mixture.schedule import Scalar
from posttrain.records import StreamTotals, TokenBatch, Totals

Metrics = dict[str, tuple[float, float]]
"""name -> (sum, count).  Both add over micro-batches and ranks; the metric is sum / count, or the sum itself where every count is 0."""

Level = Literal["token", "sequence", "sequence_geometric"]
LEVELS: tuple[Level, ...] = ("token", "sequence", "sequence_geometric")


@dataclass(frozen=True)
class TokenView:
    """One stream of a batch.

    ``logp`` float N: the current policy's log-probability, detached, at least float32.  ``on`` bool N: the stream's learnable tokens.
    ``member`` bool S: sequences that belong to the stream, including those whose tokens are all masked.  ``level`` is the granularity of
    ratios the stream's likelihood asks for.  ``totals`` are the stream's counts over the whole optimizer step, ``step`` those of every
    stream.
    """

    batch: TokenBatch
    logp: Tensor
    on: Tensor
    member: Tensor
    totals: StreamTotals
    level: Level = "token"
    name: str = "stream"
    step: Totals | None = None

    # -- scalars and columns -------------------------------------------------------------------------------------------
    def at(self, value: Scalar) -> float:
        """A coefficient now: a number as it is, a schedule at this step's progress, a controller where the steps before have led it."""
        return now(value, self.batch.progress, self.batch.memory)

    def select(self, values: Tensor, otherwise: float = 0.0) -> Tensor:
        """``values`` on the stream's tokens, a constant elsewhere; never ``0 * NaN``."""
        return torch.where(self.on, values, torch.full_like(self.logp, otherwise))

    def recall(self, term: Any, name: str, otherwise: float = 0.0) -> float:
        """A number that ``term`` remembered at the end of the step before, see ``Objective.remember``."""
        return float(self.batch.memory.get(memory_key(self.name, term, name), otherwise))

    def beside(self, context: str) -> TokenView:
        """The learnable tokens of the rows scored under another context, ``mismatched`` for instance.  The totals stay this stream's."""
        of_context = torch.tensor([c == context for c in self.batch.contexts], dtype=torch.bool, device=self.on.device)
        return replace(self, on=self.batch.trainable & of_context[self.batch.seq], member=of_context)

    def reference(self, to: str) -> Tensor:
        """Log-probabilities ``[N]`` of a named policy.  ``self`` is the current one.  On a fresh batch an absent ``old`` is the current one
        too.  Raises ``ValueError`` naming stream, column and source when it is missing on a token that needs it."""
        if to == "self":
            return self.logp
        column = self.batch.logps.get(to)
        if column is None:
            if (to == "old" and self.batch.fresh) or not bool(self.on.any()):
                return self.logp
            raise ValueError(f"stream {self.name!r} needs the log-prob column {to!r}; the batch has {sorted(self.batch.logps) or 'none'}")
        column = column.to(self.logp.dtype)
        missing = self.on & torch.isnan(column)
        if bool(missing.any()):
            where = int(missing.nonzero()[0])
            raise ValueError(
                f"stream {self.name!r}: log-prob {to!r} is absent (NaN) on {int(missing.sum())} of {int(self.on.sum())} tokens, first at "
                f"column "
                f"{where} of sample {self.batch.sample_ids[int(self.batch.seq[where])]!r}; given tokens have no {to!r}: choose reference "
                f"self "
                f"for them or give them a stream of their own"
            )
        return column

    def log_ratio(self, to: str, over: str = "self", level: Level | None = None) -> Tensor:
        """``log(over / to)`` on the stream's tokens, ``[N]``: token by token, summed over the sequence, or its mean (geometric ratio)."""
        delta = self.select(self.reference(over) - self.reference(to))
        level = level or self.level
        if level == "token":
            return delta
        if level == "sequence":
            return self.spread(self.seq_sum(delta))
        if level == "sequence_geometric":
            return self.spread(self.seq_mean(delta))
        raise ValueError(f"unknown ratio level {level!r}; choose from {', '.join(LEVELS)}")

    def require_whole(self, what: str) -> None:
        """Raise ``ValueError`` unless this view holds the whole optimizer step, or none of its tokens: for terms that count over the batch."""
        here = (int(self.on.sum()), int(self.member.sum()))
        if here[0] and here != (self.totals.tokens, self.totals.sequences):
            raise ValueError(
                f"stream {self.name!r}: {what} must see the whole optimizer step, but this batch has {here[0]} of {self.totals.tokens} "
                f"tokens; "
                "pass weights= computed on the whole step with objective.weights(batch)"
            )

    # -- reductions over the stream's tokens ----------------------------------------------------------------------------
    @property
    def num_sequences(self) -> int:
        return self.batch.num_sequences

    def seq_sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over each sequence's tokens in the stream, ``[S]``."""
        out = torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device)
        return out.index_add(0, self.batch.seq, torch.where(self.on, values, torch.zeros_like(values)))

    def seq_len(self) -> Tensor:
        """Number of the stream's tokens in each sequence, ``[S]``, as a float."""
        return self.seq_sum(torch.ones_like(self.logp))

    def seq_mean(self, values: Tensor) -> Tensor:
        """Mean over each sequence's tokens in the stream, ``[S]``; 0 for a sequence without any."""
        return self.seq_sum(values) / self.seq_len().clamp(min=1)

    def seq_max(self, values: Tensor) -> Tensor:
        """Largest of ``values`` over each sequence's tokens in the stream, ``[S]``; minus infinity for a sequence without any."""
        out = torch.full((self.num_sequences,), -torch.inf, dtype=values.dtype, device=values.device)
        return out.scatter_reduce(0, self.batch.seq, self.select(values, -torch.inf), "amax")

    def spread(self, per_sequence: Tensor) -> Tensor:
        """``[S]`` -> ``[N]``: every token gets its sequence's number."""
        return per_sequence[self.batch.seq]

    def discounted(self, values: Tensor, decay: float | Tensor = 1.0) -> Tensor:
        """Sum over this and the later of the stream's tokens in the sequence, each further one ``decay`` (one number, or ``[N]``: of the step away
        from a token) times less, ``[N]``.

        Tokens of other sources in between neither add nor discount: they get the sum of the next token of the stream.  Logarithmically many
        passes over the batch, and no sum ever leaves its sequence.
        """
        out, ends = self.select(values), self.batch.cu_seqlens[1:] - 1
        reach = self.select(decay if isinstance(decay, Tensor) else torch.full_like(out, decay), 1.0)
        reach[ends[self.batch.lengths > 0]] = 0.0
        step, longest = 1, int(self.batch.lengths.max()) if self.num_sequences else 0
        while step < longest:
            ahead, further = (torch.nn.functional.pad(x[step:], (0, step)) for x in (out, reach))
            out = out + torch.where(reach > 0, reach * ahead, torch.zeros_like(out))
            reach, step = reach * further, 2 * step
        return out

    def running(self, values: Tensor) -> Tensor:
        """Sum over this and the earlier of the stream's tokens in the sequence, ``[N]``; tokens of other sources add nothing and get the sum so far.

        Sums of numbers that are not negative never fall, and are exactly 0 up to the first that is not: nothing is ever subtracted.
        """
        out, index = self.select(values), torch.arange(len(self.logp), device=self.logp.device)
        place = index - self.batch.cu_seqlens[self.batch.seq]
        step, longest = 1, int(self.batch.lengths.max()) if self.num_sequences else 0
        while step < longest:
            behind = torch.nn.functional.pad(out, (step, 0))[: len(out)]
            out = out + torch.where(place >= step, behind, torch.zeros_like(out))
            step *= 2
        return out

    def following(self, values: Tensor) -> Tensor:
        """``values`` at the next of the stream's tokens in the sequence, tokens of other sources passed over; 0 behind the last, ``[N]``."""
        carried, ends = self.discounted(values, 0.0), self.batch.cu_seqlens[1:] - 1
        ahead = torch.nn.functional.pad(carried[1:], (0, 1)) if len(carried) else carried
        ahead[ends[self.batch.lengths > 0]] = 0.0
        return ahead

    @property
    def in_pair(self) -> Tensor:
        """Sequences of preference pairs of which at least one side belongs to the stream, ``[S]``: an empty answer still is a side."""
        return (self.batch.pair >= 0) & (self.code_count(self.batch.pair, self.member) > 0)

    def code_sum(self, codes: Tensor, per_sequence: Tensor) -> Tensor:
        """Sum over the stream's sequences that share a code (``batch.group`` or ``batch.pair``), back on each, ``[S]``; 0 without one."""
        has = (codes >= 0) & self.member
        return torch.where(has, sum_by_code(codes, per_sequence, has), torch.zeros_like(per_sequence))

    def code_max(self, codes: Tensor, per_sequence: Tensor) -> Tensor:
        """Largest over the stream's sequences that share a code, back on each, ``[S]``; minus infinity without one."""
        has, (size, index) = (codes >= 0) & self.member, _by_code(codes)
        most = torch.full((size,), -torch.inf, dtype=per_sequence.dtype, device=per_sequence.device)
        most = most.scatter_reduce(0, index[has], per_sequence[has], "amax")
        return torch.where(has, most[index], -torch.inf)

    def code_count(self, codes: Tensor, which: Tensor) -> Tensor:
        """How many of the sequences ``which`` ``[S]`` share each sequence's code, ``[S]`` int64; 0 without a code."""
        return torch.where(codes >= 0, sum_by_code(codes, which.to(torch.int64), which), torch.zeros_like(codes))


def memory_key(stream: str, term: Any, name: str) -> str:
    """Under which key of ``batch.memory`` a term of a stream keeps a number."""
    return f"{stream}/{type(term).__name__}.{name}"


def sum_by_code(codes: Tensor, per_sequence: Tensor, which: Tensor) -> Tensor:
    """Sum over the sequences ``which`` that share a code (-1 is one too), back on each, ``[S]``."""
    size, index = _by_code(codes)
    total = torch.zeros(size, dtype=per_sequence.dtype, device=per_sequence.device)
    return total.index_add(0, index[which], per_sequence[which])[index]


def _by_code(codes: Tensor) -> tuple[int, Tensor]:
    """How many codes there are, and the place of each sequence's among them: codes are those of a whole step, and a part of it holds few."""
    known, index = codes.unique(return_inverse=True)
    return len(known), index
