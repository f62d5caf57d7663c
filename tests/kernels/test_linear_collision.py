"""How likely two draws agree, from hidden states: against a plain softmax in float64, in chunks, in bfloat16, and under hostile numbers."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from posttrain_kernels import linear_collision, linear_collision_reference
from torch import Tensor

kernel = sys.modules["posttrain_kernels.linear_collision"]  # the package's attribute of that name is the function

N, D, V = 13, 6, 17


def inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    made = (scale * torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64), torch.randn(V, dtype=torch.float64))
    return tuple(t.to(dtype).requires_grad_() for t in made)  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [1, 4, N, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_parity_in_float64(chunk: int, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias = inputs()
    given = bias if with_bias else None
    ours = linear_collision(hidden, weight, temperature=temperature, chunk=chunk, bias=given)
    with torch.no_grad():
        z = (hidden @ weight.T + (bias if with_bias else 0.0)) / temperature
        torch.testing.assert_close(ours.detach(), (torch.softmax(z, 1) ** 2).sum(1).log(), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(ours, torch.logsumexp(2 * z, 1) - torch.logsumexp(z, 1)), "the normaliser counts twice"
    naive = linear_collision_reference(hidden, weight, temperature=temperature, bias=given)
    torch.manual_seed(1)
    mix, wanted = torch.randn_like(naive), [t for t in (hidden, weight, given) if t is not None]
    for a, b in zip(torch.autograd.grad((mix * ours).sum(), wanted), torch.autograd.grad((mix * naive).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, bias = inputs()
    assert torch.autograd.gradcheck(lambda h, w, b: linear_collision(h, w, temperature=0.7, chunk=2, bias=b), (hidden[:3], weight[:5], bias[:5]))


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = inputs()
    seen: list[int] = []
    real = kernel._logits

    def counted(rows: Tensor, *rest: object) -> Tensor:
        seen.append(len(rows))
        return real(rows, *rest)

    monkeypatch.setattr(kernel, "_logits", counted)
    linear_collision(hidden, weight, chunk=4).sum().backward()
    assert seen == [4, 4, 4, 1] * 2


def test_nothing_is_kept_without_gradient() -> None:
    hidden, weight, _ = inputs()
    with torch.no_grad():
        assert linear_collision(hidden, weight).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, bias = (t.detach() for t in inputs(dtype))
    ours = linear_collision(hidden, weight, bias=bias, chunk=4)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), linear_collision_reference(hidden.double(), weight.double(), bias=bias.double()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("height", [1e4, 1e30])
def test_hostile_logits(dtype: torch.dtype, height: float) -> None:
    """A certain token, tokens alike, forbidden tokens; large logits do not overflow, and their normaliser does not cancel."""
    weight = torch.eye(4, dtype=dtype)
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf], dtype=dtype)
    hidden = torch.tensor([[height, 0, 0, 0], [height, height, 0, 0], [0, 0, 0, 0], [-height, -height, -height, 0]], dtype=dtype)
    hidden.requires_grad_()
    found = linear_collision(hidden, weight, bias=bias)
    torch.testing.assert_close(found.detach(), torch.tensor([0.0, -math.log(2), -math.log(3), -math.log(3)], dtype=dtype), rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    assert bool(torch.isfinite(grad).all()) and not bool(grad[:, 3].any())


def test_bounds() -> None:
    """Between ``log 1/V`` and 0, and no less than twice the log-prob of any token."""
    hidden, weight, bias = (t.detach() for t in inputs(scale=3.0))
    found = linear_collision(hidden, weight, bias=bias)
    likeliest = torch.log_softmax(hidden @ weight.T + bias, 1).max(1).values
    assert bool(((found >= -math.log(V)) & (found <= 0) & (found >= 2 * likeliest) & (found <= likeliest)).all())


def test_no_rows_and_wrong_shapes() -> None:
    hidden, weight, _ = inputs()
    assert linear_collision(hidden[:0], weight).shape == (0,)
    with pytest.raises(ValueError, match="same D"):
        linear_collision(hidden, weight[:, :3])
