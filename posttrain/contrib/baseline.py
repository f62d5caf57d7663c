"""A baseline for every place of an answer, from how much of the gradient's noise the answers to the same prompt have gathered up to there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.loss.advantage import Column
from posttrain.loss.unified import COUPLINGS, declared
from posttrain.loss.view import Metrics, TokenView


@dataclass(frozen=True)
class TokenBaseline:
    """The return from a token on, less the mean over the group of the returns from its place on, answers of larger gradient counting more.

    Equation: ``A[i,t] = G[i,t] - B[t]``, ``B[t] = sum_i G[i,t] W[i,t] / sum_i W[i,t]``, ``W[i,t] = sum_{s <= t} (1 - 2 pi[i,s] + sum_v pi_v[i,s]**2)``: the squared
    distance of the distribution from the token drawn, which is that of the gradient by the logits.  The sums over ``i`` are over those answers of the group that
    have a ``t``-th token to learn.
    Source: the optimal token baseline, arXiv 2602.07078, and verl.  Where every ``W`` is 0 the plain mean is taken [our reading]; verl divides by ``sum W + 1e-8``.

    ``inner``: the advantage term that gives ``G``; what it gives may be of any level, because a number added to a whole group cancels.  ``alone``: what an answer
    is compared with behind the end of all others of its group: ``own``, the formula, is its own return, so its last tokens learn nothing; ``zero`` is no
    baseline there, as verl has it for dialogues with tools.  A group of one is alone everywhere (verl: no baseline).

    Both ``pi`` and ``sum_v pi_v**2`` (the column ``collision``) are those of the policy before this step; verl keeps those before the first step of a batch.
    Places count the tokens that are learnt, so a tool's output takes none.  Left out: verl multiplies ``W`` by squared truncated importance weights.

    Wrong when: few answers are long, and ``alone=own``: what only one of them reaches, its end included, is not learnt.  The baseline holds the answer's own return:
    a bias that falls with the size of the group.
    """

    inner: Any = field(default_factory=Column)
    alone: Literal["own", "zero"] = "own"
    live = True

    def __post_init__(self) -> None:
        if self.alone not in ("own", "zero"):
            raise ValueError(f"TokenBaseline: alone={self.alone!r} does not exist; choose own or zero")

    @property
    def needs(self) -> frozenset[str]:
        return declared(self.inner, "needs") | {"collision"}

    @property
    def coupling(self) -> str:
        return max("group", declared(self.inner, "coupling"), key=COUPLINGS.index)

    @property
    def contexts(self) -> frozenset[str]:
        return declared(self.inner, "contexts")

    @property
    def reads_column(self) -> bool:
        return getattr(self.inner, "reads_column", False)

    @property
    def formula(self) -> str:
        inner = getattr(self.inner, "formula", type(self.inner).__name__) or "1"
        rest = "" if self.alone == "own" else ", B_t = 0 where one answer is alone"
        return f"({inner} - B_t) [B_t = sum_i W {inner} / sum_i W over the group, W = sum_{{s<=t}} (1 - 2 pi + sum_v pi_v^2){rest}]"

    def values(self, view: TokenView) -> Tensor:
        returns, place, _, single = self._places(view)
        out = torch.zeros_like(view.logp)
        if not len(place):
            return out
        weight = view.running(energy(view))[view.on]
        # measured from the smallest at its place: a group of equal returns then gives exactly 0
        least = torch.full((int(place.max()) + 1,), torch.inf, dtype=returns.dtype, device=returns.device)
        above = returns - least.scatter_reduce(0, place, returns, "amin")[place]
        weight = torch.where(_total(place, weight) > 0, weight, torch.ones_like(weight))
        centred = above - _total(place, weight * above) / _total(place, weight)
        out[view.on] = torch.where(single, returns, centred) if self.alone == "zero" else centred
        return out

    def metrics(self, view: TokenView) -> Metrics:
        """The share of tokens at places that no other answer of the group reaches."""
        _, _, count, single = self._places(view)
        own = self.inner.metrics(view) if hasattr(self.inner, "metrics") else {}
        return {**own, "alone": (float(single.sum()), float(len(count)))}

    def _places(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every token of the stream: its return, the number of its place in its group, how many answers reach that, and whether it is but one."""
        group = view.batch.group
        without = (view.seq_len() > 0) & (group < 0)
        if bool(without.any()):
            sample = view.batch.sample_ids[int(without.nonzero()[0])]
            raise ValueError(f"stream {view.name!r}: TokenBaseline compares the answers of a group; sample {sample!r} is in none")
        nth = view.running(torch.ones_like(view.logp)).round().to(torch.int64)
        key = (view.spread(group) * (view.batch.num_tokens + 1) + nth)[view.on]
        _, place, counts = torch.unique(key, return_inverse=True, return_counts=True)
        return view.select(self.inner.values(view))[view.on], place, counts[place], counts[place] == 1


def energy(view: TokenView) -> Tensor:
    """``(1 - pi)**2 + sum_{v other} pi_v**2``, ``[N]``: the squared norm of the gradient of ``log pi`` by the logits.  Not negative, also where rounding
    makes ``sum_v pi_v**2`` less than ``pi**2``."""
    p, both = (torch.exp(x.clamp(max=0.0)) for x in (view.logp, view.reference("collision")))
    return (1.0 - p) ** 2 + (both - p**2).clamp(min=0.0)


def _total(place: Tensor, values: Tensor) -> Tensor:
    """The sum of what shares a place, on each of them."""
    total = torch.zeros(int(place.max()) + 1, dtype=values.dtype, device=values.device)
    return total.index_add(0, place, values)[place]
