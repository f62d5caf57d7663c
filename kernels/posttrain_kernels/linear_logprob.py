"""Log-probability of given tokens straight from hidden states, without ever holding all logits.

``z = (hidden @ weight.T + bias) / temperature``, then per row ``logp = z[target] - logsumexp(z)`` and, when asked,
``entropy = logsumexp(z) - sum_v p_v z_v``.  The rows are cut into chunks; a chunk's logits live only while it is worked on and are computed
again in the backward pass, so memory is ``chunk * V`` instead of ``N * V``.

Letters: ``N`` rows (predictions), ``D`` hidden size, ``V`` vocabulary.  Everything inside runs in float32 (float64 when the hidden states are
float64), whatever the dtype of the inputs; results have that inner dtype.

A logit of ``-inf`` (a masked vocabulary entry) has probability 0 and adds nothing to the entropy or to any gradient.  A target whose logit is
``-inf`` has log-probability ``-inf``.  A row without a single finite logit gives NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK = 1024


def _inner(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    """``[n, V]`` in ``dtype``.  On CUDA half-precision inputs are multiplied as they are and accumulated into float32."""
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    return z if temperature == 1.0 else z / temperature


def _statistics(z: Tensor, need_entropy: bool) -> tuple[Tensor, Tensor | None]:
    lse = torch.logsumexp(z, dim=-1)
    if not need_entropy:
        return lse, None
    p = torch.exp(z - lse[:, None])
    return lse, lse - torch.where(p > 0, p * z, 0.0).sum(-1)


class _Gradients:
    """Of an output layer, added up from those of its logits, a chunk of rows at a time.  ``low``: the type that is multiplied in."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, low: torch.dtype | None = None) -> None:
        dtype = _inner(hidden)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        self.inputs, self.temperature, self.low = (hidden, weight, bias), temperature, low or dtype
        self.hidden = torch.zeros_like(hidden) if want_hidden else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if want_bias and bias is not None else None
        self.multiplied = weight.to(self.low)

    def add(self, rows: slice, grad_z: Tensor) -> None:
        """``grad_z`` ``[n, V]`` is by the logits after the temperature; it is changed."""
        if self.temperature != 1.0:
            grad_z /= self.temperature
        hidden, low = self.inputs[0], grad_z.to(self.low)
        if self.hidden is not None:
            self.hidden[rows] = (low @ self.multiplied).to(hidden.dtype)
        if self.weight is not None:
            self.weight += low.t() @ hidden[rows].to(self.low)
        if self.bias is not None:
            self.bias += grad_z.sum(0)

    def result(self, constants: int) -> tuple[Tensor | None, ...]:
        """What ``backward`` returns: by hidden, weight and bias, in their own types, and None for the other arguments."""
        _, weight, bias = self.inputs
        by_bias = self.bias.to(bias.dtype) if self.bias is not None and bias is not None else None
        return (self.hidden, self.weight.to(weight.dtype) if self.weight is not None else None, by_bias, *(None,) * constants)


class _LinearLogprob(torch.autograd.Function):
    """Forward keeps ``[N]`` numbers only; backward recomputes one chunk of logits at a time.

    ``d logp / d z = onehot - p`` and ``d entropy / d z = -p (log p + entropy)``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int, need_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        n, dtype = hidden.shape[0], _inner(hidden)
        logp, lse = hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)
        entropy = hidden.new_zeros(n if need_entropy else 0, dtype=dtype)
        # CPU: one cast of the weight for all chunks instead of one per chunk
        w = weight if weight.is_cuda else weight.to(dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            z = _logits(hidden[rows], w, bias, temperature, dtype)
            lse[rows], h = _statistics(z, need_entropy)
            logp[rows] = z.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            if h is not None:
                entropy[rows] = h
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.options = (temperature, chunk, need_entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk, need_entropy = ctx.options
        n, dtype = hidden.shape[0], _inner(hidden)
        sums = _Gradients(ctx, hidden, weight, bias, temperature, weight.dtype if weight.is_cuda else None)
        w = weight if weight.is_cuda else weight.to(dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logq = _logits(hidden[rows], w, bias, temperature, dtype) - lse[rows, None]
            p = torch.exp(logq)
            g = grad_logp[rows, None]
            grad_z = -g * p
            if need_entropy:
                grad_z -= torch.where(p > 0, grad_entropy[rows, None] * p * (logq + entropy[rows, None]), 0.0)
            grad_z.scatter_add_(1, targets[rows, None], g)
            sums.add(rows, grad_z)
        return sums.result(4)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor | None, temperature: float, chunk: int) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D] with the same D; got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = [{hidden.shape[0]}]; got {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be greater than 0")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = DEFAULT_CHUNK,
    need_entropy: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``logp[N]`` of ``targets[N]`` under ``softmax((hidden[N, D] @ weight[V, D].T + bias[V]) / temperature)``, and the entropy ``[N]`` in nats.

    Both outputs carry gradient to ``hidden``, ``weight`` and ``bias`` (first order only).  ``chunk`` rows of logits exist at a time.  Raises
    ``ValueError`` on shapes that do not fit and ``IndexError`` on a target outside the vocabulary.
    """
    _check(hidden, weight, targets, temperature, chunk)
    if not targets.is_cuda and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise IndexError(f"a target is outside the vocabulary of {weight.shape[0]}: {int(targets.min())}..{int(targets.max())}")
    logp, entropy = _LinearLogprob.apply(hidden, weight, bias, targets, float(temperature), int(chunk), bool(need_entropy))
    return logp, entropy if need_entropy else None


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, need_entropy: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The naive twin of :func:`linear_logprob`: all logits at once, gradients by autograd.  Finite logits only."""
    dtype = _inner(hidden)
    logq = torch.log_softmax(_logits(hidden.to(dtype), weight.to(dtype), bias, temperature, dtype), dim=-1)
    entropy = -(logq.exp() * logq).sum(-1) if need_entropy else None
    return logq.gather(1, targets[:, None]).squeeze(1), entropy


class _LinearKL(torch.autograd.Function):
    """Both divergences of a chunk at a time; the base distribution is a constant.

    With ``p`` the policy, ``q`` the base: ``d KL(p||q) / d z = p (log p - log q - KL)``, ``d KL(q||p) / d z = p - q``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, base_hidden: Tensor, base_weight: Tensor, base_bias: Tensor | None,
        temperature: float, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, dtype = hidden.shape[0], _inner(hidden)
        reverse, forward = hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logp = torch.log_softmax(_logits(hidden[rows], weight, bias, temperature, dtype), -1)
            logq = torch.log_softmax(_logits(base_hidden[rows], base_weight, base_bias, temperature, dtype), -1)
            p, q = logp.exp(), logq.exp()
            reverse[rows] = torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)
            forward[rows] = torch.where(q > 0, q * (logq - logp), 0.0).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, base_hidden, base_weight, base_bias, reverse)
        ctx.options = (temperature, chunk)
        return reverse, forward

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reverse: Tensor, grad_forward: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, base_hidden, base_weight, base_bias, reverse = ctx.saved_tensors
        temperature, chunk = ctx.options
        n, dtype = hidden.shape[0], _inner(hidden)
        sums = _Gradients(ctx, hidden, weight, bias, temperature)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logp = torch.log_softmax(_logits(hidden[rows], weight, bias, temperature, dtype), -1)
            logq = torch.log_softmax(_logits(base_hidden[rows], base_weight, base_bias, temperature, dtype), -1)
            p = logp.exp()
            asked = (p > 0) & (grad_reverse[rows, None] != 0)  # where the base forbids a token KL(p||q) is infinite, and 0 * inf would spoil KL(q||p)
            grad_z = torch.where(asked, grad_reverse[rows, None] * p * (logp - logq - reverse[rows, None]), 0.0)
            grad_z += grad_forward[rows, None] * (p - logq.exp())
            sums.add(rows, grad_z)
        return sums.result(5)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = DEFAULT_CHUNK,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Full-vocabulary ``(KL(pi || base), KL(base || pi))`` per row, each ``[N]`` in nats, with gradient to ``hidden``, ``weight`` and ``bias``.

    Both distributions use the same ``temperature``.  Nothing flows into the base.  A token the base forbids (``-inf``) but the policy allows
    makes ``KL(pi || base)`` infinite, as it should; ``KL(base || pi)`` and its gradient stay finite.
    """
    _check(hidden, weight, None, temperature, chunk)
    _check(base_hidden, base_weight, None, temperature, chunk)
    if base_hidden.shape[0] != hidden.shape[0] or base_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"policy and base must agree in rows and vocabulary; got {hidden.shape[0]} and {base_hidden.shape[0]} rows, "
            f"{weight.shape[0]} and {base_weight.shape[0]} tokens"
        )
    reverse, forward = _LinearKL.apply(
        hidden, weight, bias, base_hidden.detach(), base_weight.detach(), None if base_bias is None else base_bias.detach(), float(temperature), chunk
    )
    return reverse, forward


def linear_kl_reference(
    hidden: Tensor, weight: Tensor, base_hidden: Tensor, base_weight: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The naive twin of :func:`linear_kl`: all logits at once, gradients by autograd."""
    dtype = _inner(hidden)
    logp = torch.log_softmax(_logits(hidden, weight, None, temperature, dtype), -1)
    logq = torch.log_softmax(_logits(base_hidden, base_weight, None, temperature, dtype), -1).detach()
    return (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)
