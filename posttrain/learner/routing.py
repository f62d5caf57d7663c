"""Replay of expert choices in a mixture of experts, so that a ratio of probabilities compares the same sub-network (2510.11370; 2507.18071 section 5.3).

A router chooses with ``topk``.  Here that one call is answered with the recorded experts instead, and everything around it is the model's own: the
scores of the chosen experts, how they are normalised and scaled, and the gradient through them.  One mechanism serves every family whose routers
choose so, and whatever they do before and after it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from posttrain.records import NO_EXPERT


class _Choose(TorchFunctionMode):
    """Answers ``topk(scores [N, E], K)`` with the recorded ``[N, K]``, and keeps what was chosen.  Any other ``topk`` is left alone: some routers choose
    among groups of experts first."""

    def __init__(self, recorded: Tensor | None, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.recorded, self.num_experts, self.top_k = recorded, num_experts, top_k
        self.chosen: Tensor | None = None
        self.agreed: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return found
        scores, own = args[0], found[1]
        if scores.dim() != 2 or scores.shape[1] != self.num_experts or own.shape[1] != self.top_k:
            return found
        if self.recorded is None:
            self.chosen = own
            return found
        given = self.recorded != NO_EXPERT
        self.chosen = torch.where(given, self.recorded.to(own.dtype), own)
        self.agreed = ((self.chosen[:, :, None] == own[:, None]).any(-1) & given).sum(), given.sum()
        return torch.return_types.topk((scores.gather(-1, self.chosen), self.chosen))


class Routers:
    """The routers of a model, by layer.  ``replay`` sets what the next forward uses, and its recomputation in backward too; ``chosen`` is what
    the last forward used.

    ``model``: a transformers model.  A model without experts has no routers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.top_k = 0
        self._recorded: dict[int, Tensor | None] = {}
        self._chosen: dict[int, Tensor] = {}
        self._agreed: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep = False
        for name, module in model.named_modules():
            place = re.search(r"\.layers\.(\d+)\.", name)
            if place and re.search(r"router$", type(module).__name__, re.I) and hasattr(module, "top_k"):
                self._wrap(int(place[1]), module)

    @property
    def layers(self) -> list[int]:
        return sorted(self._recorded)

    def _wrap(self, layer: int, router: nn.Module) -> None:
        if layer in self._recorded:
            raise ValueError(f"layer {layer} has more than one router, so what was recorded of a layer cannot be replayed")
        original = router.forward
        self._recorded[layer] = None
        self.top_k = int(router.top_k)  # type: ignore[arg-type]
        num_experts = int(getattr(router, "num_experts", None) or router.weight.shape[0])  # type: ignore[arg-type]

        def forward(*args: Any, **kwargs: Any) -> Any:
            recorded = self._recorded[layer]
            if recorded is None and not self._keep:
                return original(*args, **kwargs)
            with _Choose(recorded, num_experts, self.top_k) as mode:
                out = original(*args, **kwargs)
            if mode.chosen is None:
                raise ValueError(f"the router {type(router).__name__} of layer {layer} did not choose with topk, so its choices cannot be replayed here")
            if self._keep:
                self._chosen[layer] = mode.chosen.detach()
            if mode.agreed is not None:
                self._agreed[layer] = mode.agreed
            return out

        router.forward = forward  # type: ignore[method-assign]

    def replay(self, recorded: Tensor | None, keep: bool = False) -> None:
        """``recorded``: ``[N, layers, K]`` experts of every column, ``NO_EXPERT`` where there is none; None: the routers choose.  ``keep``: remember what
        is chosen.  Raises ``ValueError`` for another number of layers or experts."""
        self._keep, self._chosen, self._agreed = keep, {}, {}
        if recorded is not None and self._recorded and tuple(recorded.shape[1:]) != (self.num_layers, self.top_k):
            raise ValueError(
                f"the recorded routing has {tuple(recorded.shape[1:])} layers and experts per token, the model {(self.num_layers, self.top_k)}; "
                "engine and learner must be the same model"
            )
        for layer in self._recorded:
            self._recorded[layer] = None if recorded is None else recorded[:, layer]

    @property
    def agreement(self) -> tuple[float, float]:
        """(replayed choices that the routers would have made too, replayed choices) of the last forward."""
        return float(sum(int(agreed) for agreed, _ in self._agreed.values())), float(sum(int(given) for _, given in self._agreed.values()))

    def chosen(self) -> Tensor:
        """``[N, layers, K]`` int16 of the last forward that kept them, on the CPU; ``NO_EXPERT`` in layers without experts."""
        columns = next(iter(self._chosen.values())).shape[0]
        out = torch.full((columns, self.num_layers, self.top_k), NO_EXPERT, dtype=torch.int16)
        for layer, experts in self._chosen.items():
            out[:, layer] = experts.to("cpu", torch.int16)
        return out
