"""The pages about the loss say what the code does: one is generated, the other one's examples run."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import posttrain
from posttrain.loss import load
from posttrain.report.terms import CHAPTERS, loss_markdown, terms

ROOT = Path(posttrain.__file__).parents[1]


@cache
def page() -> str:
    return loss_markdown()


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_a_term.md").read_text(), flags=re.S)


def test_loss_page_is_what_the_docstrings_say() -> None:
    fix = "python -c \"from posttrain.report.terms import write; write('docs/loss.md')\""
    assert (ROOT / "docs" / "loss.md").read_text() == page(), f"out of date; run: {fix}"


def test_loss_page_names_every_term_and_every_loss() -> None:
    text = page()
    for _, module in CHAPTERS:
        for name in terms(module):
            assert f"### `{module.__name__}.{name}`" in text
    for path in (ROOT / "configs" / "loss").glob("*.yaml"):
        assert f"| `{path.stem}` |" in text


@pytest.fixture
def my_terms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's first block as an importable module."""
    module = ModuleType("my_terms")
    monkeypatch.setitem(sys.modules, "my_terms", module)
    exec(compile(BLOCKS[0], "my_terms.py", "exec"), module.__dict__)
    return module


def test_the_example_has_eleven_lines_and_every_block_runs(my_terms: ModuleType) -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 11
    for block in BLOCKS[1:]:
        exec(compile(block, "add_a_term.md", "exec"), my_terms.__dict__)


def test_the_example_is_used_by_name(my_terms: ModuleType) -> None:
    term = "streams.rollouts.masks.surprising={_target_: my_terms.Surprising, most: 0.3}"
    objective = load("grpo", [term])
    assert objective.streams["rollouts"].masks["surprising"] == my_terms.Surprising(most=0.3)
    assert "base" in objective.needs.references
