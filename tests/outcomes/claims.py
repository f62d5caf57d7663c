"""What a source says a method does, the small run that looks for it, and what was found: one row of docs/log.md, one test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from posttrain.statistics import Interval, multi_bootstrap

Found = Literal["holds", "does not hold", "not decided"]
LEVEL = 0.99
"""Of every interval: there are many claims, and each is looked at on its own."""


@dataclass(frozen=True)
class Claim:
    """``measure(seed) -> {arm: number}``.  The effect is ``effect(numbers)``, by default the first arm's number less the second's (or the only one's); the claim says that it
    is above 0.

    ``source``: the arXiv id (or page) that says it, or ``expected`` for what follows from the formula.  ``says``: in one sentence.  ``run``: the experiment.  ``unit``: what the
    arms' numbers are.  ``found``: what was found; a test holds it.  ``note``: what a reader must know to read the row rightly.
    """

    name: str
    methods: tuple[str, ...]
    source: str
    says: str
    run: str
    unit: str
    measure: Callable[[int], Mapping[str, float]]
    found: Found
    effect: Callable[[Mapping[str, float]], float] | None = None
    effect_is: str = ""
    seeds: int = 6
    note: str = ""

    def difference(self, numbers: Mapping[str, float]) -> float:
        if self.effect is not None:
            return self.effect(numbers)
        first, *rest = numbers.values()
        return first - rest[0] if rest else first


@dataclass(frozen=True)
class Outcome:
    """``arms``: each arm's number over seeds; ``effect``: the claim's, whose sign decides."""

    claim: Claim
    arms: dict[str, Interval]
    effect: Interval

    @property
    def found(self) -> Found:
        """An interval that lies above 0 holds; one that ends at or below 0 does not; one around 0 decides nothing."""
        if self.effect.low > 0:
            return "holds"
        return "does not hold" if self.effect.high <= 0 else "not decided"


@cache
def measured(claim: Claim) -> Outcome:
    """Run every seed.  Intervals are over seeds alone: the expectations of one run are exact sums or large samples."""
    runs = [dict(claim.measure(seed)) for seed in range(claim.seeds)]
    arms = {name: over_seeds([run[name] for run in runs]) for name in runs[0]}
    return Outcome(claim, arms, over_seeds([claim.difference(run) for run in runs]))


def over_seeds(values: list[float]) -> Interval:
    return multi_bootstrap([[v] for v in values], level=LEVEL)
