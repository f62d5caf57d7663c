"""The fingerprint: bits, not values; sums of parts; every element counts."""

from __future__ import annotations

import pytest
import torch

from posttrain.sync.fingerprint import fingerprint, fingerprint_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parts_add_up_in_any_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8, 4).to(dtype), torch.randn(6, 4).to(dtype)
    whole, parts = fingerprint_tensor(torch.cat([k, q])), [fingerprint_tensor(t) for t in (q, k)]
    assert whole[0] == sum(n for n, _ in parts) and (whole[1] - sum(s for _, s in parts)) % 2**64 == 0  # the sum wraps around
    assert fingerprint_tensor(q.t()) == parts[0]


def test_one_bit_shows() -> None:
    tensor = torch.zeros(1000)
    changed = tensor.clone()
    changed[617] = -0.0
    assert fingerprint_tensor(tensor) == (1000, 0) != fingerprint_tensor(changed)
    nan = torch.full((3,), float("nan"))
    assert fingerprint_tensor(nan) == fingerprint_tensor(nan.clone())


def test_known_numbers() -> None:
    assert fingerprint([("one", torch.ones(2))]) == {"one": (2, 2 * 0x3F800000)}
    assert fingerprint({"minus": -torch.ones(1, dtype=torch.bfloat16)}) == {"minus": (1, 0xBF80 - 0x10000)}
    assert fingerprint({"none": torch.empty(0)}) == {"none": (0, 0)}


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot fingerprint torch.int64"):
        fingerprint_tensor(torch.ones(2, dtype=torch.int64))
