"""Thoughts before the next words of a text: where the texts are cut, what is put behind a thought, what the words are worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.advantage import Constant
from posttrain.contrib.information import InformationGain
from posttrain.data.contexts import with_contexts, without_thought
from posttrain.data.files import DataError
from posttrain.data.positions import Positions, main
from posttrain.data.rows import to_rows
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import InTurn
from posttrain.mixture.schedule import Linear
from posttrain.mixture.thoughts import BeforeText
from posttrain.records import Group, Prompt, Rollout, Row, Score, Segment, Source, TokenBatch
from posttrain.reward.rules import Behind, Exact, LengthBudget
from posttrain.testing.tiny import create_tiny_model
from tests.loss.cases import composed

GATE = BeforeText("[", "]", encode=lambda text: tuple(map(ord, text)))
ASKED = Prompt("t/2", (*b"ab cd", ord("[")), answer=" ef")


def group(*thoughts: str, asked: Prompt = ASKED, **more: Any) -> Group:
    rollouts = []
    for i, said in enumerate(thoughts):
        segments = (Segment(tuple(map(ord, said)), Source.policy, logprobs=(-1.0,) * len(said), version=0),) if said else ()
        rollouts.append(Rollout(f"t/2/{i}", asked, segments, text=said, reward=0.0, **more))
    return Group(asked, tuple(rollouts))


def rows_of(one: Group, gate: BeforeText = GATE) -> list[Row]:
    return to_rows(Constant()(gate([one], Demos(), 0, 0.0)))


def test_the_words_stand_behind_the_thought_and_are_not_learnt() -> None:
    closed, cut = rows_of(group("hm]", "hmm"))
    assert bytes(closed.ids) == b"ab cd[hm] ef" and bytes(cut.ids) == b"ab cd[hmm] ef", "a thought that was cut off is closed"
    names = [Source(s).name for s in cut.sources]  # type: ignore[union-attr, call-overload]
    assert names == ["prompt"] * 5 + ["tool"] + ["policy"] * 3 + ["prompt"] + ["tool"] * 3
    assert [t for t, on in enumerate(cut.trainable or []) if on] == [6, 7, 8]
    whole = rows_of(group("hm]", "hmm"))
    _, more = without_thought(whole)
    assert [(bytes(r.ids), r.group, r.context) for r in more] == [(b"ab cd ef", "t/2", "without_thought")], "one for the group, without the words that ask"
    assert [t for t, on in enumerate(more[0].trainable or []) if on] == [5, 6, 7]
    assert len(with_contexts(whole, ["without_thought"])) == 3 and without_thought([*whole, *more])[1] == more


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="has no next words"):
        rows_of(group("hm]", asked=replace(ASKED, answer=None)))
    with pytest.raises(ValueError, match="does not end with the tokens of mixture"):
        rows_of(group("hm]", asked=replace(ASKED, ids=ASKED.ids[:-1])))
    with pytest.raises(ValueError, match="must both say something, or neither"):
        BeforeText("[", "")
    (row,) = rows_of(group("hm]"))
    with pytest.raises(ValueError, match="is in no group"):
        without_thought([replace(row, group=None)])
    (bare,) = rows_of(group("hm", asked=replace(ASKED, ids=ASKED.ids[:-1])), BeforeText("", "", encode=GATE.encode))
    assert bytes(bare.ids) == b"ab cdhm ef"
    assert InTurn({"thoughts": BeforeText("[", "]")}).with_encode(GATE.encode).gates["thoughts"].encode is GATE.encode


def gain(with_thought: list[float], base: list[float], **settings: Any) -> list[float]:
    """Weights of one-token thoughts whose words get these log-probs in all, against what the base gives them."""
    rows = [
        Row(ids=[1, 2, 3], sources=["prompt", "policy", "tool"], logps={"current": [0.0, -1.0, x], "base": [0.0, -9.0, -9.0]}, group="g", sample_id=str(i))
        for i, x in enumerate(with_thought)
    ]
    for row in rows:
        row.trainable = [False, True, False]
    rows.append(Row(ids=[1, 3], sources=["prompt", "tool"], trainable=[False, True], logps={"current": [0.0, -7.0], "base": [0.0, base[0]]}, group="g", context="without_thought"))
    goal = composed("rlp", tuple(f"streams.rollouts.advantage.{k}={v}" for k, v in settings.items()))
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)
    weights = goal.weights(batch)
    assert not bool(weights[batch.source == int(Source.tool)].any()), "no gradient on the text"
    assert goal(batch).metrics["rollouts/information"][1] == len(with_thought)
    return [w * len(with_thought) for w in weights[batch.source == int(Source.policy)].tolist()]


def test_what_a_thought_is_worth() -> None:
    assert gain([math.log(0.2)], [math.log(0.2)], center="none") == [0.0], "it tells nothing"
    assert gain([0.0], [math.log(0.2)], center="none") == [pytest.approx(1.609, abs=1e-3)], "it makes certain what had probability 0.2"
    assert gain([0.0, math.log(0.2)], [-5.0]) == [pytest.approx(0.8047, abs=1e-4), pytest.approx(-0.8047, abs=1e-4)], "the mean of the group is taken off"
    assert gain([-400.0], [-1.0], center="none", limit=3.0) == [pytest.approx(-3.0)] and gain([-400.0], [-1.0], center="none") == [pytest.approx(-399.0)]
    with pytest.raises(ValueError, match="center='median' does not exist"):
        InformationGain(center="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit=0"):
        InformationGain(limit=0)


def test_an_empty_thought_of_its_own_copy_gains_nothing() -> None:
    """The row without a thought is then the same row."""
    (row,) = to_rows(Constant()(BeforeText("", "", encode=GATE.encode)([group("x", asked=replace(ASKED, ids=ASKED.ids[:-1]))], Demos(), 0, 0.0)))
    _, (plain,) = without_thought([row])
    assert [i for i, s in zip(row.ids, row.sources or [], strict=True) if s != Source.policy] == list(plain.ids)


def test_a_text_that_is_missing_is_named() -> None:
    row = Row(ids=[1, 2, 3], sources=["prompt", "policy", "tool"], trainable=[False, True, False], logps={"current": [0.0, -1.0, -1.0], "base": [0.0] * 3}, group="g", sample_id="lonely")
    with pytest.raises(ValueError, match=r"the text of sample 'lonely' without a thought.*mixture=before_text"):
        composed("rlp").weights(TokenBatch.from_sequences([row]))


def texts(tmp_path: Path, *lines: Any) -> str:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(tmp_path / "texts.jsonl")


def test_texts_are_cut_where_words_begin(tmp_path: Path) -> None:
    path = texts(tmp_path, "one two\n three  four")
    rows = list(Positions(path, per_text=None, open="<").rows())
    assert [(r["prompt"], r["answer"]) for r in rows] == [("one<", " two"), ("one two<", "\n three"), ("one two\n three<", "  four")]
    assert all(r["prompt"][:-1] + r["answer"] == "one two\n three  four"[: len(r["prompt"]) - 1 + len(r["answer"])] for r in rows), "nothing is lost, nothing leaks"
    two = list(Positions(path, per_text=None, words=2, least=2, open="").rows())
    assert [(r["prompt"], r["answer"]) for r in two] == [("one two", "\n three  four")]
    long = texts(tmp_path, " ".join(map(str, range(50))), "short", "a b")
    drawn = [[r["id"] for r in Positions(long, per_text=3, seed=seed).rows()] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4 == len(set(drawn[0])), "three of the first, none of a single word"
    with pytest.raises(DataError, match="row 0 has no text in the column 'text'"):
        list(Positions(texts(tmp_path, 3)).rows())
    for wrong in ({"words": 0}, {"least": 0}, {"per_text": 0}):
        with pytest.raises(DataError, match="must be at least 1"):
            Positions(path, **wrong)  # type: ignore[arg-type]


def test_positions_come_from_easy_to_hard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = create_tiny_model(tmp_path / "model", hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=32)
    out, path = tmp_path / "out.jsonl", texts(tmp_path, "one two three four", "the end is near")
    main(["--model", str(folder), "--data", path, "--out", str(out), "--words", "1", "--open", "<t>"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 and "6 positions, entropy" in capsys.readouterr().out
    entropies = [r["entropy"] for r in rows]
    assert entropies == sorted(entropies) and len(set(entropies)) > 1 and all(r["prompt"].endswith("<t>") for r in rows)
    assert sorted(r["id"] for r in rows) == sorted(r["id"] for r in Positions(path, per_text=None, open="<t>").rows())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    p = model(**tokenizer(rows[0]["prompt"][:-3], return_tensors="pt")).logits[0, -1].double().softmax(-1)
    assert rows[0]["entropy"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_a_budget_that_falls_and_what_stands_behind_a_thought() -> None:
    budget = LengthBudget(Linear(8.0, 4.0))
    assert [budget(n, 0.0) for n in (1, 8, 10, 16, 99)] == [0.0, 0.0, -0.25, -1.0, -1.0]
    assert [budget(n, 1.0) for n in (4, 5, 6, 8)] == [0.0, -0.25, -0.5, -1.0]
    for progress in (0.0, 0.5, 1.0):
        worth = [budget(n, progress) for n in range(20)]
        assert worth == sorted(worth, reverse=True), "never up again"
    with pytest.raises(ValueError, match="limit above 0"):
        LengthBudget(0)
    with pytest.raises(ValueError, match="must stay above 0"):
        LengthBudget(Linear(1.0, 0.0))(3, 1.0)
    words = Behind(Exact(), "]")
    (one,) = group("so ef] then] ef").rollouts
    assert words(one).value == 1.0 and words(replace(one, text="] so")).value == 0.0
    assert (words(replace(one, text="ef")).value, words(replace(one, text="ef")).status) == (0.0, "bad_format")
    placed = Behind(lambda completion: Score(1.0, places=((2, 1.0),)), "]")
    assert placed(replace(one, text="a] ef")).places == ((4, 1.0),), "places count from the answer's beginning"
    with pytest.raises(ValueError, match="Behind needs a mark"):
        Behind(Exact(), "")
    with pytest.raises(ValueError, match="one answer at a time"):
        Behind(lambda completions: [0.0])
