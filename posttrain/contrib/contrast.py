"""Every answer scored under every instruction: which belong together is what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.loss.preference import check_stream, sequence_score
from posttrain.loss.view import Metrics, TokenView


@dataclass(frozen=True)
class MatrixContrast:
    """A matrix of answers under instructions: the right entry of each row and of each column should have the largest score.

    Equation: per group ``J = 1/2 (mean over rows of log softmax(s)[right] + the same over columns)``;
    ``A = 1/2 ((y - softmax over the row)/rows + (y - softmax over the column)/columns)``, ``y`` the share of an entry in the right ones of its line.
    Source: SAMI, arXiv 2404.14313, of which the abstract was read: the two-sided form is our reading.

    ``rows``, ``columns``: reward columns that number the instruction and the answer of a sequence.  ``right``: the reward column that is above 0 on the entries that
    belong together.  ``score``: ``logp_sum``, or ``logp_mean``, which a long answer does not lose by.  A line without a right entry teaches nothing.

    Wrong when: answers differ in length and ``score`` is the sum: over a row length then decides; or entries are missing, which moves every softmax.
    """

    rows: str = "instruction"
    columns: str = "answer"
    right: str = "reward"
    score: str = "logp_sum"
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        if self.score not in ("logp_sum", "logp_mean"):
            raise ValueError(f"MatrixContrast: score={self.score!r} does not exist; choose logp_sum or logp_mean")

    def fits(self, stream: Any) -> None:
        check_stream("MatrixContrast", self.score, stream)

    @property
    def formula(self) -> str:
        return f"(2 right - softmax over {self.rows} - softmax over {self.columns})/2 of {self.score}"

    def values(self, view: TokenView) -> Tensor:
        score, here = self._score(view)
        right = here & (self._column(view, self.right, here) > 0)
        out = torch.zeros_like(score)
        for name in (self.rows, self.columns):
            lines = self._lines(view, name, here)
            share, chance, counted = self._softmax(score, right, here, lines)
            # one entry stands for its line, so that lines are counted and not entries
            first = {line: i for i, line in reversed(list(enumerate(lines.tolist()))) if bool(counted[i])}
            stands = torch.zeros_like(here)
            stands[list(first.values())] = True
            many = view.code_count(view.batch.group, stands).clamp(min=1)
            out = out + torch.where(counted, 0.5 * (share - chance) / many, 0.0)
        return view.spread(out)

    def objective(self, view: TokenView) -> Metrics:
        """How often the right entry leads its line, over rows and over columns."""
        score, here = self._score(view)
        right = here & (self._column(view, self.right, here) > 0)
        out: Metrics = {}
        for key, name in (("right_by_row", self.rows), ("right_by_column", self.columns)):
            lines, hits, count = self._lines(view, name, here), 0.0, 0.0
            for line in sorted(set(lines[right].tolist())):
                mine = here & (lines == line)
                best = int(torch.where(mine, score, -torch.inf).argmax())
                hits, count = hits + float(right[best]), count + 1.0
            out[key] = (hits, count)
        return out

    def _score(self, view: TokenView) -> tuple[Tensor, Tensor]:
        here = view.member & (view.seq_len() > 0)
        alone = here & (view.batch.group < 0)
        if bool(alone.any()):
            sample = view.batch.sample_ids[int(alone.nonzero()[0])]
            raise ValueError(f"stream {view.name!r}: MatrixContrast compares the entries of a group; sample {sample!r} is in none")
        return torch.where(here, sequence_score(view, self.score, ""), 0.0), here

    def _column(self, view: TokenView, name: str, here: Tensor) -> Tensor:
        found = view.batch.rewards.get(name)
        if found is None and not bool(here.any()):
            return torch.zeros_like(view.seq_len())
        if found is None or bool((here & torch.isnan(found)).any()):
            raise ValueError(
                f"stream {view.name!r}: MatrixContrast needs the reward column {name!r} on every entry; the batch has {sorted(view.batch.rewards) or 'none'}"
            )
        return found.to(view.logp.dtype)

    def _lines(self, view: TokenView, name: str, here: Tensor) -> Tensor:
        """The same whole number for the entries of one group with one value in a column, ``[S]``; -1 outside."""
        values = torch.where(here, self._column(view, name, here), 0.0)
        keys = list(zip(view.batch.group.tolist(), values.tolist(), strict=True))
        codes = {key: i for i, key in enumerate(dict.fromkeys(k for k, on in zip(keys, here.tolist(), strict=True) if on))}
        return torch.tensor([codes[k] if on else -1 for k, on in zip(keys, here.tolist(), strict=True)], dtype=torch.int64, device=values.device)

    @staticmethod
    def _softmax(score: Tensor, right: Tensor, here: Tensor, lines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Share in the right entries, softmax, and whether the line has a right entry, each ``[S]``."""
        size, codes = int(lines.max()) + 1 if len(lines) and bool(here.any()) else 1, lines.clamp(min=0)
        most = torch.full((size,), -torch.inf, dtype=score.dtype, device=score.device).scatter_reduce(0, codes[here], score[here], "amax")
        each = torch.where(here, torch.exp(score - torch.where(here, most[codes], score)), 0.0)
        total = torch.zeros(size, dtype=score.dtype, device=score.device).index_add(0, codes[here], each[here])
        found = torch.zeros_like(total).index_add(0, codes[right], torch.ones_like(score)[right])
        share = right.to(score.dtype) / found[codes].clamp(min=1)
        return share, each / torch.where(here, total[codes], 1.0), here & (found[codes] > 0)
