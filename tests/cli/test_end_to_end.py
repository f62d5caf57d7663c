"""A short run, then its checkpoint exported and its model evaluated, each as a user would call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import TINY

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
TERM = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Confident:
    low: float = 0.1

    def factor(self, view, advantage):
        return (torch.exp(view.logp) >= self.low).to(view.logp.dtype)
"""


def posttrain(folder: Path, *words: str) -> str:
    """What a command printed, errors and warnings included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for noise in ("Setting accelerator", "Writing model shards", "Error executing job", "[HYDRA]"):
        assert noise not in done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, started by --multirun, with a mask of the user's own."""
    here = tmp_path_factory.mktemp("run")
    (here / "my_terms.py").write_text(TERM)
    sure = "stages.sft.loss.streams.demos.masks.sure"
    words = [
        "recipe=quickstart",
        "~stages.grpo",
        *TINY,
        "learner.engine=torch",
        "--multirun",
        "seed=3",
        "stages.sft.steps=2",
        "stages.sft.eval.at_start=false",
    ]
    words += [
        "stages.sft.eval.at_end=false",
        "stages.sft.learner.warmup_steps=0",
        f"{sure}._target_=my_terms.Confident",
        f"{sure}.low=1e-4",
    ]
    said = posttrain(here, "train", *words)
    assert "run 1: seed=3" in said or "run 1:" in said
    (folder,) = (here / "runs").glob("quickstart-*")
    assert '"demos/sure/factor": 1.0' in (folder / "metrics.jsonl").read_text(), "the mask came with the run to its learner"
    return folder


def test_export_gives_the_weights_of_the_run_also_after_it_was_moved(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    try:
        said = posttrain(tmp_path, "export", "run_dir=moved", "out=mine")
    finally:
        moved.rename(run)
    assert said.strip() == str(tmp_path / "mine")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (run / "export", tmp_path / "mine"))
    assert theirs.keys() == ours.keys() and all(bool((theirs[name] == ours[name]).all()) for name in theirs)
    assert {p.name for p in (run / "export").iterdir()} == {p.name for p in (tmp_path / "mine").iterdir()}


@pytest.mark.vllm
def test_eval_of_an_export(run: Path) -> None:
    said = posttrain(run, "eval", "recipe=quickstart", "model.path=export", "eval.limit=8", "eval.max_tokens=4")
    assert re.match(r"accuracy \d+\.\d % \[[\d.]+, [\d.]+\] on 8 prompts, 1 answer each at temperature 0\n", said)
    assert "level 1:" in said
