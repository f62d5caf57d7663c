"""One rank of the learner's contract suite: runs every combination it is given and writes what came out.

``python learner_worker.py RANK WORLD_SIZE RENDEZVOUS OUT MODEL``.  A combination is a :class:`Case`; all ranks of a world walk the same list.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference, regularizer
from posttrain.records import Row, TokenBatch

STEPS, SAVE_AT = 5, 2


@dataclass(frozen=True)
class Case:
    """``engine`` and ``stage`` as in the config; ``resume`` also checks a save after step 2 and a continuation to step 5."""

    engine: str = "deepspeed"
    stage: int = 0
    offload: bool = False
    dtype: str = "float32"
    lora: bool = False
    checkpointing: bool = False
    kl: bool = False
    two_pass: bool = False
    resume: bool = False

    @property
    def name(self) -> str:
        words = [self.engine, f"stage{self.stage}", self.dtype]
        return "-".join(words + [w for w in ("offload", "lora", "checkpointing", "kl", "two_pass") if getattr(self, w)])


TORCH = [Case("torch", dtype=d) for d in ("float32", "bfloat16")]
STAGES = [Case(stage=s, offload=o, dtype=d) for d in ("float32", "bfloat16") for s in (0, 1, 2, 3) for o in (False, True) if s or not o]
MORE = [
    *[Case(stage=s, lora=True) for s in (0, 2, 3)],
    *[Case(stage=s, checkpointing=True) for s in (2, 3)],
    Case(stage=3, lora=True, kl=True, checkpointing=True),
    Case(stage=3, kl=True),
    Case(stage=2, two_pass=True),
    Case("torch", lora=True),
    Case("torch", kl=True),
    Case("torch", lora=True, kl=True),
]
RESUME = [replace(case, resume=True) for case in (TORCH[0], *[c for c in STAGES if c.dtype == "float32"], Case(stage=3, lora=True))]


def reference_of(case: Case) -> Case:
    """The single-process plain PyTorch run a case must agree with."""
    return Case("torch", dtype=case.dtype, lora=case.lora, kl=case.kl)


def cases(world_size: int) -> list[Case]:
    """Two ranks run everything.  One rank runs the references, and every stage once more."""
    resume = {case.name for case in RESUME}
    if world_size == 2:
        return [replace(case, resume=case.name in resume) for case in [*TORCH, *STAGES, *MORE]]
    references = {reference_of(case).name: reference_of(case) for case in [*TORCH, *STAGES, *MORE]}
    return [*references.values(), *STAGES]


def objective(kl: bool) -> Objective:
    stream = Stream(
        source=("policy",),
        likelihood=likelihood.Token(temperature=0.9),
        reference=reference.Named(),
        advantage=advantage.Column(),
        aggregation=aggregate.SequenceMeanTokenMean(),
        masks={"clip": mask.RatioClip()},
    )
    extra: dict[str, Any] = {"entropy": regularizer.Entropy(0.05)}
    if kl:
        extra["full"] = regularizer.FullKL("reverse", coef=0.5)
    return Objective({"rollouts": stream}, extra)


def whole_batch(step: int, goal: Objective) -> TokenBatch:
    """Eight sequences of very different lengths.  Sequences 1 and 3 have nothing to learn."""
    draw = torch.Generator().manual_seed(step)
    rows = []
    for index, length in enumerate((5, 9, 23, 7, 14, 3, 11, 6)):
        ids = torch.randint(5, 90, (length,), generator=draw).tolist()
        prompt = length if index in (1, 3) else 2
        rows.append(
            Row(
                ids=ids,
                sources=["prompt"] * prompt + ["policy"] * (length - prompt),
                advantage=float(torch.randn((), generator=draw)),
                group=index // 2,
                sample_id=f"{step}/{index}",
            )
        )
    whole = TokenBatch.from_sequences(rows, progress=step / STEPS)
    return whole.replace(totals=goal.totals(whole))


def micro_batches(step: int) -> list[list[int]]:
    """Dealt to ranks in turn: unequal token counts; in step 1 the second rank of two learns nothing at all."""
    if step == 1:
        return [[0, 2], [1], [4, 5, 6], [3], [7], []]
    return [[0, 1], [2], [3], [4, 5], [6], [7]]


def masters(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().double().clone() for name, tensor in engine._masters()}


def one_step(engine: Any, case: Case, step: int, rank: int, world_size: int, goal: Objective) -> dict[str, float]:
    whole, parts = whole_batch(step, goal), micro_batches(step)
    weights = None
    if case.two_pass:
        own = [(p, engine.score(whole.take(p))["logp"]) for p in parts]
        current = torch.zeros(whole.num_tokens)
        for part, logp in own:
            if part:
                current[whole.columns_of(part)] = logp
        weights = goal.weights(whole, current)
    mine = parts[rank::world_size]
    for index, part in enumerate(mine):
        given = None if weights is None else (weights[whole.columns_of(part)] if part else torch.zeros(1))
        engine.forward_backward(whole.take(part), given, last=index == len(mine) - 1)
    return engine.optim_step()


def build(case: Case, model: str, rank: int, world_size: int, goal: Objective) -> Any:
    lora = LoraConfig(r=4, alpha=8.0) if case.lora else None
    model_cfg = ModelConfig(path=model, dtype=case.dtype, lora=lora, gradient_checkpointing=case.checkpointing)
    # a large eps makes Adam's step depend on the size of the gradient, so that a mean in place of a sum cannot hide; clipping acts (see the test)
    learner_cfg = LearnerConfig(
        engine=case.engine, zero_stage=case.stage, offload_optimizer=case.offload, world_size=world_size, lr=3e-3, eps=1e-2, weight_decay=0.1,
        max_grad_norm=0.5, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1, head_chunk=7,
    )  # fmt: skip
    if case.engine == "torch":
        from posttrain.learner.torch_engine import TorchEngine as Engine
    else:
        from posttrain.learner.engine import DeepSpeedEngine as Engine
    return Engine(model_cfg, learner_cfg, goal, rank, world_size, STEPS, seed=3)


def run(case: Case, model: str, rank: int, world_size: int, out: Path) -> dict[str, Any]:
    goal = objective(case.kl)
    engine = build(case, model, rank, world_size, goal)
    start, reports, folder = masters(engine), [], out / "checkpoints" / case.name
    frozen_at_start = engine.frozen()
    for step in range(STEPS):
        reports.append(one_step(engine, case, step, rank, world_size, goal))
        if case.resume and step + 1 == SAVE_AT:
            engine.save(folder)
    end = masters(engine)
    found: dict[str, Any] = {
        "start": start,
        "end": end,
        "reports": reports,
        "frozen_at_start": frozen_at_start,
        "frozen": engine.frozen(),
        "logp": engine.score(whole_batch(9, goal))["logp"],
        "base": engine.score(whole_batch(9, goal), "base")["logp"],
        "fingerprint": engine.fingerprint(),
        "state": {name: tensor.clone() for name, tensor in engine.state()},
    }
    engine.close()
    if case.resume:
        again = build(case, model, rank, world_size, goal)
        again.load(folder)
        later = [one_step(again, case, step, rank, world_size, goal) for step in range(SAVE_AT, STEPS)]
        resumed = masters(again)
        found["resumed"] = {
            "identical": all(torch.equal(end[name], resumed[name]) for name in end),
            "reports": later,
            "fingerprint": again.fingerprint(),
        }
        again.close()
    return found


def main(rank: int, world_size: int, rendezvous: str, out: Path, model: str) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    only = os.environ.get("LEARNER_CASES")
    for case in cases(world_size):
        if only and not any(case.name.startswith(word) for word in only.split(",")):
            continue
        try:
            found = run(case, model, rank, world_size, out)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
            print(f"rank {rank} of {world_size}, {case.name}: {found['error']}", file=sys.stderr, flush=True)
            torch.save(found, out / f"{case.name}-rank{rank}of{world_size}.pt")
            raise
        torch.save(found, out / f"{case.name}-rank{rank}of{world_size}.pt")
    dist.destroy_process_group()


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5])
