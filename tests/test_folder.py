"""The run folder: naming, finding the run to continue, and which settings may change on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config import ConfigError
from posttrain.folder import differences, open_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(path: str) -> Path:
    root = Path(path)
    root.mkdir(parents=True)
    (root / "config.yaml").write_text("steps: 1")
    return root


def test_a_new_run_gets_a_new_folder() -> None:
    first, resumed = open_folder("a", None, "never", False)
    first.root.mkdir(parents=True)
    second, _ = open_folder("a", None, "never", False)
    assert not resumed and first.root != second.root


def test_auto_continues_the_newest_of_the_name() -> None:
    make("runs/a-20250101-000000")
    newest = make("runs/a-20250102-000000")
    make("runs/ab-20250103-000000")
    folder, resumed = open_folder("a", None, "auto", False)
    assert resumed and folder.root == newest


def test_a_used_folder_is_not_overwritten() -> None:
    make("mine")
    with pytest.raises(ConfigError, match="holds a run already; add resume=auto"):
        open_folder("a", "mine", "never", False)
    assert open_folder("a", "mine", "auto", False)[1]


def test_stage_paths_and_state() -> None:
    folder, _ = open_folder("a", "mine", "never", True)
    folder.root.mkdir()
    assert folder.of("export", "sft") == Path("mine/export/sft")
    folder.finish_stage("sft", {"accuracy": 0.5})
    assert folder.state == {"stages": {"sft": {"accuracy": 0.5}}}
    assert open_folder("a", "other", "never", False)[0].of("export", "train") == Path("other/export")


def test_differences_name_the_keys_and_leave_out_what_may_change() -> None:
    old = {"steps": 1, "learner": {"lr": 1.0}, "tracking": {"wandb": False}}
    new = {"steps": 9, "learner": {"lr": 2.0}, "tracking": {"wandb": True}, "seed": 1}
    assert differences(old, new) == ["learner.lr: 1.0 -> 2.0", "seed: None -> 1"]
