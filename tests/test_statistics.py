"""Intervals cover what they claim, refuse what they cannot know, and do not depend on the order of their data."""

import numpy as np
import pytest

from posttrain.statistics import holm, minimum_detectable, multi_bootstrap, paired_difference, permutation_test, wilson


def test_wilson_table():
    interval = wilson(8, 10)  # Newcombe 1998, method 3
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 10).low == 0.0 and wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10).high == 1.0 and wilson(10, 10).low == pytest.approx(1 - wilson(0, 10).high)
    assert wilson(80, 100).high - wilson(80, 100).low < interval.high - interval.low
    assert wilson(5, 10, 0.99).low < wilson(5, 10).low
    for bad in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="a rate needs"):
            wilson(*bad)


def test_wilson_covers():
    rng = np.random.default_rng(0)
    counts = rng.binomial(40, 0.3, size=2000)
    assert 0.93 <= np.mean([0.3 in wilson(int(c), 40) for c in counts]) <= 0.98


def test_equal_arms_differ_by_exactly_nothing():
    x = np.random.default_rng(0).random((4, 30))
    interval = multi_bootstrap(x, x, paired=("seeds", "items"))
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)
    apart = multi_bootstrap(x, x, paired=("items",))
    assert apart.low < 0.0 < apart.high


def test_order_of_seeds_and_items_changes_nothing():
    rng = np.random.default_rng(1)
    x, y = rng.random((5, 40)), rng.random((5, 40))
    seeds, items, other = rng.permutation(5), rng.permutation(40), rng.permutation(5)
    assert multi_bootstrap(x) == multi_bootstrap(x[seeds][:, items])
    assert multi_bootstrap(x, y) == multi_bootstrap(x[seeds][:, items], y[other][:, items])
    assert multi_bootstrap(x, y, ("seeds", "items")) == multi_bootstrap(x[seeds][:, items], y[seeds][:, items], ("seeds", "items"))
    assert multi_bootstrap(x, y) != multi_bootstrap(x, y[:, ::-1])  # breaking the pairing does


def test_one_item_is_a_bootstrap_over_seeds():
    x = np.array([[0.1], [0.4], [0.9]])
    interval = multi_bootstrap(x, n=4000)
    assert interval.mean == pytest.approx(x.mean()) and interval.low >= 0.1 and interval.high <= 0.9 and interval.high - interval.low > 0.4
    assert multi_bootstrap(np.full((3, 5), 0.5)).high == 0.5  # no variance at all


def test_intervals_over_seeds_and_items_cover_and_items_alone_do_not():
    rng = np.random.default_rng(2)
    truth, both, alone, repetitions = 0.4, 0, 0, 150
    for _ in range(repetitions):
        x = truth + 0.05 * rng.standard_normal((5, 1)) + 0.2 * rng.standard_normal((1, 100)) + 0.3 * rng.standard_normal((5, 100))
        both += truth in multi_bootstrap(x, n=300, rng=rng)
        alone += truth in multi_bootstrap(x[:1], n=300, rng=rng, over=("items",))
    assert both / repetitions >= 0.90
    assert alone / repetitions <= 0.85


def test_identical_recipes_are_seldom_told_apart():
    rng = np.random.default_rng(3)
    repetitions, found = 150, 0
    for _ in range(repetitions):
        items = 0.2 * rng.standard_normal((1, 60))
        x, y = (0.05 * rng.standard_normal((8, 1)) + items + 0.3 * rng.standard_normal((8, 60)) for _ in range(2))
        found += 0.0 not in multi_bootstrap(x, y, n=300, rng=rng)
    assert found / repetitions <= 0.12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: multi_bootstrap(np.ones((1, 5))), "there is one seed.*over=\\('items',\\)"),
        (lambda: multi_bootstrap(np.ones((3, 5)), np.ones((3, 4))), "5 and 4 items but are paired"),
        (lambda: multi_bootstrap(np.ones((3, 5)), np.ones((2, 5)), ("seeds",)), "3 and 2 seeds"),
        (lambda: multi_bootstrap(np.array([[1.0, np.nan], [1.0, 1.0]])), r"x\[0, 1\] is nan"),
        (lambda: multi_bootstrap(np.ones(5)), "must be \\[seeds, items\\]"),
        (lambda: multi_bootstrap(np.ones((2, 5)), over=("runs",)), "must be out of"),
        (lambda: multi_bootstrap(np.ones((2, 5)), level=1.5), "between 0 and 1"),
    ],
)
def test_what_cannot_be_known_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_paired_difference_aligns_items_by_key():
    rng = np.random.default_rng(4)
    hard = rng.random(50)
    a = {f"q{i}": list(hard[i] + 0.2 + 0.01 * rng.standard_normal(4)) for i in range(50)}
    b = {f"q{i}": list(hard[i] + 0.01 * rng.standard_normal(4)) for i in reversed(range(50))}
    found = paired_difference(a, b, equal="rollouts")
    assert 0.18 < found.difference.low < 0.2 < found.difference.high < 0.22 and found.p_value < 0.05
    assert found.equal == "rollouts" and found.num_items == 50
    with pytest.raises(ValueError, match="1 items are in one arm only \\(q0"):
        paired_difference(a, {k: v for k, v in b.items() if k != "q0"}, equal="rollouts")
    with pytest.raises(ValueError, match="different numbers of seeds"):
        paired_difference({**a, "q0": [1.0]}, b, equal="rollouts")
    with pytest.raises(ValueError, match="one seed"):
        paired_difference({k: v[:1] for k, v in a.items()}, {k: v[:1] for k, v in b.items()}, equal="rollouts")


def test_permutation_test():
    assert permutation_test([1.0, 1.1, 0.9, 1.05], [0.1, 0.0, 0.2, 0.05], n=5000) == pytest.approx(2 / 70, abs=0.01)  # exact enumeration
    assert permutation_test([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert permutation_test(np.arange(20) + 100.0, np.arange(20.0), n=100) == pytest.approx(1 / 101)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert list(holm({"z": 0.9, "y": 0.8})) == ["z", "y"] and holm({"z": 0.9, "y": 0.8}) == {"z": 1.0, "y": 1.0}
    with pytest.raises(ValueError, match="p-value of 'a'"):
        holm({"a": 1.2})


def test_minimum_detectable_difference():
    assert minimum_detectable(100) == pytest.approx(0.1981, abs=1e-3)
    assert minimum_detectable(400) == pytest.approx(minimum_detectable(100) / 2)
