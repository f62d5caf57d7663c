"""Advantages chosen by how an answer turned out, and by how certain the policy was of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.loss.advantage import One
from posttrain.loss.reference import number
from posttrain.loss.unified import declared
from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class EntropyExponential:
    """An answer counts by the exponential of its mean entropy under the current policy.

    Equation: ``A = coef exp(sign H_i)``, ``H_i`` the mean over the answer's tokens of the entropy over the vocabulary, without gradient.
    Source: SRFT, arXiv 2506.19767: 0.5 exp(-H) on demonstrations, 0.1 exp(+H) on right rollouts (a release is reported to use +H on both).

    ``coef``: the weight at entropy 0, a number or a schedule.  ``sign``: -1 spares what the policy is unsure of, +1 favours it; any other number scales
    the entropy.

    Wrong when: ``sign`` is positive and the policy is near uniform: the weight is then the size of the vocabulary.
    """

    coef: Scalar = 0.5
    sign: float = -1.0
    coupling = "sequence"
    live = True
    needs = frozenset({"entropy"})

    @property
    def formula(self) -> str:
        return f"({number(self.coef)} exp({self.sign:g} H_i))"

    def values(self, view: TokenView) -> Tensor:
        entropy = view.spread(view.seq_mean(view.reference("entropy")))
        return view.at(self.coef) * torch.exp(self.sign * entropy)


@dataclass(frozen=True)
class ByReward:
    """One advantage for answers that are right, another for those that are not.

    Equation: ``A = right`` where ``R_i >= threshold``, else ``wrong``.
    Source: SRFT, arXiv 2506.19767 (a weighted log-likelihood of right rollouts, less the log-likelihood of wrong ones).

    ``right``, ``wrong``: advantage terms.  ``metric``: the reward column looked at.  ``threshold``: from which value on an answer is right.

    Wrong when: ``wrong`` is a constant below 0 and nothing bounds it: the log-likelihood of a wrong answer has no lower end, so it must be watched.
    """

    right: Any = field(default_factory=One)
    wrong: Any = field(default_factory=lambda: One(-1.0))
    metric: str = "reward"
    threshold: float = 1.0

    @property
    def _both(self) -> tuple[Any, Any]:
        return self.right, self.wrong

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(declared(t, "needs") for t in self._both))

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset().union(*(declared(t, "contexts") for t in self._both))

    @property
    def coupling(self) -> str:
        return max((declared(t, "coupling") for t in self._both), key=("token", "sequence", "group", "batch").index)

    @property
    def live(self) -> bool:
        return any(declared(t, "live") for t in self._both)

    @property
    def reads_column(self) -> bool:
        return any(getattr(t, "reads_column", False) for t in self._both)

    @property
    def formula(self) -> str:
        right, wrong = (getattr(t, "formula", type(t).__name__) or "1" for t in self._both)
        return f"({right} if {self.metric} >= {self.threshold:g} else {wrong})"

    def values(self, view: TokenView) -> Tensor:
        if not bool(view.on.any()):
            return torch.zeros_like(view.logp)
        if self.metric not in view.batch.rewards:
            raise ValueError(f"stream {view.name!r}: ByReward needs the reward {self.metric!r}; the batch has {sorted(view.batch.rewards) or 'none'}")
        reward = view.batch.rewards[self.metric]
        unknown = view.member & torch.isnan(reward)
        if bool(unknown.any()):
            sample = view.batch.sample_ids[int(unknown.nonzero()[0])]
            raise ValueError(f"stream {view.name!r}: sample {sample!r} has no reward {self.metric!r}, so it is neither right nor wrong")
        return torch.where(view.spread(reward >= self.threshold), self.right.values(view), self.wrong.values(view))


@dataclass(frozen=True)
class TurnReward:
    """Every turn of a dialogue is paid by its own combination of rewards, less a KL of its own.

    Equation: ``A[t] = sum_j weights[k][j] R_j - kl[k] mean_{s in turn k} log(pi_over[s]/pi_to[s])`` for the tokens of turn k.
    Source: SCoRe, arXiv 2409.12917, as a port documents it: weights ((1, 0), (-alpha, 1 + alpha)) in its second stage; the port divides the KL by the
    length of the turn, the paper writes the sum.

    ``rewards``: the reward columns, by name.  ``weights``: one row per turn (turns are numbered from 0).  ``kl``: one strength per turn, empty for none.
    ``to``: the policy to stay near.  ``over``: whose tokens were sampled.

    Wrong when: the reward of a turn reads more than that turn: a verifier that looks at the first answer pays for it twice.
    """

    rewards: tuple[str, ...] = ("reward", "label")
    weights: tuple[tuple[float, ...], ...] = ((1.0, 0.0), (-10.0, 11.0))
    kl: tuple[float, ...] = ()
    to: str = "base"
    over: str = "old"
    coupling = "sequence"

    def __post_init__(self) -> None:
        for name, value in (
            ("rewards", tuple(self.rewards)),
            ("weights", tuple(tuple(float(x) for x in row) for row in self.weights)),
            ("kl", tuple(float(x) for x in self.kl)),
        ):
            object.__setattr__(self, name, value)
        if not self.weights or any(len(row) != len(self.rewards) for row in self.weights):
            raise ValueError(f"TurnReward: every row of weights needs one number per reward ({', '.join(self.rewards)}), not {self.weights}")
        if self.kl and len(self.kl) != len(self.weights):
            raise ValueError(f"TurnReward: kl has {len(self.kl)} numbers for {len(self.weights)} turns")
        if self.to == self.over:
            raise ValueError(f"TurnReward: the KL from {self.over} to itself is 0; name two different policies")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to, self.over}) - {"self"} if self.kl else frozenset()

    @property
    def live(self) -> bool:
        return bool(self.kl) and "self" in (self.to, self.over)

    @property
    def formula(self) -> str:
        return f"(weights[turn] . ({', '.join(self.rewards)}){' - kl[turn] mean log-ratio' if self.kl else ''})"

    def values(self, view: TokenView) -> Tensor:
        out = torch.zeros_like(view.logp)
        if not bool(view.on.any()):
            return out
        found = self._rewards(view)
        turn = view.batch.turn
        late = view.on & ((turn >= len(self.weights)) | (turn < 0))
        if bool(late.any()):
            where = int(late.nonzero()[0])
            raise ValueError(
                f"stream {view.name!r}: sample {view.batch.sample_ids[int(view.batch.seq[where])]!r} has a turn {int(turn[where])}, but TurnReward has "
                f"weights for {len(self.weights)}"
            )
        d = view.log_ratio(self.to, self.over, "token") if self.kl else out
        for k, row in enumerate(self.weights):
            paid = sum(w * r for w, r in zip(row, found, strict=True) if w)
            value = view.spread(paid) if isinstance(paid, Tensor) else torch.zeros_like(out)
            mine = view.on & (turn == k)
            if self.kl and self.kl[k]:
                own = torch.where(mine, d, 0.0)
                length = view.seq_sum(mine.to(d.dtype)).clamp(min=1)
                value = value - self.kl[k] * view.spread(view.seq_sum(own) / length)
            out = torch.where(mine, value, out)
        return out

    def _rewards(self, view: TokenView) -> list[Tensor]:
        for name in self.rewards:
            column = view.batch.rewards.get(name)
            if column is None or bool(torch.isnan(column[view.member & (view.seq_len() > 0)]).any()):
                raise ValueError(f"stream {view.name!r}: TurnReward needs the reward {name!r} on every answer; the batch has {sorted(view.batch.rewards)}")
        return [view.batch.rewards[name].to(view.logp.dtype) for name in self.rewards]
