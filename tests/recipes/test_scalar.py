"""Reward models and critics in whole runs with the real engines: trained, served as a reward, started from, killed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes.conftest import SMALL, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

SIZES = ["data=composition", "data.train.num=64", "rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_tokens=8", "learner.lr=1e-3", "learner.warmup_steps=1"]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on pairs whose longer answer is chosen: ranks of ZeRO-2, one model."""
    folder = tmp_path_factory.mktemp("reward_model")
    rows = [{"prompt": f"question {i % 7}", "chosen": "a" * (4 + i % 3), "rejected": "a" * (1 + i % 2)} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["recipe=reward_model", *SMALL, f"data.train.path={folder / 'pairs.jsonl'}", "steps=12", "learner.lr=2e-3", "learner.warmup_steps=1"]
    run = train(folder / "run", *words, "rollout.prompts_per_step=16", "learner.zero_stage=2", "learner.world_size=2", "loss.regularizers.centre.coef=0.01")
    accuracy = [row["pairs/accuracy"] for row in run.rows]
    assert accuracy[-1] > 0.9 > accuracy[0] and run.rows[-1]["pairs/preference_loss"] < 0.3
    return folder / "run"


def test_it_rewards_what_it_was_taught(reward_model: Path, tmp_path: Path) -> None:
    words = ["recipe=grpo", f"model.path={reward_model / 'model'}", "model.dtype=float32", "reward=model", f"reward.fn.model.path={reward_model / 'export'}"]
    run = train(tmp_path / "run", *words, *SIZES, "steps=2", "check.constant_reward_steps=2")
    for row in run.rows:
        assert row["reward/model/ok"] == 16.0 and row["reward/model/max"] > row["reward/model/min"]


def test_a_critic_learns_beside_the_policy_and_a_resumed_run_is_the_same(reward_model: Path, tmp_path: Path) -> None:
    words = ["recipe=ppo", f"model.path={reward_model / 'model'}", "model.dtype=float32", "reward=model", f"reward.fn.model.path={reward_model / 'export'}", *SIZES]
    words += [f"critic.path={reward_model / 'export'}", "critic.lr=1e-3", "critic.warmup_batches=1", "learner.updates_per_batch=2", "checkpoint.every=2"]
    whole = train(tmp_path / "whole", *words, "steps=4")
    first, last = whole.rows[0], whole.rows[-1]
    assert "learner/grad_norm" not in first and first["critic/grad_norm"] > 0, "the critic learns alone at first"
    assert last["learner/grad_norm"] > 0 and last["rollouts/reward_kl"] >= 0 and last["critic/value_error"] < first["critic/value_error"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for gone in ("checkpoints/step_00000004", "export"):
        shutil.rmtree(tmp_path / "again" / gone)
    (tmp_path / "again" / "state.json").unlink(missing_ok=True)
    again = train(tmp_path / "again", *words, "steps=4", "resume=auto")
    assert "goes on after step 2 of 4" in again.output
    for kind in ("learner", "critic"):
        ours, theirs = ((f / "checkpoints" / "step_00000004" / kind) for f in (again.folder, whole.folder))
        files = sorted(p.name for p in theirs.iterdir())
        assert files and [p.read_bytes() for p in sorted(ours.iterdir())] == [p.read_bytes() for p in sorted(theirs.iterdir())], kind


def test_two_heads_a_gated_kl_and_a_threshold_that_follows_the_reward(reward_model: Path, tmp_path: Path) -> None:
    """A pessimistic critic beside a policy whose drift costs from a threshold on; what the controller and the running KL remember survives a resume."""
    words = ["recipe=ppo", "loss=safe", "critic=soft_min", f"model.path={reward_model / 'model'}", "model.dtype=float32", "reward=model", f"reward.fn.model.path={reward_model / 'export'}", *SIZES]
    words += [f"critic.path={reward_model / 'export'}", "critic.lr=1e-3", "critic.warmup_batches=0", "learner.updates_per_batch=2", "checkpoint.every=2", "steps=4"]
    words += ["loss.regularizers.kl.threshold.low=-1.0", "loss.regularizers.kl.threshold.base=-0.5", "loss.regularizers.kl.threshold.kp=3.0"]
    whole = train(tmp_path / "whole", *words)
    rows = whole.rows
    assert all(row["critic/grad_norm"] > 0 and row["learner/grad_norm"] > 0 and row["learner/two_passes"] == 1.0 for row in rows)
    assert rows[0]["control/threshold"] == pytest.approx(-0.5) and len({round(row["control/threshold"], 9) for row in rows}) == 4
    assert all(row["rollouts/kl"] > 0 and 0.5 <= row["rollouts/kl/gate"] <= 20 for row in rows), "the threshold lies below, so the penalty acts"
    assert rows[0]["rollouts/kl/reward"] == pytest.approx(rows[0]["reward/mean"], rel=1e-5) and rows[-1]["rollouts/kl/running"] != 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for gone in ("checkpoints/step_00000004", "export"):
        shutil.rmtree(tmp_path / "again" / gone)
    (tmp_path / "again" / "state.json").unlink(missing_ok=True)
    again = train(tmp_path / "again", *words, "resume=auto")
    assert "goes on after step 2 of 4" in again.output
    for name in ("control/threshold", "rollouts/kl/running", "critic/score"):
        assert [row[name] for row in again.rows[-2:]] == [row[name] for row in rows[-2:]], name
    for kind in ("learner", "critic"):
        ours, theirs = ((f / "checkpoints" / "step_00000004" / kind) for f in (again.folder, whole.folder))
        assert [p.read_bytes() for p in sorted(ours.iterdir())] == [p.read_bytes() for p in sorted(theirs.iterdir())], kind


def test_labels_at_the_ends_of_steps(tmp_path: Path) -> None:
    rows = [{"prompt": f"add {i}", "completions": ["go on", "a mistake" if i % 2 else "right"], "labels": [1, 1 - i % 2]} for i in range(32)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["recipe=reward_model", "loss=process_reward_model", "data.kind=steps", *SMALL, f"data.train.path={tmp_path / 'steps.jsonl'}"]
    run = train(tmp_path / "run", *words, "steps=10", "learner.lr=3e-3", "learner.warmup_steps=1", "rollout.prompts_per_step=16", "learner.zero_stage=3")
    assert run.rows[0]["steps/tokens"] == 32.0 and run.rows[-1]["steps/accuracy"] > 0.9


def test_pieces_of_an_answer_are_paid_where_they_end(reward_model: Path, tmp_path: Path) -> None:
    """Fine-grained rewards with the real engines: clauses are scored by themselves, a critic adds up what is still to come."""
    words = ["recipe=ppo", "loss=fine_grained", "advantage=placed", f"model.path={reward_model / 'model'}", "model.dtype=float32", *SIZES]
    words += ["reward=none", "reward.fn.pieces={_target_: posttrain.reward.place.EachPiece, level: clause, reward: {_target_: hydra.utils.get_method, path: tests.recipes.rewards.letters}}"]
    words += ["+reward.fn.whole._target_=tests.recipes.rewards.letters", "reward.weights={pieces: 0.5, whole: 0.3}", f"critic.path={reward_model / 'export'}", "critic.lr=1e-3"]
    run = train(tmp_path, *words, "steps=2", "critic.warmup_batches=0")
    for row in run.rows:
        assert row["reward/mean"] == pytest.approx(0.5 * row["reward/pieces/mean"] + 0.3 * row["reward/whole/mean"]) and row["reward/masked"] == 0.0
        assert row["learner/grad_norm"] > 0 and row["critic/grad_norm"] > 0 and row["rollouts/advantage_abs"] > 0


def test_a_reward_is_learnt_from_given_answers_against_own_ones(tmp_path: Path) -> None:
    """The outer step of a reward from data; its export is what an inner stage takes as reward=model."""
    rows = [{"prompt": f"question {i % 7}", "chosen": "ab" * (2 + i % 3), "rejected": "zy" * (1 + i % 3)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["recipe=reward_model", "loss=reward_from_data", *SMALL, f"data.train.path={tmp_path / 'pairs.jsonl'}", "steps=8", "learner.lr=1e-3", "learner.warmup_steps=1"]
    run = train(tmp_path / "run", *words, "rollout.prompts_per_step=16")
    assert run.rows[0]["given/tokens"] == 16.0 == run.rows[0]["own/tokens"]
    ahead = [row["given/score"] - row["own/score"] for row in run.rows]
    assert ahead[-1] > ahead[0] + 1.0 and (run.folder / "export").exists()
