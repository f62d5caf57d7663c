"""The command line in this process.  Nothing may start a cluster here: whoever tries fails the test."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from posttrain import cluster
from posttrain.cli import main
from posttrain.testing.tiny import create_tiny_model

TINY = [
    "model.tiny.hidden_size=64",
    "model.tiny.num_layers=1",
    "model.tiny.num_heads=2",
    "model.tiny.num_kv_heads=1",
    "model.tiny.intermediate_size=64",
]


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def posttrain(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*args: Any) -> Said:
        capfd.readouterr()
        code: Any = 0
        try:
            main([str(a) for a in args])
        except SystemExit as end:
            code = end.code
        return Said(code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def fails(posttrain: Callable[..., Said]) -> Callable[..., str]:
    """The one message of a command that must fail by the user's mistake."""

    def run(*args: Any) -> str:
        said = posttrain(*args)
        assert said.code == 2, said
        assert said.err.count("posttrain: ") == 1 and said.err.startswith("posttrain: "), said.err
        assert "Traceback" not in said.err + said.out and "Error executing job" not in said.err
        assert len(said.err.splitlines()) == 1, f"one message, please: {said.err}"
        return said.err.removeprefix("posttrain: ").strip()

    return run


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Commands run in an empty folder, and leave it without a run when they fail before one begins."""
    monkeypatch.chdir(tmp_path)

    def session(*_: Any) -> NoReturn:
        raise AssertionError("a cluster was started")

    if "ray" not in request.keywords:
        monkeypatch.setattr(cluster, "session", session)
    before = signal.getsignal(signal.SIGTERM)  # a run installs its own
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars() -> None:
    """The command switches them off through the environment, which is too late in a process that has imported the hub's library before."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in a folder."""
    return create_tiny_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        max_position_embeddings=256,
    )


@pytest.fixture
def model_without_template(model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").unlink()
    return copy


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """A JSONL file of the rows given."""

    def write(*given: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        return path

    return write
