"""Coefficients that follow what is measured: a controller stands where a number or a schedule may stand.

``regularizers.entropy.coef={_target_: posttrain.mixture.control.Threshold, name: entropy, metric: rollouts/entropy, init: 0.01, target: 0.2}``

After every optimizer step the controller sees its metric, summed over the whole step and all ranks, and sets the value of the next one.  What it
remembers travels in ``batch.memory`` under its ``name`` and is part of every checkpoint.  Two coefficients with one name share one controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

Pairs = Mapping[str, tuple[float, float]]


@runtime_checkable
class Control(Protocol):
    """``begin`` is the state before anything was measured, ``step(state, measured, sequences)`` the next one, ``value(state)`` the coefficient.  A state is
    a few named numbers.  One that has ``metrics``, several names, gets the list of what they
    measured.  Called with the progress of a run, as a schedule is, it gives the value it begins with."""

    name: str
    metric: str

    def begin(self) -> dict[str, float]: ...
    def step(self, state: Mapping[str, float], measured: Any, sequences: int) -> dict[str, float]: ...
    def value(self, state: Mapping[str, float]) -> float: ...
    def __call__(self, progress: float) -> float: ...


def recall(control: Control, memory: Mapping[str, float]) -> dict[str, float]:
    """A controller's state in ``batch.memory``, or the one it begins with."""
    begin = control.begin()
    return {key: float(memory.get(_key(control, key), start)) for key, start in begin.items()}


def steer(controls: Mapping[str, Control], memory: Mapping[str, float], metrics: Pairs, sequences: int) -> dict[str, float]:
    """What the controllers remember for the next step.  A metric that counted nothing leaves its controller as it is.

    Raises ``ValueError`` naming the metrics there are when one is missing.
    """
    out: dict[str, float] = {}
    for control in controls.values():
        several = getattr(control, "metrics", None)
        for name in several or (control.metric,):
            if name not in metrics:
                known = ", ".join(sorted(m for m in metrics if "/" in m))
                raise ValueError(f"controller {control.name!r} follows the metric {name!r}, which this loss does not report; it reports {known}")
        found = [metrics[name] for name in several or (control.metric,)]
        state = recall(control, memory)
        if all(count for _, count in found):
            means = [total / count for total, count in found]
            state = control.step(state, means if several else means[0], sequences)
        out |= {_key(control, key): number for key, number in state.items()}
    return out


def _key(control: Control, key: str) -> str:
    return f"control/{control.name}.{key}"


def controls_in(value: Any) -> dict[str, Control]:
    """The controllers among the fields of terms, by name, however deep.  Raises ``ValueError`` when one name has two settings."""
    found: dict[str, Control] = {}
    for control in _walk(value):
        if found.setdefault(control.name, control) != control:
            raise ValueError(f"two controllers are called {control.name!r} but differ; give each a name of its own")
    return found


def _walk(value: Any) -> list[Control]:
    if isinstance(value, Control) and not isinstance(value, type):
        return [value]
    inner: list[Any] = []
    if is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, Mapping):
        inner = list(value.values())
    return [control for each in inner for control in _walk(each)]


@dataclass(frozen=True)
class Proportional:
    """Grow while the metric is above its target, shrink while it is below.

    Equation: ``b <- b (1 + clip(measured/target - 1, -clip, clip) * n/horizon)``, n the sequences of the optimizer step.
    Source: Ziegler et al., arXiv 1909.08593, for the coefficient of a KL.

    ``name``: under which it is remembered.  ``metric``: what it follows, such as ``rollouts/reward_kl`` (a KL per answer) or ``rollouts/kl`` (a
    regulariser's value per token): targets differ by the length.  ``init``: the value before the first step.  ``target``: of the metric.  ``horizon``:
    sequences after which the value may have changed by a factor of about ``exp(clip)``.  ``clip``: the largest relative error that counts.

    Wrong when: the metric may be 0 by construction, as a KL to the start is before the first update: the value then falls until it is not.
    """

    name: str
    metric: str
    init: float = 0.2
    target: float = 6.0
    horizon: float = 10_000.0
    clip: float = 0.2

    def __post_init__(self) -> None:
        if not (self.init > 0 and self.target > 0 and self.horizon > 0 and 0 < self.clip < 1):
            raise ValueError(
                f"control.Proportional: init={self.init}, target={self.target} and horizon={self.horizon} must be above 0, clip={self.clip} between 0 and 1"
            )

    def begin(self) -> dict[str, float]:
        return {"value": self.init}

    def step(self, state: Mapping[str, float], measured: float, sequences: int) -> dict[str, float]:
        error = min(max(measured / self.target - 1.0, -self.clip), self.clip)
        factor = 1.0 + error * sequences / self.horizon
        if factor <= 0:
            raise ValueError(
                f"controller {self.name!r}: horizon={self.horizon:g} is too short for steps of {sequences} sequences, the coefficient would turn "
                f"negative; make it longer than {self.clip * sequences:g}"
            )
        return {"value": state["value"] * factor}

    def value(self, state: Mapping[str, float]) -> float:
        return state["value"]

    def __call__(self, progress: float) -> float:
        return self.init


@dataclass(frozen=True)
class Threshold:
    """One step up after a step whose metric was at or below the target, one step down after the others.

    Equation: ``b <- clip(b + step [measured <= target] - step [measured > target], low, high)``.
    Source: adaptive entropy, Skywork-OR1, arXiv 2505.22312.

    ``name``, ``metric``, ``init``, ``target``: as in :class:`Proportional`.  ``rate``: how far a step goes.  ``low``, ``high``: bounds of the value.
    ``only_below``: the coefficient is 0 after a step above the target; the value goes on moving underneath.

    Wrong when: the target is above what the metric ever reaches, as 5 nats are for the entropy of a token: the value climbs to ``high`` and stays.
    """

    name: str
    metric: str
    init: float = 0.01
    target: float = 0.2
    rate: float = 0.005
    low: float = 0.0
    high: float = 1.0
    only_below: bool = True

    def __post_init__(self) -> None:
        if not (self.low <= self.init <= self.high and self.rate > 0):
            raise ValueError(
                f"control.Threshold: init={self.init} must lie between low={self.low} and high={self.high}, and rate={self.rate} be above 0"
            )

    def begin(self) -> dict[str, float]:
        return {"value": self.init, "below": 1.0}

    def step(self, state: Mapping[str, float], measured: float, sequences: int) -> dict[str, float]:
        below = measured <= self.target
        return {"value": min(max(state["value"] + (self.rate if below else -self.rate), self.low), self.high), "below": float(below)}

    def value(self, state: Mapping[str, float]) -> float:
        return state["value"] if state["below"] or not self.only_below else 0.0

    def __call__(self, progress: float) -> float:
        return self.init
