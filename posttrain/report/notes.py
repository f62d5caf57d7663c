"""What the comment at the head of a config file says, taken apart: the method and its paper, what it is run with, what releases do otherwise.

The comment is prose.  Its first sentence is ``Name (arXiv id): what it is``.  A sentence that begins with ``Published with`` or a setting says what the
method is run with.  A sentence, or what follows a semicolon in one of those, that speaks of a release, a framework or a trainer, of ``our reading``
or of something ``unverified`` says what differs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.paths import CONFIGS

ABBREVIATIONS = ("e.g.", "i.e.", "Dr.", "vs.", "cf.")
SETTING = re.compile(r"\b(advantage|mixture|rollout|reward|model|data|learner|loss|regularizers|streams|aggregation)(\.\w+)*=\S")
BEGINS_WITH_SETTING = re.compile(r"\w+(\.\w+)*=\S")
DIFFERS = re.compile(
    r"(?i)\b(releases?|released|frameworks?|trainers?|authors'|readme|code|implementations?|TRL|prime-rl|our reading|unverified)\b|^others "
)
PAPER = re.compile(r"\b(\d{4}\.\d{5})\b")


@dataclass(frozen=True)
class Notes:
    """``title``: the name with its paper, empty where the comment gives none.  ``about``, ``run_with``, ``releases``: its sentences, each in one of the
    three.  ``papers``: arXiv ids in the order they are named."""

    title: str = ""
    about: str = ""
    run_with: str = ""
    releases: str = ""
    papers: tuple[str, ...] = ()

    @property
    def differences(self) -> str:
        """``releases``, or what to say where it is empty."""
        elsewhere = DIFFERS.search(f"{self.about} {self.run_with}")
        return self.releases or ("what is said above" if elsewhere else "no difference is noted")


def notes_of(group: str, name: str, folders: Sequence[Path] = ()) -> Notes | None:
    """The notes of ``GROUP/NAME.yaml`` in the user's folders or among the shipped ones; ``None`` when there is no such file."""
    found = next((p for p in (folder / group / f"{name}.yaml" for folder in (*folders, CONFIGS)) if p.is_file()), None)
    return None if found is None else read(found.read_text(encoding="utf-8"))


def read(text: str) -> Notes:
    """The notes of a config file's text."""
    split = sentences(header(text))
    parts: dict[str, list[str]] = {"about": [], "run_with": [], "releases": []}
    for number, sentence in enumerate(split):
        kind = _kind(sentence) if number else "about"
        clauses = sentence.split("; ") if kind == "run_with" else [sentence]
        last = next((i for i, clause in enumerate(clauses) if i and DIFFERS.search(clause)), len(clauses))
        parts[kind].append("; ".join(clauses[:last]) + ("" if last == len(clauses) else "."))
        parts["releases"] += ["; ".join(clauses[last:])] if clauses[last:] else []
    title, colon, _ = split[0].partition(": ") if split else ("", "", "")
    papers = tuple(dict.fromkeys(PAPER.findall(" ".join(split))))
    about, run_with, releases = (" ".join(each) for each in parts.values())
    return Notes(title if colon else "", about, run_with, releases, papers)


def header(text: str) -> str:
    """The comment lines a file begins with, as one line of text."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(" ".join(lines).split())


def sentences(text: str) -> list[str]:
    """Text split at full stops, abbreviations kept whole."""
    out: list[str] = []
    for part in re.split(r"(?<=[.!?])\s+", text):
        if out and out[-1].endswith(ABBREVIATIONS):
            out[-1] += f" {part}"
        elif part:
            out.append(part)
    return out


def _kind(sentence: str) -> str:
    if sentence.startswith("Published with"):
        return "run_with"
    if DIFFERS.search(sentence.split("; ")[0]):
        return "releases"
    if BEGINS_WITH_SETTING.match(sentence):
        return "run_with"
    return "releases" if DIFFERS.search(sentence) else "run_with" if SETTING.search(sentence) else "about"


def source_of(term: type) -> str:
    """The ``Source:`` of a term's docstring in one line, empty without one."""
    found = re.search(r"(?ms)^Source: (.*?)(?=\n\s*\n|\Z)", inspect.getdoc(term) or "")
    return re.sub(r":\w+:`([^`]+)`|``([^`]+)``", lambda m: m.group(1) or m.group(2), " ".join(found.group(1).split())) if found else ""
