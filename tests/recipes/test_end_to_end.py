"""Every shipped recipe runs for a few steps with a tiny model and the real engines, and the settings people combine work together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import SMALL, moved, start, train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = ["data.truncation=drop", "rollout.prompts_per_step=4", "rollout.max_tokens=16", "++learner.warmup_steps=0", "eval.limit=4"]
LIMITS = ["data.train.limit=64", "data.eval.limit=8"]


@pytest.mark.parametrize("recipe", ["gsm8k_sft", "gsm8k_dpo"])
def test_learning_from_files(recipe: str, gsm8k: dict[str, str], tmp_path: Path) -> None:
    limits = LIMITS if recipe == "gsm8k_sft" else LIMITS[:1]
    run = train(tmp_path, f"recipe={recipe}", *SMALL, *SHORT, *limits, "steps=2", "learner.lr=1e-3", "learner.warmup_steps=0", env=gsm8k)
    assert run.summary["exit"] == "finished" and len(run.rows) == 2 and moved(tmp_path)
    if recipe == "gsm8k_dpo":
        assert run.rows[0]["pairs/preference_loss"] == pytest.approx(0.6931, abs=1e-4), "before training the policy is the reference"


@pytest.mark.vllm
def test_grpo_on_gsm8k(gsm8k: dict[str, str], tmp_path: Path) -> None:
    words = ["recipe=gsm8k_grpo", *SMALL, *SHORT, *LIMITS, "steps=2", "rollout.n=2", "eval.at_end=true", "check.weights_moved=false"]
    run = train(tmp_path, *words, "tracking.tensorboard=true", "tracking.wandb=true", env={**gsm8k, "WANDB_MODE": "offline"})
    assert list(tmp_path.rglob("events.out.tfevents.*")) and list(tmp_path.rglob("*.wandb"))
    assert run.summary["exit"] == "finished" and run.summary["accuracy"][-1]["n"] == 4
    assert [row["reward/mean"] for row in run.rows] == [0.0, 0.0], "random answers are wrong, and wrong is a score"
    assert run.rows[0]["mismatch/mean_abs"] < 1e-4
    lines = [json.loads(line) for path in sorted((tmp_path / "completions").iterdir()) for line in path.read_text().splitlines()]
    assert len(lines) == 2 * 4 * 2


@pytest.mark.vllm
def test_three_stages_each_from_the_last(gsm8k: dict[str, str], tmp_path: Path) -> None:
    each = [f"stages.{stage}.{word}" for stage in ("sft", "dpo", "rlvr") for word in ("steps=1", "learner.warmup_steps=0")]
    words = ["recipe=tulu3", *SMALL, *SHORT, "data.train.limit=32", "rollout.n=2", "check.weights_moved=false", *each]
    run = train(tmp_path, *words, env=gsm8k)
    assert list(run.summary["stages"]) == ["sft", "dpo", "rlvr"] and [row["stage"] for row in run.rows] == ["sft", "dpo", "rlvr"]
    for before, after in (("sft", "dpo"), ("dpo", "rlvr")):
        manifest = json.loads(next((tmp_path / "checkpoints" / after).glob("step_*/MANIFEST.json")).read_text())
        assert manifest["model_path"] == str(tmp_path / "export" / before)


LETTERS = ["reward=none", "reward.fn.letters._target_=tests.recipes.rewards.letters"]
WORLD = ["recipe=grpo", *SMALL, "data=composition", *LETTERS, "rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=12", "data.train.num=64"]


@pytest.mark.vllm
def test_adapters_two_ranks_two_engines_and_several_updates(tmp_path: Path) -> None:
    """LoRA under ZeRO-2 on two ranks: the engines serve the merged weights, and their fingerprints are checked at every publish."""
    words = ["steps=3", "loss=dapo", "model.lora={r: 4, alpha: 8.0, dropout: 0.0, targets: all-linear}", "learner.world_size=2", "learner.zero_stage=2", "learner.updates_per_batch=2"]
    run = train(tmp_path, *WORLD, *words, "rollout.num_engines=2", "learner.lr=1e-2")
    assert len(run.rows) == 3 and run.rows[-1]["rollout/engines"] == 2.0
    assert all(row["learner/grad_norm"] > 0 for row in run.rows) and moved(tmp_path, within="_proj")
    assert all(row["mismatch/mean_abs"] < 1e-4 for row in run.rows)


@pytest.mark.vllm
def test_demonstrations_beside_rollouts_in_bfloat16(tmp_path: Path) -> None:
    words = ["steps=2", "loss=sft_plus_rl", "mixture.gate={_target_: posttrain.mixture.gate.Add, demos_per_step: 4}", "model.dtype=bfloat16", "learner.lr=1e-3"]
    demos = ["+data.demos={_target_: posttrain.data.worlds.composition.Composition, split: train, num: 32, seed: 1}"]
    run = train(tmp_path, *WORLD, *words, *demos)
    assert all(row["learner/grad_norm"] > 0 for row in run.rows) and moved(tmp_path)
    assert run.rows[-1]["demos/tokens"] > 0 and run.rows[-1]["rollouts/tokens"] > 0
    assert run.rows[0]["mismatch/mean_abs"] < 0.05


@pytest.mark.vllm
def test_a_run_stops_when_engine_and_learner_disagree(tmp_path: Path) -> None:
    """No two programs agree to 1e-12 in float32: with that tolerance every run must stop before it learns, and say by how much."""
    process = start(*WORLD, "steps=2", "check.mismatch=1e-12", f"run_dir={tmp_path}")
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0 and "differ by" in output and "rollout.dtype" in output and "Traceback" not in output
    assert not (tmp_path / "export").exists() and "differ by" in json.loads((tmp_path / "summary.json").read_text())["exit"]
