"""From composed settings to finished folders: the stages of a recipe in order, each from the last one's weights, with resume and a summary.

The loop itself is ``controller.py``; this file opens the run folder, starts the cluster, and makes sure that whatever happens there is a
``summary.json`` with the reason and no process left.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain import checkpoint, cluster
from posttrain.config import ConfigError, RunConfig
from posttrain.folder import RunFolder, differences, open_folder
from posttrain.report.summary import Summary


class Terminated(KeyboardInterrupt):
    """SIGTERM: close down in order, then say how to go on."""


def _on_term(number: int, frame: Any) -> None:
    raise Terminated("the run was asked to stop (SIGTERM)")


def launch(stages: dict[str, tuple[RunConfig, str]], composed: str, command: Sequence[str]) -> int:
    """Run every stage.  Returns the exit code 0; errors are raised after the summary is written and the cluster is down."""
    first = next(iter(stages.values()))[0]
    folder, resumed = open_folder(first.name, first.run_dir, first.resume, len(stages) > 1)
    if resumed:
        _compare(folder, stages)
    folder.root.mkdir(parents=True, exist_ok=True)
    (folder.root / "config.yaml").write_text(composed)
    for name, (_, text) in stages.items():
        (folder.root / "stages").mkdir(exist_ok=True)
        (folder.root / "stages" / f"{name}.yaml").write_text(text)
    summary = Summary(folder.root, command=list(command))
    reason = "finished"
    try:
        with cluster.session(first.cluster, cluster.demand({n: c for n, (c, _) in stages.items()})):
            signal.signal(signal.SIGTERM, _on_term)  # after Ray, which installs a handler of its own
            asyncio.run(_stages(stages, folder, summary, resumed))
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        with contextlib.suppress(OSError):  # on a full disk the error itself matters more
            (folder.root / "error.txt").write_text("".join(traceback.format_exception(error)))
        if isinstance(error, Exception) and "resume=auto" not in str(error) and (kept := _newest(folder, stages)):
            error.add_note(f"the same command with run_dir={folder.root} resume=auto goes on from {kept}")
        raise
    finally:
        summary.write(reason)
    summary.print_closing()
    return 0


def _newest(folder: RunFolder, stages: Sequence[str] | dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of the last stage that has one."""
    found = (checkpoint.newest(folder.of("checkpoints", name)) for name in reversed(list(stages)))
    return next((path for one in found if one for path in one[1:]), None)


def _compare(folder: RunFolder, stages: dict[str, tuple[RunConfig, str]]) -> None:
    """Refuse to continue a run with other settings than it began with."""
    import yaml

    for name, (_, text) in stages.items():
        path = folder.root / "stages" / f"{name}.yaml"
        changed = differences(yaml.safe_load(path.read_text()), yaml.safe_load(text)) if path.exists() else []
        if changed:
            raise ConfigError(
                f"run_dir={folder.root}: stage {name} began with other settings ({'; '.join(changed[:5])}); continue with the same ones, or start anew with resume=never and another run_dir"
            )


async def _stages(stages: dict[str, tuple[RunConfig, str]], folder: RunFolder, summary: Summary, resumed: bool) -> None:
    from posttrain.build import open_stage
    from posttrain.controller import train
    from posttrain.report.console import Console

    done = folder.state["stages"]
    previous: str | None = None
    with Console(folder.root, total_stages=len(stages)) as console:
        for number, (name, (config, _)) in enumerate(stages.items()):
            longer = name in done and config.steps > done[name]["steps"]
            if longer and (later := [n for n in list(stages)[number + 1 :] if n in done]):
                raise ConfigError(
                    f"stages.{name}.steps={config.steps}: the stage is done after {done[name]['steps']} steps and stage {later[0]} began from "
                    f"its weights; only the last stage can be continued, or start anew with another run_dir"
                )
            if name in done and not longer:
                console.message(f"stage {name} is done already: {done[name].get('export')}")
                summary.add_stage(name, done[name])
                previous = done[name].get("export")
                continue
            started = time.monotonic()
            keep_for_next = number + 1 < len(stages)
            async with open_stage(config, name, folder, console, start_from=previous, resume=resumed, last=not keep_for_next) as run:
                await train(run)
                result = await run.finish()
            result |= {"seconds": round(time.monotonic() - started, 2)}
            folder.finish_stage(name, result)
            summary.add_stage(name, result)
            previous = result.get("export")


def evaluate_model(config: RunConfig) -> int:
    """``posttrain eval``: held-out accuracy of ``model.path`` with an interval."""
    import tempfile

    from posttrain.build import evaluate_once, prepare_evaluation
    from posttrain.preflight import preflight_evaluation

    rollout, gpu = config.rollout, config.cluster.device == "cuda"
    gpus = rollout.num_engines * config.cluster.gpus_per_engine * rollout.tensor_parallel if gpu else 0.0
    preflight_evaluation(config, gpus)
    with tempfile.TemporaryDirectory() as scratch:
        config, tokenizer, prompts = prepare_evaluation(config, Path(scratch) / "model")
        with cluster.session(config.cluster, gpus):
            report = asyncio.run(evaluate_once(config, tokenizer, prompts))
    print(report)
    return 0


def export_checkpoint(run_dir: Path, stage: str | None, step: int | None, out: str | None, cluster_settings: dict[str, Any] | None = None) -> str:
    """``posttrain export``: a checkpoint of a run as a Hugging Face folder.  Returns its path.

    Without ``stage`` and ``step``: the newest whole checkpoint of the last stage that has one.  ``cluster_settings`` replace those of the run.
    """
    import yaml

    from posttrain.build import export_from_checkpoint
    from posttrain.cli import build_config
    from posttrain.paths import CONFIGS
    from posttrain.preflight import resources

    listed = run_dir / "config.yaml"
    if not listed.exists():
        raise ConfigError(f"run_dir={run_dir} holds no run (no config.yaml)")
    names = [str(name) for name in yaml.safe_load(listed.read_text()).get("stages") or ["train"]]
    if stage is not None and stage not in names:
        raise ConfigError(f"run_dir={run_dir} has no stage {stage!r}; it has {', '.join(names)}")
    folder = RunFolder(run_dir, len(names) > 1)
    name, path = _find_checkpoint(folder, [stage] if stage else names, step)
    settings = yaml.safe_load((run_dir / "stages" / f"{name}.yaml").read_text())
    # the weights need neither data nor rewards nor the loss they were learnt with, which may be the user's own and not be there any more
    settings |= {"data": {}, "reward": {}, "advantage": None, "mixture": {}, "cluster": {**settings["cluster"], **(cluster_settings or {})}}
    settings["loss"] = yaml.safe_load((CONFIGS / "loss" / "sft.yaml").read_text())
    settings["rollout"]["strategy"] = None
    config = build_config(settings)
    config.model.path = _moved(checkpoint.verify(path)["model_path"], run_dir)
    gpus = config.learner.world_size * config.cluster.gpus_per_learner if config.cluster.device == "cuda" else 0.0
    resources(config.cluster, gpus)
    target = Path(out) if out else folder.of("export", name).with_name(f"{name if len(names) > 1 else 'export'}-{path.name}")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"out={target} is not empty; give another folder with out=FOLDER")
    with cluster.session(config.cluster, gpus):
        return str(asyncio.run(export_from_checkpoint(config, path.resolve(), target.resolve())))


def _find_checkpoint(folder: RunFolder, names: Sequence[str], step: int | None) -> tuple[str, Path]:
    """The stage and folder of the checkpoint that was asked for, or of the newest one."""
    for name in reversed(names):
        root = folder.of("checkpoints", name)
        there = checkpoint.steps(root)
        if step is not None and step in there:
            path = checkpoint.folder_of(root, step)
            checkpoint.verify(path)
            return name, path
        found = checkpoint.newest(root, lambda text: print(text, file=sys.stderr)) if step is None else None
        if found:
            return name, found[1]
    kept = [f"{name}: {', '.join(map(str, s))}" for name in names if (s := checkpoint.steps(folder.of("checkpoints", name)))]
    what = "whole checkpoint" if step is None else f"checkpoint of step {step}"
    raise ConfigError(f"run_dir={folder.root} holds no {what} of {' or '.join(names)}" + (f" (there are steps {'; '.join(kept)})" if kept else ""))


def _moved(path: str, run_dir: Path) -> str:
    """A path of a run, found again inside the run's folder when that was moved."""
    parts = Path(path).parts
    here = (run_dir.joinpath(*parts[i:]) for i in range(1, len(parts)))
    return path if Path(path).exists() else str(next((p for p in here if p.exists()), path))


def preview_data(stages: dict[str, RunConfig]) -> int:
    """``posttrain preview``: what of each stage's data is learnt from, token by token."""
    import tempfile

    from posttrain.build import load_stage_data
    from posttrain.data.preview import length_statistics, preview
    from posttrain.preflight import model

    with tempfile.TemporaryDirectory() as scratch:
        previous: str | None = None
        for number, (name, config) in enumerate(stages.items()):
            if config.model.path is None and config.model.tiny is None and config.init_from is None and previous is None:
                raise ConfigError("model.path is not set: its tokenizer says what the data becomes; give model.path=FOLDER_OR_ID")
            if len(stages) > 1:
                print(("\n" if number else "") + f"stage {name}")
            config, tokenizer = model(config, Path(scratch) / name, previous)
            records, report, *_ = load_stage_data(config, tokenizer)
            previous = config.model.path
            preview(records[0], tokenizer)
            print(report)
            print(length_statistics(report))
    return 0
