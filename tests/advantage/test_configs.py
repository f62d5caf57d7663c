"""Every file of ``configs/advantage`` builds the estimator its comment promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

import posttrain
from posttrain.advantage import (
    Among,
    BatchScale,
    BatchWhiten,
    BestMinusSecond,
    BetaNorm,
    Chain,
    Constant,
    DropOutliers,
    Extremes,
    FreeBaseline,
    GreedyBaseline,
    GroupAdvantage,
    LiveGroups,
    PerReward,
    Placed,
    PositivePart,
    PromptBaseline,
    Reward,
    RunningBaseline,
)
from posttrain.advantage.exits import Progress, Serial
from posttrain.advantage.shape import ByDirection, Diverse, ScaleBy, TailRisk, TrustMix

FOLDER = Path(posttrain.__file__).parents[1] / "configs" / "advantage"
EXPECTED = {
    "shortest": Among(),
    "group_norm": GroupAdvantage(),
    "group_center": GroupAdvantage(scale="none"),
    "loo": GroupAdvantage("loo", "none", singleton="error"),
    "reward": Reward(),
    "win_probability": Reward(0.5),
    "batch_whiten": BatchWhiten(),
    "group_center_whiten": Chain({"center": GroupAdvantage(scale="none"), "whiten": BatchWhiten()}),
    "length_weighted": GroupAdvantage("length_weighted", "none"),
    "group_over_mean": GroupAdvantage("mean", "mean"),
    "group_center_live": Chain({"center": GroupAdvantage(scale="none"), "live": LiveGroups()}),
    "group_center_batch_std": Chain({"center": GroupAdvantage(scale="none"), "scale": BatchScale()}),
    "beta_norm": BetaNorm(),
    "per_reward": Chain({"rewards": PerReward(), "whiten": BatchWhiten("sequences")}),
    "best_minus_second": BestMinusSecond(),
    "greedy": GreedyBaseline(),
    "running_baseline": RunningBaseline(),
    "directed": Chain({"direct": ByDirection(), "one": Constant(unscored=False), "best": Extremes(best=1, worst=0)}),
    "diverse": Chain({"shape": Diverse(), "center": GroupAdvantage(scale="none")}),
    "trust_mix": Chain({"shape": TrustMix(), "norm": GroupAdvantage()}),
    "scaled": Chain({"center": GroupAdvantage(scale="none"), "scale": ScaleBy()}),
    "tail_risk": TailRisk(),
    "prompt_baseline": PromptBaseline("v_star"),
    "whiten_without_outliers": Chain({"whiten": BatchWhiten("sequences"), "outliers": DropOutliers()}),
    "best_of_k": Chain({"one": Constant(unscored=False), "best": Extremes(best=1, worst=0)}),
    "constant": Constant(),
    "placed": Placed(),
    "prefix_aware": FreeBaseline(),
    "serial": Serial(),
    "progress": Progress(),
    "termination": Progress(None, credit="to_go"),
    "positive": Chain({"reward": Reward(), "positive": PositivePart()}),
    "extremes": Chain({"center": GroupAdvantage(scale="none"), "extremes": Extremes()}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_file_builds(name: str) -> None:
    assert instantiate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), _convert_="all") == EXPECTED[name]


def test_every_file_is_expected() -> None:
    assert {p.stem for p in FOLDER.glob("*.yaml")} - {"none"} == set(EXPECTED)
