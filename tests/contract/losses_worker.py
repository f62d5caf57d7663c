"""One rank of the every-loss test, as a process of its own: it walks ZeRO stages and losses and writes the gradients that came out.

``python losses_worker.py RANK WORLD_SIZE RENDEZVOUS FOLDER``.  ``FOLDER`` holds the model and ``batches.pt``; all ranks walk the same list.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.config import LearnerConfig, ModelConfig
from posttrain.learner.lookahead import look_ahead
from posttrain.loss import Objective, load
from posttrain.records import TokenBatch
from posttrain.update import OWN

STAGES = (0, 1, 2, 3)
NOISE = 0.05
"""How far the recorded log-probs are from the model's, per token: some ratios are clipped, most are not."""


@dataclass(frozen=True)
class LocalMean:
    """The classical bug: a denominator counted over the micro-batch instead of the step."""

    coupling = "token"
    live = False

    def coefficient(self, view: Any, kept: Tensor | None = None) -> Tensor:
        return torch.full_like(view.logp, 1.0 / max(int(view.on.sum()), 1))


def wrong() -> Objective:
    right = load("grpo")
    (name, stream), *_ = right.streams.items()
    return Objective({name: replace(stream, aggregation=LocalMean())}, name="a mean of means")


HEADS = ("lm", "scalar")


def build(folder: Path, stage: int | None, rank: int = 0, world_size: int = 1, head: str = "lm") -> Any:
    """An engine that reports gradients and never moves: no learning rate, no clipping, and AdamW's running mean is the gradient itself.  ``stage``
    None is plain PyTorch."""
    model = ModelConfig(path=str(folder / "model"), dtype="float32", teacher=str(folder / "teacher"), base=str(folder / "base"))
    cfg = LearnerConfig(
        engine="torch" if stage is None else "deepspeed", zero_stage=stage or 0, world_size=world_size, lr=0.0, betas=[0.0, 0.99], eps=1e-8,
        weight_decay=0.0, max_grad_norm=0.0, head_chunk=7,
    )  # fmt: skip
    if stage is None:
        from posttrain.learner.torch_engine import TorchEngine as Engine
    else:
        from posttrain.learner.engine import DeepSpeedEngine as Engine
    return Engine(model, cfg, load("sft" if head == "lm" else "reward_model"), rank, world_size, 1, seed=3)


def gradient(engine: Any) -> Tensor:
    """The gradient that AdamW was given in the last step, all tensors in one row."""
    if not hasattr(engine, "stage"):
        return torch.cat([engine.optimizer.state[engine.master[p]]["exp_avg"].flatten() for _, p in engine.named])
    if engine.stage == 0:
        return torch.cat([engine.optimizer.state[p]["exp_avg"].flatten() for _, p in engine.named])
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.stage < 3:  # DeepSpeed notes where the states are after its first parameter group has stepped, when the others have none
        engine.ds.optimizer._hp_optimizer_states_linked = False
        engine.ds.optimizer._lazy_init_hp_params_optimizer_state()
    return torch.cat([safe_get_full_optimizer_state(p, "exp_avg").flatten() for _, p in engine.named])


def deal(num_sequences: int, name: str, stage: int, world_size: int) -> list[list[int]]:
    """Micro-batches of unequal size, cut anywhere, dealt round robin; the last one is empty."""
    draw = random.Random(f"{name} {stage}")
    order = list(range(num_sequences))
    draw.shuffle(order)
    edges = sorted(draw.sample(range(1, num_sequences), 2 * world_size - 2))
    return [*(order[a:b] for a, b in zip([0, *edges], [*edges, num_sequences], strict=True)), []]


def scores(engine: Any, batch: TokenBatch, parts: list[list[int]], *wanted: str) -> dict[str, Tensor]:
    out = {name: torch.full((batch.num_tokens,), torch.nan) for name in ("logp", *wanted)}
    for part in parts:
        found = engine.score(batch.take(part), "current", **dict.fromkeys(wanted, True))
        for name, column in out.items():
            if part:
                column[batch.columns_of(part)] = found[name]
    return out


def learn(engine: Any, objective: Objective, batch: TokenBatch, parts: list[list[int]], rank: int, world_size: int) -> Tensor:
    """One optimizer step over ``parts``: totals of the whole, two passes where coupled sets are cut.  Returns the gradient."""
    engine.core.objective = objective
    whole = batch.replace(totals=objective.totals(batch))
    if wanted := sorted(OWN & objective.needs.references):
        found = scores(engine, whole, parts, *wanted)
        whole = whole.with_logps(**{name: found[name] for name in wanted})
    weights = None
    if objective.needs.keep_whole and (len(parts) > 1 or objective.needs.coupling == "batch"):
        weights = objective.weights(whole, scores(engine, whole, parts)["logp"])
    mine = parts[rank::world_size]
    for index, part in enumerate(mine):
        given = None if weights is None else (weights[whole.columns_of(part)] if part else torch.zeros(1))
        engine.forward_backward(whole.take(part), given, last=index == len(mine) - 1)
    engine.optim_step()
    return gradient(engine).clone()


AHEAD = "amft, along mu"
"""The name of what :func:`along` found."""


def along(engine: Any, objective: Objective, batch: TokenBatch, parts: list[list[int]], rank: int, world_size: int) -> Tensor:
    """What the coefficient of ``amft`` changes in the gradient, all tensors in one row."""
    engine.core.objective = objective
    whole = batch.replace(totals=objective.totals(batch))
    look_ahead(engine, [whole.take(part) for part in parts[rank::world_size]], "mu", measure=False, keep=True)
    return torch.cat([part.flatten() for part in engine.core.directions["mu"]])


def main(rank: int, world_size: int, rendezvous: str, folder: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    batches: dict[str, tuple[Objective, TokenBatch]] = torch.load(folder / "batches.pt", weights_only=False)
    for stage in STAGES:
        found = {}
        for head in HEADS:
            engine = build(folder, stage, rank, world_size, head)
            for name, (objective, batch) in batches.items():
                if objective.needs.head != head:
                    continue
                parts = deal(batch.num_sequences, name, stage, world_size)
                try:
                    found[name] = learn(engine, objective, batch, parts, rank, world_size)
                    if name == "amft" and stage < 3:
                        found[AHEAD] = along(engine, objective, batch, parts, rank, world_size)
                except Exception as error:
                    print(f"rank {rank}, stage {stage}, {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    raise
            engine.close()
        if rank == 0:
            torch.save(found, folder / f"stage{stage}of{world_size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
