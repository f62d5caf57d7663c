"""The identities of the method cards: limits where one loss becomes another, signs, zero-gradient cases, exact numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference, regularizer
from posttrain.records import Row, TokenBatch
from posttrain.testing.check import objective_with
from tests.loss.cases import NORM, composed, make

F64 = torch.float64


def policy_batch(current: list[list[float]], advantages: list[float], fresh: bool = False, **logps: list[list[float]]) -> TokenBatch:
    """One prompt token, then one policy token per number."""
    rows = []
    for i, logp in enumerate(current):
        n = len(logp)
        rows.append(
            Row(
                ids=[1] * (n + 1),
                sources=["prompt"] + ["policy"] * n,
                logps={"current": [0.0, *logp], **{k: [0.0, *v[i]] for k, v in logps.items()}},
                advantage=advantages[i],
                group="g",
            )
        )
    return TokenBatch.from_sequences(rows, dtype=F64, fresh=fresh)


def clip_weight(r: float, a: float, *masks: object) -> float:
    batch = policy_batch([[-1.0]], [a], old=[[-1.0 - math.log(r)]])
    stream = Stream(("policy",), likelihood.Token(), reference.Named(), advantage.Column(), aggregate.TokenMean(), dict(enumerate(masks)))
    return float(Objective({"rollouts": stream}).weights(batch))


@pytest.mark.parametrize(("r", "a", "weight"), [(2, 1, 0), (0.5, 1, 0.5), (0.5, -1, 0), (2, -1, -2), (1.25, 1, 0), (1.1, 1, 1.1)])
def test_clip_table(r: float, a: float, weight: float) -> None:
    assert clip_weight(r, a, mask.RatioClip(0.2, 0.2)) == pytest.approx(weight, abs=1e-12)


def test_clip_higher_keeps_what_the_symmetric_clip_drops() -> None:
    assert clip_weight(1.25, 1.0, mask.RatioClip(0.2, 0.28)) == pytest.approx(1.25)
    assert clip_weight(1.25, 1.0, mask.RatioClip(0.2, 0.2)) == 0.0


def test_a_ratio_on_the_bound_is_kept() -> None:
    for r, a in ((1.25, 1.0), (0.75, -1.0)):
        log_r = math.log(r)
        batch = policy_batch([[log_r]], [a], old=[[0.0]])
        view = objective_with(mask.RatioClip(0.25, 0.25)).views(batch)["rollouts"]
        assert float(mask.RatioClip(0.25, 0.25).factor(view, batch.advantage)) == 1.0
        assert float(mask.RatioClip(0.249, 0.249).factor(view, batch.advantage)) == 0.0


@pytest.mark.parametrize(("r", "weight"), [(5, 0), (2, -2), (50, 0)])
def test_dual_clip_drops_huge_ratios_of_negative_advantages(r: float, weight: float) -> None:
    assert clip_weight(r, -1.0, mask.RatioClip(), mask.DualClip(3.0)) == pytest.approx(weight)
    assert clip_weight(r, -1.0, mask.RatioClip()) == pytest.approx(-r)


def test_cap() -> None:
    assert clip_weight(8, 1.0, mask.Cap(5.0)) == pytest.approx(5.0)
    assert clip_weight(8, -1.0, mask.Cap(5.0)) == pytest.approx(-5.0)
    assert clip_weight(3, 1.0, mask.Cap(5.0)) == pytest.approx(3.0)
    assert clip_weight(8, 1.0, mask.Cap(math.inf)) == pytest.approx(8.0)
    assert clip_weight(8, 1.0, mask.Cap(1.0)) == pytest.approx(1.0)
    assert clip_weight(math.exp(100), 1.0, mask.Cap(5.0)) == pytest.approx(5.0)


def test_truncation_and_rejection_limits() -> None:
    logps = {"old": [[-1.0, -1.0]], "behaviour": [[-1.0 - math.log(4.0), -1.0 - math.log(1.5)]]}
    batch = policy_batch([[-1.0, -1.0]], [1.0], **logps)

    def weights(to: str, term: object | None) -> list[float]:
        masks = {} if term is None else {"m": term}
        stream = Stream(("policy",), likelihood.Token(), reference.Named(to), advantage.Column(), aggregate.SequenceMeanTokenSum(), masks)
        return Objective({"rollouts": stream}).weights(batch).tolist()

    assert weights("behaviour", None) == pytest.approx([4.0, 1.5])
    assert weights("behaviour", mask.Truncate(2.0)) == pytest.approx([2.0, 1.5])
    assert weights("old", mask.Truncate(2.0, apply="weight")) == pytest.approx([2.0, 1.5])
    assert weights("behaviour", mask.Truncate(math.inf)) == pytest.approx([4.0, 1.5])
    assert weights("behaviour", mask.Truncate(1.0)) == pytest.approx([1.0, 1.0])
    assert weights("behaviour", mask.Reject(0.5, 2.0)) == pytest.approx([0.0, 1.5])
    assert weights("behaviour", mask.Reject(0.0, math.inf)) == pytest.approx([4.0, 1.5])
    assert weights("behaviour", mask.Reject(0.5, 3.0, level="sequence")) == [0.0, 0.0]  # product 6
    assert weights("behaviour", mask.Reject(0.5, 3.0, level="sequence_geometric")) == pytest.approx([4.0, 1.5])  # geometric mean 2.45


# -- aggregation -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (aggregate.TokenMean(), [1 / 4] * 4),
        (aggregate.SequenceMeanTokenMean(), [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        (aggregate.SequenceMeanTokenSum(), [1 / 2] * 4),
        (aggregate.Constant(10.0), [1 / 20] * 4),
        (aggregate.GroupMeanTokenMean(), [1 / 4] * 4),
    ],
)
def test_aggregation_constants_of_lengths_one_and_three(term: object, expected: list[float]) -> None:
    batch = policy_batch([[-1.0], [-1.0] * 3], [1.0, 1.0])
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), term)
    assert Objective({"rollouts": stream}).weights(batch).tolist() == pytest.approx(expected)


def test_constant_with_the_mean_length_is_the_token_mean() -> None:
    batch = policy_batch([[-1.0], [-1.0] * 3], [1.0, -2.0])

    def weights(term: object) -> Tensor:
        return Objective({"s": Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), term)}).weights(batch)

    torch.testing.assert_close(weights(aggregate.Constant(2.0)), weights(aggregate.TokenMean()))


def test_maximum_likelihood_counts_tokens_and_ignores_prompts() -> None:
    rows = [Row(ids=[1] * 4), Row(ids=[1] * 10), Row(ids=[1, 2, 3], sources=["prompt"] * 3)]
    batch = TokenBatch.from_sequences([*rows], dtype=F64).with_logps(current=torch.full((14,), -1.0, dtype=F64))
    weights = composed("sft").weights(batch)
    assert weights[:12].tolist() == pytest.approx([1 / 12] * 12) and weights[12:].tolist() == [0.0, 0.0]
    assert composed("sft").totals(batch)["demos"].sequences == 2


def test_an_untrainable_sequence_still_counts_as_a_sequence() -> None:
    batch = policy_batch([[-1.0], [-1.0] * 3], [1.0, 1.0])
    batch = batch.replace(trainable=batch.seq == 0)
    assert composed("reinforce").weights(batch).tolist() == pytest.approx([1 / 2, 0, 0, 0])


def test_denominators_count_what_they_say() -> None:
    batch = policy_batch([[-1.0], [-1.0] * 3], [1.0, 1.0], old=[[-1.0], [-1.0, -3.0, -1.0]])
    batch = batch.replace(weight=torch.tensor([0.5, 1.0, 1.0, 2.0], dtype=F64))

    def first(denominator: str) -> float:
        stream = Stream(
            ("policy",),
            likelihood.Token(),
            reference.Named(),
            advantage.Column(),
            aggregate.TokenMean(denominator),
            {"clip": mask.RatioClip()},
        )
        demos = Stream(("prompt",), likelihood.Token(), reference.Current(), advantage.One(), aggregate.TokenMean())
        return float(Objective({"rollouts": stream, "demos": demos}).weights(batch)[0]) / 0.5

    assert first("own") == pytest.approx(1 / 4)
    assert first("weight_sum") == pytest.approx(1 / 4.5)
    assert first("kept") == pytest.approx(1 / 3)
    assert first("joint") == pytest.approx(1 / 4)


# -- limits between losses ---------------------------------------------------------------------------------------------------------
def test_probability_weighting_is_the_gradient_of_the_probability() -> None:
    batch = TokenBatch.from_sequences([Row(ids=[1, 2, 3, 4])], dtype=F64)
    logp = torch.log(torch.tensor([0.2, 0.5, 1.0], dtype=F64)).requires_grad_()
    (expected,) = torch.autograd.grad(logp.exp().sum() / 3, logp)
    weights = composed("dft").weights(batch, logp)
    torch.testing.assert_close(weights, expected)
    assert float(weights[0]) * 3 == pytest.approx(0.2)


@pytest.mark.parametrize(("a", "same"), [(0.0, reference.Current()), (1.0, reference.Unit())])
def test_power_covers_both_ends(a: float, same: object) -> None:
    batch = policy_batch([[-0.3, -2.0]], [1.0], old=[[0.0, 0.0]])
    torch.testing.assert_close(objective_with(reference.Power(a)).weights(batch), objective_with(same).weights(batch), rtol=0, atol=0)


def test_on_policy_the_clipped_losses_are_reinforce_with_the_same_advantage() -> None:
    batch = make(1, NORM).batch()
    fresh = batch.replace(logps={"current": batch.logps["current"]}, fresh=True)
    assert fresh.logps.keys() == {"current"}
    same = ["streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenMean}"]
    expected = composed("reinforce", tuple(same)).weights(fresh)
    for name in ("grpo", "gspo"):
        torch.testing.assert_close(composed(name).weights(fresh), expected, rtol=1e-12, atol=0)
    for name in ("ppo", "dapo", "cispo"):
        torch.testing.assert_close(composed(name, tuple(same)).weights(fresh), expected, rtol=1e-12, atol=0)


def test_a_stale_batch_without_old_is_an_error() -> None:
    batch = make(1, NORM).batch()
    with pytest.raises(ValueError, match="needs the log-prob column 'old'"):
        composed("grpo").weights(batch.replace(logps={"current": batch.logps["current"]}))


def test_geometric_ratio_of_single_tokens_is_the_token_ratio() -> None:
    batch = policy_batch([[-1.0], [-0.5]], [1.0, -1.0], old=[[-1.05], [-0.3]])
    wide = ("streams.rollouts.masks.clip.low=0.09", "streams.rollouts.masks.clip.high=0.09")
    torch.testing.assert_close(composed("gspo", wide).weights(batch), composed("grpo", wide).weights(batch))
    assert composed("gspo", wide).weights(batch).tolist() == pytest.approx([math.exp(0.05) / 2, 0.0])


def test_geometric_ratio_gives_one_weight_per_sequence_and_clips_it_whole() -> None:
    batch = policy_batch([[-1.0, -2.0, -0.5], [-1.0, -2.0]], [1.0, 1.0], old=[[-1.001, -2.0, -0.5], [-1.1, -2.1]])
    weights = composed("gspo").weights(batch)
    assert weights[:3].tolist() == pytest.approx([math.exp(0.001 / 3) / 6] * 3)
    assert weights[3:].tolist() == [0.0, 0.0]


def test_losses_of_equal_lengths_aggregate_alike() -> None:
    batch = policy_batch([[-1.0, -1.5], [-0.2, -2.0]], [1.0, -1.0], old=[[-1.1, -1.5], [-0.2, -2.1]])
    torch.testing.assert_close(composed("dapo").weights(batch), composed("grpo").weights(batch))


def test_constant_length_scales_exactly() -> None:
    batch = make(2, NORM).batch()
    one, two = (composed("dr_grpo", (f"streams.rollouts.aggregation.length={n}",)).weights(batch) for n in (100, 200))
    torch.testing.assert_close(one, 2 * two, rtol=1e-14, atol=0)


def test_equal_rewards_give_no_gradient() -> None:
    batch = policy_batch([[-1.0], [-2.0]], [0.0, 0.0], old=[[-1.1], [-2.0]])
    assert composed("grpo").weights(batch).tolist() == [0.0, 0.0]


def test_zero_one_rewards_without_baseline_imitate_the_correct_samples() -> None:
    batch = policy_batch([[-1.0, -1.0], [-2.0]], [1.0, 0.0])
    assert composed("reinforce").weights(batch).tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_a_schedule_moves_the_share_of_a_stream() -> None:
    rows = [Row(ids=[1, 2], logps={"current": [0.0, -1.0]}), Row(ids=[1, 2], sources=["prompt", "policy"], logps={"current": [0.0, -1.0]})]
    demos = [float(composed("sft_plus_rl").weights(TokenBatch.from_sequences(rows, progress=p, dtype=F64))[0]) for p in (0.0, 0.5, 1.0)]
    assert demos == pytest.approx([0.1, 0.05, 0.0])


# -- preference pairs ----------------------------------------------------------------------------------------------------------------
def pair_batch(
    chosen: list[float], rejected: list[float], base: tuple[list[float], list[float]] | None = None, swap: bool = False
) -> TokenBatch:
    rows = []
    for side, logp, ref in (("chosen", chosen, base[0] if base else chosen), ("rejected", rejected, base[1] if base else rejected)):
        n = len(logp)
        other = {"chosen": "rejected", "rejected": "chosen"}[side] if swap else side
        rows.append(
            Row(
                ids=[1] * (n + 1),
                sources=["prompt"] + ["demo"] * n,
                logps={"current": [0.0, *logp], "base": [0.0, *ref]},
                pair="p",
                side=other,
            )
        )
    return TokenBatch.from_sequences(rows, dtype=F64)


def metric(objective: Objective, batch: TokenBatch, name: str) -> float:
    total, count = objective(batch).metrics[f"pairs/{name}"]
    return total / count


def test_at_the_base_policy_the_loss_is_ln_2_and_the_weight_half_beta() -> None:
    batch = pair_batch([-1.0, -2.0], [-0.5])
    assert metric(composed("dpo"), batch, "preference_loss") == pytest.approx(math.log(2))
    assert composed("dpo").weights(batch).tolist() == pytest.approx([0.05, 0.05, -0.05])
    assert composed("ipo").weights(batch).tolist() == pytest.approx([5.0, 5.0, -10.0])  # 1/beta over the tokens of each side
    assert metric(composed("ipo"), batch, "preference_loss") == pytest.approx(25.0)


def test_swapping_a_pair_flips_every_sign_at_the_base_policy() -> None:
    a, b = ([-1.0, -2.0], [-0.5])
    torch.testing.assert_close(composed("dpo").weights(pair_batch(a, b)), -composed("dpo").weights(pair_batch(a, b, swap=True)))


@pytest.mark.parametrize(("margin", "weight"), [(1e4, 0.0), (-1e4, 0.1), (1000.0, 0.0), (-1000.0, 0.1)])
def test_huge_margins_stay_finite(margin: float, weight: float) -> None:
    batch = pair_batch([-1.0], [-1.0], base=([-1.0 - margin], [-1.0]))
    assert float(composed("dpo").weights(batch)[0]) == pytest.approx(weight, abs=1e-12)
    assert math.isfinite(metric(composed("dpo"), batch, "preference_loss"))
    assert metric(composed("dpo"), batch, "margin") == pytest.approx(0.1 * margin)
    assert metric(composed("dpo"), batch, "accuracy") == float(margin > 0)


def test_the_shared_prefix_of_a_pair_cancels() -> None:
    batch = pair_batch([-1.0, -2.0], [-1.0, -0.5])
    weights = composed("dpo").weights(batch)
    assert float(weights[0] + weights[2]) == 0.0


def test_smoothed_labels_bound_the_margin() -> None:
    h = math.log(0.9 / 0.1) / 0.1
    batch = pair_batch([-1.0], [-1.0], base=([-1.0 - h], [-1.0]))
    assert float(composed("cdpo").weights(batch)[0]) == pytest.approx(0.0, abs=1e-15)
    beyond = pair_batch([-1.0], [-1.0], base=([-2.0 - h], [-1.0]))
    assert float(composed("cdpo").weights(beyond)[0]) < 0


def test_debiased_smoothing_is_unbiased_over_flips() -> None:
    h, e = 3.0, 0.2
    term = advantage.Pairwise(label_smoothing=e, debias=True)
    clean = advantage.Pairwise()
    values = torch.tensor([h, -h], dtype=F64)
    loss = term._loss(values, 0.1, 0.0, 1.0)
    assert float((1 - e) * loss[0] + e * loss[1]) == pytest.approx(float(clean._loss(values, 0.1, 0.0, 1.0)[0]), rel=1e-12)


def test_squared_loss_stops_at_its_target() -> None:
    batch = pair_batch([-1.0], [-1.0], base=([-6.0], [-1.0]))
    assert composed("ipo").weights(batch).tolist() == pytest.approx([0.0, 0.0], abs=1e-14)


def test_an_empty_answer_still_is_a_side() -> None:
    rows = [
        Row(ids=[1, 2], sources=["prompt", "demo"], logps={"current": [0.0, -1.0], "base": [0.0, -2.0]}, pair=0, side="chosen"),
        Row(ids=[1, 1], sources=["prompt", "prompt"], logps={"current": [0.0, -1.0], "base": [0.0, -2.0]}, pair=0, side="rejected"),
    ]
    weights = composed("dpo").weights(TokenBatch.from_sequences(rows, dtype=F64))
    assert weights.tolist() == pytest.approx([0.1 / (1 + math.exp(0.1)), 0.0])


# -- KL, on the tree of all sequences of three tokens over three words ------------------------------------------------------------------
def tree(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of policy and base for each of the 13 prefixes of length below three, ``[13, 3]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(13, 3, generator=generator, dtype=F64).requires_grad_(), torch.randn(13, 3, generator=generator, dtype=F64)


LEAVES = list(itertools.product(range(3), repeat=3))


def prefix(leaf: tuple[int, ...], t: int) -> int:
    return 0 if t == 0 else 1 + leaf[0] if t == 1 else 4 + 3 * leaf[0] + leaf[1]


def all_leaves(logits: Tensor) -> Tensor:
    """Token log-probs of all 27 sequences, ``[27, 3]``."""
    rows = torch.log_softmax(logits, -1)
    return torch.stack([torch.stack([rows[prefix(leaf, t), leaf[t]] for t in range(3)]) for leaf in LEAVES])


def expected_gradient(term: regularizer.KL | advantage.ColumnMinusKL) -> Tensor:
    """Exact expectation over the tree of the gradient of a penalty (of minus the objective, for an advantage)."""
    logits, base_logits = tree()
    leaves, base = all_leaves(logits), all_leaves(base_logits)
    batch = policy_batch(leaves.tolist(), [0.0] * 27, base=base.tolist(), fresh=True)
    batch = batch.replace(weight=leaves.detach().sum(1).exp().repeat_interleave(3))
    if isinstance(term, regularizer.KL):
        view = objective_with(term).views(batch)["rollouts"]
        weight = term.gradient(view) * batch.weight
    else:
        stream = Stream(("policy",), likelihood.Token(), reference.Current(), term, aggregate.Constant(1 / 27))
        weight = -Objective({"rollouts": stream}).weights(batch)
    return torch.autograd.grad((weight * leaves.flatten()).sum(), logits)[0]


def sequence_kl(forward: bool = False) -> Tensor:
    logits, base_logits = tree()
    leaves, base = all_leaves(logits).sum(1), all_leaves(base_logits).sum(1)
    value = (base.exp() * (base - leaves)).sum() if forward else (leaves.exp() * (leaves - base)).sum()
    return torch.autograd.grad(value, logits)[0]


def local_kl(forward: bool = False) -> Tensor:
    """The KL position by position, with the distribution of the prefixes held fixed."""
    logits, base_logits = tree()
    rows, base = torch.log_softmax(logits, -1), torch.log_softmax(base_logits, -1)
    each = (base.exp() * (base - rows)).sum(1) if forward else (rows.exp() * (rows - base)).sum(1)
    reach, leaves = torch.zeros(13, dtype=F64), all_leaves(logits).detach()
    for leaf, logp in zip(LEAVES, leaves, strict=True):
        for t in range(3):
            reach[prefix(leaf, t)] += logp.sum().exp()
    return torch.autograd.grad((reach * each).sum(), logits)[0]


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (regularizer.KL("k1", force=True), lambda: torch.zeros(13, 3, dtype=F64)),
        (regularizer.KL("k2"), local_kl),
        (regularizer.KL("k3"), lambda: local_kl(forward=True)),
        (regularizer.KL("k3", ratio="token"), local_kl),
        (regularizer.KL("k1", ratio="token"), local_kl),
        (regularizer.KL("k2", level="sequence"), sequence_kl),
        (regularizer.KL("k3", level="sequence"), lambda: sequence_kl(forward=True)),
        (advantage.ColumnMinusKL(1.0, over="self"), sequence_kl),
        (advantage.ColumnMinusKL(1.0, over="self", credit="sequence"), sequence_kl),
        (advantage.ColumnMinusKL(1.0, over="self", credit="own"), local_kl),
        (advantage.ColumnMinusKL(1.0, over="old"), sequence_kl),
    ],
    ids=lambda x: getattr(x, "formula", "")[:60],
)
def test_what_each_kl_estimator_is_the_gradient_of(term: object, expected: object) -> None:
    torch.testing.assert_close(expected_gradient(term), expected(), rtol=1e-9, atol=1e-12)  # type: ignore[arg-type, operator]


def test_local_and_sequence_kl_differ() -> None:
    assert float((local_kl() - sequence_kl()).norm() / sequence_kl().norm()) > 0.05


@pytest.mark.parametrize(
    ("d", "k2", "k3"), [(math.log(2), 0.6931471805599453, 0.5), (-math.log(2), -0.6931471805599453, -1.0), (0.0, 0.0, 0.0)]
)
def test_kl_gradients_at_two_points(d: float, k2: float, k3: float) -> None:
    batch = policy_batch([[-1.0]], [0.0], base=[[-1.0 - d]], old=[[-1.0]])
    for term, expected in ((regularizer.KL("k2", coef=1.0), k2), (regularizer.KL("k3", coef=1.0), k3)):
        assert float(objective_with(term).weights(batch)) == pytest.approx(-expected, abs=1e-12)


def test_k1_as_a_loss_is_refused_unless_forced() -> None:
    with pytest.raises(ValueError, match=r"expectation 0.*ColumnMinusKL"):
        regularizer.KL("k1")
    assert regularizer.KL("k1", force=True).estimator == "k1"


def test_beyond_max_log_ratio_the_kl_has_no_gradient_and_says_so() -> None:
    batch = policy_batch([[-1.0, -1.0]], [0.0], base=[[-1.5, 99.0]], old=[[-1.0, -1.0]])
    objective = objective_with(regularizer.KL("k3", coef=1.0, max_log_ratio=20.0))
    weights, metrics = objective.weigh(batch)
    assert float(weights[1]) == 0.0 and float(weights[0]) < 0.0
    assert metrics["rollouts/term/clamped"] == (1.0, 2.0)


def test_entropy_and_full_kl_signs() -> None:
    logits = torch.tensor([[0.5, -0.2, 0.1]], dtype=F64, requires_grad=True)
    rows, base = torch.log_softmax(logits, -1), torch.log_softmax(torch.tensor([[0.0, 1.0, 0.0]], dtype=F64), -1)
    columns = {"entropy": -(rows.exp() * rows).sum(1), "kl_reverse:base": (rows.exp() * (rows - base)).sum(1)}
    batch = policy_batch([[-1.0]], [0.0], old=[[-1.0]])
    for term, sign in ((regularizer.Entropy(0.5), -0.5), (regularizer.FullKL(coef=0.5), 0.5)):
        out = objective_with(term)(batch, rows[:, 0], columns)
        (got,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(sign * columns[term.column].sum(), logits, retain_graph=True)
        torch.testing.assert_close(got, expected)
        assert out.metrics["rollouts/term"][0] == pytest.approx(float(columns[term.column]))
    with pytest.raises(ValueError, match="needs the column 'entropy'"):
        objective_with(regularizer.Entropy())(batch, rows[:, 0])


def test_a_band_keeps_its_ends() -> None:
    """A probability of exactly a half, which 2 to the power of -1 is in any precision."""
    batch = policy_batch([[math.log(0.5), math.log(0.25), math.log(0.125)]], [1.0])
    (view,) = objective_with(mask.ProbabilityBand(0.25, 0.5)).views(batch).values()
    for low, high, kept in ((0.25, 0.5, [1.0, 1.0, 0.0]), (0.125, 0.25, [0.0, 1.0, 1.0])):
        assert mask.ProbabilityBand(low, high).factor(view, view.batch.advantage).tolist() == kept


@pytest.mark.parametrize("make", [regularizer.KL, regularizer.FullKL, regularizer.JensenShannon, regularizer.Entropy, regularizer.PairCentre])
def test_streams_named_in_a_list_are_kept_as_a_tuple(make: Any) -> None:
    """Terms are hashable values: two that name the same streams are the same."""
    assert make(streams=["rollouts"]) == make(streams=("rollouts",)) and hash(make(streams=["rollouts"])) == hash(make(streams=("rollouts",)))
    assert make(streams="rollouts").streams == ("rollouts",)
