"""How likely two draws from a row's distribution are the same token, straight from hidden states, a chunk of logits at a time.  Letters as in
:mod:`posttrain_kernels.linear_logprob`.

``log sum_v p_v**2 = logsumexp(2 (z - logsumexp(z)))``: 0 where one token is certain, ``-log V`` where all are alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain_kernels.linear_logprob import DEFAULT_CHUNK, _check, _Gradients, _inner, _logits


class _LinearCollision(torch.autograd.Function):
    """With ``q_v = p_v**2 / sum_u p_u**2``: ``d log sum_v p_v**2 / d z = 2 (q - p)``.  Backward recomputes one chunk of logits at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk: int) -> Tensor:
        n, dtype = hidden.shape[0], _inner(hidden)
        out = hidden.new_empty(n, dtype=dtype)
        w = weight if weight.is_cuda else weight.to(dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            # normalised before it is doubled: the difference of two log-sum-exps would cancel
            out[rows] = torch.logsumexp(2.0 * torch.log_softmax(_logits(hidden[rows], w, bias, temperature, dtype), -1), -1)
        ctx.save_for_backward(hidden, weight, bias, out)
        ctx.options = (temperature, chunk)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, collision = ctx.saved_tensors
        temperature, chunk = ctx.options
        n, dtype = hidden.shape[0], _inner(hidden)
        sums = _Gradients(ctx, hidden, weight, bias, temperature, weight.dtype if weight.is_cuda else None)
        w = weight if weight.is_cuda else weight.to(dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logp = torch.log_softmax(_logits(hidden[rows], w, bias, temperature, dtype), -1)
            sums.add(rows, 2.0 * grad[rows, None] * (torch.exp(2.0 * logp - collision[rows, None]) - logp.exp()))
        return sums.result(2)


def linear_collision(hidden: Tensor, weight: Tensor, *, temperature: float = 1.0, chunk: int = DEFAULT_CHUNK, bias: Tensor | None = None) -> Tensor:
    """``log sum_v p_v**2`` of every row, ``[N]``, with ``p = softmax((hidden[N, D] @ weight[V, D].T + bias[V]) / temperature)``, and gradient to
    ``hidden``, ``weight`` and ``bias`` (first order only).  ``chunk`` rows of logits exist at a time.

    Raises ``ValueError`` on shapes that do not fit.
    """
    _check(hidden, weight, None, temperature, chunk)
    out: Tensor = _LinearCollision.apply(hidden, weight, bias, float(temperature), int(chunk))
    return out


def linear_collision_reference(hidden: Tensor, weight: Tensor, *, temperature: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The naive twin of :func:`linear_collision`: all probabilities at once, gradients by autograd.  Finite logits only."""
    dtype = _inner(hidden)
    p = torch.softmax(_logits(hidden.to(dtype), weight.to(dtype), bias, temperature, dtype), -1)
    return (p * p).sum(-1).log()
