"""A reward that random answers differ in, so that a run with a fresh model has something to learn from its first step on."""

from __future__ import annotations


def letters(completion: str) -> float:
    """The share of small letters."""
    return sum(c.islower() for c in completion) / max(len(completion), 1)


def told(completion: str) -> dict[str, object]:
    """The same, with words: which character an answer begins with."""
    return {"value": letters(completion), "detail": f"it begins with {completion[:1]}"}


def short(completion: str) -> float:
    """Nothing is best."""
    return -float(len(completion))
