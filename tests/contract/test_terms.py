"""Every term class of the loss satisfies the contract, every setting of it acts, and the checker itself catches terms that do not."""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from posttrain.loss import advantage, aggregate, likelihood, mask, reference, regularizer, value
from posttrain.mixture.schedule import Linear
from posttrain.testing.check import CheckFailed, check_parity, check_slicing, check_term, example_batch, objective_with, role_of

MODULES: dict[str, tuple[ModuleType, ...]] = {
    "likelihood": (likelihood,),
    "reference": (reference,),
    "advantage": (advantage, value),
    "mask": (mask,),
    "aggregation": (aggregate,),
    "regularizer": (regularizer,),
}


def term_classes() -> dict[str, type]:
    return {
        f"{role}.{name}": cls
        for role, modules in MODULES.items()
        for module in modules
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and not name.startswith("_")
    }


OTHER_AGGREGATION = {"streams": [("rollouts",), ()], "aggregation": [aggregate.SequenceMeanTokenSum()]}
# Settings from which every field of a class can be seen to act, and values for fields that cannot be guessed from their type.
VARIANTS: dict[str, list[Any]] = {
    "likelihood.Token": [likelihood.Token(ratio="sequence"), likelihood.Token(ratio="sequence_geometric")],
    "reference.Power": [reference.Power(0.0), reference.Power(-0.5, most=1.5), reference.Power(Linear(0.2, 1.0))],
    "reference.Saturating": [reference.Saturating(1.0, detached=True), reference.Saturating(Linear(0.1, 1.0))],
    "reference.Named": [reference.Named("behaviour"), reference.Named("base")],
    "advantage.One": [advantage.One(0.0), advantage.One(-0.5)],
    "advantage.ColumnMinusKL": [
        advantage.ColumnMinusKL(credit="sequence"),
        advantage.ColumnMinusKL(credit="own", over="self"),
        advantage.ColumnMinusKL(over="behaviour", coef=Linear(0.0, 1.0)),
        advantage.ColumnMinusKL(gamma=0.9),
    ],
    "advantage.GeneralizedAdvantage": [
        advantage.GeneralizedAdvantage(0.9, 0.5, "each"),
        advantage.GeneralizedAdvantage(0.9, 0.5, "each", earned=advantage.LogRatio("teacher", "base")),
        advantage.GeneralizedAdvantage(0.9, coef=Linear(0.0, 1.0), over="self"),
        advantage.GeneralizedAdvantage(coef=0.1, to="teacher", over="behaviour", lam_by_length=0.5),
    ],
    "advantage.GroupCenter": [
        *(advantage.GroupCenter(divide=divide) for divide in ("none", "size")),
        advantage.GroupCenter(advantage.ColumnMinusKL(Linear(0.0, 1.0), to="behaviour", over="self", credit="sequence")),
        advantage.GroupCenter(advantage.Column()),
    ],
    "advantage.Whiten": [
        advantage.Whiten(advantage.ColumnMinusKL(over="behaviour"), "sequences", False, 1, 0.1, "variance"),
        advantage.Whiten(advantage.One()),
    ],
    "advantage.LogRatio": [
        advantage.LogRatio(credit="to_go"),
        advantage.LogRatio("base", "old", "sequence", limit=0.5),
        advantage.LogRatio("self", "base", limit=0.1),
    ],
    "advantage.Pairwise": [
        advantage.Pairwise(label_smoothing=0.1),
        advantage.Pairwise(label_smoothing=0.1, debias=True),
        advantage.Pairwise(f="squared", score="log_ratio_mean"),
        advantage.Pairwise(f="hinge", score="logp_sum", beta=1.0),
        advantage.Pairwise(score="logp_mean", beta=2.0, margin=0.5),
        advantage.Pairwise(f="sigmoid", gap="reward", margin=Linear(0.0, 1.0)),
        advantage.Pairwise(f="reverse_kl", label_smoothing=1e-3),
        advantage.Pairwise(label="label"),
        advantage.Pairwise(score="logp_mean", transform="log_odds", beta=1.0),
        advantage.Pairwise(transform="power", alpha=1.0, limit=1.0),
        advantage.Pairwise(transform="power", alpha=0.5, beta=2.0),
        advantage.Pairwise(transform="log_sigmoid", shortfall=5.0),
    ],
    "advantage.Pointwise": [
        advantage.Pointwise(label="side", shift="running_mean"),
        advantage.Pointwise(f="sigmoid", shift="mismatched", good=Linear(1.0, 2.0)),
        advantage.Pointwise(f="squared", beta=0.01, bad=0.5),
        advantage.Pointwise(f="squared", label="side", score="logp_mean"),
    ],
    "advantage.Listwise": [
        advantage.Listwise(temperature=0.0),
        advantage.Listwise(of="side", f="noise_contrastive", temperature=0.0),
        advantage.Listwise(of="label", f="reverse_kl", temperature=0.3),
        advantage.Listwise(score="logp_mean", beta=1.0),
    ],
    "advantage.Towards": [value.Towards("squared", None), value.Towards("squared", "reward"), value.Towards("squared", "label")],
    "advantage.Return": [value.Return(0.05), value.Return(None), value.Return(Linear(0.1, 0.3))],
    "mask.RatioClip": [mask.RatioClip(0.05, 0.05, level="sequence_geometric"), mask.RatioClip(0.1, Linear(0.2, 0.4), over="old", to="behaviour")],
    "mask.DualClip": [mask.DualClip(1.5, level="sequence")],
    "mask.Cap": [mask.Cap(1.2), mask.Cap(1.2, level="sequence_geometric"), mask.Cap(1.2, min=0.8)],
    "mask.SoftGate": [mask.SoftGate(level="sequence_geometric"), mask.SoftGate(Linear(1.0, 2.0), 3.0)],
    "mask.InnerClip": [mask.InnerClip(0.1, Linear(0.2, 0.4)), mask.InnerClip(0.0, 0.0)],
    "mask.Divergence": [mask.Divergence(low=0.02, high=0.03), mask.Divergence("kl", 0.02, 0.01, one_sided=False)],
    "mask.Disagreement": [
        *(mask.Disagreement(max=0.05, per=per) for per in ("mean", "sum", "worst")),
        mask.Disagreement("k2", 0.02),
        mask.Disagreement("abs", Linear(0.1, 0.2), "mean", over="self"),
    ],
    "mask.SecondMoment": [
        mask.SecondMoment(0.01, "remaining"),
        mask.SecondMoment(0.02, tokens="all", over="behaviour"),
        mask.SecondMoment(Linear(0.0, 0.1)),
    ],
    "mask.StaleNegative": [mask.StaleNegative(0.01), mask.StaleNegative(Linear(0.0, 0.1), "old")],
    "mask.GammaTaper": [mask.GammaTaper((1.0, 1.0), (2.0, 1.0), "behaviour", level="token")],
    "mask.NegativeTaper": [mask.NegativeTaper(0.7, "old", level="token"), mask.NegativeTaper(Linear(0.5, 1.0), "base")],
    "mask.TopEntropy": [mask.TopEntropy(1.0), mask.TopEntropy(Linear(0.5, 1.0))],
    "mask.Truncate": [mask.Truncate(1.1, apply="weight", min=0.9), mask.Truncate(1.1, level="sequence"), mask.Truncate(float("inf"))],
    "mask.Reject": [mask.Reject(0.9, 1.1), mask.Reject(0.99, 1.01, level="sequence_geometric"), mask.Reject(0.0, float("inf"))],
    "aggregation.Constant": [aggregate.Constant(7.5), aggregate.Constant(100.0, "step")],
    "aggregation.TokenMean": [aggregate.TokenMean(d) for d in ("weight_sum", "joint", "kept")],
    "regularizer.KL": [
        regularizer.KL("k2", coef=0.5, ratio="token"),
        regularizer.KL("k3", coef=0.5, ratio="token", over="behaviour"),
        regularizer.KL("k1", ratio="token"),
        regularizer.KL("k1", force=True),
        regularizer.KL("k2", coef=0.5, ratio="prefix"),
        regularizer.KL("k3", coef=0.5, ratio="prefix", over="behaviour"),
        regularizer.KL("k3_of_to", "old", coef=0.5),
        regularizer.KL("k2", level="sequence"),
        regularizer.KL("k3", level="sequence", max_log_ratio=2.0),
        regularizer.KL("k3", max_log_ratio=0.5, aggregation=aggregate.SequenceMeanTokenSum(), streams=("rollouts",)),
    ],
    "regularizer.FullKL": [regularizer.FullKL("forward", "teacher", Linear(0.0, 1.0))],
    "regularizer.JensenShannon": [regularizer.JensenShannon(0.1, "base", Linear(0.0, 1.0))],
    "regularizer.Entropy": [regularizer.Entropy(-0.1), regularizer.Entropy(Linear(1.0, 0.0))],
}
ALTERNATIVES: dict[str, dict[str, list[Any]]] = {
    "advantage.ColumnMinusKL": {"gamma": [0.5]},
    "advantage.GeneralizedAdvantage": {"gamma": [0.5], "lam": [0.5], "coef": [0.5], "lam_by_length": [0.7], "earned": [None]},
    "advantage.GroupCenter": {"inner": [advantage.Column()]},
    "advantage.Whiten": {"inner": [advantage.ColumnMinusKL()], "ddof": [1], "eps": [0.5]},
    "advantage.Pairwise": {"label": ["label"], "gap": ["reward"], "limit": [0.2, 0.5]},
    "advantage.Pointwise": {"label": ["side"]},
    "advantage.Listwise": {"of": ["side", "label"]},
    "advantage.Return": {"clip": [0.05, 0.5]},
    "advantage.Towards": {"label": ["reward", None]},
    "regularizer.PairCentre": {"streams": [()], "aggregation": OTHER_AGGREGATION["aggregation"]},
    "reference.Power": {"most": [0.5]},
    "advantage.LogRatio": {"limit": [0.1]},
    "mask.ProbabilityBand": {"min": [0.3, 0.6], "max": [0.3, 0.6]},
    "mask.DropTruncated": {"reasons": [("stop",), ()]},
    "mask.DualClip": {"c": [1.2, 2.0, 8.0]},
    "mask.Cap": {"min": [0.9, 1.1]},
    "mask.Truncate": {"min": [0.9, 1.05]},
    "mask.GammaTaper": {"pos": [(1.0, 2.0)], "neg": [(1.0, 1.0)]},
    "mask.NegativeTaper": {"max": [0.5]},
    "mask.StaleNegative": {"delta": [0.0, 0.05, 0.2]},
    "mask.SecondMoment": {"tau": [0.0, 0.001, 0.01]},
    "mask.InnerClip": {"low": [0.01, 0.2], "high": [0.01, 0.2]},
    "regularizer.KL": {"streams": [()], "aggregation": OTHER_AGGREGATION["aggregation"], "max_log_ratio": [0.1, 0.3]},
    "regularizer.FullKL": {"streams": [()], "aggregation": OTHER_AGGREGATION["aggregation"], "to": ["teacher"]},
    "regularizer.JensenShannon": {"streams": [()], "aggregation": OTHER_AGGREGATION["aggregation"], "to": ["base"], "beta": [0.25]},
    "regularizer.Entropy": {"streams": [()], "aggregation": OTHER_AGGREGATION["aggregation"]},
}
REQUIRED = {"aggregation.Constant": {"length": 100.0}}


@pytest.mark.parametrize("name", term_classes())
def test_term_satisfies_the_contract(name: str) -> None:
    term = term_classes()[name](**REQUIRED.get(name, {}))
    check_term(term, *VARIANTS.get(name, []), alternatives=ALTERNATIVES.get(name))


@pytest.mark.parametrize("name", term_classes())
def test_term_is_frozen_documented_and_knows_its_role(name: str) -> None:
    cls = term_classes()[name]
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    doc = inspect.getdoc(cls) or ""
    for part in ("Equation:", "Source:", "Wrong when:"):
        assert part in doc, f"{name}'s docstring has no {part!r}"
    for field in dataclasses.fields(cls):
        if field.name not in ("streams", "aggregation", "force"):
            assert f"``{field.name}``" in doc or f"``{field.name}=" in doc, f"{name}'s docstring does not say what {field.name} does"
    term = cls(**REQUIRED.get(name, {}))
    assert role_of(term) == name.split(".")[0]
    assert isinstance(term.formula, str)


def test_the_walk_finds_every_term() -> None:
    assert len(term_classes()) >= 24
    assert set(VARIANTS) | set(ALTERNATIVES) | set(REQUIRED) <= set(term_classes())


# -- the checker catches what it claims to catch ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Halve:
    """A correct mask: halves the weight of tokens more probable than ``above``."""

    above: float = 0.5

    def factor(self, view, advantage):
        return torch.where(view.logp.exp() > self.above, 0.5, 1.0).to(view.logp.dtype)


class WrongShape(Halve):
    def factor(self, view, advantage):
        return torch.ones(view.num_sequences, dtype=view.logp.dtype)


class Gradient(Halve):
    def factor(self, view, advantage):
        return torch.ones_like(view.logp, requires_grad=True)


class NotANumber(Halve):
    def factor(self, view, advantage):
        return torch.where(view.logp < -1, torch.nan, 1.0).to(view.logp.dtype)


class Negative(Halve):
    def factor(self, view, advantage):
        return view.logp


class OrderDependent(Halve):
    def factor(self, view, advantage):
        return torch.linspace(0, 1, len(view.logp), dtype=view.logp.dtype)


class CoupledInSecret(Halve):
    def factor(self, view, advantage):
        return torch.full_like(view.logp, float(view.select(view.logp).exp().sum()))


class ReadsInSecret(Halve):
    def factor(self, view, advantage):
        return (view.log_ratio("teacher") > 0).to(view.logp.dtype)


class DeclaresTooMuch(Halve):
    needs = frozenset({"teacher"})


@dataclasses.dataclass(frozen=True)
class DeadKnob(Halve):
    strength: float = 1.0


@dataclasses.dataclass(frozen=True)
class Overflows:
    needs = frozenset({"base"})

    def factor(self, view, advantage):
        return torch.exp(view.log_ratio("base")) / (torch.exp(view.log_ratio("base")) + 1e-3)


@dataclasses.dataclass(frozen=True)
class Unpicklable:
    rule: Any = dataclasses.field(default=lambda p: p, compare=False)

    def factor(self, view, advantage):
        return self.rule(view.logp.exp())


@dataclasses.dataclass(frozen=True)
class WrongSlope:
    coef: float = 0.1

    def gradient(self, view):
        return 2 * view.logp

    def penalty(self, view):
        return view.logp**2 / 2


def test_a_correct_plug_in_passes() -> None:
    check_term(Halve())


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        (WrongShape(), "shape"),
        (Gradient(), "carries a gradient"),
        (NotANumber(), "NaN"),
        (Negative(), "negative"),
        (OrderDependent(), "order"),
        (CoupledInSecret(), "must declare coupling"),
        (ReadsInSecret(), "does not declare"),
        (DeclaresTooMuch(), "without it"),
        (DeadKnob(), "changes nothing"),
        (Overflows(), "NaN"),
        (Unpicklable(), "pickled"),
        (WrongSlope(), "derivative"),
        (object(), "no term"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x.replace(" ", "-"),
)
def test_the_checker_catches(term: Any, reason: str) -> None:
    with pytest.raises(CheckFailed, match=reason):
        check_term(term)


def test_check_parity_tells_right_from_wrong() -> None:
    batch = example_batch()
    objective = objective_with(reference.Unit())
    on = objective.views(batch)["rollouts"].on
    weight = batch.weight * batch.advantage / int(on.sum())
    check_parity(objective, batch, lambda logp: (weight * logp.exp())[on].sum())
    with pytest.raises(CheckFailed, match="autograd of the formula"):
        check_parity(objective, batch, lambda logp: (weight * logp)[on].sum())
    with pytest.raises(CheckFailed, match="nothing was compared"):
        check_parity(objective, batch, lambda logp: 0.0 * logp[on].sum())


def test_check_slicing_reports_a_cut_group() -> None:
    batch = example_batch()
    check_slicing(objective_with(aggregate.GroupMeanTokenMean()), batch)
    check_slicing(objective_with(aggregate.GroupMeanTokenMean()), batch, [[0, 5], [1, 4], [2, 3, 6, 7, 8]])
    with pytest.raises(CheckFailed, match="exactly once"):
        check_slicing(objective_with(aggregate.TokenMean()), batch, [[0, 1]])


def test_the_order_of_sequences_in_a_group_is_irrelevant_to_live_terms() -> None:
    batch, objective = example_batch(), objective_with(advantage.Pairwise())
    order = [3, 2, 8, 1, 0, 7, 5, 6, 4]
    torch.testing.assert_close(objective.weights(batch.take(order)), objective.weights(batch)[batch.columns_of(order)], rtol=1e-12, atol=0)
