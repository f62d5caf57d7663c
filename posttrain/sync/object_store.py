"""Weights through Ray's object store: flat buckets of bytes, written once by the learner and read without a copy by every engine on the
node.

A bucket is one array and an index of what lies where.  Ray keeps such an array out of its pickles, so an engine reads straight from shared
memory; bfloat16, which numpy does not know, travels as its bytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.sync.fingerprint import Fingerprint, fingerprint_tensor

ALIGN = 64


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its bucket.  ``offset`` is in bytes and a multiple of 64."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Bucket:
    """``data`` is uint8; ``index`` lists the tensors in it."""

    index: tuple[Entry, ...]
    data: np.ndarray

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the tensors.  They may lie in read-only shared memory: copy from them, never write to them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            whole = torch.from_numpy(self.data)
        for entry in self.index:
            dtype = getattr(torch, entry.dtype)
            size = math.prod(entry.shape) * dtype.itemsize
            yield entry.name, whole[entry.offset : entry.offset + size].view(dtype).view(entry.shape)


def pack(named: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = 256 * 2**20, dtype: torch.dtype | None = None) -> Iterator[Bucket]:
    """Fill buckets of about ``bucket_bytes`` one after the other, so that at most one is in memory here.  ``dtype`` is the engine's;
    floating tensors are cast to it.  A tensor larger than a bucket gets one of its own."""
    waiting: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        tensor = tensor.detach().to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        if waiting and size + tensor.nbytes > bucket_bytes:
            yield _bucket(waiting)
            waiting, size = [], 0
        waiting.append((name, tensor))
        size += tensor.nbytes + ALIGN
    if waiting:
        yield _bucket(waiting)


def _bucket(named: Sequence[tuple[str, Tensor]]) -> Bucket:
    index, end = [], 0
    for name, tensor in named:
        index.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        end += -(-tensor.nbytes // ALIGN) * ALIGN
    data = np.zeros(max(end, ALIGN), dtype=np.uint8)
    for entry, (_, tensor) in zip(index, named, strict=True):
        data[entry.offset : entry.offset + tensor.nbytes] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return Bucket(tuple(index), data)


def put(
    named: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = 256 * 2**20, dtype: torch.dtype | None = None
) -> tuple[list[Any], Fingerprint]:
    """Put all tensors into Ray's object store.  Returns the object references and the fingerprint of what was put (in ``dtype``).

    Weights live in the store until the last reference is dropped: keep those of the newest version only.
    """
    import ray

    refs, prints = [], {}
    for bucket in pack(named, bucket_bytes=bucket_bytes, dtype=dtype):
        prints.update({name: fingerprint_tensor(tensor) for name, tensor in bucket})
        refs.append(ray.put(bucket))
    return refs, prints


def read(buckets: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of buckets in any of their forms: object references, :class:`Bucket`, or plain mappings of name to tensor."""
    for bucket in buckets:
        if not isinstance(bucket, (Bucket, Mapping)):
            import ray

            bucket = ray.get(bucket)
        yield from bucket.items() if isinstance(bucket, Mapping) else bucket
