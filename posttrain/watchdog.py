"""Deadlines with an owner, stacks when one expires, and where the time of a run went.

Nothing waits without a limit.  When one passes, the message names the phase, the actor, the host, the last version and the queue depth, and the
stacks of every thread and every task of this process are in the run folder.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import os
import re
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Describe = Callable[[], Mapping[str, Any]]
"""Called when a deadline passes, for what is known then: ``actor``, ``host``, ``version``, ``queue_depth`` and whatever else helps."""


class PhaseTimeout(TimeoutError):
    """A phase did not end in time.  ``phase``, ``timeout_s``, ``facts`` and ``stacks`` (a file, or ``None``) are attributes."""

    def __init__(self, phase: str, timeout_s: float, facts: Mapping[str, Any] | None = None, stacks: Path | None = None) -> None:
        self.phase, self.timeout_s, self.facts, self.stacks = phase, timeout_s, dict(facts or {}), stacks
        self.facts.setdefault("host", socket.gethostname())
        order = ["actor", "host", "version", "queue_depth"]
        known = [k for k in order if self.facts.get(k) is not None] + [k for k in self.facts if k not in order]
        told = ", ".join(f"{k.replace('_', ' ')} {self.facts[k]}" for k in known)
        where = f"; stacks in {stacks}" if stacks else ""
        super().__init__(
            f"{phase}: no end after {timeout_s:g} s ({told}){where}; raise the phase's timeout_s if that is a normal time for it"
        )


@dataclass
class Deadline:
    """A point in time that several waits share.

    >>> deadline = Deadline("publishing version 7", 60.0)
    >>> await deadline.wait(first); await deadline.wait(second)         # a minute for both
    """

    phase: str
    timeout_s: float
    describe: Describe | None = None
    folder: Path | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"{self.phase}: timeout_s={self.timeout_s} must be above 0")

    @property
    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.started + self.timeout_s - time.monotonic())

    def expire(self) -> PhaseTimeout:
        """Dump the stacks and return the error to raise.  A ``describe`` that fails is part of the message, not a second error."""
        try:
            facts = dict(self.describe()) if self.describe else {}
        except Exception as error:
            facts = {"description": f"not available ({type(error).__name__}: {error})"}
        return PhaseTimeout(self.phase, self.timeout_s, facts, dump_stacks(self.folder, self.phase) if self.folder else None)

    def check(self) -> None:
        """Raise :class:`PhaseTimeout` when the time is up."""
        if self.left_s <= 0:
            raise self.expire()

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """The awaitable's result, or :class:`PhaseTimeout`; it is cancelled then.  Its own errors, also its own time-outs, pass through."""
        task = asyncio.ensure_future(awaitable)
        try:
            done, _ = await asyncio.wait({task}, timeout=self.left_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if done:
            return task.result()
        error = self.expire()  # before the task is cancelled: its stack is what people want to see
        task.cancel()
        raise error


async def wait(awaitable: Awaitable[T], phase: str, timeout_s: float, describe: Describe | None = None, folder: Path | None = None) -> T:
    """``asyncio.wait_for`` with an owner: see :class:`Deadline`."""
    return await Deadline(phase, timeout_s, describe, folder).wait(awaitable)


@asynccontextmanager
async def phase(name: str, timeout_s: float, describe: Describe | None = None, folder: Path | None = None) -> AsyncIterator[Deadline]:
    """A block of awaits under one deadline.

    >>> async with phase("rollout", 1800, lambda: {"version": pool.version, "queue_depth": queue.qsize()}, run_folder):
    ...     groups = await pool.sample(prompts)
    """
    deadline = Deadline(name, timeout_s, describe, folder)
    owner = asyncio.current_task()
    assert owner is not None
    earlier = owner.cancelling()
    expired: list[PhaseTimeout] = []

    def ring() -> None:
        expired.append(deadline.expire())
        owner.cancel()

    alarm = asyncio.get_running_loop().call_later(timeout_s, ring)
    try:
        yield deadline
    except asyncio.CancelledError:
        if expired and owner.uncancel() <= earlier:
            raise expired[0] from None
        raise
    finally:
        alarm.cancel()
    if expired:  # the block caught the cancellation itself
        owner.uncancel()
        raise expired[0]


def dump_stacks(folder: Path | str, phase: str) -> Path | None:
    """Write the stacks of all threads and tasks to ``folder/stacks-PHASE-PID.txt``.  ``None`` when the folder cannot be written."""
    path = Path(folder) / f"stacks-{re.sub(r'[^A-Za-z0-9]+', '-', phase).strip('-')}-{os.getpid()}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"{phase}: stacks of process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0, io.SEEK_END)
            file.write(f"\n{_tasks()}")
    except OSError:
        return None
    return path


def _tasks() -> str:
    """What every task of the running loop waits for."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return "no event loop is running in this thread\n"
    out = io.StringIO()
    for task in sorted(tasks, key=lambda t: t.get_name()):
        out.write(f"task {task.get_name()}:\n")
        for frame in task.get_stack():
            out.write("".join(traceback.format_stack(frame, limit=1)))
    return out.getvalue()


class Timings:
    """Seconds per phase.  Phases that run at the same time are each counted in full, so the sum may exceed the clock."""

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._recent: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block, also when it raises."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._total[name] = self._total.get(name, 0.0) + seconds
        self._recent[name] = self._recent.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Since the start, per phase."""
        return dict(self._total)

    def last(self) -> dict[str, float]:
        """Since the last call of this method, per phase: called once per step, it is the step's own time."""
        recent, self._recent = self._recent, {}
        return recent


async def together(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Gather; when one fails the others are cancelled instead of being left running."""
    tasks = [asyncio.create_task(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
