"""Directions drawn for prompts: unit vectors, the same in every run, said in the prompt and kept beside it."""

from __future__ import annotations

import math

import pytest

from posttrain.data.directions import Directions
from posttrain.data.files import DataError
from posttrain.data.load import load_data
from posttrain.testing.tiny import create_tokenizer

V = ("v1", "v2")
ROWS = [{"question": f"is {i} even?"} for i in range(200)]


def test_every_row_gets_unit_vectors_of_its_own() -> None:
    made = list(Directions(V, repeats=2, digits=6)(ROWS))
    assert len(made) == 400 and len({(r["v1"], r["v2"]) for r in made}) == 400 == len({r["id"] for r in made})
    assert all(math.hypot(r["v1"], r["v2"]) == pytest.approx(1.0, abs=1e-5) and r["v1"] >= 0 for r in made)
    assert abs(sum(r["v2"] for r in made) / 400) < 0.1 and made == list(Directions(V, repeats=2, digits=6)(ROWS))
    assert min(r["v1"] for r in Directions(V, first_positive=False)(ROWS)) < 0
    assert made[:2] != list(Directions(V, repeats=2, digits=6, seed=1)(ROWS))[:2]
    three = list(Directions(("a", "b", "c"), digits=1)(ROWS[:3]))
    assert all(r[n] == round(r[n], 1) for r in three for n in "abc")


def test_the_prompt_says_the_numbers_the_weights_have() -> None:
    template = "{question} useful {v1}, long {v2}"
    source = type("Rows", (), {"rows": lambda self: ROWS[:5]})()
    prompts, _ = load_data("prompts", {"source": source, "adapter": Directions(V), "prompt_template": template}, create_tokenizer())
    assert all(p.text.endswith(f"useful {p.meta['v1']}, long {p.meta['v2']}") for p in prompts) and len(prompts) == 5


def test_settings_are_checked() -> None:
    for bad in ({"columns": ("a",)}, {"columns": ("a", "a")}, {"repeats": 0}, {"digits": 0}):
        with pytest.raises(DataError, match="must be"):
            Directions(**bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has a column 'v1' already"):
        list(Directions(V)([{"v1": 1.0}]))
