"""Second answers, written with a critique in sight, become what is learnt under the first prompt; critiques become something to predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.records import Demo, Group, Rollout, Segment, Source

REWRITTEN = "learnt_without_critique"


@dataclass(frozen=True)
class WithoutCritique:
    """Learn the last answer of an episode as if it had been the first: prompt, then answer, and nothing in between.

    Equation: ``A_i = R(y1_i) - mean_j R(y0_j)`` on the tokens of ``y1``, scored under the first prompt, without a ratio; beside them the critiques
    as text to predict after the first answer.
    Source: RLTF, arXiv 2602.02482.

    ``first``, ``last``: the rewards of the first and the last answer, by name (``reward=two_turns`` has turn_1 and turn_2).  ``critiques``: whether what the
    environment said is learnt too.  Episodes that ended with the first answer, or whose rewards failed, are left out; they still count in the mean.

    Wrong when: the last answer speaks of the critique: the policy learns to mention what nobody said.  Without a ratio it is a biased imitation step.
    """

    first: str = "turn_1"
    last: str = "turn_2"
    critiques: bool = True
    uses_demos = False
    makes_demos = True

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out: list[Any] = []
        for item in items:
            if not isinstance(item, Group) or item.dropped is not None:
                out.append(item)
                continue
            learnt, texts = self._rewritten(item)
            out += [replace(item, rollouts=learnt, dropped=None if any(r.advantage is not None for r in learnt) else "no_second_answer"), *texts]
        return out

    def _rewritten(self, group: Group) -> tuple[tuple[Rollout, ...], list[Demo]]:
        first = [v for r in group.rollouts if (v := _score(r, self.first)) is not None]
        baseline = math.fsum(first) / len(first) if first else None
        learnt, texts = [], []
        for rollout in group.rollouts:
            value, parts = _score(rollout, self.last), _parts(rollout)
            if parts is None or value is None or baseline is None:
                learnt.append(replace(rollout, advantage=None))
                continue
            own = tuple(replace(s, source=Source.demo, logprobs=None, version=None, turn=0) for s in parts[2])
            learnt.append(replace(rollout, segments=own, routing=None, advantage=value - baseline, paid=None))
            if self.critiques:
                texts.append(_critique(rollout, *parts[:2]))
        return tuple(learnt), texts


def _score(rollout: Rollout, name: str) -> float | None:
    score = rollout.scores.get(name)
    if score is None and rollout.scores:
        raise ValueError(f"sample {rollout.sample_id!r} has no reward {name!r} (it has {', '.join(rollout.scores)}); name them in mixture.gate.first and last")
    return None if score is None else score.value


def _parts(rollout: Rollout) -> tuple[list[Segment], list[Segment], list[Segment]] | None:
    """What was said before the last reply, the reply, and the answer to it; None when nothing was answered."""
    replies = [i for i, s in enumerate(rollout.segments) if s.source == Source.tool]
    if not replies or replies[-1] + 1 == len(rollout.segments) or rollout.finish not in ("stop", "length"):
        return None
    last = replies[-1]
    return list(rollout.segments[:last]), [rollout.segments[last]], list(rollout.segments[last + 1 :])


def _critique(rollout: Rollout, before: Sequence[Segment], reply: Sequence[Segment]) -> Demo:
    """The reply as text to predict; the answer it speaks of is only read."""
    read = [replace(s, source=Source.prompt, trainable=False, logprobs=None, version=None) for s in before]
    said = [replace(s, trainable=(True,) * len(s.ids)) for s in reply]
    prompt = Segment(rollout.prompt.ids, Source.prompt, trainable=False)
    return Demo(f"{rollout.sample_id}/critique", (prompt, *read, *said), prompt=rollout.prompt)
