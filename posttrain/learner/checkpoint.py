"""A rank's file: float32 weights, optimizer state, step and random state.  Tensors and plain values only, read back without running code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1


def pack(named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``name -> {"weight": tensor, "state": {name: tensor}}`` of the tensors an optimizer steps."""
    return {
        name: {
            "weight": tensor.detach().cpu(),
            "state": {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(tensor, {}).items()},
        }
        for name, tensor in named
    }


@torch.no_grad()
def unpack(saved: dict[str, Any], named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Put back what :func:`pack` took, in place.  Raises ``ValueError`` when a tensor is missing, left over or of another shape."""
    names = [name for name, _ in named]
    if set(saved) != set(names):
        odd = sorted(set(saved) ^ set(names))[0]
        raise ValueError(f"the checkpoint and the model disagree about {odd!r}; was it written with another model or other adapters?")
    for name, tensor in named:
        weight = saved[name]["weight"]
        if weight.shape != tensor.shape:
            raise ValueError(f"the checkpoint's {name!r} has shape {tuple(weight.shape)}, the model's {tuple(tensor.shape)}")
        tensor.copy_(weight)
        optimizer.state.pop(tensor, None)
        state = saved[name]["state"]
        if state:
            # 'step' lives on the CPU for AdamW; moments beside their weight
            optimizer.state[tensor] = {
                k: (v.clone() if k == "step" else v.to(tensor.device, copy=True)) if isinstance(v, Tensor) else v for k, v in state.items()
            }


def file_of(path: str | Path, rank: int) -> Path:
    return Path(path) / f"learner-rank{rank:05d}.pt"


def write(path: str | Path, rank: int, meta: dict[str, Any], content: dict[str, Any]) -> None:
    """Write one rank's file through a temporary name, so that a torn file never carries the final one."""
    file = file_of(path, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    temporary = file.with_suffix(".tmp")
    torch.save({"format": FORMAT, "meta": meta, "rng": rng, **content}, temporary)
    temporary.replace(file)


def read(path: str | Path, rank: int, meta: dict[str, Any]) -> dict[str, Any]:
    """One rank's file, checked against the settings of this run."""
    file = file_of(path, rank)
    if not file.exists():
        count = len(list(Path(path).glob("learner-rank*.pt")))
        raise ValueError(f"no checkpoint of learner rank {rank} in {path} (it holds {count} ranks); resume with learner.world_size={count or 1}")
    found = torch.load(file, map_location="cpu", weights_only=True)
    for key, value in meta.items():
        if found["meta"].get(key) != value:
            raise ValueError(f"the checkpoint in {path} was written with {key}={found['meta'].get(key)!r}, this run has {key}={value!r}; use the same")
    return found


def restore_rng(found: dict[str, Any]) -> None:
    torch.set_rng_state(found["rng"]["cpu"])
    if found["rng"]["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["rng"]["cuda"])
