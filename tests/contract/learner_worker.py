"""One rank of the learner's contract test, as a process of its own: it walks the cases of its world and writes what came out.

``python learner_worker.py RANK WORLD_SIZE RENDEZVOUS OUT MODEL``.  All ranks of a world walk the same list.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Case:
    """``engine`` and ``stage`` as in the config; ``resume`` also checks a save after step 2 and a continuation to step 5; ``follow`` moves the
    base half way to the policy after step 2."""

    engine: str = "deepspeed"
    stage: int = 0
    offload: bool = False
    dtype: str = "float32"
    lora: bool = False
    checkpointing: bool = False
    kl: bool = False
    two_pass: bool = False
    resume: bool = False
    follow: bool = False

    @property
    def name(self) -> str:
        words = [self.engine, f"stage{self.stage}", self.dtype]
        return "-".join(words + [w for w in ("offload", "lora", "checkpointing", "kl", "two_pass", "follow") if getattr(self, w)])

    @property
    def reference(self) -> Case:
        """The single-process plain PyTorch run this one must agree with."""
        return Case("torch", dtype=self.dtype, lora=self.lora, kl=self.kl, follow=self.follow)


TORCH = [Case("torch", dtype=d, resume=True) for d in ("float32", "bfloat16")]
STAGES = [
    Case(stage=s, offload=o, dtype=d, resume=True) for d in ("float32", "bfloat16") for s in (0, 1, 2, 3) for o in (False, True) if s or not o
]
MORE = [
    *[Case(stage=s, lora=True, resume=s == 3) for s in (0, 2, 3)],
    *[Case(stage=s, checkpointing=True) for s in (2, 3)],
    Case(stage=3, lora=True, kl=True, checkpointing=True),
    Case(stage=3, kl=True),
    Case(stage=2, two_pass=True),
    *[Case("torch", lora=lora, kl=kl) for lora, kl in ((True, False), (False, True), (True, True))],
    *[Case(stage=s, lora=lora, kl=True, follow=True, resume=True) for s, lora in ((0, True), (2, False), (3, False))],
]
ALL = [*TORCH, *STAGES, *MORE]


def cases(world_size: int) -> list[Case]:
    """Two ranks run everything.  One rank runs the references, and every stage once more."""
    if world_size == 2:
        return ALL
    return [*{case.reference.name: case.reference for case in ALL}.values(), *[replace(case, resume=False) for case in STAGES]]


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
        extra["full"] = regularizer.FullKL("reverse", coef=20.0)
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


def micro_batches(step: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """The sequences in each of a rank's micro-batches: unequal token counts; in step 1 the second rank of two learns nothing at all."""
    every = [[0, 2], [1], [4, 5, 6], [3], [7], []] if step == 1 else [[0, 1], [2], [3], [4, 5], [6], [7]]
    return every[rank::world_size]


def masters(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().double().clone() for name, tensor in engine._masters()}


def first_moments(engine: Any, case: Case) -> dict[str, Tensor]:
    """AdamW's running mean of the gradients it was given, whole, by name."""
    if case.engine == "torch":
        found = {name: engine.optimizer.state[engine.master[p]]["exp_avg"] for name, p in engine.named}
    elif engine.stage == 0:
        found = {name: engine.optimizer.state[p]["exp_avg"] for name, p in engine.named}
    else:
        from deepspeed.utils import safe_get_full_optimizer_state

        if engine.stage < 3:  # DeepSpeed notes where the states are after its first parameter group has stepped, when the others have none
            engine.ds.optimizer._hp_optimizer_states_linked = False
            engine.ds.optimizer._lazy_init_hp_params_optimizer_state()
        found = {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in engine.named}
    return {name: tensor.double().view_as(p).clone() for (name, tensor), (_, p) in zip(found.items(), engine._masters(), strict=True)}


def learn(engine: Any, case: Case, step: int, rank: int, world_size: int, goal: Objective) -> None:
    """All forwards and backwards of one optimizer step."""
    whole = whole_batch(step, goal)
    weights = None
    if case.two_pass:
        own = [(p, engine.score(whole.take(p))["logp"]) for p in micro_batches(step)]
        current = torch.zeros(whole.num_tokens)
        for part, logp in own:
            if part:
                current[whole.columns_of(part)] = logp
        weights = goal.weights(whole, current)
    mine = micro_batches(step, rank, world_size)
    for index, part in enumerate(mine):
        given = None if weights is None else (weights[whole.columns_of(part)] if part else torch.zeros(1))
        engine.forward_backward(whole.take(part), given, last=index == len(mine) - 1)


def plant_nan(engine: Any) -> None:
    """Every gradient below the last norm becomes NaN; the loss stays finite."""

    def poison(module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad * torch.nan)

    engine.module.inner.model.norm.register_forward_hook(poison)


def plant_overflow(engine: Any) -> None:
    """Every micro-batch's gradient of one matrix is finite; the sum of two is not."""
    engine.named[1][1].register_hook(lambda grad: torch.full_like(grad, 3e38))


def stopped(engine: Any, case: Case, plant: Callable[[Any], None], rank: int, world_size: int, goal: Objective) -> dict[str, Any]:
    """What a step says whose gradients go bad on the last rank only, and whether it left everything as it was."""
    before, fingerprint, steps = masters(engine), engine.fingerprint(), engine.steps_taken
    if rank == world_size - 1:
        plant(engine)
    learn(engine, case, 3, rank, world_size, goal)
    said = ""
    try:
        engine.optim_step()
    except FloatingPointError as error:
        said = str(error)
    after = masters(engine)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"said": said, "unchanged": same and engine.fingerprint() == fingerprint and engine.steps_taken == steps}


def build(case: Case, model: str, rank: int, world_size: int, goal: Objective) -> Any:
    lora = LoraConfig(r=4, alpha=8.0) if case.lora else None
    model_cfg = ModelConfig(path=model, dtype=case.dtype, lora=lora, gradient_checkpointing=case.checkpointing)
    # a large eps makes Adam's step depend on the size of the gradient, so that a mean in place of a sum cannot hide; clipping acts (see the test)
    learner_cfg = LearnerConfig(
        engine=case.engine, zero_stage=case.stage, offload_optimizer=case.offload, world_size=world_size, lr=3e-3, betas=BETAS, eps=1e-2,
        weight_decay=0.1, max_grad_norm=0.75 if case.lora else 4.0, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1, head_chunk=7,
    )  # fmt: skip
    if case.engine == "torch":
        from posttrain.learner.torch_engine import TorchEngine as Engine
    else:
        from posttrain.learner.engine import DeepSpeedEngine as Engine
    return Engine(model_cfg, learner_cfg, goal, rank, world_size, STEPS, seed=3)


def run(case: Case, model: str, rank: int, world_size: int, out: Path) -> dict[str, Any]:
    goal = objective(case.kl)
    engine = build(case, model, rank, world_size, goal)
    start, reports, gradients, folder = masters(engine), [], [], out / "checkpoints" / case.name
    frozen_at_start = engine.frozen()
    mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for step in range(STEPS):
        learn(engine, case, step, rank, world_size, goal)
        reports.append(engine.optim_step())
        before, mean = mean, first_moments(engine, case)
        gradients.append({name: ((mean[name] - BETAS[0] * before[name]) / (1 - BETAS[0])).float() for name in mean})
        if case.follow and step + 1 == SAVE_AT:
            engine.move_base(0.5)
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
    if rank == 0:
        found["gradients"] = gradients
    found["nan"] = stopped(engine, case, plant_nan, rank, world_size, goal)
    engine.close()
    if case.resume:
        again = build(case, model, rank, world_size, goal)
        again.load(folder)
        later = []
        for step in range(SAVE_AT, STEPS):
            learn(again, case, step, rank, world_size, goal)
            later.append(again.optim_step())
        resumed = masters(again)
        found["resumed"] = {
            "identical": all(torch.equal(end[name], resumed[name]) for name in end),
            "reports": later,
            "fingerprint": again.fingerprint(),
        }
        found["overflow"] = stopped(again, case, plant_overflow, rank, world_size, goal)
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


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5])
