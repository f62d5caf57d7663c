"""metrics.jsonl survives crashes and resumes, hosted trackers never stop a run, completions are readable."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.records import Prompt, Rollout, Score, Segment, Source
from posttrain.tracking import CompletionsWriter, Forgiving, JsonlTracker, open_trackers, wandb_mode


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_have_step_stage_time_and_flat_names(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", "sft")
    tracker.log(1, {"demos/nll": 1.5, "loss": math.nan, "learner/lr": math.inf})
    (row,) = rows(tmp_path / "metrics.jsonl")  # flushed at once, not at close
    assert (row["step"], row["stage"], row["demos/nll"]) == (1, "sft", 1.5)
    assert row["loss"] is None and row["learner/lr"] is None, "standard JSON has no NaN"
    assert row["time"] > 1.6e9
    tracker.close()


def test_resume_drops_later_rows_of_the_stage_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for stage, steps in (("sft", 3), ("grpo", 5)):
        tracker = JsonlTracker(path, stage)
        for step in range(1, steps + 1):
            tracker.log(step, {"x": float(step)})
        tracker.close()
    with path.open("a") as file:
        file.write('{"step": 6, "stage": "grpo", "x"')  # killed while writing
    tracker = JsonlTracker(path, "grpo", resume_step=2)
    tracker.log(3, {"x": 30.0})
    tracker.close()
    assert [(r["stage"], r["step"], r["x"]) for r in rows(path)] == [
        ("sft", 1, 1.0),
        ("sft", 2, 2.0),
        ("sft", 3, 3.0),
        ("grpo", 1, 1.0),
        ("grpo", 2, 2.0),
        ("grpo", 3, 30.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_stage_that_starts_again_loses_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        tracker = JsonlTracker(path, "sft")
        tracker.log(1, {})
        tracker.close()
    assert len(rows(path)) == 1


def test_tensorboard_files_hold_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    trackers = open_trackers(tmp_path, "sft", tensorboard=True, say=said.append)
    for tracker in trackers:
        tracker.log(1, {"demos/nll": 2.5})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    (scalar,) = events.Scalars("demos/nll")
    assert (scalar.step, scalar.value) == (1, 2.5)
    assert said == []


@pytest.mark.slow
def test_wandb_without_a_login_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    said: list[str] = []
    trackers = open_trackers(tmp_path, "grpo", wandb=True, name="quickstart-1", say=said.append)
    for tracker in trackers:
        tracker.log(1, {"reward/mean": 0.25})
        tracker.log(2, {"reward/mean": 0.5})
        tracker.close()
    assert said == []
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    until = time.monotonic() + 60  # the writer is another process
    while b"reward/mean" not in record.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"reward/mean" in record.read_bytes()
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


def test_wandb_mode(tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    assert wandb_mode({}, tmp_path) == "offline"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    netrc.chmod(0o600)
    assert wandb_mode({}, tmp_path) == "online"
    assert wandb_mode({"WANDB_BASE_URL": "http://localhost:8080"}, tmp_path) == "offline"
    assert wandb_mode({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, tmp_path) == "disabled"
    assert wandb_mode({"WANDB_API_KEY": "k"}, tmp_path / "none") == "online"
    netrc.write_text("this is no netrc {")
    assert wandb_mode({}, tmp_path) == "offline"


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on() -> None:
    class Broken:
        calls = 0

        def log(self, step: int, metrics: Any) -> None:
            Broken.calls += 1
            raise ConnectionError("server gone\nand a long story")

        def close(self) -> None:
            raise AssertionError("not called any more")

    said: list[str] = []
    tracker = Forgiving("W", Broken, said.append)
    for step in range(3):
        tracker.log(step, {})
    tracker.close()
    assert Broken.calls == 1
    assert len(said) == 1 and "server gone" in said[0] and "metrics.jsonl" in said[0] and "\n" not in said[0]

    def unavailable() -> Any:
        raise ImportError("no module")

    tracker = Forgiving("T", unavailable, said.append)
    tracker.log(1, {})
    tracker.close()
    assert len(said) == 2 and "could not start" in said[1]


def rollout(reward: float | None, text: str = 'an "answer"\nin two lines') -> Rollout:
    failed = reward is None
    return Rollout(
        sample_id="p/0",
        prompt=Prompt(id="p", ids=(1, 2), text="2+2=", answer=4),
        segments=(Segment((5, 6), Source.policy, logprobs=(-0.5, -0.25), version=3), Segment((9,), Source.tool)),
        finish="length",
        text=text,
        scores={"exact": Score(None, "timeout", "30 s") if failed else Score(reward)},
        reward=reward,
        advantage=None if failed else 1.5,
    )


def test_completions_are_one_readable_line_each(tmp_path: Path) -> None:
    path = CompletionsWriter(tmp_path / "completions").write(7, [rollout(1.0), rollout(None)])
    assert path.name == "step_000007.jsonl"
    good, failed = rows(path)
    assert good == {
        "sample": "p/0",
        "prompt_id": "p",
        "prompt": "2+2=",
        "completion": 'an "answer"\nin two lines',
        "answer": 4,
        "reward": 1.0,
        "scores": {"exact": 1.0},
        "failed": {},
        "said": {},
        "advantage": 1.5,
        "version": 3,
        "finish": "length",
        "tokens": 3,
    }
    assert failed["reward"] is None and failed["scores"] == {"exact": None} and failed["failed"] == {"exact": "timeout: 30 s"}


def test_token_ids_are_kept_as_sampled_when_asked_for(tmp_path: Path) -> None:
    (row,) = rows(CompletionsWriter(tmp_path, with_ids=True).write(1, [rollout(1.0)]))
    assert row["prompt_ids"] == [1, 2] and row["ids"] == [5, 6, 9] and row["logprobs"] == [-0.5, -0.25, None]


def test_completions_of_steps_after_the_resumed_one_go(tmp_path: Path) -> None:
    writer = CompletionsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, [rollout(0.0)])
    CompletionsWriter(tmp_path, resume_step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]
