"""Thoughts before the next word of a plain text: what was sampled is the thought, what follows it is the text itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.records import Group, Rollout, Segment, Source

Ids = tuple[int, ...]


@dataclass(frozen=True)
class BeforeText:
    """Behind every sampled thought stands what the text says next, to be read and not to be learnt.

    Source: RLP, arXiv 2510.01265 (abstract and a secondary source; its repository holds no code).

    ``open``: the words that end every prompt and ask for a thought (``data.train.source.open``); the text without a thought is read without them.
    ``close``: the words that end a thought (``rollout.stop``); a thought that ended otherwise gets them from here.  The next words are the prompt's
    ``answer``.  ``encode``: text to tokens, given by the run.

    Wrong when: the next words stand in the prompt: the thought then copies them.
    """

    open: str = "<think>"
    close: str = "</think>"
    encode: Callable[[str], Sequence[int]] | None = None
    uses_demos = False
    adds_text = True

    def __post_init__(self) -> None:
        if bool(self.open) != bool(self.close):
            raise ValueError(f"mixture.gate.open={self.open!r} and close={self.close!r} must both say something, or neither")

    def with_encode(self, encode: Callable[[str], Sequence[int]]) -> BeforeText:
        return replace(self, encode=encode)

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        return [replace(i, rollouts=tuple(self._followed(r) for r in i.rollouts)) if isinstance(i, Group) and i.dropped is None else i for i in items]

    def _followed(self, rollout: Rollout) -> Rollout:
        prompt, opened = rollout.prompt, self._ids(self.open)
        said = prompt.answer
        if not isinstance(said, str) or not said:
            raise ValueError(f"prompt {prompt.id!r} has no next words (answer={said!r}); posttrain.data.positions cuts texts into prompts that have")
        if opened and prompt.ids[-len(opened) :] != opened:
            raise ValueError(
                f"prompt {prompt.id!r} does not end with the tokens of mixture.gate.open={self.open!r}; give data.train.source.open the same words, and a "
                "model without a chat template, or a template that ends with them"
            )
        text = replace(prompt, ids=prompt.ids[: len(prompt.ids) - len(opened)])
        begun = [Segment(opened, Source.tool, trainable=False)] if opened else []
        closed = () if not self.close or rollout.text.rstrip().endswith(self.close) else self._ids(self.close)
        closing = [Segment(closed, Source.prompt, trainable=False)] if closed else []
        return replace(rollout, prompt=text, segments=(*begun, *rollout.segments, *closing, Segment(self._ids(said), Source.tool, trainable=False)), paid=None)

    def _ids(self, text: str) -> Ids:
        assert self.encode is not None, "a run gives the gate its encode"
        return tuple(self.encode(text)) if text else ()
