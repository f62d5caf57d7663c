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


@dataclass(frozen=True)
class WarmupCosine:
    """In steps, not in shares of the run: 0 to ``peak`` linearly over ``warmup`` steps, then half a cosine to ``valley`` over ``decay`` steps, then constant.

    ``steps`` is the length of the run, ``${steps}`` in a recipe: published schedules are stated in steps, whatever the run's length.
    Without warm-up it starts at ``peak``.  ``after``: the value beyond the last step of the decay; null holds the valley.
    """

    peak: float
    valley: float
    warmup: int
    decay: int
    steps: int
    after: float | None = None

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.decay < 1 or self.steps < 1:
            raise ValueError(
                f"WarmupCosine needs warmup >= 0, decay >= 1 and steps >= 1, not {self.warmup}, {self.decay} and {self.steps}; a constant is a number"
            )

    def __call__(self, progress: float) -> float:
        step = progress * self.steps
        if step < self.warmup:
            return self.peak * step / self.warmup
        if self.after is not None and step > self.warmup + self.decay + 1e-6:
            return self.after
        u = min((step - self.warmup) / self.decay, 1.0)
        return self.valley + (self.peak - self.valley) * 0.5 * (1.0 + math.cos(math.pi * u))


@dataclass(frozen=True)
class OneMinus:
    """``1 - of``: the other share of a blend whose two shares add up to 1."""

    of: Scalar

    def __call__(self, progress: float) -> float:
        return 1.0 - at(self.of, progress)
