"""The most probable token of every row straight from hidden states, a chunk of logits at a time.  Letters as in
:mod:`posttrain_kernels.linear_logprob`."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_kernels.linear_logprob import DEFAULT_CHUNK, _check, _inner, _logits


@torch.no_grad()
def linear_argmax(hidden: Tensor, weight: Tensor, *, chunk: int = DEFAULT_CHUNK, bias: Tensor | None = None) -> Tensor:
    """``argmax_v (hidden[N, D] @ weight[V, D].T + bias[V])``, int64 ``[N]``; the first of equals.  Without gradient.

    Raises ``ValueError`` on shapes that do not fit.
    """
    _check(hidden, weight, None, 1.0, chunk)
    out = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, min(start + chunk, hidden.shape[0]))
        out[rows] = _logits(hidden[rows], weight, bias, 1.0, _inner(hidden)).argmax(-1)
    return out


def linear_argmax_reference(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The naive twin of :func:`linear_argmax`: all logits at once."""
    logits = hidden.to(_inner(hidden)) @ weight.to(_inner(hidden)).t()
    return (logits if bias is None else logits + bias).argmax(-1)
