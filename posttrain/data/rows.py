"""Groups, demonstrations and pairs become rows: one row per sequence, one entry per token.

This is the last place where a token's history is looked at.  Nothing is tokenised here: the ids are those that were sampled or rendered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.data.report import Report
from posttrain.records import NO_EXPERT, Demo, Group, Pair, Rollout, Row, Segment, Source

LEARNT = (Source.policy, Source.demo, Source.prefix)


def to_rows(items: Iterable[Group | Demo | Pair], report: Report | None = None) -> list[Row]:
    """Rows of everything that can be learnt from, in order.  ``report`` counts sequences kept and dropped, by reason.

    * Group: one row per rollout, the prompt's ids first.  Left out: rollouts without an advantage (``no_advantage``: the verifier failed,
      or the group has no baseline) and all rollouts of a group that a gate dropped (its own reason).
    * Demo: one row.
    * Pair: the chosen row, then the rejected row; both or neither.

    Rows with no trainable token are left out (``no_trainable_tokens``).  A group or pair id that occurs twice keeps its sets apart.
    """
    report = Report() if report is None else report
    seen: Counter[tuple[str, str]] = Counter()
    rows: list[Row] = []
    for item in items:
        if isinstance(item, Group):
            rows += _group_rows(item, _unique(seen, "group", item.id), report)
        elif isinstance(item, Demo):
            rows += _kept([_demo_row(item)], report)
        elif isinstance(item, Pair):
            key = _unique(seen, "pair", item.id)
            both = [_demo_row(demo, pair=key, side=side) for demo, side in ((item.chosen, "chosen"), (item.rejected, "rejected"))]
            rows += _kept(both, report)
        else:
            raise TypeError(f"to_rows takes Group, Demo or Pair, not {type(item).__name__}")
    return rows


def _unique(seen: Counter[tuple[str, str]], kind: str, key: str) -> str:
    seen[kind, key] += 1
    return key if seen[kind, key] == 1 else f"{key}#{seen[kind, key]}"


def _group_rows(group: Group, key: str, report: Report) -> list[Row]:
    rows = []
    for rollout in group.rollouts:
        if group.dropped is not None:
            report.drop(group.dropped)
        elif rollout.advantage is None:
            report.drop("no_advantage")
        else:
            rows += _kept([_rollout_row(rollout, key)], report)
    return rows


def _kept(rows: list[Row], report: Report) -> list[Row]:
    """The rows, or none of them when one has nothing to learn (the first token of a sequence is never predicted)."""
    learnt = [sum(row.trainable[1:]) for row in rows]  # type: ignore[index]
    if not all(learnt):
        for _ in rows:
            report.drop("no_trainable_tokens")
        return []
    for row, n in zip(rows, learnt, strict=True):
        report.keep(len(row.ids), n)
    return rows


def _rollout_row(rollout: Rollout, key: str) -> Row:
    rewards = {name: score.value for name, score in rollout.scores.items() if score.value is not None}
    if rollout.reward is not None:
        rewards["reward"] = rollout.reward
    prompt = Segment(ids=rollout.prompt.ids, source=Source.prompt, trainable=False)
    return Row(
        **_tokens((prompt, *rollout.segments), rollout.sample_id),
        advantage=[*[0.0] * len(prompt.ids), *rollout.paid] if rollout.placed and rollout.paid is not None else float(rollout.advantage),  # type: ignore[arg-type]
        rewards=rewards,
        sample_id=rollout.sample_id,
        group=key,
        finish=rollout.finish,
        routing=None if rollout.routing is None else _aligned(rollout.routing, len(prompt.ids) + rollout.num_tokens),
    )


def _aligned(routing: Tensor, length: int) -> Tensor:
    """Exactly ``length`` entries: tokens that came after the engine's last word have none."""
    missing = max(length - len(routing), 0)
    return torch.cat([routing[:length], routing.new_full((missing, *routing.shape[1:]), NO_EXPERT)])


def _demo_row(demo: Demo, pair: str | None = None, side: Literal["chosen", "rejected"] | None = None) -> Row:
    name = demo.id if pair is None else f"{pair}/{side}"
    labelled = any(s.label is not None for s in demo.segments)
    labels = [0.0 if s.label is None else s.label for s in demo.segments for _ in s.ids]
    return Row(
        **_tokens(demo.segments, name), advantage=labels if labelled else 1.0, weight=demo.weight, rewards=demo.rewards, sample_id=name, pair=pair, side=side, finish=demo.finish
    )


def _tokens(segments: Sequence[Segment], name: str) -> Mapping[str, Any]:
    """The per-token columns of a list of segments.

    ``trainable=True`` for a whole segment means "if its source is learnt from", so a tool's output is not learnt by default; one flag per
    token is taken as it is, which is how the loss can be put on observations.
    """
    out: dict[str, list[Any]] = {"ids": [], "sources": [], "trainable": [], "turn": [], "version": []}
    behaviour: list[float] = []
    inputs: list[int] = []
    stored: list[Any] = []
    for segment in segments:
        n = len(segment.ids)
        if segment.logprobs is not None and len(segment.logprobs) != n:
            raise ValueError(f"sample {name!r}: a segment has {n} tokens but {len(segment.logprobs)} log-probabilities")
        flags = segment.trainable
        if isinstance(flags, tuple):
            if len(flags) != n:
                raise ValueError(f"sample {name!r}: a segment has {n} tokens but {len(flags)} trainable flags")
            out["trainable"] += flags
        else:
            out["trainable"] += [flags and segment.source in LEARNT] * n
        if segment.inputs is not None and len(segment.inputs) != n:
            raise ValueError(f"sample {name!r}: a segment has {n} tokens but {len(segment.inputs)} inputs")
        inputs += segment.ids if segment.inputs is None else segment.inputs
        stored += [None] * n if segment.stored is None else segment.stored
        out["ids"] += segment.ids
        out["sources"] += [segment.source] * n
        out["turn"] += [segment.turn] * n
        out["version"] += [-1 if segment.version is None else segment.version] * n
        behaviour += [math.nan] * n if segment.logprobs is None else segment.logprobs
    logps = {"behaviour": behaviour} if any(s.logprobs is not None for s in segments) else {}
    return {
        **out,
        "logps": logps,
        "inputs": inputs if any(s.inputs is not None for s in segments) else None,
        "stored": stored if any(s.stored is not None for s in segments) else None,
    }
