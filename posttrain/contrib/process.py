"""Rewards for single tokens, read off the log-probs of another model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class ImplicitProcessReward:
    """The outcome's advantage plus returns-to-go of a reward that each token earns from the ratio of two models.

    Equation: ``r[t] = beta (log pi_num[t] - log pi_den[t])``; in a group of k answers ``c[t] = k/(k-1) r[t] - 1/(k-1) sum_j mean(r_j)``, a leave-one-out
    baseline in every token's reward; ``A[t] = outcome * A + process * sum_{s >= t} c[s]``.
    Source: PRIME, arXiv 2502.01456, as released; there the sum is whitened over the step (``advantage.Whiten`` around this term) and the model ``num``
    is trained online on the outcomes.

    ``num``: the implicit process reward model, trained on outcomes (the loss ``implicit_prm``), scored as ``teacher``.  ``den``: what it was compared
    with in that training.  ``beta``: the same as there.  ``outcome``, ``process``: shares of the two parts, numbers or schedules.  The column should
    hold a leave-one-out advantage.

    Wrong when: ``num`` was trained at another ``beta`` or against another ``den``; or the outcome is already part of the column *and* of ``num``'s
    training data: it then counts twice.
    """

    num: str = "teacher"
    den: str = "base"
    beta: float = 0.05
    outcome: Scalar = 5.0
    process: Scalar = 5.0
    coupling = "group"
    live = True
    reads_column = True

    def __post_init__(self) -> None:
        if self.num == self.den:
            raise ValueError(f"ImplicitProcessReward: the ratio of {self.num} to itself is 1; name two different models")
        if not self.beta > 0:
            raise ValueError(f"ImplicitProcessReward: beta={self.beta} must be above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.num, self.den}) - {"self"}

    @property
    def formula(self) -> str:
        ratio = f"{self.beta:g} log(pi_{self.num}/pi_{self.den})"
        return f"({number(self.outcome)} A + {number(self.process)} sum_to_go loo({ratio}))"

    def values(self, view: TokenView) -> Tensor:
        reward = self.beta * view.log_ratio(self.den, self.num, "token")
        group = view.batch.group
        size = view.code_count(group, view.member)
        alone = view.member & (size < 2)
        if bool(alone.any()):
            sample = view.batch.sample_ids[int(alone.nonzero()[0])]
            raise ValueError(
                f"stream {view.name!r}: ImplicitProcessReward compares the answers of a group, but sample {sample!r} is alone; raise rollout.n"
            )
        k = size.clamp(min=2).to(reward.dtype)
        baseline = view.code_sum(group, view.seq_mean(reward)) / (k - 1)
        centred = view.spread(k / (k - 1)) * reward - view.spread(baseline)
        column = view.select(view.batch.advantage.to(reward.dtype))
        return view.at(self.outcome) * column + view.at(self.process) * view.discounted(view.select(centred))

    def metrics(self, view: TokenView) -> Metrics:
        """The implicit reward of an answer: the sum of its tokens' rewards."""
        total = view.seq_sum(self.beta * view.log_ratio(self.den, self.num, "token"))
        return {"implicit_reward": (float(total[view.member].sum()), float(view.member.sum()))}
