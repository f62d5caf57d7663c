"""The demonstrations a gate may let in: drawn in the order of the run's sampler, or looked up by the prompt they answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from posttrain.records import Demo, Prompt


class Demos:
    """``sampler`` has ``next(count) -> indices``; without one, nothing can be drawn but everything can be looked up.

    A demonstration answers a prompt when the two have one id, or the same tokens (two data sets need not agree on ids).
    """

    def __init__(self, demos: Sequence[Demo] = (), sampler: Any = None) -> None:
        self.all = tuple(demos)
        self.sampler = sampler
        self._by_id = {demo.id: demo for demo in self.all}
        self._by_prompt: dict[Any, list[Demo]] = defaultdict(list)
        for demo in self.all:
            if demo.prompt is not None:
                for key in (demo.prompt.id, demo.prompt.ids):
                    self._by_prompt[key].append(demo)

    def __len__(self) -> int:
        return len(self.all)

    def draw(self, count: int) -> list[Demo]:
        """The next ``count`` demonstrations.  Raises ``ValueError`` when there are none to draw."""
        if count and self.sampler is None:
            raise ValueError("a gate asks for demonstrations, but there are none: give data.demos.path=FILE")
        return [self.all[i] for i in self.sampler.next(count)] if count else []

    def of(self, prompt: Prompt) -> tuple[Demo, ...]:
        """The demonstrations of a prompt, in the order of the data; none is an empty tuple."""
        return tuple(self._by_prompt.get(prompt.id) or self._by_prompt.get(prompt.ids) or ())

    def one_of(self, prompt: Prompt, step: int) -> Demo | None:
        """One of them, another at every step."""
        found = self.of(prompt)
        return found[step % len(found)] if found else None

    def named(self, name: str) -> Demo:
        """The demonstration with this id.  Raises ``KeyError`` saying what a resumed run needs."""
        if name not in self._by_id:
            raise KeyError(f"there is no demonstration {name!r} in data.demos: resume with the data the run began with")
        return self._by_id[name]
