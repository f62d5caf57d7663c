"""Gates that choose one text per prompt to imitate: the best of the model's own, or a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import REPLACED, Success, as_rollout
from posttrain.records import Demo, Group, Rollout


@dataclass(frozen=True)
class FirstAccepted:
    """One target per prompt: the model's own answer if it is right, else a given one.

    Source: S3FT, arXiv 2502.08130 (own answer, own paraphrase of the reference, reference), decided at every step instead of once.

    ``prefer``: the order of given answers, by the value of their row's column ``kind_column`` (a row without it comes last); they are taken
    as right, so a paraphrase must have been judged when the data was made.  ``success``: when an own answer is right; its advantage is 1,
    the others of its group are not learnt from.

    Wrong when: the verifier accepts empty or unreadable answers: the model imitates them.
    """

    prefer: tuple[str, ...] = ()
    kind_column: str = "kind"
    success: Success = field(default_factory=Success)
    uses_demos = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefer", (self.prefer,) if isinstance(self.prefer, str) else tuple(self.prefer))

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        return [one for item in items for one in (self._route(item, demos) if isinstance(item, Group) else [item])]

    def _route(self, group: Group, demos: Demos) -> list[Any]:
        right = next((i for i, r in enumerate(group.rollouts) if self.success.of(r)), None)
        if right is not None:
            rollouts = tuple(replace(r, advantage=1.0 if i == right else None, placed=False) for i, r in enumerate(group.rollouts))
            return [replace(group, rollouts=rollouts)]
        given = sorted(demos.of(group.prompt), key=self._rank)[:1]
        return [replace(group, dropped=REPLACED if given else "nothing_accepted"), *given]

    def _rank(self, demo: Demo) -> int:
        kind = demo.prompt.meta.get(self.kind_column) if demo.prompt else None
        return self.prefer.index(kind) if kind in self.prefer else len(self.prefer)


@dataclass(frozen=True)
class RightOnly:
    """What is right about a prompt: the own answers that are, and the given ones, in one group with advantage 1.

    Source: learning from self-sampled correct programs, arXiv 2205.14318.

    ``repeats``: whether answers with the same tokens count each (a repeated answer then takes a larger share).  ``success``: when an own answer is right.

    Wrong when: the group is cut by a limit on tokens: answers of one prompt must be weighed together (the learner then takes two passes).
    """

    repeats: bool = False
    success: Success = field(default_factory=Success)
    uses_demos = True

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        return [self._gather(item, demos) if isinstance(item, Group) else item for item in items]

    def _gather(self, group: Group, demos: Demos) -> Group:
        seen: set[tuple[int, ...]] = set()

        def judged(rollout: Rollout, right: bool) -> Rollout:
            ids = tuple(i for s in rollout.segments for i in s.ids)
            counts = right and (self.repeats or ids not in seen)
            seen.update([ids] if right else [])
            return replace(rollout, advantage=1.0 if counts else None, placed=False)

        given = [judged(as_rollout(demo), True) for demo in demos.of(group.prompt)]
        own = [judged(r, bool(self.success.of(r))) for r in group.rollouts]
        return replace(group, rollouts=(*own, *given), dropped=None if given or any(r.advantage for r in own) else "nothing_accepted")
