"""Rewards: plain functions, verified answers, and the pool that runs them.  Names load on first use: worker processes start fast."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "RewardPool": "pool",
    "RewardBudgetError": "pool",
    "Sum": "combine",
    "Product": "combine",
    "Gate": "combine",
    "Combiner": "combine",
    "Reward": "base",
    "Judge": "judge",
    "Majority": "group",
    "Kinds": "group",
    "Noisy": "group",
    "PairJudge": "judge",
    "Labels": "judge",
    "Said": "judge",
    "MathVerify": "math",
    "Exact": "rules",
    "Numeric": "rules",
    "Choice": "rules",
    "Format": "rules",
    "SoftOverlong": "rules",
    "LengthBudget": "rules",
    "Behind": "rules",
    "WorldVerifier": "rules",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
