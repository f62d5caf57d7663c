"""Prompts get a direction each: what is wanted of the answer, as shares of several rewards, in columns that a template can say aloud."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from posttrain.data.columns import row_id
from posttrain.data.files import DataError, Record
from posttrain.data.seeds import derive


@dataclass(frozen=True)
class Directions:
    """Every row becomes ``repeats`` rows, each with a unit vector of its own in ``columns``.

    Source: DPA, arXiv 2402.18571 (abstract only): the user's wish as a direction in the space of rewards.  Uniform on the sphere, with the first
    reward never unwanted, is our reading.

    ``columns``: where the vector's entries go, the names of the rewards; ``data.prompt_template="{question} (helpfulness {helpfulness}, verbosity
    {verbosity})"`` puts them in the prompt, ``advantage=directed`` weighs the rewards by them.  ``repeats``: directions per row.  ``digits``: to
    which they are rounded, in the prompt and in the weights alike.  ``first_positive``: whether the first entry is never below 0.  ``seed``: of the
    draws, which depend on the row's content.

    Wrong when: rewards are on different scales: the direction is then not the one that was said.
    """

    columns: tuple[str, ...] = ("helpfulness", "verbosity")
    repeats: int = 1
    digits: int = 2
    first_positive: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.columns)) != len(self.columns) or len(self.columns) < 2:
            raise DataError(f"Directions: columns={list(self.columns)} must be two or more different names")
        if self.repeats < 1 or self.digits < 1:
            raise DataError(f"Directions: repeats={self.repeats} and digits={self.digits} must be at least 1")

    def __call__(self, rows: Iterable[Record]) -> Iterator[Record]:
        for row in rows:
            if taken := [name for name in self.columns if name in row]:
                raise DataError(f"Directions: the data has a column {taken[0]!r} already; choose other columns")
            name = row_id(row, *sorted(map(str, row)))
            for number in range(self.repeats):
                yield {**row, "id": f"{name}/{number}", **dict(zip(self.columns, self._draw(name, number), strict=True))}

    def _draw(self, name: str, number: int) -> list[float]:
        draw = random.Random(derive(self.seed, "direction", name, number))
        while True:
            v = [draw.gauss(0.0, 1.0) for _ in self.columns]
            if (length := math.hypot(*v)) > 1e-6:
                break
        v = [x / length for x in v]
        if self.first_positive:
            v[0] = abs(v[0])
        return [round(x, self.digits) for x in v]
