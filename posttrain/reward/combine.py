"""From the vector of named rewards to the one number the advantage is made of.

A combiner says which rewards it needs at this point of the run (a needed reward that failed leaves the rollout without a number, never with
a zero) and combines the values of one rollout.  Rewards that do not apply to a rollout (routing by environment) are absent from the map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from posttrain.mixture.schedule import Scalar, at


class Combiner(Protocol):
    def check(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` when the combiner and the rewards of the run do not fit."""

    def required(self, names: Iterable[str], progress: float) -> frozenset[str]:
        """Those of ``names`` whose failure leaves a rollout without a reward."""
        ...

    def __call__(self, values: Mapping[str, float], progress: float) -> float:
        """The scalar; ``values`` holds at least the required rewards."""
        ...


def _check_named(what: str, given: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    unknown = sorted(set(given) - set(names) - {g for g in given if g.split("/")[0] in names})
    if unknown:
        raise ValueError(f"{what} names {', '.join(unknown)}, but the rewards are {', '.join(names)}")


@dataclass(frozen=True)
class Sum:
    """``sum_i w_i(progress) * r_i``.

    ``weights`` are numbers or schedules by reward name (or ``name/part`` for a part of a mapping-valued reward); an empty map weighs every
    reward 1.  Weight 0 is the same as the reward being absent: it is logged, and its failures harm nobody.
    """

    weights: Mapping[str, Scalar] = field(default_factory=dict)

    def check(self, names: Iterable[str]) -> None:
        names = list(names)
        _check_named("the weights", self.weights, names)
        missing = [n for n in names if self.weights and not any(w.split("/")[0] == n for w in self.weights)]
        if missing:
            raise ValueError(f"no weight for reward {', '.join(missing)}; give it one, 0 to log it only, or leave out all weights")

    def _weights(self, names: Iterable[str], progress: float) -> dict[str, float]:
        weights = {
            n: at(self.weights[n], progress) if self.weights else 1.0 for n in sorted(names) if not self.weights or n in self.weights
        }
        return {n: w for n, w in weights.items() if w != 0.0}

    def required(self, names: Iterable[str], progress: float) -> frozenset[str]:
        return frozenset(self._weights((n for n in names if self.weights or "/" not in n), progress))

    def __call__(self, values: Mapping[str, float], progress: float) -> float:
        weights = self._weights((n for n in values if self.weights or "/" not in n), progress)
        return math.fsum(w * values[n] for n, w in weights.items())


@dataclass(frozen=True)
class Product:
    """``prod_i r_i`` over ``names`` (``None``: all rewards).  Wrong with negative rewards: two of them make a good one."""

    names: tuple[str, ...] | None = None

    def check(self, names: Iterable[str]) -> None:
        _check_named("the product", self.names or (), names)

    def required(self, names: Iterable[str], progress: float) -> frozenset[str]:
        return frozenset(n for n in names if (n in self.names if self.names is not None else "/" not in n))

    def __call__(self, values: Mapping[str, float], progress: float) -> float:
        return math.prod(values[n] for n in sorted(self.required(values, progress)))


@dataclass(frozen=True)
class Gate:
    """``inner(values) * 1[every gate r_g >= threshold_g]``, and ``otherwise`` where a gate is shut.

    ``gates`` maps reward names to thresholds (numbers or schedules).  ``inner`` combines the other rewards (default: their sum).  A rollout
    needs all gates and all that ``inner`` needs, whether a gate is open or not, so that a failed verifier cannot hide behind a shut gate.
    """

    gates: Mapping[str, Scalar]
    inner: Combiner = Sum()
    otherwise: float = 0.0

    def check(self, names: Iterable[str]) -> None:
        names = list(names)
        _check_named("the gate", self.gates, names)
        if not self.gates:
            raise ValueError("a Gate without gates does nothing; name at least one reward and its threshold, e.g. gates: {format: 1.0}")
        self.inner.check([n for n in names if n not in self.gates])

    def required(self, names: Iterable[str], progress: float) -> frozenset[str]:
        names = list(names)
        return frozenset(n for n in names if n in self.gates) | self.inner.required([n for n in names if n not in self.gates], progress)

    def __call__(self, values: Mapping[str, float], progress: float) -> float:
        if all(values[name] >= at(limit, progress) for name, limit in self.gates.items() if name in values):
            return self.inner({n: v for n, v in values.items() if n not in self.gates}, progress)
        return self.otherwise
