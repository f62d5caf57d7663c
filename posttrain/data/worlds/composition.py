"""Composition: string functions with opaque names, applied inside one another; can practice compose skills that were shown apart?

A prompt is ``k(m(bcad))``.  A demonstration writes the value after every function, innermost first: ``cadb>bdac``; the text after the last
``>`` is the answer.  In stage 1 (``show_definitions``) the prompt opens with what each function does to ``abcd``: ``k:abcd>dcba ...``.
In stage 2 the names are all there is, and what they mean has to be known.  Every function depends on its input, and a level is the
number of functions applied.  (After the string task of arXiv 2509.25123.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import ClassVar

from posttrain.data.worlds.base import Split, Task, World, stream
from posttrain.records import Score

LETTERS, NAMES, PROBE = "abcdefgh", "klmnpqrstuvwxyz", "abcd"
SHIFT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
UNSHIFT = str.maketrans(LETTERS, LETTERS[-1] + LETTERS[:-1])

OPERATORS: dict[str, Callable[[str], str]] = {
    "reverse": lambda s: s[::-1],
    "rotate_left": lambda s: s[1:] + s[:1],
    "swap_ends": lambda s: s[-1:] + s[1:-1] + s[:1] if len(s) > 1 else s,
    "shift": lambda s: s.translate(SHIFT),
    "swap_first": lambda s: s[1::-1] + s[2:],
    "rotate_right": lambda s: s[-1:] + s[:-1],
    "swap_last": lambda s: s[:-2] + s[-2:][::-1],
    "unshift": lambda s: s.translate(UNSHIFT),
    "double_first": lambda s: s[:1] + s,
    "drop_first": lambda s: s[1:],
    "double_last": lambda s: s + s[-1:],
    "drop_last": lambda s: s[:-1],
    "evens_first": lambda s: s[::2] + s[1::2],
}


@dataclass(frozen=True, kw_only=True)
class Composition(World):
    """``functions`` operators (a number takes the first so many of ``OPERATORS``, or a list of names), strings of ``min_length`` to
    ``max_length`` letters out of the first ``letters``, at most ``max_depth`` functions.  ``names_seed`` shuffles which name means what.

    ``held_out_pairs`` is the share of (outer, inner) pairs that no train, validation or test task contains: tasks with such a pair form
    the split ``novel``.  ``show_steps=False`` leaves the answer alone in the demonstration.
    """

    functions: int | Sequence[str] = 4
    letters: int = 6
    min_length: int = 4
    max_length: int = 4
    max_depth: int = 3
    show_definitions: bool = False
    show_steps: bool = True
    held_out_pairs: float = 0.0
    names_seed: int = 0

    name: ClassVar[str] = "composition"

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [f for f in self.operators.values() if f not in OPERATORS]
        if unknown or not 1 <= len(self.operators) <= len(OPERATORS):
            raise ValueError(
                f"composition: functions={self.functions!r}; give 1 to {len(OPERATORS)}, or names among {', '.join(OPERATORS)}"
            )
        if not 1 <= self.letters <= len(LETTERS) or not 2 <= self.min_length <= self.max_length or self.max_depth < 1:
            raise ValueError(f"composition: needs letters in 1..{len(LETTERS)}, 2 <= min_length <= max_length and max_depth >= 1")

    @property
    def levels(self) -> Sequence[int]:
        return tuple(range(1, self.max_depth + 1))

    @cached_property
    def operators(self) -> dict[str, str]:
        """Opaque name -> operator."""
        chosen = list(OPERATORS)[: self.functions] if isinstance(self.functions, int) else list(self.functions)
        return dict(zip(stream("names", self.names_seed).sample(NAMES, len(chosen)), chosen, strict=True))

    @cached_property
    def novel_pairs(self) -> frozenset[tuple[str, str]]:
        """The held-out (outer, inner) pairs of opaque names."""
        pairs = [(outer, inner) for outer in self.operators for inner in self.operators]
        return frozenset(stream("pairs", self.names_seed).sample(pairs, round(self.held_out_pairs * len(pairs))))

    @property
    def alphabet(self) -> str:
        return "".join(sorted(set(LETTERS) | set(NAMES) | set("()>") | (set(": ") if self.show_definitions else set())))

    def sample(self, rng: Random, level: int) -> Task:
        self.check_level(level)
        operators = self.operators
        while True:
            value = "".join(rng.choices(LETTERS[: self.letters], k=rng.randint(self.min_length, self.max_length)))
            program = rng.choices(list(operators), k=level)  # innermost first
            if len(self._trace(program, value)[-1]) >= 2:
                break
        steps = self._trace(program, value)
        expression = "".join(f"{f}(" for f in reversed(program)) + value + ")" * level
        shown = [f"{f}:{PROBE}>{OPERATORS[operators[f]](PROBE)}" for f in sorted(set(program))] if self.show_definitions else []
        return {
            "prompt": " ".join([*shown, expression]),
            "answer": steps[-1],
            "level": level,
            "env": self.name,
            "demonstration": ">".join(steps if self.show_steps else steps[-1:]),
        }

    def _trace(self, program: Sequence[str], value: str) -> list[str]:
        steps = []
        for f in program:
            value = OPERATORS[self.operators[f]](value)
            steps.append(value)
        return steps

    def _parse(self, task: Task) -> tuple[list[str], str]:
        *names, value = str(task["prompt"]).rsplit(" ", 1)[-1].rstrip(")").split("(")
        return names[::-1], value

    def key(self, task: Task) -> str:
        return str(task["prompt"]).rsplit(" ", 1)[-1]

    def split_of(self, task: Task) -> Split:
        program = self._parse(task)[0]
        if self.held_out_pairs and any((outer, inner) in self.novel_pairs for inner, outer in pairwise(program)):
            return "novel"
        return super().split_of(task)

    def verify(self, task: Task, text: str) -> Score:
        final = text.rsplit(">", 1)[-1].strip()
        if not final or not set(final) <= set(LETTERS):
            return Score(0.0, "bad_format", "no letters after the last '>'")
        return Score(float(final == task["answer"]))

    def solve(self, task: Task) -> str:
        steps = self._trace(*self._parse(task))
        return ">".join(steps if self.show_steps else steps[-1:])

    def steps(self, task: Task, text: str) -> list[bool]:
        """Is each written value the right one?  One entry per value in ``text``; values beyond the last function are wrong."""
        right = self._trace(*self._parse(task))
        return [i < len(right) and value.strip() == right[i] for i, value in enumerate(text.split(">"))]
