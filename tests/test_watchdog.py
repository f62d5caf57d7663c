"""Deadlines name their owner and leave stacks; timings add up."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from posttrain.watchdog import Deadline, PhaseTimeout, Timings, dump_stacks, phase, wait


def facts() -> dict[str, object]:
    return {"actor": "engine 1", "host": "node-7", "version": 12, "queue_depth": 3, "pending": "4 requests"}


async def forever_in_here() -> None:
    await asyncio.Event().wait()


async def test_wait_gives_the_result_and_passes_errors_through() -> None:
    assert await wait(asyncio.sleep(0, "done"), "quick", 5.0) == "done"

    async def fail() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own") as caught:
        await wait(fail(), "failing", 5.0)
    assert not isinstance(caught.value, PhaseTimeout)


async def test_expiry_names_everything_and_dumps_stacks(tmp_path: Path) -> None:
    task = asyncio.ensure_future(forever_in_here())
    with pytest.raises(PhaseTimeout) as caught:
        await wait(task, "sampling step 3", 0.05, facts, tmp_path)
    text = str(caught.value)
    for part in ("sampling step 3", "0.05 s", "actor engine 1", "host node-7", "version 12", "queue depth 3", "4 requests", "timeout_s"):
        assert part in text
    assert caught.value.stacks is not None and caught.value.stacks.parent == tmp_path
    stacks = caught.value.stacks.read_text()
    assert "forever_in_here" in stacks, "the waiting task's own stack"
    assert "test_watchdog.py" in stacks.split("task ")[0], "the threads' stacks"
    await asyncio.sleep(0)
    assert task.cancelled()


async def test_phase_block_expires_and_names_the_host(tmp_path: Path) -> None:
    with pytest.raises(PhaseTimeout, match=r"publishing.*host ") as caught:
        async with phase("publishing version 2", 0.05, folder=tmp_path):
            await forever_in_here()
    assert caught.value.stacks is not None and "forever_in_here" in caught.value.stacks.read_text()
    await asyncio.sleep(0)  # the owner is not left cancelled


async def test_phase_block_in_time_and_cancelled_from_outside() -> None:
    async with phase("quick", 5.0) as deadline:
        assert 0 < deadline.left_s <= 5.0

    async def work() -> None:
        async with phase("slow", 60.0):
            await forever_in_here()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_deadline_for_several_waits() -> None:
    deadline = Deadline("two waits", 0.1)
    await deadline.wait(asyncio.sleep(0.06))
    with pytest.raises(PhaseTimeout):
        await deadline.wait(asyncio.sleep(5.0))
    with pytest.raises(PhaseTimeout):
        deadline.check()
    assert deadline.left_s == 0.0


async def test_a_description_that_fails_does_not_hide_the_expiry() -> None:
    def broken() -> dict[str, object]:
        raise ConnectionError("the actor is gone")

    with pytest.raises(PhaseTimeout, match="the actor is gone"):
        await wait(forever_in_here(), "asking", 0.01, broken)


def test_stacks_outside_a_loop_and_into_a_folder_that_cannot_be(tmp_path: Path) -> None:
    path = dump_stacks(tmp_path, "a/../phase: with signs")
    assert path is not None and path.parent == tmp_path and "no event loop" in path.read_text()
    (tmp_path / "file").write_text("")
    assert dump_stacks(tmp_path / "file", "x") is None


def test_deadline_must_be_positive() -> None:
    with pytest.raises(ValueError, match="learning: timeout_s=0"):
        Deadline("learning", 0)


def test_timings_add_up_and_last_is_since_the_last_call() -> None:
    timings = Timings()
    with timings.phase("rollout"):
        time.sleep(0.02)
    with pytest.raises(KeyError), timings.phase("rollout"):
        raise KeyError
    timings.add("learn", 2.0)
    assert set(timings.last()) == {"rollout", "learn"}
    timings.add("learn", 3.0)
    assert timings.last() == {"learn": 3.0}
    assert timings.last() == {}
    assert timings.seconds()["learn"] == 5.0 and timings.seconds()["rollout"] >= 0.02
