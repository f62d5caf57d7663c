"""A reward that random answers differ in, so that a run with a fresh model has something to learn from its first step on."""

from __future__ import annotations


def letters(completion: str) -> float:
    """The share of small letters."""
    return sum(c.islower() for c in completion) / max(len(completion), 1)
