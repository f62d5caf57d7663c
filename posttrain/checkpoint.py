"""Everything or nothing: a checkpoint is a folder that appears under its name only when it is whole.

    checkpoints/step_00000050/   learner/...   controller.json   MANIFEST.json

Files are written to a hidden sibling, flushed to disk, listed with size and SHA-256 in ``MANIFEST.json``, and renamed in one step.  A folder
without a manifest, or whose files do not match it, is torn: it is reported and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step_(\d{8})$")


class TornCheckpoint(ValueError):
    """A checkpoint that does not match its manifest.  The message names the file."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.  Raises :class:`TornCheckpoint` otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise TornCheckpoint(f"{folder}: no readable {MANIFEST} ({error})") from error
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise TornCheckpoint(f"{folder}: {name} is missing or has the wrong size")
        if _digest(path) != digest:
            raise TornCheckpoint(f"{folder}: the content of {name} does not match its checksum")
    return manifest


def steps(root: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    return sorted(int(m.group(1)) for p in root.glob("step_*") if (m := _NAME.match(p.name)))


def folder_of(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def newest(root: Path, warn: Callable[[str], None] = lambda _: None) -> tuple[int, Path] | None:
    """The newest whole checkpoint, telling ``warn`` about every torn one that was passed over."""
    for step in reversed(steps(root)):
        try:
            verify(folder_of(root, step))
            return step, folder_of(root, step)
        except TornCheckpoint as error:
            warn(f"checkpoint passed over: {error}")
    return None


async def write(root: Path, step: int, fill: Callable[[Path], Awaitable[None]], meta: dict[str, Any]) -> Path:
    """Write one checkpoint.  ``fill(folder)`` writes its files.  On any failure (a full disk, say) nothing appears under the final name and
    the error says so."""
    final, temporary = folder_of(root, step), root / f".writing_step_{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        await fill(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        listing = {str(p.relative_to(temporary)): [p.stat().st_size, _digest(p)] for p in files}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, **meta, "files": listing}, indent=1))
        for path in [*files, temporary / MANIFEST, temporary]:
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(root)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = newest(root)
        reason = getattr(error, "cause", None) or error
        free = f" ({shutil.disk_usage(root).free / 2**20:.0f} MiB are free there)" if root.is_dir() else ""
        raise OSError(
            f"the checkpoint of step {step} could not be written to {root}{free}: {reason}. "
            + (f"The one of step {kept[0]} is whole. " if kept else "There is no earlier one. ")
            + "Free some disk space or set run_dir to another disk, then run the same command with resume=auto"
        ) from error
    return final


def prune(root: Path, keep: int) -> None:
    """Keep the newest ``keep`` checkpoints; 0 keeps all."""
    for step in steps(root)[:-keep] if keep > 0 else []:
        shutil.rmtree(folder_of(root, step), ignore_errors=True)
    for left_over in root.glob(".writing_step_*"):
        shutil.rmtree(left_over, ignore_errors=True)


@dataclass
class Checkpointer:
    """Saves the learner's and the controller's state every ``every`` steps and at the last one.

    ``learner`` has ``save(folder)``, and so has ``critic``, where there is one; ``state`` returns what the controller must remember beside the data order.
    """

    root: Path
    learner: Any
    state: Callable[[], dict[str, Any]]
    every: int
    keep: int
    total: int
    meta: dict[str, Any]
    critic: Any = None

    async def maybe_save(self, step: int, sampler_state: dict[str, Any]) -> Path | None:
        if step != self.total and (self.every <= 0 or step % self.every):
            return None

        async def fill(folder: Path) -> None:
            await self.learner.save(str(folder / "learner"))
            if self.critic is not None:
                await self.critic.save(str(folder / "critic"))
            (folder / "controller.json").write_text(json.dumps({"step": step, "rollout": sampler_state, **self.state()}, indent=1))

        path = await write(self.root, step, fill, self.meta)
        prune(self.root, self.keep)
        return path


def read_controller(folder: Path) -> dict[str, Any]:
    """What the controller remembered, from a whole checkpoint."""
    return json.loads((folder / "controller.json").read_text())
