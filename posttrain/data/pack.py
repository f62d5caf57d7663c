"""Rows become optimizer steps, and steps become micro-batches: whole sequences, coupled sets together, every rank equally busy.

The packer only decides *where* a sequence goes.  By the loss's slicing invariance that changes speed and memory, never the gradient, as
long as :attr:`Step.cut` is honoured: when a coupled set had to be cut, weights must be computed on the whole step first (two passes).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from posttrain.data.seeds import permutation
from posttrain.records import Row, Source, TokenBatch

Coupling = Literal["token", "sequence", "group", "batch"]
Indices = tuple[int, ...]


@dataclass(frozen=True)
class PackStats:
    """How well one step was packed.  ``fill`` is tokens over the room of the micro-batches that hold any; ``imbalance`` is the busiest
    rank's tokens over the mean rank's (1 is perfect).  ``oversize`` counts sequences longer than ``micro_batch_tokens``, each alone in its
    micro-batch; ``cut_sets`` counts coupled sets that had to be split."""

    tokens: int
    sequences: int
    micro_batches: int
    empty: int
    oversize: int
    cut_sets: int
    fill: float
    imbalance: float

    def metrics(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Step:
    """One optimizer step.  ``ranks[r][m]`` are the sequence indices (into ``whole``) of micro-batch ``m`` on rank ``r``; every rank has the
    same number of micro-batches and some may be empty.  ``cut`` says that a coupled set was split."""

    whole: TokenBatch
    ranks: tuple[tuple[Indices, ...], ...]
    cut: bool
    stats: PackStats

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.ranks[0])

    def only(self, contexts: Collection[str]) -> Step:
        """The same step without the sequences scored under another context than these: what has been read need not be learnt from."""
        named = self.whole.contexts
        ranks = tuple(tuple(tuple(i for i in part if named[i] in contexts) for part in rank) for rank in self.ranks)
        return replace(self, ranks=ranks)

    def parts(self) -> Iterator[Indices]:
        """Sequence indices of all micro-batches, rank by rank within each round: item ``i`` belongs to rank ``i % world_size``."""
        for m in range(self.num_micro_batches):
            for rank in self.ranks:
                yield rank[m]

    def micro_batches(self, whole: TokenBatch | None = None) -> list[TokenBatch]:
        """The batches of :meth:`parts`, cut from ``whole`` (pass the one whose columns and totals have been filled)."""
        source = self.whole if whole is None else whole
        return [source.take(part) if part else empty_like(source) for part in self.parts()]


@dataclass(frozen=True)
class Plan:
    """The optimizer steps made of one batch.  There are fewer than asked for when there are fewer coupled sets than steps."""

    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Packer:
    """``micro_batch_tokens``: columns per micro-batch (a sequence of n tokens has n - 1).  ``updates_per_batch``: optimizer steps a batch
    is dealt into, by groups, pairs and single sequences, each kind evenly."""

    micro_batch_tokens: int = 4096
    world_size: int = 1
    updates_per_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("micro_batch_tokens", "world_size", "updates_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def plan(
        self,
        batch: TokenBatch | Sequence[Row | Mapping[str, Any]],
        coupling: Coupling = "token",
        seed: int = 0,
        *,
        progress: float = 0.0,
        fresh: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Plan:
        """Deal ``batch`` into optimizer steps and each step into micro-batches.  Deterministic in its arguments.

        ``seed`` decides which sets meet in which step, and acts with ``updates_per_batch > 1`` only.  Every later step has ``fresh=False``:
        the learner will have moved, so ``old`` log-probs must be filled.  ``totals`` are cleared when the batch is dealt into several
        steps, because they count one optimizer step.  ``progress``, ``fresh`` and ``dtype`` are used when ``batch`` is a list of rows.
        """
        if not isinstance(batch, TokenBatch):
            batch = TokenBatch.from_sequences(batch, progress=progress, fresh=fresh, dtype=dtype)
        if batch.num_sequences == 0:
            raise ValueError("nothing to pack: every sequence was dropped before this step; look at the drop counts of rewards and gates")
        parts = _deal(batch, self.updates_per_batch, seed)
        if len(parts) == 1:
            return Plan((self._step(batch, coupling),))
        wholes = [batch.take(part).replace(totals=None, fresh=batch.fresh and i == 0) for i, part in enumerate(parts)]
        return Plan(tuple(self._step(whole, coupling) for whole in wholes))

    def _step(self, whole: TokenBatch, coupling: Coupling) -> Step:
        lengths: list[int] = whole.lengths.tolist()
        sets = _coupled_sets(whole, coupling)
        units: list[Indices] = []
        cut_sets = 0
        for members in sets:
            if len(members) == 1 or sum(lengths[i] for i in members) <= self.micro_batch_tokens:
                units.append(members)
            else:
                cut_sets += 1
                units += [(i,) for i in members]
        bins = _fit(units, lengths, self.micro_batch_tokens, self.world_size)
        ranks = _deal_bins(bins, lengths, self.world_size)
        loads = [sum(lengths[i] for part in rank for i in part) for rank in ranks]
        used = sum(bool(part) for part in bins)
        total = len(ranks[0]) * self.world_size
        stats = PackStats(
            tokens=whole.num_tokens,
            sequences=whole.num_sequences,
            micro_batches=total,
            empty=total - used,
            oversize=sum(n > self.micro_batch_tokens for n in lengths),
            cut_sets=cut_sets,
            fill=whole.num_tokens / (used * self.micro_batch_tokens),
            imbalance=max(loads) * self.world_size / max(sum(loads), 1),
        )
        return Step(whole, ranks, cut_sets > 0, stats)


def empty_like(batch: TokenBatch) -> TokenBatch:
    """A micro-batch with nothing to learn, for a rank that has none: one sequence of two padding tokens, so that backward still runs.

    It has the log-prob and reward columns of ``batch`` (NaN: nobody has anything to say), its dtypes, device, ``progress`` and ``totals``.
    """
    device = batch.input_ids.device

    def full(value: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.full((1,), value, dtype=like.dtype, device=device)

    return batch.replace(
        **{name: full(0, getattr(batch, name)) for name in ("input_ids", "target_ids", "positions", "seq", "turn", "advantage", "weight")},
        source=full(int(Source.pad), batch.source),
        trainable=full(False, batch.trainable),
        version=full(-1, batch.version),
        logps={name: full(math.nan, column) for name, column in batch.logps.items()},
        group=full(-1, batch.group),
        pair=full(-1, batch.pair),
        side=full(0, batch.side),
        rewards={name: full(math.nan, column) for name, column in batch.rewards.items()},
        sample_ids=("",),
        finish=("given",),
        contexts=("",),
        stored=None,
        routing=None,
    )


def _coupled_sets(batch: TokenBatch, coupling: Coupling) -> list[Indices]:
    """Sequences that must be seen together, in order of first appearance."""
    n = batch.num_sequences
    if coupling == "batch":
        return [tuple(range(n))]
    if coupling in ("token", "sequence"):
        return [(i,) for i in range(n)]
    if coupling != "group":
        raise ValueError(f"unknown coupling {coupling!r}; choose token, sequence, group or batch")
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for codes in (batch.group.tolist(), batch.pair.tolist()):
        first: dict[int, int] = {}
        for i, code in enumerate(codes):
            if code >= 0:
                a, b = root(first.setdefault(code, i)), root(i)
                parent[max(a, b)] = min(a, b)
    sets: dict[int, list[int]] = defaultdict(list)
    for i in range(n):
        sets[root(i)].append(i)
    return [tuple(members) for members in sets.values()]


def _deal(batch: TokenBatch, num_steps: int, seed: int) -> list[Indices]:
    """Sequence indices per optimizer step.  Groups, pairs and single sequences are shuffled apart and dealt in turn, so that each kind, and
    the number of sets in all, differ by at most one between steps.  Sequences keep their order inside a step."""
    if num_steps == 1:
        return [tuple(range(batch.num_sequences))]
    kinds: dict[str, list[Indices]] = {"group": [], "pair": [], "single": []}
    for members in _coupled_sets(batch, "group"):
        kinds["group" if batch.group[members[0]] >= 0 else "pair" if batch.pair[members[0]] >= 0 else "single"].append(members)
    order = [sets[i] for kind, sets in kinds.items() for i in permutation(len(sets), seed, "pack", kind)]
    dealt = [order[start::num_steps] for start in range(min(num_steps, len(order)))]
    return [tuple(sorted(i for members in part for i in members)) for part in dealt]


def _fit(units: Sequence[Indices], lengths: Sequence[int], room: int, world_size: int) -> list[list[int]]:
    """Micro-batches by longest-first fit.

    Best fit finds how many are needed; that is rounded up to a multiple of the ranks, and the units are then spread over so many, each into
    the least loaded, which keeps micro-batches and ranks level.  When the spread does not fit, the tight packing stands.
    """
    sizes = [sum(lengths[i] for i in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda u: (-sizes[u], units[u][0]))
    tight: list[list[int]] = []
    loads: list[int] = []
    for u in order:
        fitting = [b for b, load in enumerate(loads) if load + sizes[u] <= room]
        if fitting:
            best = max(fitting, key=lambda b: (loads[b], -b))
        else:
            best = len(tight)
            tight.append([])
            loads.append(0)
        tight[best] += units[u]
        loads[best] += sizes[u]

    num_bins = math.ceil(len(tight) / world_size) * world_size
    spread: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for u in order:
        b = min(range(num_bins), key=lambda b: (loads[b], len(spread[b]), b))
        if spread[b] and loads[b] + sizes[u] > room:
            return tight
        spread[b] += units[u]
        loads[b] += sizes[u]
    return spread


def _deal_bins(bins: Sequence[Sequence[int]], lengths: Sequence[int], world_size: int) -> tuple[tuple[Indices, ...], ...]:
    """Micro-batches to ranks: heaviest first, each to the least loaded rank that has a slot left."""
    slots = math.ceil(len(bins) / world_size)
    ranks: list[list[Indices]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for part in sorted((tuple(sorted(b)) for b in bins if b), key=lambda p: (-sum(lengths[i] for i in p), p)):
        r = min((r for r in range(world_size) if len(ranks[r]) < slots), key=lambda r: (loads[r], r))
        ranks[r].append(part)
        loads[r] += sum(lengths[i] for i in part)
    return tuple(tuple(rank + [()] * (slots - len(rank))) for rank in ranks)
