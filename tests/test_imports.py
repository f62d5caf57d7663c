"""The import rules of the architecture, read from the sources, and that importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "posttrain"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("deepspeed", "vllm", "ray", "transformers", "datasets", "wandb", "peft", "accelerate", "tensorboard", "math_verify", "hydra", "omegaconf")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Modules a file imports; a type checker's imports do not count.  ``from a import b`` gives ``a`` and ``a.b``."""

    def walk(node: ast.AST) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users_of(package: str, top_level_only: bool = False) -> set[str]:
    return {module_of(p) for p in FILES if any(m.split(".")[0] == package for m in imports(p, top_level_only))}


def allowed(module: str, *prefixes: str) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in prefixes)


def test_the_rules_see_something() -> None:
    assert len(FILES) > 30 and users_of("torch") and "posttrain.loss.unified" in {module_of(p) for p in FILES}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("deepspeed", ("posttrain.learner",)),
        ("vllm", ("posttrain.rollout.engine", "posttrain.rollout.experts", "posttrain.sync")),
        ("hydra", ("posttrain.cli",)),
        ("omegaconf", ("posttrain.cli",)),
    ],
)
def test_a_dependency_is_known_in_one_place(package: str, homes: tuple[str, ...]) -> None:
    outside = {m for m in users_of(package) if not allowed(m, *homes)}
    assert users_of(package), f"nobody imports {package}: the rule checks nothing"
    assert not outside, f"{package} may be imported only by {', '.join(homes)}"


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_imports_happen_inside_functions(package: str) -> None:
    assert not users_of(package, top_level_only=True), f"import {package} inside the function that needs it"


@pytest.mark.parametrize("home", ["posttrain.loss", "posttrain.advantage", "posttrain.mixture.schedule", "posttrain.mixture.control"])
def test_the_mathematics_knows_only_torch_and_records(home: str) -> None:
    own = ("posttrain.records", "posttrain.mixture.schedule", "posttrain.mixture.control", home)
    for path in FILES:
        if not allowed(module_of(path), home):
            continue
        top = {m for m in imports(path, top_level_only=True) if m.startswith("posttrain")}
        assert not {m for m in top if not allowed(m, *own) and m != "posttrain"}, f"{path} imports more than records and torch"
        foreign = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - {"torch", "posttrain", "__future__"}
        assert not foreign, f"{path} imports {foreign}"


def test_records_know_nobody() -> None:
    assert not {m for m in imports(PACKAGE / "records.py") if m.startswith("posttrain")}


def test_nobody_imports_the_controller_but_who_builds_and_starts_a_run() -> None:
    users = {module_of(p) for p in FILES if any(allowed(m, "posttrain.controller") for m in imports(p))}
    assert users <= {"posttrain.build", "posttrain.run", "posttrain.cli"}, f"stages must not know the loop: {users}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, posttrain, posttrain.metrics, posttrain.tracking, posttrain.report.console; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout
    assert loaded.split() == []
