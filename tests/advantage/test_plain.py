"""A constant and the positive part."""

from __future__ import annotations

import math

import pytest

from posttrain.advantage import Chain, Constant, FreeBaseline, GroupAdvantage, PositivePart, Reward
from tests.mixture.conftest import group


def advantages(estimator: object, *rewards: float | None) -> list[float | None]:
    return [r.advantage for r in estimator([group("q", *rewards)])[0].rollouts]  # type: ignore[operator]


def test_a_constant_takes_unscored_samples_where_it_may() -> None:
    assert advantages(Constant(), 1.0, None, 0.0) == [1.0, 1.0, 1.0]
    assert advantages(Constant(0.5, unscored=False), 1.0, None) == [0.5, None]
    with pytest.raises(ValueError, match="must be finite"):
        Constant(math.inf)


def test_the_positive_part_of_rewards_and_of_advantages() -> None:
    of_reward = Chain({"reward": Reward(0.5), "positive": PositivePart()})
    assert advantages(of_reward, 1.0, 0.0, None, 0.5) == [0.5, 0.0, None, 0.0]
    centred = Chain({"center": GroupAdvantage(scale="none"), "positive": PositivePart(keep_zeros=False)})
    assert advantages(centred, 1.0, 0.0) == [0.5, None]
    with pytest.raises(ValueError, match="must be None"):
        advantages(Chain({"reward": Constant(1.0), "bad": lambda gs: [_with_nan(g) for g in gs], "positive": PositivePart()}), 1.0)


def test_helped_answers_are_compared_with_free_ones() -> None:
    from dataclasses import replace

    from posttrain.records import Segment, Source

    free = group("q", 1.0, 0.0, 0.0, None, 1.0)
    helped = replace(free.rollouts[4], segments=(Segment((4,), Source.prefix), *free.rollouts[4].segments))
    mixed = replace(free, rollouts=(*free.rollouts[:4], helped))
    assert [r.advantage for r in FreeBaseline()([mixed])[0].rollouts] == pytest.approx([2 / 3, -1 / 3, -1 / 3, None, 2 / 3])
    assert advantages(FreeBaseline(), 1.0, 0.0) == advantages(GroupAdvantage(scale="none"), 1.0, 0.0) == [0.5, -0.5]
    assert [r.advantage for r in FreeBaseline()([replace(mixed, rollouts=(helped, helped))])[0].rollouts] == [0.0, 0.0]
    assert advantages(FreeBaseline(), 1.0) == [0.0]
    with pytest.raises(ValueError, match="must be None"):
        advantages(FreeBaseline(), math.nan, 1.0)


def test_what_is_written_behind_a_prefix_may_be_paid_otherwise_than_the_prefix() -> None:
    """The release gives the continuation of a single hybrid its raw reward, or nothing; the prefix is compared with the free answers in all three."""
    from dataclasses import replace

    from posttrain.data.rows import to_rows
    from posttrain.records import Segment, Source

    free = group("q", 1.0, 0.0, 0.0, 1.0)
    hybrid = replace(free.rollouts[3], segments=(Segment((4, 5), Source.prefix), *free.rollouts[3].segments))
    mixed = replace(free, rollouts=(*free.rollouts[:3], hybrid))
    for continuation, expected in (("same", 2 / 3), ("reward", 1.0), ("zero", 0.0)):
        *others, row = to_rows(FreeBaseline(continuation)([mixed]))
        columns = row.advantage if isinstance(row.advantage, list) else [row.advantage] * len(row.ids)
        told = {source: [columns[i] for i, s in enumerate(row.sources) if s == source] for source in set(row.sources)}
        assert told[Source.prefix] == pytest.approx([2 / 3] * 2) and told[Source.policy] == pytest.approx([expected] * 2)
        assert [r.advantage for r in others] == pytest.approx([2 / 3, -1 / 3, -1 / 3]), "free answers are compared as ever"
    alone = replace(mixed, rollouts=(hybrid,))
    assert [r.advantage for r in to_rows(FreeBaseline("reward")([alone]))] == [0.0], "without free answers there is nothing to compare with"
    with pytest.raises(ValueError, match="continuation='raw' does not exist; choose same, reward or zero"):
        FreeBaseline("raw")  # type: ignore[arg-type]


def _with_nan(g: object) -> object:
    from dataclasses import replace

    return replace(g, rollouts=tuple(replace(r, advantage=math.nan) for r in g.rollouts))  # type: ignore[type-var, attr-defined]
