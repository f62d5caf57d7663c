"""Coefficients that follow what is measured: a controller stands where a number or a schedule may stand.

``regularizers.entropy.coef={_target_: posttrain.mixture.control.Threshold, name: entropy, metric: rollouts/entropy, init: 0.01, target: 0.2}``

After every optimizer step the controller sees its metric, summed over the whole step and all ranks, and sets the value of the next one.  What it
remembers travels in ``batch.memory`` under its ``name`` and is part of every checkpoint.  Two coefficients with one name share one controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from posttrain.mixture.schedule import OneMinus, Scalar, at

Pairs = Mapping[str, tuple[float, float]]


@runtime_checkable
class Control(Protocol):
    """``begin`` is the state before anything was measured, ``step(state, measured, sequences)`` the next one, ``value(state)`` the coefficient.  A state is
    a few named numbers.  One that has ``metrics``, several names, gets the list of what they
    measured.  Called with the progress of a run, as a schedule is, it gives the value it begins with."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    def begin(self) -> dict[str, float]: ...
    def step(self, state: Mapping[str, float], measured: Any, sequences: int) -> dict[str, float]: ...
    def value(self, state: Mapping[str, float]) -> float: ...
    def __call__(self, progress: float) -> float: ...


def recall(control: Control, memory: Mapping[str, float]) -> dict[str, float]:
    """A controller's state in ``batch.memory``, or the one it begins with."""
    begin = control.begin()
    return {key: float(memory.get(_key(control, key), start)) for key, start in begin.items()}


def now(value: Scalar | Control, progress: float, memory: Mapping[str, float]) -> float:
    """A coefficient now: a number as it is, a schedule at ``progress``, a controller where the steps before have led it."""
    if isinstance(value, OneMinus):
        return 1.0 - now(value.of, progress, memory)
    if isinstance(value, Control):
        return value.value(recall(value, memory))
    return at(value, progress)


def pinned(control: Control, value: float) -> dict[str, float]:
    """What to put into ``batch.memory`` for a controller to stand at ``value``."""
    return {_key(control, "value"): value}


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


@dataclass(frozen=True)
class LookAhead:
    """A blend that learns: it goes where the step before should have gone for the utility to be higher now.

    Equation: ``mu <- clip(mu + rate * dU/dmu + entropy_sign * entropy_rate * (H* - H), low, high)``, with ``dU/dmu`` of ``posttrain.learner.lookahead``.
    Source: the meta-gradient controller of AMFT, arXiv 2508.06944.  The arXiv listing says that the paper is under investigation and that its authors
    asked to withdraw it, and its code is gone, so this is our reading of it and nothing is claimed for it.

    ``name``: under which it is remembered.  ``init``, ``low``, ``high``: of mu.  ``rate``: how far a look moves it.  ``every``: steps between
    two looks, each of which costs two backward passes and keeps one copy of the gradient.  ``utility``: the stream that is to do well; its next, unseen
    batch stands for the validation set.  ``scale``: ``product`` is ``lr * <dU, v>``, the derivative of a plain gradient step and with Adam an
    approximation, whose size depends on the model; ``cosine`` divides by both norms (ours).  ``entropy_rate``: 0 leaves the entropy out; ``entropy_sign``: +1
    lowers mu while the entropy is above ``H*``, as published, -1 raises it, as a secondary source reads it.  ``entropy``: the metric.  ``warmup``: looks
    whose mean entropy is ``H*``.

    Wrong when: the steps are so noisy that two gradients of successive batches are orthogonal: mu then does a random walk between its bounds.
    """

    name: str
    init: float = 0.5
    rate: float = 0.01
    every: int = 10
    low: float = 0.0
    high: float = 1.0
    utility: str = "rollouts"
    scale: Literal["product", "cosine"] = "cosine"
    entropy_rate: float = 0.0
    entropy_sign: int = 1
    entropy: str = "rollouts/entropy"
    warmup: int = 5

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.init <= self.high <= 1.0:
            raise ValueError(
                f"control.LookAhead: init={self.init} must lie between low={self.low} and high={self.high}, and these between 0 and 1"
            )
        if self.rate < 0 or self.entropy_rate < 0 or self.every < 1 or self.warmup < 1:
            raise ValueError(
                f"control.LookAhead: rate={self.rate} and entropy_rate={self.entropy_rate} must not be negative, every={self.every} and warmup={self.warmup} "
                "at least 1"
            )
        if self.entropy_sign not in (1, -1):
            raise ValueError(f"control.LookAhead: entropy_sign={self.entropy_sign} is +1 (as published) or -1")
        if self.scale not in ("product", "cosine"):
            raise ValueError(f"control.LookAhead: scale={self.scale!r} does not exist; choose product or cosine")

    @property
    def metric(self) -> str:
        return f"lookahead/{self.name}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric, self.entropy) if self.entropy_rate else (self.metric,)

    def fits(self, objective: Any) -> None:
        """Raises ``ValueError`` when the objective's gradient along this coefficient cannot be formed one micro-batch at a time."""
        needs = objective.needs
        if self.utility not in objective.streams:
            raise ValueError(
                f"controller {self.name!r}: there is no stream utility={self.utility!r}; the objective has {', '.join(objective.streams)}"
            )
        if self.name not in controls_in(objective.streams):
            raise ValueError(f"controller {self.name!r} looks ahead, so it must stand in the coefficient of a stream, not of a regulariser")
        if needs.keep_whole or needs.head != "lm" or needs.contexts or {"entropy", "collision"} & needs.references or needs.own_input:
            raise ValueError(
                f"controller {self.name!r} looks ahead one micro-batch at a time, and this objective's terms read more than that (whole groups or batches, "
                "other contexts, a scalar head, the entropy or another number of the whole vocabulary, its own input); use a schedule for the coefficient, or "
                "other terms"
            )

    def begin(self) -> dict[str, float]:
        return {"value": self.init, "entropy": 0.0, "looks": 0.0}

    def step(self, state: Mapping[str, float], measured: Any, sequences: int) -> dict[str, float]:
        moved, total, looks = self.rate * measured[0], state["entropy"], state["looks"]
        if self.entropy_rate and looks < self.warmup:
            total, looks = total + measured[1], looks + 1
        elif self.entropy_rate:
            moved += self.entropy_sign * self.entropy_rate * (total / looks - measured[1])
        return {"value": min(max(state["value"] + moved, self.low), self.high), "entropy": total, "looks": looks}

    def value(self, state: Mapping[str, float]) -> float:
        return state["value"]

    def __call__(self, progress: float) -> float:
        return self.init
