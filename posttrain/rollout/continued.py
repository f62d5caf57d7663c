"""Answers continued from their own steps: what an answer is worth behind each of them is found by going on from there, several times."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from posttrain.mixture.steps import FirstBadStep, begun_with
from posttrain.records import Group
from posttrain.reward.place import ENDS
from posttrain.rollout.strategy import Around, Ask, Fixed, StepInfo


@dataclass(frozen=True)
class Continued(Around):
    """Another strategy, whose wrong answers are continued from behind every step; the continuations join their group.

    Source: Monte Carlo estimates of a step's Q, arXiv 2406.14532 (secondary).

    ``pairs``: the gate that will make pairs of it and says which prefixes it must know, ``${mixture.gate}``.  ``continuations``: from each prefix,
    2 or more.  ``level``: what a step is, a ``line``, a ``sentence`` or a ``clause``; it ends with the token that holds its end.  ``inner``: the
    strategy, ``Fixed`` by default, which decides on the first answers alone.  ``decode``: tokens to text, given by the run.

    A group costs ``continuations`` samples for every step of a wrong answer, and as many for the good step; rewards are reported of all of them.
    Prefix and continuation may be three times ``rollout.max_tokens`` long together.
    """

    pairs: FirstBadStep | None = None
    continuations: int = 4
    level: Literal["line", "sentence", "clause"] = "line"
    inner: Any = field(default_factory=Fixed)
    decode: Callable[[Sequence[int]], str] | None = None
    continues = True

    def __post_init__(self) -> None:
        if not hasattr(self.pairs, "wanted"):
            raise ValueError(
                "rollout.strategy.pairs is not set: answers are continued for a gate that compares their steps; choose mixture=first_bad_step"
            )
        if self.level not in ENDS:
            raise ValueError(f"rollout.strategy.level={self.level!r} does not exist; choose from {', '.join(ENDS)}")
        self._enough("continuations", self.continuations)

    def _enough(self, name: str, value: int) -> None:
        assert self.pairs is not None
        if value < self.pairs.least:
            raise ValueError(
                f"rollout.strategy.{name}={value}: a Q is estimated from mixture.gate.least={self.pairs.least} answers or more, and never from one"
            )

    def bound(self, n: int) -> Continued:
        inner = self.inner.bound(n)
        self._enough("n", getattr(inner, "n", n))
        return replace(self, inner=inner)

    def with_decode(self, decode: Callable[[Sequence[int]], str]) -> Continued:
        return replace(self, decode=decode)

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Where the steps of an answer end, in tokens; the last step, which ends with the answer, is left out."""
        assert self.decode is not None, "a run gives the strategy its decode"
        text = self.decode(ids)
        found = [m for m in re.finditer(ENDS[self.level], text) if text[: m.start()].strip() and text[m.end() :].strip()]
        places = [m.end() if "\n" in m[0] else m.start() for m in found]
        if not places:
            return []
        decode = self.decode
        ends = {bisect_left(range(1, len(ids) + 1), place, key=lambda n: len(decode(ids[:n]))) + 1 for place in places}  # a text grows with its tokens
        return sorted(end for end in ends if end < len(ids))

    def observe(self, group: Group, info: StepInfo) -> list[Ask]:
        assert self.pairs is not None
        if more := self.inner.observe(_first(group), info):
            return more
        first = len(group.rollouts)  # all asks of a round begin here: the engines number answers to one prompt on
        return [Ask(group.prompt, self.continuations, first, prefix=prefix) for prefix in self.pairs.wanted(group, self.ends)]

    def admit(self, group: Group, info: StepInfo) -> str | None:
        return self.inner.admit(_first(group), info)


def _first(group: Group) -> Group:
    """The group as it was before anything was continued."""
    return replace(group, rollouts=tuple(r for r in group.rollouts if not begun_with(r)))
