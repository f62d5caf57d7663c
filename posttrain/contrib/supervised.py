"""Supervised data weighed by what the model makes of it: by the log-ratio to its start, by its loss, by what is still to come in the answer.

All weights are computed from detached log-probs; where a publication differentiates its weights too, the term gives the whole derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda x: torch.sigmoid(-x),
    "identity": torch.ones_like,
    "pearson": lambda x: 1 - x / 2,
    "hellinger": lambda x: 1 / (1 + x) ** 2,
}


@dataclass(frozen=True)
class RatioSlope:
    """An answer counts by the slope of a function at how far the policy has moved on it.

    Equation: the objective is ``scale f(beta s)``, ``s`` the sum or mean of ``log(pi/pi_to)`` over the answer, so ``A = scale beta f'(beta s)``;
    ``logistic``: ``f = log sigmoid(x)``; ``identity``: ``x``; ``pearson``: ``x - x**2/4``; ``hellinger``: ``x / (1 + x)``.
    Source: ``logistic`` with the mean: MinorSFT, arXiv 2408.10642, in the form of a library (the paper's own coefficient was not read); the others: SFT
    under an f-divergence, arXiv 2507.00018, by the conjugate route (our reading; ``identity`` is total variation, whose term is constant).

    ``shape``: the function.  ``score``: ``mean`` goes with an aggregation by means of tokens, ``sum`` with one by sums.  ``beta``: inverse temperature, not
    comparable between mean and sum.  ``to``: the policy it moves away from.  ``scale``: ``2/beta`` makes ``logistic`` start at maximum likelihood,
    ``1/beta`` the others.

    Wrong when: the answer should be learnt however far the model has moved: ``logistic`` lets go of it, ``pearson`` pushes it down beyond
    ``beta s = 2``.  ``hellinger`` has a pole at ``beta s = -1``: an answer that has become less probable by that much is an error.
    """

    shape: Literal["logistic", "identity", "pearson", "hellinger"] = "logistic"
    score: Literal["mean", "sum"] = "mean"
    beta: float = 0.1
    to: str = "base"
    scale: Scalar = 1.0
    coupling = "sequence"
    live = True

    def __post_init__(self) -> None:
        for key, known in (("shape", tuple(SHAPES)), ("score", ("mean", "sum"))):
            if getattr(self, key) not in known:
                raise ValueError(f"RatioSlope: {key}={getattr(self, key)!r} does not exist; choose from {', '.join(known)}")
        if not self.beta > 0:
            raise ValueError(f"RatioSlope: beta={self.beta} must be above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        f = {"logistic": "sigmoid(-x)", "identity": "1", "pearson": "(1 - x/2)", "hellinger": "1/(1 + x)^2"}[self.shape]
        return f"({number(self.scale)} * {self.beta:g} {f}) [x = {self.beta:g} {self.score} log(pi/pi_{self.to})]"

    def _score(self, view: TokenView) -> Tensor:
        d = view.log_ratio(self.to, level="token")
        return view.seq_sum(d) if self.score == "sum" else view.seq_mean(d)

    def values(self, view: TokenView) -> Tensor:
        x = self.beta * self._score(view)
        if self.shape == "hellinger" and bool((x[view.member] <= -1).any()):
            where = int((view.member & (x <= -1)).nonzero()[0])
            raise FloatingPointError(
                f"stream {view.name!r}: RatioSlope(shape=hellinger) has a pole at beta s = -1, and sample {view.batch.sample_ids[where]!r} is at "
                f"{float(x[where]):.4g}; lower beta"
            )
        return view.spread(view.at(self.scale) * self.beta * SHAPES[self.shape](x))

    def metrics(self, view: TokenView) -> Metrics:
        """How far the policy has moved on an answer: mean ``|s|``."""
        return {"deviation": (float(self._score(view)[view.member].abs().sum()), float(view.member.sum()))}


@dataclass(frozen=True)
class LossSoftmax:
    """Answers share the step by a softmax over how badly they are modelled.

    Equation: ``L_i`` the mean negative log-prob of answer i, ``h = 2 (L - min L) / (max L - min L) - 1`` over the step, ``A_i = N_seq softmax(f(h) / r)_i``;
    ``linupper``: ``f = min(h + 1, 1)``; ``quadratic``: ``f = 1 - h**2``; ``extremes``: ``f = |h|``.
    Source: dynamic loss-based reweighting (ICLR 2025, OpenReview gU4ZgQNsOC); its set is one micro-batch of all ranks, here it is the step.

    ``shape``: who is favoured: all but the easiest, the middle, or both ends.  ``r``: temperature, a number or a schedule; infinity is uniform, as in the
    release's first thousand steps.  The ``N_seq`` makes the weights 1 on average, for ``aggregate.SequenceMeanTokenMean``.

    Wrong when: one answer is an outlier: it sets the range, and all others fall together at -1.
    """

    shape: Literal["linupper", "quadratic", "extremes"] = "linupper"
    r: Scalar = 1.0
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        if self.shape not in ("linupper", "quadratic", "extremes"):
            raise ValueError(f"LossSoftmax: shape={self.shape!r} does not exist; choose from linupper, quadratic, extremes")
        if not callable(self.r) and not self.r > 0:
            raise ValueError(f"LossSoftmax: r={self.r} must be above 0")

    @property
    def formula(self) -> str:
        f = {"linupper": "min(h + 1, 1)", "quadratic": "1 - h^2", "extremes": "|h|"}[self.shape]
        return f"(N_seq softmax({f}/{number(self.r)})) [h = loss scaled to -1..1]"

    def values(self, view: TokenView) -> Tensor:
        view.require_whole("LossSoftmax")
        loss = view.seq_mean(-view.logp)
        here = view.member & (view.seq_len() > 0)
        if not bool(here.any()):
            return torch.zeros_like(view.logp)
        low, high = loss[here].min(), loss[here].max()
        if not bool(torch.isfinite(high)):
            raise FloatingPointError(f"stream {view.name!r}: the loss of an answer is infinite, so no range of losses can be formed")
        h = torch.zeros_like(loss) if bool(high == low) else 2 * (loss - low) / (high - low) - 1
        f = {"linupper": torch.clamp(h + 1, max=1.0), "quadratic": 1 - h**2, "extremes": h.abs()}[self.shape]
        share = torch.softmax(torch.where(here, f / view.at(self.r), -math.inf), 0)
        return view.spread(share * view.totals.sequences)


@dataclass(frozen=True)
class MarginalShare:
    """Several answers to one prompt are right: each counts by its share of the likelihood the policy gives to all of them.

    Equation: the objective of a group is ``(1/beta) log sum_k exp(beta s_k)``, ``s_k`` the log-likelihood of answer k, so ``A_k = softmax(beta s)_k``.
    Source: learning from self-sampled correct and partially-correct programs, arXiv 2205.14318.

    ``beta``: 1 is the marginal likelihood, towards 0 every answer counts alike; above 0.  ``length_norm``: ``s_k`` is the mean over the answer's tokens instead of their
    sum, and so is its derivative: for ``aggregate.GroupSumTokenMean``; without it for ``aggregate.GroupSum``.  A sequence without a group is alone;
    one that nothing is learnt from has no share.

    Wrong when: answers are long and ``beta`` is near 1: the most probable one takes everything (watch ``effective_answers``).
    """

    beta: Scalar = 0.25
    length_norm: bool = False
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        if not callable(self.beta) and not 0 < self.beta <= 1:
            raise ValueError(f"MarginalShare: beta={self.beta} must be above 0 and at most 1")

    @property
    def formula(self) -> str:
        return f"softmax_group({number(self.beta)} {'mean' if self.length_norm else 'sum'} l)"

    def _share(self, view: TokenView) -> Tensor:
        score = view.at(self.beta) * (view.seq_mean(view.logp) if self.length_norm else view.seq_sum(view.logp))
        group, here = view.batch.group, view.seq_len() > 0
        highest = torch.where(group >= 0, view.code_max(group, torch.where(here, score, -math.inf)), score)
        if not bool(torch.isfinite(highest[here]).all()):
            raise FloatingPointError(f"stream {view.name!r}: MarginalShare found a group whose answers are all impossible for the policy")
        weight = torch.where(here, torch.exp(score - highest), 0.0)
        return torch.where(group >= 0, weight / view.code_sum(group, weight).clamp(min=1e-300), weight)

    def values(self, view: TokenView) -> Tensor:
        return view.spread(self._share(view))

    def metrics(self, view: TokenView) -> Metrics:
        """The number of answers that count, per group: exp of the entropy of the shares."""
        share, group = self._share(view), view.batch.group
        entropy = view.code_sum(group, torch.where(share > 0, -share * torch.log(share.clamp(min=1e-300)), 0.0))
        here = view.seq_len() > 0
        grouped = here & (group >= 0)
        size = view.code_count(group, here).clamp(min=1)
        return {"effective_answers": (float((torch.exp(entropy) / size)[grouped].sum()), float((1.0 / size)[grouped].sum()))}


@dataclass(frozen=True)
class SuffixLoss:
    """A token counts by the loss that is still to come in its answer.

    Equation: ``n = -l``, ``C[t] = sum_{s >= t} gamma**(s-t) n[s]``; the loss of an answer is ``sum_t C[t] n[t] / sum_t C[t]``; detached, ``A[t] = C[t] / sum C``.
    Source: IFT, arXiv 2405.11870, which also reads its own predictions (``Stream.own_input``).

    ``gamma``: discount per token, at most 1; at 0 a token counts by its own loss (the release takes plain SFT there).  ``detach``: whether the weights are
    constants; the release differentiates them.  For ``aggregate.SequenceMeanTokenSum``.

    Wrong when: an answer is known by heart: its weights are a ratio of two numbers near 0 (exactly 0 counts as equal weights).
    """

    gamma: float = 0.95
    detach: bool = False
    coupling = "sequence"
    live = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"SuffixLoss: gamma={self.gamma} is a discount, between 0 and 1")

    @property
    def formula(self) -> str:
        return f"d/dl (sum C l / sum C) [C = losses to come, {self.gamma:g} per token{', detached' if self.detach else ''}]"

    def values(self, view: TokenView) -> Tensor:
        n = view.select(-view.logp)
        ahead = view.select(view.discounted(n, self.gamma))
        total = view.spread(view.seq_sum(ahead))
        known = total <= 0
        total = torch.where(known, torch.ones_like(total), total)
        own = ahead / total
        if not self.detach:
            behind, reach = self._behind(view, n), self._behind(view, torch.ones_like(n))
            value = view.spread(view.seq_sum(ahead * n))
            own = own + behind / total - reach * value / total**2
        return torch.where(known, 1.0 / view.spread(view.seq_len()).clamp(min=1), own)

    def _behind(self, view: TokenView, values: Tensor) -> Tensor:
        """``sum_{s <= t} gamma**(t-s) values[s]`` over the stream's tokens, ``[N]``."""
        # d (sum_t C[t] v[t]) / d n[s]: every token hands its value on to the later ones
        out = torch.zeros_like(values)
        order = view.on.nonzero()[:, 0].tolist()
        running, last = 0.0, -1
        for column in order:
            seq = int(view.batch.seq[column])
            running = float(values[column]) + (self.gamma * running if seq == last else 0.0)
            out[column], last = running, seq
        return out


@dataclass(frozen=True)
class OwnLabel:
    """The model's own first choice as a second label beside the given one.

    Equation: ``J += coef log p(argmax)``; with the given labels' stream at ``1 - coef`` this is the cross-entropy to a mixture of the two labels.
    Source: the auxiliary confidence loss of weak-to-strong generalisation, arXiv 2312.09390; its threshold, which makes the hardened labels of a binary
    classifier as frequent as the weak ones, has no counterpart over a vocabulary (our reading).

    ``coef``: the share of the own label, a number or a schedule that rises from 0.  ``streams``, ``aggregation``: as for every regulariser.

    Wrong when: the model knows nothing yet: it is then taught its own guesses.
    """

    coef: Scalar = 0.5
    streams: tuple[str, ...] | None = None
    aggregation: Any = None
    sign = -1.0
    column = "logp_greedy"

    def __post_init__(self) -> None:
        if self.streams is not None:
            object.__setattr__(self, "streams", (self.streams,) if isinstance(self.streams, str) else tuple(self.streams))

    @property
    def formula(self) -> str:
        return f"-{number(self.coef)} * log p(argmax)"


@dataclass(frozen=True)
class DualWeight:
    """Every sample has a tolerance for its loss, and a multiplier that grows while the loss exceeds it.

    Equation: ``A_i = lambda_i``, then ``lambda_i <- max(0, lambda_i + lr (L_i - eps - lambda_i / alpha))`` with ``L_i`` the mean loss of the sample.
    Source: feasible learning, arXiv 2501.14912 (its resilient form; ``alpha`` infinite is the plain one).

    ``eps``: the tolerance in nats per token.  ``alpha``: how much slack costs little; the multiplier of a constant loss settles at ``alpha (L - eps)``.
    ``lr``: step of the multipliers.  ``init``: where they start.  They belong to sample ids and are part of every checkpoint.

    Wrong when: labels are noisy and ``alpha`` is infinite: the multiplier of an unlearnable sample grows for ever.  A sample seen once is weighted by ``init``.
    """

    eps: float = 1e-3
    alpha: float = 2.0
    lr: float = 1.0
    init: float = 1.0
    coupling = "batch"
    live = True
    remembers = True

    def __post_init__(self) -> None:
        if self.eps < 0 or not self.alpha > 0 or not self.lr > 0 or self.init < 0:
            raise ValueError(
                f"DualWeight: eps={self.eps} and init={self.init} must not be negative, alpha={self.alpha} and lr={self.lr} must be above 0"
            )

    @property
    def formula(self) -> str:
        return f"lambda_i [+= {self.lr:g} (L_i - {self.eps:g} - lambda_i/{self.alpha:g}), at least 0]"

    def _weights(self, view: TokenView) -> list[float]:
        return [view.recall(self, name, self.init) if on else 0.0 for name, on in zip(view.batch.sample_ids, view.member.tolist(), strict=True)]

    def values(self, view: TokenView) -> Tensor:
        view.require_whole("DualWeight")
        return view.spread(torch.tensor(self._weights(view), dtype=view.logp.dtype, device=view.logp.device))

    def remember(self, view: TokenView) -> dict[str, float]:
        loss = view.seq_mean(-view.logp).tolist()
        out: dict[str, float] = {}
        for i in view.member.nonzero()[:, 0].tolist():
            name = view.batch.sample_ids[i]
            weight = out.get(name, view.recall(self, name, self.init))
            out[name] = max(0.0, weight + self.lr * (loss[i] - self.eps - weight / self.alpha))
        return out

    def metrics(self, view: TokenView) -> Metrics:
        """The mean multiplier."""
        return {"multiplier": (sum(self._weights(view)), float(view.member.sum()))}
