"""The run folder: where everything of a run lies, which run ``resume=auto`` means, and which stages are done.

    runs/NAME-DATE/  config.yaml  stages/NAME.yaml  state.json  metrics.jsonl  completions/  checkpoints/  export/  summary.json

A recipe with several stages has ``checkpoints/STAGE``, ``export/STAGE`` and ``completions/STAGE``.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import ConfigError

# settings that may differ between a run and its continuation
FREE = ("stages", "resume", "run_dir", "tracking", "checkpoint", "eval", "check", "cluster", "strict", "steps", "sync")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.  ``several`` says that the recipe has stages."""

    root: Path
    several: bool

    def of(self, kind: str, stage: str) -> Path:
        """``checkpoints``, ``export`` or ``completions`` of a stage."""
        return self.root / kind / stage if self.several else self.root / kind

    # -- state -----------------------------------------------------------------------------------------------------------
    @property
    def state(self) -> dict[str, Any]:
        """Results of the finished stages; empty for a new run."""
        path = self.root / "state.json"
        return json.loads(path.read_text()) if path.exists() else {"stages": {}}

    def finish_stage(self, stage: str, result: dict[str, Any]) -> None:
        """Record, atomically, that a stage is done."""
        state = self.state
        state["stages"][stage] = result
        write_json(self.root / "state.json", state)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step: the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def open_folder(name: str, run_dir: str | None, resume: str, several: bool) -> tuple[RunFolder, bool]:
    """The folder of this run and whether it continues an earlier one.

    ``resume=never`` needs a folder without a run in it; ``auto`` continues ``run_dir``, or the newest folder of this name, or starts anew.
    """
    if resume not in ("never", "auto"):
        raise ConfigError(f"resume={resume!r}; choose never or auto (with run_dir=FOLDER for a particular run)")
    if run_dir is not None:
        root = Path(run_dir)
        exists = (root / "config.yaml").exists()
        if exists and resume == "never":
            raise ConfigError(f"run_dir={root} holds a run already; add resume=auto to continue it, or choose another folder")
        return RunFolder(root, several), exists
    if resume == "auto":
        earlier = sorted(p.parent for p in Path("runs").glob(f"{name}-*/config.yaml"))
        if earlier:
            return RunFolder(earlier[-1], several), True
    stamp = time.strftime("%Y%m%d-%H%M%S")
    root = Path("runs") / f"{name}-{stamp}"
    number = 1
    while root.exists():
        number += 1
        root = Path("runs") / f"{name}-{stamp}-{number}"
    return RunFolder(root, several), False


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Settings that differ between two composed configs, as ``key: old -> new``, leaving out those that may."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted(set(old) | set(new), key=str):
            full = f"{path}.{key}" if path else str(key)
            if full not in FREE:
                out += differences(old.get(key), new.get(key), full)
        return out
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
