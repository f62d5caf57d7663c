"""Supervised runs in which the model reads its own first choices, with the real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import SMALL, moved, train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_sharded_ranks_learn_what_one_rank_learns(tmp_path: Path) -> None:
    """ZeRO-3 on two ranks runs the pass without gradient, the one with it, and placeholders; the steps are those of one plain rank."""
    rows = [{"prompt": f"say {i}", "completion": "abc" * (1 + i % 3)} for i in range(12)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["recipe=sft", "loss=ift", *SMALL, "model.dtype=float32", f"data.train.path={tmp_path / 'demos.jsonl'}", "eval.at_start=false", "eval.at_end=false"]
    words += ["steps=4", "rollout.prompts_per_step=3", "learner.lr=3e-3", "learner.warmup_steps=0", "mixture=none"]
    torch, shares = ["learner.engine=torch", "learner.zero_stage=0"], "loss.streams.demos.own_input"
    plain = train(tmp_path / "plain", *words, *torch, f"{shares}=0.8")
    sharded = train(tmp_path / "sharded", *words, "learner.engine=deepspeed", "learner.world_size=2", "learner.zero_stage=3", f"{shares}=0.8")
    without = train(tmp_path / "without", *words, *torch, f"{shares}=0")
    for name in ("demos/nll", "learner/grad_norm"):
        ours, theirs, other = ([row[name] for row in run.rows] for run in (sharded, plain, without))
        assert ours == pytest.approx(theirs, rel=2e-3), name
        assert abs(other[0] - theirs[0]) > 20 * abs(ours[0] - theirs[0]) and other[0] != pytest.approx(theirs[0], rel=1e-4), name
    assert plain.rows[-1]["demos/nll"] < plain.rows[0]["demos/nll"] and moved(tmp_path / "sharded")
