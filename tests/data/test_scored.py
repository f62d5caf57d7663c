"""Where a scalar head is read, and answers whose steps are labelled."""

from __future__ import annotations

import math
from typing import Any

import pytest

from posttrain.data.files import DataError
from posttrain.data.load import load_data
from posttrain.data.rows import to_rows
from posttrain.data.scored import read_at
from posttrain.records import Row, Source, TokenBatch

ROW = Row(
    ids=[5, 6, 7, 8, 9], sources=["prompt", "prompt", "demo", "demo", "prompt"], trainable=[False, False, True, True, False], advantage=[0.0, 0.1, 0.2, 0.3, 0.4],
    logps={"old": [math.nan, math.nan, -1.0, -2.0, math.nan]}, turn=[0, 0, 1, 1, 2], version=[-1, -1, 3, 3, -1],
)  # fmt: skip
STEPS: dict[str, Any] = {"prompt": "add 1 and 2", "completions": ["1 + 2", "= 3"], "labels": [True, 0.25]}


def columns(at: str) -> list[tuple[int, float]]:
    """What each read column has read last, and its label."""
    (row,) = read_at([ROW], at)
    batch = TokenBatch.from_sequences([row])
    return [(int(batch.input_ids[t]), round(float(batch.advantage[t]), 6)) for t in range(batch.num_tokens) if batch.trainable[t]]


def test_where_the_head_is_read() -> None:
    """Behind 8, the last token of the answer, whatever the template writes after it; behind both; before both."""
    assert columns("end") == [(8, 0.3)]
    assert columns("marked") == [(7, 0.2), (8, 0.3)]
    assert columns("before") == [(6, 0.2), (7, 0.3)]
    assert read_at([ROW], None) == [ROW]


def test_the_token_behind_is_never_an_input() -> None:
    (row,) = read_at([ROW], "end")
    batch = TokenBatch.from_sequences([row])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9], "everything was read, nothing more"
    assert int(batch.source[batch.trainable]) == Source.demo and int(batch.turn[batch.trainable]) == 1
    assert batch.num_tokens == len(row.version) - 1 == 5 and math.isnan(float(batch.logps["old"][-1]))


def test_a_row_without_anything_marked_is_read_nowhere() -> None:
    (row,) = read_at([Row(ids=[1, 2], trainable=[False, False])], "end")
    assert not any(row.trainable)  # type: ignore[arg-type]


def test_steps_end_at_tokens_of_their_own(tiny: Any) -> None:
    (demo,), report = load_data("steps", [STEPS], tiny)
    assert report.kept == 1 and [s.label for s in demo.segments] == [None, 1.0, 0.25]
    (row,) = to_rows([demo])
    ends = [t for t, on in enumerate(row.trainable) if on]  # type: ignore[arg-type]
    assert [tiny.decode(row.ids[t]) for t in ends] == ["\n", "\n"]
    assert tiny.decode(row.ids).endswith("1 + 2\n= 3\n")
    batch = TokenBatch.from_sequences(read_at([row], "marked"))
    assert batch.advantage[batch.trainable].tolist() == [1.0, 0.25] and batch.input_ids[batch.trainable].tolist() == [row.ids[t] for t in ends]


def test_steps_that_do_not_fit(tiny: Any) -> None:
    full = sum(len(s.ids) for s in load_data("steps", [STEPS], tiny)[0][0].segments)
    with pytest.raises(DataError, match=rf"has {full} tokens, more than max_length={full - 1}; .*truncation=drop"):
        load_data("steps", [STEPS], tiny, max_length=full - 1)
    (demo,), report = load_data("steps", [STEPS], tiny, max_length=full - 1, truncation="end")
    assert len(demo.segments) == 2 and report.truncated == 1
    with pytest.raises(DataError, match="no usable row"):
        load_data("steps", [STEPS], tiny, max_length=full - 1, truncation="drop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1]}, r"has 2 steps \(completions\) but 1 labels"),
        ({"labels": [1, "yes"]}, "the label 'yes'; labels are true, false, or numbers"),
        ({"completions": "one text"}, "completions must be a list, not str"),
        ({"completions": ["a", 3]}, "a step must be text, not int"),
        ({"labels": None}, "no column 'labels'"),
        ({"completions": [], "labels": []}, "no usable row"),
        ({"completions": ["a", " "]}, "no usable row"),
    ],
)
def test_rows_that_are_no_steps(tiny: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data("steps", [{**STEPS, **change}], tiny)
