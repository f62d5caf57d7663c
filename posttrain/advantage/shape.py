"""Rewards shaped by what the rest of the group, or the run so far, looks like.  They stand before a baseline in a chain and change ``reward`` itself.

Exotic, or partly our reading of a publication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from posttrain.advantage.group import _value, _variance, _with, rewards_of
from posttrain.records import Group, Rollout


def score_of(rollout: Rollout, name: str, what: str) -> float | None:
    """The value of a named score, None where its function failed.  Raises ``ValueError`` when the rollout has no such score at all."""
    if name not in rollout.scores:
        raise ValueError(
            f"{what} reads the score {name!r} of sample {rollout.sample_id!r}, which has {', '.join(sorted(rollout.scores)) or 'none'}"
        )
    return rollout.scores[name].value


def _rewarded(group: Group, rewards: Mapping[str, float | None]) -> Group:
    return replace(group, rollouts=tuple(replace(r, reward=rewards.get(r.sample_id, r.reward), advantage=None) for r in group.rollouts))


@dataclass(frozen=True)
class Diverse:
    """A right answer is worth the share of the *other* right answers that say something else.

    Equation: ``R * max((C - n)/(C - 1), floor)`` for answers with a reward above ``above``, ``C`` of which ``n`` are of the same class; ``R * floor`` for the others.
    Source: DARLING, arXiv 2509.02534.

    ``classes``: the score that holds an answer's class, a number (a reward function of weight 0 makes the partition).  ``floor``: the least factor, also of
    the only right answer.  ``above``: what counts as right.

    Wrong when: the classifier is noisy: two phrasings of one answer are then rewarded for differing.  A sample whose class failed leaves the group.
    """

    classes: str = "class"
    floor: float = 0.1
    above: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"Diverse: floor={self.floor} is a factor, between 0 and 1")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards_of(group)
        usable = [r for r in group.rollouts if r.reward is not None]
        kinds = {r.sample_id: score_of(r, self.classes, "advantage Diverse") for r in usable}
        right = [r.sample_id for r in usable if r.reward > self.above and kinds[r.sample_id] is not None]  # type: ignore[operator]
        rewards: dict[str, float | None] = {}
        for rollout in usable:
            kind, share = kinds[rollout.sample_id], self.floor
            if rollout.sample_id in right and len(right) > 1:
                same = sum(kinds[other] == kind for other in right)
                share = max((len(right) - same) / (len(right) - 1), self.floor)
            rewards[rollout.sample_id] = None if kind is None else rollout.reward * share  # type: ignore[operator]
        return _rewarded(group, rewards)


@dataclass
class TrustMix:
    """A second reward joins the outcome, less where it prefers wrong answers, and less and less over the run.

    Equation: ``R + alpha * trust * exp(-step/horizon) * S``, ``trust = exp(mean S of right - mean S of wrong)`` where that is below 1, else 1.
    Source: Trust-GRPO of SophiaVL-R1, arXiv 2505.17018.

    ``score``: the name of the second reward; wrong answers get 0 of it.  ``alpha``, ``horizon``: its weight and how many steps it takes to fall to 1/e.  ``above``:
    what counts as right.  ``steps``: steps done so far, the state a checkpoint keeps.

    Wrong when: the second reward should teach where all answers are right: groups of one kind get none of it.
    """

    score: str = "think"
    alpha: float = 0.3
    horizon: float = 500.0
    above: float = 0.5
    steps: int = 0

    def __post_init__(self) -> None:
        if not self.horizon > 0:
            raise ValueError(f"TrustMix: horizon={self.horizon} steps must be above 0")

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        weight = self.alpha * math.exp(-self.steps / self.horizon)
        self.steps += 1
        return [self._one(group, weight) for group in groups]

    def _one(self, group: Group, weight: float) -> Group:
        rewards_of(group)
        scores = {r.sample_id: score_of(r, self.score, "advantage TrustMix") for r in group.rollouts if r.reward is not None}
        told = [(r, s) for r in group.rollouts if (s := scores.get(r.sample_id)) is not None]
        right, wrong = ([s for r, s in told if (r.reward > self.above) == kind] for kind in (True, False))  # type: ignore[operator]
        rewards: dict[str, float | None] = {name: None for name, s in scores.items() if s is None}
        if right and wrong:
            trust = min(math.exp(math.fsum(right) / len(right) - math.fsum(wrong) / len(wrong)), 1.0)
            rewards |= {r.sample_id: r.reward + weight * trust * s for r, s in told if r.reward > self.above}  # type: ignore[operator]
        return _rewarded(group, rewards)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.steps = state["steps"]


@dataclass(frozen=True)
class ScaleBy:
    """Advantages (rewards, where none are set) times a number known of the prompt: its difficulty, its weight.

    Equation: ``A_i = meta[key] * A_i``.
    Source: difficulty-scaled rewards, DR-IRL, arXiv 2503.18991 (its factors are not published in a form we could confirm).

    ``key``: the column of the data set.

    Wrong when: it stands before a normalisation over the group, which takes any factor of the prompt away again.
    """

    key: str = "difficulty"

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        out = []
        for group in groups:
            number = group.prompt.meta.get(self.key)
            if not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"prompt {group.id!r}: advantage ScaleBy needs a number in the column {self.key!r}, not {number!r}")
            rewards_of(group)
            out.append(_with(group, [number * _value(r) for r in group.rollouts if r.reward is not None]))
        return out


@dataclass
class TailRisk:
    """Questions in bundles, judged by how the bundle's score stands against tracked quantiles: the hard tail weighs more.

    Equation: with ``s`` the bundle's summed reward per sample: ``A(s) = (w CVaR + RVaR)/(w + 1)``, ``CVaR = -(q_a - s)+ / a``,
    ``RVaR = ((s - q_a)+ - (s - q_b)+ + q_a - q_b)/(b - a)``; a question gets ``A(s)`` over the bundle's deviation and its own.
    Source: RiskPO, arXiv 2510.00911; deviations of samples (``ddof`` 1), counted as 1 up to 1e-3, as in its release (there the bundle's has a small
    number added instead); how quantiles are tracked is our reading.

    ``bundle``: questions per bundle, in the order of the step; what fills none, or has another number of samples, gets no advantage.  ``a``, ``b``: the quantile levels.  ``w``: weight of
    the tail.  ``rate``: of the quantile tracker ``q <- q + rate (level - [s < q])``.  ``quantiles``: where they stand, the state a checkpoint keeps.

    Wrong when: samples fail often: sample i of each question forms one score, so a question with a failed one fills no bundle.
    """

    bundle: int = 5
    a: float = 0.2
    b: float = 0.8
    w: float = 1.5
    rate: float = 0.1
    quantiles: list[float] = field(default_factory=lambda: [1.0, 4.0])

    def __post_init__(self) -> None:
        if not (self.bundle >= 1 and 0 < self.a < self.b < 1 and self.w >= 0 and self.rate > 0):
            raise ValueError(
                f"TailRisk: bundle={self.bundle}, 0 < a={self.a} < b={self.b} < 1, w={self.w} and rate={self.rate} do not fit together"
            )

    def value(self, s: float) -> float:
        """``A(s)``: at most 0, and 0 from the upper quantile on."""
        low, high = self.quantiles
        tail = -max(low - s, 0.0) / self.a
        middle = (max(s - low, 0.0) - max(s - high, 0.0) + low - high) / (self.b - self.a)
        return (self.w * tail + middle) / (self.w + 1)

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        out = [replace(g, rollouts=tuple(replace(r, advantage=None) for r in g.rollouts)) for g in groups]
        whole = [i for i, g in enumerate(groups) if rewards_of(g) and len(rewards_of(g)) == len(g.rollouts)]
        seen: list[float] = []
        for start in range(0, len(whole) - self.bundle + 1, self.bundle):
            members = whole[start : start + self.bundle]
            rewards = [rewards_of(groups[i]) for i in members]
            if len({len(each) for each in rewards}) > 1:
                continue
            scores = [math.fsum(each) for each in zip(*rewards, strict=True)]
            seen += scores
            spread = [self._deviation(each) for each in rewards]
            over = self._deviation(scores)
            for i, deviation in zip(members, spread, strict=True):
                out[i] = _with(groups[i], [self.value(s) / (deviation * over) for s in scores])
        for s in seen:
            self.quantiles = [q + self.rate * (level - (s < q)) for q, level in zip(self.quantiles, (self.a, self.b), strict=True)]
        return out

    @staticmethod
    def _deviation(values: Sequence[float]) -> float:
        deviation = math.sqrt(_variance(values, 1))
        return deviation if deviation > 1e-3 else 1.0

    def state_dict(self) -> dict[str, list[float]]:
        return {"quantiles": list(self.quantiles)}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.quantiles = list(state["quantiles"])


@dataclass(frozen=True)
class ByDirection:
    """The reward is what the prompt asks for: a weighted sum of named rewards whose weights stand in the prompt's own columns.

    Equation: ``R = sum_n v_n r_n``, ``v_n = meta[direction[n]]``, or ``meta[n]`` where ``direction`` is empty.
    Source: DPA, arXiv 2402.18571 (abstract only).

    ``direction``: reward name -> the column of the data with its weight, of either sign; an empty map takes every reward, and the column
    of its own name.  A sample with a reward that failed leaves the group.

    Wrong when: the direction does not stand in the prompt too: the policy is then pulled in every direction at once.
    """

    direction: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [self._one(group) for group in groups]

    def _one(self, group: Group) -> Group:
        rewards_of(group)
        names = sorted({n for r in group.rollouts for n in r.scores if "/" not in n})
        v = self._weights(group, self.direction or dict(zip(names, names, strict=True)))
        rewards: dict[str, float | None] = {}
        for rollout in (r for r in group.rollouts if r.reward is not None):
            found = {name: score_of(rollout, name, "advantage ByDirection") for name in v}
            rewards[rollout.sample_id] = None if None in found.values() else math.fsum(v[n] * x for n, x in found.items() if x is not None)
        return _rewarded(group, rewards)

    @staticmethod
    def _weights(group: Group, columns: Mapping[str, str]) -> dict[str, float]:
        out = {}
        for name, column in columns.items():
            value = group.prompt.meta.get(column)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(
                    f"prompt {group.id!r}: advantage ByDirection needs a number in the column {column!r}, not {value!r}; its other columns are "
                    f"{', '.join(map(str, group.prompt.meta)) or 'none'}"
                )
            out[name] = float(value)
        if not any(out.values()):
            raise ValueError(f"prompt {group.id!r}: its direction is 0 in {', '.join(columns.values()) or 'every reward'}, which asks for nothing")
        return out
