"""The KL of an output layer to a distribution that was stored: its most probable tokens, and one bucket for the rest.

With ``q_k`` the stored probabilities, ``q_r`` what is left of 1, ``p_k`` and ``p_r`` the policy's: ``forward = sum_k q_k log(q_k / p_k) + q_r log(q_r / p_r)``,
``reverse`` the same with p and q exchanged.  Neither exceeds the KL over the whole vocabulary.  Without the bucket, a policy that puts everything on other tokens
would pay nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain_kernels.linear_logprob import DEFAULT_CHUNK, _check, _Gradients, _inner, _logits

REST = 1e-8
"""The least that is left for the bucket: a stored distribution that claims everything would make the reverse KL infinite."""


def _stored(ids: Tensor, logq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``(there [n, K], q [n, K], q_r [n])``; the sum of all is 1.  Entries with id -1 are not there."""
    there = ids >= 0
    q = torch.where(there, logq.to(dtype).exp(), 0.0)
    total = q.sum(-1, keepdim=True)
    q = torch.where(total > 1 - REST, q * (1 - REST) / total.clamp(min=REST), q)
    return there, q, 1 - q.sum(-1)


def _both(logp: Tensor, ids: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """``log p_k`` ``[n, K]`` and ``log p_r`` ``[n]`` from whole rows."""
    at = ids.clamp(min=0)
    named = torch.where(there, logp.gather(-1, at), -torch.inf)
    rest = logp.clone()
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    rest[rows[there], at[there]] = -torch.inf
    return named, torch.logsumexp(rest, -1)


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p > 0, p * log_ratio, 0.0)


def _log(q: Tensor) -> Tensor:
    return torch.log(torch.where(q > 0, q, 1.0))


class _LinearStored(torch.autograd.Function):
    """``d forward / dz = p - t``, ``t`` the stored distribution with its bucket shared out as p does; ``d reverse / dz = p (g - reverse)`` with
    ``g = log p - log q`` of the token or of the bucket."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, logq: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        n, dtype = hidden.shape[0], _inner(hidden)
        reverse, forward = hidden.new_zeros(n, dtype=dtype), hidden.new_zeros(n, dtype=dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            there, q, q_rest = _stored(ids[rows], logq[rows], dtype)
            named, rest = _both(torch.log_softmax(_logits(hidden[rows], weight, bias, temperature, dtype), -1), ids[rows], there)
            bucket = torch.where(torch.isneginf(rest), 0.0, _times(q_rest, _log(q_rest) - rest))  # no token is left for it
            forward[rows] = _times(q, _log(q) - named).sum(-1) + bucket
            reverse[rows] = _times(named.exp(), named - _log(q)).sum(-1) + _times(rest.exp(), rest - _log(q_rest))
        known = (ids >= 0).any(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, logq, reverse)
        ctx.options = (temperature, chunk)
        return torch.where(known, reverse, 0.0), torch.where(known, forward, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reverse: Tensor, grad_forward: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logq, reverse = ctx.saved_tensors
        temperature, chunk = ctx.options
        n, dtype = hidden.shape[0], _inner(hidden)
        sums = _Gradients(ctx, hidden, weight, bias, temperature)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            there, q, q_rest = _stored(ids[rows], logq[rows], dtype)
            logp = torch.log_softmax(_logits(hidden[rows], weight, bias, temperature, dtype), -1)
            named, rest = _both(logp, ids[rows], there)
            p, at = logp.exp(), ids[rows].clamp(min=0)
            # the bucket's value everywhere, then the named tokens' own
            target = p * (q_rest / rest.exp().clamp(min=torch.finfo(dtype).tiny))[:, None]
            gap = (rest - _log(q_rest))[:, None].expand_as(p).clone()
            where = torch.arange(len(at), device=at.device)[:, None].expand_as(at)[there]
            target[where, at[there]] = q[there]
            gap[where, at[there]] = (named - _log(q))[there]
            grad_z = grad_forward[rows, None] * (p - target) + grad_reverse[rows, None] * _times(p, gap - reverse[rows, None])
            grad_z = torch.where(there.any(-1, keepdim=True), grad_z, 0.0)
            sums.add(rows, grad_z)
        return sums.result(4)


def linear_stored_kl(
    hidden: Tensor, weight: Tensor, ids: Tensor, logq: Tensor, *, temperature: float = 1.0, chunk: int = DEFAULT_CHUNK, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(reverse[N], forward[N])`` in nats to the distributions ``ids[N, K]``, ``logq[N, K]`` (id -1: no entry; a row without any gives 0), with gradient
    to ``hidden[N, D]``, ``weight[V, D]`` and ``bias[V]``.

    Probabilities that add up to more than 1, as rounded ones do, are scaled.  Raises ``ValueError`` on shapes that do not fit.
    """
    _check(hidden, weight, None, temperature, chunk)
    if ids.shape != logq.shape or ids.ndim != 2 or len(ids) != len(hidden):
        raise ValueError(f"ids and logq must both be [N, K] = [{len(hidden)}, K]; got {tuple(ids.shape)} and {tuple(logq.shape)}")
    return _LinearStored.apply(hidden, weight, bias, ids, logq.detach(), float(temperature), int(chunk))


def linear_stored_kl_reference(hidden: Tensor, weight: Tensor, ids: Tensor, logq: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The naive twin of :func:`linear_stored_kl`, row by row, gradients by autograd; every row must have all its entries."""
    dtype = _inner(hidden)
    p = torch.softmax(_logits(hidden, weight, None, temperature, dtype), -1)
    reverse, forward = [], []
    for row, named, log_named in zip(p, ids, logq.to(dtype), strict=True):
        q = log_named.exp()
        ours, theirs = torch.cat([row[named], (1 - row[named].sum())[None]]), torch.cat([q, (1 - q.sum())[None]]).detach()
        reverse.append((ours * (ours / theirs).log()).sum())
        forward.append((theirs * (theirs / ours).log()).sum())
    return torch.stack(reverse), torch.stack(forward)
