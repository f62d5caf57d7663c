"""Hostile numbers: every shipped loss gives a finite result or an error that says what to do, never NaN."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, load, mask, reference, regularizer
from posttrain.records import Row, Source, TokenBatch
from tests.loss.cases import CASES, composed, make, stand_ins

CLEAR = (ValueError, FloatingPointError)


def finite(objective: Objective, batch: TokenBatch) -> torch.Tensor | None:
    """Weights and loss are finite, or the error has a message; returns the weights."""
    try:
        logp = batch.logps["current"].clone().requires_grad_()
        out = objective(batch, logp, stand_ins(objective, batch))
        out.loss.backward()
    except CLEAR as error:
        assert "column" in str(error) or "stream" in str(error) or "loss" in str(error)
        return None
    assert math.isfinite(float(out.loss)) and logp.grad is not None and bool(torch.isfinite(logp.grad).all())
    assert not any(math.isnan(total) for total, _ in out.metrics.values()), out.metrics
    return objective.weights(batch)


def cast(batch: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    return batch.replace(
        logps={k: v.to(dtype) for k, v in batch.logps.items()}, advantage=batch.advantage.to(dtype), weight=batch.weight.to(dtype)
    )


@pytest.mark.parametrize("name", CASES)
def test_log_ratios_of_a_hundred(name: str) -> None:
    case, some, tried = CASES[name], 0, 0
    for dtype in (torch.float32, torch.float64):
        batch = cast(case.make(0).batch(), dtype)
        on = batch.trainable.nonzero()[:, 0]
        for column in ("old", "base", "behaviour"):
            if column not in batch.logps:
                continue
            for shift in (100.0, -100.0):
                for where in (int(on[1]), int(on[-2])):
                    moved = batch.logps[column].clone()
                    moved[where] += shift
                    some, tried = some + (finite(case.load(), batch.with_logps(**{column: moved})) is not None), tried + 1
    assert tried >= 8 or not case.load().needs.references, "what the loss reads was never moved"
    assert some >= tried / 2, "most of these must be finite, not errors"


@pytest.mark.parametrize("name", CASES)
def test_probabilities_zero_and_one(name: str) -> None:
    case = CASES[name]
    batch = case.make(0).batch()
    for value in (0.0, -200.0, -math.inf):
        current = batch.logps["current"].clone()
        current[batch.trainable.nonzero()[::3, 0]] = value
        finite(case.load(), batch.with_logps(current=current))


def test_probability_zero_of_a_demonstration() -> None:
    batch = TokenBatch.from_sequences([Row(ids=[1, 2, 3])], dtype=torch.float64)
    assert composed("dft").weights(batch, torch.tensor([-200.0, 0.0]).double()).tolist() == pytest.approx([0.0, 0.5], abs=1e-12)
    assert float(composed("dft")(batch, torch.tensor([-math.inf, 0.0]).double()).loss) == 0.0
    with pytest.raises(FloatingPointError, match="not finite"):
        composed("sft")(batch, torch.tensor([-math.inf, -1.0]).double())


@pytest.mark.parametrize("name", CASES)
def test_nothing_trainable_still_has_a_gradient_of_zero(name: str) -> None:
    case = CASES[name]
    batch = case.make(0).batch()
    for empty in (batch.replace(trainable=torch.zeros_like(batch.trainable)), batch.take([])):
        empty = empty.replace(totals=case.load().totals(batch))
        logp = empty.logps["current"].clone().requires_grad_()
        out = case.load()(empty, logp, stand_ins(case.load(), empty))
        out.loss.backward()
        assert float(out.loss) == 0.0 and logp.grad is not None and not bool(logp.grad.any())
    own = case.load()(batch.replace(trainable=torch.zeros_like(batch.trainable)), columns=stand_ins(case.load(), batch))
    assert float(own.loss) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_outside_the_stream(name: str) -> None:
    case = CASES[name]
    batch = case.make(0).batch()
    poisoned, outside = batch.logps["current"].clone(), ~batch.trainable
    if "without_thought" in case.load().needs.contexts:  # the words behind a thought are read, and not learnt
        outside = outside & (batch.source != int(Source.tool))
    poisoned[outside] = math.nan
    weights = case.load().weights(batch.with_logps(current=poisoned))
    assert not bool(weights[~batch.trainable].any())
    torch.testing.assert_close(weights, case.load().weights(batch), rtol=0, atol=0)


def test_overflow_under_a_mask_is_zero_not_nan() -> None:
    rows = [Row(ids=[1, 2], sources=["prompt", "policy"], advantage=1.0, logps={"current": [0.0, -0.1], "old": [0.0, -100.1]})]
    batch = TokenBatch.from_sequences(rows, fresh=False)
    assert batch.logps["old"].dtype == torch.float32
    assert composed("grpo").weights(batch).tolist() == [0.0]
    with pytest.raises(FloatingPointError, match=r"stream 'rollouts'.*sample '0'.*DualClip"):
        composed("grpo").weights(batch.replace(advantage=-batch.advantage))
    assert composed("dapo").weights(batch.replace(advantage=-batch.advantage)).tolist() == [0.0]
    assert composed("cispo").weights(batch.replace(advantage=-batch.advantage)).tolist() == pytest.approx([-5.0], rel=1e-5)


def test_k3_overflow_names_the_regulariser() -> None:
    rows = [Row(ids=[1, 2], sources=["prompt", "policy"], advantage=0.0, logps={"current": [0.0, -100.1], "base": [0.0, -0.1]})]
    kl = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, coef: 0.1}"
    with pytest.raises(FloatingPointError, match=r"regulariser 'kl' on stream 'rollouts'.*max_log_ratio"):
        composed("grpo", (kl,)).weights(TokenBatch.from_sequences(rows))
    bounded = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, coef: 0.1, max_log_ratio: 20}"
    assert composed("grpo", (bounded,)).weights(TokenBatch.from_sequences(rows)).tolist() == [0.0]


def test_nan_advantage_is_an_error_with_the_sample() -> None:
    batch = TokenBatch.from_sequences([Row(ids=[1, 2, 3], sources=["prompt", "policy", "policy"], sample_id="s7")])
    batch = batch.replace(advantage=torch.tensor([1.0, math.nan])).with_logps(current=torch.tensor([-1.0, -1.0]))
    with pytest.raises(FloatingPointError, match=r"nan at column 1 \(sample 's7'\)"):
        composed("reinforce").weights(batch)
    with pytest.raises(ValueError, match="advantage is NaN"):
        TokenBatch.from_sequences([Row(ids=[1, 2], sources=["prompt", "policy"], advantage=math.nan)])


def test_identical_answers_of_a_pair_or_group_cancel() -> None:
    same = {"ids": [1, 2, 3], "sources": ["prompt", "demo", "demo"], "logps": {"current": [0, -1, -2], "base": [0, -1.5, -1]}}
    batch = TokenBatch.from_sequences([Row(**same, pair=0, side=s) for s in ("chosen", "rejected")], dtype=torch.float64)
    weights = composed("dpo").weights(batch)
    assert (weights[:2] + weights[2:]).tolist() == [0.0, 0.0]


def test_a_missing_reference_on_a_demonstration_names_stream_and_column() -> None:
    objective = load("sft", ["streams.demos.reference={_target_: posttrain.loss.reference.Named, to: behaviour}"])
    rows = [
        Row(ids=[1, 2], logps={"current": [0.0, -1.0]}, sample_id="demo 3"),
        Row(ids=[1, 2], sources=["prompt", "policy"], logps={"current": [0.0, -1.0], "behaviour": [0.0, -1.0]}),
    ]
    with pytest.raises(ValueError, match=r"stream 'demos': log-prob 'behaviour' is absent.*'demo 3'"):
        objective.weights(TokenBatch.from_sequences(rows, fresh=False))


def test_rejecting_every_token_gives_zero() -> None:
    batch = make(0, spread=0.3).batch()
    for denominator in ("own", "kept"):
        stream = Stream(
            ("policy",),
            likelihood.Token(),
            reference.Named("behaviour"),
            advantage.Column(),
            aggregate.TokenMean(denominator),
            {"reject": mask.ProbabilityBand(0.999, 1.0)},
        )
        assert not bool(Objective({"rollouts": stream}).weights(batch).any())


def test_a_single_demonstration_cannot_be_a_pair() -> None:
    stream = Stream(("demo",), likelihood.Token(), reference.Current(), advantage.Pairwise(), aggregate.PairSum())
    batch = TokenBatch.from_sequences([Row(ids=[1, 2], logps={"current": [0.0, -1.0], "base": [0.0, -1.0]}, sample_id="d")])
    with pytest.raises(ValueError, match="'d' is in none; give the stream paired=true"):
        Objective({"pairs": stream}).weights(batch)


def test_a_group_mean_needs_groups() -> None:
    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), aggregate.GroupMeanTokenMean())
    batch = TokenBatch.from_sequences([Row(ids=[1, 2], sources=["prompt", "policy"], logps={"current": [0.0, -1.0]}, sample_id="x")])
    with pytest.raises(ValueError, match="sample 'x' has none"):
        Objective({"rollouts": stream}).weights(batch)


@pytest.mark.parametrize(
    ("make_term", "reason"),
    [
        (lambda: mask.RatioClip(low=1.5), "low=1.5 must be at most 1"),
        (lambda: mask.RatioClip(high=-0.1), "high=-0.1 must be at least 0"),
        (lambda: mask.RatioClip(to="self"), "always 1"),
        (lambda: mask.RatioClip(level="word"), "level='word' does not exist"),
        (lambda: mask.DualClip(c=1.0), "c=1.0 must be above 1"),
        (lambda: mask.Cap(max=-1.0), "max=-1.0 must be at least 0"),
        (lambda: mask.Truncate(apply="add"), "apply='add' does not exist"),
        (lambda: mask.Reject(min=2.0, max=1.0), "everything would be rejected"),
        (lambda: mask.DropTruncated(reasons=("eos",)), "must come from"),
        (lambda: likelihood.Token(ratio="word"), "ratio='word' does not exist"),
        (lambda: likelihood.Token(temperature=0.0), "must be above 0"),
        (lambda: aggregate.Constant(0.0), "must be above 0"),
        (lambda: aggregate.TokenMean("mine"), "denominator='mine' does not exist"),
        (lambda: advantage.Pairwise(f="cubic"), "f='cubic' does not exist"),
        (lambda: advantage.Pairwise(score="mean"), "score='mean' does not exist"),
        (lambda: advantage.Pairwise(beta=0.0), "beta=0.0 must be above 0"),
        (lambda: advantage.Pairwise(label_smoothing=1.5), "between 0 and 1"),
        (lambda: advantage.Pairwise(f="squared", label_smoothing=0.1), "f=logistic only"),
        (lambda: advantage.Pairwise(label_smoothing=0.5, debias=True), "below 0.5"),
        (lambda: advantage.ColumnMinusKL(credit="all"), "credit='all' does not exist"),
        (lambda: advantage.ColumnMinusKL(to="old"), "name two different policies"),
        (lambda: regularizer.KL("k4"), "estimator='k4' does not exist"),
        (lambda: regularizer.KL(ratio="token", level="sequence"), "belongs to level=token"),
        (lambda: regularizer.KL(max_log_ratio=0.0), "must be above 0"),
        (lambda: regularizer.FullKL("sideways"), "direction='sideways' does not exist"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(make_term, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_term()
