"""Answers that begin with a piece of a demonstration and are continued by the policy.

The piece is read by the engine behind the prompt, token by token as the demonstration has it; in the records it stands in the answer again, under the
source ``prefix``, so that a loss can give it a stream of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.data.seeds import derive
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import answer_of
from posttrain.mixture.schedule import Cosine, Scalar, at
from posttrain.records import Demo, Group, Prompt, Rollout, Segment, Source
from posttrain.rollout.strategy import Around, Ask, Fixed, StepInfo


@dataclass(frozen=True)
class UniformShare:
    """A share of the answer's tokens, uniform between ``low`` and ``high`` (numbers or schedules).

    Source: Prefix-RFT, arXiv 2507.01679: ``low`` falls from 0.95 to 0.05 by a cosine, ``high`` stays (secondary source).
    """

    low: Scalar = field(default_factory=lambda: Cosine(0.95, 0.05))
    high: Scalar = 0.95

    def __call__(self, draw: random.Random, progress: float) -> float:
        low, high = at(self.low, progress), at(self.high, progress)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"UniformShare needs 0 <= low <= high <= 1; at progress {progress:g} they are {low:g} and {high:g}")
        return draw.uniform(low, high)


@dataclass(frozen=True)
class BinomialShare:
    """So many of ``segments`` equal parts of the answer as coins with probability ``p`` (a number or a schedule) come up.

    Source: UFT, arXiv 2505.16984, whose segments are the solution's own steps; equal parts are our reading.
    """

    p: Scalar = 0.5
    segments: int = 5

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise ValueError(f"BinomialShare: segments={self.segments} must be at least 1")

    def __call__(self, draw: random.Random, progress: float) -> float:
        p = at(self.p, progress)
        if not 0 <= p <= 1:
            raise ValueError(f"BinomialShare: p is {p:g} at progress {progress:g}; it must lie between 0 and 1")
        return sum(draw.random() < p for _ in range(self.segments)) / self.segments


@dataclass(frozen=True)
class WithPrefix(Around):
    """Another strategy, some of whose answers begin with a piece of the prompt's demonstration.

    ``length``: share of the demonstration's answer, drawn per prompt and step.  ``samples``: how many answers of a group begin so (the group keeps its size);
    null is all of them, with one prefix for the group.  ``seed``: of the draws.  ``inner``: the strategy, ``Fixed`` by default.  A prefix never holds the
    answer's last token, so there is always something to continue.  A prompt without a demonstration is sampled as usual.

    Engines must have room for prompt, prefix and continuation: ``data.max_length`` is added to what they hold.
    """

    length: Callable[[random.Random, float], float] = field(default_factory=UniformShare)
    samples: int | None = 1
    seed: int = 0
    inner: Any = field(default_factory=Fixed)
    demos: Demos | None = None
    needs_demos = True

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"rollout.strategy.samples={self.samples} must be at least 1, or null for the whole group")

    def bound(self, n: int) -> WithPrefix:
        size = self.inner.bound(n)
        if self.samples is not None and size.n is not None and self.samples >= size.n:
            raise ValueError(
                f"rollout.strategy.samples={self.samples} leaves none of the {size.n} answers free; raise rollout.n, or set samples=null"
            )
        return replace(self, inner=size)

    def with_demos(self, demos: Demos) -> WithPrefix:
        return replace(self, demos=demos)

    def prefix(self, prompt: Prompt, info: StepInfo) -> tuple[int, ...]:
        """The piece of this prompt's demonstration, empty where there is none."""
        demo = self.demos.one_of(prompt, info.step) if self.demos is not None else None
        if demo is None:
            return ()
        ids = answer_ids(demo)
        share = self.length(random.Random(derive(self.seed, "prefix", info.step, prompt.id)), info.progress)
        return ids[: min(math.floor(share * len(ids) + 1e-9), len(ids) - 1)]

    def plan(self, prompts: Sequence[Prompt], info: StepInfo) -> list[Ask]:
        asks = []
        for ask in self.inner.plan(prompts, info):
            prefix = self.prefix(ask.prompt, info)
            if not prefix:
                asks.append(ask)
            elif self.samples is None:
                asks.append(replace(ask, prefix=prefix))
            else:
                asks += [
                    replace(ask, n=ask.n - self.samples),
                    Ask(ask.prompt, self.samples, ask.first + ask.n - self.samples, prefix=prefix),
                ]
        return asks


def answer_ids(demo: Demo) -> tuple[int, ...]:
    """The tokens of a demonstration's answer that the model is to write.  Raises ``ValueError`` for an answer in several turns."""
    segments = [s for s in answer_of(demo) if s.ids]
    if any(s.source != Source.demo for s in segments):
        raise ValueError(f"demonstration {demo.id!r} has several turns, so no piece of it can begin an answer")
    return tuple(i for s in segments for i in s.ids)


def behind(prompt: Prompt, prefix: Sequence[int]) -> Prompt:
    """The prompt an engine reads: the question, then the beginning of the answer."""
    return replace(prompt, ids=(*prompt.ids, *prefix))


def put_back(group: Group, prompt: Prompt, prefix: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Group:
    """The group as one of ``prompt``, the prefix at the beginning of every answer, in its tokens and in its text."""
    return replace(
        group, prompt=replace(group.prompt, ids=prompt.ids), rollouts=tuple(_put_back(r, prompt, prefix, decode) for r in group.rollouts)
    )


def _put_back(rollout: Rollout, prompt: Prompt, prefix: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Rollout:
    segments = (Segment(tuple(prefix), Source.prefix), *rollout.segments)
    text = decode([i for s in segments for i in s.ids])
    return replace(rollout, prompt=replace(rollout.prompt, ids=prompt.ids), segments=segments, text=text)
