"""Reading and writing the weights inside a vLLM model under their Hugging Face names.

On CPU, vLLM packs every linear layer into a kernel's own layout and throws the original away: the weights can then neither be read back (no
fingerprint) nor written in place, and its reload leaves a tied ``lm_head`` with the pack of the old embedding.  The loader registered here
keeps the plain weights instead, so that *the tensor that is hashed is the tensor the matrix product reads*.  It does the same for the experts of a
mixture: they are multiplied one after the other, from the weights as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.sync.base import SyncError, check_names

PLAIN = "posttrain_plain"


def register_plain_loader() -> str:
    """Register the safetensors loader that leaves CPU linears unpacked; returns its name for ``load_format``."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if PLAIN in _LOAD_FORMAT_TO_MODEL_LOADER:
        return PLAIN

    @register_model_loader(PLAIN)
    class PlainLoader(DefaultModelLoader):
        def __init__(self, load_config: Any) -> None:
            super().__init__(replace(load_config, load_format="safetensors"))

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            for module in model.modules():
                module._cpu_skip_gemm_dispatch = True  # vLLM's own switch: UnquantizedLinearMethod then keeps the weight
                if getattr(module, "experts_cls", None) is not None:
                    module.experts_cls = plain_experts()
            super().load_weights(model, model_config)

    return PLAIN


@functools.cache
def plain_experts() -> type:
    """The CPU's experts without its packed layout: one product per expert that any token chose, with the weights that are loaded and hashed."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    functional = torch.nn.functional
    gates = {
        MoEActivation.SILU: functional.silu,
        MoEActivation.GELU: functional.gelu,
        MoEActivation.GELU_TANH: functools.partial(functional.gelu, approximate="tanh"),
    }

    class PlainExperts(CPUUnquantizedExperts):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            if self.moe_config.activation not in gates:
                raise SyncError(f"experts with the activation {self.moe_config.activation} cannot be updated on a CPU engine; this model needs a GPU engine")

        def apply(self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, activation: Any,
                  *_: Any, apply_router_weight_on_input: bool = False, **__: Any) -> None:  # fmt: skip
            total = torch.zeros(output.shape, dtype=torch.float32)
            for expert in topk_ids.unique().tolist():
                rows, slots = torch.where(topk_ids == expert)
                bias = [None if b is None else b[expert].to(hidden_states.dtype) for b in (self.w1_bias, self.w2_bias)]
                gate, up = functional.linear(hidden_states[rows], w1[expert], bias[0]).chunk(2, -1)
                found = functional.linear(gates[activation](gate) * up, w2[expert], bias[1])
                scale = 1.0 if apply_router_weight_on_input else topk_weights[rows, slots, None].float()
                total.index_add_(0, rows, found.float() * scale)
            output.copy_(total)

    return PlainExperts


def unpack_heads(model: nn.Module) -> None:
    """Make embeddings and ``lm_head`` multiply with the weight they hold: vLLM packs a copy of them whatever the switch says."""
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = torch.nn.functional.linear
        if getattr(module, "weight", None) is not None and module.weight.numel() == 0:
            raise SyncError(
                f"{type(module).__name__} keeps its weight in a packed form that cannot be updated or verified; this model needs a GPU "
                "engine"
            )


def named_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``(Hugging Face name, view)`` of every parameter: fused projections and experts cut into their parts, vocabulary padding cut off, tied
    tensors once."""
    packed = getattr(model, "packed_modules_mapping", None) or {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        parent, _, leaf = module_name.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if name in ("w13_weight", "w2_weight"):
                yield from _experts(module_name.removesuffix(".routed_experts"), module, name, parameter.data)
                continue
            sizes = getattr(module, "output_partition_sizes", None)
            parts = packed.get(leaf)
            if parts and sizes and len(parts) == len(sizes) and parameter.shape[0] == sum(sizes):
                for part, view in zip(parts, parameter.data.split(list(sizes)), strict=True):
                    yield f"{parent}.{part}.{name}" if parent else f"{part}.{name}", view
                continue
            data = parameter.data
            if hasattr(module, "org_vocab_size") and data.shape[0] > module.org_vocab_size:
                data = data[: module.org_vocab_size]
            yield f"{module_name}.{name}" if module_name else name, data


def _experts(path: str, module: Any, name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of every expert: ``w13_weight`` ``[E, 2 I, D]`` holds gates above ups, ``w2_weight`` ``[E, D, I]`` the way back."""
    inner = int(module.moe_config.intermediate_size_per_partition)
    if name == "w2_weight":
        parts = [(module.ckpt_down_proj_name, stacked[..., :inner])]
    else:
        half = stacked.shape[1] // 2
        parts = [(module.ckpt_gate_proj_name, stacked[:, :inner]), (module.ckpt_up_proj_name, stacked[:, half : half + inner])]
    for expert in range(stacked.shape[0]):
        for part, tensors in parts:
            yield f"{path}.{expert}.{part}.weight", tensors[expert]


def is_tied(model: nn.Module) -> bool:
    head = getattr(model, "lm_head", None)
    return head is not None and any(p is getattr(head, "weight", None) for n, p in model.named_parameters() if not n.startswith("lm_head."))


def load(runner: Any, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
    """Write every tensor into the model in place.  Raises :class:`SyncError` naming the tensor that is missing, unknown or of another
    shape.

    On CPU the plain weights are written directly; elsewhere through the model runner's reload, which repeats what loading did to them.
    """
    model = runner.get_model()
    known = {name for name, _ in named_parts(model)}
    tied = is_tied(model)
    given: list[str] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if tied and name == "lm_head.weight":
                continue
            given.append(name)
            if name not in known:
                check_names([*known, name], known, version)
            yield name, tensor

    try:
        if next(model.parameters()).device.type == "cpu":
            model.load_weights(stream())
        else:
            runner.reload_weights(weights_iterator=stream())
    except SyncError:
        raise
    except Exception as error:
        raise SyncError(
            f"version {version}: loading {given[-1] if given else 'the first tensor'} failed: {type(error).__name__}: {error}"
        ) from error
    check_names(given, known, version)
