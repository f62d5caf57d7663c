"""The weight of a token, drawn from the objective itself: as a function of the token's probability, and of its advantage.

One token is moved and everything else stands still: answers of one token, every recorded policy at probability 0.5, rewards of 0 and 1, advantages
of +1 and -1 in turn.  So 0.5 is where the policy has not moved.  The weight is ``dJ/dlogp`` without its aggregation constant, streams one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from posttrain.loss.unified import Objective, Stream, declared
from posttrain.mixture.control import now
from posttrain.records import Row, TokenBatch

PROBABILITIES = tuple(k / 100 for k in range(1, 100))
ADVANTAGES = tuple(k / 20 for k in range(-40, 41))
AT = (0.25, 0.5, 0.75)
"""The probabilities at which the weight is drawn over the advantage."""
NUMBERS = tuple(x / 4 for x in range(-16, 17))
"""What a scalar head says."""
START, SEQUENCES, GROUP = 0.5, 64, 8
HOW = "one-token answers, every recorded policy at p = 0.5, weights without the aggregation constant, schedules at the start of the run"


@dataclass(frozen=True)
class Curve:
    """``y`` is None where the objective has no finite weight."""

    label: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Panel:
    """Curves over one axis."""

    title: str
    axis: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Picture:
    """The panels of a stream, and what a reader must know of them."""

    stream: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()


def pictures(
    objective: Objective, probabilities: Sequence[float] = PROBABILITIES, advantages: Sequence[float] = ADVANTAGES
) -> list[Picture]:
    """One picture per stream.  A stream whose weights need what a single token has not gets none, and the reason as its note."""
    return [_picture(Probe(name, objective), probabilities, advantages) for name in objective.streams]


def _picture(probe: Probe, probabilities: Sequence[float], advantages: Sequence[float]) -> Picture:
    try:
        curves = probe.contrast(NUMBERS if probe.scalar else probabilities)
        if probe.scalar:
            return Picture(probe.name, (Panel("weight of an answer by the head's number", "number r", curves),), ())
        panels = [Panel("weight of a token by its probability", "probability p", curves)]
        notes = list(probe.notes)
        if curves[0].label.startswith("A ="):
            over = [Curve(f"p = {p:g}", tuple(advantages), tuple(probe.weight(p, a) for a in advantages)) for p in AT]
            panels.append(Panel("weight of a token by its advantage", "advantage A", tuple(over)))
        else:
            notes.insert(0, "the weight does not depend on the advantage column")
    except ValueError as error:
        return Picture(probe.name, (), (f"no picture: {error}",))
    return Picture(probe.name, tuple(panels), tuple(notes))


@dataclass(frozen=True)
class Probe:
    """A stream of an objective on a batch in which one token is moved."""

    name: str
    whole: Objective

    @property
    def stream(self) -> Stream:
        return self.whole.streams[self.name]

    @cached_property
    def objective(self) -> Objective:
        """The stream alone, with the regularisers of sampled tokens that act on it."""
        acting = {k: r for k, r in self.whole.regularizers.items() if getattr(r, "streams", None) is None or self.name in r.streams}
        sampled = {k: r for k, r in acting.items() if declared(r, "column") is None}
        alone = {k: dataclasses.replace(r, streams=None) if getattr(r, "streams", None) else r for k, r in sampled.items()}
        alone_at_start = dataclasses.replace(self.stream, coef=now(self.stream.coef, 0.0, {}))  # a blend that looks ahead needs the other streams
        return Objective({self.name: alone_at_start}, alone, self.whole.name)

    @property
    def notes(self) -> list[str]:
        missing = [k for k, r in self.whole.regularizers.items() if declared(r, "column") is not None]
        return [f"{' and '.join(missing)}: over the whole vocabulary, so not in the picture"] if missing else []

    @property
    def scalar(self) -> bool:
        """Whether a number is read in the place of a log-probability."""
        return declared(self.stream.likelihood, "head") == "scalar"

    @property
    def in_pairs(self) -> bool:
        return self.stream.paired is True or self.stream.side is not None

    @cached_property
    def batch(self) -> TokenBatch:
        columns = {"old", "behaviour", "base", "teacher", *self.objective.needs.references}
        names = {"reward", *_words(self.stream)}
        rows = []
        for i, context in [(i, self.stream.context) for i in range(SEQUENCES)] + [
            (i, context) for context in sorted(self.objective.needs.contexts) for i in range(GROUP)
        ]:
            # a column that is no log-probability, such as the entropy, is largest on the token that is moved
            start = 0.0 if self.scalar else math.log(START)
            known = {name: start if name != "entropy" else 0.5 if i > 1 else 1.0 for name in columns}
            rows.append(
                Row(
                    ids=[0, 1],
                    sources=["prompt", self.stream.source[0]],
                    trainable=[False, True],  # a tool's words too, which are learnt where a stream is of them
                    logps={name: [math.nan, value] for name, value in {"current": start, **known}.items()},
                    advantage=1.0 if i % 2 == 0 else 0.0 if self.scalar else -1.0,
                    group=i // GROUP if context == self.stream.context else None,
                    pair=i // 2 if self.in_pairs else None,
                    side=("chosen", "rejected")[i % 2] if self.in_pairs else None,
                    rewards={name: float(i % 2 == 0) for name in names} | self._against(i),
                    context=context,
                    sample_id=f"{context} {i}".strip(),
                )
            )
        batch = TokenBatch.from_sequences(rows, fresh=False, dtype=torch.float64)
        return batch.replace(totals=self.objective.totals(batch))

    def _against(self, i: int) -> dict[str, float]:
        """Comparisons with the other answers of the group, for a term that reads them: every other answer wins them all."""
        term = self.stream.advantage
        others = [j for j in range(SEQUENCES) if j // GROUP == i // GROUP and j != i] if getattr(term, "compares", False) else []
        return {f"{term.of}/against/{j}": float(i % 2 == 0) for j in others}

    @cached_property
    def _constants(self) -> torch.Tensor:
        return self.stream.aggregation.coefficient(self.objective.views(self.batch)[self.name], None)

    def weight(self, p: float, advantage: float = 1.0, at: int | None = None, reward: float | None = None) -> float | None:
        """The weight of the moved token; ``at``: which sequence it is, by default the first of the stream."""
        at = (1 if self.stream.side == "rejected" else 0) if at is None else at
        batch = self.batch
        logp, column = batch.logps["current"].clone(), batch.advantage.clone()
        logp[at], column[at] = p if self.scalar else math.log(p), advantage
        rewards = batch.rewards if reward is None else {name: _put(values, at, reward) for name, values in batch.rewards.items()}
        try:
            weights = self.objective.weights(batch.replace(advantage=column, rewards=rewards), logp)
        except FloatingPointError:
            return None
        return float(weights[at] / self._constants[at]) + 0.0  # no minus zero

    def contrast(self, probabilities: Sequence[float]) -> tuple[Curve, ...]:
        """Two curves for the first of these that the weight depends on: the sign of the advantage (a scalar head's label), the side in a pair, the reward; else one."""
        choices: list[tuple[tuple[str, Callable[[float], float | None]], ...]] = [
            (("A = +1", lambda p: self.weight(p, 1.0)), ("A = -1", lambda p: self.weight(p, -1.0)))
        ]
        if self.scalar:
            choices = [(("label or return 1", lambda p: self.weight(p, 1.0)), ("0", lambda p: self.weight(p, 0.0)))]
        if self.in_pairs and self.stream.side is None:
            choices.append((("chosen", lambda p: self.weight(p, at=0)), ("rejected", lambda p: self.weight(p, at=1))))
        choices.append((("reward 1", lambda p: self.weight(p, reward=1.0)), ("reward 0", lambda p: self.weight(p, reward=0.0))))
        for choice in choices:
            curves = [Curve(label, tuple(probabilities), tuple(map(f, probabilities))) for label, f in choice]
            if curves[0].y != curves[1].y:
                return tuple(curves)
        return (dataclasses.replace(curves[0], label="every token"),)


def _put(values: torch.Tensor, at: int, value: float) -> torch.Tensor:
    changed = values.clone()
    changed[at] = value
    return changed


def _words(term: Any) -> set[str]:
    """Every word among the settings of a stream: the reward columns it reads are among them."""
    if isinstance(term, str):
        return {term}
    if dataclasses.is_dataclass(term):
        return set(itertools.chain.from_iterable(_words(getattr(term, f.name)) for f in dataclasses.fields(term)))
    inner = term.values() if isinstance(term, Mapping) else term if isinstance(term, (tuple, list)) else ()
    return set(itertools.chain.from_iterable(map(_words, inner)))
