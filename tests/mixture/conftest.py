"""Groups and demonstrations in a line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain.mixture.demos import Demos
from posttrain.records import Demo, Group, Prompt, Rollout, Segment, Source


def prompt(name: str, **meta: Any) -> Prompt:
    return Prompt(name, ids=(1, 2, *map(ord, name)), meta=meta)


def group(name: str, *rewards: float | None) -> Group:
    """A group whose rollouts earned ``rewards``, with the plain centred advantage."""
    usable = [r for r in rewards if r is not None]
    rollouts = tuple(
        Rollout(
            f"{name}/{i}",
            prompt(name),
            (Segment((5, 6 + i), Source.policy, logprobs=(-1.0, -2.0), version=0),),
            reward=r,
            advantage=None if r is None else r - sum(usable) / len(usable),
        )
        for i, r in enumerate(rewards)
    )
    return Group(prompt(name), rollouts)


def demo(name: str, of: str | None = None, **meta: Any) -> Demo:
    """A demonstration of the prompt ``of`` (default: its own name): prompt tokens, then 7 8 9."""
    asked = prompt(of or name, **meta)
    return Demo(name, (Segment(asked.ids, Source.prompt, trainable=False), Segment((7, 8, 9), Source.demo)), prompt=asked)


class InOrder:
    """A sampler that hands out 0, 1, 2, ..."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def next(self, count: int) -> list[int]:
        self.at += count
        return [i % self.size for i in range(self.at - count, self.at)]


@pytest.fixture
def shelf() -> Callable[..., Demos]:
    def make(*demos: Demo) -> Demos:
        return Demos(demos, InOrder(len(demos)) if demos else None)

    return make
