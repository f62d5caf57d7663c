"""Mixtures of demonstrations and rollouts, and distillation, for a few steps with a tiny model and the real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.testing.tiny import create_tiny_model
from tests.recipes.conftest import ROOT, SMALL, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

WORLD = ["recipe=grpo", *SMALL, "data=composition", "reward=world", "data.train.num=64", "check.weights_moved=false", "learner.lr=1e-3", "steps=2"]
LETTERS = ["reward=none", "reward.fn.letters._target_=tests.recipes.rewards.letters"]
SIZES = ["rollout.prompts_per_step=4", "rollout.n=3", "rollout.max_tokens=12"]
DEMOS = ["+data.demos={_target_: posttrain.data.worlds.composition.Composition, split: train, num: 64, max_depth: 2}"]


def test_unsolved_prompts_are_learnt_from_their_demonstrations(tmp_path: Path) -> None:
    """A random model solves nothing, so every group is replaced."""
    run = train(tmp_path, *WORLD, *SIZES, *DEMOS, "loss=hpt", "mixture=hpt", "advantage=group_center")
    for row in run.rows:
        assert row["mixture/demonstrations"] == row["mixture/groups_left_out"] == 4.0 and row["reward/mean"] == 0.0
        assert row["demos/tokens"] > 0 and row["rollouts/tokens"] == 0 and row["data/dropped/replaced_by_demonstration"] == 12.0


def test_a_demonstration_in_every_group(tmp_path: Path) -> None:
    run = train(tmp_path, *WORLD, *SIZES, *DEMOS, "loss=luffy", "mixture=luffy", "advantage=group_center")
    for row in run.rows:
        assert row["mixture/injected"] == 4.0 and row["reward/mean"] == 0.0
        assert row["demos/advantage_abs"] == pytest.approx(0.75) and row["rollouts/advantage_abs"] == pytest.approx(0.25)


def test_a_student_learns_from_its_teacher_on_its_own_samples(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_heads": 3, "num_kv_heads": 1, "num_layers": 1, "intermediate_size": 96}
    teacher = create_tiny_model(tmp_path / "teacher", seed=5, **sizes)
    words = ["loss=on_policy_distillation", "advantage=constant", f"model.teacher={teacher}", "rollout.n=1", "rollout.prompts_per_step=16", "steps=4"]
    run = train(tmp_path / "run", *WORLD, *SIZES[2:], *words)
    distance = [-row["rollouts/log_ratio"] for row in run.rows]
    assert min(distance) > 0 and distance[-1] < distance[0]


def test_a_blend_learns_its_share_from_the_step_before(tmp_path: Path) -> None:
    """Looks are taken in steps 1 and 2 with the real engines."""
    words = ["loss=amft", "mixture=add", "advantage=group_norm", "loss.streams.demos.coef.every=1", "loss.streams.demos.coef.rate=0.1"]
    words += [*LETTERS, "steps=4"]
    run = train(tmp_path, *WORLD, *SIZES, *DEMOS, *words)
    shares = [row["control/mu"] for row in run.rows]
    slopes = [row.get("lookahead/mu") for row in run.rows]
    assert shares[:2] == [0.5, 0.5] and slopes[0] is None
    assert all(s is not None and 0 < abs(s) < 1 for s in slopes[1:])
    assert shares[2:] == pytest.approx([0.5 + 0.1 * slopes[1], 0.5 + 0.1 * (slopes[1] + slopes[2])])


def test_a_student_learns_from_a_teacher_that_was_asked_once(tmp_path: Path) -> None:
    """The command writes what the teacher thinks of given answers; sharded weights, no teacher in the run."""
    rows = [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(16)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    teacher = create_tiny_model(tmp_path / "teacher", seed=5, hidden_size=96, num_heads=3, num_kv_heads=1, num_layers=1, intermediate_size=96)
    command = ["--teacher", str(teacher), "--data", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "stored.jsonl"), "--top-k", "8"]
    subprocess.run([sys.executable, "-m", "posttrain.data.stored", *command], check=True, cwd=ROOT)
    words = ["recipe=sft", *SMALL, "loss=offline_kd", "loss.regularizers.distill.to=stored", "data.kind=stored", f"data.train.path={tmp_path / 'stored.jsonl'}"]
    run = train(tmp_path / "run", *words, "rollout.prompts_per_step=16", "steps=6", "learner.lr=3e-3", "learner.warmup_steps=1", "learner.zero_stage=3")
    distance = [row["demos/distill"] for row in run.rows]
    assert min(distance) > 0 and distance[-1] < 0.9 * distance[0]


def test_steps_of_wrong_answers_become_pairs(tmp_path: Path) -> None:
    """A random model over five characters writes lines; an answer is right when small letters are most of it."""
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": "ab" * n}) + "\n" for n in range(1, 9)))
    words = ["recipe=grpo", *SMALL, "model.tiny.alphabet='abAB\n'", f"data.train.path={tmp_path / 'asked.jsonl'}", "rollout=continued", "mixture=first_bad_step"]
    words += ["loss=per_step_negatives", "advantage=none", *LETTERS, "mixture.gate.success.threshold=0.55", "mixture.gate.gap=0.01", "steps=2"]
    words += ["learner.lr=1e-3", "check.weights_moved=false", "rollout.prompts_per_step=6", "rollout.n=4", "rollout.max_tokens=16", "rollout.strategy.continuations=3"]
    run = train(tmp_path / "run", *words)
    for row in run.rows:
        assert row["mixture/pairs"] > 0 and row["rollout/generated"] > 24
        assert 0 < row["pairs/tokens"] < 2 * 16 * row["mixture/pairs"], "steps, not answers"
