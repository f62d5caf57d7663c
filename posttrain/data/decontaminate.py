"""Training rows that repeat evaluation items are found and removed, exactly.

For one evaluation text and one training text: tokens of the evaluation text that lie in an n-gram which also occurs in the training text
are marked, and the score is the marked share.  A training row goes when its score reaches ``cover`` with any evaluation text, or
(``also_exact``) when the two are equal after normalisation, which is all that is tested for evaluation texts shorter than ``n`` words.

The small side, the evaluation, is indexed; the training side is streamed once, so nothing is missed.  n-grams on the ``stop`` list, those
that occur in more than ``max_share`` of the evaluation texts (boilerplate such as a shared instruction), do not count as a match and are
reported.

Not caught: paraphrases, translations, and items with changed numbers (unless enough words around them agree).  Train and test drawn from
one generator must be disjoint by construction.

Source: the rule is that of open-instruct's ``decontamination/search.py``; 8-grams and one half are the values reported for TÜLU 3 (arXiv
2411.15124).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Gram = tuple[str, ...]
_WORD = re.compile(r"\w+")
_LATEX = re.compile(r"\\(?:left|right|,|;|!|:|quad|qquad|displaystyle)(?![A-Za-z])|[\\$]|\^\{?|_\{?")


def words(text: str) -> list[str]:
    r"""The one normaliser: Unicode compatibility forms, case, LaTeX spacing and marks, punctuation and white space all go.

    >>> words(r"The\, VALUE  of $x^{2}$") == words("the value of x 2")
    True
    """
    text = _LATEX.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return _WORD.findall("".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)))


@dataclass(frozen=True)
class Match:
    """One removed row: its number and side, the evaluation set and item it repeats, and how much of it (0..1; ``exact``: equal texts)."""

    row: int
    side: str
    eval_set: str
    item: int
    score: float
    exact: bool = False


@dataclass
class Contamination:
    """``kept + removed == read``.  ``by_set`` counts removed rows per evaluation set and side (a row may count in several); ``short``
    counts evaluation texts compared by equality only; ``stop`` counts evaluation texts per boilerplate n-gram.  Filled while the rows are
    consumed."""

    read: int = 0
    kept: int = 0
    removed: int = 0
    by_set: Counter[tuple[str, str]] = field(default_factory=Counter)
    matches: list[Match] = field(default_factory=list)
    short: Counter[str] = field(default_factory=Counter)
    stop: dict[Gram, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"decontamination: {self.read} rows read, {self.kept} kept, {self.removed} removed"]
        lines += [f"  {name}, {side}: {count} rows" for (name, side), count in sorted(self.by_set.items())]
        lines += [f"  {name}: {count} items too short for n-grams, compared by equality" for name, count in sorted(self.short.items())]
        lines += [f"  {len(self.stop)} boilerplate n-grams ignored"] if self.stop else []
        return "\n".join([*lines, "  paraphrases and changed numbers are not caught"])


class Index:
    """The evaluation side: n-gram -> where it begins, and whole texts for equality."""

    def __init__(self, evals: Mapping[str, Sequence[str]], n: int, max_share: float) -> None:
        self.n, self.short, self.lengths = n, Counter[str](), {}
        self.exact: dict[Gram, list[tuple[str, int]]] = defaultdict(list)
        self.grams: dict[Gram, list[tuple[str, int, int]]] = defaultdict(list)
        for name, texts in evals.items():
            for item, text in enumerate(texts):
                tokens = words(text)
                if not tokens:
                    continue
                self.exact[tuple(tokens)].append((name, item))
                self.lengths[name, item] = len(tokens)
                if len(tokens) < n:
                    self.short[name] += 1
                for at, gram in enumerate(_grams(tokens, n)):
                    self.grams[gram].append((name, item, at))
        items = {gram: len({(name, item) for name, item, _ in found}) for gram, found in self.grams.items()}
        limit = max(max_share * len(self.lengths), 1)
        self.stop = {gram: count for gram, count in items.items() if count > limit}
        for gram in self.stop:
            del self.grams[gram]

    def scores(self, text: str, also_exact: bool) -> dict[tuple[str, int], tuple[float, bool]]:
        """Evaluation item -> (marked share, equal), for every item the text touches."""
        tokens = words(text)
        marked: dict[tuple[str, int], set[int]] = defaultdict(set)
        for gram in set(_grams(tokens, self.n)):
            for name, item, at in self.grams.get(gram, ()):
                marked[name, item].update(range(at, at + self.n))
        out = {key: (len(at) / self.lengths[key], False) for key, at in marked.items()}
        if also_exact:
            out |= dict.fromkeys(self.exact.get(tuple(tokens), ()), (1.0, True))
        return out


def decontaminate(
    train: Iterable[T],
    evals: Mapping[str, Sequence[str]],
    *,
    n: int = 8,
    cover: float = 0.5,
    also_exact: bool = True,
    max_share: float = 0.05,
    texts: Callable[[T], Mapping[str, str]] | None = None,
) -> tuple[Iterator[T], Contamination]:
    """Clean rows, streamed, and the report that fills as they are taken.

    ``texts`` gives the sides of a row to compare, by name (default: a row's string columns, e.g. prompt and completion apart).
    """
    if n < 1 or not 0 < cover <= 1:
        raise ValueError(f"decontaminate needs n >= 1 and 0 < cover <= 1, not n={n}, cover={cover}")
    index = Index(evals, n, max_share)
    report = Contamination(short=index.short, stop=index.stop)
    sides = texts or _sides

    def clean() -> Iterator[T]:
        for number, row in enumerate(train):
            report.read += 1
            hits = [
                Match(number, side, name, item, score, exact)
                for side, text in sides(row).items()
                for (name, item), (score, exact) in index.scores(text, also_exact).items()
                if exact or score >= cover
            ]
            if not hits:
                report.kept += 1
                yield row
                continue
            report.removed += 1
            report.matches += sorted(hits, key=lambda m: (-m.score, m.eval_set, m.item, m.side))
            report.by_set.update({(m.eval_set, m.side) for m in hits})

    return clean(), report


def _grams(tokens: Sequence[str], n: int) -> list[Gram]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _sides(row: Any) -> dict[str, str]:
    """String columns, and the contents of message lists under their column's name."""
    sides = {}
    for name, value in row.items():
        if isinstance(value, str):
            sides[name] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(m, Mapping) for m in value):
            sides[name] = "\n".join(str(m.get("content") or "") for m in value)
    return sides
