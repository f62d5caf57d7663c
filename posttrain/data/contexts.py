"""Rows scored beside those that are learnt from: the same answers, put in another place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from posttrain.data.rows import LEARNT
from posttrain.records import Row, Source


def with_contexts(rows: Sequence[Row], contexts: Iterable[str]) -> list[Row]:
    """``rows`` and the rows of every named context, ``objective.needs.contexts``.  Raises ``ValueError`` for a context nobody makes."""
    out = list(rows)
    for name in sorted(contexts):
        if name not in MAKERS:
            raise ValueError(f"the loss asks for rows in the context {name!r}; known are {', '.join(MAKERS)}")
        out, more = MAKERS[name](out)
        out += more
    return out


def mismatched(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Every answer under the prompt of another row: the next one, in order and cyclic, whose prompt differs.

    What makes an answer likely under any prompt is left in its log-ratio, what answers the prompt is not: its mean estimates the KL to the
    reference.  A row and the answer put under its prompt share a group, so that they meet in one optimizer step.  Source: KTO, arXiv 2402.01306.

    Raises ``ValueError`` when all prompts are the same: an answer under its own prompt would estimate something else.
    """
    own = [i for i, row in enumerate(rows) if not row.context]
    sources = {i: _sources(rows[i]) for i in own}
    cuts = {i: _prompt_length(sources[i]) for i in own}
    prompts = {i: tuple(rows[i].ids[: cuts[i]]) for i in own}
    if len(set(prompts.values())) < 2:
        raise ValueError(
            f"{len(own)} answers to one prompt: to estimate the KL, an answer must be put under another prompt; raise rollout.prompts_per_step, so "
            "that every step holds two different prompts, or lower learner.updates_per_batch"
        )
    out, more = list(rows), []
    for place, i in enumerate(own):
        j = next(j for j in (*own[place + 1 :], *own[:place]) if prompts[j] != prompts[i])
        asked, answer, cut = rows[i], rows[j], cuts[j]
        group = asked.group if asked.group is not None else f"mismatched {i}"
        out[i] = asked if asked.group is not None else replace(asked, group=group)
        more.append(
            Row(
                ids=[*prompts[i], *answer.ids[cut:]],
                sources=[Source.prompt] * cuts[i] + sources[j][cut:],
                trainable=[False] * cuts[i] + _trainable(answer, sources[j])[cut:],
                sample_id=f"{answer.sample_id} under {asked.sample_id}",
                group=group,
                finish=answer.finish,
                context="mismatched",
            )
        )
    return out, more


def _sources(row: Row) -> list[Source]:
    given = [Source.demo] * len(row.ids) if row.sources is None else row.sources
    return [Source[s] if isinstance(s, str) else Source(s) for s in given]


def _trainable(row: Row, sources: Sequence[Source]) -> list[bool]:
    return [s in LEARNT for s in sources] if row.trainable is None else list(row.trainable)


def _prompt_length(sources: Sequence[Source]) -> int:
    """Leading tokens that are the prompt's; a row that begins with its answer keeps one token, which nothing predicts."""
    length = next((t for t, source in enumerate(sources) if source != Source.prompt), len(sources))
    return max(length, 1)


def without_thought(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Of every group the text alone: its prompt, then the given words (of source ``tool``) that stand behind what was sampled.

    Source: the baseline of RLP, arXiv 2510.01265.  Raises ``ValueError`` for a row without a group that has such words.
    """
    seen, more = set(), []
    for row in rows:
        sources = _sources(row)
        cut, last = _prompt_length(sources), max((t for t, on in enumerate(_trainable(row, sources)) if on), default=len(sources))
        words = [t for t in range(last + 1, len(sources)) if sources[t] == Source.tool]
        if row.context or not words or row.group in seen:
            continue
        if row.group is None:
            raise ValueError(f"sample {row.sample_id!r} is in no group, so the words behind its thought cannot be read without one")
        seen.add(row.group)
        ids = [*row.ids[:cut], *(row.ids[t] for t in words)]
        flags = [False] * cut + [True] * len(words)
        name = f"{row.group} without a thought"
        more.append(Row(ids=ids, sources=[Source.prompt] * cut + [Source.tool] * len(words), trainable=flags, sample_id=name, group=row.group, context="without_thought"))
    return list(rows), more


MAKERS: dict[str, Callable[[Sequence[Row]], tuple[list[Row], list[Row]]]] = {"mismatched": mismatched, "without_thought": without_thought}
