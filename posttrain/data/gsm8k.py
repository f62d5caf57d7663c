r"""GSM8K's own form: the gold number after ``####``, calculator marks, and model solutions that make preference pairs.

Source: Cobbe et al. 2021, arXiv 2110.14168, and the data files of the openai/grade-school-math repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.files import SKIP, DataError, Record
from posttrain.data.judge import PairJudgements, StepJudgements

_GOLD = re.compile(r"(?:^|\n)\s*(?:####|A:)\s*(-?[$]?-?[\d,]*\.?\d+)\s*%?\s*$")
_MARKS = re.compile(r"<<[^<>\n]*>>")


def gold_answer(solution: str) -> str | None:
    """The number on the final ``#### n`` (or ``A: n``) line, without thousands commas and currency sign; ``None`` without such a line."""
    found = _GOLD.search(solution.rstrip())
    return found[1].replace(",", "").replace("$", "") if found else None


def strip_calculator(solution: str) -> str:
    """The text without its ``<<48/2=24>>`` marks."""
    return _MARKS.sub("", solution)


@dataclass(frozen=True)
class Gsm8k:
    """``question, answer`` rows become ``prompt, completion, answer``: the answer is the gold number, the completion the worked solution.

    ``keep_marks`` leaves the calculator marks in the solution.  Raises :class:`DataError` for a row without a gold number.
    """

    keep_marks: bool = False

    def __call__(self, rows: Iterable[Record]) -> Iterator[Record]:
        for number, row in enumerate(rows):
            _need(row, number, ("question", "answer"))
            gold = gold_answer(row["answer"])
            if gold is None:
                raise DataError(f"GSM8K row {number}: the answer does not end in a line '#### number': ...{row['answer'][-60:]!r}")
            solution = row["answer"] if self.keep_marks else strip_calculator(row["answer"])
            yield {**row, "prompt": row["question"], "completion": solution, "answer": gold}


@dataclass(frozen=True)
class Gsm8kPairs:
    """Rows of sampled solutions with ``is_correct`` become preference pairs, a correct solution against an incorrect one.

    Per question the correct and the incorrect solutions, in file order, are matched one to one up to ``max_pairs``; when one side runs out
    its solutions are used again only with ``reuse``.  Questions with solutions of one kind only give no pair, and are counted
    (``no_contrast``).  Equal texts are used once.
    """

    max_pairs: int = 1
    keep_marks: bool = False
    reuse: bool = False

    def __call__(self, rows: Iterable[Record]) -> Iterator[Record]:
        for number, row in enumerate(rows):
            _need(row, number, ("question",))
            sampled = [
                (v["is_correct"], v["solution"]) for v in row.values() if isinstance(v, Mapping) and {"is_correct", "solution"} <= set(v)
            ]
            if not sampled:
                raise DataError(
                    f"row {number} has no solutions; expected columns like {{is_correct: true, solution: text}}, found: {', '.join(row)}; "
                    "for rows of another form set adapter=null"
                )
            good, bad = (list(dict.fromkeys(self._clean(text) for ok, text in sampled if bool(ok) is side)) for side in (True, False))
            count = min(self.max_pairs, max(len(good), len(bad)) if self.reuse else min(len(good), len(bad))) if good and bad else 0
            if not count:
                yield {SKIP: "no_contrast"}
            for i in range(count):
                suffix = f".{i}" if i else ""
                yield {
                    "id": f"gsm8k-{number}{suffix}",
                    "prompt": row["question"],
                    "chosen": good[i % len(good)],
                    "rejected": bad[i % len(bad)],
                    "answer": gold_answer(str(row.get("ground_truth", ""))),
                }

    def _clean(self, text: str) -> str:
        return text if self.keep_marks else strip_calculator(text)


def _need(row: Record, number: int, names: tuple[str, ...]) -> None:
    missing: list[Any] = [name for name in names if name not in row]
    if missing:
        raise DataError(f"row {number} is not a GSM8K row: no column {missing[0]!r}; it has: {', '.join(row)}; for rows of another form set adapter=null")


ADAPTERS = {"gsm8k": Gsm8k, "gsm8k_pairs": Gsm8kPairs, "pair_judgements": PairJudgements, "step_judgements": StepJudgements}
