"""The planter of errors itself: where it can give a function other code, and where it says that it cannot."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
CODE = b'''
from functools import cache, cached_property
LIMIT = 3

def outer(x, by=2):
    def inner(y):
        return y + by
    return inner(x)

@cache
def kept(x):
    return x + 5

class Thing:
    size: int = 7

    @property
    def double(self):
        return self.size + self.size

    @cached_property
    def triple(self):
        return 3 + self.size

    @classmethod
    def named(cls):
        return 4 + 4

    @staticmethod
    def bare():
        return 6 + 6

    def parent(self):
        return super().__sizeof__() + 8
'''


@pytest.fixture
def planter() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import mutations  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(SCRIPTS))
    return mutations


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    (tmp_path / "planted.py").write_bytes(CODE)
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


RESULTS = {
    "outer": lambda m: m.outer(10),
    "kept": lambda m: m.kept(1),
    "Thing.double": lambda m: m.Thing().double,
    "Thing.triple": lambda m: m.Thing().triple,
    "Thing.named": lambda m: m.Thing.named(),
    "Thing.bare": lambda m: m.Thing.bare(),
    "Thing.parent": lambda m: m.Thing().parent() - m.Thing().__sizeof__(),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_function_that_is_imported_gets_the_error(planter: ModuleType, module: ModuleType, name: str) -> None:
    errors = [m for m in planter.candidates("planted.py", CODE) if m.function.startswith(name) and m.operator == "arithmetic"]
    assert errors
    namespace: dict[str, Any] = {}
    exec(errors[0].apply(CODE), namespace)
    wrong, right = RESULTS[name](SimpleNamespace(**namespace)), RESULTS[name](module)
    assert planter.transplant(errors[0], CODE, module)
    module.kept.cache_clear()
    assert RESULTS[name](module) == wrong != right


def test_what_is_in_no_function_is_not_planted_there(planter: ModuleType, module: ModuleType) -> None:
    outside = [m for m in planter.candidates("planted.py", CODE) if m.operator in ("default", "constant") and CODE[m.start : m.end] in (b"3", b"2", b"7")]
    assert {CODE[m.start : m.end] for m in outside} == {b"3", b"2", b"7"}
    planted = [m.function for m in outside if planter.transplant(m, CODE, module)]
    assert set(planted) == {"Thing.triple"}, "LIMIT, the default of an argument and that of a field are made when the module is imported"


def test_errors_are_python_and_other_python(planter: ModuleType) -> None:
    errors = planter.candidates("planted.py", CODE)
    chosen, _ = planter.draw(errors, 5, 1, {"planted.py": CODE})
    assert len(chosen) == 5 and all(planter.changes(m, CODE) for m in chosen)
    assert not planter.changes(replace(chosen[0], text=CODE[chosen[0].start : chosen[0].end].decode()), CODE)
