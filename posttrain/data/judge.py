"""Texts that teach a model to judge: which of two answers is better, and which steps are right, said in words and learnt as any other answer.

The judge's labels are ordinary tokens, so its loss is maximum likelihood (``loss=sft``) or any other on answers; no head is needed.  Source:
generative pairwise reward models, and process supervision with labels as text, arXiv 2305.20050 and 2312.08935.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from posttrain.data.columns import row_id
from posttrain.data.files import DataError, Record

QUESTION = "{prompt}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\nWhich answer is better, A or B?"


@dataclass(frozen=True)
class PairJudgements:
    """``prompt, chosen, rejected`` rows become questions for a judge, each pair in both orders, so that no position is ever right more often.

    ``template`` is filled with ``{prompt}``, ``{a}`` and ``{b}``; ``labels`` are the two words to answer with.  A column ``label`` (how sure that
    the chosen is better, from 0 to 1) gives each order both words, weighed by it; without one only the right word is taught.

    Wrong when: prompt and answers are conversations: give texts.
    """

    template: str = QUESTION
    labels: tuple[str, str] = ("A", "B")

    def __post_init__(self) -> None:
        missing = [name for name in ("{prompt}", "{a}", "{b}") if name not in self.template]
        if missing:
            raise DataError(f"PairJudgements: the template lacks {missing[0]}")
        if len(set(self.labels)) != 2:
            raise DataError(f"PairJudgements: labels={list(self.labels)} must be two different words")

    def __call__(self, rows: Iterable[Record]) -> Iterator[Record]:
        for number, row in enumerate(rows):
            texts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"row {number}: PairJudgements needs texts in the columns prompt, chosen and rejected")
            prompt, chosen, rejected = texts
            name, sure = row_id(row, "prompt", "chosen", "rejected"), _share(row.get("label"), number)
            for order, (a, b) in enumerate(((chosen, rejected), (rejected, chosen))):
                question = self.template.replace("{prompt}", prompt).replace("{a}", a).replace("{b}", b)
                for side, weight in ((order, sure), (1 - order, 1.0 - sure)):
                    if weight:
                        yield {"id": f"{name}/{order}{side}", "prompt": question, "completion": self.labels[side], "weight": weight}


@dataclass(frozen=True)
class StepJudgements:
    """``prompt, steps, labels`` rows become one question per step: is this step right, given those before it?

    ``good``, ``bad``: the two words to answer with; a label is 1 or 0, or the share of continuations that succeed, which teaches both words
    weighed by it.  ``between`` joins the steps.  ``first_error`` leaves out what follows the first step labelled 0.

    Wrong when: the steps were cut by another rule than the one used where the judge is asked.
    """

    good: str = "right"
    bad: str = "wrong"
    between: str = "\n"
    first_error: bool = True

    def __post_init__(self) -> None:
        if self.good == self.bad:
            raise DataError(f"StepJudgements: good and bad are both {self.good!r}")

    def __call__(self, rows: Iterable[Record]) -> Iterator[Record]:
        for number, row in enumerate(rows):
            prompt, steps, labels = (row.get(name) for name in ("prompt", "steps", "labels"))
            if not isinstance(prompt, str) or not isinstance(steps, (list, tuple)) or not isinstance(labels, (list, tuple)):
                raise DataError(f"row {number}: StepJudgements needs a text in the column prompt, and lists in steps and labels")
            if len(steps) != len(labels) or not steps:
                raise DataError(f"row {number} has {len(steps)} steps but {len(labels)} labels; every step needs one")
            name = row_id(row, "prompt", "steps")
            for place, label in enumerate(labels):
                share = _share(label, number)
                question = self.between.join([prompt, *steps[: place + 1]])
                for word, weight in ((self.good, share), (self.bad, 1.0 - share)):
                    if weight:
                        yield {"id": f"{name}/{place}{word}", "prompt": question, "completion": word, "weight": weight}
                if self.first_error and share == 0.0:
                    break


def _share(value: object, number: int) -> float:
    if value is None:
        return 1.0
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
        raise DataError(f"row {number}: the label {value!r} is no probability between 0 and 1")
    return float(value)
