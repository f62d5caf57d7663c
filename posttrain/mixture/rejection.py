"""Pairs from the estimated optimum: of many samples those are kept that the best policy under a KL penalty would have drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.seeds import derive
from posttrain.mixture.demos import Demos
from posttrain.mixture.pairs import PAIRED, TIED, as_demo, value_of
from posttrain.records import Group, Pair


@dataclass(frozen=True)
class Rejection:
    """Statistical rejection sampling: ``keep`` of a group's answers, accepted with probability ``exp((r - r_max)/beta)``, become pairs by their rewards.

    Source: RSO, arXiv 2309.06657, algorithm 1: round after round over what is left, without replacement, ``r_max`` that of what is left.  Its loss is ``rso``; the
    paper samples from the frozen start.

    ``keep``: how many answers, an even number; neighbours in the order of acceptance make a pair, ties teach nothing.  ``beta``: towards 0 the best
    are kept, large values keep whatever was sampled first.  ``metric``: the combined ``reward``, or a score.  ``seed``: of the draw, which depends on
    the prompt and the step.

    Wrong when: rewards are not on the scale of ``beta``: everything is accepted, or only the best.
    """

    keep: int = 4
    beta: float = 0.5
    metric: str = "reward"
    seed: int = 0
    uses_demos = False
    makes_pairs = True

    def __post_init__(self) -> None:
        if self.keep < 2 or self.keep % 2:
            raise ValueError(f"mixture.gate.keep={self.keep} must be an even number of 2 or more: they become pairs")
        if not self.beta > 0:
            raise ValueError(f"mixture.gate.beta={self.beta} must be above 0")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out, pairs = [], []
        for item in items:
            if isinstance(item, Group) and item.dropped is None:
                found = self._pairs(item, step)
                pairs += found
                item = replace(item, dropped=PAIRED if found else TIED)
            out.append(item)
        return [*out, *pairs]

    def _pairs(self, group: Group, step: int) -> list[Pair]:
        scored = [(value, r) for r in group.rollouts if (value := value_of(r, self.metric)) is not None]
        draw = random.Random(derive(self.seed, "rejection", step, group.id))
        kept = [scored[i] for i in accepted([v for v, _ in scored], self.keep, self.beta, draw)]
        out = []
        for number, (a, b) in enumerate(zip(kept[::2], kept[1::2], strict=False)):
            if a[0] != b[0]:
                better, worse = (a, b) if a[0] > b[0] else (b, a)
                out.append(Pair(f"{group.id}/{number}", as_demo(better[1]), as_demo(worse[1])))
        return out


def accepted(rewards: Sequence[float], keep: int, beta: float, draw: random.Random) -> list[int]:
    """Indices in the order of acceptance, ``min(keep, len(rewards))`` of them."""
    left, out = list(range(len(rewards))), []
    while left and len(out) < keep:
        best = max(rewards[i] for i in left)
        for i in list(left):
            if len(out) < keep and draw.random() < math.exp((rewards[i] - best) / beta):
                out.append(i)
                left.remove(i)
    return out
