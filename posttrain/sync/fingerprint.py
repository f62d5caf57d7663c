"""A number per tensor that two holders of the same weights agree on, however the weights are laid out.

``fingerprint`` is the wrap-around int64 sum of the bit patterns (float32 read as int32, bfloat16 and float16 as int16, float64 as int64) and the
number of elements.  Sums add: the fingerprint of a fused tensor is the sum of its parts', whatever their order.  Any single changed element
changes it.  Both sides must hash the same dtype, the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Fingerprint = dict[str, tuple[int, int]]

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def fingerprint_tensor(tensor: Tensor) -> tuple[int, int]:
    """``(numel, sum64)`` of one tensor.  Raises ``ValueError`` for a dtype that has no bit pattern here."""
    if tensor.dtype not in _BITS:
        raise ValueError(f"cannot fingerprint {tensor.dtype}; use one of {', '.join(str(d)[6:] for d in _BITS)}")
    bits = tensor.detach().contiguous().view(_BITS[tensor.dtype])
    return tensor.numel(), int(bits.sum(dtype=torch.int64))


def fingerprint(named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Hugging Face name -> ``(numel, sum64)``."""
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return {name: fingerprint_tensor(tensor) for name, tensor in pairs}
