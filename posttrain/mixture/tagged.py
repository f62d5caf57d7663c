"""Every answer is learnt, good or bad, under a prompt that says how it came out; answers are asked for under the word for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Success
from posttrain.records import Group, Rollout, Segment, Source

Ids = tuple[int, ...]


@dataclass(frozen=True)
class OutcomeTag:
    """Maximum likelihood of (tag, question, answer, what the verifier said), the tag telling good answers from bad ones.

    Equation: ``J = log pi(answer | tag(outcome), question) + log pi(feedback | tag(outcome), question, answer)``.
    Source: LeTI, arXiv 2305.10314 (abstract only; where the tag stands, and feedback from a verdict's ``detail``, are our reading).

    ``good``: the words that stand once in every prompt (``data.prompt_template="good\\n{question}"``), so that answers are sampled, and evaluated,
    under them.  ``bad``: what takes their place, where the model reads them, for an answer that failed; nothing else changes.  ``feedback``: the
    reward whose ``detail`` is learnt behind the answer (an interpreter's text); null for none.  ``max_feedback_tokens``: longer ones are cut.
    ``success``: what is good.  ``encode``: text to tokens, given by the run.

    Answers become given text with advantage 1, without a ratio; the loss decides which parts are learnt (``loss=leti``).  Answers without a verdict
    leave the step.

    Wrong when: all answers are good, or all bad: the tag then says nothing.
    """

    good: str
    bad: str
    feedback: str | None = None
    max_feedback_tokens: int = 128
    success: Success = field(default_factory=Success)
    encode: Callable[[str], Sequence[int]] | None = None
    uses_demos = False
    makes_demos = True

    def __post_init__(self) -> None:
        if not self.good or not self.bad or self.good == self.bad:
            raise ValueError(f"mixture.gate.good={self.good!r} and bad={self.bad!r} must be two different words")
        if self.max_feedback_tokens < 1:
            raise ValueError(f"mixture.gate.max_feedback_tokens={self.max_feedback_tokens} must be at least 1; feedback=null learns none")

    def with_encode(self, encode: Callable[[str], Sequence[int]]) -> OutcomeTag:
        return replace(self, encode=encode)

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        return [self._group(item) if isinstance(item, Group) and item.dropped is None else item for item in items]

    def _group(self, group: Group) -> Group:
        rollouts = tuple(self._tagged(r) for r in group.rollouts)
        return replace(group, rollouts=rollouts, dropped=None if any(r.advantage is not None for r in rollouts) else "no_verdict")

    def _tagged(self, rollout: Rollout) -> Rollout:
        solved = self.success.of(rollout)
        if solved is None:
            return replace(rollout, advantage=None)
        prompt = rollout.prompt if solved else replace(rollout.prompt, ids=self._swapped(rollout.prompt.ids, rollout.prompt.id))
        own = [replace(s, source=Source.demo, logprobs=None, version=None) if s.source == Source.policy else s for s in rollout.segments]
        return replace(rollout, prompt=prompt, segments=(*own, *self._said(rollout)), advantage=1.0, paid=None, routing=None)

    def _said(self, rollout: Rollout) -> list[Segment]:
        """The verifier's words, as text to predict."""
        if self.feedback is None:
            return []
        if self.feedback not in rollout.scores:
            raise ValueError(
                f"sample {rollout.sample_id!r} has no reward {self.feedback!r} (it has {', '.join(sorted(rollout.scores)) or 'none'}); name one in "
                "mixture.gate.feedback"
            )
        ids = self._ids(rollout.scores[self.feedback].detail)[: self.max_feedback_tokens]
        return [Segment(ids, Source.tool, trainable=(True,) * len(ids))] if ids else []

    def _swapped(self, ids: Ids, name: str) -> Ids:
        """The prompt's tokens with the one tag in the place of the other."""
        good, bad = self._ids(self.good), self._ids(self.bad)
        places = [i for i in range(len(ids) - len(good) + 1) if ids[i : i + len(good)] == good]
        if len(places) != 1:
            raise ValueError(
                f"the tokens of mixture.gate.good={self.good!r} stand {len(places)} times in prompt {name!r}, and not once; put the word in "
                "data.prompt_template, on a line of its own, so that it is tokenised alone"
            )
        return (*ids[: places[0]], *bad, *ids[places[0] + len(good) :])

    def _ids(self, text: str) -> Ids:
        assert self.encode is not None, "a run gives the gate its encode"
        return tuple(self.encode(text)) if text else ()
