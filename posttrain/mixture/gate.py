"""Which data a step learns from: a gate takes the scored groups and the demonstrations and returns what is packed.

A gate is called as ``gate(items, demos, step)``; ``demos_per_step`` says how many demonstrations it wants drawn.  It never changes a
record; leaving one out is its only power, plus letting demonstrations in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.records import Demo


class Gate(Protocol):
    """``demos_per_step`` demonstrations are drawn for every call."""

    demos_per_step: int

    def __call__(self, items: Sequence[Any], demos: Sequence[Demo], step: int) -> list[Any]: ...


@dataclass(frozen=True)
class PassThrough:
    """The items as they are; demonstrations are not used."""

    demos_per_step: int = 0

    def __call__(self, items: Sequence[Any], demos: Sequence[Demo], step: int) -> list[Any]:
        return list(items)


@dataclass(frozen=True)
class Add:
    """Every step also learns from ``demos_per_step`` demonstrations: SFT and RL in one batch, each stream with its own terms."""

    demos_per_step: int = 8

    def __call__(self, items: Sequence[Any], demos: Sequence[Demo], step: int) -> list[Any]:
        return [*items, *demos]
