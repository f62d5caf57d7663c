"""The loop.  Every stage takes records and returns new ones; this file only says in which order.

     prompts -> rollout -> reward -> advantage -> [queue] -> mixture -> pack -> score -> learner -> sync -> checkpoint
     Prompt     Group      Group     Group                   weights    Token   ref_logp  report    version  files
                + logp     + rewards + advantage             per        Batch   columns             + 1
                + version  + verdict   column                stream     + Totals (loss.needs)
                   ^                                                                            |
                   +------------------------------- new weights, new version -----------------+

``produce`` fills one queue, ``train`` empties it.  With staleness 0 the producer waits for the weights of the step before it samples, which
*is* the synchronous loop; a larger bound lets it run ahead, and nothing else changes.  SFT and DPO are the same lines: their rollout stage
replays the data set, and reward, advantage and publish pass through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.metrics import Accumulator
from posttrain.records import Demo, Group, Pair
from posttrain.watchdog import Timings

Item = Group | Demo | Pair


@dataclass(frozen=True)
class Experience:
    """What one step learns from.  ``version`` is the oldest weights in it; ``sampler_state`` is the data order *after* it was drawn, saved
    when the step is done, so that a resumed run consumes exactly what the uninterrupted one would."""

    step: int
    items: list[Item]
    version: int
    sampler_state: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)


class RolloutStage(Protocol):
    """Draws from the sampler and returns scored items: engines sample, or the data set is replayed."""

    async def collect(self, step: int) -> tuple[list[Item], dict[str, float]]: ...

    @property
    def state(self) -> dict[str, Any]: ...


class LearnStage(Protocol):
    """All optimizer steps of one batch of experience."""

    async def learn(self, step: int, items: list[Item], progress: float) -> Accumulator: ...


@dataclass
class Run:
    """The stages of one recipe stage, built by ``build.py``.  ``version`` counts optimizer batches: the weights after step k are version k + 1."""

    name: str
    steps: int
    start: int
    rollout: RolloutStage
    advantage: Any
    gate: Any
    learner: LearnStage
    publish: Any
    canaries: Any
    checkpoint: Any
    evaluate: Any
    report: Any
    timings: Timings
    max_staleness: int = 0
    finish: Any = None
    version: int = 0
    published: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def clock(self) -> Iterable[int]:
        return range(self.start, self.steps)


async def produce(run: Run, queue: asyncio.Queue[Experience]) -> None:
    """Sample, score and weigh up, at most ``max_staleness`` versions ahead of the learner."""
    for step in run.clock:
        async with run.published:
            await run.published.wait_for(lambda step=step: run.version >= step - run.max_staleness)
        with run.timings.phase("rollout"):
            items, metrics = await run.rollout.collect(step)
        items = run.advantage(items)
        versions = [r.version for i in items if isinstance(i, Group) for r in i.rollouts if r.version is not None]
        await queue.put(Experience(step, items, min(versions, default=run.version), run.rollout.state, metrics))


async def train(run: Run) -> None:
    """The whole method."""
    queue: asyncio.Queue[Experience] = asyncio.Queue(maxsize=max(run.max_staleness, 1))
    run.version = run.start
    await run.evaluate.at_start(run)
    producer = asyncio.create_task(produce(run, queue), name="producer")
    try:
        for step in run.clock:
            experience = await _next(queue, producer)
            staleness = run.version - experience.version
            if staleness > run.max_staleness:
                raise RuntimeError(f"step {step}: the oldest token is {staleness} versions old, more than rollout.max_staleness={run.max_staleness}")
            items = run.gate(experience.items, step)
            with run.timings.phase("learn"):
                totals = await run.learner.learn(step, items, step / run.steps)
            with run.timings.phase("publish"):
                await run.publish(step + 1, last=step + 1 == run.steps)
            await run.canaries.after(step, totals)
            metrics = {**experience.metrics, **getattr(run.gate, "metrics", {}), **totals.result(), "rollout/staleness": float(staleness)}
            metrics |= await run.evaluate.after(run, step + 1)
            async with run.published:  # after the evaluation: a run that is repeated must repeat the engines' batches
                run.version = step + 1
                run.published.notify_all()
            run.report.step(step, metrics, items)
            with run.timings.phase("checkpoint"):
                await run.checkpoint.maybe_save(step + 1, experience.sampler_state)
    finally:
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)


async def _next(queue: asyncio.Queue[Experience], producer: asyncio.Task[None]) -> Experience:
    """The next experience, or the producer's own error instead of a wait that never ends."""
    waiting = asyncio.create_task(queue.get())
    await asyncio.wait({waiting, producer}, return_when=asyncio.FIRST_COMPLETED)
    if waiting.done():
        return waiting.result()
    if producer.exception() is None:
        return await waiting
    waiting.cancel()
    raise producer.exception()  # type: ignore[misc]
