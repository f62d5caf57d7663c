"""The stages that build.py puts together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from posttrain.build import Engines
from posttrain.records import Group, Prompt, Rollout, Sampling, Segment, Source
from posttrain.reward.pool import RewardPool
from posttrain.rollout.strategy import Dynamic, Fixed, WithGreedy


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
def test_metrics_of_a_step_cover_every_call_of_the_rewards(strategy: Any, words: dict[str, Sequence[str]], expected: dict[str, float]) -> None:
    """Greedy baselines and further rounds are scored in calls of their own."""
    names = iter(range(len(words)))
    sampler: Any = type("S", (), {"next": lambda self, count: [next(names) for _ in range(count)]})()
    prompts = [Prompt(name, (1, 2), text="question") for name in words]
    rewards = RewardPool({"right": right})
    stage = Engines(Pool(words), rewards, sampler, prompts, strategy, Sampling(), prompts_per_step=2, steps=10)
    groups, metrics = asyncio.run(stage.collect(0))
    assert len(groups) == 2 and {k: metrics[k] for k in expected} == expected
    assert rewards.budget.state_dict()["steps"]["right"] == [[int(expected["reward/right/ok"]), 0]]
