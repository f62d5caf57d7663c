"""Order: every item once an epoch, the same order after a resume, cool-down that always ends."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.sampler import Sampler
from posttrain.data.seeds import derive, permutation


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(0, 20), max_size=8), st.booleans(), st.integers(0, 2**40))
def test_every_item_once_an_epoch(n, counts, shuffle, seed):
    sampler = Sampler(n, seed, shuffle)
    drawn = [i for count in counts for i in sampler.next(count)]
    for start in range(0, len(drawn), n):
        epoch = drawn[start : start + n]
        assert len(set(epoch)) == len(epoch)
    assert sampler.drawn == len(drawn) and (sampler.epoch, sampler.position) == divmod(len(drawn), n)
    if not shuffle:
        assert drawn == [i % n for i in range(len(drawn))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.lists(st.integers(0, 11), max_size=5))
def test_resume_is_exact_through_json(n, before, after, cool):
    one = Sampler(n, 3)
    one.next(before // 2)
    one.cool_down([i % n for i in cool], 7)
    one.next(before)
    state = json.loads(json.dumps(one.state_dict()))
    two = Sampler(n, 3)
    two.load_state_dict(state)
    assert two.next(after) == one.next(after) and two.state_dict() == one.state_dict()


def test_epochs_and_names_and_seeds_give_different_orders():
    orders = [permutation(50, seed, "sampler", name, epoch) for seed in (0, 1) for name in ("train", "demos") for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 8
    sampler = Sampler(50, 0)
    assert sampler.next(50) == orders[0] and sampler.next(50) == orders[1] and sampler.epochs == 2.0
    assert derive(0, "a") == derive(0, "a") != derive("0a") and 0 <= derive(1) < 2**63
    assert derive(1, "23") != derive(12, "3")


def test_cooling_items_wait_and_come_back():
    sampler = Sampler(4, 0, shuffle=False)
    sampler.next(2)
    sampler.cool_down([0, 3], draws=3)
    assert sampler.next(6) == [2, 1, 2, 3, 0, 1] and sampler.passed_over == 2
    assert not sampler.cooling
    sampler.cool_down(range(4), draws=100)
    assert len(sampler.next(5)) == 5, "everything cooling must not hang"


def test_resume_with_other_data_is_refused():
    state = Sampler(5, 0).state_dict()
    for other in (Sampler(6, 0), Sampler(5, 1), Sampler(5, 0, False), Sampler(5, 0, name="demos")):
        with pytest.raises(ValueError, match=r"cannot resume the sampler: (num_items|seed|shuffle|name) was"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="no items to draw from"):
        Sampler([])
    with pytest.raises(ValueError, match=r"outside 0\.\.4"):
        Sampler(5).cool_down([5], 1)
    assert Counter(Sampler(["a", "b"]).next(4)) == {0: 2, 1: 2}
