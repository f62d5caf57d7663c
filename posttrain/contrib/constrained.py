"""Rewards under constraints: what a judge forbids is worth nothing, and so is what drifts too far from the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from posttrain.loss.preference import reward_column
from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class DriftDiscounted:
    """A reward that fades as the whole answer drifts from a reference policy, less its mean over the step.

    Equation: ``A_i = R_i d_i - mean_j R_j d_j``, ``d_i = min(most, max(0, 1 - log(pi/pi_to)(y_i) / limit))``, without gradient; the log-ratio is summed over the answer.
    Source: CGPO's constrained policy gradient, arXiv 2409.20370, section 4.1.1, where ``R`` is a calibrated reward that is 0 when a constraint judge says no.  That
    the mean is over all answers of the step, forbidden ones included, is our reading; no release was read.

    ``limit``: the drift, in nats, from which an answer is worth nothing; a number or a schedule.  ``most``: the largest factor; null leaves it open, as published:
    an answer that drifted the other way is then worth more than its reward.  ``center``: whether the mean is subtracted: without it a forbidden answer
    weighs 0, with it it is pushed down.  ``of``: the reward column.  ``to``: the policy to stay near.

    Wrong when: rewards can be negative: a drift then makes a bad answer better.
    """

    limit: Scalar = 10.0
    most: float | None = None
    center: bool = True
    of: str = "reward"
    to: str = "base"
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        if not callable(self.limit) and not float(self.limit) > 0:  # type: ignore[arg-type]
            raise ValueError(f"DriftDiscounted: limit={self.limit} must be above 0")
        if self.most is not None and not self.most > 0:
            raise ValueError(f"DriftDiscounted: most={self.most} must be above 0, or null for no bound")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to}) - {"self"}

    @property
    def formula(self) -> str:
        bound = "" if self.most is None else f", at most {self.most:g}"
        return f"({self.of} * max(0, 1 - log(pi/pi_{self.to})/limit{bound}){' - mean' if self.center else ''})"

    def values(self, view: TokenView) -> Tensor:
        view.require_whole("DriftDiscounted")
        reward = reward_column(view, self.of, view.member, "DriftDiscounted.of")
        drift = view.seq_sum(view.log_ratio(self.to, level="token"))
        share = (1.0 - drift / view.at(self.limit)).clamp(min=0.0, max=math.inf if self.most is None else self.most)
        paid = reward * share
        count = int(view.member.sum())
        return view.spread(paid - paid[view.member].sum() / count if self.center and count else paid)
