"""The KL to a stored distribution against its naive twin and the card's numbers: a bucket for the rest, gradients, rounding, missing rows."""

from __future__ import annotations

import math

import pytest
import torch
from posttrain_kernels import linear_kl_reference, linear_stored_kl, linear_stored_kl_reference
from torch import Tensor

N, D, V, K = 7, 5, 13, 4
F64 = torch.float64


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, the K most probable tokens of another layer with their log-probs, and its whole rows."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=draw, dtype=F64).requires_grad_() for shape in ((N, D), (V, D)))
    rows = torch.log_softmax(2 * torch.randn(N, V, generator=draw, dtype=F64), -1)
    logq, ids = rows.topk(K, -1)
    return hidden, weight, ids, logq, rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("which", [0, 1])
def test_parity(which: int, temperature: float) -> None:
    hidden, weight, ids, logq, _ = inputs()
    scale = torch.linspace(-1, 2, N, dtype=F64)
    naive = linear_stored_kl_reference(hidden, weight, ids, logq, temperature=temperature)[which]
    expected = torch.autograd.grad((scale * naive).sum(), (hidden, weight))
    for chunk in (1, 3, 100):
        ours = linear_stored_kl(hidden, weight, ids, logq, temperature=temperature, chunk=chunk)[which]
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad((scale * ours).sum(), (hidden, weight)), expected, rtol=1e-9, atol=1e-12)


def identity(p: list[float]) -> tuple[Tensor, Tensor]:
    """A layer whose distribution is ``p``."""
    return torch.tensor([[math.log(x) for x in p]], dtype=F64).requires_grad_(), torch.eye(len(p), dtype=F64)


def test_the_bucket_sees_what_the_named_tokens_do_not() -> None:
    """The whole KL is 1.758, with the bucket 1.758, renormalised 0, truncated -0.220."""
    hidden, weight = identity([0.05, 0.05, 0.45, 0.45])
    ids, logq = torch.tensor([[0, 1]]), torch.tensor([[0.45, 0.45]], dtype=F64).log()
    reverse, forward = linear_stored_kl(hidden, weight, ids, logq)
    assert float(forward) == pytest.approx(1.758, abs=1e-3) == float(reverse)
    assert float((logq.exp() * (logq - math.log(0.05))).sum()) > 1.9, "the named tokens alone"


def test_it_never_exceeds_the_whole_divergence_and_is_it_for_all_tokens() -> None:
    hidden, weight, ids, logq, rows = inputs(1)
    whole = linear_kl_reference(hidden, weight, rows, torch.eye(V, dtype=F64))
    for ours, all_of_it in zip(linear_stored_kl(hidden, weight, ids, logq), whole, strict=True):
        assert bool((ours <= all_of_it + 1e-12).all()) and float((all_of_it - ours).max()) > 1e-3
    every = torch.arange(V).expand(N, V)
    for ours, all_of_it in zip(linear_stored_kl(hidden, weight, every, rows), whole, strict=True):
        torch.testing.assert_close(ours, all_of_it, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_at_the_stored_distribution_there_is_no_gradient(which: int) -> None:
    p = [0.4, 0.3, 0.2, 0.1]
    hidden, weight = identity(p)
    ids, logq = torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.3]], dtype=F64).log()
    found = linear_stored_kl(hidden, weight, ids, logq)[which]
    assert float(found) == pytest.approx(0.0, abs=1e-12)
    assert float(torch.autograd.grad(found.sum(), hidden)[0].abs().max()) < 1e-12
    moved, _ = identity([0.2, 0.5, 0.2, 0.1])
    grad = torch.autograd.grad(linear_stored_kl(moved, weight, ids, logq)[1].sum(), moved)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.2 - 0.4, 0.5 - 0.3, 0.0, 0.0]], dtype=F64), rtol=0, atol=1e-12), "forward: pi - T"


def test_rounded_probabilities_and_missing_entries() -> None:
    """Half-precision storage may add up to more than 1; a short row is padded with -1; a row without entries is silent."""
    hidden, weight, ids, logq, _ = inputs(2)
    over = logq - torch.logsumexp(logq, -1, keepdim=True) + 1e-3
    for found in linear_stored_kl(hidden, weight, ids, over):
        assert bool(torch.isfinite(found).all())
        assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(found.sum(), (hidden, weight), retain_graph=True))
    short, nothing = ids.clone(), ids.clone()
    short[0, 2:], nothing[0] = -1, -1
    for which in (0, 1):
        cut = linear_stored_kl(hidden, weight, ids[:1, :2].repeat(N, 1), logq[:1, :2].repeat(N, 1))[which][0]
        torch.testing.assert_close(linear_stored_kl(hidden, weight, short, logq)[which][0], cut)
        silent = linear_stored_kl(hidden, weight, nothing, logq)[which]
        assert float(silent[0]) == 0.0
        assert float(torch.autograd.grad(silent[0], hidden, retain_graph=True)[0].abs().max()) == 0.0


def test_bias_and_a_forbidden_token() -> None:
    hidden, weight, ids, logq, _ = inputs(3)
    bias = torch.randn(V, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with_bias = linear_stored_kl(hidden, weight, ids, logq, bias=bias)
    same = linear_stored_kl(torch.cat([hidden, torch.ones(N, 1, dtype=F64)], 1), torch.cat([weight, bias[:, None]], 1), ids, logq)
    torch.testing.assert_close(with_bias, same)
    assert float(torch.autograd.grad(with_bias[0].sum(), bias)[0].abs().max()) > 0
    forbidden = torch.zeros(V, dtype=F64)
    forbidden[next(i for i in range(V) if i not in ids[0].tolist())] = -math.inf
    reverse, _ = linear_stored_kl(hidden, weight, ids[:1].repeat(N, 1), logq[:1].repeat(N, 1), bias=forbidden)
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(reverse.sum(), (hidden, weight)))


@pytest.mark.parametrize("shape", [(N, K + 1), (N + 1, K), (N,)])
def test_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    hidden, weight, ids, _, _ = inputs()
    with pytest.raises(ValueError, match=r"ids and logq must both be \[N, K\]"):
        linear_stored_kl(hidden, weight, ids, torch.zeros(shape, dtype=F64))
