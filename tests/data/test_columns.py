"""Column conventions and GSM8K's own form."""

import json

import pytest

from posttrain.data.columns import Columns, Unique, need, row_id
from posttrain.data.files import SKIP, DataError
from posttrain.data.gsm8k import Gsm8k, Gsm8kPairs, gold_answer, strip_calculator

ROW = {"question": "2+2?", "answer": "4", "topic": "sums"}


def one(columns, row):
    return next(iter(columns.apply([row])))


def test_mapping_renames_and_keeps_the_rest():
    assert one(Columns({"prompt": "question"}), ROW) == {"prompt": "2+2?", "answer": "4", "meta": {"topic": "sums"}}
    swapped = one(Columns({"prompt": "question", "completion": "answer"}), ROW)
    assert swapped["completion"] == "4" and "answer" not in swapped


def test_missing_columns_say_what_is_there_and_what_to_write():
    with pytest.raises(DataError, match=r"row 0 has no column 'qestion' \(columns\.prompt=qestion\); it has: question, answer, topic"):
        one(Columns({"prompt": "qestion"}), ROW)
    with pytest.raises(DataError, match=r"no column 'prompt'.*the row has: answer, question, topic; try columns=\{prompt: question\}"):
        need(one(Columns(), ROW), 0, ("prompt",), "a prompt")
    with pytest.raises(DataError, match=r"name them with columns=\{chosen: <your column>"):
        need(one(Columns(), ROW), 0, ("chosen",), "a pair")
    with pytest.raises(DataError, match=r"'promt', which is no column.*did you mean 'prompt'"):
        Columns({"promt": "question"})


def test_null_is_absent_and_lists_may_be_json_text():
    row = one(Columns(), {"prompt": json.dumps([{"role": "user", "content": "hi"}]), "completion": None, "tools": '[{"name": "f"}]'})
    assert row == {"prompt": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}], "meta": {}}
    assert one(Columns(), {"prompt": "[{not json"})["prompt"] == "[{not json"


def test_prompt_template_fills_columns_and_leaves_other_braces():
    columns = Columns({"prompt": "question"}, prompt_template="{question}\nTopic {topic}. Put it in \\boxed{}.\nAnswer:")
    assert one(columns, ROW)["prompt"] == "2+2?\nTopic sums. Put it in \\boxed{}.\nAnswer:"
    with pytest.raises(DataError, match=r"uses no column of row 0; it may use: .*\{question\}"):
        one(Columns(prompt_template="{qestion}"), ROW)
    with pytest.raises(DataError, match="'topic', which is a list"):
        one(Columns(prompt_template="{topic}"), {"topic": []})
    hostile = one(Columns(prompt_template="{question}"), {"question": "{answer.__class__} {answer}", "answer": "4"})
    assert hostile["prompt"] == "{answer.__class__} {answer}", "a value is never a template"


def test_system_goes_where_there_is_none():
    system = {"role": "system", "content": "S"}
    user = {"role": "user", "content": "2+2?"}
    assert one(Columns({"prompt": "question"}, system="S"), ROW)["prompt"] == [system, user]
    assert one(Columns(system="S"), {"messages": [user]})["messages"] == [system, user]
    own = [{"role": "system", "content": "own"}, user]
    assert one(Columns(system="S"), {"messages": own})["messages"] == own
    assert one(Columns(system="S"), {"prompt": "x", "system": "row"})["prompt"][0]["content"] == "row"
    pair = one(
        Columns(system="S"), {"chosen": [user, {"role": "assistant", "content": "4"}], "rejected": [{"role": "assistant", "content": "5"}]}
    )
    assert pair["chosen"][0] == system and pair["rejected"][0]["role"] == "assistant"


def test_ids_are_the_rows_own_or_follow_from_content():
    assert row_id({"id": 7, "prompt": "a"}, "prompt") == "7"
    assert row_id({"prompt": "a"}, "prompt") == row_id({"prompt": "a", "answer": "x"}, "prompt") != row_id({"prompt": "b"}, "prompt")
    unique = Unique()
    assert [unique(k) for k in "aba"] == ["a", "b", "a#2"] and unique.repeated == 1


@pytest.mark.parametrize(
    ("text", "gold"),
    [("so\n#### 72", "72"), ("x\n#### 1,234,567", "1234567"), ("#### -3.5 ", "-3.5"), ("#### $1,000", "1000"), ("y\nA: 18", "18"), ("72", None),
     ("#### 5\nmore", None), ("#### many", None)],
)  # fmt: skip
def test_gold_answer(text, gold):
    assert gold_answer(text) == gold


def test_calculator_marks():
    assert strip_calculator("48/2 = <<48/2=24>>24 clips, 1 << 2") == "48/2 = 24 clips, 1 << 2"


def test_gsm8k_rows():
    row = {"question": "Q", "answer": "It is <<1+1=2>>2.\n#### 2"}
    [out] = Gsm8k()([row])
    assert (out["prompt"], out["completion"], out["answer"]) == ("Q", "It is 2.\n#### 2", "2")
    assert next(iter(Gsm8k(keep_marks=True)([row])))["completion"] == row["answer"]
    with pytest.raises(DataError, match="does not end in a line '#### number'"):
        list(Gsm8k()([{"question": "Q", "answer": "two"}]))
    with pytest.raises(DataError, match="no column 'question'"):
        list(Gsm8k()([{"prompt": "Q"}]))


def solutions(*marks):
    return {
        "question": "Q",
        "ground_truth": "x\nA: 2",
        **{f"m{i}": {"is_correct": ok, "solution": text} for i, (ok, text) in enumerate(marks)},
    }


def test_gsm8k_pairs():
    rows = [
        solutions((True, "a<<1=1>>"), (False, "b"), (False, "c"), (False, "c")),
        solutions((True, "a")),
        solutions((False, "a"), (True, "z"), (True, "y"), (False, "d")),
    ]
    out = list(Gsm8kPairs()(rows))
    assert [(r.get("id"), r.get("chosen"), r.get("rejected"), r.get(SKIP)) for r in out] == [
        ("gsm8k-0", "a", "b", None),
        (None, None, None, "no_contrast"),
        ("gsm8k-2", "z", "a", None),
    ]
    assert out[0]["answer"] == "2" and out[0]["prompt"] == "Q"
    assert [r["id"] for r in Gsm8kPairs(max_pairs=3)(rows) if SKIP not in r] == ["gsm8k-0", "gsm8k-2", "gsm8k-2.1"]
    assert [r["rejected"] for r in Gsm8kPairs(max_pairs=3, reuse=True)(rows[:1])] == ["b", "c"]
    with pytest.raises(DataError, match="has no solutions"):
        list(Gsm8kPairs()([{"question": "Q"}]))


def test_numbers_about_an_answer_become_its_rewards() -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True, "score": 3, "margin": "large"}]
    (row,) = Columns().apply(rows)
    assert row["rewards"] == {"label": 1.0, "score": 3.0}
    assert row["meta"] == {"label": True, "score": 3, "margin": "large"}


def test_a_mapped_reward_must_be_a_number() -> None:
    (row,) = Columns({"label": "desirable"}).apply([{"prompt": "a", "completion": "b", "desirable": False}])
    assert row["rewards"] == {"label": 0.0} and row["meta"] == {}
    for bad in ("yes", float("nan")):
        with pytest.raises(DataError, match=r"row 0: label is .*columns\.label=desirable.*finite number"):
            list(Columns({"label": "desirable"}).apply([{"prompt": "a", "desirable": bad}]))
    with pytest.raises(DataError, match="did you mean 'margin'"):
        Columns({"margn": "m"})
