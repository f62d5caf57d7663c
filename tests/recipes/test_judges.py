"""Judges with the real engines: a frozen judge and the policy itself say which answers are better, and the policy learns from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.testing.tiny import create_tiny_model
from tests.recipes.conftest import SMALL, Finished, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

WORLD = ["data=composition", "data.train.num=64", "data.max_prompt_tokens=128", "check.weights_moved=false", "learner.lr=1e-3", "learner.warmup_steps=0"]
SIZES = ["rollout.prompts_per_step=4", "rollout.n=3", "rollout.max_tokens=12", "rollout.kv_cache_gb=0.25"]


def completions(run: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((run.folder / "completions").rglob("*.jsonl")) for line in path.read_text().splitlines()]


def test_the_policy_judges_itself_and_its_base_follows(tmp_path: Path) -> None:
    run = train(tmp_path, "recipe=self_rewarding", *SMALL, *WORLD, *SIZES, "steps=3", "learner.base_every=2")
    assert len(run.rows) == 3
    for row in run.rows:
        assert row["reward/judge/ok"] == 12.0 and row["reward/judge/error"] == 0.0 and row["mixture/pairs"] == 4.0
        assert 1.0 < row["reward/judge/min"] < row["reward/judge/max"] < 5.0 and row["pairs/tokens"] > 0
    losses = [row["pairs/preference_loss"] for row in run.rows]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) == losses[2] != pytest.approx(losses[1], abs=1e-4), "the base is the policy again after two steps"


def test_a_frozen_judge_of_pairs_beside_a_verdict_in_words_that_nobody_can_read(tmp_path: Path) -> None:
    """The pairs' judge always decides; the random model never writes a score, which is a failure and not a zero."""
    judge = create_tiny_model(tmp_path / "judge", seed=7, hidden_size=96, num_heads=3, num_kv_heads=1, num_layers=1, intermediate_size=96)
    words = ["recipe=grpo", "loss=online_dpo", "advantage=none", "mixture=best_worst", "reward=pair_judge", "reward.fn.judge.orders=log_odds"]
    said = "{_target_: posttrain.reward.judge.Said, pattern: 'Score: ([0-5])', high: 5.0, max_tokens: 8, votes: 2, temperature: 1.0}"
    second = f"+reward.fn.words={{_target_: posttrain.reward.judge.Judge, model: '{judge}', template: 'Grade {{prompt}} {{answer}}', verdict: {said}}}"
    weights = ["++reward.weights.judge=1.0", "++reward.weights.words=0.0"]
    run = train(tmp_path / "run", *words, f"reward.fn.judge.model={judge}", second, *weights, *SMALL, *WORLD, *SIZES, "steps=2")
    for row in run.rows:
        assert row["reward/mean"] == pytest.approx(0.5) and row["reward/std"] > 0 and row["mixture/pairs"] == 4.0
        assert row["reward/words/error"] == 12.0 and row["reward/words/ok"] == 0.0
    assert all(abs(r["reward"] - 0.5) < 0.5 and "cannot be read" in r["failed"]["words"] for r in completions(run))


def test_a_game_against_a_mixture_of_policy_and_base(tmp_path: Path) -> None:
    words = ["recipe=grpo", "loss=nash_md_mixture", "advantage=constant", "reward=pair_judge", "reward.fn.judge.orders=log_odds", "reward.fn.judge.each=true", "rollout.n=4"]
    run = train(tmp_path, *words, *SMALL, *WORLD, *(s for s in SIZES if not s.startswith("rollout.n=")), "steps=2", "learner.micro_batch_tokens=48", "learner.world_size=2")
    for row in run.rows:
        assert 1.0 <= row["rollouts/opponents"] <= 3.0 and row["rollouts/advantage_abs"] > 0 and row["learner/grad_norm"] > 0
    assert run.rows[0]["rollouts/opponents"] == pytest.approx(3.0, abs=1e-3), "at first the policy is its base, and all opponents count alike"


def test_a_mixture_of_judges_with_constraints(tmp_path: Path) -> None:
    """The grade, calibrated against the data's answer, is worth nothing where the constraint's judge says no; the drift is 0 at first."""
    words = ["recipe=grpo", "loss=cgpo", "advantage=reward", "reward=constrained_judges", "reward.combine.gates.honest=0.5"]
    run = train(tmp_path, *words, *SMALL, *WORLD, *SIZES, "steps=1")
    (row,) = run.rows
    assert row["reward/judge/ok"] == row["reward/honest/ok"] == 12.0 and row["rollouts/tokens"] > 0
    for r in completions(run):
        assert 0 < r["scores"]["judge"] < 1 and 0 < r["scores"]["honest"] < 1
        assert r["reward"] == (r["scores"]["judge"] if r["scores"]["honest"] >= 0.5 else 0.0)
