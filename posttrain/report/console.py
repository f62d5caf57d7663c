"""Live progress on a terminal, plain lines everywhere else.

Text from a model is shown as data: control characters are spelled out, markup is not interpreted, long answers are cut.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from posttrain.records import Rollout

PLAIN_LINES = 100
"""At most about this many progress lines per stage when there is no terminal, and a tenth as many samples."""


def is_live(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``stream`` is a terminal to draw on.  ``NO_COLOR``, ``CI`` and ``TERM=dumb`` ask for plain lines."""
    return stream.isatty() and not environ.get("NO_COLOR") and not environ.get("CI") and environ.get("TERM") != "dumb"


def readable(text: str, width: int = 60) -> str:
    """One printable line of at most ``width`` characters; what a terminal would act upon is spelled out."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 4 * width])
    return spelled if len(spelled) <= width and len(text) <= 4 * width else spelled[: width - 3] + "..."


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def headline(metrics: Mapping[str, float]) -> dict[str, str]:
    """What a person wants to see of a step, in order; only what is there."""
    out: dict[str, str] = {}
    if "reward/mean" in metrics:
        out["reward"] = f"{metrics['reward/mean']:.3f}"
    for name, value in metrics.items():
        stream, _, what = name.partition("/")
        if what == "nll" and "/" not in what:
            out[f"{stream} nll"] = f"{value:.3f}"
        elif what == "accuracy" and stream != "eval":
            out[f"{stream} ranked right"] = f"{100 * value:.0f} %"
    if "eval/accuracy" in metrics:
        out["accuracy"] = f"{100 * metrics['eval/accuracy']:.1f} %"
    if "rollout/tokens_mean" in metrics:
        out["length"] = f"{metrics['rollout/tokens_mean']:.0f}"
    if "learner/grad_norm" in metrics:
        out["grad norm"] = f"{metrics['learner/grad_norm']:.2g}"
    if "time/tokens_per_s" in metrics:
        out["tokens/s"] = f"{metrics['time/tokens_per_s']:.0f}"
    return out


class Console:
    """Fed by events: ``start_stage``, ``step``, ``message``, ``finish``.  A context manager, so that the terminal is given back.

    ``stream`` defaults to standard output; ``live`` to what :func:`is_live` says.
    """

    def __init__(
        self, root: Path | str | None = None, total_stages: int = 1, stream: TextIO | None = None, live: bool | None = None
    ) -> None:
        self.root, self.total_stages = root, total_stages
        self.stream = sys.stdout if stream is None else stream
        self.live = is_live(self.stream) if live is None else live
        self.stage, self.number, self.total, self.done = "", 0, 0, 0
        self.accuracy: float | None = None
        self._evaluated = False
        self._metrics: dict[str, float] = {}
        self._samples: list[Rollout] = []
        self._first, self._started, self._now = 0, time.monotonic(), time.monotonic()
        self._display: Any = None

    def __enter__(self) -> Console:
        if self.live:
            from rich.console import Console as Terminal
            from rich.live import Live

            self._display = Live(
                console=Terminal(file=self.stream, force_terminal=True),
                get_renderable=self._render,
                refresh_per_second=4,
                transient=False,
                redirect_stderr=False,
            )
            self._display.start()
        if self.root is not None:
            self.message(f"run folder {self.root}")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    # -- events ----------------------------------------------------------------------------------------------------------------
    def start_stage(self, name: str, total_steps: int, start: int = 0) -> None:
        """A stage of ``total_steps`` begins, after ``start`` finished ones."""
        self.stage, self.number, self.total, self.done = name, self.number + 1, total_steps, start
        self._first, self._started = start, time.monotonic()
        self._now, self._metrics, self._samples = self._started, {}, []
        which = f" ({self.number} of {self.total_stages})" if self.total_stages > 1 else ""
        self.message(f"stage {name}{which}: {total_steps} steps" + (f", going on after {start}" if start else ""))

    def step(self, step: int, metrics: Mapping[str, float], samples: Sequence[Rollout] = ()) -> None:
        """``step`` steps of the stage are finished."""
        self.done, self._now = step, time.monotonic()
        self.accuracy = metrics.get("eval/accuracy", self.accuracy)  # the last one measured, also in an earlier stage
        self._evaluated = "eval/accuracy" in metrics
        self._metrics = {**metrics, **({} if self.accuracy is None else {"eval/accuracy": self.accuracy})}
        self._samples = list(samples) or self._samples
        if self._display is not None:
            self._display.refresh()
        else:
            self._plain(list(samples))

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._display is not None:
            from rich.text import Text

            self._display.console.print(Text(text))
        else:
            print(text, file=self.stream, flush=True)

    def finish(self, summary: str = "") -> None:
        """Give the terminal back and print ``summary`` below."""
        self.__exit__()
        if summary:
            print(summary, file=self.stream, flush=True)

    # -- what is shown ---------------------------------------------------------------------------------------------------------
    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the end of the stage, from the mean step so far."""
        finished = self.done - self._first
        return None if finished < 1 else (self._now - self._started) / finished * (self.total - self.done)

    def _plain(self, samples: list[Rollout]) -> None:
        every = max(1, -(-self.total // PLAIN_LINES))
        if self.done % every and self.done not in (self._first + 1, self.total) and not self._evaluated:
            return
        parts = [f"[{self.stage} {self.done}/{self.total}]"] + [f"{name} {value}" for name, value in headline(self._metrics).items()]
        if self.left_s is not None:
            parts.append(f"left {duration(self.left_s)}")
        print("  ".join(parts), file=self.stream, flush=True)
        if samples and (self.done == self._first + 1 or self.done == self.total or self.done % (10 * every) == 0):
            for r in samples:
                reward = "failed" if r.reward is None else f"{r.reward:.2f}"
                print(f"    {reward:>6}  {readable(_prompt(r), 50)!s} -> {readable(_said(r), 60)}", file=self.stream, flush=True)

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.stage:
            return Text("starting")
        which = f"stage {self.stage}" + (f" ({self.number} of {self.total_stages})" if self.total_stages > 1 else "")
        now = time.monotonic() - self._started
        # between two steps the estimate counts down instead of standing still
        left = "" if self.left_s is None else f"   left {duration(max(0.0, self.left_s - (time.monotonic() - self._now)))}"
        top = Table.grid(padding=(0, 2))
        top.add_row(
            Text(which, style="bold"), ProgressBar(total=max(self.total, 1), completed=self.done, width=30), f"{self.done}/{self.total}"
        )
        shown = headline(self._metrics)
        numbers = Table.grid(padding=(0, 3))
        if shown:
            numbers.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in shown.items()))
        parts: list[Any] = [top, numbers, Text(f"elapsed {duration(now)}{left}", style="dim")]
        if self._samples:
            table = Table(box=None, padding=(0, 2), header_style="dim", expand=False)
            for column in ("reward", "prompt", "completion"):
                table.add_column(column, justify="right" if column == "reward" else "left", no_wrap=True)
            for r in self._samples:
                good = r.reward is not None and r.reward > 0
                reward = Text("failed" if r.reward is None else f"{r.reward:.2f}", style="green" if good else "red")
                table.add_row(reward, Text(readable(_prompt(r), 50)), Text(readable(_said(r), 60)))
            parts.append(table)
        return Group(*parts)


def _said(r: Rollout) -> str:
    """The answer; of several, all of them with what was said in between in brackets."""
    return " ".join(text if role == "assistant" else f"[{text}]" for role, text in r.turns) if len(r.turns) > 1 else r.text


def _prompt(r: Rollout) -> str:
    """The user's words, without the template around them where the messages are known."""
    return str(r.prompt.messages[-1].get("content", r.prompt.text)) if r.prompt.messages else r.prompt.text
