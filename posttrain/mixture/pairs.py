"""Preference pairs from answers sampled now: gates that turn scored groups into pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.mixture.demos import Demos
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Segment, Source

PAIRED, TIED = "became_pairs", "no_preference"
"""Why a group is not learnt from as such; its rewards stay in the report."""


@dataclass(frozen=True)
class BestWorst:
    """The best answer of a group against the worst.

    Source: online DPO with two samples, arXiv 2402.04792; best against worst of several, self-rewarding models, arXiv 2401.10020.

    ``metric``: the combined ``reward``, or the name of a score.  ``gap``: the least difference that is a preference; ties, and groups with
    fewer than two scored answers, teach nothing and are counted as ``no_preference``.  The first of equals is taken.

    Wrong when: the judge is noisy and ``gap`` is 0: a coin decides.
    """

    metric: str = "reward"
    gap: float = 0.0
    uses_demos = False
    makes_pairs = True

    def __post_init__(self) -> None:
        if not self.gap >= 0:
            raise ValueError(f"mixture.gate.gap={self.gap} must not be negative")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out, pairs = [], []
        for item in items:
            if isinstance(item, Group) and item.dropped is None:
                pair = self._pair(item)
                pairs += [pair] if pair else []
                item = replace(item, dropped=PAIRED if pair else TIED)
            out.append(item)
        return [*out, *pairs]

    def _pair(self, group: Group) -> Pair | None:
        scored = [(value, r) for r in group.rollouts if (value := value_of(r, self.metric)) is not None]
        if not scored:
            return None
        best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
        if not best[0] - worst[0] > self.gap:
            return None
        return Pair(group.id, as_demo(best[1]), as_demo(worst[1]))


@dataclass(frozen=True)
class GivenAgainstSampled:
    """The data's answer to a prompt against the policy's own answers to it.

    Source: ``chosen="given"``, SPIN, arXiv 2401.01335; ``chosen="better"``, a pair of the policy's sample and the base's, XPO, arXiv 2405.21046.

    ``chosen``: which side is preferred: always the ``given`` answer, or the ``better`` of the two by ``metric`` (ties teach nothing).
    ``metric``: the combined ``reward``, or the name of a score.  ``given``: the column of the given answer's row that holds its own value of
    the metric, for ``better``: ``score`` or one left in the row.  ``missing``: a prompt without a given answer is left out (``drop``) or
    stops the run (``error``).

    Wrong when: the policy already answers as the data does: the pair then teaches its wording.
    """

    chosen: Literal["given", "better"] = "given"
    metric: str = "reward"
    given: str = "score"
    missing: Literal["drop", "error"] = "error"
    uses_demos = True
    makes_pairs = True

    def __post_init__(self) -> None:
        if self.chosen not in ("given", "better"):
            raise ValueError(f"mixture.gate.chosen={self.chosen!r} does not exist; choose given or better")
        if self.missing not in ("drop", "error"):
            raise ValueError(f"mixture.gate.missing={self.missing!r} does not exist; choose drop or error")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out, pairs = [], []
        for item in items:
            if isinstance(item, Group) and item.dropped is None:
                found = self._pairs(item, demos, step)
                pairs += found
                item = replace(item, dropped=PAIRED if found else TIED)
            out.append(item)
        return [*out, *pairs]

    def _pairs(self, group: Group, demos: Demos, step: int) -> list[Pair]:
        given = demos.one_of(group.prompt, step)
        if given is None:
            if self.missing == "error":
                raise ValueError(f"prompt {group.id!r} has no given answer in data.demos; give one, or set mixture.gate.missing=drop to leave it out")
            return []
        out = []
        for number, rollout in enumerate(group.rollouts):
            own = as_demo(rollout)
            if _answer(own) == _answer(given):
                continue
            sides = self._sides(given, own, value_of(rollout, self.metric))
            out += [Pair(f"{group.id}/{number}", *sides)] if sides else []
        return out

    def _sides(self, given: Demo, own: Demo, value: float | None) -> tuple[Demo, Demo] | None:
        if self.chosen == "given":
            return given, own
        known = given.rewards.get(self.given, (given.prompt.meta if given.prompt else {}).get(self.given))
        if known is None:
            raise ValueError(f"the given answer {given.id!r} has no number {self.given!r} to compare with (mixture.gate.given)")
        if value is None or value == float(known):
            return None
        return (own, given) if value > float(known) else (given, own)


def value_of(rollout: Rollout, metric: str) -> float | None:
    """The combined reward of a rollout or one of its scores; None when nobody could say."""
    score = rollout.scores.get(metric)
    return rollout.reward if metric == "reward" else score.value if score else None


def as_demo(rollout: Rollout) -> Demo:
    """A rollout in the form of a given text: its tokens keep their source, log-probabilities and version."""
    prompt: Prompt = rollout.prompt
    rewards = {name: score.value for name, score in rollout.scores.items() if score.value is not None}
    if rollout.reward is not None:
        rewards["reward"] = rollout.reward
    segments = (Segment(prompt.ids, Source.prompt, trainable=False), *rollout.segments)
    return Demo(rollout.sample_id, segments, prompt=prompt, rewards=rewards, finish=rollout.finish)


def _answer(demo: Demo) -> tuple[int, ...]:
    """All its tokens: two texts with one prompt are the same answer when they are the same tokens."""
    return tuple(i for segment in demo.segments for i in segment.ids)
