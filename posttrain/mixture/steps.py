"""The first step that spoilt an answer against a step that goes on well, told apart by what becomes of answers continued from there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Success
from posttrain.mixture.pairs import PAIRED, TIED, value_of
from posttrain.records import Demo, Group, Pair, Rollout, Segment, Source

Ids = tuple[int, ...]


@dataclass(frozen=True)
class FirstBadStep:
    """Of a wrong answer the first step that lowered what the answer is worth, against a step from the same place that did not.

    Equation: ``Q(prefix) = mean R of the answers continued from it``; step ``k`` is bad when ``A_k = Q(steps 1..k) - Q(steps 1..k-1) < -gap``.  The
    pair: the first step of the first right answer continued from ``steps 1..k-1``, and step ``k``, both behind the same prefix, of which nothing is
    learnt.
    Source: per-step negatives, arXiv 2406.14532 (secondary); the rule for the first bad step, ``gap`` and ``least`` are our reading.

    ``success``: what is solved, and whose ``metric`` is averaged.  ``gap``: by how much the bad step must lower Q, and the good step must be ahead
    of it; equal Q is never a pair.  ``least``: answers from which a Q may be estimated, 2 or more: with one, noise selects the step.  Where fewer
    got a verdict nothing is said. ``answers``: how many wrong answers of a group are looked at.  A step that ends its answer is worth what the
    answer earned.  Both sides carry their Q as the reward ``score``.

    Wrong when: few continuations and a small ``gap`` meet: of many steps one always looks bad.  It needs ``rollout=continued``, which samples the
    continuations.
    """

    success: Success = field(default_factory=Success)
    gap: float = 0.25
    least: int = 2
    answers: int = 1
    uses_demos = False
    makes_pairs = True
    needs_continuations = True

    def __post_init__(self) -> None:
        if not self.gap >= 0:
            raise ValueError(f"mixture.gate.gap={self.gap} must not be negative")
        if self.least < 2:
            raise ValueError(f"mixture.gate.least={self.least}: from one rollout no Q can be estimated, noise would select the step; give 2 or more")
        if self.answers < 1:
            raise ValueError(f"mixture.gate.answers={self.answers} must be at least 1")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out, pairs = [], []
        for item in items:
            if isinstance(item, Group) and item.dropped is None:
                found = self._pairs(item)
                pairs += found
                item = replace(item, dropped=PAIRED if found else TIED)
            out.append(item)
        return [*out, *pairs]

    def wanted(self, group: Group, ends: Callable[[Ids], Sequence[int]]) -> list[Ids]:
        """The prefixes whose worth must still be known; ``ends(ids)``: where the steps of an answer end, in tokens, the last one left out.

        At first those behind every step of the wrong answers; once a bad step is known, the one behind the good step.
        """
        values, wrong = self._values(group), self._wrong(group)
        asked = [ids[:end] for ids in map(ids_of, wrong) for end in ends(ids)]
        missing = [p for p in dict.fromkeys(asked) if p not in values]
        if missing:
            return missing
        good = []
        for rollout in wrong:
            if (place := self._first_bad(rollout, values)) and (other := self._good(group, rollout, *place)):
                ids, start = ids_of(other), place[0]
                good += [ids[:end] for end in ends(ids) if end > start][:1]
        return [p for p in dict.fromkeys(good) if p not in values]

    # -- what is known ------------------------------------------------------------------------------------------------------
    def _values(self, group: Group) -> dict[Ids, list[float]]:
        """What the answers continued from each prefix earned; the empty prefix has the answers sampled from the prompt."""
        found: dict[Ids, list[float]] = defaultdict(list)
        for rollout in group.rollouts:
            value = value_of(rollout, self.success.metric)
            found[begun_with(rollout)] += [] if value is None else [value]
        return dict(found)

    def _wrong(self, group: Group) -> list[Rollout]:
        return [r for r in group.rollouts if not begun_with(r) and self.success.of(r) is False][: self.answers]

    def _worth(self, rollout: Rollout, end: int, values: dict[Ids, list[float]]) -> float | None:
        """Q behind so many tokens of an answer; None where too few continuations were judged."""
        if end == len(ids := ids_of(rollout)):
            return value_of(rollout, self.success.metric)
        found = values.get(ids[:end], [])
        return math.fsum(found) / len(found) if len(found) >= self.least else None

    def _first_bad(self, rollout: Rollout, values: dict[Ids, list[float]]) -> tuple[int, int] | None:
        """Where the first bad step begins and ends.  An unknown Q before one is found leaves it open which is the first."""
        ids = ids_of(rollout)
        ends = [*(n for n in range(1, len(ids)) if ids[:n] in values), len(ids)]
        before = self._worth(rollout, 0, values)
        for start, end in zip([0, *ends], ends, strict=False):
            after = self._worth(rollout, end, values)
            if before is None or after is None:
                return None
            if before - after > self.gap:
                return start, end
            before = after
        return None

    def _good(self, group: Group, bad: Rollout, start: int, end: int) -> Rollout | None:
        """The first right answer that was continued from where the bad step begins, and took another step."""
        prefix, step = ids_of(bad)[:start], ids_of(bad)[:end]
        others = (r for r in group.rollouts if begun_with(r) == prefix and self.success.of(r))
        return next((r for r in others if ids_of(r)[:end] != step), None)

    # -- what is made of it -------------------------------------------------------------------------------------------------
    def _pairs(self, group: Group) -> list[Pair]:
        values, out = self._values(group), []
        for number, rollout in enumerate(self._wrong(group)):
            place = self._first_bad(rollout, values)
            other = self._good(group, rollout, *place) if place else None
            if place is None or other is None:
                continue
            (start, end), ids = place, ids_of(other)
            until = next((n for n in range(start + 1, len(ids)) if ids[:n] in values), len(ids))
            good, bad = self._worth(other, until, values), self._worth(rollout, end, values)
            if good is not None and bad is not None and good - bad > self.gap:
                out.append(Pair(f"{group.id}/{number}", one_step(other, start, until, good), one_step(rollout, start, end, bad)))
        return out


def begun_with(rollout: Rollout) -> Ids:
    """The tokens that were given to an answer as its beginning."""
    return tuple(i for s in rollout.segments if s.source == Source.prefix for i in s.ids)


def ids_of(rollout: Rollout) -> Ids:
    return tuple(i for s in rollout.segments for i in s.ids)


def one_step(rollout: Rollout, start: int, end: int, worth: float) -> Demo:
    """Tokens ``start`` to ``end`` of an answer, to be learnt from as sampled; those before are read and carry no weight, those behind are gone."""
    before = Segment(ids_of(rollout)[:start], Source.prefix, trainable=False)
    segments = (Segment(rollout.prompt.ids, Source.prompt, trainable=False), *([before] if start else []), *_between(rollout.segments, start, end))
    finish = rollout.finish if end == len(ids_of(rollout)) else "stop"
    return Demo(f"{rollout.sample_id}/{start}-{end}", segments, prompt=rollout.prompt, rewards={"score": worth}, finish=finish)


def _between(segments: Iterable[Segment], start: int, end: int) -> list[Segment]:
    out, place = [], 0
    for segment in segments:
        low, high = max(start - place, 0), min(end - place, len(segment.ids))
        if low < high:
            logprobs = None if segment.logprobs is None else segment.logprobs[low:high]
            out.append(replace(segment, ids=segment.ids[low:high], logprobs=logprobs))
        place += len(segment.ids)
    return out
