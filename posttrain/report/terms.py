"""``docs/loss.md`` from the docstrings: the shipped losses as four words each, then every term.

python -c "from posttrain.report.terms import write; write('docs/loss.md')"
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain import contrib
from posttrain.advantage import group, pick, shape, step
from posttrain.loss import Objective, advantage, aggregate, likelihood, load, mask, reference, regularizer, value
from posttrain.paths import CONFIGS

CHAPTERS: tuple[tuple[str, ModuleType], ...] = (
    ("Likelihood", likelihood),
    ("Reference", reference),
    ("Advantage", advantage),
    ("Advantage of scalar heads", value),
    ("Masks", mask),
    ("Aggregation", aggregate),
    ("Regularisers", regularizer),
    ("Advantages from rewards", group),
    ("Advantages over the whole step", step),
    ("Advantages of singled-out samples", pick),
    ("Rewards shaped by the group", shape),
)
CHAPTERS += tuple(
    (f"Contributed: {found.name.replace('_', ' ')}", import_module(f"posttrain.contrib.{found.name}"))
    for found in pkgutil.iter_modules(contrib.__path__)
)

HEAD = """\
# The loss

<!-- Written by posttrain.report.terms from the docstrings; a test holds the two together. -->

Whatever an objective `J` is, if it depends on the policy only through the log-probabilities `l` of given tokens, its gradient is a sum over
tokens of a number times `grad l`. That number is a product of independent choices:

    grad J = sum over tokens of  aggregate * weight * masks * (pi / pi_ref) * A * grad log pi

A *stream* selects tokens by where they came from and names the choices; a loss is a map of streams, plus regularisers. Everything but `log pi` is
computed without gradient, so `loss = -sum sg(number) * log pi`. Denominators count the whole optimizer step, over all micro-batches and ranks:
the gradient does not depend on how the batch is sliced. An advantage above 0 raises the probability. Coefficients are numbers or schedules
(`{_target_: posttrain.mixture.schedule.Linear, start: 0.1, end: 0.0}`). The loss value is comparable within one method only; `objective` and
`nll` are logged beside it.

`posttrain explain loss=NAME` prints a composed loss as an equation with every number. [add_a_term.md](add_a_term.md) shows how to write a term.

## Shipped losses

"""


def terms(module: ModuleType) -> dict[str, type]:
    """The public classes a module defines, in reading order."""
    return {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls) and not name.startswith("_")
    }


def loss_markdown() -> str:
    """The whole page."""
    return HEAD + _table() + "".join(_chapter(title, module) for title, module in CHAPTERS)


def write(path: str | Path) -> None:
    """Write the page to ``path``."""
    Path(path).write_text(loss_markdown(), encoding="utf-8")


def _table() -> str:
    rows = ["| loss | stream | reference | advantage | masks | aggregation | needs |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for path in sorted((CONFIGS / "loss").glob("*.yaml")):
        rows += _rows(path.stem, load(path.stem))
    return "\n".join(rows) + "\n"


def _rows(name: str, objective: Objective) -> list[str]:
    out = []
    for stream_name, stream in objective.streams.items():
        ratio = "" if stream.likelihood.ratio == "token" else f", {stream.likelihood.ratio} ratio"
        masks = ", ".join(_word(m) for m in stream.masks.values()) or "none"
        words = [f"`{name}`", stream_name, _word(stream.reference) + ratio, _word(stream.advantage), masks, _word(stream.aggregation)]
        out.append("| " + " | ".join([*words, ", ".join(sorted(objective.needs.references)) or "nothing"]) + " |")
    return out


def _word(term: Any) -> str:
    """The class and the settings that differ from its defaults."""
    changed = [f"{f.name}={_plain(getattr(term, f.name))}" for f in dataclasses.fields(term) if getattr(term, f.name) != f.default]
    return type(term).__name__ + (f"({', '.join(changed)})" if changed else "")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_plain(v)}' for k, v in value.items())}}}"
    if dataclasses.is_dataclass(value):
        return _word(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _chapter(title: str, module: ModuleType) -> str:
    parts = [f"\n## {title}\n\n{_markdown(inspect.getdoc(module) or '')}\n"]
    for name, cls in terms(module).items():
        doc = _markdown(inspect.getdoc(cls) or "")
        parts.append(f"\n### `{module.__name__}.{name}`\n\n    {_signature(cls)}\n\n{doc}\n")
    return "".join(parts)


def _signature(cls: type) -> str:
    fields = dataclasses.fields(cls)
    shown = [f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}" for f in fields]
    return f"{cls.__name__}({', '.join(shown)})"


def _markdown(doc: str) -> str:
    """Docstring marks to Markdown: roles and double backticks to single ones, labelled lines to paragraphs of their own."""
    doc = re.sub(r":\w+:`([^`]+)`", r"`\1`", doc).replace("``", "`")
    return re.sub(
        r"\n(?=(Source|Wrong when): )",
        "\n\n",
        re.sub(r"(?m)^(Equation|Source|Wrong when): ", r"*\1:* ", doc.replace("\nSource:", "\n\nSource:")),
    )
