"""Pairs compared otherwise: weighed by how likely they are, sorted over the step, cut to their common length, or labelled by the policy itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.loss.advantage import Pairwise
from posttrain.loss.preference import check_beta, check_stream, pair_difference, require_pairs, reward_column, sequence_score
from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class PairProbability:
    """Weigh a pair by how likely the policy finds its two answers: pairs it could have sampled itself count, foreign ones hardly do.

    Equation: ``min(limit, (pbar(chosen) * pbar(rejected))**power)`` with ``pbar = exp(mean of log pi over the answer's tokens)``; aligned to ``sampled`` tokens, the
    mean of ``log pi - log sum_v pi_v**2``.
    Source: WPO, arXiv 2406.11827; its release aligns and has ``limit`` 1.

    ``power``: 1 as published; 0 weighs all pairs alike.  ``alignment``: ``none``, or ``sampled``: a token counts against the expected probability of one that the
    policy samples, so its own pairs weigh about alike, whatever their entropy.  ``limit``: the largest weight, null for none; unaligned weights are at most 1.

    Wrong when: ``alignment=none`` and the pairs were sampled by the policy itself: the weights then only prefer answers of low entropy.  Aligned and without a
    limit, an answer of the most probable tokens of flat distributions weighs up to the size of the vocabulary.
    """

    power: Scalar = 1.0
    alignment: Literal["none", "sampled"] = "none"
    limit: float | None = None
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        if self.alignment not in ("none", "sampled"):
            raise ValueError(f"PairProbability: alignment={self.alignment!r} does not exist; choose none or sampled")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"PairProbability: limit={self.limit} must be above 0, or null for none")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.alignment == "none" else frozenset({"collision"})

    @property
    def formula(self) -> str:
        weight = f"(pbar(chosen) pbar(rejected))^{number(self.power)}"
        aligned = "" if self.alignment == "none" else " [pbar = exp(mean log(pi / sum_v pi_v^2))]"
        return (weight if self.limit is None else f"min({self.limit:g}, {weight})") + aligned

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        require_pairs(view, "PairProbability")
        each = view.logp if self.alignment == "none" else view.logp - view.reference("collision")
        both = pair_difference(view, view.seq_mean(view.select(each)) * view.batch.side)  # signed twice: the sum of the sides
        weight = view.at(self.power) * both
        weight = weight if self.limit is None else weight.clamp(max=math.log(self.limit))
        return view.spread(torch.where(view.in_pair, weight, torch.zeros_like(both)))


@dataclass(frozen=True)
class PairFactor:
    """Weigh a pair by a number known of it.

    Equation: ``plus + R[by]``, with ``R`` the reward column of the chosen answer, on both sides.
    Source: DDPO, arXiv 2503.17126, where the number is the chosen answer's mean distance to the other answers of its prompt.

    ``by``: the reward column.  ``plus``: what is added; 1 weighs an answer like all others once.

    Wrong when: the number is larger for longer answers or for one source of the data: that is then what is preferred.
    """

    by: str = "deviation"
    plus: float = 1.0
    coupling = "group"
    live = True

    @property
    def formula(self) -> str:
        return f"({self.plus:g} + {self.by})"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        factor = self.plus + chosen_column(view, self.by, "PairFactor")
        if bool((view.in_pair & (factor < 0)).any()):
            where = int((view.in_pair & (factor < 0)).nonzero()[0])
            raise ValueError(
                f"stream {view.name!r}: PairFactor is {float(factor[where]):g} on sample {view.batch.sample_ids[where]!r}; it must not be negative"
            )
        return view.spread(factor)


@dataclass(frozen=True)
class SharedLength:
    """A preference pair whose longer answer counts less for what it has beyond the shorter one.

    Equation: ``-log sigmoid(beta h)``, ``h`` the difference of ``sum_t c[t] d[t]``, with ``c = 1`` up to the length of the shorter answer and ``c = beyond``
    after it; ``A[t] = +-beta sigmoid(-beta h) c[t]``.
    Source: LD-DPO, arXiv 2409.06411.

    ``beyond``: 1 is DPO, 0 cuts both answers to one length.  Lengths count the tokens learnt from.  ``to``, ``beta``: as in ``Pairwise``.

    Wrong when: what decides the preference stands at the end of the longer answers.
    """

    beyond: float = 0.5
    to: str = "base"
    beta: Scalar = 0.1
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        check_beta("SharedLength", self.beta, "log_ratio_sum", True)
        if not 0 <= self.beyond <= 1:
            raise ValueError(f"SharedLength: beyond={self.beyond} is a share, between 0 and 1")

    def fits(self, stream: Any) -> None:
        check_stream("SharedLength", "log_ratio_sum", stream, both_sides=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        beta = number(self.beta)
        return f"(-/+ f'(h)) [f = -log sigmoid({beta} h), h = sum log(pi/pi_{self.to}), beyond the shorter answer times {self.beyond:g}]"

    def values(self, view: TokenView) -> Tensor:
        factor, h = self._margin(view)
        beta = view.at(self.beta)
        return view.spread(view.batch.side.to(h.dtype) * beta * torch.sigmoid(-beta * h)) * factor

    def objective(self, view: TokenView) -> Metrics:
        return pair_metrics(view, self._margin(view)[1], lambda x: -logsigmoid(x), view.at(self.beta))

    def _margin(self, view: TokenView) -> tuple[Tensor, Tensor]:
        require_pairs(view, "SharedLength")
        length = view.seq_len()
        longer = pair_difference(view, length)  # chosen minus rejected, on both
        shorter = torch.where(view.batch.side > 0, length - longer.clamp(min=0), length - (-longer).clamp(min=0))
        left = view.discounted(torch.ones_like(view.logp))  # this and the later tokens of the answer
        place = view.spread(length) - left
        factor = torch.where(place < view.spread(shorter), 1.0, self.beyond).to(view.logp.dtype)
        return factor, pair_difference(view, sequence_score(view, "log_ratio_sum", self.to, factor))


@dataclass(frozen=True)
class SortedMargins:
    """Compare the pairs of a step as two distributions: the k-th smallest value on one side with the k-th smallest on the other.

    Equation: ``f = -log sigmoid(beta (u_(k) - v_(k)))``, ``(k)`` the k-th in ascending order over the pairs of the step; ``pairs``: ``u`` the log-prob of the
    chosen less the rejected answer, ``v`` the same under ``to``; ``sides``: ``u`` the chosen answers' log-ratios, ``v`` the rejected ones'.  The weights
    go back along the order.
    Source: AOT, arXiv 2406.05882; released trainers sort within a micro-batch, which for one pair is DPO.

    ``of``: ``pairs`` or ``sides``.  ``to``, ``beta``: as in ``Pairwise``.  The whole step must be seen, so it takes two passes.

    Wrong when: a step holds few pairs: there is no distribution to compare.
    """

    of: Literal["pairs", "sides"] = "pairs"
    to: str = "base"
    beta: Scalar = 0.1
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        if self.of not in ("pairs", "sides"):
            raise ValueError(f"SortedMargins: of={self.of!r} does not exist; choose pairs or sides")
        check_beta("SortedMargins", self.beta, "log_ratio_sum", True)

    def fits(self, stream: Any) -> None:
        check_stream("SortedMargins", "log_ratio_sum", stream, both_sides=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        sides = {"pairs": f"margins of log pi and of log pi_{self.to}", "sides": f"chosen and rejected log(pi/pi_{self.to})"}[self.of]
        return f"(-/+ f'(x)) [f = -log sigmoid({number(self.beta)} x), x = differences of sorted {sides}]"

    def values(self, view: TokenView) -> Tensor:
        beta, out = view.at(self.beta), torch.zeros(view.num_sequences, dtype=view.logp.dtype, device=view.logp.device)
        if not bool(view.on.any()):
            return view.spread(out)
        x, chosen, rejected = self._compared(view)
        push = beta * torch.sigmoid(-beta * x)
        out[chosen], out[rejected] = push, -push
        return view.spread(out)

    def objective(self, view: TokenView) -> Metrics:
        if not bool(view.on.any()):
            return {"preference_loss": (0.0, 0.0)}
        x, _, _ = self._compared(view)
        return {"preference_loss": (float(-logsigmoid(view.at(self.beta) * x).sum()), float(len(x)))}

    def _compared(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
        """Differences by rank, and the chosen and the rejected sequence that each rank pushes."""
        view.require_whole("SortedMargins")
        require_pairs(view, "SortedMargins")
        batch = view.batch
        sides = [(view.in_pair & (batch.side == s)).nonzero()[:, 0] for s in (1, -1)]
        chosen, rejected = (found[torch.argsort(batch.pair[found])] for found in sides)
        if self.of == "sides":
            ratio = sequence_score(view, "log_ratio_sum", self.to)
            up, down = torch.argsort(ratio[chosen], stable=True), torch.argsort(ratio[rejected], stable=True)
            chosen, rejected = chosen[up], rejected[down]
            return ratio[chosen] - ratio[rejected], chosen, rejected
        own, ratio = sequence_score(view, "logp_sum", ""), sequence_score(view, "log_ratio_sum", self.to)
        now = pair_difference(view, own)[chosen]
        was = now - pair_difference(view, ratio)[chosen]
        order = torch.argsort(now, stable=True)
        return now[order] - torch.sort(was).values, chosen[order], rejected[order]


@dataclass(frozen=True)
class LogisticExponential:
    """A preference pair under a loss that is logistic for wrong margins and exponential for right ones.

    Equation: with ``x = beta h`` and ``g = sigmoid(x / tau)``: ``f = -(1 - g) log sigmoid(x) + g exp(-x)``, formed in log space.
    Source: DiscoPOP, arXiv 2406.08414: found by search, not derived.

    ``tau``: how sharply one form gives way to the other.  ``to``, ``beta``: as in ``Pairwise``.

    Wrong when: convexity is relied on: at ``tau = 0.05`` the loss *rises* for ``x`` in about (-0.11, 0.07), so the first step from the reference lowers
    margins.
    """

    tau: float = 0.05
    to: str = "base"
    beta: Scalar = 0.1
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        check_beta("LogisticExponential", self.beta, "log_ratio_sum", True)
        if not self.tau > 0:
            raise ValueError(f"LogisticExponential: tau={self.tau} must be above 0")

    def fits(self, stream: Any) -> None:
        check_stream("LogisticExponential", "log_ratio_sum", stream, both_sides=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        beta = number(self.beta)
        f = f"-(1-g) log sigmoid({beta} h) + g exp(-{beta} h), g = sigmoid({beta} h/{self.tau:g})"
        return f"(-/+ f'(h)) [f = {f}, h = sum log(pi/pi_{self.to}), chosen - rejected]"

    def values(self, view: TokenView) -> Tensor:
        h, beta = self._margin(view), view.at(self.beta)
        return view.spread(-view.batch.side.to(h.dtype) * beta * self.slope(beta * h))

    def objective(self, view: TokenView) -> Metrics:
        return pair_metrics(view, self._margin(view), self.loss, view.at(self.beta))

    def _margin(self, view: TokenView) -> Tensor:
        require_pairs(view, "LogisticExponential")
        return pair_difference(view, sequence_score(view, "log_ratio_sum", self.to))

    def loss(self, x: Tensor) -> Tensor:
        up, down = logsigmoid(x / self.tau), logsigmoid(-x / self.tau)
        return -torch.exp(down) * logsigmoid(x) + torch.exp(up - x)

    def slope(self, x: Tensor) -> Tensor:
        """``df/dx``; the products are formed in log space, because ``exp(-x)`` overflows where ``g`` is 0."""
        up, down = logsigmoid(x / self.tau), logsigmoid(-x / self.tau)
        turn = torch.exp(up + down) / self.tau  # dg/dx
        right = torch.exp(up + down - x) / self.tau - torch.exp(up - x)
        return turn * logsigmoid(x) - torch.exp(down) * torch.sigmoid(-x) + right


@dataclass(frozen=True)
class SteeperPairs:
    """A pairwise loss whose inverse temperature is the pair's own.

    Equation: ``beta -> beta (1 + R[by])``, with ``R`` the reward column of the chosen answer.
    Source: the released code of DDPO and DORPO, arXiv 2503.17126, puts the deviation of an answer from the others inside the log-sigmoid; the paper
    describes a weight on the loss, which is a token weight of the data.

    ``inner``: the pairwise loss.  ``by``: the reward column, not negative.

    Wrong when: a weight is meant: a steeper loss saturates earlier.
    """

    inner: Pairwise = field(default_factory=Pairwise)
    by: str = "deviation"
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        if callable(self.inner.beta):
            raise ValueError("SteeperPairs: inner.beta must be a number, so that each pair can have its own")

    def fits(self, stream: Any) -> None:
        self.inner.fits(stream)

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def formula(self) -> str:
        return f"{self.inner.formula} with beta times (1 + {self.by})"

    def values(self, view: TokenView) -> Tensor:
        h, _, slope = self.inner._margin(view)
        outer = self.inner._slope(h, self._beta(view), self.inner._offset(view), self.inner._label(view))  # type: ignore[arg-type]
        return view.spread(-view.batch.side.to(h.dtype) * outer * slope)

    def objective(self, view: TokenView) -> Metrics:
        h, _, _ = self.inner._margin(view)
        loss = self.inner._loss(h, self._beta(view), self.inner._offset(view), self.inner._label(view))  # type: ignore[arg-type]
        chosen = view.in_pair & (view.batch.side > 0)
        pairs = float(chosen.sum())
        return {"preference_loss": (float(loss[chosen].sum()), pairs), "accuracy": (float((h[chosen] > 0).sum()), pairs)}

    def _beta(self, view: TokenView) -> Tensor:
        steeper = 1.0 + chosen_column(view, self.by, "SteeperPairs")
        if bool((view.in_pair & (steeper <= 0)).any()):
            raise ValueError(
                f"stream {view.name!r}: SteeperPairs.by={self.by} is -1 or less on a chosen answer; the loss would be turned round"
            )
        return view.at(self.inner.beta) * steeper


@dataclass(frozen=True)
class SelfLabelled:
    """A pairwise loss whose labels give way to the policy's own opinion, pair by pair, each time a pair is seen.

    Equation: ``f = -y log sigmoid(x) - (1 - y) log sigmoid(-x)``; after the step ``y <- (1 - rate) y + rate sigmoid(x)``, from ``y = 1``.
    Source: iterative data smoothing, arXiv 2401.16335, there for a reward model; its rate is unverified.

    ``inner``: the logistic pairwise loss.  ``rate``: 0 keeps hard labels.  A pair is known by the sample id of its chosen answer, and one number per pair
    seen is kept in the run's memory and its checkpoints.

    Wrong when: pairs are never seen twice: the labels then stay hard.
    """

    inner: Pairwise = field(default_factory=Pairwise)
    rate: float = 0.1
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"SelfLabelled: rate={self.rate} is a share, between 0 and 1")
        if self.inner.f != "logistic" or self.inner.label is not None or self.inner.label_smoothing:
            raise ValueError("SelfLabelled: inner must be a logistic Pairwise without label and label_smoothing: the labels are kept here")

    def fits(self, stream: Any) -> None:
        self.inner.fits(stream)

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def remembers(self) -> bool:
        return self.rate > 0

    @property
    def formula(self) -> str:
        return f"{self.inner.formula} with labels y <- {1 - self.rate:g} y + {self.rate:g} sigmoid(x)"

    def values(self, view: TokenView) -> Tensor:
        h, _, slope = self.inner._margin(view)
        outer = self.inner._slope(h, view.at(self.inner.beta), self.inner._offset(view), self._labels(view))
        return view.spread(-view.batch.side.to(h.dtype) * outer * slope)

    def objective(self, view: TokenView) -> Metrics:
        metrics = self.inner.objective(view)
        h, _, _ = self.inner._margin(view)
        x, y = view.at(self.inner.beta) * h - self.inner._offset(view), self._labels(view)
        loss = -y * logsigmoid(x) - (1 - y) * logsigmoid(-x)
        chosen = view.in_pair & (view.batch.side > 0)
        return {**metrics, "preference_loss": (float(loss[chosen].sum()), float(chosen.sum()))}

    def remember(self, view: TokenView) -> dict[str, float]:
        h, _, _ = self.inner._margin(view)
        x, y = view.at(self.inner.beta) * h - self.inner._offset(view), self._labels(view)
        new = (1 - self.rate) * y + self.rate * torch.sigmoid(x)
        chosen = (view.in_pair & (view.batch.side > 0)).nonzero()[:, 0].tolist()
        return {view.batch.sample_ids[i]: float(new[i]) for i in chosen}

    def _labels(self, view: TokenView) -> Tensor:
        """The label of each sequence's pair, ``[S]``."""
        chosen = view.in_pair & (view.batch.side > 0)
        kept = [view.recall(self, name, 1.0) if here else 0.0 for name, here in zip(view.batch.sample_ids, chosen.tolist(), strict=True)]
        return pair_difference(view, torch.tensor(kept, dtype=view.logp.dtype, device=view.logp.device))


def chosen_column(view: TokenView, name: str, what: str) -> Tensor:
    """The chosen answer's reward column, on both sides of its pair, ``[S]``."""
    require_pairs(view, what)
    chosen = view.in_pair & (view.batch.side > 0)
    return pair_difference(view, reward_column(view, name, chosen, f"{what}.by"))


def pair_metrics(view: TokenView, h: Tensor, loss: Any, beta: float) -> Metrics:
    """Loss, ranking accuracy and margin per pair, as ``Pairwise`` reports them."""
    chosen = view.in_pair & (view.batch.side > 0)
    pairs, h = float(chosen.sum()), h[chosen]
    return {
        "preference_loss": (float(loss(beta * h).sum()), pairs),
        "margin": (beta * float(h.sum()), pairs),
        "accuracy": (float((h > 0).sum()), pairs),
    }
