"""The Ray actor around a :class:`VllmEngine`.

All engine work happens on one thread, in turn: between two engine steps a new request, a weight update or an abort gets in, so nothing
here stands in the way of running ahead of the learner or of updates in flight.  Questions about its health are answered at once, also
while the engine works.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from posttrain.rollout.engine import EngineConfig, Request, Sampled, VllmEngine


@dataclass(frozen=True)
class Health:
    """What an actor says of itself: enough for a message that names who is stuck on what."""

    name: str
    host: str
    pid: int
    version: int | None
    queue: int
    phase: str
    steps: int = 0


class EngineActor:
    """Build with the configuration, then ``start``; every other verb is :class:`VllmEngine`'s own."""

    def __init__(self, config: EngineConfig, name: str = "engine") -> None:
        self.config, self.name = config, name
        self.phase, self.steps = "created", 0
        self._engine: VllmEngine | None = None
        self._thread = ThreadPoolExecutor(1, "engine")
        self._futures: dict[str, asyncio.Future[Sampled]] = {}
        self._driver: asyncio.Task[None] | None = None

    async def start(self) -> Health:
        """Build the engine; once.  Raises what vLLM raises when the model cannot be served."""
        if self._engine is None:
            self.phase = "starting vLLM"
            try:
                self._engine = await self._run(VllmEngine, self.config)
            except Exception as error:  # vLLM's own exceptions do not all survive the way to the driver
                raise RuntimeError(f"vLLM cannot serve {self.config.model}: {type(error).__name__}: {error}") from None
            self.phase = "idle"
        return await self.health()

    @property
    def _waiting(self) -> int:
        return sum(not f.done() for f in self._futures.values())

    @property
    def _held(self) -> VllmEngine:
        assert self._engine is not None, "call start() first"
        return self._engine

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args))

    async def submit(self, requests: Sequence[Request], expect_version: int | None = None) -> None:
        """Queue requests and return; ``result`` hands out the answers.  One call is one batch: its requests enter the engine together and
        in order, so a run that is repeated repeats its batches.  Calls may overlap and then share the engine's batch."""
        if clash := {r.id for r in requests} & self._futures.keys():
            raise ValueError(f"request id {min(clash)!r} is already running; ids must be unique")
        futures = [asyncio.get_running_loop().create_future() for _ in requests]
        self._futures.update(zip((r.id for r in requests), futures, strict=True))
        try:
            self._resolve(await self._run(self._held.submit, list(requests), expect_version))
        except BaseException:
            for request in requests:
                self._futures.pop(request.id, None)
            raise
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())

    async def result(self, ids: Sequence[str]) -> list[Sampled]:
        """The answers to submitted requests, in order, once all of them are finished; each is handed out once."""
        try:
            return list(await asyncio.gather(*(self._futures[i] for i in ids)))
        finally:
            for i in ids:
                self._futures.pop(i, None)

    async def sample(self, requests: Sequence[Request], expect_version: int | None = None) -> list[Sampled]:
        """Draw every request and return them in order."""
        await self.submit(requests, expect_version)
        return await self.result([r.id for r in requests])

    async def _drive(self) -> None:
        self.phase = "sampling"
        try:
            while self._held.num_unfinished:
                self._resolve(await self._run(self._held.step))
                self.steps += 1
        except Exception as error:
            for future in self._futures.values():
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # whoever waits gets it; nobody waiting is not worth a warning
        finally:
            self.phase = "idle"

    def _resolve(self, finished: Sequence[Sampled]) -> None:
        for sampled in finished:
            future = self._futures.get(sampled.id)
            if future is not None and not future.done():
                future.set_result(sampled)

    async def abort(self, ids: Sequence[str] | None = None) -> list[Sampled]:
        """Stop requests and return what they had; whoever waits for them gets the same partial answers."""
        stopped = await self._run(self._held.abort, ids)
        self._resolve(stopped)
        return stopped

    async def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        return await self._run(self._held.logprobs, sequences, temperature)

    async def load_weights(
        self, version: int, buckets: Sequence[Any], fingerprint: Mapping[str, tuple[int, int]] | None = None, running: str = "refuse"
    ) -> None:
        self.phase = f"loading version {version}"
        try:
            await self._run(self._held.load_weights, version, buckets, fingerprint, running)
        finally:
            self.phase = "sampling" if self._waiting else "idle"

    async def version(self) -> int | None:
        return self._held.version

    async def fingerprint(self) -> dict[str, tuple[int, int]]:
        return await self._run(self._held.fingerprint)

    async def health(self) -> Health:
        """Answers at once, also while the engine works."""
        version = None if self._engine is None else self._engine.version
        return Health(self.name, socket.gethostname(), os.getpid(), version, self._waiting, self.phase, self.steps)

    async def close(self) -> None:
        if self._engine is not None:
            await self._run(self._engine.close)
