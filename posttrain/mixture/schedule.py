"""Numbers that change over a run: every coefficient of the project is a number or one of these.

A schedule is a callable of ``progress`` in [0, 1].  ``at(value, progress)`` reads either form, so a term never asks which it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Schedule = Callable[[float], float]
Scalar = float | Schedule


def at(value: Scalar, progress: float) -> float:
    """The value of a number or schedule at ``progress``.  Raises ``ValueError`` when a schedule returns NaN or infinity."""
    number = float(value(progress)) if callable(value) else float(value)
    if math.isnan(number):
        raise ValueError(f"{value!r} gave NaN at progress {progress}")
    return number


@dataclass(frozen=True)
class Linear:
    """``start + (end - start) * u``, where ``u`` runs from 0 to 1 while progress runs from ``begin`` to ``until``; constant outside."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.begin < self.until <= 1.0:
            raise ValueError(f"Linear needs 0 <= begin < until <= 1, not begin={self.begin}, until={self.until}")

    def __call__(self, progress: float) -> float:
        u = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return self.start + (self.end - self.start) * u


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end`` between ``begin`` and ``until``; constant outside."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.begin < self.until <= 1.0:
            raise ValueError(f"Cosine needs 0 <= begin < until <= 1, not begin={self.begin}, until={self.until}")

    def __call__(self, progress: float) -> float:
        u = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * u))


@dataclass(frozen=True)
class Steps:
    """A staircase: ``values[i]`` from ``boundaries[i-1]`` on.  ``len(values) == len(boundaries) + 1``."""

    values: Sequence[float]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(self.boundaries):
            raise ValueError("Steps needs ascending boundaries and one value more than boundaries")

    def __call__(self, progress: float) -> float:
        return float(self.values[sum(progress >= b for b in self.boundaries)])
