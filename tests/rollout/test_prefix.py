"""Answers that begin with a piece of a demonstration: who gets how much, what the engine reads, what the records hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from posttrain.build import Engines
from posttrain.data.rows import to_rows
from posttrain.mixture.demos import Demos
from posttrain.mixture.schedule import Cosine, WarmupCosine
from posttrain.records import Demo, Group, Prompt, Rollout, Sampling, Segment, Source
from posttrain.rollout.prefix import BinomialShare, UniformShare, WithPrefix, answer_ids
from posttrain.rollout.strategy import Dynamic, Fixed, StepInfo

HINT = WarmupCosine(peak=0.95, valley=0.05, warmup=0, decay=300, steps=500, after=0.0)


def prompt(name: str) -> Prompt:
    return Prompt(name, (1, 2))


def shown(name: str, n: int = 10) -> Demo:
    return Demo(
        name, (Segment((1, 2), Source.prompt, trainable=False), Segment(tuple(range(10, 10 + n)), Source.demo)), prompt=prompt(name)
    )


def info(progress: float = 0.0, step: int = 0) -> StepInfo:
    return StepInfo(step, 0, 4, progress)


def strategy(length: Any, samples: int | None = 1, n: int = 4, **more: Any) -> WithPrefix:
    return WithPrefix(length, samples, **more).bound(n).with_demos(Demos([shown("a"), shown("b")]))


# -- how much ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "p", "segments"), [(0, 0.95, 4.75), (75, 0.8182, None), (150, 0.5, 2.5), (300, 0.05, 0.25), (301, 0.0, 0.0)]
)
def test_the_published_hint_schedule(step: int, p: float, segments: float | None) -> None:
    assert HINT(step / 500) == pytest.approx(p, abs=1e-4)
    if segments is not None:
        draw = random.Random(0)
        mean = sum(5 * BinomialShare(HINT)(draw, step / 500) for _ in range(4000)) / 4000
        assert mean == pytest.approx(segments, abs=0.06)


def test_uniform_shares_follow_their_schedule() -> None:
    share, draw = UniformShare(), random.Random(0)
    for progress, low in ((0.0, 0.95), (0.5, 0.5), (1.0, 0.05)):
        found = [share(draw, progress) for _ in range(500)]
        assert low - 1e-9 <= min(found) < low + 0.05 and max(found) <= 0.95
    with pytest.raises(ValueError, match="low <= high"):
        UniformShare(0.9, 0.5)(draw, 0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        BinomialShare(1.5)(draw, 0.0)


def constant(share: float) -> UniformShare:
    return UniformShare(share, share)


@pytest.mark.parametrize(("share", "length"), [(0.0, 0), (0.05, 0), (0.3, 3), (0.99, 9), (1.0, 9)])
def test_a_prefix_never_holds_the_whole_answer(share: float, length: int) -> None:
    assert strategy(constant(share)).prefix(prompt("a"), info()) == tuple(range(10, 10 + length))


def test_draws_repeat_for_a_prompt_and_step_and_differ_otherwise() -> None:
    one = WithPrefix(UniformShare(0.0, 1.0)).bound(4).with_demos(Demos([shown(name, 500) for name in "ab"]))
    lengths = {len(one.prefix(prompt(name), info(step=step))) for name in "ab" for step in (0, 1)}
    assert len(lengths) == 4 and len(one.prefix(prompt("a"), info())) == len(one.prefix(prompt("a"), info()))


def test_an_answer_in_several_turns_cannot_begin_one() -> None:
    dialogue = Demo(
        "d",
        (Segment((1, 2), Source.prompt), Segment((5,), Source.demo), Segment((6,), Source.tool), Segment((7,), Source.demo)),
        prompt=prompt("d"),
    )
    with pytest.raises(ValueError, match="several turns"):
        answer_ids(dialogue)


# -- who ---------------------------------------------------------------------------------------------------------------------------
def test_the_group_keeps_its_size() -> None:
    asks = strategy(constant(0.3)).plan([prompt("a"), Prompt("unknown", (3,))], info())
    assert [(a.prompt.id, a.n, a.first, a.prefix) for a in asks] == [("a", 3, 0, ()), ("a", 1, 3, (10, 11, 12)), ("unknown", 4, 0, ())]
    shared = strategy(constant(0.3), samples=None).plan([prompt("a")], info())
    assert [(a.n, a.first, a.prefix) for a in shared] == [(4, 0, (10, 11, 12))]


def test_without_a_prefix_the_plan_is_the_inner_one() -> None:
    for length in (constant(0.0), BinomialShare(0.0)):
        assert strategy(length).plan([prompt("a"), prompt("b")], info()) == Fixed(4).plan([prompt("a"), prompt("b")], info())


def test_it_stands_around_another_strategy_and_remembers_for_it() -> None:
    inner = Dynamic(cooldown=2)
    one = strategy(constant(0.3), inner=inner)
    one.inner.resting["a"] = 5
    again = strategy(constant(0.3), inner=Dynamic())
    again.load_state_dict(one.state_dict())
    assert again.skip(prompt("a"), info(step=3)) == "cooldown" and WithPrefix().bound(4).state_dict() == {}
    with pytest.raises(ValueError, match="leaves none of the 2 answers free"):
        WithPrefix(samples=2).bound(2)
    with pytest.raises(ValueError, match="at least 1"):
        WithPrefix(samples=0)


# -- what the engine reads, and what comes back ------------------------------------------------------------------------------------
class Pool:
    """An engine that answers 90, 91, 92, ... and writes down what it read."""

    def __init__(self) -> None:
        self.read: list[tuple[tuple[int, ...], int, int]] = []

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        self.read += [(p.ids, n, first) for p in prompts]
        return [
            Group(
                p,
                tuple(
                    Rollout(f"{p.id}/{i}", p, (Segment((90 + i,), Source.policy, logprobs=(-1.0,), version=0),), text=str(90 + i))
                    for i in range(first, first + n)
                ),
            )
            for p in prompts
        ]

    def metrics(self) -> dict[str, float]:
        return {}


class Judge:
    """Half a point per token that was read as the answer's text."""

    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        return {}

    async def score(self, groups: Sequence[Group], step: int, progress: float) -> list[Group]:
        return [replace(g, rollouts=tuple(replace(r, reward=len(r.text.split()) / 2, advantage=1.0) for r in g.rollouts)) for g in groups]


def run(one: Any, step: int = 0, steps: int = 10) -> tuple[Pool, list[Group]]:
    pool = Pool()
    names = iter([0, 1, 0, 1])
    sampler = type("S", (), {"next": lambda self, count: [next(names) for _ in range(count)]})()
    stage = Engines(pool, Judge(), sampler, [prompt("a"), prompt("b")], one, Sampling(), 2, steps)
    return pool, asyncio.run(stage.collect(step))[0]


def test_the_prefix_is_read_behind_the_prompt_and_stands_in_the_answer() -> None:
    pool, groups = run(strategy(constant(0.2)))
    assert pool.read == [((1, 2), 3, 0), ((1, 2), 3, 0), ((1, 2, 10, 11), 1, 3), ((1, 2, 10, 11), 1, 3)]
    hybrid = groups[0].rollouts[-1]
    assert [r.sample_id for r in groups[0].rollouts] == ["a/0", "a/1", "a/2", "a/3"] and groups[0].prompt.ids == (1, 2)
    assert hybrid.prompt.ids == (1, 2) and hybrid.text == "10 11 93" and hybrid.reward == 1.5
    assert [(s.source, s.ids) for s in hybrid.segments] == [(Source.prefix, (10, 11)), (Source.policy, (93,))]
    row = to_rows(groups)[3]
    assert list(row.ids) == [1, 2, 10, 11, 93] and [s.name for s in row.sources] == ["prompt", "prompt", "prefix", "prefix", "policy"]
    assert row.trainable == [False, False, True, True, True] and row.logps["behaviour"][-1] == -1.0


def test_schedules_follow_the_progress_of_the_run() -> None:
    length = UniformShare(Cosine(0.9, 0.0), 0.9)
    for step, least in ((0, 9), (10, 0)):
        pool, _ = run(strategy(UniformShare(length.low, length.low), samples=None), step=step)
        assert {len(ids) - 2 for ids, *_ in pool.read} == {least}


def test_a_share_of_0_samples_exactly_what_the_inner_strategy_does() -> None:
    ours, theirs = run(strategy(constant(0.0))), run(Fixed(4))
    assert ours[0].read == theirs[0].read and ours[1] == theirs[1]
