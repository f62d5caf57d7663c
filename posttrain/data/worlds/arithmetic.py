"""Arithmetic: column addition with visible carries, one checkable step per column.

A prompt is ``47+85=``.  A demonstration writes each column from the right as two digits, carry and digit, then the sum:
``12,13>132`` (7+5=12, then 4+8+1=13).  The text after the last ``>`` is the answer.  A level is the number of digits of both summands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from posttrain.data.worlds.base import Task, World
from posttrain.records import Score


@dataclass(frozen=True, kw_only=True)
class Arithmetic(World):
    """Sums of two numbers of up to ``max_digits`` digits.  ``base`` below 10 leaves fewer digit pairs to learn; ``show_steps=False``
    leaves the sum alone in the demonstration."""

    max_digits: int = 4
    base: int = 10
    show_steps: bool = True

    name: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.base <= 10 or self.max_digits < 1:
            raise ValueError(f"arithmetic: needs 2 <= base <= 10 and max_digits >= 1, not base={self.base}, max_digits={self.max_digits}")

    @property
    def levels(self) -> Sequence[int]:
        return tuple(range(1, self.max_digits + 1))

    @property
    def alphabet(self) -> str:
        return "".join(sorted("0123456789"[: self.base] + "+=,>"))

    def sample(self, rng: Random, level: int) -> Task:
        self.check_level(level)
        a, b = (self._write(rng.randrange(self.base ** (level - 1) if level > 1 else 0, self.base**level)) for _ in range(2))
        task = {"prompt": f"{a}+{b}=", "answer": self._write(int(a, self.base) + int(b, self.base)), "level": level, "env": self.name}
        return {**task, "demonstration": self.solve(task)}

    def _write(self, number: int) -> str:
        digits = ""
        while number or not digits:
            number, digit = divmod(number, self.base)
            digits = str(digit) + digits
        return digits

    def _columns(self, task: Task) -> list[str]:
        a, b = str(task["prompt"]).rstrip("=").split("+")
        columns, carry = [], 0
        for x, y in zip(reversed(a), reversed(b), strict=True):
            carry, digit = divmod(int(x) + int(y) + carry, self.base)
            columns.append(f"{carry}{digit}")
        return columns

    def key(self, task: Task) -> str:
        return "+".join(sorted(str(task["prompt"]).rstrip("=").split("+")))

    def verify(self, task: Task, text: str) -> Score:
        final = text.rsplit(">", 1)[-1].strip()
        if not final or not set(final) <= set("0123456789"):
            return Score(0.0, "bad_format", "no digits after the last '>'")
        return Score(float(final == task["answer"]))

    def solve(self, task: Task) -> str:
        answer = str(task["answer"])
        return ",".join(self._columns(task)) + ">" + answer if self.show_steps else answer

    def steps(self, task: Task, text: str) -> list[bool]:
        """Is each written column right?  One entry per column in ``text``; columns beyond the last are wrong."""
        right, written = self._columns(task), text.rsplit(">", 1)[0].split(",")
        return [i < len(right) and column.strip() == right[i] for i, column in enumerate(written)]
