"""Writers of metrics and completions: JSONL always, Weights & Biases and TensorBoard when asked for.

A hosted tracker never stops or holds up a run: without a login it writes offline, and when it fails it says so once and goes silent.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from posttrain.records import Rollout

Metrics = Mapping[str, float]
Say = Callable[[str], None]


class Tracker(Protocol):
    """A sink of metrics.  ``step`` counts finished steps of the stage, from 1."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


def _json(value: Any) -> Any:
    """Numbers that JSON has no word for become null, everywhere inside."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return value


def dumps(value: Any) -> str:
    """One line of standard JSON."""
    return json.dumps(_json(value), allow_nan=False, ensure_ascii=False, default=str)


class JsonlTracker:
    """``metrics.jsonl``: one row per step with ``step``, ``stage``, ``time`` (seconds since 1970) and the metrics under their flat names.

    Opening it for a stage that goes on after ``resume_step`` drops that stage's later rows and a torn last line, so the file reads as if the
    run had never stopped.  Rows of other stages stay.
    """

    def __init__(self, path: Path, stage: str, resume_step: int = 0) -> None:
        self.path, self.stage = path, stage
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._truncate(resume_step)
        self._file = path.open("a", encoding="utf-8")

    def _truncate(self, resume_step: int) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        kept = []
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("stage") != self.stage or row.get("step", 0) <= resume_step:
                kept.append(line + "\n")
        if (new := "".join(kept)) != text:
            temporary = self.path.with_name(f".{self.path.name}.writing")
            temporary.write_text(new, encoding="utf-8")
            os.replace(temporary, self.path)

    def log(self, step: int, metrics: Metrics) -> None:
        self._file.write(dumps({"step": step, "stage": self.stage, "time": round(time.time(), 3), **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """Event files in ``folder``; on resume, events after ``resume_step`` are hidden by TensorBoard itself (``purge_step``)."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)  # type: ignore[no-untyped-call]

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def wandb_mode(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> str:
    """What ``WANDB_MODE`` says; else ``online`` when there is a login (``WANDB_API_KEY`` or an entry in ``~/.netrc``), else ``offline``."""
    if environ.get("WANDB_MODE"):
        return environ["WANDB_MODE"]
    if environ.get("WANDB_API_KEY"):
        return "online"
    import netrc
    from urllib.parse import urlparse

    host = urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        login = netrc.netrc(environ.get("NETRC") or (home or Path.home()) / ".netrc").authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    return "online" if login else "offline"


class WandbTracker:
    """One Weights & Biases run per stage, grouped by the run's name; a resumed stage goes on in its own run.

    Never asks for a login and never waits longer than ``timeout_s`` for a server: then it writes offline (``wandb sync`` sends it later).
    """

    def __init__(
        self, folder: Path, project: str, name: str, stage: str, config: Mapping[str, Any] | None = None, timeout_s: float = 30.0
    ) -> None:
        import wandb

        # a run folder has one identity wherever it lies, so a resumed stage finds its run again
        identity = "".join(c if c.isalnum() else "-" for c in f"{name}-{stage}")[-64:]

        def start(mode: str) -> Any:
            settings = wandb.Settings(silent=True, console="off", init_timeout=timeout_s, x_disable_stats=True)
            return wandb.init(
                project=project,
                name=f"{name}/{stage}",
                id=identity,
                group=name,
                dir=str(folder),
                mode=mode,
                resume="allow" if mode == "online" else None,
                config=dict(config or {}),
                settings=settings,
                reinit="create_new",
            )

        mode = wandb_mode()
        try:
            self._run = start(mode)
        except Exception:
            if mode != "online":
                raise
            self._run = start("offline")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Forgiving:
    """A tracker whose failure is told once and then ignored: what is measured must not depend on who is listening."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Say) -> None:
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        self._guard("could not start", lambda: setattr(self, "_tracker", make()))

    def _guard(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._tracker = None
            first = (str(error).splitlines() or [""])[0]
            self._say(f"tracking: {self._name} {what} ({type(error).__name__}: {first}); the run goes on, metrics.jsonl has everything")

    def log(self, step: int, metrics: Metrics) -> None:
        if (tracker := self._tracker) is not None:
            self._guard("failed", lambda: tracker.log(step, metrics))

    def close(self) -> None:
        if (tracker := self._tracker) is not None:
            self._tracker = None
            self._guard("could not be closed", tracker.close)


def open_trackers(
    root: Path,
    stage: str,
    *,
    resume_step: int = 0,
    wandb: bool = False,
    tensorboard: bool = False,
    project: str = "posttrain",
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    say: Say = print,
) -> list[Tracker]:
    """The trackers of a stage; ``metrics.jsonl`` is always the first.  ``config`` is shown by trackers that show one."""
    trackers: list[Tracker] = [JsonlTracker(root / "metrics.jsonl", stage, resume_step)]
    if tensorboard:
        trackers.append(Forgiving("TensorBoard", lambda: TensorBoardTracker(root / "tensorboard" / stage, resume_step), say))
    if wandb:
        trackers.append(Forgiving("Weights & Biases", lambda: WandbTracker(root, project, name or root.name, stage, config), say))
    return trackers


class CompletionsWriter:
    """``completions/step_NNNNNN.jsonl``: what was sampled, one rollout per line, readable as text.

    A line has ``sample``, ``prompt_id``, ``prompt``, ``completion`` (``turns`` beside it when there were several), ``answer``, ``reward``, ``scores`` (value per reward, null where the verdict
    failed), ``failed`` (status per failed reward), ``advantage``, ``version`` (oldest weights), ``finish`` and ``tokens``; with ``with_ids`` also
    ``prompt_ids``, ``ids`` and ``logprobs`` exactly as sampled.
    """

    def __init__(self, folder: Path, with_ids: bool = False, resume_step: int | None = None) -> None:
        self.folder, self.with_ids = folder, with_ids
        folder.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            for path in folder.glob("step_*.jsonl"):
                if int(path.stem.removeprefix("step_")) > resume_step:
                    path.unlink()

    def write(self, step: int, rollouts: Sequence[Rollout]) -> Path:
        """Write a step's rollouts in one go, replacing what was there."""
        path = self.folder / f"step_{step:06d}.jsonl"
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text("".join(dumps(self._row(r)) + "\n" for r in rollouts), encoding="utf-8")
        os.replace(temporary, path)
        return path

    def _row(self, r: Rollout) -> dict[str, Any]:
        row: dict[str, Any] = {
            "sample": r.sample_id,
            "prompt_id": r.prompt.id,
            "prompt": r.prompt.text,
            "completion": r.text,
            **({"turns": [{"role": role, "content": text} for role, text in r.turns]} if len(r.turns) > 1 else {}),
            "answer": r.prompt.answer,
            "reward": r.reward,
            "scores": {name: score.value for name, score in r.scores.items()},
            "failed": {name: f"{score.status}: {score.detail}" for name, score in r.scores.items() if score.value is None},
            "said": {name: score.detail for name, score in r.scores.items() if score.value is not None and score.detail},
            "advantage": r.advantage,
            "version": r.version,
            "finish": r.finish,
            "tokens": r.num_tokens,
        }
        if self.with_ids:
            row |= {
                "prompt_ids": list(r.prompt.ids),
                "ids": _flat(s.ids for s in r.segments),
                "logprobs": _flat(s.logprobs if s.logprobs is not None else [None] * len(s.ids) for s in r.segments),
            }
        return row


def _flat(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return [value for part in parts for value in part]
