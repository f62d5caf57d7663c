"""Mathematical answers through the library ``math-verify``, in a worker process.

The library is called as ``verify(gold, answer)``, in that order: it is not symmetric.  Its own timeouts use signals, which raise off the
main thread; they are switched off, and the deadline of :class:`posttrain.reward.pool.RewardPool` ends the process instead.  It treats
``x = 3`` and ``3`` alike, reads ``10%`` as ``10`` as well, does not take 0.333 for 1/3, and of several boxed answers the last one counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from posttrain.reward.text import last_boxed


@dataclass(frozen=True)
class MathVerify:
    """1 when ``completion`` ends in an expression equal to ``answer``, else 0; ``bad_format`` when no expression can be read.

    ``answer``       a number or LaTeX, or a worked solution whose result follows ``####``
    ``tail_chars``   only the end of the completion is read: the answer is expected there, and parsing time grows with length
    ``precision``    decimal places to which two numbers must agree
    ``max_depth``    deeper nested brackets are ``bad_format``: no answer needs them, and parsing them takes seconds
    ``cpu_s``        processor seconds per answer; ``timeout_s`` is the deadline on the clock, wide because a busy machine is slow
    """

    tail_chars: int = 2000
    precision: int = 6
    max_depth: int = 30
    cpu_s: float = 5.0
    timeout_s: float = 60.0

    execution: ClassVar[str] = "process"

    def __call__(self, completion: str, answer: Any) -> dict[str, Any]:
        from math_verify import verify

        gold = _gold(str(answer).rsplit("####", 1)[-1].strip())
        text = completion[-self.tail_chars :].encode("utf-8", "replace").decode()
        if _depth(text) > self.max_depth:
            return {"value": 0.0, "status": "bad_format", "detail": f"brackets nested deeper than {self.max_depth}"}
        read = _parse(text)
        if not read:
            return {"value": 0.0, "status": "bad_format", "detail": "no mathematical answer found"}
        right = verify(gold, read, float_rounding=self.precision, timeout_seconds=None, raise_on_error=True)
        return {"value": float(right)}

    def prepare(self) -> None:
        """Import the library and build its grammar before the clock of the first call runs."""
        import logging

        import math_verify  # noqa: F401

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns about the time-outs that were switched off on purpose
        self("$\\frac{1}{2}$", "0.5")


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + (character in "({[") - (character in ")}]"))
        deepest = max(deepest, depth)
    return deepest


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    boxed = last_boxed(text)  # left to itself, the library reads boxes joined by a comma or by "or" as one set
    return list(parse(text if boxed is None else f"\\boxed{{{boxed}}}", parsing_timeout=None, raise_on_error=False))


@lru_cache(4096)
def _gold(answer: str) -> list[Any]:
    """Raises ``ValueError`` when the reference answer itself cannot be read: that is the data's fault, not the completion's."""
    for text in (answer, f"${answer}$", f"\\boxed{{{answer}}}"):
        read = _parse(text)
        if any(not isinstance(r, str) for r in read):
            return read
    raise ValueError(f"the reference answer {answer[:80]!r} is not a mathematical expression; use Exact or Choice for this data")
