"""Thoughts before the next word of plain text, with the real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.data.positions import main
from posttrain.testing.tiny import create_tiny_model
from tests.recipes.conftest import SMALL, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


def test_thoughts_are_worth_what_they_tell_and_the_copy_follows(tmp_path: Path) -> None:
    lines = [f"the {a} likes {b} and the {b} likes {a}" for a in ("cat", "dog", "hen") for b in ("rain", "corn")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = f"{{_target_: posttrain.data.positions.Positions, path: {tmp_path / 'texts.jsonl'}, per_text: 3, open: ' so '}}"
    words = ["recipe=grpo", *SMALL, "loss=rlp", "advantage=constant", "mixture=before_text", "mixture.gate.open=' so '", "mixture.gate.close=z", "rollout.stop=[z]"]
    words += [f"data.train={{source: {source}, chat: false}}", "data.max_prompt_tokens=64", "rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=12", "learner.updates_per_batch=2"]
    words += ["+reward.fn.letters._target_=tests.recipes.rewards.letters", "learner.lr=2e-3", "learner.warmup_steps=1", "learner.base_every=1", "learner.base_mix=0.1", "learner.world_size=2"]
    run = train(tmp_path / "run", *words, "steps=3", "check.constant_reward_steps=9", "learner.micro_batch_tokens=128", "rollout.num_engines=1")
    for row in run.rows:
        assert row["learner/grad_norm"] > 0 and row["learner/two_passes"] == 1.0 and row["learner/base_moved"] == 1.0
        assert row["rollouts/advantage_abs"] > 0 and abs(row["rollouts/information"]) < 20 and row["mismatch/max_abs"] < 1e-3


def test_thoughts_and_texts_together_from_easy_to_hard(tmp_path: Path) -> None:
    """Reinforcement mid-training: positions ordered by the model's own entropy, a budget that falls, and the likelihood of the texts."""
    model = create_tiny_model(tmp_path / "model", hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=128)
    lines = [f"the {a} likes {b} and the {b} likes {a}" for a in ("cat", "dog", "hen") for b in ("rain", "corn")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    main(["--model", str(model), "--data", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "positions.jsonl"), "--open", " so ", "--per-text", "3"])
    words = ["recipe=grpo", f"model.path={model}", "model.dtype=float32", "loss=rmt", "mixture=add", "mixture.gate.demos_per_step=4", f"data.demos.path={tmp_path / 'texts.jsonl'}"]
    words += [f"data.train={{path: {tmp_path / 'positions.jsonl'}, chat: false}}", "data.shuffle=false", "data.max_prompt_tokens=64", "rollout.prompts_per_step=4", "rollout.n=4"]
    words += ["+reward.fn.words={_target_: posttrain.reward.rules.Behind, mark: a, reward: {_target_: posttrain.reward.rules.Exact}}", "rollout.max_tokens=16"]
    words += ["+reward.fn.budget={_target_: posttrain.reward.rules.LengthBudget, limit: {_target_: posttrain.mixture.schedule.Linear, start: 12, end: 6}}", "learner.lr=2e-3"]
    run = train(tmp_path / "run", *words, "steps=4", "learner.warmup_steps=1", "check.constant_reward_steps=9", "learner.zero_stage=2", "learner.world_size=2")
    first, last = run.rows[0], run.rows[-1]
    assert last["text/nll"] < first["text/nll"] and all(row["rollouts/advantage_abs"] > 0 for row in run.rows)
    assert first["reward/budget/mean"] < 0 and last["reward/budget/mean"] < first["reward/budget/mean"], "most answers of a random model run to the limit"
