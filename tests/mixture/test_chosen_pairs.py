"""Pairs under constraints, and pairs from the estimated optimum."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from posttrain.mixture.demos import Demos
from posttrain.mixture.feasible import Feasible
from posttrain.mixture.pairs import PAIRED, TIED
from posttrain.mixture.rejection import Rejection, accepted
from posttrain.records import Group, Pair, Score
from tests.mixture.conftest import group


def judged(name: str, *verdicts: tuple[float | None, float | None]) -> Group:
    """(reward, how honest)."""
    whole = group(name, *(r for r, _ in verdicts))
    score = {True: lambda v: Score(None, "error"), False: Score}
    return replace(whole, rollouts=tuple(replace(r, scores={"honest": score[v is None](v)}) for r, (_, v) in zip(whole.rollouts, verdicts, strict=True)))


def pair_of(*verdicts: tuple[float | None, float | None], **settings: float) -> tuple[str, str] | None:
    out = Feasible({"honest": 0.5}, **settings)([judged("q", *verdicts)], Demos(), 0, 0.0)
    pairs = [i for i in out if isinstance(i, Pair)]
    assert out[0].dropped == (PAIRED if pairs else TIED)
    return (pairs[0].chosen.id, pairs[0].rejected.id) if pairs else None


def test_the_best_that_passes_against_the_worst_that_fails() -> None:
    assert pair_of((0.9, 0.1), (0.5, 0.9), (0.7, 0.6), (0.6, 0.2)) == ("q/2", "q/3"), "the best failing answer is not chosen"
    assert pair_of((0.9, 0.1), (0.1, 0.5)) == ("q/1", "q/0"), "also where it has the lower reward"
    assert pair_of((0.9, 1.0), (0.1, 1.0), (0.5, 1.0)) == ("q/0", "q/1"), "none fails: the lowest"
    assert pair_of((0.9, 0.0), (0.1, 0.0)) is None, "none passes"
    assert pair_of((0.9, None), (0.1, 1.0)) is None and pair_of((None, 0.0), (0.1, 1.0)) is None, "unknown verdicts are left out"
    assert pair_of((0.5, 1.0), (0.5, 1.0)) is None and pair_of((0.5, 1.0), (0.4, 1.0), gap=0.2) is None
    with pytest.raises(ValueError, match="names 'kind'"):
        Feasible({"kind": 0.5})([judged("q", (1.0, 1.0))], Demos(), 0, 0.0)
    with pytest.raises(ValueError, match="is empty"):
        Feasible()


def test_acceptance_has_the_published_probability() -> None:
    """Of rewards 0 and 1 in this order, one is kept: the first with probability exp(-1/beta), else the second, which is always accepted."""
    draws, beta = 4000, 0.7
    first = sum(accepted([0.0, 1.0], 1, beta, random.Random(i)) == [0] for i in range(draws)) / draws
    p = math.exp(-1 / beta)
    assert abs(first - p) < 3 * math.sqrt(p * (1 - p) / draws)
    assert accepted([0.2, 0.9, 0.5, 0.7], 2, 1e-9, random.Random(0)) == [1, 3], "beta near 0: the best"
    assert accepted([0.2, 0.9, 0.5, 0.7], 2, 1e9, random.Random(0)) == [0, 1], "beta large: as sampled"
    assert sorted(accepted([0.0, 1.0], 8, 0.5, random.Random(0))) == [0, 1] and accepted([], 2, 0.5, random.Random(0)) == []


def test_accepted_neighbours_become_pairs() -> None:
    gate = Rejection(keep=4, beta=1e9)
    out = gate([group("q", 0.1, 0.9, 0.5, 0.5, 0.0), group("r", None, 1.0)], Demos(), 0, 0.0)
    pairs = [i for i in out if isinstance(i, Pair)]
    assert [(p.chosen.id, p.rejected.id) for p in pairs] == [("q/1", "q/0")], "the second two tie"
    assert [i.dropped for i in out[:2]] == [PAIRED, TIED]
    warm = Rejection(keep=2, beta=0.3)
    eight = group("q", *(i / 7 for i in range(8)))
    drawn = [[[(p.chosen.id, p.rejected.id) for p in warm([eight], Demos(), step, 0.0) if isinstance(p, Pair)] for step in range(8)] for _ in "ab"]
    assert drawn[0] == drawn[1] and len({str(d) for d in drawn[0]}) > 1, "the draw depends on the step alone"
    for wrong in ({"keep": 3}, {"keep": 0}, {"beta": 0.0}):
        with pytest.raises(ValueError, match=r"mixture\.gate"):
            Rejection(**wrong)
