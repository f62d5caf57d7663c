"""Every shipped loss, advantage and mixture with its terms: the list of ``posttrain methods`` and the page ``docs/methods.md``.

Both are read from the files of ``configs/`` and the comments they begin with; there is no other register.

python -c "from posttrain.report.methods import write; write('docs/methods.md')"
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.loss import load
from posttrain.loss.unified import Objective, Stream
from posttrain.paths import CONFIGS
from posttrain.report.explain import equation
from posttrain.report.notes import Notes, read, source_of
from posttrain.report.terms import _markdown, _plain, _word
from posttrain.targets import OWN, locate

CHAPTERS = {"loss": "Losses", "advantage": "Advantages", "mixture": "Mixtures"}
WORDS = "likelihood | reference | advantage | masks | aggregation"


@dataclass(frozen=True)
class Method:
    """One file of ``configs/GROUP``: what its comment says, and what it makes: an objective, or the settings of an estimator or gate (none: ``None``)."""

    group: str
    name: str
    notes: Notes
    made: Any


def methods(group: str) -> Iterator[Method]:
    """The choices of a group in alphabetical order."""
    from posttrain.cli import composing

    with composing():
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            yield Method(group, path.stem, read(path.read_text(encoding="utf-8")), _make(group, path.stem))


def _make(group: str, name: str) -> Any:
    from posttrain.cli import compose_choice

    if group != "loss":
        settings = compose_choice(group, name)
        return (settings.get("gate") if group == "mixture" else settings) or None
    try:
        return compose_choice(group, name, build=True)
    except ValueError:
        return load(name)  # it reads settings of the rest of a run


# -- the list ----------------------------------------------------------------------------------------------------------------------
def lines(method: Method) -> list[str]:
    """A method as a few lines of a terminal."""
    head = method.notes.title or method.notes.about
    return [f"  {method.name}" + (f": {head.rstrip('.')}" if head else ""), *(f"      {row}" for row in rows(method))]


def rows(method: Method) -> list[str]:
    """Its terms: a stream per line and the regularisers, or the estimator, or the gate."""
    if not isinstance(method.made, Objective):
        return ["nothing" if method.made is None else word(method.made)]
    streams = [f"{name}: {' | '.join(words(stream).values())}" for name, stream in method.made.streams.items()]
    return [*streams, *(f"- {name}: {_word(term)}" for name, term in method.made.regularizers.items())]


def word(settings: Any) -> str:
    """Settings as the class they build, with those that differ from its defaults."""
    if isinstance(settings, Mapping) and "_target_" in settings:
        thing = locate(settings["_target_"], "_target_")
        usual = _defaults(thing)
        changed = {k: v for k, v in settings.items() if k not in OWN and (k not in usual or word(v) != _plain(usual[k]))}
        return thing.__name__ + (f"({', '.join(f'{k}={word(v)}' for k, v in changed.items())})" if changed else "")
    if isinstance(settings, Mapping):
        return f"{{{', '.join(f'{k}: {word(v)}' for k, v in settings.items())}}}"
    return _plain(settings)


def _defaults(thing: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(thing):
        return {n: p.default for n, p in inspect.signature(thing).parameters.items() if p.default is not p.empty}
    made = {f.name: f.default_factory() for f in dataclasses.fields(thing) if f.default_factory is not dataclasses.MISSING}
    return {**made, **{f.name: f.default for f in dataclasses.fields(thing) if f.default is not dataclasses.MISSING}}


def words(stream: Stream) -> dict[str, str]:
    """The choices of a stream by name, each as a class with the settings that differ from its defaults."""
    four = {"likelihood": stream.likelihood, "reference": stream.reference, "advantage": stream.advantage}
    out = {name: _word(term) for name, term in four.items()}
    return {**out, "masks": ", ".join(map(_word, stream.masks.values())) or "none", "aggregation": _word(stream.aggregation)}


# -- the page ----------------------------------------------------------------------------------------------------------------------
HEAD = """\
# The methods

<!-- Written by posttrain.report.methods from configs/ and the docstrings; a test holds them together. -->

Every loss, advantage and mixture that is shipped, with its terms. A method is a file of `configs/`; the comment it begins with says where it comes
from, what it is run with, and what releases and frameworks do differently (or what is our reading of a paper, or unverified). Where nothing is
noted, no difference is known to us, which is not the same as none. `posttrain methods` prints the list, `posttrain explain loss=NAME` one loss with
the weight of a token drawn over its probability and its advantage. [loss.md](loss.md) has the terms themselves: equation, source, settings, when
they are wrong.

An equation is the gradient of the stream: the constant of the aggregation, masks, importance factor, advantage, `grad l`.

"""


def methods_markdown() -> str:
    """The whole page."""
    return HEAD + "\n".join(_chapter(group, title) for group, title in CHAPTERS.items())


def write(path: str | Path) -> None:
    """Write the page to ``path``."""
    Path(path).write_text(methods_markdown(), encoding="utf-8")


def _chapter(group: str, title: str) -> str:
    found = list(methods(group))
    index = _wrapped(", ".join(f"[{m.name}](#{group}-{m.name})" for m in found))
    return "\n".join([f"## {title}", "", *index, "", *(line for m in found for line in _section(m))])


def _section(method: Method) -> list[str]:
    notes = method.notes
    out = [f'### <a id="{method.group}-{method.name}"></a>`{method.group}={method.name}`', ""]
    out += [*_wrapped(_safe(notes.about)), ""] if notes.about else []
    facts = {"Run with": notes.run_with, "Releases": notes.releases}
    facts["Papers"] = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in notes.papers)
    if not isinstance(method.made, Objective) and method.made is not None:
        term = locate(method.made["_target_"], "_target_")
        facts |= {"Term": f"`{word(method.made)}`", "Does": _first(term), "Source": source_of(term).rstrip(".")}
    for key, value in facts.items():
        plain = value if key in ("Papers", "Term", "Does") else _safe(value)
        out += _wrapped(f"- *{key}:* {plain}", "  ") if value else []
    out += [""] if out[-1] else []
    return [*out, *(_objective(method.made) if isinstance(method.made, Objective) else [])]


def _objective(objective: Objective) -> list[str]:
    first = next(iter(objective.streams.values()))
    out = [f"| stream | {' | '.join(words(first))} |", "|" + " --- |" * (len(words(first)) + 1)]
    for name, stream in objective.streams.items():
        out.append("| " + " | ".join([name, *(value.replace("|", "\\|") for value in words(stream).values())]) + " |")
    out += ["", "```", *equation(objective), "```", ""]
    return out


def _first(term: Any) -> str:
    """The first paragraph of a docstring."""
    return _markdown((inspect.getdoc(term) or "").split("\n\n", 1)[0].replace("\n", " "))


def _safe(text: str) -> str:
    """Prose of a comment for Markdown: what a renderer would take for emphasis or a tag is spelled out."""
    return re.sub(r"\*(?=\S)|(?<=\S)\*|<|(?<!\w)_|_(?!\w)", lambda found: f"\\{found.group()}", text)


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of a paragraph; what would begin a list on a new line is spelled out."""
    first, *more = textwrap.wrap(text, 139, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [first, *(re.sub(r"^(\s*\d*)(?=[-+*#>.)]\s)", r"\1\\", line) for line in more)]


def matching(found: Iterable[Method], wanted: Sequence[str]) -> Iterator[Method]:
    """The methods in whose name, comment or terms every wanted word occurs."""
    for method in found:
        notes = method.notes
        said = " ".join([method.name, notes.about, notes.run_with, notes.releases, *rows(method)]).lower()
        if all(word.lower() in said for word in wanted):
            yield method
