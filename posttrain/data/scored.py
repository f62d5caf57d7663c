"""Where a scalar head is read: the columns a reward model or a critic answers at.

A column has read everything before its target and not the target itself.  That is the state a critic values.  What is judged *with* its last token needs the
column behind it, so every sequence gets one token more, which no model reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from posttrain.records import Row

BEHIND = 0
"""The id of the token behind a sequence: a target that is never scored and never an input."""


def read_at(rows: Iterable[Row], at: str | None) -> list[Row]:
    """The rows with ``trainable`` on the columns of ``likelihood.Score(at=...)``: ``end``, ``marked``, or ``before`` (None: as they are).

    ``marked`` are the columns behind trainable tokens, with their labels (``advantage``), weights, sources and turns; ``end`` is the last of them.
    """
    return list(rows) if at in (None, "before") else [_behind(row, at == "end") for row in rows]


def _behind(row: Row, only_end: bool) -> Row:
    n = len(row.ids)
    marks = [bool(t) for t in row.trainable or [False] * n]
    if only_end and any(marks):
        last = max(i for i, mark in enumerate(marks) if mark)
        marks = [i == last for i in range(n)]
    moved: dict[str, Any] = {name: _shift(getattr(row, name)) for name in ("advantage", "weight", "turn")}
    sources = row.sources if row.sources is not None else ["demo"] * n
    return replace(
        row,
        ids=[*row.ids, BEHIND],
        inputs=None if row.inputs is None else [*row.inputs, BEHIND],
        sources=_shift(sources),
        trainable=[False, *marks],
        version=[*row.version, -1] if isinstance(row.version, Sequence) else row.version,
        logps={name: [*column, float("nan")] for name, column in row.logps.items()},
        routing=None,
        **moved,
    )


def _shift(column: Any) -> Any:
    """One column later: what described token t describes what is read behind it."""
    return [column[0], *column] if isinstance(column, Sequence) and not isinstance(column, str) else column
