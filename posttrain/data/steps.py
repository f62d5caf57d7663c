"""Rows become answers whose steps are labelled: what process reward models learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.data.columns import Unique, need, row_id
from posttrain.data.demos import Truncation, empty
from posttrain.data.files import DataError
from posttrain.data.prompts import make_prompt
from posttrain.data.render import Renderer
from posttrain.data.report import Report
from posttrain.records import Demo, Segment, Source

SEPARATOR = "\n"
"""What stands behind every step, and is part of it."""


def to_steps(
    rows: Iterable[Mapping[str, Any]], renderer: Renderer, *, max_length: int | None = None, truncation: Truncation = "error"
) -> tuple[list[Demo], Report]:
    """One demonstration per row from the columns ``prompt``, ``completions`` (the steps, in order) and ``labels`` (of each: true or false, or how often
    an answer that goes on from there is right, from 0 to 1).

    Every step is tokenised by itself with a line break behind it, so that a step always ends where a token does; that token alone is marked.  Left out and
    counted: ``no_steps``, ``empty_step``, ``too_long``; ``truncation=end`` leaves out the steps that do not fit.
    """
    report, unique, demos = Report("steps"), Unique(), []
    for number, row in enumerate(rows):
        need(row, number, ("prompt", "completions", "labels"), "an answer in steps")
        name = row_id(row, "prompt", "completions", "tools")
        steps, labels = list(row["completions"]), _labels(row, number, name)
        if not steps or any(map(empty, steps)):
            report.drop("empty_step" if steps else "no_steps")
            continue
        asked = renderer.prompt(row["prompt"], row.get("tools"))
        parts = [renderer.plain("", step + SEPARATOR, complete=False).ids[len(renderer.bos) :] for step in steps]
        fitting = _fitting(len(asked.ids), parts, max_length)
        if fitting < len(parts) and truncation == "error":
            raise DataError(
                f"row {number} (id {name}) has {len(asked.ids) + sum(map(len, parts))} tokens, more than max_length={max_length}; raise the limit, or set "
                "truncation=drop (leave such rows out) or truncation=end (leave their last steps out); both are counted in the report"
            )
        if not fitting or (fitting < len(parts) and truncation == "drop"):
            report.drop("too_long")
            continue
        prompt = Segment(asked.ids, Source.prompt, trainable=False)
        segments = [
            Segment(ids, Source.demo, turn=i, trainable=(False,) * (len(ids) - 1) + (True,), label=label)
            for i, (ids, label) in enumerate(zip(parts[:fitting], labels, strict=False))
        ]
        report.keep(len(asked.ids) + sum(len(s.ids) for s in segments), len(segments), truncated=fitting < len(parts))
        report.events.update(asked.events)
        record = make_prompt(row_id(row, "prompt", "messages", "tools"), asked.ids, row["prompt"], row)
        demos.append(Demo(unique(name), (prompt, *segments), float(row.get("weight", 1.0)), record))
    if unique.repeated:
        report.events["repeated_ids"] = unique.repeated
    report.check()
    return demos, report


def _fitting(used: int, parts: Sequence[Sequence[int]], limit: int | None) -> int:
    """How many steps fit."""
    for count, part in enumerate(parts):
        used += len(part)
        if limit is not None and used > limit:
            return count
    return len(parts)


def _labels(row: Mapping[str, Any], number: int, name: str) -> list[float]:
    steps, labels = row["completions"], row["labels"]
    for value, what in ((steps, "completions"), (labels, "labels")):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise DataError(f"row {number} (id {name}): {what} must be a list, not {type(value).__name__}")
    if len(steps) != len(labels):
        raise DataError(f"row {number} (id {name}) has {len(steps)} steps (completions) but {len(labels)} labels")
    if wrong := [s for s in steps if not isinstance(s, str)]:
        raise DataError(f"row {number} (id {name}): a step must be text, not {type(wrong[0]).__name__}")
    bad = [x for x in labels if not isinstance(x, (bool, int, float)) or not math.isfinite(x)]
    if bad:
        raise DataError(f"row {number} (id {name}) has the label {bad[0]!r}; labels are true, false, or numbers")
    return [float(x) for x in labels]
