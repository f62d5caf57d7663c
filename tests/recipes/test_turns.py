"""Two attempts per question with the real engines: paid per turn, and learnt without the critique."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

WORLD = ["data=composition", "data.train.max_depth=1", "data.eval.max_depth=1"]
TURNS = [*WORLD, "rollout=two_turns", "rollout.environment.text=again", "reward=two_turns", "rollout.prompts_per_step=8", "rollout.n=4", "rollout.max_tokens=8"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to answer and to stop, and is often wrong."""
    folder = tmp_path_factory.mktemp("turns")
    words = ["recipe=sft", "model=tiny", *WORLD, "data.kind=demos", "data.train.num=300", "steps=45", "learner.lr=2e-3", "rollout.prompts_per_step=64", "learner.warmup_steps=5"]
    return train(folder / "sft", *words).folder / "export"


def test_two_attempts_are_paid_apart(begun: Path, tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", "recipe=grpo", f"model.path={begun}", "model.dtype=float32", *TURNS, "loss=score", "advantage=reward", "steps=3", "learner.lr=3e-4",
        "learner.warmup_steps=1", "eval.at_end=true", "eval.limit=16", "eval.metric=turn_2", "check.constant_reward_steps=3",
    )  # fmt: skip
    assert all(row["mismatch/max_abs"] < 1e-3 for row in run.rows), "the engine's log-probs of both turns are the learner's"
    lines = [json.loads(line) for line in (run.folder / "completions" / "step_000001.jsonl").read_text().splitlines()]
    episodes = [line["turns"] for line in lines if "turns" in line]
    assert len(episodes) > 8 and all([t["role"] for t in e] == ["assistant", "user", "assistant"] and e[1]["content"] == "again" for e in episodes)
    assert max(row["reward/turn_1/max"] for row in run.rows) == 1.0 and any(row["turns/advantage_abs"] > 0 for row in run.rows)
    assert "[again]" in run.output and "held-out accuracy after step 3" in run.output


def test_second_answers_are_learnt_under_the_first_prompt(begun: Path, tmp_path: Path) -> None:
    words = ["loss=rltf", "mixture=without_critique", "advantage=reward", "steps=2", "learner.lr=3e-4", "learner.warmup_steps=1"]
    run = train(tmp_path / "run", "recipe=grpo", f"model.path={begun}", "model.dtype=float32", *TURNS, *words, "check.weights_moved=false")
    for row in run.rows:
        assert row["demos/tokens"] > 0 and row["critiques/tokens"] > 0 and row["learner/grad_norm"] > 0
        assert row["mixture/demonstrations"] > 0
