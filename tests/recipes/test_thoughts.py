"""Thoughts before the next word of plain text, with the real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
