"""Winning against a mixture of policy and base, estimated from the answers of one group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posttrain.contrib.game import WinAgainstMixture
from posttrain.records import Row, TokenBatch
from posttrain.testing.check import example_batch, objective_with
from tests.loss.cases import composed

ADVANTAGE = "streams.rollouts.advantage"


def weights(wins: list[dict[int, float]], ratios: list[float], **settings: Any) -> tuple[list[float], dict[str, Any]]:
    """Of one-token answers, times their number, without the KL; ``ratios`` are log(pi / base)."""
    rows = [
        Row(
            ids=[1, 2],
            sources=["prompt", "policy"],
            logps={"current": [0.0, -2.0], "base": [0.0, -2.0 - d]},
            group="g",
            sample_id=f"7/q/{i}",
            rewards={f"judge/against/{k}": p for k, p in beats.items()},
        )
        for i, (beats, d) in enumerate(zip(wins, ratios, strict=True))
    ]
    goal = composed("nash_md_mixture", ("regularizers.kl=null", *(f"{ADVANTAGE}.{k}={v}" for k, v in settings.items())))
    batch = TokenBatch.from_sequences(rows, dtype=torch.float64)
    found = goal(batch)
    return [w * len(rows) for w in goal.weights(batch).tolist()], found.metrics


def test_rock_paper_scissors() -> None:
    """No score can say this: everyone beats one and loses to one.  Against the policy itself all are worth 0; where the base plays mostly paper, scissors win."""
    circle = [{1: 0.0, 2: 1.0}, {0: 1.0, 2: 0.0}, {0: 0.0, 1: 1.0}]
    assert weights(circle, [0.0, -1.0, 2.0], mix=0.0)[0] == [0.0, 0.0, 0.0]
    found, metrics = weights(circle, [0.0, -2.0, 0.0], mix=1.0)  # the base holds e^2 times as much of the second
    p = math.exp(2.0) / (1 + math.exp(2.0))
    assert found == [pytest.approx(0.5 - p), pytest.approx(0.0), pytest.approx(p - 0.5)]
    ess = 2 / (p**2 + (1 - p) ** 2) + 2.0
    assert metrics["rollouts/opponents"] == (pytest.approx(ess), 3.0)


def test_an_even_game_leaves_only_the_pull_to_the_base() -> None:
    even = [{1: 0.5}, {0: 0.5}]
    assert weights(even, [3.0, -1.0])[0] == [0.0, 0.0]


def test_unknown_comparisons_are_left_out() -> None:
    assert weights([{1: 1.0, 2: math.nan}, {0: 0.0}, {}], [0.0, 0.0, 9.0])[0] == [0.5, -0.5, 0.0]


def test_extreme_ratios_pick_one_opponent() -> None:
    found, metrics = weights([{1: 1.0, 2: 0.2}, {0: 0.0, 2: 0.7}, {0: 0.8, 1: 0.3}], [0.0, -1000.0, 1000.0])
    assert found == [pytest.approx(0.5), pytest.approx(-0.5), pytest.approx(-0.2)] and all(map(math.isfinite, found))
    assert metrics["rollouts/opponents"] == (pytest.approx(3.0), 3.0)


def test_settings_and_what_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"mix=1\.5 is the base's share"):
        WinAgainstMixture(mix=1.5)
    with pytest.raises(ValueError, match=r"reads the rewards other/against/0, 1, .*reward\.fn\.other\.each=true"):
        objective_with(WinAgainstMixture(of="other")).weights(example_batch())
