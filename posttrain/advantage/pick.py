"""Advantages that single out samples of a group: the best one, the greedy one, both ends; and a baseline that is remembered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from posttrain.advantage.group import Around, GroupAdvantage, _value, _variance, _with, rewards_of
from posttrain.records import Group, Rollout


@dataclass(frozen=True)
class BestMinusSecond:
    """Only the best sample of a group is learnt from, by how much it beats the second.

    Equation: ``A = R_(1) - R_(2)`` on the best, 0 on the others; ``scale="std"`` divides by the group's deviation.
    Source: pass@k training, arXiv 2503.19595.  With 0/1 rewards the *sum* over the group is the exact gradient of pass@k, so the
    aggregation that belongs to it is ``GroupSum``; scaled, it is not.

    ``scale``: ``none`` or ``std``.  ``ddof``, ``eps``: of the deviation.  A group with one usable reward gives 0, and so do ties at the top.

    Wrong when: groups often hold several right answers: they teach nothing.
    """

    scale: Literal["none", "std"] = "none"
    ddof: int = 1
    eps: float = 1e-6
    needs_group = True

    def __post_init__(self) -> None:
        if self.scale not in ("none", "std") or self.ddof not in (0, 1) or not self.eps >= 0:
            raise ValueError(f"BestMinusSecond: scale={self.scale!r} is none or std, ddof={self.ddof} 0 or 1, eps={self.eps} not negative")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [_with(group, self.values(rewards_of(group))) for group in groups]

    def values(self, rewards: Sequence[float]) -> list[float]:
        """The advantages of one group."""
        if len(rewards) < 2:
            return [0.0] * len(rewards)
        best, second = sorted(rewards, reverse=True)[:2]
        ahead = best - second
        if self.scale == "std":
            ahead /= math.sqrt(_variance(rewards, self.ddof)) + self.eps
        top = list(rewards).index(best)
        return [ahead if i == top else 0.0 for i in range(len(rewards))]


@dataclass(frozen=True)
class GreedyBaseline:
    """The reward of the greedy answer to the same prompt as baseline; the greedy answer itself is not learnt from.

    Equation: ``A_i = R_i - R(greedy)``.
    Source: ReMax, arXiv 2310.10505.

    The greedy answer is the one sampled at temperature 0, which ``rollout.strategy=WithGreedy`` adds to every group.  A group whose greedy answer got no
    reward is dropped.

    Wrong when: the greedy answer is of older weights than the samples; or it is always right, or always wrong: every sample is then pushed one way.
    """

    needs_greedy = True

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    @staticmethod
    def _one(group: Group) -> Group:
        rewards_of(group)
        greedy = [r for r in group.rollouts if r.sampling.temperature == 0]
        if len(greedy) != 1:
            raise ValueError(
                f"group {group.id!r} has {len(greedy)} answers sampled at temperature 0 instead of 1; advantage GreedyBaseline needs rollout=greedy_baseline"
            )
        baseline = greedy[0].reward
        rollouts = tuple(
            replace(r, advantage=None if r is greedy[0] or r.reward is None or baseline is None else r.reward - baseline)
            for r in group.rollouts
        )
        reason = "no greedy reward" if baseline is None else None
        return replace(group, rollouts=rollouts, dropped=group.dropped or reason)


@dataclass(frozen=True)
class PromptBaseline:
    """A number known of the prompt beforehand as baseline: a value estimated once, or a soft maximum of earlier rewards.

    Equation: ``A_i = max(R_i - meta[key], floor)``.
    Source: A*-PO, arXiv 2505.20686 (``v_star``, see :func:`soft_maximum`); A-LoL, arXiv 2305.14718 (the value of the base policy, floor 0); DRO, arXiv
    2405.19107.

    ``key``: the column of the data set that holds the number, one per prompt.  ``floor``: null for none; 0 never pushes an answer down.

    Wrong when: the number belongs to another policy, reward or temperature than the run's.
    """

    key: str
    floor: float | None = None

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        out = []
        for group in groups:
            baseline = group.prompt.meta.get(self.key)
            if not isinstance(baseline, (int, float)) or not math.isfinite(baseline):
                raise ValueError(
                    f"prompt {group.id!r}: advantage PromptBaseline needs a number in the column {self.key!r}, not {baseline!r}; its other columns are "
                    f"{', '.join(map(str, group.prompt.meta)) or 'none'}"
                )
            values = [r - baseline for r in rewards_of(group)]
            out.append(_with(group, values if self.floor is None else [max(v, self.floor) for v in values]))
        return out


def soft_maximum(rewards: Sequence[float], beta: float) -> float:
    """``beta log mean exp(R / beta)``: the value of the KL-regularised optimum at temperature ``beta``, from rewards of base samples.

    It lies between their mean (``beta`` to infinity) and their maximum (``beta`` to 0).
    """
    if not rewards or not beta > 0:
        raise ValueError(f"soft_maximum needs rewards and beta above 0, not {len(rewards)} rewards and beta={beta}")
    best = max(rewards)
    return best + beta * math.log(math.fsum(math.exp((r - best) / beta) for r in rewards) / len(rewards))


@dataclass(frozen=True)
class Extremes:
    """Keep the best and the worst samples of a group; the others get no advantage and leave the step.

    Equation: ``A_i`` where the rank of ``R_i`` is among the ``best`` first or the ``worst`` last, nothing elsewhere.
    Source: best-and-worst selection of rollouts, arXiv 2504.13818.

    ``best``, ``worst``: how many of each.  Ties are broken by the order of sampling.  It stands last in a chain: the baseline is that of the
    whole group.

    Wrong when: an estimator follows it, which would give the dropped samples an advantage again.
    """

    best: int = 2
    worst: int = 2
    needs_group = True

    def __post_init__(self) -> None:
        if self.best < 0 or self.worst < 0 or self.best + self.worst < 1:
            raise ValueError(f"Extremes: best={self.best} and worst={self.worst} must not be negative, and not both 0")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards_of(group)
        usable = [i for i, r in enumerate(group.rollouts) if r.reward is not None]
        order = sorted(usable, key=lambda i: -group.rollouts[i].reward)  # type: ignore[operator]
        kept = {*order[: self.best], *order[len(order) - min(self.worst, len(order)) :]}
        return replace(group, rollouts=tuple(r if i in kept else replace(r, advantage=None) for i, r in enumerate(group.rollouts)))


@dataclass(frozen=True)
class DropRepeats:
    """Of answers with the same tokens in a group, only the first is learnt from; the others get no advantage and leave the step.

    Equation: ``A_i`` where no earlier answer of the group with a reward is token for token the same, nothing elsewhere.
    Source: rejection sampling, RAFT, arXiv 2304.06767, where repeats of a good answer may count once or each time; the default there is each time.

    It stands last in a chain: the baseline is that of the whole group.

    Wrong when: frequency is the point: an answer sampled often then counts as one sampled once, and the estimate of an expectation is no longer one.
    """

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    @staticmethod
    def _one(group: Group) -> Group:
        seen: set[tuple[int, ...]] = set()
        out = []
        for rollout in group.rollouts:
            ids = tuple(t for s in rollout.segments for t in s.ids)
            out.append(replace(rollout, advantage=None) if ids in seen else rollout)
            if rollout.reward is not None:
                seen.add(ids)
        return replace(group, rollouts=tuple(out))


@dataclass(frozen=True)
class Among(Around):
    """Only ``keep`` answers of a group are compared and learnt from: the shortest, or those with the most reward per token; the others leave the step.

    Equation: ``A_i = inner(kept answers)_i`` for the kept ones, nothing for the others.
    Source: GFPO, arXiv 2508.09726 (statistics over the kept answers; that the others leave the denominators too is our reading).

    ``inner``: the estimator.  ``keep``: how many.  ``by``: ``length`` or ``reward_per_token``.  Ties are broken by the order of sampling.

    Wrong when: right answers are long: the short ones that are kept are then all wrong, and teach nothing.
    """

    inner: Any = field(default_factory=GroupAdvantage)
    keep: int = 4
    by: Literal["length", "reward_per_token"] = "length"
    needs_group = True

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(f"Among: keep={self.keep} must be at least 2, which are compared")
        if self.by not in ("length", "reward_per_token"):
            raise ValueError(f"Among: by={self.by!r} does not exist; choose length or reward_per_token")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        kept = self.inner([replace(g, rollouts=self._kept(g)) for g in groups])
        return [self._back(whole, part) for whole, part in zip(groups, kept, strict=True)]

    def _kept(self, group: Group) -> tuple[Rollout, ...]:
        rewards_of(group)
        usable = [r for r in group.rollouts if r.reward is not None]
        cost = {"length": lambda r: r.num_tokens, "reward_per_token": lambda r: -r.reward / max(r.num_tokens, 1)}[self.by]
        chosen = {r.sample_id for r in sorted(usable, key=cost)[: self.keep]}
        return tuple(r for r in group.rollouts if r.sample_id in chosen)

    @staticmethod
    def _back(whole: Group, part: Group) -> Group:
        found = {r.sample_id: r for r in part.rollouts}
        return replace(part, rollouts=tuple(found.get(r.sample_id, replace(r, advantage=None)) for r in whole.rollouts))


@dataclass
class RunningBaseline:
    """A baseline remembered over steps: the moving average of rewards, for each world or for all together.

    Equation: ``A_i = R_i - b``, then ``b <- decay b + (1 - decay) R_i``, sample by sample.
    Source: Williams 1992 with an average reward; per role: SPIRAL, arXiv 2506.24119.  A sample is compared with the baseline of the samples before it.

    ``decay``: how slowly it moves.  ``by``: one baseline for each ``env`` of the prompts, or for ``all``.  ``baselines``: where they start (0 where none is
    named) and the state that a checkpoint keeps.

    Wrong when: prompts differ much in difficulty: easy ones are then always pushed up and hard ones down.
    """

    decay: float = 0.95
    by: Literal["env", "all"] = "env"
    baselines: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or self.by not in ("env", "all"):
            raise ValueError(f"RunningBaseline: decay={self.decay} must be at least 0 and below 1, by={self.by!r} is env or all")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        out = []
        for group in groups:
            rewards_of(group)
            values = []
            for rollout in (r for r in group.rollouts if r.reward is not None):
                key = rollout.prompt.env if self.by == "env" else "all"
                baseline = self.baselines.get(key, 0.0)
                values.append(_value(rollout) - baseline)
                self.baselines[key] = self.decay * baseline + (1 - self.decay) * _value(rollout)
            out.append(_with(group, values))
        return out

    def state_dict(self) -> dict[str, float]:
        return dict(self.baselines)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.baselines = dict(state)
