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
from posttrain.records import Group, Prompt, Rollout, Score


def to_lists(
    rows: Iterable[Mapping[str, Any]], renderer: Renderer, *, max_length: int | None = None, truncation: Truncation = "error"
) -> tuple[list[Group], Report]:
    """One group per row from the columns ``prompt``, ``completions`` (a list of answers) and ``scores`` (a number for each).

    An answer's score is its reward, and its advantage as it stands.  ``prompts`` in the place of ``prompt`` gives every answer a prompt of its own, and ``labels``
    (name -> a list of numbers) says more about each answer: a further reward column per name.  Left out and counted, whole rows each: ``too_few_answers`` (fewer than two),
    ``empty_answer``, ``too_long``, ``no_trainable_tokens``.
    """
    report, unique, groups = Report("lists"), Unique(), []
    for number, row in enumerate(rows):
        row = {**row, **{key: value for key, value in (row.get("meta") or {}).items() if key in ("prompts", "labels")}}
        own = "prompts" in row
        need(row, number, ("prompts" if own else "prompt", "completions", "scores"), "a scored list")
        name = row_id(row, "prompts" if own else "prompt", "completions", "tools")
        answers, scores = list(row["completions"]), _numbers(row["scores"], "scores", row, number, name)
        labels = {key: _numbers(values, f"labels.{key}", row, number, name) for key, values in (row.get("labels") or {}).items()}
        prompts = list(row["prompts"]) if own else [row["prompt"]] * len(answers)
        if len(prompts) != len(answers):
            raise DataError(f"row {number} (id {name}) has {len(answers)} completions but {len(prompts)} prompts")
        if len(answers) < 2 or any(map(empty, answers)):
            report.drop("too_few_answers" if len(answers) < 2 else "empty_answer")
            continue
        fitted = [
            fit(
                renderer.answer(prompts[i], answer, row.get("tools"), loss_on="completion"),
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
        prompt = make_prompt(row_id(row, "prompts" if own else "prompt", "messages", "tools"), encoded[0].ids[:shared], prompts[0], row)
        key = unique(name)
        report.keep(sum(len(e.ids) for e in encoded), sum(e.num_trainable for e in encoded))
        texts = [a if isinstance(a, str) else "" for a in answers]
        rollouts = [
            _answer(f"{key}/{i}", prompt, *known, {label: values[i] for label, values in labels.items()})
            for i, known in enumerate(zip(encoded, scores, texts, strict=True))
        ]
        groups.append(Group(prompt, tuple(rollouts)))
    if unique.repeated:
        report.events["repeated_ids"] = unique.repeated
    report.check()
    return groups, report


def _numbers(values: Any, what: str, row: Mapping[str, Any], number: int, name: str) -> list[float]:
    answers = row["completions"]
    for value, column in ((answers, "completions"), (values, what)):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise DataError(f"row {number} (id {name}): {column} must be a list, not {type(value).__name__}")
    if len(answers) != len(values):
        raise DataError(f"row {number} (id {name}) has {len(answers)} completions but {len(values)} {what}")
    bad = [s for s in values if not isinstance(s, (bool, int, float)) or not math.isfinite(s)]
    if bad:
        singular = "score" if what == "scores" else f"{what} of"
        raise DataError(f"row {number} (id {name}) has the {singular} {bad[0]!r}; {what} must be finite numbers")
    return [float(s) for s in values]


def _answer(name: str, prompt: Prompt, encoded: Encoded, score: float, text: str, labels: Mapping[str, float]) -> Rollout:
    n = len(prompt.ids)
    rest = Encoded(encoded.ids[n:], encoded.sources[n:], encoded.trainable[n:], encoded.turn[n:])
    return Rollout(name, prompt, rest.segments(), finish="given", text=text, reward=score, advantage=score, scores={k: Score(v) for k, v in labels.items()})
