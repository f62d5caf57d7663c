"""A mixture of experts in whole runs with the real engines: sampled, published expert by expert, its choices replayed, exported and served again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.conftest import SMALL, moved, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

MIXTURE = [*SMALL, "+model.tiny.num_experts=4", "model.tiny.intermediate_size=48"]
SIZES = ["data=composition", "data.train.num=64", "rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=8", "learner.lr=1e-3", "learner.warmup_steps=1"]
SIZES += ["+reward.fn.letters._target_=tests.recipes.rewards.letters"]


def test_the_engine_s_experts_are_replayed_in_sharded_half_precision(tmp_path: Path) -> None:
    words = ["recipe=grpo", *MIXTURE, *SIZES, "model.dtype=bfloat16", "learner.routing=engine", "learner.zero_stage=3", "learner.world_size=2", "rollout.num_engines=2"]
    run = train(tmp_path, *words, "steps=3", "check.constant_reward_steps=3")
    for row in run.rows:
        assert 0.8 < row["mismatch/routing"] <= 1.0 and row["mismatch/mean_abs"] < 0.05 and row["learner/grad_norm"] > 0
    served = train(tmp_path / "again", "recipe=grpo", f"model.path={tmp_path / 'export'}", "model.dtype=bfloat16", *SIZES, "steps=1", "check.constant_reward_steps=2")
    assert served.rows[0]["mismatch/mean_abs"] < 0.05 and "mismatch/routing" not in served.rows[0]


def test_the_old_learner_s_experts_are_replayed_over_two_updates(tmp_path: Path) -> None:
    words = ["recipe=grpo", "loss=gspo", *MIXTURE, *SIZES, "model.dtype=float32", "learner.routing=old", "learner.updates_per_batch=2", "learner.world_size=2", "learner.micro_batch_tokens=64"]
    run = train(tmp_path, *words, "steps=2", "check.constant_reward_steps=3")
    for row in run.rows:
        assert 0.5 < row["mismatch/routing"] < 1.0, "the second update's routers would choose otherwise here and there"
    assert moved(tmp_path)
