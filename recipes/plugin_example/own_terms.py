"""A mask, a gate and a reward of one's own, used by name from ``plugin_example.yaml``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.loss import TokenView
from posttrain.mixture.demos import Demos
from posttrain.records import Group


@dataclass(frozen=True)
class Fading:
    """Later tokens of an answer count less.

    Equation: ``2 ** (-k / half_life)`` for the k-th learnt token of an answer, counted from 0.
    Source: an example, nobody's result.

    ``half_life``: in tokens.

    Wrong when: the answer that is verified stands at the end.
    """

    half_life: float = 32.0
    coupling = "sequence"  # the number of a token depends on the others of its answer

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise ValueError(f"Fading: half_life={self.half_life} is a number of tokens, above 0")

    @property
    def formula(self) -> str:
        return f"2^(-k/{self.half_life:g})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        left = view.discounted(torch.ones_like(view.logp))  # this token and the later ones
        return 0.5 ** ((view.spread(view.seq_len()) - left).clamp(min=0) / self.half_life)


@dataclass(frozen=True)
class MostUneven:
    """Learn from the groups whose rewards differ most; leave the others out of the step.

    ``share``: of the groups that could teach something, rounded up.  A group left out keeps its rewards in the report, and is counted as
    ``data/dropped/too_even``.
    """

    share: float = 0.5
    uses_demos = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"MostUneven: share={self.share} is a part of the groups, above 0 and at most 1")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        groups = [item for item in items if isinstance(item, Group) and item.dropped is None]
        ordered = sorted(groups, key=spread, reverse=True)
        kept = {group.id for group in ordered[: math.ceil(round(self.share * len(ordered), 9))]}
        left_out = {group.id for group in groups} - kept
        return [replace(item, dropped="too_even") if isinstance(item, Group) and item.id in left_out else item for item in items]


def spread(group: Group) -> float:
    """The deviation of a group's rewards; a failed verifier says nothing."""
    rewards = [r.reward for r in group.rollouts if r.reward is not None]
    return statistics.pstdev(rewards) if rewards else 0.0


def letters_in_place(completion: str, answer: str) -> float:
    """The share of the reference answer's letters that stand at their place: part of the reward for part of the answer."""
    right = sum(a == b for a, b in zip(completion.strip(), str(answer), strict=False))
    return right / max(len(completion.strip()), len(str(answer)), 1)
