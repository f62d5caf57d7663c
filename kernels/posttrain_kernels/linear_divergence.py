"""The Jensen-Shannon divergence of two output layers straight from hidden states, a chunk of logits at a time.

With ``p`` the policy, ``q`` the other, ``m = beta q + (1 - beta) p``: ``D = beta KL(q || m) + (1 - beta) KL(p || m)``.  Letters and
numerics as in :mod:`posttrain_kernels.linear_logprob`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain_kernels.linear_logprob import DEFAULT_CHUNK, _check, _Gradients, _inner, _logits


def _mixed(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p > 0, p * log_ratio, 0.0)


class _LinearJSD(torch.autograd.Function):
    """``d D / d z = (1 - beta) p (g - sum_v p_v g_v)`` with ``g = log p - log m``; the other distribution is a constant."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, other_hidden: Tensor, other_weight: Tensor, other_bias: Tensor | None,
        beta: float, temperature: float, chunk: int,
    ) -> Tensor:  # fmt: skip
        n, dtype = hidden.shape[0], _inner(hidden)
        out = hidden.new_empty(n, dtype=dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logp = torch.log_softmax(_logits(hidden[rows], weight, bias, temperature, dtype), -1)
            logq = torch.log_softmax(_logits(other_hidden[rows], other_weight, other_bias, temperature, dtype), -1)
            logm = _mixed(logp, logq, beta)
            out[rows] = (beta * _times(logq.exp(), logq - logm) + (1 - beta) * _times(logp.exp(), logp - logm)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, other_hidden, other_weight, other_bias)
        ctx.options = (beta, temperature, chunk)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, other_hidden, other_weight, other_bias = ctx.saved_tensors
        beta, temperature, chunk = ctx.options
        n, dtype = hidden.shape[0], _inner(hidden)
        sums = _Gradients(ctx, hidden, weight, bias, temperature)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logp = torch.log_softmax(_logits(hidden[rows], weight, bias, temperature, dtype), -1)
            logq = torch.log_softmax(_logits(other_hidden[rows], other_weight, other_bias, temperature, dtype), -1)
            p = logp.exp()
            pg = _times(p, logp - _mixed(logp, logq, beta))
            grad_z = (1 - beta) * grad[rows, None] * (pg - p * pg.sum(-1, keepdim=True))
            sums.add(rows, grad_z)
        return sums.result(6)


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    chunk: int = DEFAULT_CHUNK,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
) -> Tensor:
    """The divergence per row, ``[N]`` in nats, with gradient to ``hidden[N, D]``, ``weight[V, D]`` and ``bias[V]``; nothing flows into the other.

    It never exceeds ``-beta log beta - (1 - beta) log(1 - beta)``, whatever is forbidden to whom.  Raises ``ValueError`` on shapes that do not fit
    and on a ``beta`` outside (0, 1).
    """
    _check(hidden, weight, None, temperature, chunk)
    _check(other_hidden, other_weight, None, temperature, chunk)
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; it must lie between 0 and 1 (at the ends the divergence is 0; use linear_kl)")
    if other_hidden.shape[0] != hidden.shape[0] or other_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"the two must agree in rows and vocabulary; got {hidden.shape[0]} and {other_hidden.shape[0]} rows, "
            f"{weight.shape[0]} and {other_weight.shape[0]} tokens"
        )
    constants = (other_hidden.detach(), other_weight.detach(), None if other_bias is None else other_bias.detach())
    return _LinearJSD.apply(hidden, weight, bias, *constants, float(beta), float(temperature), int(chunk))


def linear_jsd_reference(
    hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor, beta: float, *, temperature: float = 1.0
) -> Tensor:
    """The naive twin of :func:`linear_jsd`: all logits at once, gradients by autograd."""
    dtype = _inner(hidden)
    p = torch.softmax(_logits(hidden, weight, None, temperature, dtype), -1)
    q = torch.softmax(_logits(other_hidden, other_weight, None, temperature, dtype), -1).detach()
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
