"""Countdown: reach a target from given numbers with + - * /, each number at most once; many answers are right, so all are verified.

A prompt is ``2,3,7=13`` and an answer ``2*3+7``.  The verifier reads the expression through a whitelisted syntax tree and exact
fractions, never through ``eval``: characters and length are checked before parsing, powers do not exist, and numbers stay small.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import ClassVar

from posttrain.data.worlds.base import Task, World
from posttrain.records import Score

MAX_CHARS, MAX_DIGITS = 200, 6
OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def evaluate(expression: str, integers_only: bool = False) -> tuple[Fraction, list[int]]:
    """Value of an expression and the numbers it uses.  Raises ``ValueError`` for anything but numbers, ``+ - * /`` and parentheses,
    for a division by zero, and, with ``integers_only``, for an intermediate value that is not whole."""
    expression = expression.strip()
    if not expression or len(expression) > MAX_CHARS or not set(expression) <= set("0123456789+-*/() "):
        raise ValueError(f"not an expression of at most {MAX_CHARS} characters out of digits, + - * / and parentheses")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be parsed: {type(error).__name__}") from None
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**MAX_DIGITS:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            left, right = value(node.left), value(node.right)
            match OPERATIONS[type(node.op)]:
                case "+":
                    result = left + right
                case "-":
                    result = left - right
                case "*":
                    result = left * right
                case _:
                    if right == 0:
                        raise ValueError("division by zero")
                    result = left / right
            if integers_only and result.denominator != 1:
                raise ValueError("an intermediate value is not whole")
            return result
        raise ValueError("only numbers, + - * / and parentheses are allowed")

    return value(tree), used


@dataclass(frozen=True, kw_only=True)
class Countdown(World):
    """Level ``n`` gives ``n`` numbers from 1 to ``max_number`` and a target up to ``max_target`` that all of them reach together.
    ``integers_only`` refuses intermediate fractions.  ``operations`` limits what targets are built with (the verifier takes all four)."""

    max_number: int = 9
    max_target: int = 99
    min_numbers: int = 2
    max_numbers: int = 4
    operations: str = "+-*"
    integers_only: bool = False

    name: ClassVar[str] = "countdown"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.operations or not set(self.operations) <= set("+-*/") or not 2 <= self.min_numbers <= self.max_numbers:
            raise ValueError("countdown: needs operations out of '+-*/' and 2 <= min_numbers <= max_numbers")

    @property
    def levels(self) -> Sequence[int]:
        return tuple(range(self.min_numbers, self.max_numbers + 1))

    @property
    def alphabet(self) -> str:
        return "".join(sorted("0123456789,=+-*/()"))

    def sample(self, rng: Random, level: int) -> Task:
        self.check_level(level)
        while True:
            numbers = [rng.randint(1, self.max_number) for _ in range(level)]
            text, last = str(numbers[0]), "*"
            for number in numbers[1:]:
                operation = rng.choice(self.operations)
                text = f"({text}){operation}{number}" if operation in "*/" and last in "+-" else f"{text}{operation}{number}"
                last = operation
            try:
                target = evaluate(text, self.integers_only)[0]
            except ValueError:  # a fraction on the way, where only whole numbers are allowed
                continue
            if 0 < target <= self.max_target and target.denominator == 1:
                break
        puzzle = ",".join(map(str, sorted(numbers))) + f"={target}"
        return {"prompt": puzzle, "answer": puzzle, "level": level, "env": self.name, "demonstration": text}

    def key(self, task: Task) -> str:
        return str(task["answer"])

    def _read(self, task: Task) -> tuple[list[int], int]:
        numbers, target = str(task["answer"]).split("=")
        return [int(n) for n in numbers.split(",")], int(target)

    def verify(self, task: Task, text: str) -> Score:
        numbers, target = self._read(task)
        try:
            value, used = evaluate(text, self.integers_only)
        except ValueError as error:
            return Score(0.0, "bad_format", str(error))
        if Counter(used) - Counter(numbers):
            return Score(0.0, detail="uses a number that was not given, or one too often")
        return Score(float(value == target))

    def solve(self, task: Task) -> str:
        """An expression found by trying every order and operation; raises ``ValueError`` when the puzzle has none."""
        numbers, target = self._read(task)
        found = _search([(Fraction(n), str(n)) for n in numbers], Fraction(target), self.integers_only)
        if found is None:
            raise ValueError(f"countdown: {task['answer']} cannot be reached")
        return found


def _search(terms: list[tuple[Fraction, str]], target: Fraction, integers_only: bool) -> str | None:
    for value, text in terms:
        if value == target:
            return text[1:-1] if text.startswith("(") else text
    for i, (x, left) in enumerate(terms):
        for j, (y, right) in enumerate(terms):
            if i == j:
                continue
            rest = [t for k, t in enumerate(terms) if k not in (i, j)]
            options = [(x + y, "+"), (x * y, "*")] if i < j else []
            options.append((x - y, "-"))
            if y and not (integers_only and (x / y).denominator != 1):
                options.append((x / y, "/"))
            for value, operation in options:
                found = _search([*rest, (value, f"({left}{operation}{right})")], target, integers_only)
                if found is not None:
                    return found
    return None
