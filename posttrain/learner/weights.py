"""Weights under their Hugging Face names: merged with adapters, gathered from shards, written to a folder others can load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.learner.model import is_lora, plain

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""A context in which sharded parameters are whole."""

ADAPTER = "default"
EXPERTS = ".experts."


def whole(_: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """:data:`Gather` for parameters that are not sharded."""
    return nullcontext()


@torch.no_grad()
def hf_state(model: nn.Module, gather: Gather = whole, *, published: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every weight as ``(Hugging Face name, CPU copy)``, adapters merged in, one tensor gathered at a time.  Tied weights come once.

    transformers keeps a layer's experts in one tensor; ``published`` cuts it into the tensors that model folders and engines have.  All ranks must
    walk it together when parameters are sharded.
    """
    from transformers.core_model_loading import revert_weight_conversion

    inner = plain(model)
    for name, parameter in inner.named_parameters():
        if ".lora_" in name:
            continue
        layer = inner.get_submodule(name.rsplit(".base_layer.", 1)[0]) if name.endswith(".base_layer.weight") else None
        needed = [parameter] if layer is None else [parameter, *layer.lora_A.parameters(), *layer.lora_B.parameters()]
        with gather(needed):
            tensor = parameter.detach()
            if layer is not None:
                tensor = (tensor.float() + layer.get_delta_weight(ADAPTER).float()).to(tensor.dtype)
            copied = tensor.to("cpu", copy=True)
        own = name.replace(".base_layer.", ".")
        if published and EXPERTS in own:
            yield from ((part, cut.clone()) for part, cut in revert_weight_conversion(inner, {own: copied}).items())
        else:
            yield own, copied


@torch.no_grad()
def adapter_state(model: nn.Module, gather: Gather = whole) -> dict[str, Tensor]:
    """The adapters' own tensors under the wrapper's names."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gather([parameter]):
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def export(model: nn.Module, cfg: Any, path: str | Path, *, write: bool, gather: Gather = whole) -> None:
    """Write a Hugging Face folder: safetensors, config, generation config and tokenizer; with LoRA the merged weights, and ``adapter/``.

    Every rank calls it; only the one with ``write`` touches the disk.
    """
    state = {}
    for name, tensor in hf_state(model, gather):
        if write:
            state[name] = tensor
    adapters = adapter_state(model, gather) if is_lora(model) else {}
    if not write:
        return
    from huggingface_hub import save_torch_state_dict

    path, inner = Path(path), plain(model)
    path.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, path, max_shard_size="5GB", metadata={"format": "pt"})
    inner.config.save_pretrained(path)
    _patch_config(path / "config.json", cfg.dtype)
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.save_pretrained(path)
    save_tokenizer(cfg, path)
    if adapters:
        model.save_pretrained(path / "adapter", state_dict=adapters, safe_serialization=True, save_embedding_layers=False)


def _patch_config(file: Path, dtype: str) -> None:
    """The exported config names the exported dtype and lets others use a key-value cache again."""
    config = json.loads(file.read_text())
    config["dtype"] = dtype
    config["use_cache"] = True
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tokenizer(cfg: Any, path: Path) -> None:
    """Copy the model's tokenizer, with the run's chat template when it set one.  A folder without a tokenizer is left without one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError):
        return
    if cfg.chat_template:
        file = Path(cfg.chat_template)
        tokenizer.chat_template = file.read_text() if len(cfg.chat_template) < 4096 and file.is_file() else cfg.chat_template
    tokenizer.save_pretrained(path)
