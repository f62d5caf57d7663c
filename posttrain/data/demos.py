"""Rows become demonstrations: given answers to learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from posttrain.data.columns import Unique, need, row_id
from posttrain.data.files import DataError
from posttrain.data.prompts import make_prompt, prompt_of
from posttrain.data.render import Encoded, LossOn, Renderer
from posttrain.data.report import Report
from posttrain.records import Demo

Truncation = Literal["error", "drop", "end"]


def to_demos(
    rows: Iterable[Mapping[str, Any]],
    renderer: Renderer,
    *,
    max_length: int | None = None,
    truncation: Truncation = "error",
    loss_on: LossOn = "assistant",
) -> tuple[list[Demo], Report]:
    """One demonstration per row; ``Demo.prompt`` is what stands before the first token learnt, with the id that a prompt of this row has.

    With ``loss_on=expert`` a turn of the learner's own that says what the expert would have done (``expert``) gives one more: the conversation up to there, then
    that (delusion-free masking, arXiv 2110.10819).

    Left out and counted: ``too_long`` (with ``truncation=drop``), ``no_trainable_tokens`` (no assistant turn, or none left after the cut),
    ``empty_answer``, ``empty_prompt``.
    """
    report, unique, demos = Report("demos"), Unique(), []
    for number, row in enumerate(_relabelled(rows) if loss_on == "expert" else rows):
        reason, encoded = _encode(row, number, renderer, loss_on)
        name = row_id(row, "prompt", "completion", "messages", "text", "tools")
        if encoded is not None:
            reason, fitted = fit(encoded, max_length, truncation, f"row {number} (id {name})")
        if encoded is None or reason is not None:
            report.drop(reason or "empty")
            continue
        weight = float(row.get("weight", 1.0))
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"row {number} (id {name}) has weight {row['weight']!r}; weights must be finite and not negative")
        report.keep(len(fitted.ids), fitted.num_trainable, truncated=len(fitted.ids) < len(encoded.ids))
        report.events.update(fitted.events)
        prompt = None
        if "text" not in row or "prompt" in row or "messages" in row:
            given = prompt_of(row, number)
            prompt = make_prompt(row_id(row, "prompt", "messages", "tools"), fitted.prompt_ids, given, row)
        rewards = {key: row["rewards"][key] for key in ("label", "score") if key in row.get("rewards", {})}
        demos.append(Demo(unique(name), fitted.segments(), weight, prompt, rewards))
    if unique.repeated:
        report.events["repeated_ids"] = unique.repeated
    report.check()
    return demos, report


def _relabelled(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Every row, and after it one more for each of its own turns that the expert has an answer to."""
    for row in rows:
        yield row
        messages = row.get("messages") or ()
        for i, message in enumerate(messages):
            if isinstance(message, Mapping) and message.get("by") == "own" and message.get("expert") is not None:
                before = [{**m, "by": "own"} if m.get("role") == "assistant" else m for m in messages[:i]]
                own = {"id": f"{row['id']}/{i}"} if "id" in row else {}
                yield {**row, **own, "messages": [*before, {"role": "assistant", "content": message["expert"], "by": "expert"}], "finish": None}


def _encode(row: Mapping[str, Any], number: int, renderer: Renderer, loss_on: LossOn) -> tuple[str | None, Encoded | None]:
    complete, tools = row.get("finish") != "length", row.get("tools")
    if loss_on in ("expert", "environment") and not isinstance(row.get("messages"), list):
        raise DataError(f"row {number} has no messages, so it cannot say who acted; data.loss_on={loss_on} is for transcripts (choose loss_on=assistant)")
    if "prompt" in row and "completion" in row:
        if empty(row["completion"]):
            return "empty_answer", None
        return None, renderer.answer(row["prompt"], row["completion"], tools, loss_on=loss_on, complete=complete)
    if "messages" in row:
        return None, renderer.conversation(row["messages"], tools, loss_on=loss_on, complete=complete) if row["messages"] else None
    if "text" in row and "prompt" not in row:
        return ("empty_answer", None) if empty(row["text"]) else (None, renderer.text(row["text"]))
    need(row, number, ("prompt", "completion"), "a demonstration (messages, or prompt and completion, or text)")
    raise AssertionError("unreachable")


def empty(answer: Any) -> bool:
    """Nothing said: an empty string or list."""
    return not answer or (isinstance(answer, str) and not answer.strip())


def fit(encoded: Encoded, max_length: int | None, truncation: Truncation, where: str) -> tuple[str | None, Encoded]:
    """The text within the limit, or the reason to leave it out.  ``end`` cuts the end, never the beginning."""
    if max_length is not None and len(encoded.ids) > max_length:
        if truncation == "error":
            raise DataError(
                f"{where} has {len(encoded.ids)} tokens, more than max_length={max_length}; raise the limit, or set truncation=drop "
                "(leave such rows out) or truncation=end (cut their end); both are counted in the report"
            )
        if truncation == "drop":
            return "too_long", encoded
        if truncation != "end":
            raise DataError(f"unknown truncation {truncation!r}; choose error, drop or end")
        encoded = encoded.cut(max_length)
    return (None if encoded.num_trainable else "no_trainable_tokens"), encoded
