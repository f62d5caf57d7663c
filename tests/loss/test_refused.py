"""Where settings end: the last value that is taken and the first that is not, for every term, advantage and gate that checks a number or a word."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.advantage import group, pick, plain, shape, step
from posttrain.loss import advantage, aggregate, likelihood, load, mask, reference, regularizer, value
from posttrain.mixture import buffer, context, control, gate, pairs, schedule

TINY = 1e-9
NAMED = {"name": "coefficient", "metric": "rollouts/kl"}
Make = Callable[..., Any]
# (class, setting, values that are taken, values that are refused, what else must be set)
BOUNDS: list[tuple[Make, str, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]] = [
    (group.GroupAdvantage, "eps", (0.0, 1.0), (-TINY, math.inf), {}),
    (group.GroupAdvantage, "dead_tolerance", (0.0,), (-TINY,), {}),
    (group.BatchWhiten, "eps", (0.0,), (-TINY, math.inf), {}),
    (group.BatchWhiten, "ddof", (0, 1), (2, -1), {}),
    (group.BatchWhiten, "over", ("tokens", "sequences"), ("groups",), {}),
    (group.BatchWhiten, "eps_on", ("std", "variance"), ("mean",), {}),
    (pick.BestMinusSecond, "eps", (0.0,), (-TINY,), {}),
    (pick.BestMinusSecond, "scale", ("none", "std"), ("mean",), {}),
    (pick.BestMinusSecond, "ddof", (0, 1), (2,), {}),
    (pick.Extremes, "best", (0, 1, 2), (-1,), {"worst": 1}),
    (pick.Extremes, "worst", (0, 1), (-1,), {"best": 1}),
    (pick.Extremes, "best", (1,), (0,), {"worst": 0}),
    (pick.RunningBaseline, "decay", (0.0, 0.99), (-TINY, 1.0), {}),
    (pick.RunningBaseline, "by", ("env", "all"), ("prompt",), {}),
    (plain.Constant, "value", (0.0, -1.0), (math.inf, math.nan), {}),
    (shape.Diverse, "floor", (0.0, 1.0), (-TINY, 1 + TINY), {}),
    (shape.TrustMix, "horizon", (TINY,), (0, -1), {}),
    (shape.TailRisk, "bundle", (1, 2), (0,), {}),
    (shape.TailRisk, "a", (TINY,), (0.0, 0.999), {}),
    (shape.TailRisk, "b", (1 - TINY,), (1.0, TINY), {}),
    (shape.TailRisk, "w", (0.0,), (-TINY,), {}),
    (shape.TailRisk, "rate", (TINY,), (0.0,), {}),
    (step.LiveGroups, "tolerance", (0.0,), (-TINY,), {}),
    (step.BatchScale, "eps", (0.0,), (-TINY, math.inf), {}),
    (step.BatchScale, "of", ("reward", "advantage"), ("length",), {}),
    (step.BatchScale, "ddof", (0, 1), (2,), {}),
    (step.BatchScale, "eps_on", ("std", "variance"), ("mean",), {}),
    (step.BetaNorm, "clamp", (TINY,), (0.0,), {}),
    (step.DropOutliers, "sigmas", (TINY,), (0.0,), {}),
    (advantage.ColumnMinusKL, "gamma", (TINY, 1.0), (0.0, 1 + TINY, 2.0), {}),
    (advantage.ColumnMinusKL, "gamma", (1.0,), (0.5,), {"credit": "own"}),
    (advantage.ColumnMinusKL, "credit", ("to_go", "sequence", "own"), ("group",), {}),
    (advantage.ColumnMinusKL, "to", ("old", "self"), ("base",), {"over": "base"}),
    (advantage.GeneralizedAdvantage, "gamma", (0.0, 1.0), (-TINY, 1 + TINY), {}),
    (advantage.GeneralizedAdvantage, "lam", (0.0, 1.0), (-TINY, 1 + TINY), {}),
    (advantage.GeneralizedAdvantage, "lam_by_length", (0.0, 2.0), (-TINY,), {}),
    (advantage.GeneralizedAdvantage, "rewards", ("last", "each"), ("first",), {}),
    (advantage.GeneralizedAdvantage, "to", ("teacher",), ("old",), {}),
    (advantage.LogRatio, "limit", (None, TINY), (0.0, -1.0), {}),
    (advantage.LogRatio, "credit", ("own", "to_go", "sequence"), ("group",), {}),
    (advantage.LogRatio, "den", ("base",), ("old",), {"num": "old"}),
    (advantage.Whiten, "eps", (0.0,), (-TINY,), {}),
    (advantage.Whiten, "ddof", (0, 1), (2,), {}),
    (advantage.Whiten, "over", ("tokens", "sequences"), ("groups",), {}),
    (advantage.Whiten, "eps_on", ("std", "variance"), ("mean",), {}),
    (advantage.GroupCenter, "divide", ("none", "size", "peers"), ("tokens",), {}),
    (advantage.Pairwise, "beta", (TINY, 1.99), (0.0, -1.0, 2.0), {}),
    (advantage.Pairwise, "beta", (0.2, 10.0), (0.19,), {"score": "logp_mean"}),
    (advantage.Pairwise, "label_smoothing", (0.0, 1.0), (-TINY, 1 + TINY), {}),
    (advantage.Pairwise, "label_smoothing", (0.0, 0.499), (0.5,), {"debias": True}),
    (advantage.Pairwise, "label_smoothing", (TINY, 1 - TINY), (0.0, 1.0), {"f": "reverse_kl"}),
    (advantage.Pairwise, "label_smoothing", (0.0,), (0.1,), {"f": "hinge"}),
    (advantage.Pairwise, "label_smoothing", (0.0,), (0.1,), {"label": "label"}),
    (advantage.Pairwise, "label", (None,), ("label",), {"f": "squared"}),
    (advantage.Pairwise, "debias", (False,), (True,), {"f": "hinge"}),
    (advantage.Pairwise, "transform", ("identity", "log_odds"), ("odds",), {"score": "logp_sum"}),
    (advantage.Pairwise, "transform", ("identity",), ("log_odds",), {"score": "log_ratio_sum"}),
    (advantage.Pairwise, "limit", (None, TINY), (0.0,), {"transform": "power", "alpha": 1.0}),
    (advantage.Pairwise, "limit", (None,), (1.0,), {}),
    (advantage.Pairwise, "alpha", (0.0,), (1.0,), {}),
    (advantage.Pairwise, "shortfall", (0.0, 1.0), (-TINY,), {}),
    (advantage.Pairwise, "shortfall", (0.0,), (1.0,), {"score": "logp_sum"}),
    (advantage.Pairwise, "f", ("logistic", "squared", "hinge", "sigmoid"), ("ranking",), {}),
    (advantage.Pairwise, "score", ("value", "logp_sum"), ("logp",), {}),
    (advantage.Pointwise, "good", (0.0, 1.0), (-TINY,), {}),
    (advantage.Pointwise, "bad", (0.0, 1.0), (-TINY,), {}),
    (advantage.Pointwise, "beta", (TINY, 1.99), (0.0, 2.0), {}),
    (advantage.Pointwise, "shift", ("none",), ("mismatched", "running_mean"), {"f": "squared"}),
    (advantage.Pointwise, "shift", ("none", "running_mean"), ("mismatched",), {"score": "logp_sum"}),
    (advantage.Pointwise, "shift", ("none",), ("mean",), {}),
    (advantage.Pointwise, "f", ("logistic", "sigmoid", "squared"), ("hinge",), {}),
    (advantage.Listwise, "temperature", (0.0, 1.0), (-TINY,), {}),
    (advantage.Listwise, "temperature", (TINY,), (0.0,), {"f": "reverse_kl"}),
    (advantage.Listwise, "f", ("softmax", "noise_contrastive"), ("hinge",), {}),
    (aggregate.TokenMean, "denominator", ("own", "joint", "weight_sum", "kept"), ("step",), {}),
    (aggregate.SequenceMeanTokenMean, "denominator", ("own", "weight_sum"), ("joint",), {}),
    (aggregate.Constant, "length", (TINY,), (0.0, -1.0), {}),
    (aggregate.Constant, "per", ("sequence", "step"), ("token",), {"length": 1.0}),
    (likelihood.Token, "temperature", (TINY,), (0.0,), {}),
    (likelihood.Token, "ratio", ("token", "sequence", "sequence_geometric"), ("group",), {}),
    (mask.RatioClip, "low", (0.0, 1.0), (-TINY, 1 + TINY), {}),
    (mask.RatioClip, "high", (0.0, math.inf), (-TINY,), {}),
    (mask.RatioClip, "level", (None, "token"), ("tokens",), {}),
    (mask.RatioClip, "to", ("old", "base"), ("self",), {}),
    (mask.DualClip, "c", (1 + TINY,), (1.0,), {}),
    (mask.DualClip, "level", (None, "sequence"), ("group",), {}),
    (mask.Cap, "max", (1.0, math.inf), (-TINY, 0.0, 1 - TINY), {}),
    (mask.Cap, "min", (0.0, 1.0), (-TINY, 1.1), {"max": 1.0}),
    (mask.Truncate, "max", (1.0, math.inf), (-TINY, 0.0, 1 - TINY), {}),
    (mask.Truncate, "min", (0.0, 1.0), (-TINY, 1.1), {"max": 1.0}),
    (mask.Truncate, "apply", ("cap", "weight"), ("drop",), {}),
    (mask.Reject, "min", (0.0, 1.0), (-TINY, 1 + TINY, 2.1), {"max": 2.0}),
    (mask.Reject, "max", (1.0, math.inf), (0.4, 1 - TINY, -TINY), {"min": 0.5}),
    (mask.ProbabilityBand, "min", (0.0, 0.5), (-TINY, 0.6), {"max": 0.5}),
    (mask.ProbabilityBand, "max", (0.5, 1.0), (0.4, 1 + TINY), {"min": 0.5}),
    (mask.DropTruncated, "reasons", (("stop",), ("length", "aborted")), (("ends",),), {}),
    (mask.SoftGate, "tau_pos", (TINY,), (0.0,), {}),
    (mask.SoftGate, "tau_neg", (TINY,), (0.0,), {}),
    (mask.SoftGate, "level", (None, "token"), ("tokens",), {}),
    (mask.InnerClip, "low", (0.0,), (-TINY,), {}),
    (mask.InnerClip, "high", (0.0,), (-TINY,), {}),
    (mask.Divergence, "low", (0.0, 1.0), (-TINY, 1.0 + TINY), {}),
    (mask.Divergence, "high", (0.0, 1.0), (-TINY, 1.0 + TINY), {}),
    (mask.Divergence, "high", (1.0, 9.0), (-TINY,), {"kind": "kl"}),
    (mask.Divergence, "kind", ("tv", "kl"), ("js",), {}),
    (mask.TopEntropy, "share", (TINY, 1.0), (0.0, 1 + TINY), {}),
    (mask.Disagreement, "max", (0.0,), (-TINY,), {}),
    (mask.Disagreement, "per", ("token", "mean", "sum", "worst"), ("group",), {}),
    (mask.Disagreement, "statistic", ("k2", "k3", "abs"), ("k1",), {}),
    (mask.SecondMoment, "tau", (0.0,), (-TINY,), {}),
    (mask.SecondMoment, "rule", ("capped", "remaining"), ("all",), {}),
    (mask.SecondMoment, "tokens", ("harmful", "all"), ("none",), {}),
    (mask.StaleNegative, "delta", (0.0,), (-TINY,), {}),
    (mask.GammaTaper, "pos", ((TINY, 1.0),), ((0.0, 1.0), (1.0, 0.0), (1.0,)), {}),
    (mask.GammaTaper, "neg", ((1.0, TINY),), ((1.0, 0.0), (1.0, 1.0, 1.0)), {}),
    (mask.GammaTaper, "level", ("token", "sequence"), ("group",), {}),
    (mask.NegativeTaper, "max", (0.0,), (-TINY,), {}),
    (reference.Power, "most", (None, TINY), (0.0,), {"a": 1.0}),
    (reference.Power, "a", (0.0, 2.0), (-TINY,), {}),
    (reference.Saturating, "gamma", (TINY,), (0.0,), {}),
    (regularizer.KL, "max_log_ratio", (None, TINY), (0.0,), {}),
    (regularizer.KL, "estimator", ("k2", "k3", "k3_of_to"), ("k1", "full"), {}),
    (regularizer.KL, "estimator", ("k1", "k2", "k3"), ("k3_of_to",), {"ratio": "token"}),
    (regularizer.KL, "level", ("token",), ("sequence",), {"ratio": "token"}),
    (regularizer.FullKL, "direction", ("reverse", "forward"), ("both",), {}),
    (regularizer.JensenShannon, "beta", (TINY, 1 - TINY), (0.0, 1.0), {}),
    (value.Towards, "f", ("logistic", "squared"), ("hinge",), {}),
    (value.Return, "clip", (None, TINY), (0.0,), {}),
    (buffer.Buffer, "size", (1,), (0,), {}),
    (buffer.Buffer, "order", ("newest", "oldest"), ("random",), {}),
    (buffer.Buffer, "rollouts", ("keep", "drop"), ("join",), {}),
    (buffer.Buffer, "missing", ("keep", "error"), ("drop",), {}),
    (context.Corrupt, "rate", (0.0, 1.0), (-TINY, 1 + TINY), {"token": 9}),
    (context.Corrupt, "token", (0,), (-1,), {}),
    (control.Proportional, "clip", (TINY, 1 - TINY), (0.0, 1.0), {**NAMED, "init": 1.0, "target": 1.0, "horizon": 1.0}),
    (control.Proportional, "init", (TINY,), (0.0,), {**NAMED, "target": 1.0, "horizon": 1.0}),
    (control.Proportional, "target", (TINY,), (0.0,), {**NAMED, "init": 1.0, "horizon": 1.0}),
    (control.Proportional, "horizon", (TINY,), (0.0,), {**NAMED, "init": 1.0, "target": 1.0}),
    (gate.Add, "demos_per_step", (0,), (-1,), {}),
    (gate.Unsolved, "at_most", (-1, 0), (-2,), {}),
    (gate.Unsolved, "rollouts", ("drop", "keep"), ("join",), {}),
    (gate.Unsolved, "missing", ("keep", "error"), ("drop",), {}),
    (pairs.BestWorst, "gap", (0.0,), (-TINY,), {}),
    (pairs.GivenAgainstSampled, "chosen", ("given", "better"), ("own",), {}),
    (pairs.GivenAgainstSampled, "missing", ("drop", "error"), ("keep",), {}),
    (schedule.Linear, "begin", (0.0, 0.4), (-TINY, 0.5, 0.6), {"start": 1.0, "end": 0.0, "until": 0.5}),
    (schedule.Linear, "until", (0.6, 1.0), (0.5, 1 + TINY), {"start": 1.0, "end": 0.0, "begin": 0.5}),
    (schedule.Cosine, "begin", (0.0, 0.4), (-TINY, 0.5), {"start": 1.0, "end": 0.0, "until": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "setting", "taken", "refused", "more"), BOUNDS, ids=[f"{b[0].__name__}.{b[1]}{i}" for i, b in enumerate(BOUNDS)])
def test_the_last_value_taken_and_the_first_refused(make: Make, setting: str, taken: Any, refused: Any, more: dict[str, Any]) -> None:
    base = {**({"label_smoothing": 1e-3} if more.get("f") == "reverse_kl" and make is advantage.Pairwise else {}), **more}
    for good in taken:
        make(**{**base, setting: good})
    for bad in refused:
        with pytest.raises(ValueError, match=r"\w"):
            make(**{**base, setting: bad})


# -- one method's scale is not another's --------------------------------------------------------------------------------------------
CLIP, CAP = "streams.rollouts.masks.clip", "streams.rollouts.masks.cap"


@pytest.mark.parametrize(
    ("loss", "override", "reason"),
    [
        ("gspo", f"{CLIP}.high=0.2", "high=0.2 is a range for the ratio of a token; the geometric mean over an answer"),
        ("gspo", f"{CLIP}.low=0.1", "low=0.1 is a range for the ratio of a token"),
        ("gspo_token", f"{CLIP}.high=0.28", "3e-4 and 4e-4 are GSPO's"),
        ("grpo", "streams.rollouts.likelihood.ratio=sequence_geometric", "low=0.2 is a range for the ratio of a token"),
        ("grpo", f"{CLIP}.level=sequence_geometric", "low=0.2 is a range for the ratio of a token"),
        ("grpo", f"{CLIP}.high=0.0004", "high=0.0004 is a range for the geometric mean.*0.2 is usual"),
        ("luspo", "streams.rollouts.likelihood.ratio=token", "low=0.002 is a range for the geometric mean"),
        ("dapo", f"{CLIP}.high=1.28", "high=1.28 is a distance from 1, so ratios up to 2.28 would be kept; write 0.28 for 1.28"),
        ("cispo", f"{CAP}.max=0.2", "max=0.2 is the largest ratio itself, not a distance from 1, and would act on every token; write 1.2"),
        ("cispo", f"{CAP}.min=1.2", "min=1.2 is the smallest ratio itself"),
        ("tis", "streams.rollouts.masks.tis.max=0.5", "max=0.5 is the largest ratio itself"),
        ("icepop", "streams.rollouts.masks.reject.max=0.5", "max=0.5 is the largest ratio itself"),
    ],
)
def test_a_value_on_the_scale_of_another_method_is_refused(loss: str, override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(loss, [override])


@pytest.mark.parametrize(
    ("loss", "overrides"),
    [
        ("gspo", (f"{CLIP}.low=1", f"{CLIP}.high=inf")),
        ("gspo", (f"{CLIP}.low=0.0999", f"{CLIP}.high=0")),
        ("grpo", (f"{CLIP}.low=0.01", f"{CLIP}.high=0.999")),
        ("grpo", ("streams.rollouts.likelihood.ratio=sequence",)),
        ("grpo", (f"{CLIP}.high={{_target_: posttrain.mixture.schedule.Linear, start: 1.5, end: 0.001}}",)),
        ("cispo", (f"{CAP}.max=1",)),
    ],
)
def test_what_a_scale_allows_is_taken(loss: str, overrides: tuple[str, ...]) -> None:
    """A side that is switched off, a range just inside, the product of an answer's ratios, and schedules, which are nobody's scale."""
    assert load(loss, overrides).streams["rollouts"]
