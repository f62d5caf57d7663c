"""Everything that crosses a stage: prompts, rollouts, groups, demonstrations, pairs, and the packed batch they become.

Two conventions hold for the whole project.

*Log-probabilities are aligned with the token they describe.*  ``logprobs[t]`` belongs to ``ids[t]`` and is the log-probability of that
token given everything before it in its own sequence.

*A packed batch has one column per prediction, not per token.*  A sequence ``y0 y1 ... yn`` gives the ``n`` columns
``input y0 -> target y1, ..., input y(n-1) -> target yn``; the first token of a sequence is never predicted.  ``input_ids`` and ``target_ids``
are separate, so no code ever shifts a tensor by one.

Letters used in shapes: ``N`` columns of a batch, ``S`` sequences, ``K`` groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

NO_EXPERT = -1
"""Where a routing names no expert: the model chooses there."""

Finish = Literal["stop", "length", "aborted", "env_error", "given"]
Status = Literal["ok", "bad_format", "timeout", "error"]


class Source(IntEnum):
    """Where a token came from.  Only ``policy`` tokens have a behaviour log-probability."""

    prompt = 0
    policy = 1
    demo = 2
    prefix = 3
    tool = 4
    pad = 5


@dataclass(frozen=True)
class Prompt:
    """One question, already rendered to tokens.

    ``id`` is stable across runs (a hash of the content or the row's own id); ``answer`` is what a verifier compares with; ``messages`` is the
    chat the ids were rendered from, when there was one; ``env`` names the world or data source the prompt belongs to.
    """

    id: str
    ids: tuple[int, ...]
    text: str = ""
    answer: Any = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    env: str = "default"
    level: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


Stored = tuple[Sequence[int], Sequence[float]]
"""The most probable tokens of a stored distribution, and their log-probabilities."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one source.  ``logprobs`` and ``version`` are present exactly when ``source`` is ``policy``.

    ``trainable`` is one flag for the segment or one per token: a demonstration's user turns and tool outputs are not learnt from.  ``inputs``: what
    the model reads in the place of ``ids`` while it predicts what follows; the labels stay ``ids``.  ``label``: what is known of the segment of a
    demonstration, a step's correctness for instance; it becomes the advantage column of its tokens.  ``stored``: of every token, what a teacher gave its place.
    """

    ids: tuple[int, ...]
    source: Source
    turn: int = 0
    logprobs: tuple[float, ...] | None = None
    version: int | None = None
    trainable: bool | tuple[bool, ...] = True
    inputs: tuple[int, ...] | None = None
    label: float | None = None
    stored: tuple[Stored | None, ...] | None = None


@dataclass(frozen=True)
class Sampling:
    """How a rollout was sampled: part of the behaviour policy, so it travels with the sample."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """What one reward said of one sample.  ``value`` is ``None`` exactly when ``status`` is ``timeout`` or ``error``: a failed verifier is not
    a zero.  ``places``: where in the answer it was earned, as (characters of the text up to there, reward), which add up to ``value``; without any, at its end."""

    value: float | None
    status: Status = "ok"
    detail: str = ""
    places: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        failed = self.status in ("timeout", "error")
        if failed != (self.value is None):
            raise ValueError(f"Score(value={self.value}, status={self.status!r}): value must be None exactly when the status is timeout or error")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"Score value {self.value} is not finite; return a Score with status='error' instead")
        if self.places and not math.isclose(math.fsum(v for _, v in self.places), self.value or 0.0, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"the rewards at the places of a Score add up to {math.fsum(v for _, v in self.places):g}, not to its value {self.value}")
        if any(end < 0 for end, _ in self.places):
            raise ValueError(f"a place of a Score counts the characters up to there, and cannot be {min(end for end, _ in self.places)}")


@dataclass(frozen=True)
class Rollout:
    """One sampled continuation of a prompt.  ``segments`` start after the prompt.  ``reward`` is the combined scalar, ``None`` when a
    required score failed; ``advantage`` is one number for the sample.  ``turns``: who said what, when there was more than one turn; ``text`` is then the
    last answer.  ``routing``: ``[tokens, layers, K]`` int16, the experts that the engine chose while it read each token, prompt included (the last token was never
    read).  ``paid``: what every token earned, in the order of the segments, where a reward says so; it adds up to ``reward``.  ``placed``: whether
    these, in the place of ``advantage``, are what a row's advantage column holds (an estimator may then put a number of its own on every token)."""

    sample_id: str
    prompt: Prompt
    segments: tuple[Segment, ...]
    finish: Finish = "stop"
    sampling: Sampling = Sampling()
    text: str = ""
    scores: Mapping[str, Score] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None
    turns: tuple[tuple[str, str], ...] = ()
    routing: Tensor | None = field(default=None, compare=False)
    paid: tuple[float, ...] | None = None
    placed: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments)

    @property
    def version(self) -> int | None:
        """The oldest weights any token was sampled with: staleness is counted from it."""
        versions = [s.version for s in self.segments if s.version is not None]
        return min(versions) if versions else None


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt that share a baseline."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    dropped: str | None = None

    @property
    def id(self) -> str:
        return self.prompt.id


@dataclass(frozen=True)
class Demo:
    """A given text to learn from: prompt and answer tokens as segments, in order.  ``rewards``: what is known about it, by name (``label``:
    how good it is, from 0 to 1; ``score``; ``margin``)."""

    id: str
    segments: tuple[Segment, ...]
    weight: float = 1.0
    prompt: Prompt | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    finish: Finish = "given"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    id: str
    chosen: Demo
    rejected: Demo


@dataclass
class Row:
    """One sequence on its way into a batch, as plain lists: the form in which people who want no run build batches by hand.

    ``ids``, ``sources``, ``trainable``, ``weight``, ``advantage``, ``version`` and every list of ``logps`` have one entry per token of the
    whole sequence, prompt included; a scalar stands for "the same everywhere".  An entry of ``logps`` is NaN where that policy has nothing to
    say.  ``trainable=None`` means: every token whose source is policy, demo or prefix.  ``inputs`` are read by the model in the place of ``ids``, which
    stay the labels (a corrupted context, a learner's own action under an expert's label).  ``stored``: what a teacher gave each token's place, or None.
    ``routing``: ``[tokens, layers, K]`` int16, the experts that are to read each token, -1 where the model chooses.

    >>> Row(ids=[5, 6, 7, 8], sources=["prompt", "prompt", "policy", "policy"], logps={"behaviour": [nan, nan, -0.1, -0.7]},
    ...     advantage=1.0, group="question 1")
    """

    ids: Sequence[int]
    sources: Sequence[Source | str | int] | None = None
    trainable: Sequence[bool] | None = None
    logps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    advantage: float | Sequence[float] = 1.0
    weight: float | Sequence[float] = 1.0
    version: int | Sequence[int] = -1
    turn: int | Sequence[int] = 0
    rewards: Mapping[str, float] = field(default_factory=dict)
    sample_id: str = ""
    group: str | int | None = None
    pair: str | int | None = None
    side: Literal["chosen", "rejected"] | None = None
    finish: Finish = "stop"
    context: str = ""
    inputs: Sequence[int] | None = None
    stored: Sequence[Stored | None] | None = None
    routing: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StreamTotals:
    """What a stream's denominators count, over the whole optimizer step and all ranks.  ``weight`` is the sum of token weights,
    ``sequence_weight`` that of the sequences' mean token weights."""

    tokens: int = 0
    sequences: int = 0
    groups: int = 0
    pairs: int = 0
    weight: float = 0.0
    sequence_weight: float = 0.0


Totals = Mapping[str, StreamTotals]
"""Stream name -> counts.  Computed once on the whole step, before anything is sliced, so that every loss is a plain sum."""


def _source(value: Source | str | int) -> int:
    if isinstance(value, str):
        try:
            return int(Source[value])
        except KeyError:
            raise ValueError(f"unknown token source {value!r}; choose from {', '.join(Source.__members__)}") from None
    return int(Source(value))


def _per_token(value: Any, length: int, what: str, row: int) -> list[Any]:
    if isinstance(value, (int, float, bool)):
        return [value] * length
    if len(value) != length:
        raise ValueError(f"sequence {row}: {what} has {len(value)} entries but ids has {length}")
    return list(value)


def _codes(keys: Sequence[Any]) -> list[int]:
    seen: dict[Any, int] = {}
    return [-1 if k is None else seen.setdefault(k, len(seen)) for k in keys]


@dataclass(frozen=True)
class TokenBatch:
    """A packed, one-dimensional batch.  All per-token tensors have shape ``[N]`` and describe the prediction of ``target_ids``.

    ===============  =========  ==========================================================================================
    ``input_ids``    int64 N    token fed to the model at this column
    ``target_ids``   int64 N    token whose log-probability this column is
    ``positions``    int64 N    restart at 0 with every sequence
    ``seq``          int64 N    index of the sequence, non-decreasing, 0..S-1
    ``source``       int64 N    :class:`Source` of the target token
    ``turn``         int64 N    dialogue turn of the target token
    ``trainable``    bool N     may be learnt from
    ``advantage``    float N    the advantage column; above 0 raises the probability
    ``weight``       float N    a non-negative factor on the token's weight (and in ``weight_sum`` denominators)
    ``version``      int64 N    weights version that sampled the token, -1 for given tokens
    ``logps``        name -> N  ``behaviour`` (engine), ``old`` (learner's snapshot), ``base``, ``teacher``, ``ema``, ``current``; NaN where absent
    ``group``        int64 S    group code, -1 without one; codes are unique over the optimizer step
    ``pair``         int64 S    pair code, -1 without one;  ``side`` is +1 chosen, -1 rejected, 0 neither
    ``rewards``      name -> S  reward vector
    ``stored``       2 x [N,K]  ids and log-probs of a stored distribution of the target, id -1 where there is no entry; None without any
    ``routing``      [N,L,K]    int16: experts that read ``input_ids`` in each layer, -1 where the model chooses; None: it chooses everywhere
    ===============  =========  ==========================================================================================

    ``progress`` in [0, 1] drives schedules.  ``fresh`` says that the learner has not moved since ``old`` would have been taken, so an absent
    ``old`` *is* the current policy.  ``totals`` are those of the whole optimizer step and survive every slice.  ``contexts`` names what a
    sequence is scored under, when that is not what it was made under.  ``memory`` holds numbers that terms carry from step to step.
    """

    input_ids: Tensor
    target_ids: Tensor
    positions: Tensor
    seq: Tensor
    source: Tensor
    turn: Tensor
    trainable: Tensor
    advantage: Tensor
    weight: Tensor
    version: Tensor
    logps: dict[str, Tensor]
    group: Tensor
    pair: Tensor
    side: Tensor
    rewards: dict[str, Tensor]
    sample_ids: tuple[str, ...]
    finish: tuple[str, ...]
    contexts: tuple[str, ...]
    progress: float = 0.0
    fresh: bool = True
    totals: Totals | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    stored: tuple[Tensor, Tensor] | None = None
    routing: Tensor | None = None

    # -- shape ---------------------------------------------------------------------------------------------------------
    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.group.shape[0])

    @property
    def lengths(self) -> Tensor:
        """Columns per sequence, ``[S]`` int64."""
        return torch.bincount(self.seq, minlength=self.num_sequences)

    @property
    def cu_seqlens(self) -> Tensor:
        """Boundaries of the sequences, ``[S + 1]`` int64, starting at 0."""
        return torch.nn.functional.pad(torch.cumsum(self.lengths, 0), (1, 0))

    # -- building ------------------------------------------------------------------------------------------------------
    @classmethod
    def from_sequences(
        cls, rows: Iterable[Row | Mapping[str, Any]], *, progress: float = 0.0, fresh: bool = True, dtype: torch.dtype = torch.float32
    ) -> TokenBatch:
        """Build a batch from plain lists.  ``dtype`` is that of log-probabilities, advantages and weights (float64 for tests).

        Raises ``ValueError`` naming the sequence and the field when lengths disagree or a value is out of range.
        """
        given = [row if isinstance(row, Row) else Row(**row) for row in rows]
        names = sorted({name for row in given for name in row.logps})
        rewards = sorted({name for row in given for name in row.rewards})
        col: dict[str, list[Any]] = {k: [] for k in _TOKEN_FIELDS}
        logps: dict[str, list[float]] = {name: [] for name in names}
        for index, row in enumerate(given):
            length = len(row.ids)
            if length == 0:
                raise ValueError(f"sequence {index} ({row.sample_id!r}) has no tokens")
            sources = [_source(s) for s in (row.sources if row.sources is not None else [Source.demo] * length)]
            if len(sources) != length:
                raise ValueError(f"sequence {index}: sources has {len(sources)} entries but ids has {length}")
            trainable = (
                [s in (Source.policy, Source.demo, Source.prefix) for s in sources]
                if row.trainable is None
                else [bool(t) for t in _per_token(row.trainable, length, "trainable", index)]
            )
            weight = [float(w) for w in _per_token(row.weight, length, "weight", index)]
            if any(not math.isfinite(w) or w < 0 for w in weight):
                raise ValueError(f"sequence {index} ({row.sample_id!r}): token weights must be finite and not negative")
            advantage = [float(a) for a in _per_token(row.advantage, length, "advantage", index)]
            if any(math.isnan(a) for a, t in zip(advantage, trainable, strict=True) if t):
                raise ValueError(f"sequence {index} ({row.sample_id!r}): the advantage is NaN; drop the sample or fix its reward")
            if (row.pair is None) != (row.side is None):
                raise ValueError(f"sequence {index}: pair and side must be given together")
            inputs = row.ids if row.inputs is None else _per_token(row.inputs, length, "inputs", index)
            col["input_ids"] += list(inputs[:-1])
            col["target_ids"] += list(row.ids[1:])
            col["positions"] += range(length - 1)
            col["seq"] += [index] * (length - 1)
            col["source"] += sources[1:]
            col["turn"] += _per_token(row.turn, length, "turn", index)[1:]
            col["trainable"] += trainable[1:]
            col["advantage"] += advantage[1:]
            col["weight"] += weight[1:]
            col["version"] += _per_token(row.version, length, "version", index)[1:]
            for name in names:
                values = row.logps.get(name)
                logps[name] += [math.nan] * (length - 1) if values is None else _per_token(values, length, f"logps[{name!r}]", index)[1:]
        ints: dict[str, Any] = {k: torch.tensor(col[k], dtype=torch.int64) for k in _TOKEN_FIELDS if k not in ("trainable", "advantage", "weight")}
        sides = {"chosen": 1, "rejected": -1, None: 0}
        return cls(
            **ints,
            trainable=torch.tensor(col["trainable"], dtype=torch.bool),
            advantage=torch.tensor(col["advantage"], dtype=dtype),
            weight=torch.tensor(col["weight"], dtype=dtype),
            logps={name: torch.tensor(values, dtype=dtype) for name, values in logps.items()},
            group=torch.tensor(_codes([r.group for r in given]), dtype=torch.int64),
            pair=torch.tensor(_codes([r.pair for r in given]), dtype=torch.int64),
            side=torch.tensor([sides[r.side] for r in given], dtype=torch.int64),
            rewards={name: torch.tensor([r.rewards.get(name, math.nan) for r in given], dtype=dtype) for name in rewards},
            sample_ids=tuple(r.sample_id or str(i) for i, r in enumerate(given)),
            finish=tuple(r.finish for r in given),
            contexts=tuple(r.context for r in given),
            progress=progress,
            fresh=fresh,
            stored=_stored_columns(given, dtype) if any(row.stored is not None for row in given) else None,
            routing=_routing_columns(given) if any(row.routing is not None for row in given) else None,
        )

    # -- slicing -------------------------------------------------------------------------------------------------------
    def take(self, sequences: Sequence[int] | Tensor) -> TokenBatch:
        """The batch of the named sequences, in that order.  Group and pair codes and ``totals`` stay those of the whole step."""
        index = torch.as_tensor(sequences, dtype=torch.int64)
        columns, seq = self._columns(index)
        changed: dict[str, Any] = {name: getattr(self, name)[columns] for name in _TOKEN_FIELDS if name != "seq"}
        return replace(
            self,
            **changed,
            seq=seq,
            logps={k: v[columns] for k, v in self.logps.items()},
            stored=None if self.stored is None else (self.stored[0][columns], self.stored[1][columns]),
            routing=None if self.routing is None else self.routing[columns],
            group=self.group[index],
            pair=self.pair[index],
            side=self.side[index],
            rewards={k: v[index] for k, v in self.rewards.items()},
            sample_ids=tuple(self.sample_ids[i] for i in index.tolist()),
            finish=tuple(self.finish[i] for i in index.tolist()),
            contexts=tuple(self.contexts[i] for i in index.tolist()),
        )

    def columns_of(self, sequences: Sequence[int] | Tensor) -> Tensor:
        """Column indices, in order, of the named sequences: ``batch.take(s)`` is these columns."""
        return self._columns(torch.as_tensor(sequences, dtype=torch.int64))[0]

    def _columns(self, index: Tensor) -> tuple[Tensor, Tensor]:
        starts, lengths = self.cu_seqlens[:-1][index], self.lengths[index]
        seq = torch.repeat_interleave(torch.arange(len(index)), lengths)
        offset = torch.arange(int(lengths.sum())) - torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
        return starts[seq] + offset, seq

    def replace(self, **changes: Any) -> TokenBatch:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def with_logps(self, **columns: Tensor) -> TokenBatch:
        """A copy with log-probability columns added or replaced, each ``[N]``."""
        for name, value in columns.items():
            if value.shape != self.input_ids.shape:
                raise ValueError(f"log-probability column {name!r} has shape {tuple(value.shape)}, the batch has {self.num_tokens} columns")
        return replace(self, logps={**self.logps, **columns})

    def to(self, device: torch.device | str) -> TokenBatch:
        """A copy on another device."""
        names = [*_TOKEN_FIELDS, "group", "pair", "side"]
        moved: dict[str, Any] = {n: getattr(self, n).to(device) for n in names}
        return replace(
            self,
            **moved,
            logps={k: v.to(device) for k, v in self.logps.items()},
            rewards={k: v.to(device) for k, v in self.rewards.items()},
            stored=None if self.stored is None else (self.stored[0].to(device), self.stored[1].to(device)),
            routing=None if self.routing is None else self.routing.to(device),
        )


def _stored_columns(rows: Sequence[Row], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(ids [N, K], logps [N, K])``, as wide as the longest entry."""
    entries: list[Stored | None] = []
    for index, row in enumerate(rows):
        entries += _per_token(row.stored if row.stored is not None else [None] * len(row.ids), len(row.ids), "stored", index)[1:]
    wide = max((len(e[0]) for e in entries if e is not None), default=0)
    ids, logps = torch.full((len(entries), wide), -1, dtype=torch.int64), torch.zeros(len(entries), wide, dtype=dtype)
    for i, entry in enumerate(entries):
        if entry is not None:
            ids[i, : len(entry[0])], logps[i, : len(entry[1])] = torch.tensor(entry[0]), torch.tensor(entry[1], dtype=dtype)
    return ids, logps


def _routing_columns(rows: Sequence[Row]) -> Tensor:
    """``[N, L, K]``; -1 for rows that bring none."""
    sizes = {tuple(row.routing.shape[1:]) for row in rows if row.routing is not None}
    if len(sizes) > 1:
        raise ValueError(f"the routings of a batch must come from one model; their layers and experts per token are {sorted(sizes)}")
    parts = []
    for index, row in enumerate(rows):
        if row.routing is not None and len(row.routing) != len(row.ids):
            raise ValueError(f"sequence {index}: routing has {len(row.routing)} entries but ids has {len(row.ids)}")
        parts.append(torch.full((len(row.ids) - 1, *min(sizes)), NO_EXPERT, dtype=torch.int16) if row.routing is None else row.routing[:-1].to(torch.int16))
    return torch.cat(parts)


_TOKEN_FIELDS = ("input_ids", "target_ids", "positions", "seq", "source", "turn", "trainable", "advantage", "weight", "version")
