"""Rows become prompts: questions to sample answers to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from posttrain.data.columns import Unique, need, row_id
from posttrain.data.files import DataError
from posttrain.data.render import Renderer, Text
from posttrain.data.report import Report
from posttrain.records import Prompt


def to_prompts(
    rows: Iterable[Mapping[str, Any]],
    renderer: Renderer,
    *,
    max_prompt_tokens: int | None = None,
    truncation: Literal["error", "drop"] = "error",
) -> tuple[list[Prompt], Report]:
    """One prompt per row.  A prompt is never cut: one longer than ``max_prompt_tokens`` is an error, or dropped and counted (``too_long``).

    ``Prompt.text`` is the question as people read it: the string prompt, or the last user message.
    """
    report, unique, prompts = Report("prompts"), Unique(), []
    for number, row in enumerate(rows):
        given = prompt_of(row, number)
        if not given or (isinstance(given, str) and not given.strip()):
            report.drop("empty_prompt")
            continue
        encoded = renderer.prompt(given, row.get("tools"))
        name = row_id(row, "prompt", "messages", "tools")
        if max_prompt_tokens is not None and len(encoded.ids) > max_prompt_tokens:
            if truncation != "drop":
                raise DataError(
                    f"the prompt of row {number} (id {name}) has {len(encoded.ids)} tokens, more than max_prompt_tokens={max_prompt_tokens}; "
                    "raise the limit, shorten the prompt, or set truncation=drop to leave such rows out (prompts are never cut)"
                )
            report.drop("too_long")
            continue
        report.keep(len(encoded.ids))
        report.events.update(encoded.events)
        messages = None if isinstance(given, str) else tuple(given)
        prompts.append(make_prompt(unique(name), encoded.ids, given, row, messages))
    if unique.repeated:
        report.events["repeated_ids"] = unique.repeated
    report.check()
    return prompts, report


def prompt_of(row: Mapping[str, Any], number: int) -> Text:
    """The question in a row: ``prompt``, or ``messages`` without a last assistant turn."""
    if "prompt" not in row and "messages" in row:
        messages = list(row["messages"])
        return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    need(row, number, ("prompt",), "a prompt")
    return row["prompt"]


def make_prompt(name: str, ids: tuple[int, ...], given: Text, row: Mapping[str, Any], messages: Any = None) -> Prompt:
    """The record, with the row's verdict columns and every unused column in ``meta``."""
    if not isinstance(given, str):
        said = [m.get("content") for m in given if m.get("role") == "user"]
        text = said[-1] if said and isinstance(said[-1], str) else ""
    else:
        text = given
    level = row.get("level")
    return Prompt(
        id=name,
        ids=ids,
        text=text,
        answer=row.get("answer"),
        messages=messages,
        env=str(row.get("env", "default")),
        level=level if isinstance(level, int) else None,
        meta=dict(row.get("meta", {})),
    )
