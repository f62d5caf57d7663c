"""summary.json and the closing lines."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from posttrain.report.summary import Summary, versions


def report(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "interval": (accuracy - 0.05, accuracy + 0.05), "n": 256, "samples": 256, "failed": 0, "by_level": {}}


def finished(root: Path) -> Summary:
    for stage in ("sft", "grpo"):
        (root / "checkpoints" / stage / "step_00000060").mkdir(parents=True)
        (root / "checkpoints" / stage / "step_00000020").mkdir()
    summary = Summary(root, ["posttrain", "train", "recipe=quickstart", "seed=1", "run_dir=there", "resume=auto"])
    summary.add_stage(
        "sft",
        {
            "steps": 120,
            "evaluation": {"before": report(0.05), "step 60": report(0.2), "after": report(0.3)},
            "metrics": {"demos/nll": math.nan},
            "timings": {"start": 10.0, "learn": 20.0},
            "export": "runs/x/export/sft",
        },
    )
    summary.add_stage(
        "grpo",
        {
            "steps": 60,
            "evaluation": {"before": report(0.3), "after": report(0.75)},
            "metrics": {"reward/mean": 0.8},
            "timings": {"learn": 30.0, "rollout": 65.0},
            "export": "runs/x/export/grpo",
        },
    )
    return summary


def test_summary_has_everything_a_script_needs(tmp_path: Path) -> None:
    finished(tmp_path).write("finished")
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["exit"] == "finished"
    assert [(a["when"], a["accuracy"], a["interval"], a["n"]) for a in told["accuracy"]] == [
        ("before sft", 0.05, [pytest.approx(0.0), pytest.approx(0.1)], 256),
        ("after sft", 0.3, [pytest.approx(0.25), pytest.approx(0.35)], 256),
        ("after grpo", 0.75, [pytest.approx(0.7), pytest.approx(0.8)], 256),
    ]
    assert told["stages"]["sft"]["evaluation"]["step 60"]["accuracy"] == 0.2
    assert told["stages"]["sft"]["metrics"]["demos/nll"] is None, "standard JSON"
    assert told["stages"]["grpo"]["metrics"]["reward/mean"] == 0.8
    assert told["timings"] == {"start": 10.0, "learn": 50.0, "rollout": 65.0}
    assert told["paths"]["checkpoint"].endswith("checkpoints/grpo/step_00000060")
    assert told["paths"]["export"] == "runs/x/export/grpo"
    assert {"python", "platform", "torch", "ray", "transformers"} <= set(told["versions"])
    assert told["command"][1] == "train" and told["seconds"] >= 0


def test_closing_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    finished(tmp_path).print_closing(out)
    lines = out.getvalue().splitlines()
    assert "  before sft    5.0 %  [0.0, 10.0] on 256 prompts" in lines
    assert "  after sft    30.0 %  [25.0, 35.0] on 256 prompts" in lines
    assert "  after grpo   75.0 %  [70.0, 80.0] on 256 prompts" in lines
    assert any(line.startswith("checkpoint") and line.endswith("grpo/step_00000060") for line in lines)
    assert any(line.startswith("export") and "runs/x/export/grpo" in line for line in lines)
    assert any(line.startswith("run folder") and line.endswith(str(tmp_path)) for line in lines)
    assert any("rollout 1 min 05 s" in line for line in lines)
    (go_on,) = [line for line in lines if line.startswith("go on with")]
    assert go_on.endswith(f"train recipe=quickstart seed=1 run_dir={tmp_path} resume=auto stages.grpo.steps=120")


def test_a_run_that_failed_early_has_a_summary_too(tmp_path: Path) -> None:
    summary = Summary(tmp_path, ["posttrain", "train"])
    summary.write("ConfigError: no such file")
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["exit"] == "ConfigError: no such file" and told["accuracy"] == [] and told["paths"]["export"] is None
    assert "accuracy" not in summary.closing() and "go on" not in summary.closing()


def test_one_stage_goes_on_without_its_name(tmp_path: Path) -> None:
    summary = Summary(tmp_path, ["posttrain", "train", "recipe=sft"])
    summary.add_stage("train", {"export": "a folder/export", "steps": 50})
    assert (summary.go_on() or "").endswith(f"train recipe=sft run_dir={tmp_path} resume=auto steps=100")


def test_the_old_summary_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    summary = finished(tmp_path)
    summary.write("first")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    summary.write("ValueError: something else")  # the first cause must not be hidden by this one
    assert "No space left" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["exit"] == "first"
    with pytest.raises(OSError, match="free some space"):
        summary.write("finished")


def test_versions_name_only_what_is_installed() -> None:
    assert all(versions().values())
