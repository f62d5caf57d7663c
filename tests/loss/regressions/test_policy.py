"""Bugs and silent differences of released policy-gradient code, reproduced: the other version is shown to differ, ours to be what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.advantage import BatchWhiten, Chain, GroupAdvantage, LiveGroups
from posttrain.contrib.covariance import CovarianceDrop, covariance
from posttrain.loss import Objective, advantage, mask
from posttrain.records import TokenBatch
from posttrain.testing.check import example_batch, objective_with
from tests.advantage.test_group import group, values
from tests.loss.cases import CASES, NORM, composed, make
from tests.loss.test_identities import clip_weight, policy_batch

F64 = torch.float64
PARTS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15, 16]]


def local(objective: Objective, batch: TokenBatch, parts: list[list[int]] = PARTS) -> Tensor:
    """The bug: every micro-batch is taken for the whole step, and the micro-batches are averaged."""
    out = torch.zeros(batch.num_tokens, dtype=F64)
    for part in parts:
        out[batch.columns_of(part)] = objective.weights(batch.take(part).replace(totals=None)) / len(parts)
    return out


def differs(a: Tensor, b: Tensor, least: float) -> bool:
    return float((a - b).norm()) > least * float(b.norm())


# -- denominators and statistics of a micro-batch ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo", "luspo", "reinforce_pp", "top_entropy", "pass_at_k"])
def test_a_mean_over_micro_batches_of_their_own_means(name: str) -> None:
    case = CASES[name]
    batch = make(5, case.advantage, case.spread).batch()
    objective = case.load()
    assert differs(local(objective, batch), objective.weights(batch), 0.1)


def test_whitening_a_part_of_the_step_is_refused() -> None:
    batch = CASES["reinforce_pp"].make(5).batch()
    objective = composed("reinforce_pp")
    batch = batch.replace(totals=objective.totals(batch))
    with pytest.raises(ValueError, match=r"advantage.Whiten must see the whole optimizer step.*weights="):
        objective.weights(batch.take(PARTS[0]))


def test_a_quantile_of_entropy_over_a_micro_batch_keeps_other_tokens() -> None:
    batch = example_batch(2)
    term = mask.TopEntropy(0.3)
    view = objective_with(term).views(batch)["rollouts"]
    step, parts = term.factor(view, batch.advantage), torch.ones(batch.num_tokens, dtype=F64)
    for part in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
        piece = batch.take(part)
        parts[batch.columns_of(part)] = term.factor(objective_with(term).views(piece)["rollouts"], piece.advantage)
    assert not torch.equal(step[view.on], parts[view.on]) and int(step[view.on].sum()) == math.ceil(0.3 * int(view.on.sum()))


def test_covariances_of_a_micro_batch_are_others() -> None:
    batch = example_batch(4)
    view = objective_with(CovarianceDrop()).views(batch)["rollouts"]
    whole, parts = covariance(view, batch.advantage), torch.zeros(batch.num_tokens, dtype=F64)
    for part in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
        piece = batch.take(part)
        parts[batch.columns_of(part)] = covariance(objective_with(CovarianceDrop()).views(piece)["rollouts"], piece.advantage)
    assert differs(parts, whole, 0.05)
    assert float(whole[view.on].mean()) == pytest.approx(
        float(torch.cov(torch.stack([batch.advantage, view.logp])[:, view.on], correction=0)[0, 1])
    )


# -- advantages ----------------------------------------------------------------------------------------------------------------------
def test_live_groups_are_not_rewards_that_are_not_zero() -> None:
    groups = [group(1.0, 0.0), group(0.0, 0.0, name="r")]
    chain = Chain({"center": GroupAdvantage(scale="none"), "live": LiveGroups()})
    counted = 4 / 1  # samples over samples with a reward that is not zero
    assert values(chain, *groups)[0] == pytest.approx(0.5 * 2) != pytest.approx(0.5 * counted)


def test_a_token_mean_is_no_beta_normalisation() -> None:
    """One framework calls the token mean of the local batch by the name of this method."""
    case = CASES["bnpo"]
    batch = case.make(0).batch()
    assert differs(composed("lite_ppo").weights(batch), composed("bnpo").weights(batch), 0.1)


def test_dropping_the_deviation_alone_is_not_the_constant_length() -> None:
    """A framework's option of this name drops the deviation and keeps the token mean."""
    batch = make(3, GroupAdvantage(scale="none")).batch()
    token_mean, constant = composed("lite_ppo").weights(batch), composed("dr_grpo").weights(batch)
    ratio = token_mean[constant != 0] / constant[constant != 0]
    tokens = float(composed("lite_ppo").totals(batch)["rollouts"].tokens)
    assert ratio.tolist() == pytest.approx([256 * 9 / tokens] * len(ratio)), "the step size then depends on what was sampled"


def test_standardised_rewards_are_not_group_normalised_ones() -> None:
    easy, hard = group(1.0, 1.0, 1.0, 0.0), group(0.0, 0.0, 0.0, 1.0, name="r")
    whole, apart = values(BatchWhiten("sequences", eps=0.0), easy, hard), values(GroupAdvantage(eps=0.0), easy, hard)
    assert whole[0] == pytest.approx(1.0) and apart[0] == pytest.approx(0.5774, abs=1e-4)


def test_a_naive_recursion_discounts_through_a_tool() -> None:
    """Every position counted, with a reward and a value of 0 for the tool's two tokens."""
    value, reward, gamma, lam = [0.2, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0], 0.9, 0.9
    naive, ahead = [0.0] * 4, 0.0
    for t in reversed(range(4)):
        ahead = reward[t] + gamma * (value[t + 1] if t < 3 else 0.0) - value[t] + gamma * lam * ahead
        naive[t] = ahead
    batch = policy_batch([[-1.0] * 4], [1.0], value=[[0.2, math.nan, math.nan, 0.5]])
    batch = batch.replace(source=torch.tensor([1, 4, 4, 1]), trainable=torch.tensor([True, False, False, True]))
    term = advantage.GeneralizedAdvantage(gamma, lam)
    found = term.values(objective_with(term).views(batch)["rollouts"]).tolist()
    assert found[0] == pytest.approx(0.9 * 0.5 - 0.2 + 0.81 * 0.5) and naive[0] != pytest.approx(found[0], rel=0.1)


# -- ratios --------------------------------------------------------------------------------------------------------------------------
def test_a_log_ratio_clamped_inside_the_graph_has_no_gradient() -> None:
    current = torch.tensor([-22.0], dtype=F64, requires_grad=True)
    (clamped,) = torch.autograd.grad(torch.exp(torch.clamp(current - (-1.0), -20.0, 20.0)).sum(), current)
    batch = policy_batch([[-22.0]], [1.0], old=[[-1.0]])
    assert float(clamped) == 0.0 and composed("grpo").weights(batch).tolist() == pytest.approx([math.exp(-21.0)])


@pytest.mark.parametrize(("cap", "expected"), [(5.0, 5.0), (6.0, 6.0)])
def test_the_cap_is_the_ratio_itself_and_not_its_distance_from_1(cap: float, expected: float) -> None:
    assert clip_weight(8, 1.0, mask.Cap(cap)) == pytest.approx(expected)
    lower_too = clip_weight(0.1, 1.0, mask.Cap(cap, min=0.8))
    assert lower_too == pytest.approx(0.8) and clip_weight(0.1, 1.0, mask.Cap(cap)) == pytest.approx(0.1)


def test_a_sum_over_an_answer_multiplied_by_its_length_counts_the_length_twice() -> None:
    batch = policy_batch([[-1.0] * 3, [-1.0]], [1.0, -1.0], old=[[-1.0] * 3, [-1.0]])
    ours, mean = composed("luspo").weights(batch), composed("gspo").weights(batch)
    length = torch.tensor([3.0, 3.0, 3.0, 1.0], dtype=F64)
    torch.testing.assert_close(ours, length * mean, rtol=1e-12, atol=0)
    assert differs(length * ours, ours, 0.5)


def test_a_geometric_ratio_with_a_token_mask_is_not_the_inner_clip() -> None:
    """A clipped token enters the mean with its clipped value, so the others' ratio differs."""
    batch = policy_batch([[-1.0, -1.0]], [1.0], old=[[-3.0, -1.1]])
    masked = ("streams.rollouts.masks.clip={_target_: posttrain.loss.mask.RatioClip, low: 0.33, high: 0.4918, level: token}",)
    assert composed("gspo", masked).weights(batch).tolist() == pytest.approx([0.0, math.exp(2.1 / 2) / 2])
    assert composed("gmpo").weights(batch).tolist() == pytest.approx([0.0, math.exp(0.5 / 2) / 2])


def test_the_bound_of_a_ratio_is_not_that_of_a_log_ratio() -> None:
    batch = make(0, NORM, 0.5).batch()
    narrow = ("streams.rollouts.masks.inner.low=0.2", "streams.rollouts.masks.inner.high=0.2")
    assert differs(composed("gmpo", narrow).weights(batch), composed("gmpo").weights(batch), 0.05)


def test_the_symmetric_probability_mask_is_no_preference_loss() -> None:
    """One trainer calls it by the name of the squared preference loss: it drops tokens whatever their advantage, and knows no pairs."""
    both = composed("dppo_tv", ("streams.rollouts.masks.divergence.one_sided=false",))
    assert not composed("ipo").streams.keys() & both.streams.keys()
    back = policy_batch([[math.log(0.6)]], [1.0], behaviour=[[math.log(0.9)]])
    assert both.weights(back).tolist() == [0.0] and composed("dppo_tv").weights(back).tolist() == pytest.approx([0.6 / 0.9])
