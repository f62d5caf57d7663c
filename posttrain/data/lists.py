"""Rows become scored lists: several given answers to one prompt, each with a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.data.columns import Unique, need, row_id
from posttrain.data.demos import Truncation, empty, fit
from posttrain.data.files import DataError
from posttrain.data.prompts import make_prompt
from posttrain.data.render import Encoded, Renderer
from posttrain.data.report import Report
from posttrain.data.template import shared_length
from posttrain.records import Group, Prompt, Rollout


def to_lists(
    rows: Iterable[Mapping[str, Any]], renderer: Renderer, *, max_length: int | None = None, truncation: Truncation = "error"
) -> tuple[list[Group], Report]:
    """One group per row from the columns ``prompt``, ``completions`` (a list of answers) and ``scores`` (a number for each).

    An answer's score is its reward, and its advantage as it stands.  Left out and counted, whole rows each: ``too_few_answers`` (fewer than two),
    ``empty_answer``, ``too_long``, ``no_trainable_tokens``.
    """
    report, unique, groups = Report("lists"), Unique(), []
    for number, row in enumerate(rows):
        need(row, number, ("prompt", "completions", "scores"), "a scored list")
        name = row_id(row, "prompt", "completions", "tools")
        answers, scores = list(row["completions"]), _scores(row, number, name)
        if len(answers) < 2 or any(map(empty, answers)):
            report.drop("too_few_answers" if len(answers) < 2 else "empty_answer")
            continue
        fitted = [
            fit(
                renderer.answer(row["prompt"], answer, row.get("tools"), loss_on="completion"),
                max_length,
                truncation,
                f"answer {i} of row {number} (id {name})",
            )
            for i, answer in enumerate(answers)
        ]
        if reason := next((r for r, _ in fitted if r), None):
            report.drop(reason)
            continue
        encoded = [e for _, e in fitted]
        shared = min(shared_length(encoded[0].prompt_ids, e.prompt_ids) for e in encoded)
        prompt = make_prompt(row_id(row, "prompt", "messages", "tools"), encoded[0].ids[:shared], row["prompt"], row)
        key = unique(name)
        report.keep(sum(len(e.ids) for e in encoded), sum(e.num_trainable for e in encoded))
        texts = [a if isinstance(a, str) else "" for a in answers]
        rollouts = [_answer(f"{key}/{i}", prompt, *known) for i, known in enumerate(zip(encoded, scores, texts, strict=True))]
        groups.append(Group(prompt, tuple(rollouts)))
    if unique.repeated:
        report.events["repeated_ids"] = unique.repeated
    report.check()
    return groups, report


def _scores(row: Mapping[str, Any], number: int, name: str) -> list[float]:
    answers, scores = row["completions"], row["scores"]
    for value, what in ((answers, "completions"), (scores, "scores")):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise DataError(f"row {number} (id {name}): {what} must be a list, not {type(value).__name__}")
    if len(answers) != len(scores):
        raise DataError(f"row {number} (id {name}) has {len(answers)} completions but {len(scores)} scores")
    bad = [s for s in scores if not isinstance(s, (bool, int, float)) or not math.isfinite(s)]
    if bad:
        raise DataError(f"row {number} (id {name}) has the score {bad[0]!r}; scores must be finite numbers")
    return [float(s) for s in scores]


def _answer(name: str, prompt: Prompt, encoded: Encoded, score: float, text: str) -> Rollout:
    n = len(prompt.ids)
    rest = Encoded(encoded.ids[n:], encoded.sources[n:], encoded.trainable[n:], encoded.turn[n:])
    return Rollout(name, prompt, rest.segments(), finish="given", text=text, reward=score, advantage=score)
