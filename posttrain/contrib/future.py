"""Weigh a token by what the policy did to the rest of its answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.loss.mask import _log, _Ratio
from posttrain.loss.reference import number
from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Scalar


@dataclass(frozen=True)
class FutureRatio(_Ratio):
    """Raise the weight of tokens after which the answer has become more likely.

    Equation: ``clamp(exp(f[t]), low, high)`` with ``f[t] = sum_{s >= t} 2**((t - s)/half_life) d[s]`` over this and the later tokens; tokens with a ratio
    above ``ignore`` add nothing.  Where ``A < 0`` and ``r > spare`` it is held in ``[0.8, 1]`` besides.
    Source: FIPO, arXiv 2603.19835, as released; the distance between two tokens counts the stream's own tokens only (our reading).

    ``half_life``: in tokens.  ``low``, ``high``: bounds of the factor, 1 and 1.2 as published, 0.8 and 1.2 with its other option.  ``ignore``: the bound of
    the dual clip beside it.  ``spare``: beyond this ratio a negative advantage is not weighed up.  ``to``, ``over``: the ratio is ``over / to``.

    Wrong when: there is one on-policy update per batch: the factor is 1.
    """

    half_life: float = 32.0
    low: Scalar = 1.0
    high: Scalar = 1.2
    ignore: Scalar = 10.0
    spare: Scalar = 4.0
    to: str = "old"
    over: str = "self"
    level = None
    coupling = "sequence"

    def __post_init__(self) -> None:
        self._check(low=0.0, high=0.0, ignore=0.0, spare=0.0)
        if not self.half_life > 0:
            raise ValueError(f"FutureRatio: half_life={self.half_life} tokens must be above 0")
        if not callable(self.low) and not callable(self.high) and self.low > self.high:
            raise ValueError(f"FutureRatio: low={self.low} is above high={self.high}")

    @property
    def formula(self) -> str:
        bounds = f"{number(self.low)}, {number(self.high)}"
        return (
            f"clamp(exp(sum of later log {self.ratio} with half-life {self.half_life:g}), {bounds}) [ratios above {number(self.ignore)} ignored, "
            f"at most 1 where A < 0 and the ratio exceeds {number(self.spare)}]"
        )

    def log_factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        d = view.log_ratio(self.to, self.over, "token")
        counted = torch.where(d > _log(view.at(self.ignore), "ignore of FutureRatio"), torch.zeros_like(d), d)
        future = view.discounted(counted, 2.0 ** (-1.0 / self.half_life))
        bounded = future.clamp(_log(view.at(self.low), "low of FutureRatio"), _log(view.at(self.high), "high of FutureRatio"))
        spared = (advantage < 0) & (d > _log(view.at(self.spare), "spare of FutureRatio"))
        return torch.where(spared, bounded.clamp(_log(0.8, "spare"), 0.0), bounded)
