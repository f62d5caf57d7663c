"""The learner as Ray actors: one :class:`LearnerActor` per rank around an engine, and :class:`LearnerGroup`, which the driver talks to.

The group deals micro-batches to ranks so that all of them run the same number, adds up what they report, and puts a deadline on every wait.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from posttrain.metrics import Accumulator
from posttrain.records import TokenBatch

Metrics = dict[str, tuple[float, float]]


class LearnerError(RuntimeError):
    """A learner rank failed, died or did not answer in time.  The message names phase, rank, host and what it was doing."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.  ``metrics``: name -> (sum, count), added over micro-batches and ranks.  ``scalars``: ``grad_norm`` (before
    clipping), ``lr``, ``update_norm_ratio``, ``tokens`` (columns seen) and ``time_s``."""

    metrics: Metrics
    scalars: dict[str, float] = field(default_factory=dict)


def add_metrics(parts: Sequence[Metrics]) -> Metrics:
    """Add (sum, count) pairs by name, as each metric's declaration says."""
    total = Accumulator()
    for part in parts:
        total.add(part)
    return total.pairs


class LearnerActor:
    """One rank.  Its methods run one at a time; ``status`` answers beside them (its own concurrency group).

    ``env`` is set before anything that reads it is imported (deepspeed, torch's compiler) or started (CUDA).
    """

    def __init__(self, rank: int, world_size: int, env: Mapping[str, str]) -> None:
        os.environ |= env
        self.rank, self.world_size = rank, world_size
        self.phase, self.since, self.version = "starting", time.monotonic(), -1
        self.engine: Any = None
        self._store: Any = None

    def status(self) -> dict[str, Any]:
        """What the rank is doing, for how long, where, and with which version last published."""
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.phase,
            "for_s": round(time.monotonic() - self.since, 1),
            "version": self.version,
        }

    def _now(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def meet(self, timeout_s: float) -> tuple[str, int]:
        """Open the store where the ranks meet, on this rank's machine, and say where it is.  It listens from here on: a port that is only chosen now
        and opened later may be taken in between."""
        from datetime import timedelta

        import ray
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, self.world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        return host, self._store.port

    def start(
        self, model_cfg: Any, learner_cfg: Any, objective: Any, total_steps: int, seed: int, meeting: tuple[str, int] | None, threads: int
    ) -> dict[str, Any]:
        """Join the process group, load the model and build the engine."""
        import torch

        self._now("loading the model")
        torch.set_num_threads(threads)
        _quiet()
        if self.world_size > 1:
            assert meeting is not None
            self._join(meeting, learner_cfg.timeout_s)
        engine: Any
        if learner_cfg.engine == "deepspeed":
            from posttrain.learner.engine import DeepSpeedEngine as engine
        elif learner_cfg.engine == "torch":
            from posttrain.learner.torch_engine import TorchEngine as engine
        else:
            raise ValueError(f"learner.engine={learner_cfg.engine!r}; choose deepspeed or torch")
        self.engine = engine(model_cfg, learner_cfg, objective, self.rank, self.world_size, total_steps, seed)
        self._now("idle")
        return self.status()

    def _join(self, meeting: tuple[str, int], timeout_s: float) -> None:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        host, port = meeting
        if host.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(self.rank), "WORLD_SIZE": str(self.world_size)}
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        wait = timedelta(seconds=timeout_s)
        store = self._store or dist.TCPStore(host, port, self.world_size, is_master=False, timeout=wait)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=wait)

    def score(self, micro: list[TokenBatch], policy: str, entropy: bool, routing: bool = False, collision: bool = False) -> list[dict[str, Tensor]]:
        self._now(f"scoring {policy}")
        found = [self.engine.score(batch, policy, entropy, routing, collision) for batch in micro]
        self._now("idle")
        return found

    def step(self, micro: list[TokenBatch], weights: list[Tensor | None]) -> tuple[Metrics, dict[str, float]]:
        """Forward and backward over this rank's micro-batches, then one optimizer step."""
        parts = []
        for index, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
            self._now(f"learning, micro-batch {index + 1} of {len(micro)}")
            parts.append(self.engine.forward_backward(batch, weight, last=index == len(micro) - 1))
        self._now("taking the optimizer step")
        scalars = self.engine.optim_step()
        self._now("idle")
        return add_metrics(parts), scalars

    def look_ahead(self, micro: list[TokenBatch], name: str, measure: bool, keep: bool) -> dict[str, float]:
        from posttrain.learner.lookahead import look_ahead

        self._now(f"looking ahead for {name}")
        found = look_ahead(self.engine, micro, name, measure, keep)
        self._now("idle")
        return found

    def publish(self, version: int, dtype: str, bucket_bytes: int) -> tuple[list[Any], dict[str, tuple[int, int]]] | None:
        """Rank 0 puts the weights into Ray's object store in ``dtype`` and returns references and fingerprint; the others only take part in
        gathering.  The references are held here until the next version, so that late engines find them."""
        import torch

        from posttrain.sync.object_store import put

        self._now(f"publishing version {version}")
        result = None
        if self.rank == 0:
            result = put(self.engine.state(), bucket_bytes=bucket_bytes, dtype=getattr(torch, dtype))
            self._held = result[0]
        else:
            for _ in self.engine.state():
                pass
        self.version = version
        self._now("idle")
        return result

    def move_base(self, mix: float) -> None:
        self._now("moving the base")
        self.engine.move_base(mix)
        self._now("idle")

    def save(self, path: str) -> None:
        self._now(f"saving to {path}")
        self.engine.save(path)
        self._now("idle")

    def load(self, path: str) -> None:
        self._now(f"loading from {path}")
        self.engine.load(path)
        self._now("idle")

    def export(self, path: str) -> None:
        self._now(f"exporting to {path}")
        self.engine.export(path)
        self._now("idle")

    def frozen(self) -> list[str]:
        return self.engine.frozen()

    def fingerprint(self) -> dict[str, tuple[int, int]]:
        return self.engine.fingerprint()


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def deal(count: int, ranks: int) -> list[list[int]]:
    """Which micro-batches each rank runs: round robin, as ``i % ranks``.  Ranks that get one fewer are padded by the group."""
    return [list(range(rank, count, ranks)) for rank in range(ranks)]


class LearnerGroup:
    """All ranks of the learner, seen from the driver.

    ``num_gpus`` per rank; 0 keeps the ranks on CPU.  ``publish_dtype`` is the rollout engine's dtype: weights are cast to it before they are
    hashed and sent.  Every method raises :class:`LearnerError` when a rank fails or ``learner_cfg.timeout_s`` passes.
    """

    def __init__(
        self,
        model_cfg: Any,
        learner_cfg: Any,
        objective: Any,
        *,
        total_steps: int,
        seed: int = 0,
        num_gpus: float = 0.0,
        publish_dtype: str | None = None,
        bucket_mb: int = 256,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.model_cfg, self.cfg, self.objective, self.total_steps, self.seed = model_cfg, learner_cfg, objective, total_steps, seed
        self.num_gpus, self.publish_dtype, self.bucket_bytes = num_gpus, publish_dtype or model_cfg.dtype, bucket_mb * 2**20
        self.start_timeout_s = start_timeout_s
        self.version = -1
        self.actors: list[Any] = []

    # -- life ----------------------------------------------------------------------------------------------------------
    async def ready(self) -> list[dict[str, Any]]:
        """Start the ranks and wait until every one holds its model.  Returns their status."""
        import ray

        size = self.cfg.world_size
        threads = self.cfg.threads or max(1, (os.cpu_count() or 1) // size)
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "LOCAL_RANK": "0"}
        if not self.num_gpus:
            env |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        remote = ray.remote(concurrency_groups={"status": 1}, num_cpus=0, num_gpus=self.num_gpus, max_concurrency=1)(LearnerActor)
        name = uuid.uuid4().hex[:8]
        self.actors = [remote.options(name=f"learner-{name}-{rank}").remote(rank, size, env) for rank in range(size)]
        deadline = time.monotonic() + self.start_timeout_s
        meeting = (await self._gather("opening a store", [self.actors[0].meet.remote(self.cfg.timeout_s)], deadline))[0] if size > 1 else None
        calls = [
            a.start.remote(self.model_cfg, self.cfg, self.objective, self.total_steps, self.seed, meeting, threads) for a in self.actors
        ]
        return await self._gather("starting the learner", calls, deadline)

    def close(self) -> None:
        """End the actors' processes."""
        if not self.actors:
            return
        import ray

        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self.actors = []

    # -- verbs ---------------------------------------------------------------------------------------------------------
    async def score(
        self, micro: Sequence[TokenBatch], policy: str = "current", entropy: bool = False, routing: bool = False, collision: bool = False
    ) -> list[dict[str, Tensor]]:
        """``{"logp": [N], ...}`` per micro-batch, in the order given."""
        plan, padded = self._deal(micro)
        calls = [a.score.remote([padded[i] for i in part], policy, entropy, routing, collision) for a, part in zip(self.actors, plan, strict=True)]
        answers = await self._gather(f"scoring {policy}", calls)
        found = {i: answer for part, results in zip(plan, answers, strict=True) for i, answer in zip(part, results, strict=True)}
        return [found[i] for i in range(len(micro))]

    async def step(self, micro: Sequence[TokenBatch], weights: Sequence[Tensor] | None = None) -> StepReport:
        """One optimizer step over all micro-batches.  ``weights``: token weights per micro-batch, already computed (second of two passes)."""
        if not micro:
            raise ValueError("an optimizer step needs at least one micro-batch")
        start = time.monotonic()
        plan, padded = self._deal(micro)
        given: list[Tensor | None] = [*(weights if weights is not None else [None] * len(micro)), *[None] * (len(padded) - len(micro))]
        calls = [
            a.step.remote([padded[i] for i in part], [given[i] for i in part]) for a, part in zip(self.actors, plan, strict=True)
        ]
        answers = await self._gather("learning", calls)
        scalars = {**answers[0][1], "tokens": float(sum(b.num_tokens for b in micro)), "time_s": time.monotonic() - start}
        return StepReport(add_metrics([metrics for metrics, _ in answers]), scalars)

    async def look_ahead(self, micro: Sequence[TokenBatch], name: str, measure: bool, keep: bool) -> dict[str, float]:
        """``slope`` of the utility along the coefficient ``name``, when ``measure`` and a direction was kept; see :mod:`posttrain.learner.lookahead`."""
        plan, padded = self._deal(micro)
        calls = [a.look_ahead.remote([padded[i] for i in part], name, measure, keep) for a, part in zip(self.actors, plan, strict=True)]
        return (await self._gather("looking ahead", calls))[0]

    def _deal(self, micro: Sequence[TokenBatch]) -> tuple[list[list[int]], list[TokenBatch]]:
        """The plan, and the micro-batches with empty ones appended until every rank has the same number."""
        if not self.actors:
            raise LearnerError("the learner has not been started (or was closed): await ready() first")
        padded = list(micro)
        while len(padded) % len(self.actors):
            padded.append(micro[0].take([]))
        return deal(len(padded), len(self.actors)), padded

    async def publish(self, version: int) -> tuple[list[Any], dict[str, tuple[int, int]]]:
        """(references to weight buckets in the object store, fingerprint in the engine's dtype)."""
        calls = [a.publish.remote(version, self.publish_dtype, self.bucket_bytes) for a in self.actors]
        refs, fingerprint = (await self._gather(f"publishing version {version}", calls))[0]
        self.version = version
        return refs, fingerprint

    async def move_base(self, mix: float) -> None:
        """On every rank ``base <- mix * policy + (1 - mix) * base``."""
        await self._all("moving the base", "move_base", mix)

    async def save(self, path: str) -> None:
        """Every rank writes its file into the folder ``path``."""
        await self._all("saving", "save", path)

    async def load(self, path: str) -> None:
        """Every rank continues from its file in ``path``."""
        await self._all("loading", "load", path)

    async def export(self, path: str) -> None:
        """A Hugging Face folder at ``path``."""
        await self._all("exporting", "export", path)

    async def frozen(self) -> list[str]:
        """Names of trainable tensors that have not moved since the start."""
        return (await self._all("looking for frozen tensors", "frozen"))[0]

    async def fingerprint(self) -> dict[str, tuple[int, int]]:
        """Fingerprint of the learner's own weights, in the model's dtype."""
        return (await self._all("fingerprinting", "fingerprint"))[0]

    # -- waiting -------------------------------------------------------------------------------------------------------
    async def _all(self, phase: str, method: str, *args: Any) -> list[Any]:
        if not self.actors:
            raise LearnerError("the learner has not been started (or was closed): await ready() first")
        return await self._gather(phase, [getattr(a, method).remote(*args) for a in self.actors])

    async def _gather(self, phase: str, calls: list[Any], deadline: float | None = None) -> list[Any]:
        """All answers; the first failure ends the wait, because the other ranks may then wait for the failed one for ever."""
        from ray.exceptions import RayActorError, RayTaskError

        limit = self.cfg.timeout_s if deadline is None else max(deadline - time.monotonic(), 0.0)
        tasks = {asyncio.ensure_future(_resolve(call)): rank for rank, call in enumerate(calls)}
        pending = set(tasks)
        end = time.monotonic() + limit
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=max(end - time.monotonic(), 0.0), return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    ranks = sorted(tasks[t] for t in pending)
                    raise LearnerError(f"{phase}: rank {ranks[0]} of {len(calls)} gave no answer within {limit:.0f} s; {await self._describe(ranks[0])}")
                for task in done:
                    if (error := task.exception()) is None:
                        continue
                    rank = tasks[task]
                    if isinstance(error, RayTaskError):
                        cause = error.cause
                        for kind in (FloatingPointError, ValueError, OSError):
                            if isinstance(cause, kind):
                                raise kind(f"{phase}, learner rank {rank}: {cause}") from None
                        raise LearnerError(f"{phase}: learner rank {rank} failed with {type(cause).__name__}: {cause}") from error
                    if isinstance(error, RayActorError):
                        why = str(error).splitlines()[0]
                        raise LearnerError(
                            f"{phase}: learner rank {rank} died (last published version {self.version}): {why}; if memory ran out, lower "
                            "learner.micro_batch_tokens, shard with learner.zero_stage, or set model.gradient_checkpointing=true"
                        ) from None
                    raise error
        finally:
            for task in tasks:
                task.cancel()
        return [task.result() for task in tasks]

    async def _describe(self, rank: int) -> str:
        """What a silent rank says it is doing."""
        try:
            said = await asyncio.wait_for(_resolve(self.actors[rank].status.options(concurrency_group="status").remote()), 10.0)
        except Exception:
            return f"last version {self.version}; it does not answer a status call either (no free resources to place it, or its process hangs)"
        return (
            f"on host {said['host']} (pid {said['pid']}) it has been {said['phase']!r} for {said['for_s']} s; last version {said['version']}; "
            "raise learner.timeout_s if this is normal"
        )


async def _resolve(call: Any) -> Any:
    return await call
