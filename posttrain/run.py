"""From composed settings to finished folders: the stages of a recipe in order, each from the last one's weights, with resume and a summary.

The loop itself is ``controller.py``; this file opens the run folder, starts the cluster, and makes sure that whatever happens there is a
``summary.json`` with the reason and no process left.
"""

from __future__ import annotations

import asyncio
import os
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
        (folder.root / "error.txt").write_text("".join(traceback.format_exception(error)))
        raise
    finally:
        summary.write(reason)
    summary.print_closing()
    return 0


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
            if name in done:
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
    from posttrain.build import evaluate_once

    if config.data.eval is None:
        raise ConfigError("data.eval is not set: give data.eval.path=FILE or choose data=NAME with held-out rows")
    with cluster.session(config.cluster, cluster.demand({"eval": config})):
        report = asyncio.run(evaluate_once(config))
    print(report)
    return 0


def export_checkpoint(run_dir: Path, stage: str | None, step: int | None, out: str | None) -> str:
    """``posttrain export``: a checkpoint of a run as a Hugging Face folder.  Returns its path."""
    from posttrain.build import export_from_checkpoint

    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"run_dir={run_dir} holds no run (no config.yaml)")
    names = sorted((p.stem for p in (run_dir / "stages").glob("*.yaml")), key=lambda n: (run_dir / "stages" / f"{n}.yaml").stat().st_mtime)
    stage = stage or names[-1]
    if stage not in names:
        raise ConfigError(f"run_dir={run_dir} has no stage {stage!r}; it has {', '.join(names)}")
    folder = RunFolder(run_dir, len(names) > 1)
    root = folder.of("checkpoints", stage)
    if step is not None:
        path = checkpoint.folder_of(root, step)
        checkpoint.verify(path)
    else:
        found = checkpoint.newest(root, lambda text: print(text, file=sys.stderr))
        if found is None:
            raise ConfigError(f"{root} holds no whole checkpoint")
        path = found[1]
    target = Path(out) if out else folder.of("export", stage).with_name(f"{path.name}-export")
    return str(export_from_checkpoint(path, target, run_dir / "stages" / f"{stage}.yaml"))


def preview_data(config: RunConfig) -> int:
    """``posttrain preview``: what of the data is learnt from, token by token."""
    from posttrain.build import load_stage_data, prepare_model
    from posttrain.data.preview import preview

    tokenizer = prepare_model(config, Path(os.environ.get("TMPDIR", "/tmp")) / "posttrain-preview", None)[1]
    records, report, *_ = load_stage_data(config, tokenizer)
    preview(records[0], tokenizer)
    print(report)
    return 0
