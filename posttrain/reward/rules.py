"""Verifiers that are rules: bounded time, deterministic, no evaluation of text.  They run inline: a call takes microseconds.

All return a ``Score``: 1 right, 0 wrong, ``bad_format`` (also 0) when no answer could be found.  A reference answer that the rule cannot
read is an error of the data and raises ``ValueError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Literal

from posttrain.data.worlds.base import World
from posttrain.mixture.schedule import Scalar, at
from posttrain.records import Rollout, Score
from posttrain.reward.base import Signature, read
from posttrain.reward.text import Extract, extract, last_boxed, number

NORMALISERS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "casefold": str.casefold,
    "spaces": lambda text: " ".join(text.split()),
    "no_spaces": lambda text: "".join(text.split()),
    "no_punctuation": lambda text: re.sub(r"[^\w\s]", "", text),
    "no_articles": lambda text: re.sub(r"\b(?:a|an|the)\b", " ", text),
}


@dataclass(frozen=True)
class Exact:
    """Equality of strings after ``normalise`` (names in ``NORMALISERS``, applied in order to both sides) of what ``extract`` finds."""

    normalise: Sequence[str] = ("strip",)
    extract: Extract = "whole"

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        unknown = [n for n in self.normalise if n not in NORMALISERS]
        if unknown:
            raise ValueError(f"unknown normaliser {', '.join(unknown)}; choose from {', '.join(NORMALISERS)}")
        extract("", self.extract)

    def __call__(self, completion: str, answer: Any) -> Score:
        found = extract(completion, self.extract)
        if found is None:
            return Score(0.0, "bad_format", f"no answer found by {self.extract}")
        return Score(float(self._normal(found) == self._normal(str(answer))))

    def _normal(self, text: str) -> str:
        for name in self.normalise:
            text = NORMALISERS[name](text)
        return text


@dataclass(frozen=True)
class Numeric:
    """Equality of numbers: ``|x - answer| <= max(tolerance, relative * |answer|)``, exact fractions inside.

    ``extract="auto"`` takes the last box, else what follows the last ``####``, else the whole text, and in it the last number.  The answer
    is read in the same way, so a worked solution that ends in ``#### 18`` serves as it is.
    """

    tolerance: float = 0.0
    relative: float = 0.0
    extract: Literal["auto", "whole", "last_line", "boxed", "hash", "answer_tag"] = "auto"

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if not (self.tolerance >= 0 and self.relative >= 0):
            raise ValueError(f"Numeric needs tolerance >= 0 and relative >= 0, not {self.tolerance} and {self.relative}")
        if self.extract != "auto":
            extract("", self.extract)

    def __call__(self, completion: str, answer: Any) -> Score:
        gold = _gold_number(str(answer))
        found = number(_auto(completion) if self.extract == "auto" else extract(completion, self.extract) or "")
        if found is None:
            return Score(0.0, "bad_format", "no number found")
        return Score(float(abs(found - gold) <= max(Fraction(self.tolerance), Fraction(self.relative) * abs(gold))))


def _auto(text: str) -> str:
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    hashed = extract(text, "hash")
    return text if hashed is None else hashed


@lru_cache(65536)
def _gold_number(answer: str) -> Fraction:
    gold = number(_auto(answer))
    if gold is None:
        raise ValueError(f"the reference answer {answer[:80]!r} holds no number; use Exact or MathVerify for this data")
    return gold


@dataclass(frozen=True)
class Choice:
    """One letter out of ``options``: the last box, else the last ``answer is X`` or ``answer: X``, else the last letter on its own."""

    options: str = "ABCD"

    execution: ClassVar[str] = "inline"

    def __call__(self, completion: str, answer: Any) -> Score:
        gold = str(answer).strip().strip("()")
        if len(gold) != 1 or gold not in self.options:
            raise ValueError(f"the reference answer {str(answer)[:80]!r} is not one of the options {self.options!r}")
        letters = re.escape(self.options)
        alone = rf"(?<![^\W_])\(?([{letters}])\)?(?![^\W_'])"
        boxed = last_boxed(completion)
        named = rf"(?i:answer(?: is|:)) {{0,3}}{alone}"
        found = re.findall(alone, boxed) if boxed is not None else re.findall(named, completion) or re.findall(alone, completion)
        if not found:
            return Score(0.0, "bad_format", f"no letter out of {self.options} found")
        return Score(float(found[-1] == gold))


@dataclass(frozen=True)
class Format:
    """1 when every block ``<name>...</name>`` of ``blocks`` occurs exactly once, in that order, not nested; else ``bad_format``.

    What is inside the blocks plays no part.  ``outside=False`` allows only white space between and around them.
    """

    blocks: Sequence[str] = ("think", "answer")
    outside: bool = False

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"Format needs at least one block and each name once, not {list(self.blocks)}")

    def __call__(self, completion: str) -> Score:
        position = 0
        for name in self.blocks:
            opening, closing = f"<{name}>", f"</{name}>"
            if completion.count(opening) != 1 or completion.count(closing) != 1:
                return Score(0.0, "bad_format", f"{opening} and {closing} must each occur exactly once")
            start, end = completion.index(opening), completion.index(closing)
            if not position <= start < end:
                return Score(0.0, "bad_format", f"{opening} is out of order")
            if not self.outside and completion[position:start].strip():
                return Score(0.0, "bad_format", f"text before {opening}")
            position = end + len(closing)
        if not self.outside and completion[position:].strip():
            return Score(0.0, "bad_format", "text after the last block")
        return Score(1.0)


@dataclass(frozen=True)
class SoftOverlong:
    """``0`` up to ``L - C`` tokens, then ``(L - C - length) / C``, and ``-1`` from ``L`` on: a soft punishment of over-long answers.

    ``max_tokens`` is L, ``cache`` is C; ``length`` counts the tokens after the prompt.  Source: DAPO, arXiv 2503.14476, equation 13.
    Does nothing when L - C is above the sampler's ``max_tokens``.
    """

    max_tokens: int = 20480
    cache: int = 4096

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max_tokens:
            raise ValueError(f"SoftOverlong needs 0 < cache <= max_tokens, not cache={self.cache}, max_tokens={self.max_tokens}")

    def __call__(self, num_tokens: int) -> float:
        return min(0.0, max(-1.0, (self.max_tokens - self.cache - num_tokens) / self.cache))


@dataclass(frozen=True)
class LengthBudget:
    """``0`` up to ``limit`` tokens, then ``(limit - length) / limit``, and -1 from twice the limit on.

    Source: the token budget of reinforcement mid-training, arXiv 2509.24375 (abstract only; its form is our reading).

    ``limit``: tokens after the prompt, a number or a schedule: a falling one makes thoughts shorter as the run goes on.

    Wrong when: the limit is above the sampler's ``max_tokens``: it then does nothing.
    """

    limit: Scalar = 256.0

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if not callable(self.limit) and not self.limit > 0:
            raise ValueError(f"LengthBudget needs limit above 0, not {self.limit}")

    def __call__(self, num_tokens: int, progress: float = 0.0) -> float:
        limit = at(self.limit, progress)
        if not limit > 0:
            raise ValueError(f"LengthBudget: the schedule gives limit={limit} at progress {progress:g}; it must stay above 0")
        return min(0.0, max(-1.0, (limit - num_tokens) / limit))


@dataclass(frozen=True)
class Behind:
    """A reward of what stands behind a mark, the last one: the answer after a thought.

    ``reward``: any reward of one completion.  ``mark``: the words that end the thought; an answer without them is ``bad_format``, worth 0.
    """

    reward: Any
    mark: str = "</think>"

    execution: ClassVar[str] = "inline"

    def __post_init__(self) -> None:
        if not self.mark:
            raise ValueError("Behind needs a mark: the words that end a thought")
        if self._signature.batched:
            raise ValueError("Behind scores one answer at a time, so its reward must ask for completion, not completions")

    @property
    def _signature(self) -> Signature:
        return Signature.of("behind", self.reward)

    def __call__(self, rollout: Rollout, progress: float = 0.0) -> Score:
        before, found, behind = rollout.text.rpartition(self.mark)
        if not found:
            return Score(0.0, "bad_format", f"nothing stands behind {self.mark!r}")
        score, _ = read(self.reward(**self._signature.arguments([replace(rollout, text=behind)], progress)))
        return replace(score, places=tuple((end + len(before) + len(found), value) for end, value in score.places))


@dataclass(frozen=True)
class WorldVerifier:
    """The verifier of a world, or of several by environment name: ``world.verify`` of the prompt's answer and the completion."""

    world: World | Mapping[str, World]

    execution: ClassVar[str] = "inline"

    def __call__(self, completion: str, prompt: str, answer: Any, env: str, level: int | None) -> Score:
        world = self.world
        if isinstance(world, Mapping):
            if env not in world:
                raise ValueError(f"there is no world for environment {env!r}; there are {', '.join(world)}")
            world = world[env]
        return world.verify({"prompt": prompt, "answer": answer, "env": env, "level": level}, completion)
