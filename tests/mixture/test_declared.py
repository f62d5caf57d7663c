"""What terms, estimators and gates say of themselves: how a step may be cut, what is filled for them, what must stand beside them.

Too little is an error elsewhere; too much costs passes, or refuses what would work.  A change of this table is meant, or it is a mistake.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from inspect import isclass
from types import FunctionType
from typing import Any

NAMES = (
    "coupling", "live", "needs", "contexts", "remembers", "head", "reads_column", "constant", "column", "sign",
    "uses_demos", "makes_pairs", "makes_demos", "separate_step", "needs_group", "needs_exits", "needs_greedy", "needs_continuations", "adds_text",
)  # fmt: skip
DECLARED: dict[str, dict[str, Any]] = {
    "loss.advantage.Column": {"reads_column": True},
    "loss.advantage.ColumnMinusKL": {"coupling": "sequence", "reads_column": True},
    "loss.advantage.GeneralizedAdvantage": {"coupling": "sequence"},
    "loss.advantage.GroupCenter": {"live": True},
    "loss.advantage.Listwise": {"coupling": "group", "live": True},
    "loss.advantage.One": {"constant": True},
    "loss.advantage.Pairwise": {"coupling": "group", "live": True},
    "loss.advantage.Pointwise": {"live": True},
    "loss.advantage.Whiten": {"coupling": "batch", "live": True},
    "loss.aggregate.GroupMeanTokenMean": {"coupling": "group", "live": True},
    "loss.aggregate.GroupSumTokenMean": {"coupling": "sequence"},
    "loss.aggregate.PairTokenMean": {"coupling": "sequence"},
    "loss.aggregate.SequenceMeanTokenMean": {"coupling": "sequence"},
    "loss.likelihood.Score": {"head": "scalar"},
    "loss.mask.DropDeadGroups": {"coupling": "group", "live": True},
    "loss.mask.InnerClip": {"coupling": "sequence"},
    "loss.mask.ProbabilityBand": {"live": True},
    "loss.mask.SecondMoment": {"coupling": "batch", "live": True},
    "loss.mask.TopEntropy": {"coupling": "batch", "live": True, "needs": {"entropy"}},
    "loss.regularizer.Entropy": {"column": "entropy", "sign": -1.0},
    "loss.regularizer.FullKL": {"sign": 1.0},
    "loss.regularizer.JensenShannon": {"sign": 1.0},
    "loss.regularizer.KL": {"live": True},
    "loss.regularizer.PairCentre": {"coupling": "group", "live": True, "head": "scalar"},
    "loss.value.Return": {"coupling": "token", "live": True, "head": "scalar", "reads_column": True},
    "loss.value.Towards": {"coupling": "token", "live": True, "head": "scalar"},
    "advantage.exits.Progress": {"needs_exits": True},
    "advantage.exits.Serial": {"needs_exits": True},
    "advantage.pick.Among": {"needs_group": True},
    "advantage.pick.BestMinusSecond": {"needs_group": True},
    "advantage.pick.Extremes": {"needs_group": True},
    "advantage.pick.GreedyBaseline": {"needs_greedy": True},
    "advantage.plain.FreeBaseline": {"needs_group": True},
    "mixture.buffer.Buffer": {"uses_demos": True, "separate_step": True},
    "mixture.context.Corrupt": {"uses_demos": False},
    "mixture.feasible.Feasible": {"uses_demos": False, "makes_pairs": True},
    "mixture.gate.Inject": {"uses_demos": True},
    "mixture.gate.PassThrough": {"uses_demos": False},
    "mixture.gate.Unsolved": {"uses_demos": True},
    "mixture.pairs.BestWorst": {"uses_demos": False, "makes_pairs": True},
    "mixture.pairs.GivenAgainstSampled": {"uses_demos": True, "makes_pairs": True},
    "mixture.rejection.Rejection": {"uses_demos": False, "makes_pairs": True},
    "mixture.route.FirstAccepted": {"uses_demos": True},
    "mixture.route.RightOnly": {"uses_demos": True},
    "mixture.steps.FirstBadStep": {"uses_demos": False, "makes_pairs": True, "needs_continuations": True},
    "mixture.tagged.OutcomeTag": {"uses_demos": False, "makes_demos": True},
    "mixture.thoughts.BeforeText": {"uses_demos": False, "adds_text": True},
    "mixture.turns.WithoutCritique": {"uses_demos": False, "makes_demos": True},
}


def told(cls: type) -> dict[str, Any]:
    """The declarations that stand in the class itself; those that depend on settings are properties, and tested where they act."""
    own = {name: vars(cls)[name] for name in NAMES if name in vars(cls) and name not in getattr(cls, "__dataclass_fields__", {})}
    return {name: value for name, value in own.items() if not isinstance(value, (property, FunctionType))}


def test_declarations_are_those_of_the_table() -> None:
    found = {}
    for package in ("loss", "advantage", "mixture"):
        for module in pkgutil.iter_modules(import_module(f"posttrain.{package}").__path__):
            home = import_module(f"posttrain.{package}.{module.name}")
            for name, cls in vars(home).items():
                if isclass(cls) and cls.__module__ == home.__name__ and not name.startswith("_") and (said := told(cls)):
                    found[f"{package}.{module.name}.{name}"] = said
    assert found == DECLARED
