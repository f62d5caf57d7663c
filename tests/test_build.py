"""The stages that build.py puts together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.build import Engines, Publish, load_stage_data
from posttrain.config import DataConfig, EvalConfig, RunConfig
from posttrain.records import Group, Prompt, Rollout, Sampling, Segment, Source
from posttrain.reward.pool import RewardPool
from posttrain.rollout.strategy import Dynamic, Fixed, WithGreedy
from posttrain.testing.tiny import create_tiny_model


def right(completion: str) -> float:
    return float(completion == "right")


right.execution = "inline"  # type: ignore[attr-defined]


class Pool:
    """Sample ``i`` of prompt ``p`` says what ``words[p]`` has there; the greedy one comes last."""

    def __init__(self, words: dict[str, Sequence[str]]) -> None:
        self.words = words

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        def rollout(p: Prompt, i: int) -> Rollout:
            segment = Segment((5,), Source.policy, logprobs=(-1.0,), version=0)
            return Rollout(f"{p.id}/{i}", p, (segment,), text=self.words[p.id][i], sampling=sampling)

        return [Group(p, tuple(rollout(p, i) for i in range(first, first + n))) for p in prompts]

    def metrics(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    ("strategy", "words", "expected"),
    [
        (
            WithGreedy(Fixed(2)),
            {"a": ["right", "wrong", "wrong"], "b": ["right", "right", "wrong"]},
            {"reward/right/ok": 6.0, "reward/right/mean": 0.5, "reward/constant_groups": 0.0},
        ),
        (
            Dynamic(2),
            {"a": ["right", "right"], "b": ["wrong", "wrong"], "c": ["right", "wrong"], "d": ["wrong", "right"]},
            {"reward/right/ok": 8.0, "reward/right/mean": 0.5, "reward/constant_groups": 0.5},
        ),
    ],
)
def test_metrics_of_a_step_cover_every_call_of_the_rewards(
    strategy: Any, words: dict[str, Sequence[str]], expected: dict[str, float]
) -> None:
    """Greedy baselines and further rounds are scored in calls of their own."""
    names = iter(range(len(words)))
    sampler: Any = type("S", (), {"next": lambda self, count: [next(names) for _ in range(count)]})()
    prompts = [Prompt(name, (1, 2), text="question") for name in words]
    rewards = RewardPool({"right": right})
    stage = Engines(Pool(words), rewards, sampler, prompts, strategy, Sampling(), prompts_per_step=2, steps=10)
    groups, metrics = asyncio.run(stage.collect(0))
    assert len(groups) == 2 and {k: metrics[k] for k in expected} == expected
    assert rewards.budget.state_dict()["steps"]["right"] == [[int(expected["reward/right/ok"]), 0]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    create_tiny_model(folder, seed=0)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("prompts", {}),
        ("demos", {"completion": "yes"}),
        ("pairs", {"chosen": "yes", "rejected": "no"}),
        ("lists", {"completions": ["yes", "no"], "scores": [1.0, 0.0]}),
    ],
)
def test_evaluation_prompts_that_are_trained_on_are_told_whatever_their_ids(
    kind: Any, columns: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("".join(json.dumps({"id": str(i), "prompt": text, **columns}) + "\n" for i, text in enumerate("abc")))
    held_out.write_text(
        "".join(json.dumps({"id": str(i), "prompt": text, "answer": ""}) + "\n" for i, text in enumerate(["x", "b", "y" * 200]))
    )
    data = DataConfig(kind=kind, train={"path": str(train)}, eval={"path": str(held_out)}, max_prompt_tokens=50, truncation="drop")
    said: list[str] = []
    load_stage_data(RunConfig(loss=None, data=data, eval=EvalConfig(at_end=True)), tokenizer, said.append)
    assert any("data.eval: 3 rows read, 2 kept; 1 dropped (too_long)" in line for line in said)
    assert any("1 of 2 evaluation prompts are also in the training data" in line for line in said)


def test_held_out_data_that_nobody_asks_for_is_not_read(tokenizer: Any, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    data = DataConfig(train={"path": str(train)}, eval={"path": str(tmp_path / "not_there.jsonl")})
    assert load_stage_data(RunConfig(loss=None, data=data), tokenizer)[2] == []
    with pytest.raises(ValueError, match=r"not_there"):
        load_stage_data(RunConfig(loss=None, data=data, eval=EvalConfig(every=1)), tokenizer)


@pytest.mark.parametrize("verify", [True, False])
def test_fingerprints_are_compared_when_asked(verify: bool) -> None:
    class Learner:
        async def publish(self, version: int) -> tuple[list[Any], dict[str, tuple[int, int]]]:
            return ["weights"], {"w": (1, version)}

    class Engine:
        async def publish(self, *given: Any) -> None:
            self.given = given

    pool = Engine()
    asyncio.run(Publish(Learner(), pool, True, lambda step: False, verify)(3))
    assert pool.given == (3, ["weights"], {"w": (1, 3)} if verify else None)
