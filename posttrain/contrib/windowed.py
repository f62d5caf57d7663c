"""Weights of several objectives, from how each one's own signal moved over two windows of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Windowed:
    """The share of one objective among several: more where the signal has stopped falling or is noisy.

    Equation: with ``m``, ``sd`` the mean and deviation of the last ``window`` values and ``m'`` the mean of the ``window`` before: ``c = m/m'``, ``i = sd/(m + m')``, and the
    share is ``softmax((c + i)/temperature)`` over the objectives.
    Source: RECAP, arXiv 2510.21978 (secondary source).

    ``name``: under which it is remembered.  ``metrics``: one per objective, none below 0.  ``of``: whose share this is, counted from 0.  ``window``: in optimizer
    steps; not known from what was read.  ``temperature``: 5 as published.  ``most``: bound of ``c`` and of ``i``, which a vanishing signal leaves open.  Until two windows are full, and
    where a signal is 0 throughout, ``c = 1`` and ``i = 0``.

    Wrong when: a metric crosses 0, as a clipped surrogate does; take a reward, a loss or an absolute value.
    """

    name: str
    metrics: tuple[str, ...]
    of: int = 0
    window: int = 10
    temperature: float = 5.0
    most: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not 0 <= self.of < len(self.metrics):
            raise ValueError(f"Windowed: of={self.of} names none of the {len(self.metrics)} metrics, which are counted from 0")
        if self.window < 1 or not self.temperature > 0 or not self.most >= 1:
            raise ValueError(f"Windowed: window={self.window} must be at least 1, temperature={self.temperature} above 0 and most={self.most} at least 1")

    @property
    def metric(self) -> str:
        return self.metrics[self.of]

    def begin(self) -> dict[str, float]:
        return {"seen": 0.0, **{f"{k}.{j}": 0.0 for k in range(len(self.metrics)) for j in range(2 * self.window)}}

    def step(self, state: Mapping[str, float], measured: Sequence[float], sequences: int) -> dict[str, float]:
        for metric, value in zip(self.metrics, measured, strict=True):
            if value < 0:
                raise ValueError(f"controller {self.name!r}: {metric} is {value:g}; a signal below 0 has no ratio of means, choose another metric")
        kept = {f"{k}.{j}": state[f"{k}.{j + 1}"] for k in range(len(self.metrics)) for j in range(2 * self.window - 1)}
        last = {f"{k}.{2 * self.window - 1}": float(value) for k, value in enumerate(measured)}
        return {"seen": min(state["seen"] + 1.0, 2.0 * self.window), **kept, **last}

    def value(self, state: Mapping[str, float]) -> float:
        score = [self._score(state, k) / self.temperature for k in range(len(self.metrics))]
        top = max(score)
        return math.exp(score[self.of] - top) / sum(math.exp(s - top) for s in score)

    def __call__(self, progress: float) -> float:
        return 1.0 / len(self.metrics)

    def _score(self, state: Mapping[str, float], k: int) -> float:
        if state["seen"] < 2 * self.window:
            return 1.0
        values = [state[f"{k}.{j}"] for j in range(2 * self.window)]
        before, now = sum(values[: self.window]) / self.window, sum(values[self.window :]) / self.window
        if before + now == 0:
            return 1.0
        deviation = math.sqrt(sum((v - now) ** 2 for v in values[self.window :]) / self.window)
        c = self.most if before == 0 else min(now / before, self.most)
        return c + min(deviation / (now + before), self.most)
