"""Metric names, their reduction, and that no value depends on how a step was cut."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest

from posttrain import metrics
from posttrain.metrics import METRICS, Accumulator, Metric, find, quantile, render_docs, repetition

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = "reward|rollout|learner|pack|mismatch|eval|time|data|advantage|progress"


def test_docs_are_made_from_the_table() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == render_docs(), "run: python -m posttrain.metrics > docs/metrics.md"
    assert all(f"`{m.name}`" in render_docs() for m in METRICS)


def test_every_name_the_library_writes_is_declared() -> None:
    """Every literal of the form ``family/name`` in the sources, with f-string fields filled in."""
    literal = re.compile(rf'f?"((?:{FAMILIES})/[a-z0-9_/{{}}.]+)"')
    found = {}
    for path in sorted((ROOT / "posttrain").rglob("*.py")):
        if path.name in ("metrics.py", "alarms.py"):
            continue
        for name in literal.findall(path.read_text()):
            if not name.endswith((".py", ".md", ".jsonl", "/")):
                found[re.sub(r"\{[^}]*\}", "x", name.replace("{status}", "error"))] = path.name
    assert len(found) > 20
    undeclared = {name: where for name, where in found.items() if find(name) is None}
    assert not undeclared, f"declare these in posttrain/metrics.py: {undeclared}"


def test_names_are_unique_and_the_least_free_declaration_wins() -> None:
    names = [m.name for m in METRICS]
    assert len(names) == len(set(names))
    assert find("reward/mean").name == "reward/mean"
    assert find("reward/exact/mean").name == "reward/{reward}/mean"
    assert find("rollouts/clip/masked").name == "{stream}/{term}/masked"
    assert find("rollouts/kl_base").name == "{stream}/{regularizer}"
    assert find("learner/grad_norm").name == "learner/grad_norm"
    assert find("a/b/c/d") is None


@pytest.mark.parametrize("cuts", [1, 2, 3, 7, 20])
def test_result_does_not_depend_on_the_slices(cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [*METRICS, Metric("rollout/tokens_p90", "quantile", "", "tokens", "", quantile=0.9)]
    monkeypatch.setattr(metrics, "METRICS", tuple(table))
    find.cache_clear()
    rng = random.Random(cuts)
    tokens = [(rng.uniform(0, 5), rng.random() < 0.3, rng.randint(1, 90)) for _ in range(60)]
    edges = [0, *sorted(rng.sample(range(1, 60), cuts - 1)), 60]
    whole = Accumulator()
    for low, high in itertools.pairwise(edges):
        part, piece = tokens[low:high], Accumulator()
        piece.add({"demos/nll": (sum(t[0] for t in part), len(part)), "demos/clip/masked": (sum(t[1] for t in part), len(part))})
        piece.add({"demos/tokens": (len(part), 0.0), "mismatch/max_abs": (max(t[0] for t in part), len(part))})
        piece.observe("rollout/tokens_p90", [t[2] for t in part])
        piece.observe("rollout/tokens_mean", [t[2] for t in part])
        whole.merge(piece)
    result = whole.result()
    find.cache_clear()
    assert result["demos/nll"] == pytest.approx(sum(t[0] for t in tokens) / 60, rel=1e-12)
    assert result["demos/clip/masked"] == sum(t[1] for t in tokens) / 60
    assert result["demos/tokens"] == 60
    assert result["mismatch/max_abs"] == max(t[0] for t in tokens)
    assert result["rollout/tokens_p90"] == quantile([t[2] for t in tokens], 0.9)
    assert result["rollout/tokens_mean"] == pytest.approx(sum(t[2] for t in tokens) / 60, rel=1e-12)


def test_mean_of_means_would_have_been_wrong() -> None:
    """Slices of unequal size: the pairs give the mean over tokens, not over slices."""
    a = Accumulator()
    a.add({"demos/nll": (1.0, 1.0)})
    a.add({"demos/nll": (0.0, 9.0)})
    assert a.result()["demos/nll"] == pytest.approx(0.1)


def test_nothing_to_average_is_absent_and_sums_stay() -> None:
    a = Accumulator()
    a.add({"demos/nll": (0.0, 0.0), "demos/tokens": (0.0, 0.0), "mismatch/max_abs": (0.0, 0.0), "loss": (0.5, 0.0), "my own": (3.0, 0.0)})
    a.observe("rollout/tokens_max", [])
    assert a.result() == {"demos/tokens": 0.0, "loss": 0.5, "my own": 3.0}


def test_declared_sums_ignore_the_count_and_undeclared_pairs_are_means() -> None:
    a = Accumulator()
    for _ in range(2):
        a.add({"learner/tokens": (100.0, 1.0), "learner/lr": (0.1, 1.0), "my own": (4.0, 2.0)})
    assert a.result() == {"learner/tokens": 200.0, "learner/lr": pytest.approx(0.1), "my own": 2.0}


def test_maximum_keeps_a_negative_value() -> None:
    a = Accumulator()
    a.add({"mismatch/max_abs": (-3.0, 1.0)})
    a.add({"mismatch/max_abs": (-2.0, 1.0)})
    assert a.result() == {"mismatch/max_abs": -2.0}


def test_nan_is_not_hidden() -> None:
    a = Accumulator()
    a.add({"demos/nll": (math.nan, 1.0)})
    a.add({"demos/nll": (1.0, 1.0)})
    assert math.isnan(a.result()["demos/nll"])


def test_declarations_are_checked() -> None:
    with pytest.raises(ValueError, match="denominator"):
        Metric("x", "mean", "", "", "")
    with pytest.raises(ValueError, match="quantile"):
        Metric("x", "quantile", "", "", "")
    with pytest.raises(ValueError, match="0 <= q <= 1"):
        quantile([1.0], 2.0)


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(range(50)) == 0.0
    assert repetition([7] * 103) == pytest.approx(0.99)
    assert repetition([1, 2] * 10, n=2) == pytest.approx(1 - 2 / 19)
