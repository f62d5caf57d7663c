"""A run that is killed goes on where it stopped, and becomes the run it would have been; whatever ends a run, nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.recipes.conftest import SMALL, moved, start, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

LETTERS = "reward.fn.letters._target_=tests.recipes.rewards.letters"
WORDS = ["recipe=grpo", *SMALL, "data=composition", "reward=none", LETTERS, "data.train.num=64", "rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=12"]
RUN = [*WORDS, "steps=6", "checkpoint.every=1", "checkpoint.keep=3", "learner.lr=1e-3", "eval.every=3", "eval.limit=4", "resume=auto"]


def processes(mark: str) -> list[str]:
    """Command lines of the processes whose environment holds ``mark``."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes() and (place / "stat").read_text().rsplit(")", 1)[-1].split()[0] != "Z":
                found.append((place / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def gone(mark: str, seconds: float = 240.0) -> list[str]:
    """What is still there after a while; empty when all is well."""
    end = time.monotonic() + seconds
    while (left := processes(mark)) and time.monotonic() < end:
        time.sleep(0.5)
    return left


def interrupted(folder: Path, after_step: int, how: signal.Signals) -> str:
    """Start a run and send a signal once a step's checkpoint is whole; the mark of its processes."""
    mark = f"TEST_RUN={folder.name}-{time.time_ns()}"
    name, value = mark.split("=")
    process = start(*RUN, f"run_dir={folder}", env={name: value})
    end = time.monotonic() + 400
    while not (folder / "checkpoints" / f"step_{after_step:08d}").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-4000:]
        time.sleep(0.05)
    os.kill(process.pid, how)
    process.communicate(timeout=300)
    assert process.returncode != 0
    return mark


def numbers(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.startswith("time") and k not in ("time", "learner/time_s")}


def test_a_killed_run_becomes_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *RUN)
    mark = interrupted(tmp_path / "cut", 2, signal.SIGKILL)
    assert not gone(mark), "processes of a killed run must end by themselves"
    torn = max((tmp_path / "cut" / "checkpoints").glob("step_*"))
    victim = next(torn.glob("learner/*.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])  # and the machine went down while it was written
    resumed = train(tmp_path / "cut", *RUN)
    assert "passed over" in resumed.output and "goes on after step" in resumed.output

    assert all(row["learner/grad_norm"] > 0 for row in whole.rows) and moved(whole.folder), "a run that learns nothing proves nothing here"
    exports = [(run.folder / "export" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert exports[0] == exports[1], "the weights differ"
    last = {run.folder: {row["step"]: numbers(row) for row in run.rows} for run in (whole, resumed)}
    assert sorted(last[resumed.folder]) == [1, 2, 3, 4, 5, 6]
    assert last[whole.folder] == last[resumed.folder]
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5, 6], "steps that were repeated must not be listed twice"


def test_a_run_that_is_asked_to_stop_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    mark = interrupted(tmp_path / "run", 1, signal.SIGTERM)
    assert not gone(mark)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit"].startswith("Terminated")


def test_a_finished_run_goes_on_for_more_steps(tmp_path: Path) -> None:
    """The command that the closing lines suggest."""
    words = ["recipe=sft", *SMALL, "data.train={_target_: posttrain.data.worlds.composition.Composition, split: train, num: 64, seed: 0}", "learner.warmup_steps=0"]
    first = train(tmp_path / "run", *words, "steps=2")
    assert f"run_dir={tmp_path / 'run'} resume=auto steps=4" in first.output
    second = train(tmp_path / "run", *words, "resume=auto", "steps=4")
    assert [row["step"] for row in second.rows] == [1, 2, 3, 4] and second.summary["stages"]["train"]["steps"] == 4
