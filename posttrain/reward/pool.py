"""Scores groups: every reward on every rollout, under deadlines, with failures masked, counted and budgeted.

A verifier that fails has not given a zero.  An exception, a deadline, a NaN or a wrong number of results becomes a ``Score(None, ...)``; a
rollout whose required reward failed gets ``reward=None`` and leaves the loss and the group statistics.  When the share of failures of one
reward passes its budget, the run stops with the last failure in the message.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from posttrain.records import Group, Rollout, Score
from posttrain.reward.base import Reward, Signature, read, read_many
from posttrain.reward.combine import Combiner, Sum
from posttrain.reward.place import paid
from posttrain.reward.worker import RemoteError, Timeout, WorkerDied, WorkerPool

log = logging.getLogger(__name__)
Results = list[tuple[Score, dict[str, Score]]]
STATUSES = ("ok", "bad_format", "timeout", "error")


class RewardBudgetError(RuntimeError):
    """Too many calls of a reward failed.  The message names the reward, the share and the last failure."""


class ErrorBudget:
    """Failures per reward over the last ``window`` steps.

    The budget of a window is ``share * window * (scores per step so far, on average)`` failures, so an unlucky first step does not stop a
    run and a verifier that always fails stops it at once.
    """

    def __init__(self, share: float = 0.01, window: int = 50) -> None:
        if not 0.0 <= share <= 1.0 or window < 1:
            raise ValueError(f"an error budget needs 0 <= share <= 1 and window >= 1, not share={share}, window={window}")
        self.share, self.window = share, window
        self._steps: dict[str, deque[tuple[int, int]]] = {}
        self._last: dict[str, str] = {}
        self._newest: dict[str, int] = {}

    def add(self, step: int, counts: Mapping[str, tuple[int, int]], last: Mapping[str, str]) -> None:
        """Book (scored, failed) per reward of one step, which may take several calls.  Raises :class:`RewardBudgetError` when a budget is spent."""
        self._last.update(last)
        for name, (scored, failed) in counts.items():
            history = self._steps.setdefault(name, deque(maxlen=self.window))
            if history and self._newest.get(name) == step:
                scored, failed = scored + history[-1][0], failed + history.pop()[1]
            self._newest[name] = step
            history.append((scored, failed))
            total, bad = sum(s for s, _ in history), sum(f for _, f in history)
            if bad > self.share * self.window * total / len(history):
                raise RewardBudgetError(
                    f"reward {name!r} failed on {bad} of {total} rollouts in the last {len(history)} steps (step {step}), more than "
                    f"{self.share:.2%} over {self.window} steps; last failure: {self._last.get(name, 'unknown')}. Failures are never "
                    "scored 0: repair the reward, give it more time (timeout_s), or raise error_budget"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": {name: [list(pair) for pair in history] for name, history in self._steps.items()}, "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = {name: deque(((s, f) for s, f in history), maxlen=self.window) for name, history in state["steps"].items()}
        self._last = dict(state["last"])
        self._newest = {}


class RewardPool:
    """The reward stage.

    ``rewards``          name -> function (see :mod:`posttrain.reward.base`); the order is that of logs
    ``combiner``         vector -> scalar; default: the sum
    ``timeout_s``        deadline of one call, waiting for a free worker not counted
    ``max_concurrency``  async and thread calls in flight at once
    ``num_workers``      processes for sync rewards; ``None``: one per core, at most 8
    ``error_budget``     allowed share of failures per reward over ``budget_window`` steps
    ``primary``          the unshaped reward, logged as ``reward/unshaped`` beside the combined one; default: the first
    ``routes``           environment -> names of the rewards that apply to it; environments not named get all
    ``memory_mb``        address space of a worker process; ``None``: unlimited
    ``decode``           token ids -> the text that rewards see, for rewards that say where in an answer they were earned
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        combiner: Combiner | None = None,
        *,
        timeout_s: float = 30.0,
        max_concurrency: int = 64,
        num_workers: int | None = None,
        error_budget: float = 0.01,
        budget_window: int = 50,
        primary: str | None = None,
        routes: Mapping[str, Sequence[str]] | None = None,
        memory_mb: int | None = 8192,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("no reward is configured; name at least one function under reward.fn")
        if any("/" in name for name in rewards):
            raise ValueError("a reward's name must not contain '/': that separates a reward from its parts")
        if timeout_s <= 0 or max_concurrency < 1 or (num_workers is not None and num_workers < 1):
            raise ValueError(
                f"timeout_s, max_concurrency and num_workers must be positive, not {timeout_s}, {max_concurrency}, {num_workers}"
            )
        self.rewards, self.combiner, self.timeout_s = dict(rewards), combiner or Sum(), timeout_s
        self.combiner.check(self.rewards)
        for wrong in {primary or next(iter(rewards))} | {n for names in (routes or {}).values() for n in names}:
            if wrong not in self.rewards:
                raise ValueError(f"there is no reward {wrong!r}; the rewards are {', '.join(self.rewards)}")
        self.primary, self.routes = primary or next(iter(rewards)), dict(routes or {})
        self.signatures = {name: Signature.of(name, reward) for name, reward in self.rewards.items()}
        self.budget = ErrorBudget(error_budget, budget_window)
        self.metrics: dict[str, float] = {}
        self._decode = decode
        self._max_concurrency = max_concurrency
        remote = {n: r for n, r in self.rewards.items() if self.signatures[n].execution == "process"}
        count = num_workers or min(8, os.cpu_count() or 1)
        self._workers = WorkerPool(remote, count, memory_mb) if remote else None
        self._threads = ThreadPoolExecutor(count, "reward-worker") if remote else None

    # -- scoring -------------------------------------------------------------------------------------------------------
    async def score(self, groups: Sequence[Group], step: int, progress: float = 0.0) -> list[Group]:
        """The groups with ``scores`` and ``reward`` filled; aborted rollouts are left without.  Order of replies changes nothing.

        Raises :class:`RewardBudgetError`, and ``ValueError`` when a reward cannot be started or one prompt's group comes in two pieces.
        """
        ids = [group.id for group in groups]
        if len(set(ids)) < len(ids) and (any(s.scope == "group" for s in self.signatures.values()) or any(getattr(r, "compares", False) for r in self.rewards.values())):
            raise ValueError(f"group {Counter(ids).most_common(1)[0][0]!r} comes in pieces, but a group reward needs whole groups")
        flat = [r for group in groups for r in group.rollouts if r.finish not in ("aborted", "env_error")]
        limit = asyncio.Semaphore(self._max_concurrency)
        calls = [(name, batch) for name in self.rewards for batch in self._batches(name, flat)]
        done = await asyncio.gather(*(self._call(name, batch, progress, limit) for name, batch in calls))
        vectors: dict[str, dict[str, Score]] = {r.sample_id: {} for r in flat}
        if len(vectors) < len(flat):
            raise ValueError("two rollouts have the same sample_id; every sample needs its own")
        for (name, batch), results in zip(calls, done, strict=True):
            for rollout, (score, parts) in zip(batch, results, strict=True):
                vectors[rollout.sample_id] |= {name: score} | {f"{name}/{part}": s for part, s in parts.items()}

        def filled(r: Rollout) -> Rollout:
            return self._combined(r, vectors[r.sample_id], progress) if r.sample_id in vectors else r

        scored = [replace(group, rollouts=tuple(map(filled, group.rollouts))) for group in groups]
        self.metrics = self.measure(scored)
        self._book(step, flat, vectors, progress)
        return scored

    def _applies(self, name: str, rollout: Rollout) -> bool:
        return name in self.routes.get(rollout.prompt.env, self.rewards)

    def _batches(self, name: str, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        chosen = [r for r in rollouts if self._applies(name, r)]
        match self.signatures[name].scope:
            case "batch":
                return [chosen] if chosen else []
            case "group":
                by_group: dict[str, list[Rollout]] = {}
                for r in chosen:
                    by_group.setdefault(r.prompt.id, []).append(r)
                return list(by_group.values())
            case _:
                return [[r] for r in chosen]

    async def _call(self, name: str, batch: Sequence[Rollout], progress: float, limit: asyncio.Semaphore) -> Results:
        """One call of one reward.  Whatever goes wrong in it is its own result."""
        signature, reward = self.signatures[name], self.rewards[name]
        timeout_s = signature.timeout_s or self.timeout_s
        arguments = signature.arguments(batch, progress)
        try:
            match signature.execution:
                case "inline":
                    result = reward(**arguments)
                case "process":
                    assert self._workers is not None
                    loop = asyncio.get_running_loop()
                    result = await loop.run_in_executor(self._threads, self._workers.call, name, arguments, timeout_s, signature.cpu_s)
                case "thread":
                    result = await self._waited(asyncio.to_thread(reward, **arguments), timeout_s, limit)
                case _:
                    result = await self._waited(reward(**arguments), timeout_s, limit)
            return read_many(result, len(batch)) if signature.batched else [read(result)]
        except (Timeout, TimeoutError) as error:
            return [(Score(None, "timeout", str(error) or f"no answer within {timeout_s:g} s"), {})] * len(batch)
        except (RemoteError, WorkerDied) as error:
            return [(Score(None, "error", str(error)), {})] * len(batch)
        except Exception as error:
            if signature.execution == "process":  # the worker could not be started: not this rollout's fault
                raise
            return [(Score(None, "error", f"{type(error).__name__}: {error}"[:2000]), {})] * len(batch)

    @staticmethod
    async def _waited(call: Awaitable[Any], timeout_s: float, limit: asyncio.Semaphore) -> Any:
        async with limit:
            return await asyncio.wait_for(call, timeout_s)

    def _combined(self, rollout: Rollout, vector: Mapping[str, Score], progress: float) -> Rollout:
        required = self.combiner.required(vector, progress)
        values = {name: score.value for name, score in vector.items() if score.value is not None}
        reward: float | None = None
        if vector and required <= values.keys():
            reward = self.combiner(values, progress)
            if not math.isfinite(reward):
                raise ValueError(f"the combined reward of {rollout.sample_id!r} is {reward} from {values}; check weights and schedules")
        where = None if reward is None else paid(rollout, vector, self.combiner, progress, self._decode)
        return replace(rollout, scores=dict(vector), reward=reward, paid=where)

    # -- counting ------------------------------------------------------------------------------------------------------
    def _book(self, step: int, rollouts: Sequence[Rollout], vectors: Mapping[str, Mapping[str, Score]], progress: float) -> None:
        needed = self.combiner.required({n for vector in vectors.values() for n in vector}, progress)
        counts, last = {}, {}
        for name in self.rewards:
            mine = [vectors[r.sample_id][name] for r in rollouts if name in vectors[r.sample_id]]
            failed = [s for s in mine if s.value is None]
            if failed:
                last[name] = f"{failed[-1].status}: {failed[-1].detail}"
                log.warning("reward %s failed on %d of %d rollouts at step %d; last: %s", name, len(failed), len(mine), step, last[name])
            if mine and any(n.split("/")[0] == name for n in needed):
                counts[name] = (len(mine), len(failed))
        self.budget.add(step, counts, last)

    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """Of scored groups, ``reward/`` mean, std, unshaped, masked, unfinished, constant_groups, and per reward mean, min, max and counts by status."""
        rollouts = [r for group in groups for r in group.rollouts]
        rewards = [r.reward for r in rollouts if r.reward is not None]
        values: dict[str, list[float]] = {}
        counts: Counter[str] = Counter()
        for r in rollouts:
            for name, score in r.scores.items():
                counts[f"{name}/{score.status}"] += 1
                if score.value is not None:
                    values.setdefault(name, []).append(score.value)
        out: dict[str, float] = {}
        for name in self.rewards:
            out |= {f"reward/{name}/{status}": float(counts[f"{name}/{status}"]) for status in STATUSES}
        for name, v in values.items():
            out |= {f"reward/{name}/mean": math.fsum(v) / len(v), f"reward/{name}/min": min(v), f"reward/{name}/max": max(v)}
        if rewards:
            mean = math.fsum(rewards) / len(rewards)
            out |= {"reward/mean": mean, "reward/std": math.sqrt(math.fsum((x - mean) ** 2 for x in rewards) / len(rewards))}
        if values.get(self.primary):
            out["reward/unshaped"] = out[f"reward/{self.primary}/mean"]
        live = [[r.reward for r in group.rollouts if r.reward is not None] for group in groups]
        live = [v for v in live if v]
        if live:
            out["reward/constant_groups"] = sum(max(v) == min(v) for v in live) / len(live)
        unfinished = sum(r.finish in ("aborted", "env_error") for r in rollouts)
        out |= {"reward/unfinished": float(unfinished), "reward/masked": float(len(rollouts) - len(rewards) - unfinished)}
        out["reward/workers_killed"] = float(self._workers.kills if self._workers else 0)
        return out

    # -- life ----------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The error budget's window: a resumed run stops where the uninterrupted one would."""
        return self.budget.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.budget.load_state_dict(state)

    def close(self) -> None:
        """End all worker processes, and close rewards that have something to close.  A closed pool starts them again on the next call."""
        if self._workers is not None:
            self._workers.close()
        for reward in self.rewards.values():
            if hasattr(reward, "close"):
                reward.close()
