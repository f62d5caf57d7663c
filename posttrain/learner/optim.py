"""The optimizer, its schedule and its checks, the same for every engine.

AdamW in float32 (a float32 master copy beside lower-precision weights), decoupled weight decay on tensors of two or more dimensions only (norm
gains and biases are left alone), the global gradient norm clipped to ``max_grad_norm`` by the factor ``max_grad_norm / norm``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(cfg: Any, step: int, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (the first is 0) out of ``total_steps``.

    Warm-up is linear over ``warmup_steps`` and its first step is not 0: ``lr * (step + 1) / warmup_steps``.  Afterwards ``constant``, or a
    ``linear`` or ``cosine`` fall that reaches ``lr * min_lr_ratio`` at the last step and stays there.
    """
    if cfg.schedule not in SCHEDULES:
        raise ValueError(f"learner.schedule={cfg.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    done = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - 1 - cfg.warmup_steps))
    left = 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


def param_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with ``weight_decay`` (two or more dimensions) and without.  An empty group is left out.

    The shape is read as the model has it: under ZeRO-3 build the groups before the engine shards the parameters.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 else plain).append(parameter)
    if not decay and not plain:
        raise ValueError("nothing is trainable: every parameter has requires_grad=False")
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], cfg: Any) -> torch.optim.AdamW:
    """``torch.optim.AdamW`` over ``groups`` with the numbers of a ``LearnerConfig``."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_and_weight_squares(owned: Iterable[tuple[Tensor, dict[str, Any]]], optimizer: torch.optim.Optimizer) -> Tensor:
    """``[sum |dw|^2, sum |w|^2]`` (float64) of the step just taken, recomputed from AdamW's state, so no copy of the weights is kept.

    ``owned`` are (float32 weight tensor, its param group).  ``dw = lr * (m_hat / (sqrt(v_hat) + eps) + wd * w_before)``.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for weight, group in owned:
        state = optimizer.state.get(weight)
        if not state:
            continue
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        m = state["exp_avg"] / (1 - beta1**step)
        adam = group["lr"] * m / ((state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"])
        before = (weight + adam) / (1 - group["lr"] * group["weight_decay"])
        total += torch.stack([(before - weight).double().square().sum(), before.double().square().sum()]).cpu()
    return total


class GradientWatch:
    """Remembers, without waiting for the device, the sum of every gradient that came by, so that a NaN can be blamed on a tensor."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._sums: dict[str, Tensor] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                parameter.register_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def remember(grad: Tensor) -> None:
            total = grad.detach().sum(dtype=torch.float64)
            self._sums[name] = total if name not in self._sums else self._sums[name] + total

        return remember

    def bad(self) -> list[str]:
        """Names of tensors that received NaN or infinity since :meth:`clear`."""
        if not self._sums:
            return []
        finite = torch.isfinite(torch.stack(list(self._sums.values()))).tolist()
        return [name for name, ok in zip(self._sums, finite, strict=True) if not ok]

    def clear(self) -> None:
        self._sums.clear()


def raise_if_bad(bad: list[str], anywhere: bool, rank: int, step: int) -> None:
    """Stop with the name of a tensor whose gradient is not finite.  ``anywhere``: some rank saw one."""
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"optimizer step {step}, rank {rank}: the gradient of {bad[0]}{more} is NaN or infinite; the weights were not changed. "
            "Lower learner.lr, look at the loss weights of this step, or train in float32"
        )
    if anywhere:
        raise FloatingPointError(f"optimizer step {step}: another rank than {rank} has a NaN or infinite gradient; the weights were not changed")


def global_norm(grads: Iterable[Tensor]) -> float:
    """The 2-norm over all tensors, in float64: squares of large gradients overflow in float32."""
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads])))


def check_norm(norm: float, step: int) -> float:
    """``norm`` itself.  Raises ``FloatingPointError`` when it is not finite: gradients that were finite one by one overflowed in their sum."""
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"optimizer step {step}: the norm of the summed gradient is {norm}; the weights were not changed. Lower the loss weights of this step "
            "(advantages, coefficients), or bound its ratios with a mask"
        )
    return norm


def position_hash(tensor: Tensor) -> int:
    """A 64-bit number that changes when any element of the tensor changes, also when changes cancel in a plain sum."""
    bits = {4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(bits).flatten().to(torch.int64)
    return int((values * (2 * torch.arange(values.numel(), device=values.device) + 1)).sum())


class Canary:
    """Which trainable tensors have not moved since the start."""

    def __init__(self, named: Iterator[tuple[str, Tensor]]) -> None:
        self.start = {name: position_hash(tensor) for name, tensor in named}

    def frozen(self, named: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Names that still hold their first value.  The A half of an adapter starts with a zero gradient, because B is zero: it counts as
        frozen only while B has not moved either."""
        still = [name for name, tensor in named if position_hash(tensor) == self.start[name]]
        return [name for name in still if ".lora_A." not in name or name.replace(".lora_A.", ".lora_B.") in still]
