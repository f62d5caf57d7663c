"""The chunked Jensen-Shannon divergence and argmax against their naive twins, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from posttrain_kernels import linear_argmax, linear_argmax_reference, linear_jsd, linear_jsd_reference, linear_kl_reference
from torch import Tensor

N, D, V = 9, 5, 17


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return normal(N, D).requires_grad_(), normal(V, D).requires_grad_(), normal(N, 4), normal(V, 4)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_parity(beta: float, temperature: float) -> None:
    hidden, weight, *other = inputs()
    scale = torch.linspace(-1, 2, N, dtype=torch.float64)
    naive = linear_jsd_reference(hidden, weight, *other, beta, temperature=temperature)
    expected = torch.autograd.grad((scale * naive).sum(), (hidden, weight))
    for chunk in (1, 4, 100):
        ours = linear_jsd(hidden, weight, *other, beta, temperature=temperature, chunk=chunk)
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad((scale * ours).sum(), (hidden, weight)), expected, rtol=1e-9, atol=1e-12)


def test_bias_and_forbidden_tokens() -> None:
    """Tokens forbidden to one side or to both: finite, bounded, and the same as without them."""
    hidden, weight, *other = inputs()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    theirs = torch.zeros(V, dtype=torch.float64)
    theirs[3] = -math.inf
    found = linear_jsd(hidden, weight, *other, 0.5, bias=bias, other_bias=theirs, chunk=4)
    grads = torch.autograd.grad(found.sum(), (hidden, weight, bias))
    assert all(bool(torch.isfinite(g).all()) for g in grads) and float(grads[2].abs().max()) > 0
    assert float(found.detach().min()) > 0 and float(found.detach().max()) <= math.log(2)
    both = torch.zeros(V, dtype=torch.float64)
    both[3] = -math.inf
    keep = [i for i in range(V) if i != 3]
    masked = linear_jsd(hidden, weight, *other, 0.5, bias=both, other_bias=both, chunk=4)
    torch.testing.assert_close(masked, linear_jsd_reference(hidden, weight[keep], other[0], other[1][keep], 0.5))
    assert bool(torch.isfinite(torch.autograd.grad(masked.sum(), hidden)[0]).all())


def test_ends_are_the_two_directions() -> None:
    """``D / beta -> KL(q || p)`` as beta -> 0, ``D / (1 - beta) -> KL(p || q)`` as beta -> 1."""
    hidden, weight, *other = (0.3 * x for x in inputs())
    reverse, forward = linear_kl_reference(hidden, weight, *other)
    e = 1e-6
    torch.testing.assert_close(linear_jsd(hidden, weight, *other, e) / e, forward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear_jsd(hidden, weight, *other, 1 - e) / e, reverse, rtol=1e-4, atol=1e-5)


def test_to_itself_is_zero_and_flat() -> None:
    hidden, weight, *_ = inputs()
    own = linear_jsd(hidden, weight, hidden.detach(), weight.detach(), 0.3, chunk=4)
    assert float(own.detach().abs().max()) < 1e-12
    assert float(torch.autograd.grad(own.sum(), hidden)[0].abs().max()) < 1e-12


def test_argmax() -> None:
    hidden, weight, *_ = inputs()
    bias = torch.randn(V, dtype=torch.float64)
    for chunk in (1, 4, 100):
        assert torch.equal(linear_argmax(hidden, weight, chunk=chunk), linear_argmax_reference(hidden, weight))
        assert torch.equal(linear_argmax(hidden, weight, bias=bias, chunk=chunk), linear_argmax_reference(hidden, weight, bias=bias))
    assert len(set(linear_argmax_reference(hidden, weight).tolist())) > 2


def test_clear_errors() -> None:
    hidden, weight, *other = inputs()
    for beta in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            linear_jsd(hidden, weight, *other, beta)
    with pytest.raises(ValueError, match="17 and 16 tokens"):
        linear_jsd(hidden, weight, other[0], other[1][:-1], 0.5)
