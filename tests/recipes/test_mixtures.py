"""Mixtures of demonstrations and rollouts, and distillation, for a few steps with a tiny model and the real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.testing.tiny import create_tiny_model
from tests.recipes.conftest import ROOT, SMALL, start, train

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


def asked(folder: Path, num: int = 16) -> str:
    (folder / "asked.jsonl").write_text("".join(json.dumps({"question": f"say {i}"}) + "\n" for i in range(num)))
    return f"data.train.path={folder / 'asked.jsonl'}"


STEPS = ["steps=2", "learner.lr=1e-3", "check.weights_moved=false", "rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=12", "reward=none"]


def test_answers_under_a_word_for_their_outcome(tmp_path: Path) -> None:
    """Good and bad ones alike, and what the verifier said of them; the word is told from the prompt's own tokens."""
    words = ["recipe=grpo", *SMALL, asked(tmp_path), r"data.prompt_template='[good]\n{question}'", "loss=leti", "mixture=outcome_tag", "advantage=constant", *STEPS]
    words += ["reward.fn.told._target_=tests.recipes.rewards.told", "mixture.gate={good: '[good]', bad: '[bad]', feedback: told, success: {threshold: 0.3}}"]
    run = train(tmp_path / "run", *words)
    for row in run.rows:
        assert row["demos/tokens"] > 16
        assert 16 * len("it begins with ") <= row["feedback/tokens"] <= 16 * len("it begins with x")
    refused = ["recipe=grpo", *SMALL, asked(tmp_path), "data.prompt_template='{question}'", *words[len(SMALL) + 3 :]]
    process = start(*refused, f"run_dir={tmp_path / 'refused'}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "stand 0 times in prompt" in output, output[-3000:]


def test_the_best_answers_in_a_direction_that_the_prompt_says(tmp_path: Path) -> None:
    words = ["recipe=grpo", *SMALL, asked(tmp_path), r"data.prompt_template='{question}, letters {letters}, short {short}'"]
    words += ["+data.train.adapter={_target_: posttrain.data.directions.Directions, columns: [letters, short]}"]
    words += ["loss=dpa", "advantage=directed", "advantage.steps.best.best=2", *STEPS]
    words += ["reward.fn.letters._target_=tests.recipes.rewards.letters", "+reward.fn.short._target_=tests.recipes.rewards.short"]
    run = train(tmp_path / "run", *words)
    for row in run.rows:
        assert row["data/dropped/no_advantage"] == 8.0 and row["rollouts/advantage_abs"] == 1.0 and 8 <= row["rollouts/tokens"] <= 8 * 12


def test_trajectories_are_paid_with_both_signs_and_no_ratio(tmp_path: Path) -> None:
    words = ["recipe=grpo", *SMALL, asked(tmp_path), "loss=a3t", "advantage=reward", "advantage.baseline=0.4", *STEPS, "data.prompt_template='{question}'"]
    run = train(tmp_path / "run", *words, "reward.fn.letters._target_=tests.recipes.rewards.letters")
    assert all(row["trajectories/tokens"] > 16 and 0.0 < row["trajectories/advantage_abs"] < 1.0 for row in run.rows)


def test_stored_trajectories_with_rationales_written_afterwards(tmp_path: Path) -> None:
    """Scored lists: nobody sampled these tokens, so there is nothing to divide by; failed ones are pushed down."""
    told = [{"prompt": f"go to {i}", "completions": ["because it is there: go", "why not: stay"], "scores": [1.0, -1.0]} for i in range(16)]
    (tmp_path / "trajectories.jsonl").write_text("".join(json.dumps(r) + "\n" for r in told))
    words = ["recipe=sft", *SMALL, "loss=a3t", "data.kind=lists", f"data.train.path={tmp_path / 'trajectories.jsonl'}", "learner.engine=torch", "learner.zero_stage=0"]
    run = train(tmp_path / "run", *words, "rollout.prompts_per_step=16", "steps=6", "learner.lr=1e-3", "learner.warmup_steps=1")
    ahead = [row["trajectories/objective"] for row in run.rows]
    assert all(row["trajectories/advantage_abs"] == 1.0 for row in run.rows) and ahead[-1] > ahead[0]
