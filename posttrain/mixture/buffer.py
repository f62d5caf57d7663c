"""A gate that waits: demonstrations of unsolved prompts are collected and learnt together in an optimizer step of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import WAITS, Success, _choose, _without_demo
from posttrain.records import Group


@dataclass
class Buffer:
    """Prompts solved at most ``at_most`` times put their demonstration into a buffer; once it holds ``size``, that many are learnt from in a
    step that follows the rollouts' own.

    Source: ReLIFT, arXiv 2506.07527.

    ``order``: which ones are taken when more are waiting, ``newest`` or ``oldest``.  ``repeats``: whether a demonstration may wait twice; if
    not, an unsolved prompt that comes again moves to the front.  ``rollouts``: what happens to those of such a prompt, ``keep`` (a group
    without a success has advantage 0 under a group baseline) or ``drop``.  ``recheck``: a waiting prompt that is solved when it comes
    again leaves the buffer.  ``missing``, ``success``: as in :class:`posttrain.mixture.gate.Unsolved`.

    Wrong when: ``order`` is ``newest`` and more prompts fail than are learnt: the oldest wait for ever.  The separate step shares the
    optimizer's state with the others (the release keeps two).
    """

    size: int = 128
    at_most: int = 0
    order: Literal["newest", "oldest"] = "newest"
    repeats: bool = True
    rollouts: Literal["keep", "drop"] = "keep"
    recheck: bool = False
    missing: Literal["keep", "error"] = "keep"
    success: Success = field(default_factory=Success)
    waiting: list[str] = field(default_factory=list)
    uses_demos = True
    separate_step = True

    def __post_init__(self) -> None:
        _choose("order", self.order, ("newest", "oldest"))
        _choose("rollouts", self.rollouts, ("keep", "drop"))
        _choose("missing", self.missing, ("keep", "error"))
        if self.size < 1:
            raise ValueError(f"mixture.gate.size={self.size} must be at least 1")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        kept = [self._admit(item, demos, step) if isinstance(item, Group) else item for item in items]
        if len(self.waiting) < self.size:
            return kept
        taken = self.waiting[-self.size :] if self.order == "newest" else self.waiting[: self.size]
        self.waiting = self.waiting[: -self.size] if self.order == "newest" else self.waiting[self.size :]
        return [*kept, *(demos.named(name) for name in taken)]

    def _admit(self, group: Group, demos: Demos, step: int) -> Group:
        solved, scored = self.success.count(group)
        if not scored:
            return group
        if solved > self.at_most:
            if self.recheck:
                own = {demo.id for demo in demos.of(group.prompt)}
                self.waiting = [name for name in self.waiting if name not in own]
            return group
        demo = demos.one_of(group.prompt, step)
        if demo is None:
            if self.missing == "error":
                raise ValueError(_without_demo(group))
            return group
        if not self.repeats:
            self.waiting = [name for name in self.waiting if name != demo.id]
        self.waiting.append(demo.id)
        return replace(group, dropped=WAITS) if self.rollouts == "drop" else group

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": list(self.waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.waiting = list(state["waiting"])
