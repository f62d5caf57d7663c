"""Identities of the preference methods: exact numbers, limits where one loss becomes another, zero-gradient cases, and what is remembered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.contrib.preference import LogisticExponential, SelfLabelled
from posttrain.contrib.process import ImplicitProcessReward
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference
from posttrain.records import Row, TokenBatch
from posttrain.testing.check import example_batch, objective_with
from tests.loss.cases import composed

F64 = torch.float64
PAIRS, LABELLED = "streams.pairs.advantage", "streams.labelled.advantage"


def row(logp: list[float], ratio: list[float], source: str = "demo", **more: Any) -> Row:
    """One prompt token, then tokens of the given log-probs and log-ratios to the base."""
    base = [x - d for x, d in zip(logp, ratio, strict=True)]
    sources = ["prompt"] + [source] * len(logp)
    return Row(ids=[1] * len(sources), sources=sources, logps={"current": [0.0, *logp], "base": [0.0, *base]}, **more)


def pair(
    chosen: list[float], rejected: list[float], logps: tuple[list[float], list[float]] | None = None, name: str = "p", **rewards: float
) -> list[Row]:
    """A pair from its log-ratios per token; the log-probs are -1 unless given."""
    own = logps or ([-1.0] * len(chosen), [-1.0] * len(rejected))
    return [
        row(own[0], chosen, pair=name, side="chosen", rewards=rewards, sample_id=f"{name}/chosen"),
        row(own[1], rejected, pair=name, side="rejected", rewards={"score": 0.0}, sample_id=f"{name}/rejected"),
    ]


def labelled(*answers: tuple[float, float], mismatched: float | None = 0.0) -> TokenBatch:
    """One-token answers ``(log-ratio, label)``, and one answer under another prompt."""
    rows = [row([-1.0], [d], rewards={"label": y}) for d, y in answers]
    return batch([*rows, *([row([-1.0], [mismatched], context="mismatched")] if mismatched is not None else [])])


def batch(rows: list[Row], **more: Any) -> TokenBatch:
    return TokenBatch.from_sequences(rows, dtype=F64, **more)


def weights(name: str, data: TokenBatch | list[Row], *overrides: str) -> list[float]:
    return composed(name, overrides).weights(data if isinstance(data, TokenBatch) else batch(data)).tolist()


def loss(name: str, rows: list[Row], *overrides: str, stream: str = "pairs") -> float:
    total, count = composed(name, overrides)(batch(rows)).metrics[f"{stream}/preference_loss"]
    return total / count


def close(a: list[float] | Tensor, b: list[float] | Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=tolerance, atol=1e-14)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


AT_BASE = pair([0.0, 0.0], [0.0])
RAGGED = [*pair([0.3, -0.2, 0.4], [0.1], name="a"), *pair([-0.5], [0.2, 0.2], name="b")]


# -- at the base policy ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "chosen", "rejected"),
    [
        ("dpo", 0.05, -0.05),
        ("dpo_norm", 2.5, -2.5),
        ("robust_dpo", 0.1 * (0.5 + 0.1 / 0.8), -0.1 * (0.5 + 0.1 / 0.8)),
        ("rso", 0.1, -0.1),
        ("apo_zero", 0.025, -0.025),
        ("apo_down", 0.0, -0.025),
        ("bco_pair", 0.05, -0.05),
        ("nca", 0.1 * (0.5 - 0.25), -0.025),
        ("exo", 0.1 / 4 * math.log(999), -0.1 / 4 * math.log(999)),
        ("sppo", 1000.0, -1000.0),
        ("discopop", -0.1 * 0.784, 0.1 * 0.784),
        ("f_dpo", 0.05, -0.05),
        ("online_ipo", None, None),
    ],
)
def test_first_weights(name: str, chosen: float | None, rejected: float | None) -> None:
    rows = AT_BASE
    if name == "online_ipo":  # the target of summed log-ratios: 1/beta, whatever the lengths
        rows = [row([-1.0] * n, [0.0] * n, source="policy", pair="p", side=side) for n, side in ((2, "chosen"), (1, "rejected"))]
        chosen, rejected = 10.0, -10.0
    per_token = weights(name, rows)
    lengths = [2, 1] if name == "dpo_norm" else [1, 1]
    tolerance = 1e-3 if name == "discopop" else 1e-12
    assert [per_token[0] * lengths[0], per_token[2] * lengths[1]] == pytest.approx([chosen, rejected], rel=tolerance, abs=1e-14)


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "wpo", "aot", "ld_dpo", "ddpo", "ids"])
def test_the_logistic_loss_begins_at_ln_2(name: str) -> None:
    assert loss(name, pair([0.0, 0.0], [0.0], deviation=0.5)) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("margin", "slope"), [(0.0, 0.5), (1.0, 0.7310585786300049)])
def test_a_margin_is_added_to_what_must_be_reached(margin: float, slope: float) -> None:
    assert weights("dpo", AT_BASE, f"{PAIRS}.beta=1", f"{PAIRS}.margin={margin}")[0] == pytest.approx(slope)


# -- limits where one loss becomes another --------------------------------------------------------------------------------------------
EQUAL_LENGTHS = [*pair([0.3, -0.2], [0.1, 0.4], name="a"), *pair([-0.5, 0.2], [0.2, 0.2], name="b")]
SAME_BASE = pair([-0.7, 0.9], [0.5, 0.5], logps=([-1.0, -1.5], [-0.7, -1.0]))
SAME = [
    # loss, overrides, rows, the other loss, its overrides
    ("dpo_norm", (f"{PAIRS}.beta=0.6",), EQUAL_LENGTHS, "dpo", (f"{PAIRS}.beta=0.3",)),
    ("robust_dpo", (f"{PAIRS}.label_smoothing=0",), RAGGED, "dpo", ()),
    ("dpo", (f"{PAIRS}.label=score",), pair([0.3], [0.1], score=1.0), "dpo", ()),
    ("dpo", (f"{PAIRS}.label=score",), pair([0.3], [0.1], score=0.9), "cdpo", ()),
    ("f_dpo", (f"{PAIRS}.alpha=0", f"{PAIRS}.limit=null"), RAGGED, "dpo", ()),
    ("alphapo", (f"{PAIRS}.alpha=1e-9",), RAGGED, "simpo", ()),
    ("ld_dpo", (f"{PAIRS}.beyond=1",), RAGGED, "dpo", ()),
    ("ld_dpo", (), EQUAL_LENGTHS, "dpo", ()),
    ("aot", (), pair([0.3, -0.2], [0.1]), "dpo", ()),
    ("aot", (f"{PAIRS}.of=sides",), pair([0.3, -0.2], [0.1]), "dpo", ()),
    ("wpo", ("streams.pairs.masks.probability.power=0",), RAGGED, "dpo", ()),
    ("ddpo", (), pair([0.3], [0.1, 0.2], deviation=0.0), "dpo", ()),
    ("dorpo", (), pair([0.3], [0.1, 0.2], deviation=0.0), "orpo", ()),
    ("step_apo", (f"{PAIRS}.beta=0.1",), pair([0.3], [0.1], score=0.0), "dpo", ()),
    ("ids", (f"{PAIRS}.rate=0",), RAGGED, "dpo", ()),
    ("iterative_rpo", ("streams.chosen.coef=0",), RAGGED, "dpo", ()),
    ("rpo", ("streams.chosen.coef=0", f"{PAIRS}.beta=0.1"), RAGGED, "dpo", ()),
    ("dpop", (f"{PAIRS}.shortfall=0",), RAGGED, "dpo", ()),
    ("cpo", ("streams.chosen.coef=0",), SAME_BASE, "dpo", ()),
    ("nca", (f"{PAIRS}.f=softmax",), RAGGED, "dpo", ()),
    ("apo_zero", (), RAGGED, "kto", ("streams.labelled.paired=true", f"{LABELLED}.label=side", f"{LABELLED}.shift=none",
     "streams.labelled.aggregation={_target_: posttrain.loss.aggregate.PairSum}")),
    ("slic", ("streams.chosen.coef=0", f"{PAIRS}.score=log_ratio_sum", f"{PAIRS}.beta=0.1"), RAGGED, "rso", ()),
    ("mpo", ("streams.quality.coef=0", "streams.pairs.coef=1"), RAGGED, "iterative_rpo", ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides", "rows", "other", "other_overrides"), SAME, ids=[f"{s[0]}-{s[3]}-{i}" for i, s in enumerate(SAME)]
)
def test_limits_between_losses(
    name: str, overrides: tuple[str, ...], rows: list[Row], other: str, other_overrides: tuple[str, ...]
) -> None:
    tolerance = 1e-6 if name == "alphapo" else 1e-12
    close(weights(name, rows, *overrides), weights(other, rows, *other_overrides), tolerance)
    assert any(weights(name, rows, *overrides))


def test_without_its_preference_part_odds_are_maximum_likelihood_of_the_chosen() -> None:
    got = weights("orpo", RAGGED, "streams.pairs.coef=0")
    assert got == pytest.approx([1 / 4] * 3 + [0.0] + [1 / 4] + [0.0, 0.0])


def test_a_constant_deviation_scales_one_form_and_steepens_the_other() -> None:
    rows = pair([0.3], [0.1, 0.2], logps=([-0.5], [-1.0, -0.7]), deviation=1.0)
    close(weights("ddpo", rows), [2 * w for w in weights("dpo", rows)])
    steep = weights("dorpo", rows, "streams.chosen.coef=0")
    close(steep, weights("orpo", rows, "streams.chosen.coef=0", f"{PAIRS}.beta=2"))
    assert abs(steep[0] / weights("orpo", rows, "streams.chosen.coef=0")[0] - 2.0) > 0.05


def test_a_target_margin_shifts_the_loss_by_margin_over_beta() -> None:
    shifted = weights("step_apo", pair([0.5], [0.0], score=0.15))
    close(shifted, weights("step_apo", pair([0.0], [0.0], score=0.0)))


# -- where there is no gradient ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("margin", [10.0, 10.1, 1e4])
def test_a_reached_hinge_has_no_gradient_but_its_pair_still_counts(margin: float) -> None:
    rows = [*pair([margin], [0.0], name="a"), *pair([0.0], [0.0], name="b")]
    assert weights("rso", rows) == pytest.approx([0.0, 0.0, 0.05, -0.05])


def test_smoothed_reverse_kl_stops_at_its_label_and_gives_up_on_wrong_pairs() -> None:
    stop = math.log(999) / 0.1
    assert stop * 0.1 == pytest.approx(6.907, abs=1e-3)
    assert weights("exo", pair([stop], [0.0]))[0] == pytest.approx(0.0, abs=1e-14)
    assert weights("exo", pair([stop + 1], [0.0]))[0] < 0
    assert 0 < weights("exo", pair([-300.0], [0.0]))[0] < 1e-10 < weights("dpo", pair([-300.0], [0.0]))[0]


def test_noise_contrast_bounds_the_chosen_likelihood() -> None:
    at = math.log(2) / 0.1
    assert weights("nca", pair([at], [0.0]))[0] == pytest.approx(0.0, abs=1e-14)
    assert weights("nca", pair([at - 1], [0.0]))[0] > 0 > weights("nca", pair([at + 1], [0.0]))[0]


def test_self_play_pins_each_side_to_its_own_target() -> None:
    assert weights("sppo", pair([500.0], [-500.0])) == pytest.approx([0.0, 0.0], abs=1e-9)
    assert loss("sppo", pair([501.0], [-499.0]), stream="labelled") > 0, (
        "a constant added to both sides changes the loss, unlike the margin's"
    )
    even = weights("sppo", [row([-1.0], [2.0], rewards={"rate": 0.5})], "streams.labelled.paired=false", f"{LABELLED}.label=rate",
                   "streams.labelled.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenSum}")  # fmt: skip
    assert even == pytest.approx([-4.0]), "an even win rate pulls to the base"


@pytest.mark.parametrize(("d", "factor"), [(0.0, 1.0), (0.5, 1.0), (-0.5, 51.0)])
def test_a_chosen_answer_below_the_base_counts_more(d: float, factor: float) -> None:
    got = weights("dpop", pair([d], [0.0]))
    h = d if d >= 0 else 51 * d
    push = 0.1 * sigmoid(-0.1 * h)
    assert got == pytest.approx([push * factor, -push])


def test_labelled_answers_saturate_both_ways() -> None:
    at = labelled((0.7, 1.0), (0.7, 0.0), mismatched=0.7)
    assert weights("kto", at)[:2] == pytest.approx([0.025 / 2, -0.025 / 2])
    far = labelled((1000.0, 1.0), (-1000.0, 1.0), (1000.0, 0.0), (-1000.0, 0.0))
    assert weights("kto", far)[:4] == pytest.approx([0.0] * 4, abs=1e-30)
    logistic = weights("bco_pair", pair([-1000.0], [1000.0]))
    assert logistic == pytest.approx([0.1, -0.1]), "the logistic one does not"


def test_the_kl_estimate_is_never_negative() -> None:
    low, zero = labelled((0.3, 1.0), mismatched=-5.0), labelled((0.3, 1.0), mismatched=0.0)
    close(weights("kto", low), weights("kto", zero))
    assert weights("kto", labelled((0.3, 1.0), mismatched=5.0)) != weights("kto", zero)


@pytest.mark.parametrize("name", ["kto", "bco", "implicit_prm"])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_alone_is_fine(name: str, label: float) -> None:
    got = weights(name, labelled((0.3, label), (-0.2, label)))
    assert all((w > 0) == (label > 0) for w in got[:2]) and all(map(math.isfinite, got))
    metrics = composed(name)(labelled((0.3, label), (-0.2, label))).metrics
    assert metrics["labelled/good"] == (2 * label, 2.0) and not any(math.isnan(t) for t, _ in metrics.values())


def test_outcome_cross_entropy() -> None:
    got = weights("implicit_prm", labelled((0.0, 1.0), (0.0, 0.0), (0.0, 0.25)))
    assert got[:3] == pytest.approx([0.05 * (y - 0.5) / 3 for y in (1.0, 0.0, 0.25)])


def test_the_unshifted_classifier_bounds_the_logistic_loss_from_above() -> None:
    for chosen, rejected in ((0.0, 0.0), (3.0, -2.0), (-4.0, 1.0), (5.0, 5.0)):
        rows = pair([chosen], [rejected])
        assert 2 * loss("bco_pair", rows, stream="labelled") >= loss("dpo", rows)  # reported per answer


def test_identical_lists_and_lists_of_one() -> None:
    def lists(*rewards: float, f: str = "softmax") -> list[float]:
        rows = [row([-1.0], [0.2 * i], group="g", rewards={"reward": r}) for i, r in enumerate(rewards)]
        return weights("info_nca", rows, f"streams.lists.advantage.f={f}")

    assert lists(1.0) == pytest.approx([0.0])
    assert lists(1.0, f="reverse_kl") == pytest.approx([0.0])
    assert lists(1.0, f="noise_contrastive") == pytest.approx([0.0]), "r = 0 is the noise's own share"
    equal = lists(2.0, 2.0, 2.0)
    assert sum(equal) == pytest.approx(0.0) and equal[0] > 0 > equal[2], "towards equal shares"


def test_mean_log_probs_need_the_margin_even_when_equal() -> None:
    assert weights("simpo", AT_BASE)[0] * 2 == pytest.approx(2.0 * sigmoid(0.5))


def test_the_policy_side_of_a_game_at_even_odds_only_returns_to_the_base() -> None:
    def play(win: float, d: float) -> list[float]:
        rows = [row([-1.0, -1.0], [d, d], source="policy", advantage=win - 0.5)]
        return weights("nash_md", rows)

    assert play(0.5, 0.0) == pytest.approx([0.0, 0.0])
    assert play(0.5, 2.0) == pytest.approx([-0.2, -0.2])
    assert play(1.0, 0.0) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("chosen", ["policy", "demo"])
def test_optimism_pushes_down_the_bases_sample_on_either_side(chosen: str) -> None:
    rejected = {"policy": "demo", "demo": "policy"}[chosen]
    rows = [row([-1.0], [0.0], source=chosen, pair="p", side="chosen"), row([-1.0], [0.0], source=rejected, pair="p", side="rejected")]
    plain = weights("xpo", rows, "streams.optimism.coef=0")
    assert plain == pytest.approx([0.05, -0.05])
    got = weights("xpo", rows, "streams.optimism.coef=0.01")
    assert [g - p for g, p in zip(got, plain, strict=True)] == pytest.approx([-0.01 * (chosen == "demo"), -0.01 * (chosen == "policy")])


# -- loss functions of their own -----------------------------------------------------------------------------------------------------
def test_the_searched_loss_is_not_monotone() -> None:
    term = LogisticExponential()
    x = torch.tensor([-100.0, -0.2, -0.05, 0.0, 0.05, 0.2, 100.0], dtype=F64)
    slope = term.slope(x)
    assert (slope > 0).tolist() == [False, False, True, True, True, False, False]
    assert float(slope[3]) == pytest.approx(0.784, abs=1e-3)
    assert bool(torch.isfinite(term.loss(x)).all()) and float(term.loss(x)[0]) == pytest.approx(100.0)
    close(term.loss(torch.tensor([5.0], dtype=F64)), torch.exp(torch.tensor([-5.0], dtype=F64)))
    close(term.loss(torch.tensor([-5.0], dtype=F64)), torch.log1p(torch.exp(torch.tensor([5.0], dtype=F64))))


def test_sorting_couples_the_step() -> None:
    """Two pairs whose order of margins differs between policy and base: the weights belong to ranks, not to pairs."""
    logps = (([-1.0], [-3.0]), ([-2.0], [-1.0]))  # margins 2 and -1 now
    rows = [*pair([3.0], [0.0], logps=logps[0], name="a"), *pair([-2.5], [0.0], logps=logps[1], name="b")]  # -1 and 1.5 then
    got, each = weights("aot", rows), weights("dpo", rows)
    assert got[0] == pytest.approx(0.05 * sigmoid(-0.1 * (2.0 - 1.5))) and got[2] == pytest.approx(0.05 * sigmoid(-0.1 * (-1.0 + 1.0)))
    assert abs(got[0] - each[0]) > 1e-3
    with pytest.raises(ValueError, match="whole optimizer step"):
        whole = batch(rows)
        composed("aot").weights(whole.replace(totals=composed("aot").totals(whole)).take([0, 1]))


# -- hostile numbers of these methods ------------------------------------------------------------------------------------------------
def test_an_answer_of_probability_one_has_finite_odds() -> None:
    for sure in (("chosen", ([0.0], [-1.0])), ("rejected", ([-1.0], [0.0]))):
        got = weights("orpo", pair([0.0], [0.0], logps=sure[1]))
        assert all(map(math.isfinite, got))
        narrow = composed("orpo").weights(TokenBatch.from_sequences(pair([0.0], [0.0], logps=sure[1])))
        assert bool(torch.isfinite(narrow).all())


def test_a_huge_inverse_ratio_is_an_error_or_flat() -> None:
    rows = pair([-1000.0], [0.0])
    with pytest.raises(FloatingPointError, match="stream 'pairs'"):
        weights("f_dpo", rows, f"{PAIRS}.limit=null")
    assert weights("f_dpo", rows)[0] == 0.0
    assert weights("f_dpo", pair([-19.0], [0.0]))[0] == pytest.approx(0.1 * math.exp(19.0))
    assert weights("f_dpo", pair([-2.0], [0.0]), f"{PAIRS}.limit=1")[1] == pytest.approx(-0.1 * sigmoid(0.1 * (math.e - 1))), "beyond the limit the score stays what it is there"


@pytest.mark.parametrize(
    "name", ["exo", "discopop", "apo_zero", "apo_down", "nca", "dpo_norm", "dpop", "ld_dpo", "aot", "cdpo", "robust_dpo"]
)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_margins_stay_finite(name: str, margin: float) -> None:
    for dtype in (torch.float32, F64):
        data = TokenBatch.from_sequences(pair([margin], [0.0]), dtype=dtype)
        assert bool(torch.isfinite(composed(name).weights(data)).all())
        assert all(math.isfinite(t) for t, _ in composed(name)(data).metrics.values())


# -- what is refused -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: advantage.Pairwise(beta=5.0), "scale of a mean"),
        (lambda: advantage.Pairwise(score="log_ratio_mean"), "scale of a sum"),
        (lambda: advantage.Pointwise(beta=5.0), "scale of a mean"),
        (lambda: advantage.Pairwise(f="reverse_kl"), "strictly between 0 and 1"),
        (lambda: advantage.Pairwise(f="hinge", label="label"), "f=logistic only"),
        (lambda: advantage.Pairwise(label="label", label_smoothing=0.1), "already says how sure"),
        (lambda: advantage.Pairwise(transform="log_odds"), "needs a probability"),
        (lambda: advantage.Pairwise(alpha=0.5), "belong to transform=power"),
        (lambda: advantage.Pairwise(transform="power", limit=0.0), "limit=0.0 must be above 0"),
        (lambda: advantage.Pairwise(score="logp_sum", shortfall=1.0), "below the reference"),
        (lambda: advantage.Pairwise(shortfall=-1.0), "must not be negative"),
        (lambda: advantage.Pairwise(transform="cube"), "transform='cube' does not exist"),
        (lambda: advantage.Pointwise(f="squared", shift="running_mean"), "its own target"),
        (lambda: advantage.Pointwise(score="logp_sum", shift="mismatched"), "estimates a KL"),
        (lambda: advantage.Pointwise(bad=-1.0), "must not be negative"),
        (lambda: advantage.Pointwise(shift="batch"), "shift='batch' does not exist"),
        (lambda: advantage.Listwise(f="reverse_kl", temperature=0.0), "against a hard target"),
        (lambda: advantage.Listwise(temperature=-1.0), "must not be negative"),
        (lambda: SelfLabelled(rate=1.5), "a share"),
        (lambda: SelfLabelled(advantage.Pairwise("hinge")), "without label"),
        (lambda: ImplicitProcessReward("base", "base"), "two different models"),
        (lambda: Stream(("demo",), None, None, advantage.Pairwise(), aggregate.PairTokenMean()), "sum over tokens, but PairTokenMean"),
        (
            lambda: Stream(("demo",), None, None, advantage.Pairwise(score="logp_mean", beta=2.0), aggregate.PairSum()),
            "mean over tokens, but PairSum",
        ),
        (lambda: Stream(("demo",), None, None, advantage.Pairwise(), aggregate.PairSum(), side="chosen"), "never see the other"),
        (
            lambda: Stream(("demo",), None, None, advantage.One(), aggregate.PairSum(), paired=False, side="chosen"),
            "only answers in a pair",
        ),
        (lambda: Stream(("demo",), None, None, advantage.One(), aggregate.PairSum(), side="left"), "side='left' does not exist"),
    ],
)
def test_settings_of_another_scale_or_meaning_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("name", "rows", "overrides", "reason"),
    [
        ("kto", [row([-1.0], [0.0], rewards={"label": 1.5})], (), r"label=label is 1\.5 on sample '0'.*between 0 and 1"),
        ("kto", [row([-1.0], [0.0])], (), "reads the reward 'label'; the batch has none"),
        ("kto", [row([-1.0], [0.0], rewards={"label": 1.0}), row([-1.0], [0.0], sample_id="x")], (), r"is nan on sample 'x'"),
        ("kto", [row([-1.0], [0.0], rewards={"label": 1.0})], (), "under another prompt"),
        (
            "bco_pair",
            [row([-1.0], [0.0], pair="p", side="chosen"), row([-1.0], [0.0], sample_id="x")],
            ("streams.labelled.paired=null",),
            "'x' is in no pair",
        ),
        ("info_nca", [row([-1.0], [0.0], rewards={"reward": 1.0}, sample_id="x")], (), "'x' is in none"),
        ("ddpo", pair([0.0], [0.0], deviation=-2.0), (), "must not be negative"),
        ("dpo", pair([0.0], [0.0], label=-0.1), (f"{PAIRS}.label=label",), r"label=label is -0\.1"),
        ("nca", pair([0.0], [0.0])[:1], (), "0 rejected answers here instead of 1"),
    ],
)
def test_data_that_cannot_be_meant_is_an_error_with_the_sample(name: str, rows: list[Row], overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        weights(name, rows, *overrides)


# -- what is remembered --------------------------------------------------------------------------------------------------------------
def test_the_running_mean_counts_every_answer_once_and_both_classes() -> None:
    objective = composed("bco")
    first = labelled((1.0, 1.0), (3.0, 0.0), mismatched=None)
    memory = objective.remember(first)
    assert memory == {"labelled/Pointwise.sum": 4.0, "labelled/Pointwise.count": 2.0}
    second = labelled((5.0, 1.0), mismatched=None).replace(memory=memory)
    assert objective.remember(second) == {"labelled/Pointwise.sum": 9.0, "labelled/Pointwise.count": 3.0}
    assert objective.weights(second).tolist() == pytest.approx([0.1 * sigmoid(-0.1 * (5.0 - 3.0))])
    assert objective.remembers and not composed("kto").remembers


def test_labels_move_to_the_policys_opinion_and_stop_there() -> None:
    objective, rows = composed("ids"), [*pair([-20.0], [0.0], name="a"), *pair([30.0], [0.0], name="b")]
    memory: dict[str, float] = {}
    for _ in range(200):
        memory = objective.remember(batch(rows, progress=0.0).replace(memory=memory))
    assert memory == {
        "pairs/SelfLabelled.a/chosen": pytest.approx(sigmoid(-2.0), abs=1e-9),
        "pairs/SelfLabelled.b/chosen": pytest.approx(sigmoid(3.0), abs=1e-9),
    }
    data = batch(rows)
    assert objective.remember(data)["pairs/SelfLabelled.a/chosen"] == pytest.approx(0.9 + 0.1 * sigmoid(-2.0))
    assert objective.weights(data.replace(memory=memory)).tolist() == pytest.approx([0.0] * 4, abs=1e-9), "a fixed point has no gradient"
    other = objective.remember(batch(pair([0.0], [0.0], name="c")).replace(memory=memory))
    assert memory.items() < other.items(), "pairs not seen keep their label"


def test_a_term_that_remembers_must_see_whole_steps() -> None:
    class Forgetful(advantage.One):
        remembers = True

    with pytest.raises(ValueError, match=r"Forgetful remembers.*coupling = 'batch'"):
        objective_with(Forgetful())
    objective = composed("bco")
    assert objective.memory_for_parts({"labelled/Pointwise.sum": 1.0, "control/kl": 2.0}) == {"control/kl": 2.0}


def test_memory_of_other_terms_is_left_alone() -> None:
    data = labelled((1.0, 1.0), mismatched=None).replace(memory={"elsewhere": 7.0})
    assert composed("bco").remember(data)["elsewhere"] == 7.0
    assert composed("dpo").remember(batch(AT_BASE).replace(memory={"elsewhere": 7.0})) == {"elsewhere": 7.0}


# -- rewards of tokens ---------------------------------------------------------------------------------------------------------------
def test_token_rewards_sum_to_the_answers_reward() -> None:
    data = example_batch()
    term = ImplicitProcessReward("teacher", "base", 0.05)
    view = objective_with(term).views(data)["rollouts"]
    total = view.seq_sum(0.05 * view.log_ratio("base", "teacher", "token"))
    assert term.metrics(view)["implicit_reward"][0] == pytest.approx(float(total[view.member].sum()), rel=1e-12)
    # without the outcome and baseline, the first token's return is the whole answer's reward
    outcome_only = ImplicitProcessReward(outcome=1.0, process=0.0)
    close(view.select(outcome_only.values(view)), view.select(data.advantage))


def test_equal_models_give_no_process_reward() -> None:
    data = example_batch()
    data = data.with_logps(teacher=data.logps["base"])
    view = objective_with(ImplicitProcessReward(outcome=0.0)).views(data)["rollouts"]
    assert not bool(view.select(ImplicitProcessReward(outcome=0.0).values(view)).any())


def test_leave_one_out_process_rewards_of_one_token_answers_are_leave_one_out_rewards() -> None:
    rewards = (1.0, -2.0, 0.5)
    rows = [
        Row(
            ids=[1, 2],
            sources=["prompt", "policy"],
            group="g",
            advantage=0.0,
            logps={"current": [0.0, -1.0], "base": [0.0, -1.0], "teacher": [0.0, r - 1.0]},
        )
        for r in rewards
    ]
    stream = Stream(
        ("policy",), likelihood.Token(), reference.Current(), ImplicitProcessReward(beta=1.0, process=1.0), aggregate.Constant(1 / 3)
    )
    got = Objective({"rollouts": stream}).weights(batch(rows)).tolist()
    assert got == pytest.approx([r - (sum(rewards) - r) / 2 for r in rewards])
    with pytest.raises(ValueError, match="sample '0' is alone"):
        Objective({"rollouts": stream}).weights(batch(rows[:1]))
