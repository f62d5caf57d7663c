"""Identities of policy gradients, trust regions, KL and entropy: limits, exact numbers, exact expectations over small trees."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.advantage import GroupAdvantage
from posttrain.contrib.covariance import CovarianceDrop
from posttrain.contrib.future import FutureRatio
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference, regularizer
from posttrain.records import TokenBatch
from posttrain.testing.check import check_slicing, example_batch, objective_with
from tests.loss.cases import NORM, composed, make
from tests.loss.test_identities import LEAVES, all_leaves, clip_weight, local_kl, policy_batch, sequence_kl, tree

F64 = torch.float64
MEAN = "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenMean}"


def one(d: float, a: float, *masks: Any, logp: float = -1.0, to: str = "old") -> float:
    """The weight of one token with log-ratio ``d``."""
    batch = policy_batch([[logp]], [a], **{to: [[logp - d]]})
    stream = Stream(("policy",), likelihood.Token(), reference.Named(to), advantage.Column(), aggregate.TokenMean(), dict(enumerate(masks)))
    return float(Objective({"rollouts": stream}).weights(batch))


def factor(term: Any, batch: TokenBatch) -> Tensor:
    view = objective_with(term).views(batch)["rollouts"]
    return torch.exp(term.log_factor(view, batch.advantage)) if hasattr(term, "log_factor") else term.factor(view, batch.advantage)


def values(term: Any, batch: TokenBatch) -> list[float]:
    return term.values(objective_with(term).views(batch)["rollouts"]).tolist()


# -- whitening and credit ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("over", ["tokens", "sequences"])
def test_whitened_advantages_have_mean_0_and_deviation_1_over_their_population(over: str) -> None:
    batch = example_batch(3)
    view = objective_with(advantage.Whiten(over=over, eps=0.0)).views(batch)["rollouts"]
    found, on = advantage.Whiten(over=over, eps=0.0).values(view), view.on
    weight = torch.ones_like(found) if over == "tokens" else 1 / view.spread(view.seq_len().clamp(min=1))
    total = float(weight[on].sum())
    assert float((weight * found)[on].sum()) / total == pytest.approx(0.0, abs=1e-12)
    assert float((weight * found**2)[on].sum()) / total == pytest.approx(1.0)


def test_equal_advantages_whiten_to_nothing_and_one_prompt_is_the_group_norm() -> None:
    batch = policy_batch([[-1.0], [-2.0, -1.0]], [0.1, 0.1])
    assert values(advantage.Whiten(), batch) == [0.0, 0.0, 0.0]
    rewards = [1.0, 0.0, 0.25, 0.0]
    batch = policy_batch([[-1.0, -1.0]] * 4, rewards)
    normed = GroupAdvantage(eps=0.0).values(rewards)
    assert values(advantage.Whiten(eps=0.0), batch) == pytest.approx([a for a in normed for _ in range(2)])
    assert values(advantage.Whiten(eps=0.0, ddof=1), batch) == pytest.approx([a * math.sqrt(7 / 8) for a in normed for _ in range(2)])


def test_without_a_kl_the_return_is_the_same_all_along_an_answer() -> None:
    batch = policy_batch([[-1.0, -2.0, -0.5], [-1.0]], [1.0, -1.0], base=[[-1.0, -2.0, -0.5], [-1.0]], old=[[-1.1, -2.0, -0.5], [-1.0]])
    assert values(advantage.ColumnMinusKL(0.5), batch)[:3] == pytest.approx([1.05, 1.0, 1.0])
    assert values(advantage.ColumnMinusKL(0.0), batch) == [1.0, 1.0, 1.0, -1.0]
    assert values(advantage.ColumnMinusKL(0.0, gamma=0.5), batch) == [0.25, 0.5, 1.0, -1.0]


@pytest.mark.parametrize(("lam", "expected"), [(0.95, [0.7465, 0.47, 0.6]), (1.0, [0.8, 0.5, 0.6]), (0.0, [0.3, -0.1, 0.6])])
def test_generalised_advantages(lam: float, expected: list[float]) -> None:
    batch = policy_batch([[-1.0] * 3], [1.0], value=[[0.2, 0.5, 0.4]])
    assert values(advantage.GeneralizedAdvantage(lam=lam), batch) == pytest.approx(expected)


def test_what_a_kl_in_the_rewards_of_an_estimate_reads_and_reports() -> None:
    """The current policy among the two makes it live; the estimate is of the newer policy's distance from the older one's."""
    live = [advantage.GeneralizedAdvantage(coef=c, to=to, over=over).live for c, to, over in ((0.1, "base", "self"), (0.1, "self", "old"), (0.1, "base", "old"), (0.0, "base", "self"))]
    assert live == [True, True, False, False]
    both = (Stream(("policy",), likelihood.Token(), reference.Current(), advantage.GeneralizedAdvantage(coef=0.1, over=over), aggregate.TokenMean()) for over in ("self", "old"))
    assert [(n.coupling, n.live, n.keep_whole) for n in (Objective({"rollouts": s}).needs for s in both)] == [("sequence", True, None), ("token", False, None)]
    batch = policy_batch([[-1.0, -2.0], [-1.0]], [1.0, 0.0], value=[[0.0, 0.0], [0.0]], old=[[-1.0, -2.0], [-1.0]], base=[[-1.5, -2.2], [-1.9]])
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.GeneralizedAdvantage(coef=0.1), aggregate.TokenMean())
    total, count = Objective({"rollouts": stream}).weigh(batch)[1]["rollouts/reward_kl"]
    assert (total, count) == (pytest.approx(1.6), 2.0)


def test_a_sequence_penalty_of_one_token_is_that_token() -> None:
    """Of an answer of T tokens every one reports the penalty of the whole, so each counts as 1/T of it."""
    batch = policy_batch([[-1.0], [-1.0, -2.0]], [1.0, 1.0], base=[[-1.5], [-1.2, -2.6]])
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), aggregate.TokenMean())
    (view,) = Objective({"rollouts": stream}).views(batch).values()
    assert regularizer.KL("k2", level="sequence").penalty(view).tolist() == pytest.approx([0.125, 0.16, 0.16])


def test_generalised_advantages_without_a_critic_and_across_a_tool() -> None:
    batch = policy_batch([[-1.0] * 3, [-1.0]], [1.0, 0.5], value=[[0.0] * 3, [0.0]])
    assert values(advantage.GeneralizedAdvantage(lam=1.0), batch) == [1.0, 1.0, 1.0, 0.5]
    batch = policy_batch([[-1.0] * 4], [1.0], value=[[0.2, math.nan, 0.5, 0.4]])
    hole = batch.replace(source=torch.tensor([1, 4, 1, 1]), trainable=torch.tensor([True, False, True, True]))
    found = values(advantage.GeneralizedAdvantage(), hole)
    assert [found[0], found[2], found[3]] == pytest.approx([0.7465, 0.47, 0.6])
    discounted = policy_batch([[-1.0] * 3], [1.0], value=[[0.0] * 3])
    assert values(advantage.GeneralizedAdvantage(0.5, 1.0), discounted) == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(("length", "expected"), [(10, -0.80253), (100, -0.198816)])
def test_a_lambda_below_one_punishes_length_when_the_value_is_near_zero(length: int, expected: float) -> None:
    """Mean loss per token, ``-R (1 - lam**T) / (T (1 - lam))``: positive rewards favour short answers, negative ones long ones."""
    batch = policy_batch([[-1.0] * length], [1.0], value=[[0.0] * length])
    assert -sum(values(advantage.GeneralizedAdvantage(lam=0.95), batch)) / length == pytest.approx(expected, abs=1e-5)
    assert -sum(values(advantage.GeneralizedAdvantage(lam=1.0), batch)) / length == pytest.approx(-1.0)


def test_a_segment_reward_belongs_to_the_tokens_before_it() -> None:
    """Moved to an earlier token, a reward leaves earlier returns alone and goes from the later ones."""
    late, early = (
        policy_batch([[-1.0] * 4], [0.0], value=[[0.0] * 4]).replace(advantage=torch.tensor(r, dtype=F64))
        for r in ([0.0, 0, 0, 1], [0.0, 1, 0, 0])
    )
    term = advantage.GeneralizedAdvantage(lam=1.0, rewards="each")
    assert values(term, late) == [1.0] * 4 and values(term, early) == [1.0, 1.0, 0.0, 0.0]


def test_a_missing_value_names_the_column() -> None:
    with pytest.raises(ValueError, match="'value'"):
        values(advantage.GeneralizedAdvantage(), policy_batch([[-1.0]], [1.0]))


# -- trust regions -------------------------------------------------------------------------------------------------------------------
def test_a_dual_clip_inside_the_clip_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"c=1.2 must be above 1 \+ high=1.28 of the mask 'clip'"):
        composed("dapo", ("streams.rollouts.masks.dual.c=1.2",))
    assert composed("dapo", ("streams.rollouts.masks.dual.c=1.2", "streams.rollouts.masks.clip.high=0.1")).streams


@pytest.mark.parametrize(
    ("tau", "r", "expected"),
    [(1.0, r, v) for r, v in ((0.5, 0.9400), (0.8, 0.9901), (1.2, 0.9901), (2.0, 0.7864), (4.0, 0.1807), (1.0, 1.0))]
    + [(1.05, r, v) for r, v in ((0.5, 0.9341), (0.8, 0.9891), (1.2, 0.9891), (2.0, 0.7681), (4.0, 0.1576), (1.0, 1.0))],
)
def test_soft_gate_numbers(tau: float, r: float, expected: float) -> None:
    a = 1.0 if tau == 1.0 else -1.0
    assert one(math.log(r), a, mask.SoftGate()) == pytest.approx(a * r * expected, abs=2e-4)


def test_soft_gate_limits() -> None:
    assert one(math.log(3.0), 1.0, mask.SoftGate(tau_pos=1e-6)) == pytest.approx(3.0, rel=1e-9)
    for d in (100.0, -100.0):
        assert one(d, 1.0, mask.SoftGate()) == pytest.approx(0.0, abs=1e-30)
    batch = policy_batch([[-0.5]], [1.0], old=[[-100.5]])
    assert composed("sapo").weights(batch.replace(logps={k: v.float() for k, v in batch.logps.items()})).tolist() == [0.0]


def test_inner_clip_without_a_clipped_token_is_the_geometric_ratio() -> None:
    batch = policy_batch([[-1.0, -2.0, -0.5]], [1.0], old=[[-1.1, -2.2, -0.7]])
    wide = ("streams.rollouts.masks.clip=null",)
    torch.testing.assert_close(composed("gmpo").weights(batch), composed("gspo", wide).weights(batch), rtol=1e-12, atol=0)


def test_a_clipped_token_stays_in_the_mean_with_its_clipped_value() -> None:
    batch = policy_batch([[-1.0, -1.0]], [1.0], old=[[-2.0, -1.1]])
    ratio = math.exp((0.4 + 0.1) / 2)
    assert composed("gmpo").weights(batch).tolist() == pytest.approx([0.0, ratio / 2])
    down = policy_batch([[-2.0, -1.1]], [-1.0], old=[[-1.0, -1.0]])
    assert composed("gmpo").weights(down).tolist() == pytest.approx([0.0, -math.exp((-0.4 - 0.1) / 2) / 2])
    every = policy_batch([[-1.0, -1.0]], [1.0], old=[[-2.0, -2.0]])
    assert composed("gmpo").weights(every).tolist() == [0.0, 0.0]
    assert composed("gmpo").weights(every.replace(advantage=-every.advantage)).tolist() == pytest.approx([-math.e / 2] * 2)


def test_the_variance_of_a_geometric_ratio_falls_with_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    spreads = []
    for length in (4, 64):
        d = 0.1 * torch.randn(2000, length, generator=generator, dtype=F64)
        spreads.append(float(d.mean(1).exp().var()))
    assert spreads[0] / spreads[1] == pytest.approx(16.0, rel=0.15)


@pytest.mark.parametrize(
    ("q", "p", "a", "kept_tv"),
    [(0.01, 0.03, 1, True), (0.9, 0.99, 1, True), (0.9, 0.6, -1, False), (0.9, 0.6, 1, True), (0.6, 0.9, 1, False)],
)
def test_divergence_looks_at_probabilities(q: float, p: float, a: float, kept_tv: bool) -> None:
    weight = one(math.log(p / q), a, mask.Divergence(to="old"), logp=math.log(p))
    assert weight == pytest.approx(p / q * a if kept_tv else 0.0, abs=1e-12)
    clipped = one(math.log(p / q), a, mask.RatioClip(), logp=math.log(p))
    assert (clipped == 0) == ((a > 0 and p / q > 1.2) or (a < 0 and p / q < 0.8))


def test_bernoulli_divergence() -> None:
    for bound, kept in ((0.1444, 0.0), (0.1446, 1.1)):
        assert one(math.log(0.99 / 0.9), 1.0, mask.Divergence("kl", high=bound, to="old"), logp=math.log(0.99)) == pytest.approx(kept)
    assert one(math.log(1.0 / 0.9), 1.0, mask.Divergence("kl", to="old"), logp=0.0) == 0.0
    assert one(math.log(1.0 / 0.9), -1.0, mask.Divergence("kl", to="old"), logp=0.0) == pytest.approx(-1 / 0.9)
    impossible = mask._bernoulli(torch.tensor([math.log(0.3)], dtype=F64), torch.tensor([-math.inf], dtype=F64))
    assert float(impossible) == pytest.approx(-math.log(0.7), rel=1e-7), "a token the old policy never says"


def test_a_symmetric_divergence_drops_what_comes_back_too() -> None:
    for a in (1.0, -1.0):
        assert one(math.log(0.6 / 0.9), a, mask.Divergence(to="old", one_sided=False), logp=math.log(0.6)) == 0.0


def test_equal_lengths_make_the_sum_rule_a_multiple_of_the_mean_rule() -> None:
    batch = policy_batch([[-1.0, -2.0, -0.5], [-0.2, -1.0, -1.0]], [1.0, -1.0], old=[[-1.001, -2.0, -0.5], [-0.2, -1.0, -1.001]])
    same = ("streams.rollouts.masks.clip.low=0.09", "streams.rollouts.masks.clip.high=0.09")
    torch.testing.assert_close(composed("luspo", same).weights(batch), 3 * composed("gspo", same).weights(batch), rtol=1e-12, atol=0)
    on_policy = batch.replace(logps={**batch.logps, "old": batch.logps["current"]})
    torch.testing.assert_close(composed("luspo").weights(on_policy), composed("reinforce").weights(on_policy), rtol=1e-12, atol=0)


def test_on_policy_every_rollout_loss_is_the_plain_gradient() -> None:
    batch = make(1, NORM).batch()
    fresh = batch.replace(logps={"current": batch.logps["current"], "behaviour": batch.logps["current"]}, fresh=True)
    expected = composed("reinforce", (MEAN,)).weights(fresh)
    for name in ("dual_clip", "sapo", "gmpo", "gspo_token", "stable_reinforce"):
        torch.testing.assert_close(composed(name).weights(fresh), expected, rtol=1e-12, atol=0)
    for name in ("gpg", "lite_ppo", "gdpo", "dppo_tv", "dppo_kl", "fipo", "luspo"):
        torch.testing.assert_close(composed(name, (MEAN,)).weights(fresh), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(composed("cpgd", ("regularizers.kl=null",)).weights(fresh), expected, rtol=1e-12, atol=0)


def test_the_pull_to_the_sampling_policy_is_nothing_where_they_agree() -> None:
    batch = policy_batch([[-1.0, -1.0]], [0.0], old=[[-1.0, -1.0 - math.log(2)]])
    assert composed("cpgd").weights(batch).tolist() == pytest.approx([0.0, -0.01 * (2 - 1) / 2])


def test_ratios_beyond_the_bound_have_no_gradient() -> None:
    for d, kept in ((6.9, True), (6.92, False), (-6.9, True), (-6.92, False), (100.0, False), (-100.0, False)):
        assert (one(d, -1.0 if d > 0 else 1.0, mask.Reject(1e-3, 1e3, "old", "self")) != 0) == kept


def test_sum_over_the_group_of_the_best_lead_is_the_gradient_of_pass_at_k() -> None:
    """A policy that is right with probability p, one token per answer, k = 3: exact over all groups."""
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    k, expected = 3, torch.zeros((), dtype=F64)
    objective = composed("pass_at_k", ("streams.rollouts.masks.clip=null",))
    for group in itertools.product((1.0, 0.0), repeat=k):
        p = torch.sigmoid(theta)
        logp = torch.stack([torch.log(p if r else 1 - p) for r in group])
        best, second = sorted(group, reverse=True)[:2]
        lead = [best - second if i == group.index(best) else 0.0 for i in range(k)]
        batch = policy_batch([[float(x)] for x in logp], lead, fresh=True)
        weights = objective.weights(batch)
        expected = expected + logp.sum().exp().detach() * torch.autograd.grad((weights * logp).sum(), theta)[0]
    (exact,) = torch.autograd.grad(1 - (1 - torch.sigmoid(theta)) ** k, theta)
    assert float(expected) == pytest.approx(float(exact), rel=1e-12)


# -- which tokens --------------------------------------------------------------------------------------------------------------------
def test_dead_groups_change_only_what_is_counted() -> None:
    batch = make(2, NORM).batch()
    drop = "streams.rollouts.masks.live={_target_: posttrain.loss.mask.DropDeadGroups}"
    torch.testing.assert_close(composed("dapo", (drop,)).weights(batch), composed("dapo").weights(batch), rtol=0, atol=0)
    kept = ("streams.rollouts.aggregation.denominator=kept", "streams.rollouts.masks.clip=null", "streams.rollouts.masks.dual=null")
    counted, all_counted = composed("dapo", (drop, *kept)).weights(batch), composed("dapo", kept).weights(batch)
    view = composed("dapo").views(batch)["rollouts"]
    live = view.on & (view.spread(view.code_sum(batch.group, (view.seq_sum(batch.advantage.abs()) > 0).double())) > 0)
    ratio = float(view.on.sum()) / float(live.sum())
    assert ratio > 1
    torch.testing.assert_close(counted, ratio * all_counted, rtol=1e-12, atol=0)
    check_slicing(composed("dapo", (drop, *kept)), batch)


@pytest.mark.parametrize(("share", "kept"), [(1.0, 10), (0.2, 2), (0.25, 3), (0.01, 1), (0.3, 3)])
def test_top_entropy_keeps_exactly_its_share(share: float, kept: int) -> None:
    batch = policy_batch([[-1.0] * 10], [1.0], entropy=[[0.1 * (i * 7 % 10) for i in range(10)]])
    found = factor(mask.TopEntropy(share), batch)
    assert int(found.sum()) == kept
    assert set(batch.logps["entropy"][found > 0].tolist()) == set(sorted(batch.logps["entropy"].tolist())[10 - kept :])


def test_ties_of_entropy_are_kept() -> None:
    assert int(factor(mask.TopEntropy(0.2), policy_batch([[-1.0] * 5], [1.0], entropy=[[0.5] * 5])).sum()) == 5
    assert int(factor(mask.TopEntropy(0.2), policy_batch([[-1.0] * 5], [1.0], entropy=[[0.5, 0.5, 0.1, 0.2, 0.3]])).sum()) == 2


def test_covariance_drop_draws_by_seed_and_not_by_slicing() -> None:
    batch = example_batch(4)
    term = CovarianceDrop(share=0.1, low=-9.0, high=9.0)
    objective = objective_with(term)
    on = int(objective.views(batch)["rollouts"].on.sum())
    found = factor(term, batch)
    assert int((found == 0).sum()) == int(0.1 * on) > 1
    assert any(not torch.equal(found, factor(CovarianceDrop(0.1, -9.0, 9.0, seed), batch)) for seed in (1, 2))
    assert not torch.equal(found, factor(term, batch.replace(progress=0.5)))
    order = [3, 8, 1, 0, 7, 5, 6, 4, 2]
    assert torch.equal(found[batch.columns_of(order)], factor(term, batch.take(order)))
    assert int((factor(CovarianceDrop(1e-9, -9.0, 9.0), batch) == 0).sum()) == 1, "any share above 0 drops at least one"
    for nothing in (CovarianceDrop(0.0, -9.0, 9.0), CovarianceDrop(0.1, 90.0, 91.0)):
        assert bool((factor(nothing, batch) == 1).all())


@pytest.mark.parametrize(("d", "expected"), [(0.0, 1.0), (0.01, math.exp(0.01)), (100.0, 1.0), (2.0, 1.2), (-1.0, 1.0)])
def test_future_ratio_of_one_token(d: float, expected: float) -> None:
    batch = policy_batch([[-1.0]], [1.0], old=[[-1.0 - d]])
    assert factor(FutureRatio(), batch).tolist() == pytest.approx([expected])


def test_future_ratio_looks_ahead_and_halves() -> None:
    batch = policy_batch([[-1.0] * 3], [1.0], old=[[-1.0, -1.0, -1.08]])
    assert factor(FutureRatio(half_life=1.0), batch).tolist() == pytest.approx([math.exp(0.02), math.exp(0.04), math.exp(0.08)])
    spared = policy_batch([[-1.0]], [-1.0], old=[[-1.0 - math.log(5.0)]])
    assert factor(FutureRatio(), spared).tolist() == [1.0] and factor(FutureRatio(spare=6.0), spared).tolist() == pytest.approx([1.2])


# -- KL off-policy, and where the optimum is -----------------------------------------------------------------------------------------
def off_policy_gradient(term: Any, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Expected gradient of a penalty over the tree when another policy sampled, ``(found, parameters)``."""
    logits, base_logits = tree()
    generator = torch.Generator().manual_seed(seed)
    old_logits = logits.detach() + 0.3 * torch.randn(13, 3, generator=generator, dtype=F64)
    leaves, base, old = all_leaves(logits), all_leaves(base_logits), all_leaves(old_logits)
    batch = policy_batch(leaves.tolist(), [0.0] * 27, base=base.tolist(), old=old.tolist())
    view = objective_with(term).views(batch)["rollouts"]
    weight = term.gradient(view) * old.sum(1).exp().repeat_interleave(3)
    return torch.autograd.grad((weight * leaves.flatten()).sum(), logits)[0], old


@pytest.mark.parametrize(("estimator", "expected"), [("k2", lambda: local_kl()), ("k3", lambda: local_kl(forward=True))])
def test_the_ratio_of_the_prefix_makes_a_stale_kl_exact(estimator: str, expected: Any) -> None:
    found, _ = off_policy_gradient(regularizer.KL(estimator, ratio="prefix"))
    torch.testing.assert_close(found, expected(), rtol=1e-9, atol=1e-12)
    for worse in ("none", "token"):
        other, _ = off_policy_gradient(regularizer.KL(estimator, ratio=worse))
        assert float((other - expected()).norm() / expected().norm()) > 0.02


def test_on_samples_of_the_reference_the_mirrored_estimator_is_the_forward_kl() -> None:
    """Position by position, with the prefixes of the policy that sampled."""
    found, old = off_policy_gradient(regularizer.KL("k3_of_to", "old"))
    logits, _ = tree()
    generator = torch.Generator().manual_seed(5)
    rows, old_rows = (
        torch.log_softmax(logits, -1),
        torch.log_softmax(logits.detach() + 0.3 * torch.randn(13, 3, generator=generator, dtype=F64), -1),
    )
    each, reach = (old_rows.exp() * (old_rows - rows)).sum(1), torch.zeros(13, dtype=F64)
    for leaf, logp in zip(LEAVES, old, strict=True):
        for t in range(3):
            reach[0 if t == 0 else 1 + leaf[0] if t == 1 else 4 + 3 * leaf[0] + leaf[1]] += logp.sum().exp()
    torch.testing.assert_close(found, torch.autograd.grad((reach * each).sum(), logits)[0], rtol=1e-9, atol=1e-12)


def at_the_optimum(penalty: Any) -> float:
    """Norm of the exact gradient of reward and penalty at ``p* ~ base exp(R/beta)``."""
    beta, (_, base_logits) = 0.4, tree(1)
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(27, generator=generator, dtype=F64)
    joint = torch.softmax(all_leaves(base_logits).sum(1) + rewards / beta, 0)
    logits = torch.zeros(13, 3, dtype=F64)
    for leaf, p in zip(LEAVES, joint, strict=True):
        for t in range(3):
            logits[0 if t == 0 else 1 + leaf[0] if t == 1 else 4 + 3 * leaf[0] + leaf[1], leaf[t]] += p
    logits = logits.log().requires_grad_()
    leaves = all_leaves(logits)
    torch.testing.assert_close(leaves.sum(1).exp(), joint, rtol=1e-9, atol=0)
    batch = policy_batch(leaves.tolist(), rewards.tolist(), base=all_leaves(base_logits).tolist(), fresh=True)
    batch = batch.replace(weight=leaves.detach().sum(1).exp().repeat_interleave(3))
    in_reward = isinstance(penalty, advantage.ColumnMinusKL)
    stream = Stream(
        ("policy",), likelihood.Token(), reference.Current(), penalty if in_reward else advantage.Column(), aggregate.Constant(1 / 27)
    )
    weight = Objective({"rollouts": stream}).weights(batch)
    if not in_reward:
        view = objective_with(penalty).views(batch)["rollouts"]
        weight = weight - beta * penalty.gradient(view) * batch.weight
    return float(torch.autograd.grad((weight * leaves.flatten()).sum(), logits)[0].norm())


def test_only_a_kl_of_whole_answers_has_its_optimum_where_it_should() -> None:
    assert at_the_optimum(advantage.ColumnMinusKL(0.4, over="self")) < 1e-12
    assert at_the_optimum(advantage.ColumnMinusKL(0.4, over="self", credit="sequence")) < 1e-12
    assert at_the_optimum(regularizer.KL("k2", level="sequence")) < 1e-12
    k2, k3 = at_the_optimum(regularizer.KL("k2")), at_the_optimum(regularizer.KL("k3"))
    assert 1e-3 < k2 < k3


def test_sequence_and_local_kl_agree_on_answers_of_one_token() -> None:
    batch = policy_batch([[-1.0], [-0.3]], [0.0, 0.0], base=[[-1.4], [-0.1]], old=[[-1.0], [-0.3]])
    token, sequence = (objective_with(regularizer.KL("k2", level=level)).weights(batch) for level in ("token", "sequence"))
    torch.testing.assert_close(token, sequence, rtol=0, atol=0)
    assert float((local_kl() - sequence_kl()).norm()) > 0.01


@pytest.mark.parametrize(
    ("make_term", "reason"),
    [
        (lambda: mask.SoftGate(tau_pos=0.0), "tau_pos=0.0 must be above 0"),
        (lambda: mask.InnerClip(low=-0.1), "low=-0.1 must be at least 0"),
        (lambda: mask.Divergence("chi"), "kind='chi' does not exist"),
        (lambda: mask.DualClip(1.2).fits(SimpleNamespace(masks={"clip": mask.RatioClip()})), r"c=1.2 must be above 1 \+ high=1.2 of the mask 'clip'"),
        (lambda: mask.TopEntropy(0.0), "above 0 and at most 1"),
        (lambda: mask.Cap(1.0, min=2.0), "min=2.0 is above max=1.0"),
        (lambda: regularizer.KL("k3_of_to", ratio="token"), "takes no ratio"),
        (lambda: regularizer.KL("k2", ratio="prefix", level="sequence"), "ratio=prefix belongs to level=token"),
        (lambda: regularizer.KL("k1", ratio="prefix"), "expectation 0"),
        (lambda: advantage.Whiten(over="groups"), "over='groups' is tokens or sequences"),
        (lambda: advantage.Whiten(eps=-1.0), "must not be negative"),
        (lambda: advantage.ColumnMinusKL(gamma=0.0), "gamma=0.0 must be above 0"),
        (lambda: advantage.ColumnMinusKL(credit="own", gamma=0.5), "acts on credit=to_go only"),
        (lambda: advantage.GeneralizedAdvantage(lam=1.5), "lie between 0 and 1"),
        (lambda: advantage.GeneralizedAdvantage(rewards="first"), "rewards='first' does not exist"),
        (lambda: CovarianceDrop(share=2.0), "between 0 and 1"),
        (lambda: CovarianceDrop(low=5.0, high=1.0), "must be below high"),
        (lambda: FutureRatio(half_life=0.0), "must be above 0"),
        (lambda: FutureRatio(low=1.3), "low=1.3 is above high=1.2"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(make_term: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_term()


def test_the_clip_table_holds_beside_a_cap_with_a_floor() -> None:
    assert clip_weight(0.5, 1.0, mask.Cap(1.2, min=0.8)) == pytest.approx(0.8)
    assert clip_weight(2.0, -1.0, mask.Cap(1.2, min=0.8)) == pytest.approx(-1.2)


@pytest.mark.parametrize("constant", [0.7, -3.0])
def test_a_constant_baseline_changes_nothing_on_the_policys_own_samples(constant: float) -> None:
    """All 27 answers of the tree, as often as the policy says them: exact; of another policy's samples it is not innocent."""
    logits, _ = tree(3)
    leaves, rewards = all_leaves(logits), torch.rand(27, generator=torch.Generator().manual_seed(4), dtype=F64)

    def gradient(baseline: float, often: Tensor) -> Tensor:
        batch = policy_batch(leaves.tolist(), (rewards - baseline).tolist(), fresh=True).replace(weight=often.repeat_interleave(3))
        weight = 27 * composed("reinforce").weights(batch)
        return torch.autograd.grad((weight * leaves.flatten()).sum(), logits, retain_graph=True)[0]

    own, uniform = leaves.detach().sum(1).exp(), torch.full((27,), 1 / 27, dtype=F64)
    exact = torch.autograd.grad((leaves.sum(1).exp() * rewards).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient(constant, own), exact, rtol=0, atol=1e-12)
    assert float((gradient(constant, uniform) - gradient(0.0, uniform)).norm()) > 0.1
