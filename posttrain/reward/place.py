"""Where in an answer a reward was earned: pieces of text that are scored one by one, and the tokens at which that is paid.

A reward of places returns a ``Score`` whose ``places`` are characters of the answer; here they become tokens.  ``advantage=placed`` hands them on, and
a critic's advantages (``rewards: each``) read them.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from posttrain.mixture.schedule import at
from posttrain.records import Rollout, Score, Source
from posttrain.reward.base import Signature, read
from posttrain.reward.combine import Sum

ENDS = {"line": r"\n+", "sentence": r"(?<=[.!?])\s+|\n+", "clause": r"(?<=[.!?,;:])\s+|\n+"}


def pieces(text: str, level: str) -> list[tuple[int, str]]:
    """(characters up to its end, text) of every line, sentence or clause.  A piece ends before the space behind it, which the next one's first token often holds."""
    out, start = [], 0
    for found in [*re.finditer(ENDS[level], text), None]:
        end = len(text) if found is None else found.end()
        if piece := text[start:end].strip():
            out.append((start + len(text[start:end].rstrip()), piece))
        start = end
    return out


@dataclass(frozen=True)
class EachPiece:
    """A reward of every sentence (or line, or clause) by itself, paid where it ends.

    Equation: ``value = sum_k r(piece_k)``, ``r(piece_k)`` at the end of piece k.
    Source: fine-grained human feedback, arXiv 2306.01693 (clauses for relevance, sentences for factuality).

    ``reward``: any reward of one completion; it sees a piece in the place of the whole.  ``level``: ``line``, ``sentence`` or ``clause``, told by punctuation.

    Wrong when: pieces only make sense together; or a decimal point followed by a space ends sentences.
    """

    reward: Any
    level: Literal["line", "sentence", "clause"] = "sentence"
    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if self.level not in ENDS:
            raise ValueError(f"reward.EachPiece: level={self.level!r} does not exist; choose from {', '.join(ENDS)}")
        if self._signature.batched:
            raise ValueError("reward.EachPiece scores one piece at a time, so its reward must ask for completion, not completions")

    @property
    def _signature(self) -> Signature:
        return Signature.of("piece", self.reward)

    def __call__(self, rollout: Rollout, progress: float = 0.0) -> Score:
        places = []
        for end, text in pieces(rollout.text, self.level):
            score, _ = read(self.reward(**self._signature.arguments([replace(rollout, text=text)], progress)))
            if score.value is None:
                return Score(None, score.status, f"piece {text[:60]!r}: {score.detail}")
            places.append((end, score.value))
        return Score(sum((v for _, v in places), 0.0), places=tuple(places))


def paid(rollout: Rollout, scores: Mapping[str, Score], combiner: Any, progress: float, decode: Callable[[Sequence[int]], str] | None) -> tuple[float, ...] | None:
    """What every token of a rollout's segments earned; None when no reward that counts names places.

    A reward without places is paid at the last sampled token.  Raises ``ValueError`` when the rewards are combined by anything but a weighted sum, for a
    product has no place of its own.
    """
    if not any(score.places for score in scores.values()):
        return None
    if not isinstance(combiner, Sum) or decode is None:
        raise ValueError(
            f"a reward says where in the answer it was earned, but reward.combine={type(combiner).__name__} is not a weighted sum; use reward.weights, or return a "
            "Score without places"
        )
    values = {name: score.value for name, score in scores.items() if score.value is not None}
    weights = {n: at(w, progress) for n, w in combiner.weights.items()} if combiner.weights else {n: 1.0 for n in values if "/" not in n}
    ids = [i for s in rollout.segments for i in s.ids]
    sampled = [index for index, (_, own) in enumerate((i, s.source == Source.policy) for s in rollout.segments for i in s.ids) if own]
    if not sampled:
        return None
    first = 0 if decode(ids) == rollout.text else len(ids) - len(rollout.segments[-1].ids)
    read_to = functools.cache(lambda i: len(decode(ids[first : i + 1])))
    out = [0.0] * len(ids)
    for name, weight in weights.items():
        for end, value in scores[name].places or ((len(rollout.text), values[name]),) if name in values else ():
            where = first + bisect_left(range(first, len(ids)), end, key=read_to)  # a text grows with its tokens
            out[sampled[min(bisect_left(sampled, where), len(sampled) - 1)]] += weight * value
    return tuple(out)
