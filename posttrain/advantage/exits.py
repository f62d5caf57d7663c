"""Advantages of a chain that was left early in several places (``rollout=exits``): who answered right first, and what each block was good for.

The members of a chain begin with the same tokens.  These are learnt from in one of them alone.  Partly our reading of the publications.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from posttrain.advantage.group import Around, Chain, GroupAdvantage, _with, rewards_of
from posttrain.records import Group, Rollout, Segment, Source

LEARNT = (Source.policy, Source.demo, Source.prefix)
"""What is learnt from where a segment does not say which of its tokens are."""


def place_of(rollout: Rollout) -> float:
    """After how many tokens a sample left its chain; the chain itself never did."""
    return math.inf if rollout.left is None else rollout.left[1]


def serial_groups(group: Group) -> list[Group]:
    """One group per chain: its exits from the first to the last, then the chain.  Raises ``ValueError`` for an exit without its chain."""
    members: dict[str, list[Rollout]] = {r.sample_id: [] for r in group.rollouts if r.left is None}
    for rollout in group.rollouts:
        name = rollout.sample_id if rollout.left is None else rollout.left[0]
        if name not in members:
            raise ValueError(f"group {group.id!r}: sample {rollout.sample_id!r} left the chain {name!r}, which is not in the group")
        members[name].append(rollout)
    return [replace(group, rollouts=tuple(sorted(each, key=place_of))) for each in members.values()]


def _back(group: Group, parts: Sequence[Group]) -> Group:
    """The samples of all parts in the group's order; the group is dropped where every part is."""
    found: dict[str, Rollout] = {}
    for part in parts:
        left_out = part.dropped is not None and group.dropped is None
        found |= {r.sample_id: replace(r, advantage=None) if left_out else r for r in part.rollouts}
    reasons = [part.dropped for part in parts]
    dropped = group.dropped or (reasons[0] if reasons and all(reasons) else None)
    return replace(group, rollouts=tuple(found[r.sample_id] for r in group.rollouts), dropped=dropped)


def learnt_from(rollout: Rollout, start: int) -> Rollout:
    """The rollout, nothing of which is learnt before its token ``start``."""
    segments: list[Segment] = []
    for segment in rollout.segments:
        n = len(segment.ids)
        gone, start = min(start, n), max(start - n, 0)
        if gone:
            flags = segment.trainable
            kept = flags if isinstance(flags, tuple) else (flags and segment.source in LEARNT,) * n
            segment = replace(segment, trainable=(False,) * gone + kept[gone:])
        segments.append(segment)
    return replace(rollout, segments=tuple(segments))


@dataclass(frozen=True)
class RankDecay:
    """The first right answer of a chain is worth most.

    Equation: ``R = base^(k-1)`` for the k-th right answer in the order of the exits, the whole chain last; 0 for a wrong one.
    Source: S-GRPO, arXiv 2505.07686 (base 1/2 from a secondary source; one implementation halves the first one too).

    ``base``: what is left of the reward from one right answer to the next.  ``above``: what counts as right.  It stands first in ``Serial``; samples
    whose verifier failed have no rank.

    Wrong when: answers can be guessed: an early guess then takes the reward of the thought behind it.
    """

    base: float = 0.5
    above: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.base <= 1:
            raise ValueError(f"RankDecay: base={self.base} must be above 0 and at most 1")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards_of(group)
        right = [r.sample_id for r in sorted(group.rollouts, key=place_of) if r.reward is not None and r.reward > self.above]
        worth = {name: self.base**rank for rank, name in enumerate(right)}
        rewards = [None if r.reward is None else worth.get(r.sample_id, 0.0) for r in group.rollouts]
        return replace(group, rollouts=tuple(replace(r, reward=x, advantage=None) for r, x in zip(group.rollouts, rewards, strict=True)))


def _decayed() -> Chain:
    return Chain({"decay": RankDecay(), "center": GroupAdvantage(scale="none")})


@dataclass(frozen=True)
class Serial(Around):
    """Every chain with its exits is a group of its own; the tokens they share are counted once.

    Equation: a shared token gets the mean of ``A_i`` over the members i that hold it, in the longest of them, and nothing in the others; every
    answer gets its own ``A_i``.
    Source: S-GRPO, arXiv 2505.07686.  That shared tokens count once is our reading; as printed every member learns from all its tokens.

    ``inner``: the estimator within a chain, ``RankDecay`` and the group mean by default.  ``shared``: ``once``, or ``every``: in each member, with
    its own ``A_i``.  The weight of a shared token is then that of ``once`` times the members that hold it, and so is its share in a token mean.

    Wrong when: samples that share nothing are to be compared: chains of one prompt do not meet here.
    """

    inner: Any = field(default_factory=_decayed)
    shared: Literal["once", "every"] = "once"
    needs_exits = True

    def __post_init__(self) -> None:
        if self.shared not in ("once", "every"):
            raise ValueError(f"advantage Serial: shared={self.shared!r} does not exist; choose once or every")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [_back(group, [self._spread(part) for part in self.inner(serial_groups(group))]) for group in groups]

    def _spread(self, part: Group) -> Group:
        usable = [r for r in part.rollouts if r.advantage is not None]
        if self.shared == "every" or not usable:
            return part
        longest = usable[-1]  # they are in the order of their exits
        out = [r if r is longest or r.left is None else learnt_from(r, r.left[1]) for r in part.rollouts]
        return replace(part, rollouts=tuple(self._mean(r, usable) if r is longest else r for r in out))

    @staticmethod
    def _mean(longest: Rollout, usable: Sequence[Rollout]) -> Rollout:
        own = longest.advantage
        assert own is not None
        column = [own] * longest.num_tokens
        for t in range(int(min(place_of(longest), longest.num_tokens))):
            holding = [r.advantage for r in usable if place_of(r) > t]
            column[t] = math.fsum(holding) / len(holding)  # type: ignore[arg-type]
        return replace(longest, paid=tuple(column), placed=True)


@dataclass(frozen=True)
class Progress(Around):
    """What each block of a chain adds to the chance of a right answer, as forced answers tell it.

    Equation: ``A[t] = A_outcome + alpha (J_{j+1} - J_j)`` for a token of block j; ``J_j`` is the mean reward of the answers forced before block j,
    and ``J`` behind the last block the chain's own reward.  ``credit=to_go`` adds the blocks that follow too: ``alpha (R - J_j)``.
    Source: MRT, arXiv 2503.07572; alpha is not confirmed.  The released guide has the termination baseline alone, ``A = R - R_termination`` of the
    same prefix: ``inner`` null, ``credit=to_go``.

    ``inner``: the estimator of the outcome over the chains of a prompt; null for none.  ``alpha``: how much progress counts.  ``credit``: a token
    answers for its ``block``, or for everything from there on (``to_go``).  The forced answers themselves are not learnt from, nor are tokens before
    the first exit.

    The sum over the blocks is ``R - J_0``: nothing is paid twice.

    Wrong when: one forced answer per exit (``rollout.strategy.samples``) is all there is and alpha is large: the progress of a block is then mostly
    noise.
    """

    inner: Any = field(default_factory=GroupAdvantage)
    alpha: float = 1.0
    credit: Literal["block", "to_go"] = "block"
    needs_exits = True

    def __post_init__(self) -> None:
        if self.credit not in ("block", "to_go"):
            raise ValueError(f"advantage Progress: credit={self.credit!r} does not exist; choose block or to_go")
        if not math.isfinite(self.alpha):
            raise ValueError(f"advantage Progress: alpha={self.alpha} must be finite")

    @property
    def needs_group(self) -> bool:
        return self.inner is not None

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards_of(group)
        alone = replace(group, rollouts=tuple(r for r in group.rollouts if r.left is None))
        judged = _with(alone, [0.0] * len(rewards_of(alone))) if self.inner is None else self.inner([alone])[0]
        outcome = {r.sample_id: r.advantage for r in judged.rollouts}
        parts = [self._paid(part, outcome) for part in serial_groups(group)]
        found = {r.sample_id: r for part in parts for r in part}
        return replace(group, rollouts=tuple(found.get(r.sample_id, replace(r, advantage=None)) for r in group.rollouts), dropped=judged.dropped)

    def _paid(self, part: Group, outcome: dict[str, float | None]) -> list[Rollout]:
        """The chain, with an advantage for every token."""
        (chain,) = [r for r in part.rollouts if r.left is None]
        base = outcome[chain.sample_id]
        if base is None or chain.reward is None:
            return [replace(chain, advantage=None)]
        ends = values(part)
        column = [0.0] * chain.num_tokens
        for (start, before), (end, after) in pairwise(ends):
            gain = (after if self.credit == "block" else chain.reward) - before
            column[start:end] = [base + self.alpha * gain] * (end - start)
        first = ends[0][0]
        if first >= chain.num_tokens:  # no forced answer could be judged: the outcome is all that is known
            return [replace(chain, advantage=base)]
        mean = math.fsum(column[first:]) / (chain.num_tokens - first)
        return [replace(learnt_from(chain, first), advantage=mean, paid=tuple(column), placed=True)]


def values(part: Group) -> list[tuple[int, float]]:
    """(tokens of the chain, mean reward of the answers forced there), in order; at its end the chain's own reward.  Exits nobody could judge are
    left out."""
    heard: dict[int, list[float]] = defaultdict(list)
    (chain,) = [r for r in part.rollouts if r.left is None]
    for rollout in part.rollouts:
        if rollout.left is not None and rollout.reward is not None:
            heard[rollout.left[1]].append(rollout.reward)
    assert chain.reward is not None
    return [*((place, math.fsum(rs) / len(rs)) for place, rs in sorted(heard.items())), (chain.num_tokens, chain.reward)]
