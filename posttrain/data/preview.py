"""A record as people can check it: its text in colour, what is learnt from marked, and the lengths of the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from posttrain.data.report import Report
from posttrain.data.rows import LEARNT
from posttrain.records import Demo, Group, Pair, Prompt, Segment, Source

STYLES = {
    Source.prompt: "dim", Source.policy: "green", Source.demo: "green", Source.prefix: "cyan", Source.tool: "magenta", Source.pad: "red",
}  # fmt: skip


def preview(record: Prompt | Demo | Pair | Group, tokenizer: Any, console: Any = None) -> None:
    """Print one record: learnt tokens bold and underlined (between ``[+`` and ``+]`` without colours), each source in its own."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console(highlight=False)
    for title, segments in _parts(record):
        runs = runs_of(segments, tokenizer)
        learnt = sum(n for _, _, flag, n in runs if flag)
        total = sum(n for _, _, _, n in runs)
        console.print(f"[bold]{escape(title)}[/bold] [dim]{total} tokens, {learnt} learnt[/dim]")
        shown = []
        for text, source, flag, _ in runs:
            style = STYLES[source] + (" bold underline" if flag else "")
            text = f"[+{text}+]" if flag and not console.is_terminal else text
            shown.append(f"[{style}]{escape(text)}[/{style}]")
        console.print("".join(shown), soft_wrap=True)


def runs_of(segments: Sequence[Segment], tokenizer: Any) -> list[tuple[str, Source, bool, int]]:
    """``(text, source, learnt, num_tokens)`` for each run of tokens with one source and one flag, control tokens shown."""
    runs: list[tuple[list[int], Source, bool]] = []
    for segment in segments:
        whole = bool(segment.trainable) and segment.source in LEARNT
        flags = segment.trainable if isinstance(segment.trainable, tuple) else (whole,) * len(segment.ids)
        for token, flag in zip(segment.ids, flags, strict=True):
            if not runs or runs[-1][1:] != (segment.source, flag):
                runs.append(([], segment.source, flag))
            runs[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), source, flag, len(ids)) for ids, source, flag in runs]


def _parts(record: Prompt | Demo | Pair | Group) -> list[tuple[str, Sequence[Segment]]]:
    if isinstance(record, Prompt):
        answer = "" if record.answer is None else f", answer {record.answer!r}"
        return [(f"prompt {record.id}{answer}", [Segment(record.ids, Source.prompt, trainable=False)])]
    if isinstance(record, Demo):
        return [(f"demonstration {record.id}", record.segments)]
    if isinstance(record, Pair):
        return [(f"{side} {record.id}", demo.segments) for side, demo in (("chosen", record.chosen), ("rejected", record.rejected))]
    start = Segment(record.prompt.ids, Source.prompt, trainable=False)
    return [(f"rollout {r.sample_id}, reward {r.reward}", (start, *r.segments)) for r in record.rollouts]


def length_statistics(report: Report) -> str:
    """Quantiles and a histogram of the kept rows' lengths, as lines of text."""
    if not report.lengths:
        return "no rows"
    lines = [
        f"tokens per row: {', '.join(f'{q:.0%} {report.quantile(q)}' for q in (0.05, 0.25, 0.5, 0.75, 0.95))}, max {max(report.lengths)}"
    ]
    edges = [0]
    while edges[-1] <= max(report.lengths):
        edges.append(max(edges[-1] * 2, 16))
    counts = [sum(a <= n < b for n in report.lengths) for a, b in pairwise(edges)]
    for (a, b), count in zip(pairwise(edges), counts, strict=True):
        if count:
            lines.append(f"{a:>7} to {b - 1:<7} {count:>7} {'#' * max(round(40 * count / max(counts)), 1)}")
    return "\n".join(lines)
