"""Bugs of released preference code, reproduced: the wrong version is shown to differ, ours to be what the objective says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.data.contexts import with_contexts
from posttrain.loss import Objective, load
from posttrain.records import Row, TokenBatch
from tests.loss.cases import CASES, composed

F64 = torch.float64


def row(logp: list[float], ratio: list[float], prompt: int = 1, **more: object) -> Row:
    n = len(logp)
    logps = {"current": [0.0] * prompt + logp, "base": [0.0] * prompt + [x - d for x, d in zip(logp, ratio, strict=True)]}
    return Row(ids=[1] * (prompt + n), sources=["prompt"] * prompt + ["demo"] * n, logps=logps, **more)  # type: ignore[arg-type]


def pair(name: str, chosen: list[float], rejected: list[float], logp: float = -1.0) -> list[Row]:
    sides = (("chosen", chosen), ("rejected", rejected))
    return [row([logp] * len(d), d, pair=name, side=side) for side, d in sides]


def batch(rows: list[Row]) -> TokenBatch:
    return TokenBatch.from_sequences(rows, dtype=F64)


def gradient_of(objective: Objective, whole: TokenBatch, parts: list[list[int]]) -> Tensor:
    """Token weights when every part is a micro-batch of the step."""
    whole = whole.replace(totals=objective.totals(whole))
    weights = objective.weights(whole)
    out = torch.zeros_like(weights)
    for part in parts:
        here, logp = whole.columns_of(part), whole.logps["current"][whole.columns_of(part)].clone().requires_grad_()
        objective(whole.take(part), logp, weights=weights[here]).loss.backward()
        out[here] = -logp.grad  # type: ignore[operator]
    return out


def local(objective: Objective, whole: TokenBatch, parts: list[list[int]]) -> Tensor:
    """The bug: every micro-batch is its own step, and the steps are averaged."""
    out = torch.zeros(whole.num_tokens, dtype=F64)
    for part in parts:
        out[whole.columns_of(part)] = objective.weights(whole.take(part)) / len(parts)
    return out


def differ(a: Tensor, b: Tensor, least: float) -> bool:
    return float((a - b).norm()) > least * float(b.norm())


PAIRS = [*pair("a", [0.4, 0.1], [0.2]), *pair("b", [0.3], [0.1, 0.3, 0.2]), *pair("c", [-0.2], [0.5])]


def test_the_mean_over_pairs_is_that_of_the_step_not_of_micro_batches() -> None:
    data, parts = batch(PAIRS), [[0, 1, 2, 3], [4, 5]]
    for name in ("dpo", "simpo", "orpo", "iterative_rpo"):
        right = composed(name).weights(data)
        torch.testing.assert_close(gradient_of(composed(name), data, parts), right, rtol=1e-12, atol=0)
        assert differ(local(composed(name), data, parts), right, 0.05), name


def test_pairs_are_counted_not_sequences_halved() -> None:
    """A demonstration in the batch, or an answer nobody learns from, is no half pair."""
    rows = [*PAIRS, row([-1.0], [0.0]), row([-1.0, -2.0], [0.0, 0.0])]
    totals = composed("dpo").totals(batch(rows))["pairs"]
    assert totals.pairs == 3 and len(rows) / 2 == 4
    plain = composed("dpo").weights(batch(PAIRS))
    torch.testing.assert_close(composed("dpo").weights(batch(rows))[: len(plain)], plain, rtol=0, atol=0)


def test_the_likelihood_beside_a_pair_is_normalised_by_the_chosen_answers() -> None:
    """Counting the rejected answers' tokens too would make the anchor weaker where rejected answers are long."""
    weights = composed("cpo", ("streams.pairs.coef=0",)).weights(batch(PAIRS))
    chosen = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 1, 0], dtype=F64)
    torch.testing.assert_close(weights, chosen / 4, rtol=1e-12, atol=0)
    assert differ(weights, chosen / 9, 0.5)


def test_squared_targets_of_sums_and_means_are_a_factor_of_the_length_apart() -> None:
    """Offline trainers take the mean over tokens, online ones the sum: the same beta asks for margins that differ by the length."""
    rows = pair("a", [1.0] * 5, [0.0] * 5)
    mean = composed("ipo").weights(batch(rows))
    total = composed("ipo", ("streams.pairs.advantage.score=log_ratio_sum", "streams.pairs.aggregation._target_=posttrain.loss.aggregate.PairSum"))
    assert float(mean[0]) == pytest.approx(2 * (5 - 1) / 5) and float(total.weights(batch(rows))[0]) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="mean over tokens, but PairSum"):
        load("ipo", ["streams.pairs.aggregation._target_=posttrain.loss.aggregate.PairSum"])


@pytest.mark.parametrize("name", ["dpo", "orpo", "exo", "bco_pair"])
def test_the_logarithm_of_a_sigmoid_never_overflows(name: str) -> None:
    """``log(sigmoid(x))`` is minus infinity from x = -104 on in float32, and its gradient 0 * inf."""
    x = torch.tensor([-200.0], requires_grad=True)
    torch.log(torch.sigmoid(x)).sum().backward()
    assert not math.isfinite(float(torch.log(torch.sigmoid(x)))) and not math.isfinite(float(x.grad))  # type: ignore[arg-type]
    data = TokenBatch.from_sequences(pair("a", [-4000.0], [0.0], logp=-150.0))
    assert bool(torch.isfinite(composed(name).weights(data)).all())
    assert all(math.isfinite(total) for total, _ in composed(name)(data).metrics.values())


def labelled_rows() -> list[Row]:
    given = ((1.0, 0.9), (0.0, -0.4), (1.0, 0.1), (0.0, 1.2))
    return [row([-1.0, -0.5], [d, d / 2], prompt=1 + i, rewards={"label": y}) for i, (y, d) in enumerate(given)]


def scored(rows: list[Row], ratio: Callable[[int], float]) -> TokenBatch:
    """Log-probs for rows made from others: -1, with a log-ratio that depends on the row."""
    data = batch(rows)
    current = torch.where(torch.isnan(data.logps["current"]), -1.0, data.logps["current"])
    shift = torch.tensor([ratio(int(i)) for i in data.seq], dtype=F64)
    return data.with_logps(current=current, base=torch.where(torch.isnan(data.logps["base"]), current - shift, data.logps["base"]))


def test_the_kl_baseline_is_that_of_the_step_not_of_micro_batches() -> None:
    data = scored(with_contexts(labelled_rows(), {"mismatched"}), lambda i: 0.1 * i)
    objective, parts = composed("kto"), [[0, 1, 4, 5], [2, 3, 6, 7]]
    right = objective.weights(data)
    torch.testing.assert_close(gradient_of(objective, data, parts), right, rtol=1e-12, atol=0)
    assert differ(local(objective, data, parts), right, 1e-4)
    whole = data.replace(totals=objective.totals(data))
    with pytest.raises(ValueError, match="whole optimizer step"):
        objective.weights(whole.take(parts[0]))


def test_an_answer_is_never_its_own_mismatch() -> None:
    """Shifting a micro-batch of one by one gives the answer under its own prompt, and the baseline eats the signal."""
    rows = [Row(ids=[i, 10 + i], sources=["prompt", "demo"]) for i in (1, 1, 2, 3)]
    under = [r for r in with_contexts(rows, {"mismatched"}) if r.context == "mismatched"]
    assert len(under) == 4 and all(r.ids[1] != 10 + r.ids[0] for r in under)
    with pytest.raises(ValueError, match="another prompt"):
        with_contexts(rows[:2], {"mismatched"})


def test_the_kl_baseline_carries_no_gradient() -> None:
    data = scored(with_contexts(labelled_rows(), {"mismatched"}), lambda i: 0.1 * i)
    weights = composed("kto").weights(data)
    of_companions = torch.tensor([c == "mismatched" for c in data.contexts])[data.seq]
    assert bool(of_companions.any()) and not bool(weights[of_companions].any()) and bool(weights[~of_companions & data.trainable].all())


def test_sorting_within_a_micro_batch_of_one_pair_is_no_sorting() -> None:
    data, parts = batch([*pair("a", [3.0], [0.0], logp=-1.0), *pair("b", [-2.5, 0.0], [0.0], logp=-2.0)]), [[0, 1], [2, 3]]
    objective = composed("aot")
    right = objective.weights(data)
    torch.testing.assert_close(gradient_of(objective, data, parts), right, rtol=1e-12, atol=0)
    wrong = local(objective, data, parts)
    torch.testing.assert_close(wrong, composed("dpo").weights(data), rtol=1e-12, atol=1e-15)
    assert differ(wrong, right, 0.05)


def test_a_smoothing_of_zero_is_an_error_where_log_zero_would_stand() -> None:
    """A released trainer silently takes 1e-3 instead."""
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        load("exo", ["streams.pairs.advantage.label_smoothing=0"])
    with pytest.raises(ValueError, match=r"below 0\.5"):
        load("robust_dpo", ["streams.pairs.advantage.label_smoothing=0.5"])


def test_gamma_is_not_the_ratio_of_gamma_and_beta() -> None:
    """0.5 means two things: a quarter of beta as the authors write it, gamma itself elsewhere; with beta 2 they are 1.0 and 0.5."""
    rows = batch(pair("a", [0.0], [0.0]))
    ours, as_ratio = composed("simpo"), composed("simpo", ("streams.pairs.advantage.margin=1.0",))
    assert float(ours.weights(rows)[0]) == pytest.approx(2 / (1 + math.exp(-0.25 * 2.0)))
    assert float(as_ratio.weights(rows)[0]) == pytest.approx(2 / (1 + math.exp(-0.5 * 2.0)))


def test_classification_of_pairs_is_not_the_pairwise_loss_of_its_documentation() -> None:
    rows = batch(pair("a", [2.0], [1.0]))
    code, documented = composed("bco_pair").weights(rows), composed("dpo").weights(rows)
    assert [float(w) for w in code] == pytest.approx([0.1 / (1 + math.exp(0.2)), -0.1 / (1 + math.exp(-0.1))])
    assert differ(code, documented, 0.05)


@pytest.mark.parametrize("name", [name for name in CASES if name in ("dpo", "kto", "simpo", "orpo", "sppo", "nca")])
def test_prompt_tokens_never_count_and_the_last_token_does(name: str) -> None:
    case = CASES[name]
    data = case.make(0).batch()
    weights = case.load().weights(data)
    learnt = case.load().views(data)
    on = torch.stack([view.on for view in learnt.values()]).any(0)
    assert not bool(weights[data.source == 0].any())
    last = torch.zeros(data.num_tokens, dtype=torch.bool)
    last[data.cu_seqlens[1:] - 1] = True
    assert bool((weights[last & on] != 0).all()) and bool((last & on).any())


def test_a_hinge_with_a_reference_is_not_the_one_without() -> None:
    """Several trainers call RSO's normalised hinge by SLiC's name: where the reference prefers the chosen answer, one is satisfied and the other not."""
    rows = [row([-1.0], [-2.0], pair="a", side="chosen"), row([-9.0], [1.0], pair="a", side="rejected")]
    with_reference = composed("rso").weights(batch(rows))
    without = composed("slic", ("streams.chosen.coef=0",)).weights(batch(rows))
    torch.testing.assert_close(with_reference, torch.tensor([0.1, -0.1], dtype=F64), rtol=1e-12, atol=0)
    assert not bool(without.any()), "a log-prob 8 above the other's is more than delta = 1"


def test_a_halved_sum_is_half_the_step() -> None:
    """The authors' self-play code halves the sum of both sides, a trainer does not: the same learning rate is another step."""
    rows = pair("a", [0.4, 0.1], [0.2])
    whole, half = composed("sppo").weights(batch(rows)), composed("sppo", ("streams.labelled.coef=0.5",)).weights(batch(rows))
    torch.testing.assert_close(whole[:2], torch.full((2,), 2 * (500 - 0.5), dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(half, whole / 2, rtol=1e-12, atol=0)


def test_the_share_of_flips_means_a_bound_in_one_loss_and_a_correction_in_the_other() -> None:
    """One setting, label_smoothing: on a pair at the bound of the conservative loss the debiased one still pushes, and more than the clean loss."""
    bound = math.log(9.0) / 0.1
    rows = pair("a", [bound], [0.0])
    chosen = {name: float(composed(name).weights(batch(rows))[0]) for name in ("cdpo", "robust_dpo", "dpo")}
    assert chosen["cdpo"] == pytest.approx(0.0, abs=1e-12) and chosen["robust_dpo"] == pytest.approx(0.1 * (0.1 + 0.1 / 0.8), rel=1e-9)
    assert chosen["robust_dpo"] > chosen["dpo"] > 0
