"""Every term of posttrain.contrib satisfies the same contract as those of posttrain.loss."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pkgutil
from importlib import import_module
from typing import Any

import pytest

from posttrain import contrib
from posttrain.contrib.baseline import TokenBaseline
from posttrain.contrib.classification import GroupClassification
from posttrain.contrib.constrained import DriftDiscounted
from posttrain.contrib.contrast import MatrixContrast
from posttrain.contrib.covariance import CovarianceDrop, CovariancePenalty
from posttrain.contrib.future import FutureRatio
from posttrain.contrib.game import WinAgainstMixture
from posttrain.contrib.gated import GatedKL
from posttrain.contrib.guided import AdvantageSaturating, DropImprobable
from posttrain.contrib.information import InformationGain
from posttrain.contrib.outcome import ByReward, EntropyExponential, TurnReward
from posttrain.contrib.preference import (
    LogisticExponential,
    PairFactor,
    PairProbability,
    SelfLabelled,
    SharedLength,
    SortedMargins,
    SteeperPairs,
)
from posttrain.contrib.process import ImplicitProcessReward
from posttrain.contrib.soft_q import TemporalDifference
from posttrain.contrib.supervised import LossSoftmax, MarginalShare, OwnLabel, RatioSlope, SuffixLoss
from posttrain.loss import aggregate, mask
from posttrain.loss.advantage import Column, ColumnMinusKL, One, Pairwise
from posttrain.mixture.schedule import Linear
from posttrain.testing.check import check_term

MODULES = [import_module(f"posttrain.contrib.{found.name}") for found in pkgutil.iter_modules(contrib.__path__)]
TERMS = {
    f"{module.__name__.rsplit('.', 1)[1]}.{name}": cls
    for module in MODULES
    for name, cls in vars(module).items()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls) and not name.startswith("_")
    if not hasattr(cls, "begin")  # a controller is no term
}
# Settings from which every field of a class can be seen to act, and values for fields that cannot be guessed from their type.
VARIANTS: dict[str, list[Any]] = {
    "baseline.TokenBaseline": [
        TokenBaseline(alone="zero"),
        TokenBaseline(ColumnMinusKL(Linear(0.0, 1.0), over="behaviour")),
        TokenBaseline(ColumnMinusKL(over="self", credit="sequence"), "zero"),
    ],
    "classification.GroupClassification": [GroupClassification("base", 2.0)],
    "contrast.MatrixContrast": [MatrixContrast("label", "reward", "label", "logp_mean"), MatrixContrast("reward", "label", "label")],
    "soft_q.TemporalDifference": [TemporalDifference(Linear(0.5, 1.0), 0.5)],
    "constrained.DriftDiscounted": [DriftDiscounted(Linear(1.0, 5.0), 1.0), DriftDiscounted(2.0, center=False)],
    "covariance.CovarianceDrop": [
        CovarianceDrop(0.3, -5.0, 5.0),
        CovarianceDrop(0.3, -1.0, Linear(0.5, 1.0), clip=mask.RatioClip(0.01, 0.01)),
    ],
    "covariance.CovariancePenalty": [CovariancePenalty(0.5, 0.2, "behaviour"), CovariancePenalty(0.5, Linear(0.5, 1.0))],
    "gated.GatedKL": [
        GatedKL(-0.5, 2.0),
        GatedKL(Linear(-2.0, -1.0), 2.0, "behaviour", 0.0, 0.2, 0.5, 0.3),
        GatedKL(-1.0, Linear(0.0, 1.0), decay=0.0, certain=0.1),
    ],
    "game.WinAgainstMixture": [WinAgainstMixture(1.0), WinAgainstMixture(Linear(0.0, 1.0), "behaviour")],
    "information.InformationGain": [InformationGain("behaviour", "none"), InformationGain(limit=0.3)],
    "future.FutureRatio": [FutureRatio(2.0, 0.5, 3.0, 1.1, 1.05), FutureRatio(1.0, 0.8, Linear(1.0, 1.5), to="behaviour")],
    "preference.PairFactor": [PairFactor("label", 0.0)],
    "preference.PairProbability": [PairProbability(0.0), PairProbability(Linear(0.0, 2.0)), PairProbability(alignment="sampled"), PairProbability(0.5, "sampled", 0.2)],
    "preference.SharedLength": [SharedLength(0.0), SharedLength(1.0, "old", 0.3)],
    "preference.SortedMargins": [SortedMargins("sides", beta=0.5)],
    "preference.LogisticExponential": [LogisticExponential(1.0, "teacher", Linear(0.05, 0.2))],
    "preference.SteeperPairs": [SteeperPairs(Pairwise(f="hinge", margin=0.2), "label"), SteeperPairs(Pairwise("squared"), "label")],
    "preference.SelfLabelled": [SelfLabelled(Pairwise(margin=0.3, gap="reward"), 0.5)],
    "guided.AdvantageSaturating": [AdvantageSaturating(-1.0, 1.0, -0.5, 0.5, 2.0), AdvantageSaturating(-1.0, 1.0, 0.1, 0.3)],
    "guided.DropImprobable": [DropImprobable(0.5)],
    "supervised.OwnLabel": [OwnLabel(Linear(0.0, 0.5))],
    "outcome.ByReward": [ByReward(EntropyExponential(), threshold=0.2), ByReward(Column(), metric="label", threshold=0.5)],
    "outcome.EntropyExponential": [EntropyExponential(0.1, 1.0), EntropyExponential(Linear(0.0, 1.0))],
    "outcome.TurnReward": [TurnReward(kl=(0.1, 0.0)), TurnReward(kl=(0.5, 0.5), over="self"), TurnReward(("label",), ((2.0,),))],
    "supervised.LossSoftmax": [LossSoftmax("quadratic", 0.3), LossSoftmax("extremes", Linear(0.2, 1.0)), LossSoftmax(r=math.inf)],
    "supervised.MarginalShare": [MarginalShare(1.0), MarginalShare(Linear(0.1, 0.5))],
    "supervised.RatioSlope": [
        RatioSlope("identity", "sum"),
        RatioSlope("pearson", beta=0.5, scale=Linear(1.0, 2.0)),
        RatioSlope("hellinger", beta=0.05),
    ],
    "supervised.SuffixLoss": [SuffixLoss(detach=True), SuffixLoss(0.0), SuffixLoss(1.0)],
    "process.ImplicitProcessReward": [ImplicitProcessReward("old", "behaviour", 0.3, Linear(1.0, 0.0), 0.0)],
}
ALTERNATIVES: dict[str, dict[str, list[Any]]] = {
    "baseline.TokenBaseline": {"inner": [ColumnMinusKL()]},
    "game.WinAgainstMixture": {"of": ["label"]},
    "preference.PairProbability": {"limit": [0.1, 0.3]},
    "contrast.MatrixContrast": {"rows": ["reward"], "columns": ["label"], "right": ["label"], "score": ["logp_mean"]},
    "soft_q.TemporalDifference": {"streams": [()], "aggregation": [aggregate.SequenceMeanTokenSum()], "gamma": [0.5]},
    "constrained.DriftDiscounted": {"most": [0.5], "of": ["label"], "to": ["old"], "limit": [1.0, 3.0]},
    "guided.AdvantageSaturating": {"low": [-0.5], "high": [0.5], "most": [1.0, 1.5], "at_low": [-0.7], "at_high": [0.7]},
    "guided.DropImprobable": {"min": [0.3, 0.6]},
    "supervised.OwnLabel": {"streams": [()], "aggregation": [aggregate.SequenceMeanTokenSum()]},
    "outcome.ByReward": {"right": [One(0.5)], "wrong": [One(0.5)], "metric": ["label"], "threshold": [0.2]},
    "outcome.EntropyExponential": {"sign": [1.0]},
    "outcome.TurnReward": {"rewards": [("label", "reward")], "weights": [((0.0, 1.0),)], "kl": [(0.3, 0.0)], "to": ["teacher"], "over": ["behaviour"]},
    "supervised.SuffixLoss": {"gamma": [0.5]},
    "covariance.CovarianceDrop": {"clip": [None, mask.RatioClip(0.01, 0.01)], "seed": [1, 2, 3], "low": [0.0], "high": [0.0, 0.1]},
    "covariance.CovariancePenalty": {"streams": [()], "aggregation": [aggregate.SequenceMeanTokenSum()]},
    "gated.GatedKL": {"streams": [()], "aggregation": [aggregate.SequenceMeanTokenSum()], "to": ["old", "teacher"], "least": [2.0]},
    "preference.SteeperPairs": {"inner": [Pairwise(beta=0.2)]},
    "preference.SelfLabelled": {"inner": [Pairwise(beta=0.2)]},
    "future.FutureRatio": {"low": [0.9, 1.05], "high": [1.05], "ignore": [1.0, 1.2], "spare": [1.0], "half_life": [0.5, 64.0]},
}
REQUIRED: dict[str, dict[str, Any]] = {
    "preference.SteeperPairs": {"by": "label"},
    "preference.PairFactor": {"by": "label"},
    "contrast.MatrixContrast": {"rows": "label", "columns": "reward"},
}


@pytest.mark.parametrize("name", TERMS)
def test_term_satisfies_the_contract(name: str) -> None:
    check_term(TERMS[name](**REQUIRED.get(name, {})), *VARIANTS.get(name, []), alternatives=ALTERNATIVES.get(name))


@pytest.mark.parametrize("name", TERMS)
def test_term_is_frozen_and_documented(name: str) -> None:
    cls = TERMS[name]
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    doc = inspect.getdoc(cls) or ""
    for part in ("Equation:", "Source:", "Wrong when:"):
        assert part in doc, f"{name}'s docstring has no {part!r}"
    for field in dataclasses.fields(cls):
        assert f"``{field.name}``" in doc or f"``{field.name}=" in doc, f"{name}'s docstring does not say what {field.name} does"
    assert isinstance(cls(**REQUIRED.get(name, {})).formula, str)


def test_the_tables_name_terms_there_are() -> None:
    assert set(VARIANTS) | set(ALTERNATIVES) | set(REQUIRED) <= set(TERMS)
