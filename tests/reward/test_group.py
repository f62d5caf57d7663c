"""Rewards without labels: votes, classes and noise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain.records import Group, Prompt, Rollout, Segment, Source
from posttrain.reward.group import Kinds, Majority, Noisy
from posttrain.reward.math import MathVerify
from posttrain.reward.pool import RewardPool
from posttrain.reward.rules import Exact

WHOLE = Majority("whole")


def values(reward: Any, *texts: str) -> list[float | None]:
    return [r.value if hasattr(r, "value") else r for r in reward(list(texts))]


def test_the_most_frequent_answer_is_right() -> None:
    assert values(WHOLE, "4", " 4", "5") == [1.0, 1.0, 0.0]
    assert values(WHOLE, "5", "4", "4") == [0.0, 1.0, 1.0], "permutation"
    assert values(WHOLE, "4", "5") == values(WHOLE, "4", "4", "5", "5")[:2] == [0.0, 0.0], "ties teach nothing"
    assert values(WHOLE, "1", "2", "3") == [0.0] * 3 and values(WHOLE, "4") == [0.0]
    boxed = Majority()
    assert values(boxed, "?", "?", "?", r"\boxed{1}", r"\boxed{1}") == [0.0, 0.0, 0.0, 1.0, 1.0], "the unreadable never vote"
    assert values(boxed, "?", "?") == [0.0, 0.0] and boxed(["?"])[0].status == "bad_format"


def test_votes_are_right_as_often_as_they_should_be() -> None:
    """Eight votes of probability 0.6 among two answers: right outright 59 % of the time, 23 % ties."""
    from itertools import product
    from math import prod

    right = ties = 0.0
    for bits in product("rw", repeat=8):
        p = prod(0.6 if b == "r" else 0.4 for b in bits)
        found = values(WHOLE, *bits)
        right += p * any(f == 1.0 and b == "r" for f, b in zip(found, bits, strict=True))
        ties += p * (sum(found) == 0)
    assert right == pytest.approx(0.594, abs=1e-3) and ties == pytest.approx(0.232, abs=1e-3)


def test_kinds_are_numbered() -> None:
    assert Kinds("whole")(["a", "b", "a ", "c"]) == [0.0, 1.0, 0.0, 2.0]
    assert Kinds("boxed")(["?", "!", r"\boxed{1}"]) == [0.0, 0.0, 1.0]


def rollouts(step: int, prompts: int, n: int) -> list[Group]:
    out = []
    for k in range(prompts):
        prompt = Prompt(f"p{k}", (1,), answer="yes")
        segment = Segment((5,), Source.policy, logprobs=(0.0,), version=0)
        out.append(Group(prompt, tuple(Rollout(f"{step}/p{k}/{i}", prompt, (segment,), text="yes") for i in range(n))))
    return out


def scored(reward: Any, groups: list[Group]) -> list[list[float]]:
    pool = RewardPool({"noisy": reward})
    return [[r.reward for r in g.rollouts] for g in asyncio.run(pool.score(groups, 0))]


def test_noise() -> None:
    groups = rollouts(0, 200, 5)
    assert scored(Noisy(Exact(), 0.0), groups) == [[1.0] * 5] * 200
    assert scored(Noisy(Exact(), 1.0), groups) == [[0.0] * 5] * 200
    flat = [v for g in scored(Noisy(Exact(), 0.4), groups) for v in g]
    assert abs(flat.count(0.0) / 1000 - 0.4) < 3 * (0.24 / 1000) ** 0.5
    assert scored(Noisy(Exact(), 0.4), groups) == scored(Noisy(Exact(), 0.4), groups) != scored(Noisy(Exact(), 0.4, seed=1), groups)
    by_group = scored(Noisy(Exact(), 0.4, "group"), groups)
    assert all(len(set(g)) == 1 for g in by_group) and abs(sum(g[0] == 0.0 for g in by_group) / 200 - 0.4) < 3 * (0.24 / 200) ** 0.5
    assert scored(Noisy(Exact(), 1.0), rollouts(-1, 2, 2)) == [[1.0, 1.0]] * 2, "an evaluation is clean"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Majority("boxes"), "unknown way"),
        (lambda: Majority(normalise=["upper"]), "unknown normaliser"),
        (lambda: Majority(min_votes=0), "at least 1"),
        (lambda: Noisy(Exact(), 1.5), "probability"),
        (lambda: Noisy(Exact(), unit="batch"), "choose sample"),
        (lambda: Noisy(MathVerify()), "inline"),
        (lambda: Noisy(Majority()), "single answers"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
