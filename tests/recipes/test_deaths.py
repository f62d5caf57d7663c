"""One process of a run dies in the middle.  An engine is replaced and the run ends as if nothing had happened; a learner ends the run in one
message, and the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.recipes.conftest import Finished, moved, start, train
from tests.recipes.test_resume import RUN, gone, numbers, processes

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that nobody disturbs."""
    run = train(tmp_path_factory.mktemp("deaths") / "whole", *RUN)
    assert all(row["learner/grad_norm"] > 0 for row in run.rows) and moved(run.folder), "a run that learns nothing proves nothing here"
    return run


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def bereaved(folder: Path, actor: str) -> tuple[subprocess.Popen[str], str]:
    """A run whose ``actor`` was killed once the checkpoint of step 2 was whole, and the mark of its processes."""
    mark = f"TEST_RUN={folder.name}-{time.time_ns()}"
    name, value = mark.split("=")
    process = start(*RUN, f"run_dir={folder}", env={name: value})
    end = time.monotonic() + 400
    while not (folder / "checkpoints" / "step_00000002").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-4000:]
        time.sleep(0.05)
    places = [p for p in Path("/proc").glob("[0-9]*") if mark in _read(p / "environ") and f"ray::{actor}" in _read(p / "cmdline")]
    assert len(places) == 1, processes(mark)
    os.kill(int(places[0].name), signal.SIGKILL)
    return process, mark


def test_a_run_whose_engine_dies_ends_as_if_nothing_had_happened(whole: Finished, tmp_path: Path) -> None:
    process, mark = bereaved(tmp_path / "run", "EngineActor")
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output[-4000:]
    run = Finished(tmp_path / "run", output)
    assert run.summary["exit"] == "finished" and not gone(mark)
    assert max(row["rollout/engine_deaths"] for row in run.rows) >= 1, "the engine was not seen to die"
    exports = [(one.folder / "export" / "model.safetensors").read_bytes() for one in (whole, run)]
    assert exports[0] == exports[1], "what was sampled again is not what would have been sampled"


def test_a_run_whose_learner_dies_says_how_to_go_on(whole: Finished, tmp_path: Path) -> None:
    process, mark = bereaved(tmp_path / "run", "LearnerActor")
    output = process.communicate(timeout=500)[0]
    assert process.returncode not in (0, None) and not gone(mark)
    said = [line for line in output.splitlines() if "learner rank 0 died" in line]
    assert len(said) == 1 and said[0].startswith("posttrain: LearnerError: "), output[-4000:]
    assert f"run_dir={tmp_path / 'run'} resume=auto goes on from" in output and "Traceback" not in output and "(raylet)" not in output
    assert "learner" in json.loads((tmp_path / "run" / "summary.json").read_text())["exit"]
    resumed = train(tmp_path / "run", *RUN)
    assert {row["step"]: numbers(row) for row in resumed.rows} == {row["step"]: numbers(row) for row in whole.rows}
    assert (resumed.folder / "export" / "model.safetensors").read_bytes() == (whole.folder / "export" / "model.safetensors").read_bytes()
