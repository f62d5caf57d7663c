"""Scored lists: several given answers to one prompt."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.files import DataError
from posttrain.data.load import load_data
from posttrain.data.rows import to_rows
from posttrain.loss import load
from posttrain.records import Source, TokenBatch

ROW: dict[str, Any] = {"prompt": "say a word", "completions": ["one", "a longer one", "two"], "scores": [0.5, 2, -1.0]}


def test_a_row_becomes_a_group_of_given_answers(tiny: Any) -> None:
    (group,), report = load_data("lists", [ROW], tiny)
    assert [r.reward for r in group.rollouts] == [0.5, 2.0, -1.0] and report.kept == 1
    assert len({r.sample_id for r in group.rollouts}) == 3
    rows = to_rows([group])
    for row, answer in zip(rows, ROW["completions"], strict=True):
        assert list(row.ids[: len(group.prompt.ids)]) == list(group.prompt.ids)
        learnt = [t for t, on in zip(row.ids, row.trainable, strict=True) if on]
        assert answer in tiny.decode(learnt) and ROW["prompt"] not in tiny.decode(learnt)
        assert {s for s, on in zip(row.sources, row.trainable, strict=True) if on} == {Source.demo}
    assert {row.group for row in rows} == {group.id} and [row.rewards["reward"] for row in rows] == [0.5, 2.0, -1.0]


def test_a_listwise_loss_learns_from_it(tiny: Any) -> None:
    groups, _ = load_data("lists", [ROW, {**ROW, "prompt": "another"}], tiny)
    batch = TokenBatch.from_sequences(to_rows(groups))
    flat = batch.weight * 0.0 - 1.0
    objective = load("info_nca")
    weights = objective.weights(batch.with_logps(current=flat, base=flat))
    totals = objective.totals(batch)["lists"]
    assert totals.groups == 2 and totals.sequences == 6
    signs = [float(weights[batch.seq == i].sum()) for i in range(3)]
    assert signs[1] > 0 > signs[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "3 completions but 1 scores"),
        ({"scores": [1.0, None, 2.0]}, "score None"),
        ({"scores": [1.0, float("nan"), 2.0]}, "finite"),
        ({"completions": "one"}, "completions must be a list, not str"),
        ({"scores": None}, "no column 'scores'"),
    ],
)
def test_what_is_no_scored_list_is_named(tiny: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data("lists", [{**ROW, **change}], tiny)


def test_what_cannot_be_compared_is_left_out_and_counted(tiny: Any) -> None:
    rows = [
        ROW,
        {"prompt": "p", "completions": ["one"], "scores": [1.0]},
        {"prompt": "q", "completions": ["one", ""], "scores": [1.0, 0.0]},
    ]
    groups, report = load_data("lists", rows, tiny)
    assert len(groups) == 1 and report.dropped == {"too_few_answers": 1, "empty_answer": 1}
    with pytest.raises(DataError, match="answer 1 of row 0"):
        load_data("lists", [ROW], tiny, max_length=len(to_rows(groups)[0].ids) + 2)


def test_every_answer_may_have_a_prompt_and_further_numbers_of_its_own(tiny: Any) -> None:
    entry = [(f"be {kind}: name a {thing}", f"a {answer}") for kind in ("kind", "brief") for thing, answer in (("pet", "kind cat"), ("pet", "dog"))]
    row = {
        "prompts": [p for p, _ in entry],
        "completions": [a for _, a in entry],
        "scores": [1, 0, 0, 1],
        "labels": {"instruction": [0, 0, 1, 1], "answer": [0, 1, 0, 1]},
    }
    (group,), _ = load_data("lists", [row], tiny)
    rows = to_rows([group])
    for found, (prompt, answer) in zip(rows, entry, strict=True):
        text = tiny.decode(found.ids)
        assert prompt in text and answer in text
        learnt = tiny.decode([t for t, on in zip(found.ids, found.trainable, strict=True) if on])
        assert answer in learnt and "name a" not in learnt
    assert [(r.rewards["instruction"], r.rewards["answer"], r.rewards["reward"]) for r in rows] == [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)]
    batch = TokenBatch.from_sequences(rows)
    weights = load("sami").weights(batch.with_logps(current=batch.weight * 0.0 - 1.0))
    signs = [float(weights[batch.seq == i].sum()) for i in range(4)]
    assert signs[0] > 0 > signs[1] and signs[3] > 0 > signs[2]
    (told,), _ = load_data("lists", [row], tiny, system="be honest")
    assert all(tiny.decode(r.ids).count("be honest") == 1 for r in to_rows([told])), "the system message precedes every answer's own prompt"
    assert row["prompts"][0] == entry[0][0], "the user's rows are left as they are"
    with pytest.raises(DataError, match="4 completions but 3 prompts"):
        load_data("lists", [{**row, "prompts": row["prompts"][:3]}], tiny)
    with pytest.raises(DataError, match=r"4 completions but 1 labels\.answer"):
        load_data("lists", [{**row, "labels": {"answer": [0]}}], tiny)
