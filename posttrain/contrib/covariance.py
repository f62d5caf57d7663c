"""Which tokens drive the entropy down: those where advantage and log-probability are both high.  A mask and a penalty on them.

The covariance of a token is ``(A[t] - mean A) (l[t] - mean l)``, with means over the stream's tokens of the whole step; the release takes them
over a micro-batch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.loss.reference import number
from posttrain.loss.view import TokenView
from posttrain.mixture.schedule import Scalar


def covariance(view: TokenView, advantage: Tensor) -> Tensor:
    """``[N]``; 0 outside the stream."""
    count = max(int(view.on.sum()), 1)
    centred = [view.select(x - view.select(x).sum() / count) for x in (advantage.to(view.logp.dtype), view.logp)]
    return centred[0] * centred[1]


def _check_share(term: Any) -> None:
    if not callable(term.share) and not 0 <= term.share <= 1:
        raise ValueError(f"{type(term).__name__}: share={term.share} is a part of the step's tokens, between 0 and 1")


@dataclass(frozen=True)
class CovarianceDrop:
    """Drop a few of the tokens whose covariance lies in a window, drawn at random.

    Equation: 0 on ``max(1, floor(share N_tok))`` tokens drawn from those with ``low < cov[t] < high``, 1 elsewhere.
    Source: Clip-Cov, arXiv 2505.22617.

    ``share``: of the step's tokens; 0 drops none, any more drops at least one.  ``low``, ``high``: the window.  ``seed``: of the draw, which
    depends on the sample, the place in it and the progress of the run, not on how the batch is cut.  ``clip``: a mask whose dropped tokens are
    not drawn, such as the clip of the same stream.

    Wrong when: advantages are not of order 1: the window is one of ``A`` times nats.
    """

    share: Scalar = 2e-4
    low: Scalar = 1.0
    high: Scalar = 5.0
    seed: int = 0
    clip: Any = None
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        _check_share(self)
        if not callable(self.low) and not callable(self.high) and not self.low < self.high:
            raise ValueError(f"CovarianceDrop: low={self.low} must be below high={self.high}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(getattr(self.clip, "needs", ()))

    @property
    def formula(self) -> str:
        return f"drop({number(self.share)} of tokens, cov(A, log pi) in ({number(self.low)}, {number(self.high)}))"

    def factor(self, view: TokenView, advantage: Tensor) -> Tensor:
        view.require_whole("CovarianceDrop")
        cov, share, keep = covariance(view, advantage), view.at(self.share), torch.ones_like(view.logp)
        inside = view.on & (cov > view.at(self.low)) & (cov < view.at(self.high))
        if self.clip is not None:
            inside &= self.clip.factor(view, advantage) > 0
        columns = sorted(inside.nonzero()[:, 0].tolist(), key=lambda column: self._lot(view, column))
        keep[columns[: max(int(share * int(view.on.sum())), 1) if share > 0 else 0]] = 0.0
        return keep

    def _lot(self, view: TokenView, column: int) -> int:
        batch = view.batch
        where = f"{self.seed}/{batch.progress!r}/{batch.sample_ids[int(batch.seq[column])]}/{int(batch.positions[column])}"
        return zlib.crc32(where.encode())


@dataclass(frozen=True)
class CovariancePenalty:
    """Hold the tokens of highest covariance near a recorded policy.

    Equation: ``coef * |l - log pi_to|`` on the ``max(1, floor(share N_tok))`` tokens of highest covariance; derivative ``coef * sign(l - log pi_to)``.
    Source: KL-Cov, arXiv 2505.22617.  It is published without a clip.

    ``coef``: 1 in the release's function, 0.1 in its settings.  ``share``: of the step's tokens; 0 takes none.  ``to``: the policy.  ``streams``,
    ``aggregation``: as in the other regularisers.

    Wrong when: the stream's advantage is not the batch's column: the covariance is that of the column.
    """

    coef: Scalar = 1.0
    share: Scalar = 2e-4
    to: str = "old"
    streams: tuple[str, ...] | None = None
    aggregation: Any = None
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        _check_share(self)
        names = (self.streams,) if isinstance(self.streams, str) else self.streams
        object.__setattr__(self, "streams", None if names is None else tuple(names))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to})

    @property
    def formula(self) -> str:
        return f"{number(self.coef)} * |log(pi/pi_{self.to})| on the top {number(self.share)} of cov(A, log pi)"

    def gradient(self, view: TokenView) -> Tensor:
        return self._chosen(view) * torch.sign(view.log_ratio(self.to, level="token"))

    def value(self, view: TokenView) -> Tensor:
        return self._chosen(view) * view.log_ratio(self.to, level="token").abs()

    def penalty(self, view: TokenView) -> Tensor:
        return self.value(view)

    def _chosen(self, view: TokenView) -> Tensor:
        view.require_whole("CovariancePenalty")
        cov, share, count = covariance(view, view.batch.advantage).detach(), view.at(self.share), int(view.on.sum())
        chosen = torch.zeros_like(view.logp)
        if share > 0 and count:
            top = torch.topk(torch.where(view.on, cov, -torch.inf), min(max(int(share * count), 1), count)).indices
            chosen[top] = 1.0
        return chosen
