"""Random streams derived by hashing what they are for, so that two purposes, epochs or prompts never share one."""

from __future__ import annotations

import hashlib
import random


def derive(*parts: object) -> int:
    """A 63-bit seed from any printable parts: ``derive(seed, "sampler", epoch)``.

    Unlike ``seed + index``, neighbouring parts give unrelated streams, and the value is the same in every process and Python version.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(num_items: int, *parts: object) -> list[int]:
    """A shuffled ``range(num_items)`` that depends on the parts alone."""
    order = list(range(num_items))
    random.Random(derive(*parts)).shuffle(order)
    return order
