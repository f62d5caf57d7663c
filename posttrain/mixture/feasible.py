"""Pairs under constraints: the best answer that keeps them against the worst that does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.mixture.demos import Demos
from posttrain.mixture.pairs import PAIRED, TIED, as_demo, value_of
from posttrain.records import Group, Pair, Rollout


@dataclass(frozen=True)
class Feasible:
    """The best of the answers that pass every constraint against the worst of those that fail one; against the worst of all where none fails.

    Source: CGPO's pairs, arXiv 2409.20370, section 4.1.2.  A group without a passing answer teaches nothing; the first of equals is taken.

    ``constraints``: score -> the least value that passes.  ``metric``: what ranks them, ``reward`` or a score: name the score where the combined reward is
    already 0 for failing answers.  ``gap``: the least difference that is a preference where all pass.  An answer with a verdict missing is left out.

    Wrong when: a constraint is stricter than the policy can meet: hardly any group then has a passing answer.
    """

    constraints: Mapping[str, float] = field(default_factory=dict)
    metric: str = "reward"
    gap: float = 0.0
    uses_demos = False
    makes_pairs = True

    def __post_init__(self) -> None:
        if not self.constraints:
            raise ValueError("mixture.gate.constraints is empty: name at least one score and its threshold, e.g. {honest: 0.5}; without any choose mixture=best_worst")
        if not self.gap >= 0:
            raise ValueError(f"mixture.gate.gap={self.gap} must not be negative")

    def __call__(self, items: Sequence[Any], demos: Demos, step: int, progress: float) -> list[Any]:
        out, pairs = [], []
        for item in items:
            if isinstance(item, Group) and item.dropped is None:
                pair = self._pair(item)
                pairs += [pair] if pair else []
                item = replace(item, dropped=PAIRED if pair else TIED)
            out.append(item)
        return [*out, *pairs]

    def _pair(self, group: Group) -> Pair | None:
        known = [(value, kept, r) for r in group.rollouts if (value := value_of(r, self.metric)) is not None and (kept := self._kept(r)) is not None]
        passing, failing = ([s for s in known if s[1] is verdict] for verdict in (True, False))
        if not passing:
            return None
        best, worst = max(passing, key=lambda s: s[0]), min(failing or passing, key=lambda s: s[0])
        if not failing and not best[0] - worst[0] > self.gap:
            return None
        return Pair(group.id, as_demo(best[2]), as_demo(worst[2]))

    def _kept(self, rollout: Rollout) -> bool | None:
        for name in self.constraints:
            if name not in rollout.scores:
                raise ValueError(f"mixture.gate.constraints names {name!r}, and sample {rollout.sample_id!r} has the scores {', '.join(sorted(rollout.scores)) or 'none'}")
        values = [(rollout.scores[name].value, least) for name, least in self.constraints.items()]
        return None if any(v is None for v, _ in values) else all(v >= least for v, least in values)  # type: ignore[operator]
