"""A pool of engines: prompts in, groups out, whichever engine answers and whichever dies.

Every sample is a request of its own with a seed of its own, derived by hashing, so a request that is repeated on another engine draws
the same tokens.  A dead engine is started again and given the newest published weights; every wait has a deadline that says who is
stuck on what.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.data.seeds import derive
from posttrain.records import Group, Prompt, Rollout, Sampling, Segment, Source
from posttrain.rollout.actor import EngineActor, Health
from posttrain.rollout.engine import EngineConfig, Request, Sampled
from posttrain.sync.base import SyncError
from posttrain.watchdog import together

HEALTH_S = 5.0


class RolloutError(RuntimeError):
    """The pool cannot go on.  The message names phase, actor, host, version and queue depth."""


class EngineDied(Exception):
    """Internal: this engine is gone, try another."""


@dataclass
class Member:
    """One engine of the pool.  ``load`` is the number of tokens it may still have to draw."""

    name: str
    actor: Any
    version: int
    load: int = 0
    queue: int = 0
    deaths: int = 0
    health: Health | None = None
    last_error: str = ""
    starting: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.starting is not None and self.starting.done() and not self.starting.cancelled() and self.starting.exception() is None

    def __str__(self) -> str:
        where = f"on {self.health.host} (pid {self.health.pid})" if self.health else "not placed yet"
        return f"{self.name} {where}, weights version {self.version}, {self.queue} requests queued"


class EnginePool:
    """``num_engines`` actors that share the work.  Nothing is started until ``ready`` (or the first ``sample`` or ``publish``).

    ``decode``        token ids -> text, special tokens skipped
    ``num_cpus``, ``num_gpus``, ``options``   what Ray reserves per engine, and further actor options (a placement group's scheduling
    strategy)
    ``timeout_s``     deadline of one ``sample`` or ``publish``;  ``start_timeout_s`` of an engine's start
    ``max_restarts``  deaths per engine after which the run stops
    """

    def __init__(
        self,
        config: EngineConfig,
        decode: Callable[[Sequence[int]], str],
        *,
        num_engines: int = 1,
        run_seed: int = 0,
        timeout_s: float = 1800.0,
        start_timeout_s: float = 600.0,
        num_cpus: float = 0.5,
        num_gpus: float = 0.0,
        options: Mapping[str, Any] | None = None,
        max_restarts: int = 3,
    ) -> None:
        if num_engines < 1:
            raise ValueError(f"rollout.num_engines={num_engines}; at least one engine is needed")
        self.config, self.decode, self.run_seed = config, decode, run_seed
        self.timeout_s, self.start_timeout_s, self.max_restarts = timeout_s, start_timeout_s, max_restarts
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0, **(options or {})}
        self._members = [Member(f"engine {i}", None, config.version) for i in range(num_engines)]
        self._newest: tuple[int, Sequence[Any], Mapping[str, Any] | None] | None = None
        self._pids: list[tuple[str, int]] = []
        self._closed = False
        self._retried = 0

    @property
    def version(self) -> int:
        """Version of the newest published weights."""
        return self._newest[0] if self._newest else self.config.version

    # -- verbs ---------------------------------------------------------------------------------------------------------
    async def ready(self) -> list[Health]:
        """Start the engines that are not running and wait for all.  Raises :class:`RolloutError` naming the one that does not come up."""
        for member in self._members:
            self._ensure(member)
        await asyncio.gather(*(m.starting for m in self._members if m.starting))
        return [m.health for m in self._members if m.health]

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        """``n`` rollouts of every prompt, as one group each, in order.  ``first`` numbers them on when a group is continued.

        A prompt that occurs twice gets new sample numbers, so ids stay unique.  Raises :class:`RolloutError` after the deadline.
        """
        await self._any_alive()
        deadline = time.monotonic() + self.timeout_s
        seen: Counter[str] = Counter()
        jobs = []
        for prompt in prompts:
            start = first + n * seen[prompt.id]
            seen[prompt.id] += 1
            jobs.append([self._request(prompt, step, i, sampling) for i in range(start, start + n)])
        found = await self._draw(dict(enumerate(jobs)), deadline, step)
        answers = [found[i] for i in range(len(jobs))]
        return [
            Group(prompt, tuple(self._rollout(prompt, request, sampled) for request, sampled in zip(job, answer, strict=True)))
            for prompt, job, answer in zip(prompts, jobs, answers, strict=True)
        ]

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of given tokens under the engines' weights, ``result[i][t]`` for ``sequences[i][t]``; the first of each sequence has none and is
        NaN.  Shared out in order over the engines that are up; what a dead one leaves is asked again.  Raises :class:`RolloutError` after the deadline."""
        await self._any_alive()
        deadline = time.monotonic() + self.timeout_s
        found: dict[int, list[float]] = {}

        async def share(member: Member, indices: Sequence[int]) -> None:
            actor = member.actor
            try:
                rows = await self._wait(member, actor.logprobs.remote([tuple(sequences[i]) for i in indices]), "scoring given tokens", deadline)
                found.update(zip(indices, rows, strict=True))
            except EngineDied:
                self._bury(member, actor)

        while missing := [i for i in range(len(sequences)) if i not in found]:
            await self._any_alive()
            alive = [m for m in self._members if m.alive]
            size = -(-len(missing) // len(alive))
            await together(share(m, part) for k, m in enumerate(alive) if (part := missing[k * size : (k + 1) * size]))
        return [found[i] for i in range(len(sequences))]

    async def publish(self, version: int, buckets: Sequence[Any], fingerprint: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Give every engine the new weights, at once, and keep the references for engines that come back.

        Raises :class:`SyncError` when an engine ends up with other weights, :class:`RolloutError` after the deadline.
        """
        if version < self.version:
            raise SyncError(f"publish of version {version} after version {self.version}: the update is stale")
        self._newest = (version, buckets, fingerprint)
        await self._any_alive()
        deadline = time.monotonic() + self.timeout_s
        await together(self._update(member, deadline) for member in self._members if member.alive)

    def close(self) -> None:
        """End every engine's process and wait until it is gone."""
        import ray

        self._closed = True
        for member in self._members:
            if member.starting is not None and not member.starting.done():
                with contextlib.suppress(RuntimeError):  # the loop it ran in may be gone
                    member.starting.cancel()
            if member.actor is not None and ray.is_initialized():
                ray.kill(member.actor, no_restart=True)
            member.actor = member.starting = None
        waited = time.monotonic() + 10.0
        while time.monotonic() < waited and any(host == socket.gethostname() and _runs(pid) for host, pid in self._pids):
            time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        """Deaths and retries so far, and how many engines are up."""
        return {
            "rollout/engines": float(sum(m.alive for m in self._members)),
            "rollout/engine_deaths": float(sum(m.deaths for m in self._members)),
            "rollout/retried_groups": float(self._retried),
        }

    # -- requests ------------------------------------------------------------------------------------------------------
    def _request(self, prompt: Prompt, step: int, index: int, sampling: Sampling) -> Request:
        base = self.run_seed if sampling.seed is None else sampling.seed
        seed = derive(base, "rollout", step, prompt.id, index)
        return Request(f"{step}/{prompt.id}/{index}", tuple(prompt.ids), replace(sampling, seed=seed))

    def _rollout(self, prompt: Prompt, request: Request, sampled: Sampled) -> Rollout:
        segments = tuple(
            Segment(sampled.ids[start:end], Source.policy, logprobs=sampled.logprobs[start:end], version=version)
            for version, start, end in sampled.spans
            if end > start
        )
        meta = {"error": sampled.error} if sampled.error else {}
        told = replace(prompt, meta={**prompt.meta, **meta}) if meta else prompt
        return Rollout(request.id, told, segments, sampled.finish, request.sampling, self.decode(sampled.ids) if sampled.ids else "", routing=sampled.routing)

    async def _draw(self, jobs: Mapping[int, list[Request]], deadline: float, step: int) -> dict[int, list[Sampled]]:
        """Every group, shared out over the engines that are up: one batch each, the groups of equal cost in order, so that equal calls make
        equal batches.  A group whose engine dies before it is finished is drawn again on the others."""
        if not jobs:
            return {}
        while not (alive := [m for m in self._members if m.alive]):
            await self._any_alive()
        shares: list[dict[int, list[Request]]] = [{} for _ in alive]
        load = [m.load for m in alive]
        for i, job in sorted(jobs.items(), key=lambda item: -_cost(item[1])):
            least = load.index(min(load))
            shares[least][i] = job
            load[least] += _cost(job)
        parts = await together(self._share(m, share, deadline, step) for m, share in zip(alive, shares, strict=True) if share)
        return {i: answer for part in parts for i, answer in part.items()}

    async def _share(self, member: Member, jobs: Mapping[int, list[Request]], deadline: float, step: int) -> dict[int, list[Sampled]]:
        """One engine's batch: handed over in one call, its groups collected as they finish."""
        actor, phase = member.actor, f"sampling step {step}"
        requests = [r for job in jobs.values() for r in job]
        cost = sum(map(_cost, jobs.values()))
        member.load += cost
        member.queue += len(requests)
        done: dict[int, list[Sampled]] = {}

        async def group(i: int) -> None:
            with contextlib.suppress(EngineDied):
                done[i] = await self._wait(member, actor.result.remote([r.id for r in jobs[i]]), phase, deadline)

        try:
            with contextlib.suppress(EngineDied):
                await self._wait(member, actor.submit.remote(requests, member.version), phase, deadline)
                await together(group(i) for i in jobs)
        finally:
            member.load -= cost
            member.queue -= len(requests)
        lost = {i: job for i, job in jobs.items() if i not in done}
        if lost:
            self._retried += len(lost)
            self._bury(member, actor)
            done |= await self._draw(lost, deadline, step)
        return done

    # -- life and death ------------------------------------------------------------------------------------------------
    def _ensure(self, member: Member) -> None:
        if self._closed:
            raise RolloutError("the engine pool is closed")
        if member.starting is None:
            member.starting = asyncio.create_task(self._start(member), name=f"start {member.name}")

    async def _any_alive(self) -> None:
        """Start what is not running, then wait until one engine is up; its error is raised when none can be."""
        first = all(m.starting is None for m in self._members)
        for member in self._members:
            self._ensure(member)
        if first:
            await self.ready()
        while not any(m.alive for m in self._members):
            tasks = [m.starting for m in self._members if m.starting]
            if pending := [t for t in tasks if not t.done()]:
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.gather(*tasks)

    async def _start(self, member: Member) -> None:
        """Bring an engine up, again when it dies on the way, until it holds the newest published weights."""
        while True:
            try:
                return await self._boot(member)
            except EngineDied:
                self._count_death(member)

    async def _boot(self, member: Member) -> None:
        import ray

        deadline = time.monotonic() + self.start_timeout_s
        member.version, member.health, held = self.config.version, None, None
        member.actor = ray.remote(EngineActor).options(**self._options).remote(self.config, member.name)
        member.health = await self._wait(member, member.actor.start.remote(), "starting the engine", deadline, final=True)
        self._pids.append((member.health.host, member.health.pid))
        while held is not self._newest:
            held = self._newest
            await self._load(member, member.actor, held, deadline)

    async def _load(self, member: Member, actor: Any, weights: Any, deadline: float) -> None:
        version, buckets, fingerprint = weights
        call = actor.load_weights.remote(version, list(buckets), fingerprint)
        await self._wait(member, call, f"publishing version {version}", deadline, final=True)
        member.version = version
        member.health = member.health and replace(member.health, version=version)

    async def _update(self, member: Member, deadline: float) -> None:
        actor = member.actor
        try:
            await self._load(member, actor, self._newest, deadline)
        except EngineDied:
            self._bury(member, actor)
            await self._any_alive()

    def _bury(self, member: Member, actor: Any) -> None:
        """Forget a dead actor, once, and start its successor.  Raises :class:`RolloutError` when it has died too often."""
        if member.actor is not actor or self._closed:
            return
        self._count_death(member)
        member.starting = None
        self._ensure(member)

    def _count_death(self, member: Member) -> None:
        import ray

        member.deaths += 1
        actor, member.actor = member.actor, None
        if actor is not None:
            ray.kill(actor, no_restart=True)
        if member.deaths > self.max_restarts:
            raise RolloutError(
                f"{member} died {member.deaths} times, last with: {member.last_error}; if memory ran out, lower "
                "rollout.kv_cache_gb or rollout.max_num_seqs"
            )

    async def _wait(self, member: Member, ref: Any, phase: str, deadline: float, final: bool = False) -> Any:
        """The result.  Raises :class:`EngineDied` when the actor is gone or its engine broke, :class:`RolloutError` at the deadline,
        and errors that another engine would meet as well as they are.  ``final``: any error of the call itself is one of those."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(_resolve(ref), max(deadline - time.monotonic(), 0.0))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (SyncError, ValueError)) and not final:
                raise cause from None
            member.last_error = f"{type(cause).__name__}: {cause}"
            if final:
                raise (cause if isinstance(cause, SyncError) else RolloutError(f"{phase}: {member} failed: {member.last_error}")) from None
            raise EngineDied from None
        except TimeoutError:
            raise RolloutError(f"{phase}: no answer within the deadline; {await self._describe(member)}") from None
        except RayActorError as error:
            member.last_error = str(error).splitlines()[0]
            raise EngineDied from None

    async def _describe(self, member: Member) -> str:
        """Who is stuck on what, asking the actor itself for a moment."""
        try:
            health = await asyncio.wait_for(_resolve(member.actor.health.remote()), HEALTH_S)
        except Exception:
            return f"{member}; it does not answer a health check either (no free resources to place it, or its process hangs)"
        said = f"phase {health.phase!r}, version {health.version}, {health.queue} requests, {health.steps} engine steps so far"
        return f"{member}; it says: {said}"


def _cost(requests: Sequence[Request]) -> int:
    """Tokens a group may still take."""
    return sum(r.sampling.max_tokens for r in requests) + (len(requests[0].ids) if requests else 0)


async def _resolve(ref: Any) -> Any:
    return await ref


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
