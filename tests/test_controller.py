"""The loop, with recorded stages: the order of things, what is saved, and that an error anywhere ends the run instead of hanging it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain.controller import Run, train
from posttrain.metrics import Accumulator
from posttrain.records import Group, Prompt, Rollout, Segment, Source
from posttrain.watchdog import Timings


class Recorder:
    """Every stage of a run, writing down what happened."""

    def __init__(self, fail_at: tuple[str, int] | None = None, stale: bool = False) -> None:
        self.log: list[tuple[str, int]] = []
        self.saved: list[tuple[int, Any]] = []
        self.drawn = 0
        self.fail_at, self.stale = fail_at, stale
        self.version = 0

    def note(self, what: str, step: int) -> None:
        self.log.append((what, step))
        if self.fail_at == (what, step):
            raise ValueError(f"{what} broke at step {step}")

    async def collect(self, step: int) -> tuple[list[Any], dict[str, float]]:
        self.note("rollout", step)
        await asyncio.sleep(0)
        self.drawn += 1
        prompt = Prompt(id=str(step), ids=(1, 2))
        version = 0 if self.stale else self.version
        rollout = Rollout("a", prompt, (Segment((3,), Source.policy, logprobs=(-1.0,), version=version),), reward=1.0)
        return [Group(prompt, (rollout,))], {"rollout/kept": 1.0}

    @property
    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def advantage(self, items: list[Any]) -> list[Any]:
        self.note("advantage", -1)
        return items

    def gate(self, items: list[Any], step: int) -> list[Any]:
        self.note("gate", step)
        return items

    async def learn(self, step: int, items: list[Any], progress: float) -> Accumulator:
        self.note("learn", step)
        await asyncio.sleep(0)
        totals = Accumulator()
        totals.add({"learner/grad_norm": (1.0, 1.0)})
        return totals

    async def publish(self, version: int, last: bool = False) -> None:
        self.note("publish", version)
        self.version = version

    async def after(self, *args: Any) -> dict[str, float]:
        return {}

    async def at_start(self, run: Run) -> None:
        self.note("evaluate", 0)

    def step(self, step: int, metrics: dict[str, float], items: list[Any]) -> None:
        self.note("report", step)

    async def maybe_save(self, step: int, state: Any) -> None:
        self.saved.append((step, state))

    def run(self, steps: int = 3, start: int = 0, max_staleness: int = 0) -> Run:
        return Run(
            name="t",
            steps=steps,
            start=start,
            rollout=self,
            advantage=self.advantage,
            gate=self.gate,
            learner=self,
            publish=self.publish,
            canaries=self,
            checkpoint=self,
            evaluate=self,
            report=self,
            timings=Timings(),
            max_staleness=max_staleness,
        )


def test_synchronous_order() -> None:
    recorder = Recorder()
    asyncio.run(train(recorder.run(steps=2)))
    expected = []
    for step in (0, 1):
        expected += [("rollout", step), ("advantage", -1), ("gate", step), ("learn", step), ("publish", step + 1), ("report", step)]
    assert [e for e in recorder.log if e[0] != "evaluate"] == expected


def test_sampling_waits_for_the_weights_of_the_step_before() -> None:
    recorder = Recorder()
    asyncio.run(train(recorder.run(steps=4)))
    for step in range(1, 4):
        assert recorder.log.index(("publish", step)) < recorder.log.index(("rollout", step))


def test_a_bound_of_one_lets_it_run_ahead_and_no_further() -> None:
    recorder = Recorder()
    asyncio.run(train(recorder.run(steps=4, max_staleness=1)))
    ahead = [recorder.log.index(("rollout", s)) < recorder.log.index(("publish", s)) for s in range(1, 4)]
    assert any(ahead)
    for step in range(2, 4):
        assert recorder.log.index(("publish", step - 1)) < recorder.log.index(("rollout", step))


def test_the_data_order_saved_with_a_step_is_that_step_s() -> None:
    recorder = Recorder()
    asyncio.run(train(recorder.run(steps=3, max_staleness=1)))
    assert recorder.saved == [(1, {"drawn": 1}), (2, {"drawn": 2}), (3, {"drawn": 3})]


def test_a_resumed_run_starts_at_its_step() -> None:
    recorder = Recorder()
    recorder.version = 2
    asyncio.run(train(recorder.run(steps=4, start=2)))
    assert [s for what, s in recorder.log if what == "rollout"] == [2, 3]


@pytest.mark.parametrize("where", [("rollout", 1), ("advantage", -1), ("learn", 1), ("publish", 2)])
def test_an_error_anywhere_ends_the_run(where: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{where[0]} broke"):
        asyncio.run(asyncio.wait_for(train(Recorder(fail_at=where).run()), 20))


def test_tokens_older_than_the_bound_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"versions old"):
        asyncio.run(train(Recorder(stale=True).run(steps=3)))
