"""The composed objective: streams, declarations, totals, errors and metrics."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, load, mask, reference, regularizer
from posttrain.records import Row, TokenBatch
from tests.loss.cases import CASES, NORM, composed, make


def stream(**changes: object) -> Stream:
    words = {
        "source": ("policy",),
        "likelihood": likelihood.Token(),
        "reference": reference.Named(),
        "advantage": advantage.Column(),
        "aggregation": aggregate.TokenMean(),
    }
    return Stream(**{**words, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "references", "whole"),
    [
        ("sft", set(), None),
        ("dft", set(), None),
        ("reinforce", set(), None),
        ("grpo", {"old"}, None),
        ("gspo", {"old"}, None),
        ("grpo with k3", {"old", "base"}, None),
        ("truncated importance sampling", {"old", "behaviour"}, None),
        ("dpo", {"base"}, "group"),
        ("ipo", {"base"}, "group"),
        ("dapo as printed", {"old"}, "group"),
    ],
)
def test_needs(name: str, references: set[str], whole: str | None) -> None:
    needs = CASES[name].load().needs
    assert needs.references == references
    assert needs.keep_whole == whole
    assert needs.temperature == 1.0


def test_needs_columns_and_coupling_of_everything() -> None:
    objective = Objective(
        {"a": stream(likelihood=likelihood.Token("sequence"))},
        {"h": regularizer.Entropy(), "f": regularizer.FullKL("forward", "teacher"), "r": regularizer.FullKL("reverse")},
    )
    assert objective.needs.columns == {"entropy", "kl_forward:teacher", "kl_reverse:base"}
    assert objective.needs.coupling == "sequence" and objective.needs.live
    assert Objective({"a": stream(aggregation=aggregate.TokenMean("kept"))}).needs.keep_whole == "batch"


def test_training_temperature_is_one_per_forward() -> None:
    assert load("grpo", ["streams.rollouts.likelihood.temperature=0.7"]).needs.temperature == 0.7
    with pytest.raises(ValueError, match="one training temperature"):
        Objective({"a": stream(), "b": stream(likelihood=likelihood.Token(temperature=0.5))})


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stream"):
        Objective({"a": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at least one stream"):
        Objective({}, {"h": regularizer.Entropy()})
    with pytest.raises(ValueError, match="stream source 'rollout' does not exist"):
        stream(source="rollout")


def test_null_removes_a_mask_a_stream_or_a_regulariser() -> None:
    assert load("grpo", ["streams.rollouts.masks.clip=null"]).streams["rollouts"].masks == {}
    assert set(load("sft_plus_rl", ["streams.demos=null"]).streams) == {"rollouts"}
    assert load("grpo").regularizers == {}


def test_a_column_regulariser_cannot_follow_a_group_aggregation() -> None:
    grouped = stream(aggregation=aggregate.GroupMeanTokenMean())
    with pytest.raises(ValueError, match="give the regulariser an aggregation of its own"):
        Objective({"a": grouped}, {"h": regularizer.Entropy()})
    Objective({"a": grouped}, {"h": regularizer.Entropy(aggregation=aggregate.TokenMean())})
    with pytest.raises(ValueError, match="names the stream 'b'"):
        Objective({"a": stream()}, {"h": regularizer.Entropy(streams=("b",))})


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no loss 'gpro'; did you mean .*available: .*bnpo"):
        load("gpro")
    with pytest.raises(ValueError, match="hihg"):
        load("grpo", ["streams.rollouts.masks.clip.hihg=1"])
    with pytest.raises(ValueError, match="at most 1"):
        load("grpo", ["streams.rollouts.masks.clip.low=2"])


@pytest.mark.parametrize("name", CASES)
def test_objectives_travel(name: str) -> None:
    case = CASES[name]
    objective, batch = case.load(), case.make(0).batch()
    copy = pickle.loads(pickle.dumps(objective))
    assert copy.needs == objective.needs
    torch.testing.assert_close(copy.weights(batch), objective.weights(batch), rtol=0, atol=0)


def test_totals_count_the_stream_over_the_step() -> None:
    totals = composed("sft_plus_rl").totals(make(0, NORM).batch())
    rollouts = totals["rollouts"]
    assert (rollouts.sequences, rollouts.groups, rollouts.pairs) == (9, 3, 0)
    assert totals["demos"].sequences == 8 and totals["demos"].pairs == 3
    assert composed("dpo").totals(make(0).batch())["pairs"].pairs == 3
    assert composed("sft").totals(make(0).batch())["demos"].sequences == 2


def test_totals_of_another_objective_are_refused() -> None:
    batch = make(0).batch()
    with pytest.raises(ValueError, match="do not know stream 'demos'"):
        composed("sft").weights(batch.replace(totals=composed("grpo").totals(batch)))


def test_current_log_probs_are_required_and_upcast() -> None:
    batch = TokenBatch.from_sequences([Row(ids=[1, 2, 3])])
    with pytest.raises(ValueError, match="no current log-probs"):
        composed("sft").weights(batch)
    out = composed("sft")(batch, torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True))
    assert out.loss.dtype == torch.float32 and float(out.loss.detach()) == 1.5


def test_float32_agrees_with_float64() -> None:
    for name in ("grpo", "gspo", "dpo"):
        case = CASES[name]
        batch = make(1, case.advantage, case.spread).batch()
        small = batch.replace(
            logps={k: v.float() for k, v in batch.logps.items()}, advantage=batch.advantage.float(), weight=batch.weight.float()
        )
        weights = case.load().weights(small)
        assert weights.dtype == torch.float32
        error = (weights - case.load().weights(batch)).abs().max() / weights.abs().max()
        assert float(error) < (2e-3 if name == "gspo" else 1e-5)


def test_token_weights_scale_the_policy_term_and_not_the_regulariser() -> None:
    batch = make(1, NORM).batch()
    doubled = batch.replace(weight=2 * batch.weight)
    torch.testing.assert_close(composed("grpo").weights(doubled), 2 * composed("grpo").weights(batch))
    only_kl = Objective({"a": stream(advantage=advantage.One(0.0))}, {"kl": regularizer.KL(coef=0.1)})
    torch.testing.assert_close(only_kl.weights(doubled), only_kl.weights(batch), rtol=0, atol=0)


def test_weights_are_linear_in_the_coefficients() -> None:
    batch = make(1, NORM).batch()
    half = composed("grpo", ("streams.rollouts.coef=0.5",)).weights(batch)
    torch.testing.assert_close(half, 0.5 * composed("grpo").weights(batch))
    with_kl = Objective({"a": stream()}, {"kl": regularizer.KL("k2", coef=0.3)}).weights(batch)
    without, only = (
        Objective({"a": stream()}).weights(batch),
        Objective({"a": stream(coef=0.0)}, {"kl": regularizer.KL("k2", coef=0.3)}).weights(batch),
    )
    torch.testing.assert_close(with_kl, without + only)


def test_a_regulariser_can_be_restricted_to_a_stream() -> None:
    batch = make(1, NORM).batch()
    batch = batch.with_logps(base=batch.logps["current"] - 0.5)
    kl = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, coef: 1.0, estimator: k2, streams: [rollouts]}"
    changed = composed("sft_plus_rl", (kl,)).weights(batch) != composed("sft_plus_rl").weights(batch)
    assert bool(changed.any()) and not bool(changed[batch.source == 2].any())


def test_metrics_of_a_clipped_loss() -> None:
    batch = make(0, NORM, 0.4).batch()
    metrics = composed("grpo")(batch).metrics
    view = composed("grpo").views(batch)["rollouts"]
    n = float(view.on.sum())
    assert metrics["rollouts/tokens"] == (n, 0.0)
    masked, count = metrics["rollouts/clip/masked"]
    assert count == n and 0 < masked < n
    ratio = torch.exp(batch.logps["current"] - batch.logps["old"])
    a = batch.advantage
    dropped = view.on & (((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8)))
    assert masked == float(dropped.sum())
    assert metrics["rollouts/clip/factor"] == (n - masked, n)
    assert metrics["rollouts/nll"] == (pytest.approx(-float(batch.logps["current"][view.on].sum())), n)
    assert metrics["rollouts/zero_weight"][0] == float((view.on & (dropped | (a == 0))).sum())


def test_metrics_of_pairs() -> None:
    batch = make(0).batch()
    metrics = composed("dpo")(batch).metrics
    assert metrics["pairs/accuracy"][1] == metrics["pairs/margin"][1] == metrics["pairs/preference_loss"][1] == 3.0
    chosen, rejected = metrics["pairs/chosen_score"], metrics["pairs/rejected_score"]
    assert metrics["pairs/margin"][0] == pytest.approx(chosen[0] - rejected[0])


def test_given_weights_are_used_as_they_are() -> None:
    batch = make(0, NORM).batch()
    weights = torch.linspace(-1, 1, batch.num_tokens, dtype=torch.float64)
    logp = batch.logps["current"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(composed("grpo")(batch, logp, weights=weights).loss, logp)
    torch.testing.assert_close(gradient, -weights)


def test_masks_stack() -> None:
    batch = make(0, NORM, 0.4).batch()
    both = Objective({"a": stream(masks={"clip": mask.RatioClip(), "cap": mask.Cap(1.05)})})
    alone = [Objective({"a": stream(masks={k: m})}).weigh(batch)[0] for k, m in (("clip", mask.RatioClip()), ("cap", mask.Cap(1.05)))]
    none = Objective({"a": stream()}).weights(batch)
    used = none != 0
    torch.testing.assert_close(both.weights(batch)[used], (alone[0] * alone[1] / none)[used])


def test_a_setting_called_column_asks_for_no_full_vocabulary_column() -> None:
    """Only a regulariser's ``column`` is one that the forward must deliver; a mask may have a setting of that name."""

    @dataclass(frozen=True)
    class Named:
        column: str = "reward"

        def factor(self, view: Any, given: Tensor) -> Tensor:
            return torch.ones_like(view.logp)

    plain = load("grpo")
    stream = replace(plain.streams["rollouts"], masks={"named": Named()})
    assert replace(plain, streams={"rollouts": stream}).needs.columns == frozenset()
