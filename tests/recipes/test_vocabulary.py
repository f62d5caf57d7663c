"""Losses that read the policy's distribution over the whole vocabulary, with a tiny model and the real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import SMALL, moved, train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

WORLD = ["recipe=grpo", *SMALL, "data=composition", "data.train.num=64", "check.weights_moved=false", "learner.lr=1e-3", "steps=2"]
LETTERS = ["reward=none", "reward.fn.letters._target_=tests.recipes.rewards.letters"]
SIZES = ["rollout.prompts_per_step=4", "rollout.n=3", "rollout.max_tokens=12", "rollout.kv_cache_gb=0.25"]
TWO_RANKS = ["learner.world_size=2", "learner.zero_stage=2"]


@pytest.mark.vllm
@pytest.mark.parametrize("words", [[], ["learner.micro_batch_tokens=48", *TWO_RANKS]], ids=["whole groups", "groups cut, two ranks"])
def test_a_baseline_for_every_place(words: list[str], tmp_path: Path) -> None:
    run = train(tmp_path, *WORLD, *LETTERS, *SIZES, "loss=otb", "advantage=reward", *words)
    assert len(run.rows) == 2
    for row in run.rows:
        assert row["reward/std"] > 0 and row["rollouts/advantage_abs"] > 0 and row["learner/two_passes"] == float(bool(words))
        assert 0 <= row["rollouts/alone"] < 0.5 and row["rollouts/advantage_abs"] < row["reward/mean"], "less than the rewards themselves"
        assert row["learner/grad_norm"] > 0


def test_pairs_weighed_against_the_expected_probability(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1", "chosen": f"{i + 1} and that is it", "rejected": str(i)} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ["recipe=dpo", *SMALL, f"data.train.path={tmp_path / 'pairs.jsonl'}", "rollout.prompts_per_step=8", "steps=2", "learner.lr=1e-3", "learner.warmup_steps=0"]
    key = "loss.streams.pairs.masks.probability"
    aligned = train(tmp_path / "aligned", *common, "loss=wpo", f"{key}.alignment=sampled")
    plain = train(tmp_path / "plain", *common, "loss=wpo")
    assert moved(tmp_path / "aligned")
    for ours, other in zip(aligned.rows, plain.rows, strict=True):
        assert 0.1 < ours["pairs/probability/factor"] < 3.0, "a random model's own size of the vocabulary is taken out"
        assert 0 < other["pairs/probability/factor"] < 0.01 * ours["pairs/probability/factor"]
