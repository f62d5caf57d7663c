"""Identities of the corrections for stale and mismatched samples, and of the regressions on the reward: limits, exact numbers, fixed points."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.contrib.classification import GroupClassification
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference
from posttrain.records import Row, TokenBatch
from posttrain.testing.check import objective_with
from tests.loss.cases import CENTER, LOO, REWARD, composed, make
from tests.loss.test_identities import LEAVES, all_leaves, pair_batch, policy_batch, tree

F64 = torch.float64
SUM = "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenSum}"


def factor(term: Any, batch: TokenBatch) -> list[float]:
    view = objective_with(term).views(batch)["rollouts"]
    found = torch.exp(term.log_factor(view, batch.advantage)) if hasattr(term, "log_factor") else term.factor(view, batch.advantage)
    return found.tolist()


def at(d: list[float], a: float, to: str = "old") -> TokenBatch:
    """One answer with these log-ratios."""
    return policy_batch([[-1.0] * len(d)], [a], **{to: [[-1.0 - x for x in d]]})


# -- engine and learner --------------------------------------------------------------------------------------------------------------
def test_where_engine_and_learner_agree_every_correction_is_grpo() -> None:
    batch = make(1, CENTER).batch()
    agreeing = batch.replace(logps={**batch.logps, "behaviour": batch.logps["old"]})
    expected = composed("grpo").weights(agreeing)
    for name in ("tis", "mis", "icepop"):
        torch.testing.assert_close(composed(name).weights(agreeing), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(composed("decoupled_ppo").weights(agreeing), composed("ppo").weights(agreeing), rtol=1e-12, atol=0)
    fresh = batch.replace(logps={**batch.logps, "behaviour": batch.logps["current"], "old": batch.logps["current"]})
    torch.testing.assert_close(composed("opsm").weights(fresh), composed("grpo").weights(fresh), rtol=0, atol=0)


def test_with_an_always_fresh_proximal_policy_only_the_weight_is_left() -> None:
    batch = make(1, CENTER).batch()
    fresh = batch.replace(logps={**batch.logps, "old": batch.logps["current"]})
    loose = ("streams.rollouts.masks.tis=null",)
    weighted = ("streams.rollouts.reference.to=behaviour", "streams.rollouts.masks.clip=null")
    torch.testing.assert_close(
        composed("decoupled_ppo", loose).weights(fresh), composed("ppo", weighted).weights(fresh), rtol=1e-12, atol=0
    )


def test_no_bound_is_no_mask_and_a_rejected_token_keeps_its_place_unless_told() -> None:
    batch = make(2, CENTER, 0.5).batch()
    open_bounds = ("streams.rollouts.masks.reject.min=0.0", "streams.rollouts.masks.reject.max=inf")
    plain = ("streams.rollouts.reference.to=behaviour",)
    torch.testing.assert_close(composed("icepop", open_bounds).weights(batch), composed("grpo", plain).weights(batch), rtol=0, atol=0)
    nothing = ("streams.rollouts.masks.reject.min=1.0", "streams.rollouts.masks.reject.max=1.0")
    kept = "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.TokenMean, denominator: kept}"
    for overrides in (nothing, (*nothing, kept)):
        assert not bool(composed("icepop", overrides).weights(batch).any())


def test_a_ratio_and_its_inverse_are_not_the_same_bounds() -> None:
    """Some code states the bounds for behaviour over old: an asymmetric window then keeps other tokens."""
    batch = policy_batch([[-1.0] * 2], [1.0], old=[[-1.0, -1.0]], behaviour=[[-1.0 - math.log(4.0), -1.0 + math.log(4.0)]])
    assert factor(mask.Reject(0.5, 5.0), batch) == [1.0, 0.0]
    assert factor(mask.Reject(0.5, 5.0, to="old", over="behaviour"), batch) == [0.0, 1.0]
    assert factor(mask.Reject(1 / 5.0, 1 / 0.5, to="old", over="behaviour"), batch) == factor(mask.Reject(0.5, 5.0), batch)


@pytest.mark.parametrize(
    ("statistic", "per", "value"),
    [
        ("abs", "token", 0.3),
        ("k2", "token", 0.045),
        ("k3", "token", math.exp(0.3) - 1.3),
        ("abs", "mean", 0.2),
        ("abs", "sum", 0.4),
        ("abs", "worst", 0.3),
    ],
)
def test_disagreement_statistics(statistic: str, per: str, value: float) -> None:
    batch = policy_batch([[-1.0, -1.0]], [1.0], old=[[-1.0, -1.0]], behaviour=[[-1.3, -0.9]])
    first = [factor(mask.Disagreement(statistic, value + step, per), batch)[0] for step in (-1e-9, 1e-9)]
    assert first == [0.0, 1.0]


def test_importance_weights_on_the_tree() -> None:
    """Only the ratio of the whole answer makes stale rollouts exact; the token's ratio halves the error no more."""
    logits, _ = tree()
    generator = torch.Generator().manual_seed(7)
    old = all_leaves(logits.detach() + 0.4 * torch.randn(13, 3, generator=generator, dtype=F64))
    reward = torch.rand(27, generator=generator, dtype=F64)
    leaves = all_leaves(logits)
    exact = torch.autograd.grad((leaves.sum(1).exp() * reward).sum(), logits, retain_graph=True)[0]

    def found(ratio: str | None) -> Tensor:
        batch = policy_batch(leaves.tolist(), reward.tolist(), behaviour=old.tolist())
        batch = batch.replace(weight=old.sum(1).exp().repeat_interleave(3))
        used = reference.Named("behaviour") if ratio else reference.Current()
        stream = Stream(("policy",), likelihood.Token(ratio=ratio or "token"), used, advantage.Column(), aggregate.Constant(1 / 27))
        weight = Objective({"rollouts": stream}).weights(batch)
        return torch.autograd.grad((weight * leaves.flatten()).sum(), logits, retain_graph=True)[0]

    error = {ratio: float((found(ratio) - exact).norm() / exact.norm()) for ratio in (None, "token", "sequence")}
    assert len(LEAVES) == 27 and error["sequence"] < 1e-12 < 0.05 < error["token"] < error[None]


# -- second moment -------------------------------------------------------------------------------------------------------------------
def moment(squares: list[float], tau: float = 0.04, rule: str = "capped", tokens: str = "harmful", a: float = 1.0) -> list[float]:
    return factor(mask.SecondMoment(tau, rule, tokens), at([math.sqrt(x) for x in squares], a))


def test_second_moment_numbers() -> None:
    first = [0.81, 0.09, 0.01, 0.0025, 0.0004]
    assert moment(first) == moment(first, rule="remaining") == [0.0, 1.0, 1.0, 1.0, 1.0]
    second = [0.2, 0.1, 0.09, 0.02, 0.01]
    assert moment(second) == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert moment(second, 0.0401, "remaining") == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert moment(second, 0.0399, "remaining") == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_second_moment_limits() -> None:
    assert moment([0.0] * 3) == [1.0] * 3 and moment([0.81, 0.09], a=-1.0) == [1.0, 1.0], "no harmful token"
    assert moment([0.81, 0.0], tau=0.0) == [0.0, 1.0], "the value below the threshold is 0"
    assert moment([0.81, 0.09], tau=0.0, tokens="all") == [0.0, 0.0] and moment([0.81, 0.09], tau=9.0) == [1.0, 1.0]
    assert moment([1e4, 1e-4, 1e-4], a=1.0) == [0.0, 1.0, 1.0], "a single huge outlier"
    assert factor(mask.SecondMoment(0.04), at([-0.9, 0.3, -0.1], -1.0)) == [0.0, 1.0, 1.0]


# -- stale answers -------------------------------------------------------------------------------------------------------------------
def test_stale_negatives() -> None:
    stale = at([-0.8, -0.4], -1.0, "behaviour")
    assert factor(mask.StaleNegative(0.5), stale) == [0.0, 0.0] and factor(mask.StaleNegative(0.7), stale) == [1.0, 1.0]
    assert factor(mask.StaleNegative(0.0), at([-9.0, -9.0], 1.0, "behaviour")) == [1.0, 1.0], "a positive one is never dropped"
    assert factor(mask.StaleNegative(math.inf), at([-100.0], -1.0, "behaviour")) == [1.0]
    assert factor(mask.StaleNegative(0.0), at([2.0], -1.0, "behaviour")) == [1.0], "moved towards, not away"


@pytest.mark.parametrize(
    ("w", "a", "expected"),
    [
        (1.0, 1.0, 1.0),
        (1.0, -1.0, 1.0),
        (0.5, 1.0, 1.1204),
        (2.0, 1.0, 0.1991),
        (0.5, -1.0, 0.3398),
        (2.0, -1.0, 1.0827),
        (2 / 3, 1.0, 1.2081),
        (1.5, -1.0, 1.2416),
    ],
)
def test_gamma_taper_numbers(w: float, a: float, expected: float) -> None:
    assert factor(mask.GammaTaper(), at([math.log(w) / 2] * 2, a)) == pytest.approx([expected] * 2, abs=5e-5)


@pytest.mark.parametrize("d", [100.0, -100.0, 1000.0, math.inf])
def test_gamma_taper_vanishes_far_away(d: float) -> None:
    for a in (1.0, -1.0):
        assert factor(mask.GammaTaper(), at([d], a)) == pytest.approx([0.0], abs=1e-80)


def test_negative_taper_limits() -> None:
    batch = policy_batch([[-1.0, -2.0], [-1.5]], [1.0, -1.0], behaviour=[[-9.0, -9.0], [-1.5]])
    torch.testing.assert_close(composed("topr").weights(batch), composed("reinforce").weights(batch), rtol=0, atol=0)
    gone = policy_batch([[-60.0]], [-1.0], behaviour=[[-1.0]])
    assert composed("topr").weights(gone).tolist() == pytest.approx([0.0], abs=1e-25)
    assert factor(mask.NegativeTaper(), at([0.7], -1.0, "behaviour")) == [1.0], "never amplified"
    missing = TokenBatch.from_sequences([Row(ids=[1, 2], sources=["prompt", "policy"], logps={"current": [0.0, -1.0]})], dtype=F64)
    with pytest.raises(ValueError, match="'behaviour'"):
        composed("topr").weights(missing)


@pytest.mark.parametrize(("p", "c", "share"), [(0.5, 0.2, 0.4), (0.1, -0.5, 0.25), (0.3, 0.0, 0.3)])
def test_the_baseline_of_the_taper_sets_the_share_of_positives(p: float, c: float, share: float) -> None:
    """Rewards of +1 and -1 less ``c``: ``p (1 - c) / (1 + (1 - 2p) c)`` of the gradient's size comes from the right answers."""
    rewards = [1.0] * round(10 * p) + [-1.0] * round(10 * (1 - p))
    batch = policy_batch([[-1.0]] * 10, [x - c for x in rewards], behaviour=[[-1.0]] * 10)
    sizes = composed("topr").weights(batch).abs()
    assert float(sizes[: round(10 * p)].sum() / sizes.sum()) == pytest.approx(share) == pytest.approx(p * (1 - c) / (1 + (1 - 2 * p) * c))


def test_a_reward_of_nothing_is_no_negative_one() -> None:
    """One framework tapers where the score is not above 0; in the estimator a reward of 0 has no gradient either way."""
    assert composed("topr").weights(policy_batch([[-1.0]], [0.0], behaviour=[[-0.1]])).tolist() == [0.0]


def fixed_data(loss: str, steps: int = 800) -> tuple[float, float, float]:
    """A frozen data set of eight answers of one token, drawn uniformly, two of them right (+1) and the rest wrong (-1), learnt for long:
    ``(probability of a right one, largest logit, log-prob of a wrong one)``."""
    logits, objective = torch.zeros(8, dtype=F64), composed(loss)
    batch = policy_batch([[0.0]] * 8, [1.0, 1.0] + [-1.0] * 6, behaviour=[[math.log(1 / 8)]] * 8)
    for _ in range(steps):
        weight = objective.weights(batch, torch.log_softmax(logits, 0))
        logits = logits + 2.0 * (weight - torch.softmax(logits, 0) * weight.sum())
    p = torch.softmax(logits, 0)
    return float(p[:2].sum()), float((logits - logits.mean()).max()), float(torch.log_softmax(logits, 0)[2:].min())


def test_on_fixed_data_the_taper_settles_where_reinforce_diverges() -> None:
    right, largest, worst = fixed_data("topr")
    assert right > 0.95 and largest < 10.0 and worst > -20.0
    _, largest, worst = fixed_data("reinforce")
    assert largest > 100.0 and worst < -100.0


def test_given_answers_weighted_by_their_advantage() -> None:
    """Without a ratio it is advantage-weighted imitation; an advantage of 0 has no gradient; a ratio on the bound is kept."""
    rows = [
        Row(
            ids=[1, 2, 3], sources=["prompt", "demo", "demo"], weight=w, logps={"current": [0.0, -1.0, -2.0], "base": [0.0, -1.0 - d, -2.0]}
        )
        for w, d in ((0.5, 0.0), (0.0, 3.0), (1.0, 3.0), (1.0, -9.0))
    ]
    weights = composed("a_lol").weights(TokenBatch.from_sequences(rows, dtype=F64)).reshape(4, 2)
    torch.testing.assert_close(weights, torch.tensor([[0.5] * 2, [0.0] * 2, [1.9] * 2, [0.1] * 2], dtype=F64) / 4)


# -- regressions on the reward -------------------------------------------------------------------------------------------------------
def answers(d: list[float], rewards: list[float], lengths: list[int] | None = None) -> TokenBatch:
    """One group of answers with these log-ratios to the base."""
    lengths = lengths or [1] * len(d)
    return policy_batch(
        [[-1.0] * n for n in lengths],
        rewards,
        base=[[-1.0 - x / n] * n for x, n in zip(d, lengths, strict=True)],
        old=[[-1.0] * n for n in lengths],
    )


def per_answer(name: str, batch: TokenBatch, overrides: tuple[str, ...] = ()) -> Tensor:
    weights = composed(name, overrides).weights(batch)
    return torch.stack([weights[batch.seq == i][0] for i in range(batch.num_sequences)])


def test_weights_of_a_group_sum_to_nothing() -> None:
    batch = answers([0.5, -1.0, 2.0, 0.1], [1.0, 0.0, 0.3, 0.0], [1, 3, 2, 5])
    for name in ("gvpo", "copg", "rebel"):
        assert float(per_answer(name, batch).sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(per_answer("gvpo", batch).abs().max()) > 0.05


def test_at_the_base_the_group_variance_is_centred_reinforce() -> None:
    batch = answers([0.0] * 4, [1.0, 0.0, 0.0, 0.0])
    assert per_answer("gvpo", batch).tolist() == pytest.approx([0.25, -0.25 / 3, -0.25 / 3, -0.25 / 3])


def test_the_optimum_has_no_gradient_and_equal_rewards_pull_back() -> None:
    rewards = [1.0, 0.0, 0.25]
    optimal = answers([r / 0.1 + 7.0 for r in rewards], rewards, [2, 1, 4])
    assert per_answer("gvpo", optimal).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert per_answer("copg", optimal).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    equal = per_answer("gvpo", answers([1.0, -1.0], [0.5, 0.5]))
    assert equal.tolist() == pytest.approx([-0.1, 0.1])
    assert per_answer("gvpo", answers([3.0], [1.0])).tolist() == [0.0], "a group of one"
    assert per_answer("copg", answers([3.0, 3.0], [1.0, 1.0])).tolist() == [0.0, 0.0], "two identical answers"


def test_summed_over_pairs_it_is_a_multiple_of_the_variance() -> None:
    """``sum over pairs (x_i - x_j)**2 = k sum (x_i - mean)**2``: the mean over pairs is ``4 beta`` times the published variance form."""
    batch = answers([0.5, -1.0, 2.0, 0.1], [1.0, 0.0, 0.3, 0.0], [1, 3, 2, 5])
    torch.testing.assert_close(composed("copg").weights(batch), 0.4 * composed("gvpo").weights(batch), rtol=1e-12, atol=0)


def test_a_preference_of_half_makes_the_pair_form_the_squared_preference_loss() -> None:
    beta = 0.1
    pair = pair_batch([-1.0], [-0.7], base=([-1.4], [-0.9]))
    sums = ("streams.pairs.advantage.score=log_ratio_sum", "streams.pairs.aggregation._target_=posttrain.loss.aggregate.PairSum")
    squared = composed("ipo", sums).weights(pair)
    group = answers([0.4, 0.2], [0.25, -0.25])
    regression = composed("copg").weights(group)
    torch.testing.assert_close(regression, beta**2 * squared, rtol=1e-12, atol=0)


def test_without_a_penalty_two_answers_are_leave_one_out() -> None:
    batch = make(1, REWARD).batch()
    free = ("streams.rollouts.advantage.inner.coef=0.0", "streams.rollouts.advantage.divide=none", "streams.rollouts.coef=1.0", SUM)
    view = composed("gvpo").views(batch)["rollouts"]
    learnt = view.seq_len() > 0
    count = view.code_count(batch.group, learnt).to(F64)
    assert int(learnt.sum()) == 8
    loo = composed("rloo").weights(make(1, LOO).batch())
    centred = composed("gvpo", free).weights(batch)
    whole = view.spread((count == view.code_count(batch.group, view.member)).double()) > 0
    times = view.spread(count / (count - 1).clamp(min=1))
    on = view.on & whole
    torch.testing.assert_close((times * centred)[on], loo[on], rtol=1e-12, atol=1e-15)
    assert int(on.sum()) > 5


def test_a_live_kl_in_the_reward_with_a_group_baseline_is_the_group_variance() -> None:
    """Leave-one-out of ``R - beta D`` is ``k/(k-1)`` times its centring: the same weights up to constants."""
    batch = answers([0.5, -1.0, 2.0, 0.1], [1.0, 0.0, 0.3, 0.0], [1, 3, 2, 5])
    inner = advantage.ColumnMinusKL(0.1, over="self", credit="sequence")
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), inner, aggregate.Constant(1.0))
    value = 4 * Objective({"rollouts": stream}).weights(batch)
    each = torch.stack([value[batch.seq == i][0] for i in range(4)])
    loo = each - (each.sum() - each) / 3
    torch.testing.assert_close(per_answer("gvpo", batch), loo * 3 / 4 / 3, rtol=1e-12, atol=0)


def test_mirror_descent_without_temperature_is_centred_reinforce() -> None:
    batch = make(1, CENTER).batch()
    torch.testing.assert_close(
        composed("kimi_k15", ("streams.rollouts.advantage.coef=0.0",)).weights(batch), composed("reinforce").weights(batch)
    )


def bandit(loss: str, steps: int = 500, beta: float = 0.5, overrides: tuple[str, ...] = ()) -> float:
    """Exact learning on eight actions from uniform data: total variation to ``ref exp(R/beta)`` in the end."""
    generator = torch.Generator().manual_seed(3)
    base, rewards = torch.log_softmax(torch.randn(8, generator=generator, dtype=F64), 0), torch.rand(8, generator=generator, dtype=F64)
    best = torch.softmax(base + rewards / beta, 0)
    logits, objective = base.clone(), composed(loss, overrides)
    batch = policy_batch([[0.0]] * 8, rewards.tolist(), base=base[:, None].tolist(), old=base[:, None].tolist())
    for _ in range(steps):
        weight = objective.weights(batch, torch.log_softmax(logits, 0))
        logits = logits + 10.0 * (weight - torch.softmax(logits, 0) * weight.sum())
    return float((torch.softmax(logits, 0) - best).abs().sum() / 2)


def test_the_group_variance_finds_the_optimum_and_a_constant_baseline_does_not() -> None:
    beta = ("streams.rollouts.advantage.inner.coef=0.5",)
    assert bandit("gvpo", overrides=beta) < 1e-6
    assert bandit("kimi_k15", overrides=("streams.rollouts.advantage.coef=0.5", "streams.rollouts.advantage.to=base")) > 0.02


@pytest.mark.parametrize(("d", "expected"), [([0.0] * 4, [0.5, -0.25, -0.25, -0.25]), ([99.0, 0.0, 0.0, 0.0], [0.0, -0.25, -0.25, -0.25])])
def test_classification_weights(d: list[float], expected: list[float]) -> None:
    batch = answers(d, [0.75, -0.25, -0.25, -0.25])
    term = GroupClassification(to="base", tau=0.5)
    found = term.values(objective_with(term).views(batch)["rollouts"])
    assert found.tolist() == pytest.approx([x / 0.5 for x in expected], abs=1e-12)


def test_classification_is_bounded_and_skips_groups_of_one_class() -> None:
    term = GroupClassification(to="base", tau=0.5)
    for d in ([1e3, -1e3, 0.0], [-1e3, 1e3, 1e3]):
        found = term.values(objective_with(term).views(answers(d, [1.0, -1.0, -1.0]))["rollouts"])
        assert float(found.abs().max()) <= 1 / 0.5 + 1e-12 and bool(torch.isfinite(found).all())
    for rewards in ([1.0, 0.5], [0.0, -1.0]):
        assert not bool(term.values(objective_with(term).views(answers([1.0, 2.0], rewards))["rollouts"]).any())


@pytest.mark.parametrize("term", [advantage.GroupCenter(), GroupClassification()])
def test_answers_without_a_group_are_an_error(term: Any) -> None:
    rows = [
        Row(
            ids=[1, 2], sources=["prompt", "policy"], logps={"current": [0.0, -1.0], "base": [0.0, -1.0], "old": [0.0, -1.0]}, sample_id="x"
        )
    ]
    with pytest.raises(ValueError, match="sample 'x' is in none"):
        objective_with(term).weights(TokenBatch.from_sequences(rows, dtype=F64))


@pytest.mark.parametrize(
    ("make_term", "reason"),
    [
        (lambda: mask.Disagreement("k4"), "statistic='k4' does not exist"),
        (lambda: mask.Disagreement(per="word"), "per='word' does not exist"),
        (lambda: mask.SecondMoment(-1.0), "tau=-1.0 must be at least 0"),
        (lambda: mask.SecondMoment(rule="mean"), "rule='mean' is capped or remaining"),
        (lambda: mask.StaleNegative(-0.1), "delta=-0.1 must be at least 0"),
        (lambda: mask.StaleNegative(to="self"), "always 1"),
        (lambda: mask.GammaTaper(pos=(0.0, 1.0)), "two numbers above 0"),
        (lambda: mask.NegativeTaper(max=-1.0), "max=-1.0 must be at least 0"),
        (lambda: mask.Truncate(max=0.5, min=0.9), "min=0.9 is above max=0.5"),
        (lambda: advantage.GroupCenter(divide="all"), "divide='all' does not exist"),
        (lambda: GroupClassification(tau=0.0), "tau=0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(make_term: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_term()
