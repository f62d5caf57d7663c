import math

import pytest
import torch

from posttrain.metrics import Accumulator
from posttrain.records import Prompt, Rollout, Segment, Source
from posttrain.rollout.mismatch import MismatchError, compare_rollouts, mismatch, sums


def test_numbers_by_hand():
    found = mismatch(torch.tensor([-1.0, -2.0, math.nan, -3.0]), torch.tensor([-1.5, -2.0, -1.0, -2.75]))
    assert found.tokens == 3
    assert found.mean_abs == pytest.approx(0.25) and found.max_abs == pytest.approx(0.5) and found.worst == "column 0"
    assert found.mean_exp_abs == pytest.approx((math.exp(0.5) + 1 + math.exp(0.25)) / 3)
    assert found.k1 == pytest.approx(0.25 / 3)
    assert found.k3 == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(0.25) - 1 - 0.25) / 3)
    assert found.metrics()["mismatch/k3"] == found.k3 and found.metrics()["mismatch/tokens"] == 3.0


def test_micro_batches_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    engine = -torch.rand(12, generator=generator)
    learner = engine + 0.3 * torch.randn(12, generator=generator)
    engine[4] = math.nan
    added = Accumulator()
    for part in (slice(0, 5), slice(5, 6), slice(6, 12), slice(4, 5)):
        added.add(sums(engine[part], learner[part]))
    assert added.result() == pytest.approx(mismatch(engine, learner).metrics())


def test_k1_and_k3_estimate_the_divergence():
    """On exact expectations over a small distribution both equal KL(engine || learner)."""
    engine, learner = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    repeats = torch.tensor([70, 20, 10])
    found = mismatch(engine.log().repeat_interleave(repeats), learner.log().repeat_interleave(repeats))
    exact = float((engine * (engine / learner).log()).sum())
    assert found.k1 == pytest.approx(exact) and found.k3 == pytest.approx(exact)


def test_check_says_how_much_where_and_what_to_look_at():
    found = mismatch(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.5]))
    found.check(0.25)
    with pytest.raises(MismatchError, match=r"2 tokens differ by 0\.25 on average and 0\.5 at most \(column 1\).*rollout\.dtype"):
        found.check(0.2)


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_gap_fails_the_check(bad):
    with pytest.raises(MismatchError):
        mismatch(torch.tensor([-1.0]), torch.tensor([bad])).check(10.0)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="nothing to compare"):
        mismatch(torch.tensor([math.nan]), torch.tensor([-1.0]))


def test_rollouts_skip_what_no_engine_sampled():
    segments = (
        Segment((5, 6), Source.policy, logprobs=(-1.0, -2.0), version=1),
        Segment((9,), Source.tool),
        Segment((7,), Source.policy, logprobs=(-3.0,)),
    )
    rollout = Rollout("s1", Prompt("p", (1,)), segments)
    found = compare_rollouts([rollout], [[-1.0, -2.0, -3.5]])
    assert found.tokens == 3 and found.worst == "sample s1, token 2"
    with pytest.raises(ValueError, match="3 sampled tokens but 2"):
        compare_rollouts([rollout], [[-1.0, -2.0]])
