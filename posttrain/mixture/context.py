"""A gate that changes what the model reads, never what it learns to say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.seeds import derive
from posttrain.mixture.demos import Demos
from posttrain.mixture.schedule import Scalar, at
from posttrain.records import Demo, Source


@dataclass(frozen=True)
class Corrupt:
    """A share of the tokens of every given answer is replaced by one token where the model reads them; the labels stay.

    Source: Masked Thought, arXiv 2403.02178.

    ``token``: the id read in their place, of a token that means nothing else (not the padding of a model whose attention looks at ids).  ``rate``: the share,
    each token drawn on its own, a number or a schedule.  ``seed``: of the draws, which also depend on the step and the demonstration's id, so every
    epoch has its own.

    Wrong when: the answers are short: at a high rate nothing is left to build on (at 1 the model sees the prompt alone).
    """

    token: int
    rate: Scalar = 0.4
    seed: int = 0
    uses_demos = False

    def __post_init__(self) -> None:
        if not callable(self.rate) and not 0 <= self.rate <= 1:
            raise ValueError(f"mixture.gate.rate={self.rate} is a share of the answer's tokens, between 0 and 1")
        if self.token < 0:
            raise ValueError(f"mixture.gate.token={self.token} must be the id of a token")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        rate = at(self.rate, progress)
        return [self._corrupt(item, rate, step) if isinstance(item, Demo) and rate > 0 else item for item in items]

    def _corrupt(self, demo: Demo, rate: float, step: int) -> Demo:
        segments = []
        for number, segment in enumerate(demo.segments):
            if segment.source != Source.demo:
                segments.append(segment)
                continue
            draw = random.Random(derive(self.seed, "corrupt", step, demo.id, number))
            segments.append(replace(segment, inputs=tuple(self.token if draw.random() < rate else i for i in segment.ids)))
        return replace(demo, segments=tuple(segments))
