"""Finding the answer in a text: the last box, the last number, what follows a mark.  Linear time, no evaluation, no dependency."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\d)|/\d+)?|[-+]?\.\d+")
BRACES = re.compile(r"\\boxed\{|\\[{}]|[{}]")
MAX_NUMBER_CHARS = 64
Extract = Literal["whole", "last_line", "boxed", "hash", "answer_tag"]


def last_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, with nested braces; ``None`` without one.  One pass, whatever the text."""
    opened: list[int | None] = []  # for every open brace: where the box's content starts, or None for a plain brace
    best: tuple[int, int] | None = None
    for match in BRACES.finditer(text):
        token = match[0]
        if token in ("\\{", "\\}"):
            continue
        if token != "}":
            opened.append(None if token == "{" else match.end())
        elif opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[best[0] : best[1]]


def extract(text: str, how: Extract) -> str | None:
    """The part of ``text`` that is the answer: all of it, its last line, the last box, what follows the last ``####``, or the content of
    the last ``<answer>`` block.  ``None`` when that part does not exist."""
    match how:
        case "whole":
            return text
        case "last_line":
            lines = text.strip().splitlines()
            return lines[-1] if lines else None
        case "boxed":
            return last_boxed(text)
        case "hash":
            return text.rsplit("####", 1)[1] if "####" in text else None
        case "answer_tag":
            end = text.rfind("</answer>")
            start = text.rfind("<answer>", 0, end) if end >= 0 else -1
            return text[start + len("<answer>") : end] if start >= 0 else None
    raise ValueError(f"unknown way to extract an answer {how!r}; choose whole, last_line, boxed, hash or answer_tag")


def number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly: thousands separators, decimals, fractions, small exponents.  ``None`` without one."""
    last = None
    for match in NUMBER.finditer(text):
        last = match[0]
    if last is None or len(last) > MAX_NUMBER_CHARS:
        return None
    try:
        return Fraction(last.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
