"""A teacher that was asked once: what is stored gives the gradient of the teacher that is there, and files say whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import LearnerConfig, ModelConfig
from posttrain.data.files import DataError
from posttrain.data.load import load_data
from posttrain.data.pack import empty_like
from posttrain.data.rows import to_rows
from posttrain.data.stored import main, store
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.mixture.gate import answer_of
from posttrain.records import Demo, Row, TokenBatch
from posttrain.testing.tiny import create_tiny_model

SIZES: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "num_layers": 1, "intermediate_size": 64, "alphabet": "abcdefgh 12"}
STORED = ("regularizers.distill.to=stored",)
ROWS = [{"id": "a", "prompt": "ab", "completion": "cde"}, {"id": "b", "prompt": "1", "completion": "2"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored")
    create_tiny_model(out / "student", seed=1, hidden_size=64, **SIZES)
    create_tiny_model(out / "teacher", seed=2, hidden_size=128, **SIZES)
    (out / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return out


def parts(folder: Path) -> tuple[Any, Any, list[Demo]]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    demos, _ = load_data("demos", ROWS, tokenizer)
    return tokenizer, teacher, demos  # type: ignore[return-value]


def gradients(folder: Path, overrides: tuple[str, ...], batch: TokenBatch, cuts: list[list[int]], dtype: str = "float64") -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
    goal = load("offline_kd", overrides)
    cfg = ModelConfig(path=str(folder / "student"), teacher=str(folder / "teacher"), dtype=dtype)
    one = TorchEngine(cfg, LearnerConfig(engine="torch", head_chunk=3), goal, total_steps=1)
    batch = batch.replace(totals=goal.totals(batch))
    for part in cuts:
        metrics = one.forward_backward(batch.take(part))
    return torch.cat([one.grads[p].flatten() for _, p in one.named]), metrics


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_teacher_stored_whole_is_the_teacher(folder: Path, direction: str) -> None:
    tokenizer, teacher, demos = parts(folder)
    whole = int(teacher.config.vocab_size)
    stored, report = load_data("stored", list(store(demos, teacher, tokenizer, whole)), tokenizer)
    assert report.read == 2 and [d.id for d in stored] == ["a", "b"]  # type: ignore[union-attr]
    live, kept = (TokenBatch.from_sequences(to_rows(d), dtype=torch.float64) for d in (demos, stored))
    assert kept.stored is not None and kept.stored[0].shape == (kept.num_tokens, whole)
    on = live.trainable
    assert torch.equal(live.target_ids[on], kept.target_ids[kept.trainable]), "what is learnt is the same"
    turn = f"regularizers.distill.direction={direction}"
    truth, seen = gradients(folder, (turn,), live, [[0, 1]])
    ours, told = gradients(folder, (turn, *STORED), kept, [[0, 1]])
    assert float(truth.norm()) > 1e-3
    assert float((ours - truth).norm() / truth.norm()) < 1e-3, "log-probs are kept to five places"
    assert told["demos/distill"][0] == pytest.approx(seen["demos/distill"][0], rel=1e-3)


def test_a_few_tokens_and_a_bucket_never_claim_more(folder: Path) -> None:
    tokenizer, teacher, demos = parts(folder)
    found = []
    for k in (1, 4, 99):
        stored, _ = load_data("stored", list(store(demos, teacher, tokenizer, k)), tokenizer)
        batch = TokenBatch.from_sequences(to_rows(stored), dtype=torch.float64)
        whole, metrics = gradients(folder, STORED, batch, [[0, 1]])
        cut, _ = gradients(folder, STORED, batch, [[1], [], [0]])
        torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-13)
        found.append(metrics["demos/distill"][0])
    assert 0 < found[0] < found[1] < found[2]


def test_a_rank_without_work_takes_part(folder: Path) -> None:
    tokenizer, teacher, demos = parts(folder)
    stored, _ = load_data("stored", list(store(demos, teacher, tokenizer, 4)), tokenizer)
    batch = TokenBatch.from_sequences(to_rows(stored), dtype=torch.float64)
    goal = load("offline_kd", STORED)
    cfg = ModelConfig(path=str(folder / "student"), teacher=str(folder / "teacher"), dtype="float64")
    one = TorchEngine(cfg, LearnerConfig(engine="torch", head_chunk=3), goal, total_steps=1)
    idle = empty_like(batch)
    assert idle.stored is None and one.forward_backward(idle.replace(totals=goal.totals(batch))) == {}
    assert all(bool((one.grads[p] == 0).all()) for _, p in one.named)


def test_the_command_writes_what_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "stored.jsonl"
    main(["--teacher", str(folder / "teacher"), "--data", str(folder / "answers.jsonl"), "--out", str(out), "--top-k", "3"])
    assert "2 answers, the 3 most probable tokens" in capsys.readouterr().out
    tokenizer, teacher, demos = parts(folder)
    assert [json.loads(line) for line in out.read_text().splitlines()] == list(store(demos, teacher, tokenizer, 3))
    stored, _ = load_data("stored", str(out), AutoTokenizer.from_pretrained(folder / "student"), max_length=6, truncation="end")
    assert all(sum(len(s.ids) for s in d.segments) <= 6 for d in stored)  # type: ignore[union-attr]
    (answer,) = answer_of(stored[0])  # type: ignore[arg-type]
    assert answer.stored is not None and len(answer.stored) == len(answer.ids)


def spoil(row: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return [{**row, **changes}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocabulary": "0123"}, r"stored with another tokenizer \(vocabulary 0123"),
        ({"num_prompt": 1}, r"\d+ distributions for \d+ tokens"),
        ({"top_ids": [[1, 1, 2]]}, "zip"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    tokenizer, teacher, demos = parts(folder)
    row = next(store(demos, teacher, tokenizer, 3))
    if "top_ids" in changes:
        changes, reason = {"top_ids": [[1, 1, 2], *row["top_ids"][1:]]}, "token 0 of the answer has ids that repeat"
    with pytest.raises(DataError, match=reason):
        load_data("stored", spoil(row, **changes), tokenizer)
    with pytest.raises(DataError, match=r"no column 'ids'.*written by python -m posttrain.data.stored"):
        load_data("stored", [{"prompt": "a", "completion": "b"}], tokenizer)


def test_lengths(folder: Path) -> None:
    tokenizer, teacher, demos = parts(folder)
    rows = list(store(demos, teacher, tokenizer, 3))
    with pytest.raises(DataError, match="more than max_length=4"):
        load_data("stored", rows, tokenizer, max_length=4)
    longest = max(len(r["ids"]) for r in rows)
    kept, report = load_data("stored", rows, tokenizer, max_length=longest - 1, truncation="drop")
    assert len(kept) + report.dropped["too_long"] == 2 and report.dropped["too_long"] >= 1


def test_a_batch_without_what_was_stored_says_so(folder: Path) -> None:
    batch = TokenBatch.from_sequences([Row(ids=[5, 6, 7])])
    with pytest.raises(ValueError, match=r"data holds none; set data.kind=stored"):
        gradients(folder, STORED, batch, [[0]])
    silent, _ = gradients(folder, STORED, batch, [[]])
    assert float(silent.abs().max()) == 0.0, "a rank without work"


def test_entries_of_a_row_become_columns() -> None:
    rows = [Row(ids=[1, 2, 3], stored=[None, ([4, 5], [-0.5, -1.5]), ([6], [-0.1])]), Row(ids=[1, 2])]
    batch = TokenBatch.from_sequences(rows)
    assert batch.stored is not None
    assert batch.stored[0].tolist() == [[4, 5], [6, -1], [-1, -1]] and batch.stored[1].tolist()[0] == pytest.approx([-0.5, -1.5])
    assert batch.take([1]).stored[0].tolist() == [[-1, -1]] and batch.to("cpu").stored[1].shape == (3, 2)  # type: ignore[index]
    with pytest.raises(ValueError, match="stored has 1 entries but ids has 2"):
        TokenBatch.from_sequences([Row(ids=[1, 2], stored=[None])])
