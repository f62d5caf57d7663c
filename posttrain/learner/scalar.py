"""A model that answers with a number per column: the backbone of a language model under a linear head, for reward models and critics.

The head is transformers' own (``...ForSequenceClassification`` with one label), so checkpoints load elsewhere and others' load here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posttrain.learner.forward import hidden_states
from posttrain.learner.model import is_lora, plain


class ScalarModule(nn.Module):
    """The interface of :class:`~posttrain.learner.forward.PolicyModule`; the first of what ``forward`` returns are the head's numbers ``[n]``, in float32."""

    def __init__(self, model: nn.Module, alpha: float = 0.0) -> None:
        """``alpha``: the temperature of the soft minimum of several heads."""
        super().__init__()
        self.model = model
        self.alpha = alpha
        self.head.forward = _wide(self.head)  # type: ignore[method-assign]

    @property
    def inner(self) -> nn.Module:
        return plain(self.model)

    @property
    def head(self) -> nn.Linear:
        return self.inner.score

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        select: Tensor | None,
        temperature: float,
        columns: tuple[str, ...] = (),
        frozen: Mapping[str, Any] | None = None,
        want_hidden: bool = False,
        adapter: bool = True,
        stored: Any = None,
        routing: Any = None,
        keep_routing: bool = False,
        mixed: Any = None,
        want_best: bool = False,
    ) -> Any:
        """``select`` ``[n]`` are the column indices to read, None for all.  There are no targets, temperatures, full-vocabulary columns,
        stored distributions or replayed experts: a batch may hold them, and nothing reads them."""
        assert not columns and not want_hidden and not want_best and mixed is None, "a scalar head has no probabilities"
        off = nullcontext() if adapter or not is_lora(self.model) else self.model.disable_adapter()
        with off:
            hidden = hidden_states(self.inner, input_ids, positions, lengths)
        numbers = self.head(hidden if select is None else hidden[select])
        return (numbers[:, 0] if numbers.shape[1] == 1 else soft_min(numbers, self.alpha),)


def soft_min(numbers: Tensor, alpha: float) -> Tensor:
    """``-alpha log mean_k exp(-numbers[n, k] / alpha)``, ``[n]``: the least of them at 0, their mean at infinity, and what they are where they are equal.

    Its derivative shares out 1 among the heads, more to the lower ones (SAFE, arXiv 2602.04651).
    """
    if alpha == 0:
        return numbers.amin(-1)
    if math.isinf(alpha):
        return numbers.mean(-1)
    # measured from the least, so that neither a small alpha overflows nor a large one rounds; the formula does not depend on where
    least = numbers.detach().amin(-1, keepdim=True)
    return least[:, 0] - alpha * torch.log1p(torch.expm1((least - numbers) / alpha).mean(-1))


def _wide(head: nn.Linear) -> Any:
    """The head's product in float32 at least: numbers of bfloat16 would be equal too often to be compared."""

    def forward(hidden: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return linear(hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))

    return forward


@torch.no_grad()
def scalar_self_check(module: ScalarModule, tolerance: float | None = None) -> float:
    """Compare the numbers of a packed row with those of its two sequences alone; returns the largest difference.  Raises ``ValueError`` with it."""
    inner, weight = module.inner, module.head.weight
    vocab = inner.config.get_text_config().vocab_size
    ids = (torch.arange(16, device=weight.device) * 7919 + 11) % vocab
    parts = (ids[:9], ids[9:])
    if tolerance is None:
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(weight.dtype, 0.25)
    training = module.training
    module.eval()

    def read(sequences: tuple[Tensor, ...]) -> Tensor:
        row = torch.cat(sequences)
        positions = torch.cat([torch.arange(len(s), device=row.device) for s in sequences])
        return module(row, row, positions, torch.tensor([len(s) for s in sequences], device=row.device), None, 1.0)[0]

    try:
        alone, packed = torch.cat([read((part,)) for part in parts]), read(parts)
    finally:
        module.train(training)
    gap = float((alone - packed).abs().max())
    if not gap <= tolerance:
        raise ValueError(
            f"{type(inner).__name__}: the numbers of a packed row differ from those of its sequences by {gap:.3g} (limit {tolerance:g}); its layers mix "
            "packed sequences, and it cannot be trained here"
        )
    return gap
