"""math-verify behind the pool: its measured facts, hostile texts, and deadlines that really end a computation."""

import asyncio

import pytest

from posttrain.records import Group, Prompt, Rollout, Segment, Source
from posttrain.reward.math import MathVerify
from posttrain.reward.pool import RewardPool
from posttrain.testing.hostile import HOSTILE

FACTS = [
    ("4", "\\boxed{4}", 1),
    ("\\frac{1}{2}", "so it is $0.5$", 1),
    ("#### 18", "The answer is 18", 1),
    ("She sells 9 * 2 = 18.\n#### 18", "\\boxed{18.0}", 1),
    ("x=3", "\\boxed{3}", 1),
    ("1/3", "0.333", 0),
    ("4", "\\boxed{4}, or rather \\boxed{5}", 0),
    ("4", "\\boxed{5} or rather \\boxed{4}", 1),
    ("$(1,2)$", "$1<x<2$", 0),
    ("$1<x<2$", "$(1,2)$", 1),
    ("4", "I do not know", 0),
]


@pytest.fixture(scope="module")
def pool():
    pool = RewardPool({"math": MathVerify(cpu_s=3.0)}, num_workers=1, error_budget=1.0)
    yield pool
    pool.close()


def statuses(pool: RewardPool, cases: list[tuple[str, str]]) -> list:
    segment = Segment((5,), Source.policy, logprobs=(0.0,), version=0)
    groups = []
    for i, (answer, text) in enumerate(cases):
        prompt = Prompt(str(i), (1,), answer=answer)
        groups.append(Group(prompt, (Rollout(str(i), prompt, (segment,), text=text),)))
    return [g.rollouts[0].scores["math"] for g in asyncio.run(pool.score(groups, 0))]


def test_facts_and_gold(pool):
    scores = statuses(pool, [(gold, text) for gold, text, _ in FACTS])
    assert [s.value for s in scores] == [float(value) for *_, value in FACTS]
    assert scores[-1].status == "bad_format"
    assert all(s.value == 1.0 for s in statuses(pool, [(gold, gold.rsplit("####")[-1]) for gold, *_ in FACTS]))


def test_hostile_texts_are_never_right_and_never_hang(pool):
    scores = statuses(pool, [("77123", text) for text in HOSTILE])
    assert all(s.value in (0.0, None) for s in scores)
    assert sum(s.status in ("ok", "bad_format") for s in scores) >= len(HOSTILE) - 3
    assert statuses(pool, [("4", "\\boxed{4}")])[0].value == 1.0


def test_a_power_tower_is_ended_at_the_deadline(pool):
    scores = statuses(pool, [("4", "\\boxed{9^{9^{9^{9^{9}}}}}"), ("4", "4")])
    assert scores[0].status in ("timeout", "error") and scores[1].value == 1.0


def test_an_unreadable_reference_is_an_error_of_the_data(pool):
    (score,) = statuses(pool, [("?", "4")])
    assert score.status == "error" and "not a mathematical expression" in score.detail
