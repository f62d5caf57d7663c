"""Numbers and schedules are read alike."""

from __future__ import annotations

import math

import pytest

from posttrain.mixture.schedule import Cosine, Linear, OneMinus, Steps, WarmupCosine, at


def test_numbers_and_callables_are_read_alike() -> None:
    assert at(0.3, 0.9) == 0.3 and at(2, 0.0) == 2.0 and at(lambda p: 2 * p, 0.25) == 0.5
    assert at(math.inf, 0.5) == math.inf
    with pytest.raises(ValueError, match=r"NaN at progress 0\.5"):
        at(lambda p: math.nan, 0.5)


@pytest.mark.parametrize(("progress", "value"), [(0.0, 1.0), (0.2, 1.0), (0.4, 0.5), (0.6, 0.0), (1.0, 0.0)])
def test_linear_is_constant_outside_its_interval(progress: float, value: float) -> None:
    assert Linear(1.0, 0.0, begin=0.2, until=0.6)(progress) == pytest.approx(value)


@pytest.mark.parametrize(("progress", "value"), [(0.0, 1.0), (0.25, 0.5 + math.sqrt(0.5) / 2), (0.5, 0.5), (1.0, 0.0)])
def test_cosine(progress: float, value: float) -> None:
    assert Cosine(1.0, 0.0)(progress) == pytest.approx(value)
    assert Cosine(1.0, 0.0, 0.0, 0.5)(progress / 2) == pytest.approx(value)


@pytest.mark.parametrize(("progress", "value"), [(0.0, 1.0), (0.29, 1.0), (0.3, 2.0), (0.69, 2.0), (0.7, 3.0), (1.0, 3.0)])
def test_steps_change_at_their_boundary(progress: float, value: float) -> None:
    assert Steps([1.0, 2.0, 3.0], [0.3, 0.7])(progress) == value


@pytest.mark.parametrize(
    "make", [lambda: Linear(0, 1, 0.5, 0.5), lambda: Cosine(0, 1, -0.1), lambda: Linear(0, 1, 0, 1.1), lambda: Steps([1, 2], [])]
)
def test_impossible_intervals_are_refused(make) -> None:
    with pytest.raises(ValueError, match="needs"):
        make()


def test_steps_need_ascending_boundaries() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Steps([1.0, 2.0, 3.0], [0.7, 0.3])


def test_warmup_cosine_counts_steps_and_holds_its_valley() -> None:
    schedule = WarmupCosine(peak=0.8, valley=0.2, warmup=2, decay=4, steps=10)
    assert [schedule(s / 10) for s in range(8)] == pytest.approx(
        [0.0, 0.4, 0.8, 0.2 + 0.3 * (1 + math.sqrt(0.5)), 0.5, 0.2 + 0.3 * (1 - math.sqrt(0.5)), 0.2, 0.2]
    )
    assert OneMinus(schedule)(0.4) == pytest.approx(0.5) and OneMinus(0.25)(0.9) == 0.75
    for impossible in ({"decay": 0}, {"warmup": -1}, {"steps": 0}):
        with pytest.raises(ValueError, match="a constant is a number"):
            WarmupCosine(**{"peak": 1.0, "valley": 0.0, "warmup": 0, "decay": 1, "steps": 1, **impossible})
