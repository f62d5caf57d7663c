"""The learner in plain PyTorch: whole weights on every rank, float32 master weights and gradients, one all-reduce per optimizer step.

It is the reference that the DeepSpeed engine is compared with, and enough for small models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.learner import checkpoint, optim
from posttrain.learner.core import Core, Metrics, build_module, device_of
from posttrain.learner.weights import export, hf_state
from posttrain.records import TokenBatch
from posttrain.sync.fingerprint import Fingerprint, fingerprint


class TorchEngine:
    """One rank.  ``objective`` gives the loss; ``total_steps`` optimizer steps are what the schedule ends at.

    With ``world_size > 1`` the default process group must exist.  Gradients of all micro-batches of all ranks are summed, never averaged.
    """

    def __init__(self, model_cfg: Any, learner_cfg: Any, objective: Any, rank: int = 0, world_size: int = 1, total_steps: int = 1, seed: int = 0):
        if learner_cfg.zero_stage:
            raise ValueError(f"learner.engine=torch cannot shard; set learner.zero_stage=0 (it is {learner_cfg.zero_stage}) or learner.engine=deepspeed")
        self.model_cfg, self.cfg, self.rank, self.world_size, self.total_steps = model_cfg, learner_cfg, rank, world_size, total_steps
        self.device = device_of(rank)
        self.module = build_module(model_cfg, learner_cfg, objective, self.device, seed)
        self.core = Core(self.module, model_cfg, objective, self.device, seed)
        self.named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.watch = optim.GradientWatch(self.named)
        groups = optim.param_groups(self.named, learner_cfg.weight_decay)
        low = {p: p for g in groups for p in g["params"]}
        self.master = {p: p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_() for p in low}
        for group in groups:
            group["params"] = [self.master[p] for p in group["params"]]
        self.optimizer = optim.adamw(groups, learner_cfg)
        self.grads = {p: torch.zeros_like(m, requires_grad=False) for p, m in self.master.items()}
        for parameter in self.master:
            parameter.register_post_accumulate_grad_hook(self._collect)
        self.steps_taken = 0
        self.canary = optim.Canary(self._masters())

    def _collect(self, parameter: Tensor) -> None:
        """Move a micro-batch's gradient into the float32 sum, so that accumulation never rounds to 16 bits."""
        assert parameter.grad is not None
        self.grads[parameter].add_(parameter.grad)
        parameter.grad = None

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.master[p]) for name, p in self.named)

    # -- the four verbs ------------------------------------------------------------------------------------------------
    def score(self, batch: TokenBatch, policy: str = "current", entropy: bool = False, routing: bool = False, collision: bool = False) -> dict[str, Tensor]:
        """``{"logp": [N], "entropy": [N], "collision": [N] and "routing": [N, L, K] when asked}`` on the CPU, without gradient.  ``base`` is the frozen start."""
        return self.core.score(self.module, batch, policy, entropy, routing, collision)

    def forward_backward(self, batch: TokenBatch, weights: Tensor | None = None, last: bool = False) -> Metrics:
        """Add one micro-batch's gradient to the step.  ``last`` is for engines that communicate early; this one does not."""
        loss, metrics = self.core.loss(self.module, batch, weights)
        loss.backward()
        return metrics

    def optim_step(self) -> dict[str, float]:
        """Sum gradients over ranks, clip, step.  Returns ``grad_norm`` (before clipping), ``lr`` and ``update_norm_ratio``.

        Raises ``FloatingPointError`` when a gradient (it names the tensor) or the sum of all is not finite; then nothing has changed.
        """
        bad = self.watch.bad()
        if self.world_size > 1:
            flat = torch.cat([torch.tensor([float(bool(bad))], device=self.device), *(g.flatten() for g in self.grads.values())])
            dist.all_reduce(flat)
            for grad, part in zip(self.grads.values(), flat[1:].split([g.numel() for g in self.grads.values()]), strict=True):
                grad.copy_(part.view_as(grad))
            optim.raise_if_bad(bad, float(flat[0]) > 0, self.rank, self.steps_taken)
        else:
            optim.raise_if_bad(bad, False, self.rank, self.steps_taken)
        norm = optim.check_norm(optim.global_norm(self.grads.values()), self.steps_taken)
        limit = self.cfg.max_grad_norm
        scale = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        for parameter, master in self.master.items():
            master.grad = self.grads[parameter].mul_(scale)
        rate = optim.learning_rate(self.cfg, self.steps_taken, self.total_steps)
        optim.set_rate(self.optimizer, rate)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.master.items():
                master.grad = None
                self.grads[parameter].zero_()
                if parameter is not master:
                    parameter.copy_(master)
        owned = ((p, g) for g in self.optimizer.param_groups for p in g["params"])
        update, weight = optim.update_and_weight_squares(owned, self.optimizer).tolist()
        self.watch.clear()
        self.steps_taken += 1
        return {"grad_norm": norm, "lr": rate, "update_norm_ratio": (update / max(weight, 1e-30)) ** 0.5}

    # -- weights -------------------------------------------------------------------------------------------------------
    def state(self) -> Iterator[tuple[str, Tensor]]:
        """``(Hugging Face name, CPU tensor)`` of every weight in the engine's dtype, adapters merged."""
        return hf_state(self.module.model)

    def fingerprint(self) -> Fingerprint:
        """See :mod:`posttrain.sync.fingerprint`."""
        return fingerprint(self.state())

    def frozen(self) -> list[str]:
        """Trainable tensors whose float32 master has not moved since the start."""
        return self.canary.frozen(self._masters())

    def export(self, path: str | Path) -> None:
        """A Hugging Face folder, written by rank 0."""
        export(self.module.model, self.model_cfg, path, write=self.rank == 0)

    def move_base(self, mix: float) -> None:
        """The frozen start takes a step towards the policy: ``base <- mix * policy + (1 - mix) * base``.  All ranks call it."""
        self.core.move_base(hf_state(self.module.model, published=False), mix)

    # -- checkpoint ----------------------------------------------------------------------------------------------------
    def _meta(self) -> dict[str, Any]:
        return {"engine": "torch", "world_size": self.world_size, "zero_stage": 0, "offload": False, "dtype": self.model_cfg.dtype}

    def save(self, path: str | Path) -> None:
        """Everything needed to continue bit for bit.  Weights are the same on every rank, so rank 0 writes them; each rank its RNG."""
        tensors = {}
        if self.rank == 0:
            tensors = checkpoint.pack(list(self._masters()), self.optimizer)
        shared = {"base": self.core.base_state(), "directions": self.core.directions} if self.rank == 0 else {}
        checkpoint.write(path, self.rank, self._meta(), {"steps_taken": self.steps_taken, "tensors": tensors, **shared})

    def load(self, path: str | Path) -> None:
        """Continue from :meth:`save`.  Raises ``ValueError`` naming what differs when the checkpoint was written under other settings."""
        found = checkpoint.read(path, self.rank, self._meta())
        shared = found if self.rank == 0 else checkpoint.read(path, 0, self._meta())
        checkpoint.unpack(shared["tensors"], list(self._masters()), self.optimizer)
        self.core.load_base_state(shared.get("base"))
        self.core.load_directions(shared.get("directions"))
        with torch.no_grad():
            for parameter, master in self.master.items():
                if parameter is not master:
                    parameter.copy_(master)
        self.steps_taken = found["steps_taken"]
        checkpoint.restore_rng(found)

    def close(self) -> None:
        """Nothing to release."""
