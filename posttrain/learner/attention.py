"""Attention over a packed row: every sequence attends to itself only, at the price of its own length.

A packed batch is one row ``[1, N]``.  ``packed_sdpa`` is registered with transformers' attention interface; it cuts the row into its
sequences, groups sequences of similar length into one padded call of ``scaled_dot_product_attention`` and puts the results back.  Padding is
on the right and attention is causal, so no real query ever sees it and no mask is built.  Every other layer sees the packed row.

The cut travels as the keyword ``packed_layout`` of the model call.  Keywords are bound when a layer is checkpointed, so the layout is there
again when the layer is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "packed_sdpa"
FLASH = ("flash_attention_2", "flash_attention_3")
_PACKED: ContextVar[bool] = ContextVar("packed row", default=False)


@dataclass(frozen=True)
class Bucket:
    """``index`` ``[num_sequences * length]``: columns of the row, short sequences padded by repeating their last column."""

    index: Tensor
    num_sequences: int
    length: int


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a row are.  ``restore`` ``[N]`` picks the row's columns from the concatenated buckets."""

    buckets: tuple[Bucket, ...]
    restore: Tensor
    num_tokens: int

    @classmethod
    def of(cls, lengths: Tensor, waste: float = 0.15) -> PackedLayout:
        """Layout of a row whose sequences have ``lengths`` ``[S]``.  A bucket's shortest sequence is at least ``1 - waste`` of its longest
        (or 16 shorter), which bounds the padding."""
        device, sizes = lengths.device, lengths.tolist()
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i])
        groups: list[list[int]] = []
        for i in order:
            longest = sizes[groups[-1][0]] if groups else 0
            if groups and sizes[i] >= min((1 - waste) * longest, longest - 16):
                groups[-1].append(i)
            else:
                groups.append([i])
        restore = torch.empty(starts[-1], dtype=torch.int64)
        buckets, offset = [], 0
        for group in groups:
            length = sizes[group[0]]
            rows = torch.arange(length).repeat(len(group), 1)
            size, start = torch.tensor([sizes[i] for i in group])[:, None], torch.tensor([starts[i] for i in group])[:, None]
            real = rows < size
            index = start + torch.minimum(rows, size - 1)
            restore[index[real]] = (offset + torch.arange(rows.numel()).view_as(rows))[real]
            offset += rows.numel()
            buckets.append(Bucket(index.flatten().to(device), len(group), length))
        return cls(tuple(buckets), restore.to(device), starts[-1])


@contextmanager
def packed_row() -> Iterator[None]:
    """Inside, models whose attention is ``packed_sdpa`` build no mask and expect ``packed_layout``."""
    token = _PACKED.set(True)
    try:
        yield
    finally:
        _PACKED.reset(token)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: ``query`` ``[1, H, N, D]``, ``key`` and ``value`` ``[1, H_kv, N, D]`` -> ``[1, N, H, D]``.

    Without ``packed_layout`` it is plain ``sdpa``, so the same model still takes padded batches and generates.  Raises ``ValueError`` for
    features it cannot reproduce (soft-capped logits, attention sinks, two-way attention).
    """
    layout: PackedLayout | None = kwargs.pop("packed_layout", None)
    if layout is None:
        if _PACKED.get():
            raise ValueError(
                f"{type(module).__name__} does not hand keyword arguments to its attention function, so packed rows cannot be cut; "
                "this architecture cannot be trained with packed batches"
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    for feature in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"{NAME} cannot reproduce {feature!r} of {type(module).__name__}; use an accelerator with flash attention")
    if query.shape[0] != 1 or query.shape[2] != layout.num_tokens or key.shape[2] != layout.num_tokens:
        raise ValueError(f"the layout describes one row of {layout.num_tokens} columns; got query {tuple(query.shape)} and key {tuple(key.shape)}")
    window = kwargs.get("sliding_window")
    gqa = query.shape[1] != key.shape[1]
    outputs = []
    for bucket in layout.buckets:
        q, k, v = (_gather(x, bucket) for x in (query, key, value))
        mask = _window_mask(bucket.length, window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    packed = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return packed.index_select(0, layout.restore)[None], None


def _gather(x: Tensor, bucket: Bucket) -> Tensor:
    """``[1, H, N, D]`` -> ``[B, H, L, D]``."""
    rows = x[0].transpose(0, 1).index_select(0, bucket.index)
    return rows.view(bucket.num_sequences, bucket.length, *rows.shape[1:]).transpose(1, 2)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)


def _packed_mask(**kwargs: Any) -> Any:
    """No mask for a packed row; the usual one otherwise."""
    if _PACKED.get():
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**kwargs)


def register() -> str:
    """Make ``packed_sdpa`` known to transformers.  Returns its name.  Calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_sdpa)
    AttentionMaskInterface.register(NAME, _packed_mask)
    return NAME


def choose(requested: str, dtype: torch.dtype) -> str:
    """The implementation for ``requested``.  ``auto``: flash attention's variable-length kernels on a CUDA device that has them (2, else 3)
    and a 16-bit dtype, otherwise ``packed_sdpa``.  Raises ``ValueError`` for one that would attend across sequences."""
    register()
    if requested == "auto":
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        if torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16):
            available = {FLASH[0]: is_flash_attn_2_available, FLASH[1]: is_flash_attn_3_available}
            return next((name for name, there in available.items() if there()), NAME)
        return NAME
    if requested not in (NAME, *FLASH):
        raise ValueError(f"model.attention={requested!r}: packed rows need one of auto, {NAME}, {', '.join(FLASH)}; others would mix sequences")
    return requested


def keywords(implementation: str, lengths: Tensor) -> dict[str, Any]:
    """What the model call needs to keep the sequences of a row apart, by attention implementation."""
    if implementation == NAME:
        return {"packed_layout": PackedLayout.of(lengths)}
    bounds = F.pad(torch.cumsum(lengths, 0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
