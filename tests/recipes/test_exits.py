"""Chains left early, with the real engines: a serial group, and the progress of blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.conftest import Finished, train

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

WORLD = ["data=composition", "data.train.max_depth=2", "data.eval.max_depth=2"]
FORCED = ["rollout.strategy.text='>'", "rollout.strategy.until=null", "rollout.strategy.answer_tokens=6", "rollout.max_tokens=14"]
RUN = ["model.dtype=float32", "reward.fn.letters._target_=tests.recipes.rewards.letters", "steps=2", "learner.lr=3e-4", "learner.warmup_steps=1", "check.constant_reward_steps=3"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to write letters after every function, and is often wrong."""
    words = ["recipe=sft", "model=tiny", *WORLD, "data.kind=demos", "data.train.num=300", "steps=60", "learner.lr=2e-3", "rollout.prompts_per_step=64"]
    return train(tmp_path_factory.mktemp("exits") / "sft", *words, "learner.warmup_steps=5").folder / "export"


def answers(run: Finished) -> list[dict[str, Any]]:
    """What was sampled, of both steps."""
    files = sorted((run.folder / "completions").glob("step_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_serial_group(begun: Path, tmp_path: Path) -> None:
    words = ["loss=s_grpo", "advantage=serial", "rollout=exits", "rollout.strategy.exits=3", "rollout.prompts_per_step=16", "rollout.n=1", *FORCED]
    run = train(tmp_path / "run", "recipe=grpo", f"model.path={begun}", *WORLD, *RUN, *words, "eval.at_end=true", "eval.limit=16")
    assert all(row["mismatch/max_abs"] < 1e-3 for row in run.rows), "the engine's log-probs behind the words are the learner's"
    assert all(row["learner/grad_norm"] > 0 and 48 <= row["rollout/generated"] <= 64 for row in run.rows)
    sampled = answers(run)
    early = [line for line in sampled if "turns" in line]
    assert len(early) > 60 and all([t["role"] for t in line["turns"]] == ["assistant", "user", "assistant"] for line in early)
    assert all(line["turns"][1]["content"] == ">" and line["completion"] == line["turns"][2]["content"] for line in early)
    chains = {line["sample"]: line["completion"] for line in sampled if "turns" not in line}
    for line in early:
        assert chains[f"{line['sample'].rsplit('/', 1)[0]}/0"].startswith(line["turns"][0]["content"])
    assert {1.0, 0.5, 0.25} <= {line["reward"] for line in sampled} <= {1.0, 0.5, 0.25, 0.125, 0.0}, "what the k-th right answer is worth"
    assert "held-out accuracy after step 2" in run.output, "evaluation answers as usual"


def test_the_progress_of_blocks(begun: Path, tmp_path: Path) -> None:
    words = ["loss=mrt", "advantage=progress", "rollout=blocks", "rollout.strategy.at.delimiter='>'", "rollout.strategy.samples=2", "rollout.n=3", "rollout.prompts_per_step=8"]
    run = train(tmp_path / "run", "recipe=grpo", f"model.path={begun}", *WORLD, *RUN, *words, *FORCED, "check.weights_moved=false")
    assert all(row["mismatch/max_abs"] < 1e-3 for row in run.rows) and all(row["learner/grad_norm"] > 0 for row in run.rows)
    sampled = answers(run)
    cut = [line["turns"][0]["content"] for line in sampled if "turns" in line]
    assert "" in cut and any(text.endswith(">") for text in cut) and all(text == "" or text.endswith(">") for text in cut)
    assert all((line["advantage"] is None) == ("turns" in line) for line in sampled), "forced answers only measure"
