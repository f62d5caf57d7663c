"""Column conventions: what a data set calls its columns becomes ``prompt``, ``completion``, ``messages``, ``chosen``, ``answer``, ...

Understood as they are, and by ``columns`` under any other name (``columns={prompt: question, answer: answer}``):

=========  ==========================================================================================================
prompts    ``prompt`` [``answer``], or ``messages`` (a last assistant turn is left out)
demos      ``messages``, or ``prompt`` + ``completion``, or ``text``
pairs      ``chosen`` + ``rejected``, with ``prompt`` or with the prompt as their common beginning
lists      ``prompt`` + ``completions`` + ``scores``, the last two lists of one length
steps      ``prompt`` + ``completions`` (the steps of one answer) + ``labels``, the last two lists of one length
all        ``id``, ``tools``, ``system``, ``weight``, ``level``, ``env``, and ``finish`` (``length`` marks a cut-off answer)
rewards    demos: ``label`` (0 bad to 1 good), ``score``; pairs: ``label`` (how sure that the chosen is better), ``margin``,
           ``deviation`` (of the chosen from other answers), ``chosen_score``, ``rejected_score``; numbers or booleans, and still in ``meta``
=========  ==========================================================================================================

Prompts, completions and sides of a pair are strings or lists of messages; lists may also be JSON text, as Parquet files often hold them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.files import DataError, Record

NAMES = (
    "prompt",
    "completion",
    "messages",
    "chosen",
    "rejected",
    "completions",
    "scores",
    "labels",
    "answer",
    "text",
    "id",
    "tools",
    "system",
    "weight",
    "level",
    "env",
    "finish",
)
REWARDS = ("label", "score", "margin", "deviation", "chosen_score", "rejected_score")
"""Columns of numbers about an answer or a pair; a column of this name that holds something else is not meant, unless ``columns`` says so."""

COMMON = {
    "prompt": ("question", "instruction", "problem", "query", "input"),
    "completion": ("response", "output", "solution", "answer", "target"),
    "messages": ("conversations", "conversation", "dialogue"),
    "completions": ("responses", "answers", "candidates"),
    "scores": ("rewards", "ratings"),
    "chosen": ("chosen_response", "preferred", "winner"),
    "rejected": ("rejected_response", "dispreferred", "loser"),
    "answer": ("gold", "label", "target", "ground_truth", "solution"),
    "text": ("content", "document"),
    "label": ("desirable", "is_correct", "correct"),
    "chosen_score": ("score_chosen", "chosen_rating"),
    "rejected_score": ("score_rejected", "rejected_rating"),
}
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Columns:
    """``mapping``: our name -> the data set's.  ``system`` is put before conversations that bring none; a row's own ``system`` column wins.
    ``prompt_template`` makes the prompt from columns: ``"{question}\\nAnswer:"`` (only ``{column}`` is replaced, other braces stay)."""

    mapping: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.mapping if name not in (*NAMES, *REWARDS)]
        if unknown:
            near = difflib.get_close_matches(unknown[0], (*NAMES, *REWARDS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known names: {', '.join((*NAMES, *REWARDS))}"
            raise DataError(
                f"columns maps {unknown[0]!r}, which is no column this project reads{hint} (write columns={{our name: your column}})"
            )

    def apply(self, rows: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """Rows under our names, with ``meta`` holding every other column."""
        for number, row in enumerate(rows):
            yield self._row(number, row)

    def _row(self, number: int, row: Record) -> dict[str, Any]:
        for ours, theirs in self.mapping.items():
            if theirs not in row:
                raise DataError(f"row {number} has no column {theirs!r} (columns.{ours}={theirs}); it has: {', '.join(map(str, row))}")
        taken = set(self.mapping.values())
        out = {name: row[name] for name in NAMES if name in row and name not in self.mapping and name not in taken}
        out |= {ours: row[theirs] for ours, theirs in self.mapping.items() if ours not in REWARDS}
        out = {name: value for name, value in out.items() if value is not None}
        for name in ("prompt", "completion", "messages", "chosen", "rejected", "tools"):
            if name in out:
                out[name] = _from_json(out[name])
        if self.prompt_template is not None:
            out["prompt"] = self._fill(number, row, out)
        system = out.pop("system", self.system)
        out["meta"] = {k: v for k, v in row.items() if k not in taken and k not in NAMES}
        if system is not None:
            _put_system(out, system)
        if rewards := self._rewards(number, row):
            out["rewards"] = rewards
        return out

    def _rewards(self, number: int, row: Record) -> dict[str, float]:
        """The numbers of :data:`REWARDS`.  A column named in the mapping must hold one, a column that happens to have the name need not."""
        found = {}
        for name in REWARDS:
            value, meant = row.get(self.mapping.get(name, name)), name in self.mapping
            if value is None or not (meant or isinstance(value, (bool, int, float))):
                continue
            if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
                raise DataError(f"row {number}: {name} is {value!r} (columns.{name}={self.mapping.get(name, name)}); it must be a finite number")
            found[name] = float(value)
        return found

    def _fill(self, number: int, row: Record, named: Mapping[str, Any]) -> str:
        assert self.prompt_template is not None
        values = {**named, **row}
        found = [name for name in _FIELD.findall(self.prompt_template) if name in values]
        if not found:
            raise DataError(
                f"prompt_template {self.prompt_template!r} uses no column of row {number}; it may use: "
                + ", ".join(f"{{{name}}}" for name in values)
            )
        wrong = [name for name in found if not isinstance(values[name], (str, int, float))]
        if wrong:
            raise DataError(f"row {number}: prompt_template uses {wrong[0]!r}, which is a {type(values[wrong[0]]).__name__}, not text")
        return _FIELD.sub(lambda m: str(values[m[1]]) if m[1] in values else m[0], self.prompt_template)


def need(row: Mapping[str, Any], number: int, names: Sequence[str], kind: str) -> None:
    """Raise :class:`DataError` when a row lacks one of ``names``: says what is there and which mapping would help."""
    missing = [name for name in names if name not in row]
    if not missing:
        return
    present = [name for name in row if name != "meta"] + list(row.get("meta", {}))
    guess = {name: near for name in missing if (near := next((p for p in COMMON.get(name, ()) if p in present), None))}
    shown = guess or dict.fromkeys(missing, "<your column>")
    hint = ("try" if guess else "name them with") + f" columns={{{', '.join(f'{ours}: {theirs}' for ours, theirs in shown.items())}}}"
    raise DataError(
        f"row {number} cannot be read as {kind}: no column {', '.join(map(repr, missing))} (or it is null); "
        f"the row has: {', '.join(present)}; {hint}"
    )


def _from_json(value: Any) -> Any:
    """A list of messages or tools stored as JSON text; any other string is text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            return value
        if isinstance(parsed, list) and all(isinstance(m, dict) and ("role" in m or "function" in m or "name" in m) for m in parsed):
            return parsed
    return value


def _put_system(row: dict[str, Any], system: str) -> None:
    """Put a system message first, where there is none.  A string prompt becomes a conversation."""
    message = {"role": "system", "content": system}
    if "prompt" in row:
        row["prompt"] = _after(message, row["prompt"])
    elif "completions" in row and isinstance(row["meta"].get("prompts"), (list, tuple)):  # a scored list whose answers have a prompt each
        row["meta"]["prompts"] = [_after(message, prompt) for prompt in row["meta"]["prompts"]]
    for name in ("messages", "chosen", "rejected"):
        value = row.get(name)
        if isinstance(value, list) and value and value[0].get("role") not in ("system", "assistant" if name != "messages" else "system"):
            row[name] = [message, *value]


def _after(message: Record, prompt: Any) -> list[Any]:
    """The prompt as a conversation that begins with a system message: its own, or this one."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return turns if turns and turns[0].get("role") == "system" else [message, *turns]


def row_id(row: Mapping[str, Any], *names: str) -> str:
    """The row's own ``id``, else a hash of the named columns: the same content has the same id in every run and file order."""
    if "id" in row:
        return str(row["id"])
    content = json.dumps([row.get(name) for name in names], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass
class Unique:
    """Makes ids distinct: the second ``a`` becomes ``a#2``.  ``repeated`` counts them."""

    seen: dict[str, int] = field(default_factory=dict)
    repeated: int = 0

    def __call__(self, key: str) -> str:
        self.seen[key] = self.seen.get(key, 0) + 1
        self.repeated += self.seen[key] > 1
        return key if self.seen[key] == 1 else f"{key}#{self.seen[key]}"


Adapter = Callable[[Iterable[Record]], Iterable[Record]]
"""Rows in, rows out: how a data set with a form of its own is read (see :mod:`posttrain.data.gsm8k`)."""
