"""Labels as text: pairs judged in both orders, steps judged one by one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from posttrain.data.files import DataError
from posttrain.data.judge import PairJudgements, StepJudgements
from posttrain.data.load import load_data

PAIR = {"prompt": "2+2?", "chosen": "four", "rejected": "five"}
STEPS = {"prompt": "2+2+2?", "steps": ["2+2=4", "4+2=7", "so 7"], "labels": [1, 0, 0]}


def test_every_pair_is_asked_in_both_orders() -> None:
    first, second = PairJudgements()([PAIR])
    assert (first["completion"], second["completion"]) == ("A", "B") and first["id"] != second["id"]
    assert first["prompt"].index("four") < first["prompt"].index("five") and second["prompt"].index("five") < second["prompt"].index("four")
    assert (first["weight"], second["weight"]) == (1.0, 1.0)


def test_no_position_is_right_more_often() -> None:
    right: dict[str, float] = defaultdict(float)
    for row in PairJudgements()([{**PAIR, "prompt": str(i), "label": i / 7} for i in range(8)]):
        right[row["completion"]] += row["weight"]
    assert right["A"] == pytest.approx(right["B"])


def test_uncertain_labels_teach_both_words_by_their_weight() -> None:
    rows = list(PairJudgements()([{**PAIR, "label": 0.8}]))
    assert [(r["completion"], pytest.approx(r["weight"])) for r in rows] == [("A", 0.8), ("B", 0.2), ("B", 0.8), ("A", 0.2)]
    assert len({r["id"] for r in rows}) == 4


def test_steps_are_judged_up_to_the_first_error() -> None:
    rows = list(StepJudgements()([STEPS]))
    assert [r["completion"] for r in rows] == ["right", "wrong"]
    assert rows[1]["prompt"] == "2+2+2?\n2+2=4\n4+2=7"
    assert len(list(StepJudgements(first_error=False)([STEPS]))) == 3
    soft = list(StepJudgements()([{**STEPS, "labels": [0.25, 1.0, 1.0]}]))
    assert [(r["completion"], r["weight"]) for r in soft[:2]] == [("right", 0.25), ("wrong", 0.75)] and len(soft) == 4


@pytest.mark.parametrize(
    ("adapter", "row", "message"),
    [
        (PairJudgements(), {"prompt": "p", "chosen": ["x"], "rejected": "y"}, "row 0: PairJudgements needs texts"),
        (PairJudgements(), {**PAIR, "label": 1.5}, "label 1.5 is no probability"),
        (StepJudgements(), {**STEPS, "labels": [1]}, "3 steps but 1 labels"),
        (StepJudgements(), {**STEPS, "steps": "one"}, "lists in steps and labels"),
        (StepJudgements(), {**STEPS, "labels": [1, "no", 0]}, "label 'no' is no probability"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(adapter: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(adapter([row]))


def test_impossible_judges_are_refused() -> None:
    for make in (lambda: PairJudgements("{prompt} {a}"), lambda: PairJudgements(labels=("A", "A")), lambda: StepJudgements("x", "x")):
        with pytest.raises(DataError):
            make()


@pytest.mark.parametrize(("adapter", "row", "count"), [("pair_judgements", PAIR, 2), ("step_judgements", STEPS, 2)])
def test_they_are_read_by_name(tiny: Any, adapter: str, row: dict[str, Any], count: int) -> None:
    demos, report = load_data("demos", {"source": [row], "adapter": adapter}, tiny)
    assert len(demos) == count == report.kept and all(d.weight == 1.0 for d in demos)
