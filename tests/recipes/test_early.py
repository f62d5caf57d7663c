"""Early experience with the real engines: the agent acts in the expert's states, the world is learnt, then the expert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.testing.tiny import create_tiny_model
from tests.data.test_branches import transcript
from tests.recipes.conftest import ROOT, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


def test_from_transcripts_to_a_policy(tmp_path: Path) -> None:
    model = create_tiny_model(tmp_path / "model", hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=128)
    rows = [transcript(start) for start in (1, 2, 3)]
    for row in rows:
        for message in row["messages"]:
            message |= {"by": "expert"} if message["role"] == "assistant" else {}
    (tmp_path / "imitate").mkdir()
    (tmp_path / "imitate" / "transcripts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["--model", model, "--data", tmp_path / "imitate" / "transcripts.jsonl", "--environment", "tests.data.test_branches.Line", "--out", tmp_path / "branches.jsonl"]
    words += ["--reflections", tmp_path / "imitate" / "why.jsonl", "--k", "4", "--max-tokens", "120", "--max-model-len", "900", "--dtype", "float32"]
    done = subprocess.run([sys.executable, "-m", "posttrain.data.branches", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in (tmp_path / "branches.jsonl").read_text().splitlines()]
    assert f"{len(told)} observations in 6 states" in done.stdout and 6 < len(told) <= 24
    assert all(row["messages"][-1]["by"] == "environment" and row["messages"][-1]["content"] == row["messages"][-3]["content"].replace("start", "at") for row in told), (
        "a random model says nothing that moves it"
    )
    assert (tmp_path / "imitate" / "why.jsonl").read_text().count('"by": "expert"') >= 1
    run = train(
        tmp_path / "run", "recipe=early_experience", f"model.path={model}", "model.dtype=float32", f"stages.world.data.train={{path: {tmp_path / 'branches.jsonl'}}}",
        f"stages.imitate.data.train={{path: {tmp_path / 'imitate'}}}", "stages.world.steps=15", "stages.imitate.steps=15", "rollout.prompts_per_step=8", "learner.lr=3e-3",
    )  # fmt: skip
    world, imitate = ([row for row in run.rows if row["stage"] == name] for name in ("world", "imitate"))
    assert len(world) == len(imitate) == 15
    assert world[-1]["observations/nll"] < 0.6 * world[0]["observations/nll"] and imitate[-1]["demos/nll"] < imitate[0]["demos/nll"]
    assert (run.folder / "export" / "imitate" / "model.safetensors").is_file()
