"""Whole runs from the command line, with the real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "posttrain.cli"]
SMALL = ["model=tiny", "model.tiny.hidden_size=64", "model.tiny.num_layers=2", "model.tiny.num_heads=2", "model.tiny.num_kv_heads=1", "model.tiny.intermediate_size=128"]
SOLVERS = {"6b_finetuning": False, "6b_verification": True, "175b_finetuning": False, "175b_verification": True}


@dataclass
class Finished:
    """A run that has ended: its folder and what it printed."""

    folder: Path
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def start(*words: str, **settings: Any) -> subprocess.Popen[str]:
    """``posttrain train WORDS`` in a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, "train", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **settings.get("env", {})},
    )


def train(folder: Path, *words: str, **settings: Any) -> Finished:
    """Run to the end; the output is shown when it fails."""
    process = start(*words, f"run_dir={folder}", **settings)
    output, _ = process.communicate(timeout=settings.get("timeout", 600))
    assert process.returncode == 0, output[-6000:]
    return Finished(folder, output)


def moved(folder: Path, name: str = "export", within: str = "") -> bool:
    """The export loads, and none of its weights (whose names hold ``within``) is what the run began with."""
    from safetensors.torch import load_file

    start, end = (load_file(folder / part / "model.safetensors") for part in ("model", name))
    return start.keys() == end.keys() and all(bool((start[k] != end[k]).any()) for k in start if within in k)


@pytest.fixture(scope="session")
def gsm8k() -> dict[str, str]:
    """Where GSM8K's files are: ``GSM8K_DIR``, or a ``shared/data`` beside the checkout, or a few rows in the same form."""
    for place in (os.environ.get("GSM8K_DIR"), ROOT.parent / "shared" / "data"):
        if place and (Path(place) / "gsm8k_train.jsonl").exists():
            return {"GSM8K_DIR": str(place)}
    folder = ROOT / ".pytest_cache" / "gsm8k"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"Ann has {i} pens and buys {i + 1} more. How many has she?", "answer": f"{i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}"}
        for i in range(2, 40)
    ]
    verdicts = {True: lambda row: row["answer"], False: lambda row: "no idea\nA: 0"}
    solutions = [
        {"question": row["question"], "ground_truth": row["answer"]}
        | {name: {"is_correct": right, "solution": verdicts[right](row)} for name, right in SOLVERS.items()}
        for row in rows
    ]
    for name, given in (("train", rows[:30]), ("test", rows[30:]), ("model_solutions", solutions)):
        (folder / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given))
    return {"GSM8K_DIR": str(folder)}
