"""The chunked head against its naive twin, in float64, in bfloat16, and under hostile numbers."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from posttrain_kernels import linear_kl, linear_kl_reference, linear_logprob, linear_logprob_reference
from posttrain_kernels.bench_linear_logprob import compare
from torch import Tensor

kernel = sys.modules["posttrain_kernels.linear_logprob"]  # the package's attribute of that name is the function

N, D, V = 13, 6, 17


def inputs(n: int = N, v: int = V, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (scale * torch.randn(n, D, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(v, D, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, v, (n,))


def results(head: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any) -> list[Tensor]:
    """Both outputs and the gradients of a random mix of them."""
    logp, entropy = head(hidden, weight, targets, bias=bias, need_entropy=True, **options)
    torch.manual_seed(1)
    mix = (torch.randn_like(logp) * logp).sum() + (torch.randn_like(entropy) * entropy).sum()
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    return [logp, entropy, *torch.autograd.grad(mix, wanted)]


@pytest.mark.parametrize("chunk", [1, 4, N, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_parity_in_float64(chunk: int, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs()
    given = bias if with_bias else None
    ours = results(linear_logprob, hidden, weight, given, targets, temperature=temperature, chunk=chunk)
    naive = results(linear_logprob_reference, hidden, weight, given, targets, temperature=temperature)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = inputs(n=5, v=7)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, targets, temperature=0.7, chunk=2, need_entropy=True, bias=b), (hidden, weight, bias)
    )
    base_hidden, base_weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_kl(h, w, base_hidden, base_weight, temperature=0.7, chunk=2, bias=b), (hidden, weight, bias)
    )


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone(which: int) -> None:
    """Only the log-probability, or only the entropy, is differentiated: the other's missing gradient counts as zero."""
    hidden, weight, _, targets = inputs()
    ours = linear_logprob(hidden, weight, targets, chunk=4, need_entropy=True)[which]
    naive = linear_logprob_reference(hidden, weight, targets, need_entropy=True)[which]
    for a, b in zip(torch.autograd.grad(ours.sum(), (hidden, weight)), torch.autograd.grad(naive.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_gets_no_gradient(frozen: int) -> None:
    hidden, weight, _, targets = inputs()
    (hidden, weight)[frozen].requires_grad_(False)
    linear_logprob(hidden, weight, targets, chunk=4)[0].sum().backward()
    assert ((hidden, weight)[frozen].grad is None) and ((hidden, weight)[1 - frozen].grad is not None)


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = inputs()
    seen: list[int] = []
    original = kernel._logits

    def spy(rows: Tensor, *rest: Any) -> Tensor:
        seen.append(rows.shape[0])
        return original(rows, *rest)

    monkeypatch.setattr(kernel, "_logits", spy)
    linear_logprob(hidden, weight, targets, chunk=4)[0].sum().backward()
    assert seen == [4, 4, 4, 1] * 2


def test_bfloat16_is_computed_in_float32() -> None:
    hidden, weight, bias, targets = inputs(dtype=torch.bfloat16)
    ours = results(linear_logprob, hidden, weight, bias, targets, chunk=4)
    exact = results(linear_logprob_reference, *(t.detach().double().requires_grad_() for t in (hidden, weight, bias)), targets)
    assert ours[0].dtype == torch.float32 and ours[2].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[2:], exact[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


def test_no_rows() -> None:
    hidden, weight, bias, targets = inputs(n=0)
    logp, entropy, *grads = results(linear_logprob, hidden, weight, bias, targets)
    assert logp.shape == entropy.shape == (0,)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    reverse, forward = linear_kl(hidden, weight, hidden, weight)
    assert reverse.shape == forward.shape == (0,)


def test_vocabulary_of_one() -> None:
    hidden, weight, bias, targets = inputs(v=1)
    logp, entropy, *grads = results(linear_logprob, hidden, weight, bias, targets)
    assert float(logp.abs().max()) == float(entropy.abs().max()) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in grads)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, bias, targets = inputs(dtype=torch.float32, scale=1e4)
    found = results(linear_logprob, hidden, weight, bias, targets, chunk=4)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    assert float(found[0].min()) < -1e3 and float(found[0].max()) <= 0.0


def test_forbidden_tokens() -> None:
    """A logit of -inf: probability 0, nothing in the entropy, no NaN in any gradient that exists."""
    hidden, weight, bias, targets = inputs()
    bias = bias.detach().clone()
    bias[3] = -math.inf
    targets[targets == 3] = 4
    logp, entropy, grad_hidden, grad_weight = results_without_bias_gradient(hidden, weight, bias, targets)
    keep = [i for i in range(V) if i != 3]
    moved = torch.where(targets > 3, targets - 1, targets)
    naive_logp, naive_entropy = linear_logprob_reference(hidden, weight[keep], moved, need_entropy=True, bias=bias[keep])
    torch.testing.assert_close(logp, naive_logp)
    torch.testing.assert_close(entropy, naive_entropy)
    naive = torch.autograd.grad(naive_logp.sum() + naive_entropy.sum(), (hidden, weight))
    torch.testing.assert_close(grad_hidden, naive[0])
    torch.testing.assert_close(grad_weight, naive[1])
    targets[0] = 3
    assert float(linear_logprob(hidden, weight, targets, bias=bias)[0][0]) == -math.inf


def results_without_bias_gradient(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
    logp, entropy = linear_logprob(hidden, weight, targets, bias=bias, need_entropy=True, chunk=4)
    assert entropy is not None
    return [logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_parity_in_both_directions(temperature: float) -> None:
    hidden, weight, _, _ = inputs()
    base_hidden, base_weight = torch.randn(N, 4, dtype=torch.float64), torch.randn(V, 4, dtype=torch.float64)
    ours = linear_kl(hidden, weight, base_hidden, base_weight, temperature=temperature, chunk=4)
    naive = linear_kl_reference(hidden, weight, base_hidden, base_weight, temperature=temperature)
    assert float(ours[0].min()) > 0 and float((ours[0] - ours[1]).abs().max()) > 1e-3
    for which in (0, 1):
        torch.testing.assert_close(ours[which], naive[which], rtol=1e-9, atol=1e-12)
        a = torch.autograd.grad(ours[which].sum(), (hidden, weight), retain_graph=True)
        b = torch.autograd.grad(naive[which].sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_token_the_base_forbids_makes_one_direction_infinite() -> None:
    """Base probability 0: the forward KL stays finite with a gradient of pi - base, the reverse KL is infinite, as it should be."""
    hidden, weight, _, _ = inputs()
    forbidden = torch.zeros(V, dtype=torch.float64)
    forbidden[3] = -math.inf
    other = (torch.randn(N, 4, dtype=torch.float64), torch.randn(V, 4, dtype=torch.float64))
    for chunk in (2, 100):
        reverse, forward = linear_kl(hidden, weight, *other, chunk=chunk, base_bias=forbidden)
        assert bool((reverse == math.inf).all()) and bool(torch.isfinite(forward).all())
        (found,) = torch.autograd.grad(forward.sum(), hidden)
        p, base = torch.softmax(hidden.detach() @ weight.detach().T, 1), torch.softmax(other[0] @ other[1].T + forbidden, 1)
        torch.testing.assert_close(found, (p - base) @ weight.detach(), rtol=1e-9, atol=1e-12)


def test_kl_to_itself_is_zero_and_flat() -> None:
    hidden, weight, _, _ = inputs()
    both = linear_kl(hidden, weight, hidden.detach(), weight.detach(), chunk=4)
    for kl in both:
        assert float(kl.detach().abs().max()) < 1e-12
        assert float(torch.autograd.grad(kl.sum(), hidden, retain_graph=True)[0].abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "targets must be"),
        ({"targets": torch.full((N,), V)}, IndexError, "outside the vocabulary of 17"),
        ({"targets": torch.full((N,), -1)}, IndexError, "outside the vocabulary of 17"),
        ({"weight": torch.zeros(V, D + 1, dtype=torch.float64)}, ValueError, "same D"),
    ],
)
def test_clear_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, _, targets = inputs()
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(error, match=message):
        linear_logprob(**given)


def test_the_benchmark_runs() -> None:
    line = compare(32, 8, 64, 8, torch.float32, True)
    assert line.split()[0] == "float32" and line.split()[4].endswith("x")
