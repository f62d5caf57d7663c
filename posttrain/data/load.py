"""One entry for data: a source and a kind in, records and a report out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from posttrain.data.columns import Columns
from posttrain.data.demos import to_demos
from posttrain.data.files import SKIP, DataError, Record, Rows, read_rows
from posttrain.data.gsm8k import ADAPTERS
from posttrain.data.lists import to_lists
from posttrain.data.pairs import to_pairs
from posttrain.data.prompts import to_prompts
from posttrain.data.render import LossOn, Renderer
from posttrain.data.report import Report
from posttrain.data.steps import to_steps
from posttrain.data.stored import to_stored
from posttrain.records import Demo, Group, Pair, Prompt

Kind = Literal["prompts", "demos", "pairs", "lists", "steps", "stored"]


class NothingUsable(DataError):
    """Every one of the ``read`` rows was left out."""

    def __init__(self, message: str, read: int) -> None:
        super().__init__(message)
        self.read = read


@dataclass(frozen=True)
class SourceSpec:
    """Where rows are and how to read them.

    ``path``: file, folder or Hugging Face id; or ``source``: an object with ``rows()``.  ``columns``: our name -> the data set's.
    ``adapter``: a name of ``ADAPTERS`` or a callable from rows to rows, for data sets with a form of their own.  ``limit``: at most
    so many rows.  ``chat``, ``variables``, ``add_eos`` and ``allowed_special`` are the renderer's; ``system`` and ``prompt_template``
    override those of the run.
    """

    path: str | None = None
    source: Any = None
    split: str = "train"
    subset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    adapter: Any = None
    limit: int | None = None
    system: str | None = None
    prompt_template: str | None = None
    chat: bool | Literal["auto"] = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_eos: bool = True
    allowed_special: tuple[str, ...] = ()


def load_data(
    kind: Kind,
    source: SourceSpec | Mapping[str, Any] | str | Rows | Iterable[Record],
    tokenizer: Any,
    *,
    max_prompt_tokens: int | None = None,
    max_length: int | None = None,
    truncation: Literal["error", "drop", "end"] = "error",
    loss_on: LossOn = "assistant",
    system: str | None = None,
    prompt_template: str | None = None,
    name: str = "data",
) -> tuple[list[Prompt] | list[Demo] | list[Pair] | list[Group], Report]:
    """Read, rename, render and check a data set.

    ``max_prompt_tokens`` bounds prompts, ``max_length`` demonstrations and each side of a pair.  ``truncation`` says what happens beyond:
    ``error``, ``drop`` (counted) or ``end`` (cut the end, counted; prompts are never cut, so for them it means ``error``).

    Raises :class:`DataError` (a ``ValueError``) that begins with ``name`` for whatever makes the data unusable: nothing there,
    unreadable, a missing column, no rows, no row left.
    """
    spec = as_spec(source, name)
    try:
        renderer = Renderer(
            tokenizer, chat=spec.chat, variables=spec.variables, add_eos=spec.add_eos, allowed_special=tuple(spec.allowed_special)
        )
        skipped: Counter[str] = Counter()
        columns = Columns(spec.columns, spec.system or system, spec.prompt_template or prompt_template)
        rows = columns.apply(_rows(spec, skipped))
        records: Any
        if kind == "prompts":
            limit: Literal["error", "drop"] = "drop" if truncation == "drop" else "error"
            records, report = to_prompts(rows, renderer, max_prompt_tokens=max_prompt_tokens, truncation=limit)
        elif kind == "demos":
            records, report = to_demos(rows, renderer, max_length=max_length, truncation=truncation, loss_on=loss_on)
        elif kind == "pairs":
            records, report = to_pairs(rows, renderer, max_length=max_length, truncation=truncation)
        elif kind == "lists":
            records, report = to_lists(rows, renderer, max_length=max_length, truncation=truncation)
        elif kind == "steps":
            records, report = to_steps(rows, renderer, max_length=max_length, truncation=truncation)
        elif kind == "stored":
            records, report = to_stored(rows, renderer, max_length=max_length, truncation=truncation)
        else:
            raise DataError(f"unknown kind {kind!r}; choose prompts, demos, pairs, lists, steps or stored")
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    for reason, count in skipped.items():
        report.read += count
        report.dropped[reason] += count
    report.name = name
    report.check()
    if not report.read:
        raise DataError(f"{name} is empty: {_describe(spec)} holds no rows")
    if not records:
        raise NothingUsable(f"{name} has no usable row ({report}); loosen the limits or look at the reasons above", report.read)
    return records, report


def as_spec(source: Any, name: str = "data") -> SourceSpec:
    """A mapping with the fields of :class:`SourceSpec`, a path, a ready object, or rows themselves.  Unknown keys name their nearest."""
    if isinstance(source, SourceSpec):
        return source
    if source is None:
        raise DataError(f"{name} is not set; give a file, a Hugging Face id, or an object with rows()")
    if isinstance(source, str):
        return SourceSpec(path=source)
    if isinstance(source, Mapping):
        known = [f.name for f in fields(SourceSpec)]
        unknown = [key for key in source if key not in known]
        if unknown:
            import difflib

            near = difflib.get_close_matches(str(unknown[0]), known, n=1)
            raise DataError(
                f"unknown key {name}.{unknown[0]}; " + (f"did you mean {name}.{near[0]}?" if near else f"known keys: {', '.join(known)}")
            )
        spec = SourceSpec(**source)
        if (spec.path is None) == (spec.source is None):
            raise DataError(
                f"{name} needs exactly one of {name}.path (file, folder, Hugging Face id) and {name}.source (an object with rows())"
            )
        return spec
    return SourceSpec(source=source)


def _rows(spec: SourceSpec, skipped: Counter[str]) -> Iterator[Record]:
    adapter = spec.adapter
    if isinstance(adapter, str):
        if adapter not in ADAPTERS:
            raise DataError(f"unknown adapter {adapter!r}; known: {', '.join(ADAPTERS)}, or give a callable with _target_")
        adapter = ADAPTERS[adapter]()
    rows: Iterable[Record] = read_rows(spec.path if spec.path is not None else spec.source, split=spec.split, subset=spec.subset)
    if adapter is not None:
        rows = adapter(rows)

    def counted() -> Iterator[Record]:
        for row in rows:
            if SKIP in row:
                skipped[row[SKIP]] += 1
            else:
                yield row

    return itertools.islice(counted(), spec.limit)


def _describe(spec: SourceSpec) -> str:
    return str(spec.path) if spec.path is not None else type(spec.source).__name__
