"""Intervals and comparisons: how sure a number is, over which source of chance.

Two runs differ by seed and by item at once; an interval over the items of one run says nothing about another seed (it covers the truth in
about 70 % of cases where 95 % is claimed).  So the bootstrap here resamples seeds and items together, and refuses one seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Axis = str  # "seeds" or "items"
AXES = ("seeds", "items")


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; ``over`` names the sources of chance it covers, ``num_*`` how many there were."""

    mean: float
    low: float
    high: float
    level: float = 0.95
    over: tuple[Axis, ...] = ("items",)
    num_seeds: int = 1
    num_items: int = 0
    method: str = ""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _z(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"a confidence level lies between 0 and 1, not {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Interval of a rate from ``n`` independent trials; never outside [0, 1] and of non-zero width at 0 and ``n`` (Wilson 1927).

    ``center = (p + z^2/2n) / (1 + z^2/n)``, ``half = z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2)``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs n >= 1 and 0 <= successes <= n, not {successes} of {n}")
    z, p = _z(level), successes / n
    scale = 1 + z * z / n
    center, half = (p + z * z / (2 * n)) / scale, z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return Interval(p, low, high, level, ("items",), 1, n, "wilson")


def multi_bootstrap(
    x: ArrayLike,
    baseline: ArrayLike | None = None,
    paired: Sequence[Axis] = ("items",),
    n: int = 2000,
    level: float = 0.95,
    rng: np.random.Generator | int = 0,
    over: Sequence[Axis] = AXES,
) -> Interval:
    """Percentile interval of ``mean(x)``, or of ``mean(x) - mean(baseline)``, resampling seeds and items together with replacement.

    ``x[seeds, items]``     one number per run and test item; ``baseline`` likewise, for the other arm
    ``paired``              axes on which both arms share their units (same items, same seeds): resampled once for both
    ``over``                which axes to resample.  ``("items",)`` alone is for the accuracy of one given model, never for a method
    ``rng``                 generator or seed; the result does not depend on the order of seeds or items

    One item gives a bootstrap over seeds.  Raises ``ValueError`` for one seed with ``"seeds"`` in ``over``, for NaN, and for arms whose
    paired axes differ in length.  Source: MultiBERTs, arXiv 2106.16163.
    """
    arms = [_cells(x, "x")] + ([] if baseline is None else [_cells(baseline, "baseline")])
    paired, over = tuple(paired) if baseline is not None else (), tuple(over)
    if not over or not set(over) | set(paired) <= set(AXES) or n < 1:
        raise ValueError(f"over={over} and paired={paired} must be out of {AXES}, over not empty, and n >= 1")
    for axis in paired:
        sizes = [arm.shape[AXES.index(axis)] for arm in arms]
        if len(set(sizes)) > 1:
            raise ValueError(f"the arms have {sizes[0]} and {sizes[1]} {axis} but are paired on {axis}; align them, or leave it out")
    for arm in arms:
        if "seeds" in over and arm.shape[0] < 2:
            raise ValueError(
                "there is one seed, so nothing is known about how much another seed would differ; run more seeds, or ask for the interval "
                "of this one model with over=('items',)"
            )
    _z(level)  # checks it
    rng = np.random.default_rng(rng)
    arms = _in_canonical_order(arms, paired)
    drawn: dict[Axis, NDArray[np.float64]] = {}
    means = []
    for arm in arms:
        weights = []
        for i, axis in enumerate(AXES):
            size = arm.shape[i]
            if axis in paired and axis in drawn:
                weights.append(drawn[axis])
                continue
            drawn[axis] = rng.multinomial(size, np.full(size, 1 / size), size=n) / size if axis in over else np.full((n, size), 1 / size)
            weights.append(drawn[axis])
        means.append(((weights[0] @ arm) * weights[1]).sum(1))
    values = means[0] - means[1] if len(means) == 2 else means[0]
    mean = float(arms[0].mean() - arms[1].mean()) if len(arms) == 2 else float(arms[0].mean())
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), level, over, arms[0].shape[0], arms[0].shape[1], "multi_bootstrap")


def _cells(x: ArrayLike, name: str) -> NDArray[np.float64]:
    cells = np.asarray(x, dtype=np.float64)
    if cells.ndim != 2 or cells.size == 0:
        raise ValueError(f"{name} has shape {cells.shape}; it must be [seeds, items] with at least one of each")
    if not np.isfinite(cells).all():
        seed, item = np.argwhere(~np.isfinite(cells))[0]
        raise ValueError(
            f"{name}[{seed}, {item}] is {cells[seed, item]}; drop items whose verifier failed from every arm, and say how many"
        )
    return cells


def _in_canonical_order(arms: list[NDArray[np.float64]], paired: Sequence[Axis]) -> list[NDArray[np.float64]]:
    """Sort seeds and items by their content, paired axes by the content of both arms, so that the given order does not matter."""
    for axis in (0, 1):
        keys = [np.sort(arm, axis=axis) if axis == 0 else np.sort(arm, axis=1).T for arm in arms]  # items are columns, then seeds are rows
        together = ("items", "seeds")[axis] in paired
        shared = np.lexsort(np.concatenate(keys)) if together else None
        arms = [np.take(arm, np.lexsort(key) if shared is None else shared, axis=1 - axis) for arm, key in zip(arms, keys, strict=True)]
    return arms


@dataclass(frozen=True)
class Comparison:
    """What a difference between two arms rests on.  ``equal`` names the budget both had (optimizer steps, tokens, rollouts, seconds)."""

    difference: Interval
    p_value: float
    paired: tuple[Axis, ...]
    equal: str
    num_items: int


def paired_difference(
    a: Mapping[Hashable, Sequence[float]],
    b: Mapping[Hashable, Sequence[float]],
    *,
    equal: str,
    n: int = 2000,
    level: float = 0.95,
    rng: int = 0,
) -> Comparison:
    """``mean(a) - mean(b)`` over items both arms were tested on: item key -> one value per seed.

    Raises ``ValueError`` when the keys differ (naming some), when an arm has seeds missing on an item, or has one seed only.
    """
    if set(a) != set(b):
        odd = sorted(map(str, set(a) ^ set(b)))
        raise ValueError(f"{len(odd)} items are in one arm only ({', '.join(odd[:3])}, ...); compare on the same items")
    keys = sorted(a, key=str)
    arms = []
    for name, arm in (("a", a), ("b", b)):
        if len({len(arm[k]) for k in keys}) != 1:
            raise ValueError(f"arm {name} has items with different numbers of seeds; every item needs one value per seed")
        arms.append(np.array([list(arm[k]) for k in keys], dtype=np.float64).T)
    interval = multi_bootstrap(arms[0], arms[1], paired=("items",), n=n, level=level, rng=rng)
    return Comparison(interval, permutation_test(arms[0].mean(1), arms[1].mean(1), n=n, rng=rng), ("items",), equal, len(keys))


def permutation_test(a: ArrayLike, b: ArrayLike, n: int = 2000, rng: np.random.Generator | int = 0) -> float:
    """Two-sided p-value that two samples of independent runs have one mean: relabel them ``n`` times.  Never below ``1 / (n + 1)``."""
    x, y, rng = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), np.random.default_rng(rng)
    if x.ndim != 1 or y.ndim != 1 or len(x) < 1 or len(y) < 1:
        raise ValueError(f"a permutation test needs two one-dimensional samples, not shapes {x.shape} and {y.shape}")
    both, seen = np.concatenate([x, y]), abs(x.mean() - y.mean())
    shuffled = rng.permuted(np.tile(both, (n, 1)), axis=1)
    differences = np.abs(shuffled[:, : len(x)].mean(1) - shuffled[:, len(x) :].mean(1))
    return float((1 + (differences >= seen - 1e-12).sum()) / (n + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of several claims: reject where the adjusted value is below the level (Holm 1979).

    ``p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`` over the ascending order.
    """
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"the p-value of {name!r} is {p}")
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def minimum_detectable(n: int, rate: float = 0.5, level: float = 0.95, power: float = 0.8) -> float:
    """Least difference of two independent rates, each of ``n`` items, found with ``power``: ``(z_level + z_power) sqrt(2 p(1-p)/n)``."""
    if n < 1 or not 0 < rate < 1 or not 0 < power < 1:
        raise ValueError(f"minimum_detectable needs n >= 1, 0 < rate < 1 and 0 < power < 1, not {n}, {rate}, {power}")
    return (_z(level) + NormalDist().inv_cdf(power)) * math.sqrt(2 * rate * (1 - rate) / n)
