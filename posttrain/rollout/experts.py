"""Which experts read which token: recorded inside a vLLM engine while it samples.

A router tells a callback the experts of every row of a step's flat batch, layer by layer.  Which rows belong to which request, and to which of its
positions, is known from what the scheduler ordered.  A position that is read again (after a preemption, or under new weights) is written again: what
counts is the last reading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.records import NO_EXPERT


class Recorder:
    """Follows one model runner.  Raises ``ValueError`` when the model has no router that can be followed."""

    def __init__(self, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._layers: dict[int, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._runner, self._execute = runner, runner.execute_model
        self.num_layers = int(runner.model_config.get_total_num_hidden_layers())
        found = [m for m in runner.get_model().modules() if isinstance(m, MoERunner)]
        if not found:
            raise ValueError("learner.routing=engine records the experts of a mixture, and this model has none; set learner.routing=own")
        for module in found:
            if not hasattr(module.router, "set_capture_fn"):
                raise ValueError(f"the experts chosen by vLLM's {type(module.router).__name__} cannot be recorded; set learner.routing=own or old")
            module.router.set_capture_fn(lambda experts, layer=module.layer_id: self._layers.__setitem__(layer, experts))
        runner.execute_model = self._follow

    def _follow(self, ordered: Any, *args: Any, **kwargs: Any) -> Any:
        self._layers = {}
        for name in ordered.finished_req_ids:
            self._kept.pop(name, None)
        out = self._execute(ordered, *args, **kwargs)
        if not ordered.total_num_scheduled_tokens:
            return out
        starts = {new.req_id: int(new.num_computed_tokens) for new in ordered.scheduled_new_reqs}
        again = ordered.scheduled_cached_reqs
        starts |= {name: int(n) for name, n in zip(again.req_ids, again.num_computed_tokens, strict=True)}
        top_k = next(iter(self._layers.values())).shape[1]
        rows = torch.full((ordered.total_num_scheduled_tokens, self.num_layers, top_k), NO_EXPERT, dtype=torch.int16)
        for layer, experts in self._layers.items():
            rows[:, layer] = experts[: len(rows)].to("cpu", torch.int16)
        first = 0
        for name in self._runner.input_batch.req_ids:
            count = ordered.num_scheduled_tokens.get(name, 0)
            self._write(name, starts.get(name, 0), rows[first : first + count])
            first += count
        return out

    def _write(self, name: str, start: int, rows: Tensor) -> None:
        kept = self._kept.get(name)
        if kept is None or len(kept) < start + len(rows):
            room = torch.full((max(2 * (start + len(rows)), 64), *rows.shape[1:]), NO_EXPERT, dtype=torch.int16)
            if kept is not None:
                room[: len(kept)] = kept
            kept = self._kept[name] = room
        kept[start : start + len(rows)] = rows

    def take(self, name: str, length: int) -> Tensor | None:
        """``[length, layers, K]`` of a request that is done, and forget it; None when it never ran.  A token that was never read has ``-1``."""
        kept = self._kept.pop(name, None)
        return None if kept is None else kept[:length].clone()
