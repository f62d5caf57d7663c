"""Rewards -> advantages, on the controller, before the batch is packed.  An estimator is a callable ``groups -> groups``."""

from posttrain.advantage.group import BatchWhiten, Chain, GroupAdvantage, Reward, statistics
from posttrain.advantage.pick import (
    Among,
    BestMinusSecond,
    DropRepeats,
    Extremes,
    GreedyBaseline,
    PromptBaseline,
    RunningBaseline,
    soft_maximum,
)
from posttrain.advantage.plain import Constant, FreeBaseline, Placed, PositivePart
from posttrain.advantage.step import BatchScale, BetaNorm, DropOutliers, LiveGroups, PerReward

__all__ = [
    "Among",
    "BatchScale",
    "BatchWhiten",
    "BestMinusSecond",
    "BetaNorm",
    "Chain",
    "Constant",
    "DropOutliers",
    "DropRepeats",
    "Extremes",
    "FreeBaseline",
    "GreedyBaseline",
    "GroupAdvantage",
    "LiveGroups",
    "PerReward",
    "Placed",
    "PositivePart",
    "PromptBaseline",
    "Reward",
    "RunningBaseline",
    "soft_maximum",
    "statistics",
]
