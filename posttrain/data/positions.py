"""Plain texts become prompts: the beginning of a text, and what it says next."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.data.columns import row_id
from posttrain.data.files import DataError, Record, read_rows
from posttrain.data.seeds import derive


@dataclass(frozen=True)
class Positions:
    """Rows with ``prompt``, a text up to one of its words and ``open``, and ``answer``, the words that follow.

    Source: positions for thoughts in pre-training text, RLP, arXiv 2510.01265 (how many and where is not known; uniform draws are our choice).

    ``path``: a file or data set.  ``text``: its column.  ``per_text``: positions of each text, drawn without repetition by ``seed`` and the text;
    null takes all.  ``words``: how many words follow.  ``least``: words before the first position.  ``open``: what asks for a thought, at the end of
    every prompt.  The words that follow never stand in their prompt.

    Wrong when: a text repeats itself: what comes next then stands before it.
    """

    path: str
    text: str = "text"
    per_text: int | None = 4
    words: int = 1
    least: int = 1
    open: str = "<think>"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.words < 1 or self.least < 1 or (self.per_text is not None and self.per_text < 1):
            raise DataError(f"Positions: words={self.words}, least={self.least} and per_text={self.per_text} must be at least 1")

    def rows(self) -> Iterator[Record]:
        for number, row in enumerate(read_rows(self.path)):
            text = row.get(self.text)
            if not isinstance(text, str):
                raise DataError(f"row {number} has no text in the column {self.text!r}; it has: {', '.join(map(str, row))}")
            found = [m.span() for m in re.finditer(r"\s*\S+", text)]
            places = list(range(self.least, len(found) - self.words + 1))
            name = row_id(row, self.text)
            if self.per_text is not None and len(places) > self.per_text:
                places = sorted(random.Random(derive(self.seed, "positions", name)).sample(places, self.per_text))
            for k in places:
                start, end = found[k][0], found[k + self.words - 1][1]
                yield {"id": f"{name}/{k}", "prompt": text[:start] + self.open, "answer": text[start:end]}
