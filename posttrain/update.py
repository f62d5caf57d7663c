"""One batch of experience becomes optimizer steps: pack, count, fill the reference columns, weigh, learn.

Whether one pass is enough or two are needed is decided here, from what the objective declares and what the packer had to cut:

* nothing live is coupled beyond a sequence, or every coupled set is whole: one forward and backward per micro-batch;
* otherwise all current log-probs are computed first, the token weights are formed once on the whole optimizer step, and the second pass
  runs forward and backward with those weights fixed.  The gradient is the same, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.data.contexts import with_contexts
from posttrain.data.pack import Packer, Step
from posttrain.data.report import Report
from posttrain.data.rows import to_rows
from posttrain.data.scored import read_at
from posttrain.loss.unified import Objective
from posttrain.metrics import Accumulator
from posttrain.mixture.control import LookAhead, recall, steer
from posttrain.records import NO_EXPERT, Demo, TokenBatch

OWN = frozenset({"entropy", "collision"})
"""Columns that say how certain the current policy is, filled before every optimizer step."""


def scatter(step: Step, values: Sequence[Tensor], absent: float = math.nan) -> Tensor:
    """Per-micro-batch columns, in the order of ``step.parts()``, back on the whole batch, ``[N, ...]``.  Empty micro-batches are skipped."""
    out = torch.full((step.whole.num_tokens, *values[0].shape[1:]), absent, dtype=values[0].dtype)
    for part, value in zip(step.parts(), values, strict=True):
        if part:
            out[step.whole.columns_of(part)] = value.to(out.dtype)
    return out


@dataclass
class Critic:
    """A critic's side of the loop.  ``learner`` is a group of ranks of its own, ``objective`` its loss."""

    learner: Any
    objective: Objective
    warmup_batches: int = 0

    async def values(self, one: Step) -> Tensor:
        """What every state is worth, ``[N]``."""
        return scatter(one, [r["logp"] for r in await self.learner.score(one.micro_batches(), "current")])

    async def learn(self, one: Step, whole: TokenBatch, policy: Objective, current: Tensor) -> dict[str, tuple[float, float]]:
        """One optimizer step towards the returns of ``policy``'s advantage term.  Returns ``critic/`` metrics; ``explained_variance`` is that of the values
        before the step."""
        target = torch.zeros_like(current)
        for name, view in policy.views(whole, current).items():
            if (source := returns_of(policy.streams[name].advantage)) is not None:
                target = torch.where(view.on, source.returns(view).to(target.dtype), target)
                seen, known = target[view.on], whole.logps["value"][view.on]
        own = whole.replace(advantage=target)
        own = own.replace(totals=self.objective.totals(own))
        report = await self.learner.step(one.micro_batches(own), None)
        found = {f"critic/{name.removeprefix('rollouts/')}": pair for name, pair in report.metrics.items()}
        found |= {f"critic/{k}": (float(v), 1.0) for k, v in report.scalars.items()}
        if len(seen) > 1 and float(seen.var()) > 0:
            found["critic/explained_variance"] = (1.0 - float((seen - known).var() / seen.var()), 1.0)
        return found


def returns_of(advantage: Any) -> Any | None:
    """The advantage term that knows the returns: the term itself or one inside it; None when there is none."""
    while advantage is not None and not hasattr(advantage, "returns"):
        advantage = getattr(advantage, "inner", None)
    return advantage


@dataclass
class Learn:
    """The learner's side of the loop.  ``learner`` is a group of ranks with ``score`` and ``step``.

    ``separate_demos``: demonstrations get one optimizer step of their own, after those of everything else.  ``memory`` holds what the loss's
    terms carry from step to step; ``base_every`` and ``base_mix`` move the frozen start every so many batches (0: never).  ``critic``: fills the values the
    objective reads, then learns from the returns.  ``routing=old``: record the learner's experts with ``old``, and replay them.
    """

    objective: Objective
    packer: Packer
    learner: Any
    seed: int = 0
    tolerance: float | None = None
    checked: bool = False
    separate_demos: bool = False
    base_every: int = 0
    base_mix: float = 1.0
    critic: Critic | None = None
    routing: str = "own"
    memory: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ahead = [name for name, control in self.objective.controls.items() if isinstance(control, LookAhead)]
        if ahead and self.separate_demos:
            raise ValueError(
                f"the coefficient {ahead[0]!r} looks ahead over all streams at once, but mixture.gate takes the demonstrations in a step of their own"
            )

    @property
    def state(self) -> dict[str, Any]:
        return {"memory": dict(self.memory)}

    def load(self, state: dict[str, Any]) -> None:
        self.memory = dict(state["memory"])

    async def learn(self, step: int, items: Sequence[Any], progress: float) -> Accumulator:
        """Take every optimizer step this batch is worth.  Returns the metrics of all of them.

        Raises ``ValueError`` when nothing was left to learn from, with the reasons.
        """
        needs = self.objective.needs
        counted = Report("packed")
        first, second = self._parts(items)
        rows, later = (with_contexts(read_at(kept, needs.at), needs.contexts) if (kept := to_rows(part, counted)) else [] for part in (first, second))
        totals = Accumulator()
        totals.add({f"data/dropped/{reason}": (float(n), 0.0) for reason, n in counted.dropped.items()})
        if not rows and not later:
            raise ValueError(f"step {step}: nothing is left to learn from ({counted}); look at the rewards, the filters and the data")
        coupling = needs.keep_whole or "token"
        plan = list(self.packer.plan(rows, coupling, seed=self.seed + step, progress=progress)) if rows else []
        if later:
            plan += replace(self.packer, updates_per_batch=1).plan(later, coupling, progress=progress, fresh=not plan)
        await self._agreement(plan[0])
        filled = [await self._fill(one, len(plan) > 1) for one in plan]
        for index, one in enumerate(filled):
            whole = one.whole.replace(totals=self.objective.totals(one.whole), memory=self.objective.memory_for_parts(self.memory))
            overall: dict[str, Any] = {}
            weights, current = None, None
            if wanted := sorted(OWN & needs.references):
                current, own = await self._certainty(one, whole, wanted)
                whole = whole.with_logps(**own)
            if needs.keep_whole and (one.cut or needs.coupling == "batch"):
                current = await self._score(one, whole, "current") if current is None else current
                full = whole.replace(memory=self.memory, fresh=whole.fresh and "old" not in whole.logps)
                weights, overall = self.objective.weigh(full, current)
                if self.objective.remembers:
                    self.memory = self.objective.remember(full, current)
            if weights is not None and needs.contexts:
                one = one.only({stream.context for stream in self.objective.streams.values()})
            if self.critic is not None:
                current = await self._score(one, whole, "current") if current is None else current
                totals.add(await self.critic.learn(one, whole, self.objective, current))
            if self.critic is None or step >= self.critic.warmup_batches:
                micro = one.micro_batches(whole)
                sliced = None if weights is None else [weights[whole.columns_of(p)] if p else torch.zeros(1) for p in one.parts()]
                ahead = await self._look_ahead(step, micro, index == 0)
                report = await self.learner.step(micro, sliced)
                found = {**report.metrics, **overall, **ahead}
                totals.add({**found, **self._steer(found, whole.num_sequences)})
                totals.add({f"learner/{k}": (float(v), 1.0) for k, v in report.scalars.items()})
            totals.add({f"pack/{k}": (v, 1.0) for k, v in one.stats.metrics().items()})
            totals.add({"learner/two_passes": (float(weights is not None), 1.0)})
        if self.base_every and (step + 1) % self.base_every == 0:
            await self.learner.move_base(self.base_mix)
            totals.add({"learner/base_moved": (1.0, 0.0)})
        return totals

    async def _look_ahead(self, step: int, micro: Sequence[TokenBatch], first: bool) -> dict[str, tuple[float, float]]:
        """The slope along every coefficient that looks ahead, which counts nothing in a step where none is measured.

        Only the first optimizer step of a batch looks: its rollouts are those of the policy as it is.
        """
        out: dict[str, tuple[float, float]] = {}
        for control in self.objective.controls.values():
            if not isinstance(control, LookAhead):
                continue
            measure, keep = first and step > 0 and step % control.every == 0, first and (step + 1) % control.every == 0
            found = await self.learner.look_ahead(micro, control.name, measure, keep) if measure or keep else {}
            out[control.metric] = (found.get("slope", 0.0), float("slope" in found))
        return out

    def _steer(self, metrics: Mapping[str, tuple[float, float]], sequences: int) -> dict[str, tuple[float, float]]:
        """Let the coefficients that follow a metric move on.  Returns the values this step was learnt with."""
        controls = self.objective.controls
        used = {f"control/{name}": (control.value(recall(control, self.memory)), 1.0) for name, control in controls.items()}
        self.memory = {**self.memory, **steer(controls, self.memory, metrics, sequences)}
        return used

    def _parts(self, items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """What the first optimizer steps learn from, and what the last one does."""
        if not self.separate_demos:
            return list(items), []
        return [i for i in items if not isinstance(i, Demo)], [i for i in items if isinstance(i, Demo)]

    async def _agreement(self, one: Step) -> None:
        """At the first step of a run: how far the engine's log-probs are from the learner's on the sampled tokens.

        Raises :class:`posttrain.rollout.mismatch.MismatchError` beyond ``tolerance``, before anything is learnt from them.
        """
        if self.checked or self.tolerance is None or "behaviour" not in one.whole.logps:
            return
        from posttrain.rollout.mismatch import mismatch

        found = mismatch(one.whole.logps["behaviour"], await self._score(one, one.whole, "current"))
        found.check(self.tolerance)
        self.checked = True

    async def _fill(self, one: Step, several: bool) -> Step:
        """Fill the reference columns the objective needs, all before the learner moves.

        ``old`` is filled only when several optimizer steps share the batch: on the first, the current policy *is* the old one.
        """
        whole: TokenBatch = one.whole
        wanted = self.objective.needs.references
        for policy in ("base", "teacher"):
            if policy in wanted:
                whole = whole.with_logps(**{policy: await self._score(one, whole, policy)})
        if self.critic is not None:
            whole = whole.with_logps(value=await self.critic.values(replace(one, whole=whole)))
        if several and "old" in wanted:
            if self.routing == "old":
                results = await self.learner.score(one.micro_batches(whole), "current", routing=True)
                whole = whole.with_logps(old=scatter(one, [r["logp"] for r in results])).replace(routing=scatter(one, [r["routing"] for r in results], NO_EXPERT))
            else:
                whole = whole.with_logps(old=await self._score(one, whole, "current"))
        return replace(one, whole=whole)

    async def _certainty(self, one: Step, whole: TokenBatch, wanted: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs and the columns ``wanted`` of the current policy, each ``[N]``."""
        results = await self.learner.score(one.micro_batches(whole), "current", **dict.fromkeys(wanted, True))
        return scatter(one, [r["logp"] for r in results]), {name: scatter(one, [r[name] for r in results]) for name in wanted}

    async def _score(self, one: Step, whole: TokenBatch, policy: str) -> Tensor:
        results = await self.learner.score(one.micro_batches(whole), policy)
        return scatter(one, [r["logp"] for r in results])
