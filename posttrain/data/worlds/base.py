"""What a world is: a sampler of tasks, a canonical key, an exact verifier and a solver; splits and rows follow from these four.

A task is a mapping with ``prompt`` (text for the model), ``answer`` (a string from which alone ``verify`` can judge), ``level``, ``env``
(the world's name) and ``demonstration`` (a worked text whose final answer verifies).

Splits are a function of the task's key, so train, validation and test are disjoint by construction, for every seed and every size.
Draw ``i`` of a split comes from its own random stream, hash(world, split, seed, i): neighbouring seeds share no stream.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

from posttrain.records import Score

Task = Mapping[str, Any]
Split = Literal["train", "validation", "test", "novel"]
PATIENCE = 5000


def stream(*parts: object) -> Random:
    """A random stream that depends on all parts, the same in every process."""
    return Random(hashlib.sha256("/".join(map(str, parts)).encode()).digest())


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """Base of the worlds.  ``split``, ``num``, ``seed`` and ``mix`` configure what :meth:`rows` yields without arguments.

    ``mix`` names the levels to draw from, equally often (a sequence) or by weight (a mapping); ``None`` means all levels.
    """

    split: Split = "train"
    num: int = 1000
    seed: int = 0
    mix: Sequence[int] | Mapping[int, float] | None = None
    validation_share: float = 0.1
    test_share: float = 0.1

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not (self.test_share > 0 and self.validation_share > 0 and self.test_share + self.validation_share < 1):
            raise ValueError(f"{self.name}: test_share and validation_share must be above 0 and sum to less than 1")
        wrong = [level for level in self.mix or () if level not in self.levels]
        if wrong:
            raise ValueError(f"{self.name}: mix names levels {wrong}; this world has levels {list(self.levels)}")
        if self.mix is not None and (not self.mix or (isinstance(self.mix, Mapping) and sum(self.mix.values()) <= 0)):
            raise ValueError(f"{self.name}: mix is empty or has no weight; leave it out to draw from all levels")

    # -- the four methods of a world -----------------------------------------------------------------------------------
    @property
    @abstractmethod
    def levels(self) -> Sequence[int]:
        """Difficulties, ascending."""

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Every character that can occur in a prompt or a demonstration, sorted, each once."""

    @abstractmethod
    def sample(self, rng: Random, level: int) -> Task:
        """One task of that level.  Raises ``ValueError`` for a level this world does not have."""

    @abstractmethod
    def key(self, task: Task) -> str:
        """Canonical content: two tasks with one key are the same question.  Splits are made on its hash."""

    @abstractmethod
    def verify(self, task: Task, text: str) -> Score:
        """1 for a right final answer, 0 for a wrong one, ``bad_format`` (0) when there is none.  Reads ``task["answer"]`` only."""

    @abstractmethod
    def solve(self, task: Task) -> str:
        """A demonstration; ``verify(task, solve(task))`` is 1."""

    # -- what follows from them ----------------------------------------------------------------------------------------
    def check_level(self, level: int) -> None:
        if level not in self.levels:
            raise ValueError(f"{self.name} has levels {list(self.levels)}, not {level}")

    def split_of(self, task: Task) -> Split:
        """The one split a task can ever be in."""
        share = int.from_bytes(hashlib.sha256(f"{self.name}:{self.key(task)}".encode()).digest()[:8]) / 2**64
        if share < self.test_share:
            return "test"
        return "validation" if share < self.test_share + self.validation_share else "train"

    def rows(self, split: Split | None = None, num: int | None = None, seed: int | None = None) -> list[dict[str, Any]]:
        """``num`` different tasks of one split, as data rows ``id, prompt, completion, answer, level, env``.

        Fewer rows are a prefix of more rows.  Raises ``ValueError`` when the split does not hold ``num`` different tasks.
        """
        split, num, seed = split or self.split, self.num if num is None else num, self.seed if seed is None else seed
        mix = self.mix or self.levels
        weights = list(mix.values()) if isinstance(mix, Mapping) else None
        found: dict[str, dict[str, Any]] = {}
        draw = last = 0
        while len(found) < num:
            if draw - last > PATIENCE:
                raise ValueError(
                    f"{self.name}: only {len(found)} different tasks found in split {split!r} at levels {list(mix)}, {num} asked for; "
                    "ask for fewer, add levels, or make the world larger"
                )
            rng = stream(self.name, split, seed, draw)
            draw += 1
            task = self.sample(rng, rng.choices(list(mix), weights)[0])
            if self.split_of(task) != split:
                continue
            key = self.key(task)
            if key not in found:
                last = draw
                row = {name: task[name] for name in ("prompt", "answer", "level", "env")}
                row["id"] = f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
                found[key] = {**row, "completion": task["demonstration"]}
        return list(found.values())
