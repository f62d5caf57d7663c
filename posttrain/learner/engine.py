"""The learner on DeepSpeed: ZeRO 0 to 3, optional CPU offload of the optimizer, bfloat16 with float32 master weights, or float32.

DeepSpeed divides gradients by the number of ranks and by its accumulation steps.  Our loss is a plain sum, so this is undone once, here:
``gradient_accumulation_steps`` is 1 with the accumulation boundary owned by :meth:`optim_step` (any number of micro-batches per step), and the
loss is multiplied by the number of ranks before backward.

Three points where the installed DeepSpeed would not do what the settings say:

* Stage 0 in bfloat16 would add micro-batches up in 16 bits.  It runs as stage 1, whose optimizer keeps a float32 sum; the result is the same.
* In bfloat16 it would also round what ranks send each other to 16 bits.  Gradients are summed over ranks in float32.
* It skips a step whose gradient is not finite.  Here that is an error, with the name of a tensor where there is one, before anything changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.learner import checkpoint, optim
from posttrain.learner.core import Core, Metrics, build_module, device_of
from posttrain.learner.weights import export, hf_state
from posttrain.records import TokenBatch
from posttrain.sync.fingerprint import Fingerprint, fingerprint


def deepspeed_config(model_cfg: Any, cfg: Any, world_size: int, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's own settings for a ``LearnerConfig``.  Raises ``ValueError`` for what DeepSpeed cannot do."""
    if model_cfg.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"learner.engine=deepspeed learns in float32 or bfloat16, not model.dtype={model_cfg.dtype!r}; use learner.engine=torch")
    if cfg.offload_optimizer and cfg.zero_stage == 0:
        raise ValueError("learner.offload_optimizer=true needs learner.zero_stage 1, 2 or 3: stage 0 has no optimizer partition to move")
    low = model_cfg.dtype == "bfloat16"
    stage = max(cfg.zero_stage, 1) if low else cfg.zero_stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": int(5e7)}
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        # small tensors (norm gains) stay whole; matrices are always sharded
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
        zero["stage3_prefetch_bucket_size"] = int(5e7)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": float(cfg.max_grad_norm or 0.0) if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    if low:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def _never_compile(deepspeed: Any) -> None:
    """On CPU, DeepSpeed would compile a C++ shared-memory operator when it starts: a minute of work that we do not use, and a process killed during
    it leaves a lock file on which every later start waits for ever."""
    vars(deepspeed.ops)["__compatible_ops__"] = {}


def ensure_process_group() -> None:
    """DeepSpeed needs a process group even for one process."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class DeepSpeedEngine:
    """One rank.  Same interface and same numbers as :class:`~posttrain.learner.torch_engine.TorchEngine`."""

    def __init__(self, model_cfg: Any, learner_cfg: Any, objective: Any, rank: int = 0, world_size: int = 1, total_steps: int = 1, seed: int = 0):
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(rank) if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "0")
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        ensure_process_group()
        if dist.get_world_size() != world_size:
            raise ValueError(f"the process group has {dist.get_world_size()} ranks but the learner was told {world_size}")
        self._deepspeed = deepspeed
        self.model_cfg, self.cfg, self.rank, self.world_size, self.total_steps = model_cfg, learner_cfg, rank, world_size, total_steps
        self.device = device_of(rank)
        module = build_module(model_cfg, learner_cfg, objective, self.device, seed)
        config = deepspeed_config(model_cfg, learner_cfg, world_size, module.inner.config.get_text_config().hidden_size)
        self.stage = config["zero_optimization"]["stage"]
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.watch = optim.GradientWatch(self.named)
        self.optimizer = optim.adamw(optim.param_groups(self.named, learner_cfg.weight_decay), learner_cfg)
        if self.device.type == "cpu":
            _never_compile(deepspeed)
        deepspeed.init_distributed(dist_backend="gloo" if self.device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
        self.ds, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config, dist_init_required=False)
        self.module = module
        self._stage0_norm = 0.0
        if self.stage == 0:
            self.optimizer.register_step_pre_hook(self._clip_stage0)
        self.core = Core(module, model_cfg, objective, self.device, seed)
        self.steps_taken = 0
        self.canary = optim.Canary(self._masters())

    def _clip_stage0(self, *_: Any) -> None:
        """Stage 0 keeps no gradient norm of its own, so norm and clipping happen here, after the all-reduce and before the update."""
        grads = [p.grad for _, p in self.named if p.grad is not None]
        self._stage0_norm = optim.check_norm(optim.global_norm(grads), self.steps_taken)
        limit = self.cfg.max_grad_norm
        if limit and self._stage0_norm > limit:
            for grad in grads:
                grad.mul_(limit / (self._stage0_norm + 1e-6))

    # -- the four verbs ------------------------------------------------------------------------------------------------
    def score(self, batch: TokenBatch, policy: str = "current", entropy: bool = False, routing: bool = False, collision: bool = False) -> dict[str, Tensor]:
        """``{"logp": [N], "entropy": [N], "collision": [N] and "routing": [N, L, K] when asked}`` on the CPU, without gradient.  All ranks must call it under ZeRO-3."""
        return self.core.score(self.ds, batch, policy, entropy, routing, collision)

    def forward_backward(self, batch: TokenBatch, weights: Tensor | None = None, last: bool = False) -> Metrics:
        """Add one micro-batch's gradient to the step.  All ranks must call it equally often; an empty batch still runs backward."""
        loss, metrics = self.core.loss(self.ds, batch, weights)
        self.ds.backward(loss * self.world_size, scale_wrt_gas=False)
        return metrics

    def optim_step(self) -> dict[str, float]:
        """Reduce, clip, step.  Returns ``grad_norm`` (before clipping), ``lr`` and ``update_norm_ratio``.

        Raises ``FloatingPointError`` when a gradient (it names the tensor) or the sum of all is not finite; then nothing has changed.
        """
        bad = self.watch.bad()
        anywhere = self._sum(torch.tensor([float(bool(bad))]))
        optim.raise_if_bad(bad, float(anywhere) > 0, self.rank, self.steps_taken)
        rate = optim.learning_rate(self.cfg, self.steps_taken, self.total_steps)
        optim.set_rate(self.optimizer, rate)
        self.ds.step()
        norm = self._stage0_norm if self.stage == 0 else optim.check_norm(float(self.ds.get_global_grad_norm()), self.steps_taken)
        squares = optim.update_and_weight_squares(self._owned(), self.optimizer)
        update, weight = (squares if self.stage == 0 else self._sum(squares)).tolist()
        self.watch.clear()
        self.steps_taken += 1
        return {"grad_norm": norm, "lr": rate, "update_norm_ratio": (update / max(weight, 1e-30)) ** 0.5}

    def _sum(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.cpu()

    # -- where DeepSpeed keeps things ----------------------------------------------------------------------------------
    def _owned(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """(float32 tensor this rank's optimizer steps, its param group): the parameters, or this rank's partitions of them."""
        if self.stage == 3:
            zero = self.ds.optimizer
            groups = self.optimizer.param_groups
            return [(flat, groups[zero.sub_group_to_group_id[i]]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
        return [(p, g) for g in self.optimizer.param_groups for p in g["params"]]

    def _pieces(self) -> list[tuple[str, Tensor]]:
        return [(f"piece{i}", tensor) for i, (tensor, _) in enumerate(self._owned())]

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """Full float32 trainable tensors by name; all ranks walk it together."""
        if self.stage == 0:
            yield from self.named
            return
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.named:
            yield name, safe_get_full_fp32_param(parameter)

    def _gather(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        return self._deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3)

    # -- weights -------------------------------------------------------------------------------------------------------
    def state(self) -> Iterator[tuple[str, Tensor]]:
        """``(Hugging Face name, CPU tensor)`` of every whole weight in the engine's dtype, adapters merged.  All ranks walk it together."""
        return hf_state(self.module.model, self._gather)

    def fingerprint(self) -> Fingerprint:
        """See :mod:`posttrain.sync.fingerprint`."""
        return fingerprint(self.state())

    def frozen(self) -> list[str]:
        """Trainable tensors whose float32 master has not moved since the start."""
        return self.canary.frozen(self._masters())

    def export(self, path: str | Path) -> None:
        """A Hugging Face folder, written by rank 0; all ranks call it."""
        export(self.module.model, self.model_cfg, path, write=self.rank == 0, gather=self._gather)

    def move_base(self, mix: float) -> None:
        """The frozen start takes a step towards the policy: ``base <- mix * policy + (1 - mix) * base``.  All ranks call it."""
        self.core.move_base(hf_state(self.module.model, self._gather, published=False), mix)

    # -- checkpoint ----------------------------------------------------------------------------------------------------
    def _meta(self) -> dict[str, Any]:
        return {
            "engine": "deepspeed",
            "world_size": self.world_size,
            "zero_stage": self.cfg.zero_stage,
            "offload": self.cfg.offload_optimizer,
            "dtype": self.model_cfg.dtype,
        }

    def save(self, path: str | Path) -> None:
        """This rank's float32 partition, optimizer state, step and random state."""
        tensors = checkpoint.pack(self._pieces(), self.optimizer) if self.stage or self.rank == 0 else {}
        shared = {"base": self.core.base_state(), "directions": self.core.directions} if self.rank == 0 else {}
        checkpoint.write(path, self.rank, self._meta(), {"steps_taken": self.steps_taken, "tensors": tensors, **shared})

    def load(self, path: str | Path) -> None:
        """Continue from :meth:`save`, bit for bit.  Raises ``ValueError`` when it was written under other settings."""
        found = checkpoint.read(path, self.rank, self._meta())
        shared = found if self.rank == 0 else checkpoint.read(path, 0, self._meta())
        checkpoint.unpack((found if self.stage else shared)["tensors"], self._pieces(), self.optimizer)
        self.core.load_base_state(shared.get("base"))
        self.core.load_directions(shared.get("directions"))
        self._refresh_model()
        self.steps_taken = found["steps_taken"]
        checkpoint.restore_rng(found)

    @torch.no_grad()
    def _refresh_model(self) -> None:
        """Write the float32 masters back into the model's own (low-precision, flat or sharded) storage."""
        zero = self.ds.optimizer
        if self.stage == 3:
            zero._partition_all_parameters()
            for index in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.stage:
            zero.update_lp_params()

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers."""
        self.ds.destroy()
