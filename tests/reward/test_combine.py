"""Combiners: by hand, order does not matter, weight 0 is absence, misnamed rewards are refused."""

import pickle

import pytest

from posttrain.mixture.schedule import Linear
from posttrain.reward.combine import Gate, Product, Sum

VALUES = {"right": 1.0, "format": 0.5, "length": -0.25}


def test_sum_by_hand():
    assert Sum()(VALUES, 0.0) == 1.25
    assert Sum({"right": 2.0, "format": 1.0, "length": 4.0})(VALUES, 0.0) == 1.5
    assert Sum({"right": Linear(0.0, 2.0), "format": 0.0, "length": 0.0})(VALUES, 0.25) == 0.5


def test_order_does_not_matter():
    turned = dict(reversed(VALUES.items()))
    for combiner in (Sum(), Sum({"right": 0.1, "format": 0.2, "length": 0.3}), Product(), Gate({"format": 0.5})):
        assert combiner(VALUES, 0.3) == combiner(turned, 0.3)
        assert pickle.loads(pickle.dumps(combiner))(VALUES, 0.3) == combiner(VALUES, 0.3)


def test_weight_zero_is_absence():
    weighted = Sum({"right": 1.0, "format": 0.0, "length": 1.0})
    without = Sum({"right": 1.0, "length": 1.0})
    rest = {k: v for k, v in VALUES.items() if k != "format"}
    assert weighted(VALUES, 0.0) == without(rest, 0.0) == weighted(rest, 0.0)
    assert weighted.required(VALUES, 0.0) == without.required(rest, 0.0) == {"right", "length"}


def test_a_schedule_decides_what_is_required():
    combiner = Sum({"right": 1.0, "format": Linear(0.0, 1.0, 0.5, 1.0)})
    assert combiner.required(["right", "format"], 0.2) == {"right"}
    assert combiner.required(["right", "format"], 0.9) == {"right", "format"}


def test_product_and_gate_by_hand():
    assert Product()(VALUES, 0.0) == -0.125
    assert Product(("right", "format"))(VALUES, 0.0) == 0.5
    assert Gate({"format": 0.5})(VALUES, 0.0) == 0.75
    assert Gate({"format": 0.6}, otherwise=-1.0)(VALUES, 0.0) == -1.0
    assert Gate({"format": Linear(0.0, 1.0)})(VALUES, 0.6) == 0.0
    assert Gate({"format": 0.5}).required(VALUES, 0.0) == set(VALUES)


def test_parts_count_only_when_weighted():
    values = {"judge": 1.0, "judge/style": 0.5}
    assert Sum()(values, 0.0) == 1.0
    assert Sum({"judge": 0.0, "judge/style": 2.0})(values, 0.0) == 1.0
    assert Product()(values, 0.0) == 1.0


@pytest.mark.parametrize(
    ("combiner", "message"),
    [
        (Sum({"wrong": 1.0}), "wrong"),
        (Sum({"a": 1.0}), "no weight for reward b"),
        (Product(("c",)), "c"),
        (Gate({"d": 1.0}), "d"),
        (Gate({}), "without gates"),
        (Gate({"a": 1.0}, Sum({"c": 1.0})), "c"),
    ],
)
def test_misfits_are_refused(combiner, message):
    with pytest.raises(ValueError, match=message):
        combiner.check(["a", "b"])
    Sum({"a": 1.0, "b": 0.0}).check(["a", "b"])
