"""Rows become preference pairs: two answers to one prompt, the first preferred."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.data.columns import Unique, need, row_id
from posttrain.data.demos import Truncation, empty, fit
from posttrain.data.files import DataError
from posttrain.data.prompts import make_prompt
from posttrain.data.render import Encoded, Renderer, Text
from posttrain.data.report import Report
from posttrain.data.template import shared_length
from posttrain.records import Demo, Pair


def to_pairs(
    rows: Iterable[Mapping[str, Any]], renderer: Renderer, *, max_length: int | None = None, truncation: Truncation = "error"
) -> tuple[list[Pair], Report]:
    """One pair per row; only what follows the common prompt is compared.  ``Report`` counts pairs, and tokens of both sides together.

    The prompt is the ``prompt`` column; where ``chosen`` and ``rejected`` are whole conversations, or there is no prompt, it is their
    common beginning (whole messages; in plain strings, up to the last white space before they differ).

    Left out and counted: ``identical`` (also when equal after the cut), ``empty_answer``, ``too_long``, ``no_trainable_tokens``.
    """
    report, unique, pairs = Report("pairs"), Unique(), []
    for number, row in enumerate(rows):
        need(row, number, ("chosen", "rejected"), "a pair")
        name = row_id(row, "prompt", "chosen", "rejected", "tools")
        prompt, chosen, rejected, chat = split(row, number)
        if row["chosen"] == row["rejected"] or empty(row["chosen"]) or empty(row["rejected"]):
            report.drop("identical" if row["chosen"] == row["rejected"] else "empty_answer")
            continue
        sides = [_encode(renderer, prompt, answer, row.get("tools"), chat) for answer in (chosen, rejected)]
        fitted = [
            fit(side, max_length, truncation, f"the {what} side of row {number} (id {name})")
            for side, what in zip(sides, SIDES, strict=True)
        ]
        reason = next((r for r, _ in fitted if r), None) or ("identical" if fitted[0][1].ids == fitted[1][1].ids else None)
        if reason:
            report.drop(reason)
            continue
        good, bad = fitted[0][1], fitted[1][1]
        cut = len(good.ids) < len(sides[0].ids) or len(bad.ids) < len(sides[1].ids)
        report.keep(len(good.ids) + len(bad.ids), good.num_trainable + bad.num_trainable, truncated=cut)
        report.events.update({*good.events, *bad.events})
        weight = float(row.get("weight", 1.0))
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"row {number} (id {name}) has weight {row['weight']!r}; weights must be finite and not negative")
        key = unique(name)
        shared = good.prompt_ids[: shared_length(good.prompt_ids, bad.prompt_ids)]
        asked = row_id({**row, "prompt": prompt}, "prompt", "messages", "tools")
        record = make_prompt(asked, shared, prompt, row)
        kept = zip((good, bad), SIDES, strict=True)
        pairs.append(Pair(key, *(Demo(f"{key}/{what}", e.segments(), weight, record, rewards_of(row, what)) for e, what in kept)))
    if unique.repeated:
        report.events["repeated_ids"] = unique.repeated
    report.check()
    return pairs, report


SIDES = ("chosen", "rejected")


def rewards_of(row: Mapping[str, Any], side: str) -> dict[str, float]:
    """What is known of one side: its own ``score``, and on the chosen side what is known of the pair (the rejected side has margin 0)."""
    given = row.get("rewards", {})
    out = {"score": given[f"{side}_score"]} if f"{side}_score" in given else {}
    if "margin" in given:
        out["margin"] = given["margin"] if side == "chosen" else 0.0
    return out | {name: given[name] for name in ("label", "deviation") if name in given and side == "chosen"}


def split(row: Mapping[str, Any], number: int) -> tuple[Text, Text, Text, bool]:
    """``(prompt, chosen, rejected, chat)``: the common prompt and what each side adds.  ``chat=False`` keeps plain strings plain."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"row {number}: chosen and rejected must both be text or both be lists of messages")
    if isinstance(chosen, str):
        if prompt is not None:
            return prompt, chosen, rejected, True
        shared = chosen[: shared_length(chosen, rejected)]
        start = max((i + 1 for i, c in enumerate(shared) if c.isspace()), default=0)
        while start and shared[start - 1] == " ":
            start -= 1  # a space belongs to the word after it: that is how tokenizers cut
        return chosen[:start], chosen[start:], rejected[start:], False
    whole = all(len(side) > 0 and side[0].get("role") != "assistant" for side in (chosen, rejected))
    if prompt is not None and not whole:
        return prompt, chosen, rejected, True
    n = shared_length(chosen, rejected)
    while n and n == min(len(chosen), len(rejected)) and chosen[n - 1].get("role") == "assistant":
        n -= 1  # one conversation is the other's beginning: what both answer is not part of the prompt
    return chosen[:n], chosen[n:], rejected[n:], True


def _encode(renderer: Renderer, prompt: Text, answer: Text, tools: Any, chat: bool) -> Encoded:
    if not chat:
        return renderer.plain(str(prompt), str(answer))
    return renderer.answer(prompt, answer, tools, loss_on="completion")
