"""The slope of a utility along a coefficient, one optimizer step ahead: what a controller that learns a blend follows.

With ``theta' = theta + lr * dJ(mu)/dtheta`` the slope is ``dU(theta')/dmu = lr * <dU/dtheta at theta', v>``, where ``v = d(dJ/dtheta)/dmu`` at theta is what
the coefficient changes in the gradient.  Both gradients are of sums over sampled tokens, so each costs one backward pass.  Regularisers are left
out: the coefficient stands in a stream.

``v`` is formed on one batch and kept; the utility is measured on the next one, which the moved policy sampled and ``v`` has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.learner import optim
from posttrain.learner.forward import forward
from posttrain.loss.unified import Objective
from posttrain.mixture.control import LookAhead, pinned
from posttrain.records import TokenBatch


def look_ahead(engine: Any, micro: Sequence[TokenBatch], name: str, measure: bool, keep: bool) -> dict[str, float]:
    """On the micro-batches of this rank's share of one optimizer step, before that step.  All ranks call it.

    ``measure``: gives ``slope``, by the direction that was kept, as the controller called ``name`` scales it; nothing when none was kept.
    ``keep``: forms the direction for the next call.  Raises ``ValueError`` under ZeRO-3, where no rank has a whole gradient.
    """
    if engine.cfg.zero_stage == 3:
        raise ValueError(
            f"the coefficient {name!r} looks one step ahead, which needs whole gradients on every rank; set learner.zero_stage to 0, 1 or 2"
        )
    core = engine.core
    control: LookAhead = core.objective.controls[name]
    known = core.directions.get(name)
    goals = {"utility": utility(core.objective, control)} if measure and known is not None else {}
    if keep:
        goals["direction"] = core.objective
    temperature = core.objective.needs.temperature
    found = gradients(
        [p for p in core.module.parameters() if p.requires_grad],
        lambda batch: forward(core.module, batch, temperature=temperature, columns=())[0],
        [batch.to(core.device) for batch in micro],
        goals,
        control,
    )
    if engine.world_size > 1:
        for part in (p for parts in found.values() for p in parts):
            dist.all_reduce(part)
    out: dict[str, float] = {}
    if "utility" in found:
        rate = optim.learning_rate(engine.cfg, max(engine.steps_taken - 1, 0), engine.total_steps)
        out["slope"] = slope(found["utility"], known, rate, control.scale)
    if keep:
        core.directions[name] = found["direction"]
    return out


def utility(objective: Objective, control: LookAhead) -> Objective:
    """The stream a controller wants to do well on, alone and with coefficient 1."""
    return Objective({control.utility: replace(objective.streams[control.utility], coef=1.0)}, name="utility")


def gradients(
    parameters: Sequence[Tensor], logp_of: Callable[[TokenBatch], Tensor], micro: Sequence[TokenBatch], goals: Mapping[str, Objective], control: LookAhead
) -> dict[str, list[Tensor]]:
    """Of each goal by every parameter, added up over the micro-batches, at least float32: of ``utility`` itself, of ``direction`` by the coefficient.

    ``logp_of`` gives the current log-probs ``[N]`` with gradient; one forward serves all goals.
    """
    total = {key: [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters] for key in goals}
    for batch in micro:
        if not goals or not bool(batch.trainable.any()):
            continue
        logp = logp_of(batch)
        for key, goal in goals.items():
            weights = _by_coefficient(goal, batch, logp, control) if key == "direction" else goal.weights(batch, logp)
            picked = weights != 0  # the value of a loss is not asked for: fixed weights and log-probs are enough
            gain = (weights[picked] * logp[picked]).sum()
            for sums, one in zip(total[key], torch.autograd.grad(gain, parameters, retain_graph=True, allow_unused=True), strict=True):
                if one is not None:
                    sums.add_(one)
    return total


def _by_coefficient(objective: Objective, batch: TokenBatch, logp: Tensor, control: LookAhead) -> Tensor:
    """``dw/dmu`` of every token: weights are affine in the coefficient, so the difference of its two ends is exact."""
    bare = replace(objective, regularizers={})
    ends = [bare.weights(batch.replace(memory={**batch.memory, **pinned(control, value)}), logp) for value in (1.0, 0.0)]
    return ends[0] - ends[1]


def slope(of_utility: Sequence[Tensor], direction: Sequence[Tensor], rate: float, scale: str) -> float:
    """``product``: ``rate * <u, v>``, the derivative itself for a plain gradient step; ``cosine``: ``<u, v> / (|u| |v|)``, 0 where one is 0."""
    dot, u, v = (float(sum((a.double() * b.double()).sum() for a, b in zip(x, y, strict=True))) for x, y in (
        (of_utility, direction), (of_utility, of_utility), (direction, direction)))  # fmt: skip
    if scale == "product":
        return rate * dot
    return dot / (u * v) ** 0.5 if u > 0 and v > 0 else 0.0
