"""Checkpoints: whole or absent, torn ones are passed over, a full disk is reported and harms nothing."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from posttrain import checkpoint


async def _fill(folder: Path, text: str = "weights") -> None:
    (folder / "learner").mkdir()
    (folder / "learner" / "rank0.pt").write_text(text)
    (folder / "controller.json").write_text('{"step": 3}')


def save(root: Path, step: int) -> Path:
    return asyncio.run(checkpoint.write(root, step, _fill, {"run": "x"}))


def test_a_written_checkpoint_verifies_and_is_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save(tmp_path, 10)
    assert checkpoint.verify(path)["run"] == "x"
    assert checkpoint.newest(tmp_path) == (10, path)
    assert checkpoint.read_controller(path) == {"step": 3}


@pytest.mark.parametrize("harm", ["manifest", "missing", "short", "flipped"])
def test_a_torn_checkpoint_is_reported_and_the_one_before_it_is_used(tmp_path: Path, harm: str) -> None:
    good, torn = save(tmp_path, 3), save(tmp_path, 10)
    victim = torn / "learner" / "rank0.pt"
    if harm == "manifest":
        (torn / "MANIFEST.json").write_text('{"step": 10, "fi')
    elif harm == "missing":
        victim.unlink()
    elif harm == "short":
        victim.write_text("weigh")
    else:
        victim.write_text("Weights")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == (3, good)
    assert len(said) == 1 and "step_00000010" in said[0]
    with pytest.raises(checkpoint.TornCheckpoint):
        checkpoint.verify(torn)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_a_full_disk_leaves_the_last_good_one_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 3)

    async def full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"step 4 could not be written.*No space left.*The one of step 3 is whole.*resume=auto"):
        asyncio.run(checkpoint.write(tmp_path, 4, full, {}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003"]


def test_a_kill_in_the_middle_of_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    async def killed(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise Killed

    with pytest.raises(Killed):
        asyncio.run(checkpoint.write(tmp_path, 4, killed, {}))
    assert checkpoint.newest(tmp_path) is None
    save(tmp_path, 4)
    checkpoint.prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004"]


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    checkpoint.prune(tmp_path, 0)
    assert checkpoint.steps(tmp_path) == [3, 4]
