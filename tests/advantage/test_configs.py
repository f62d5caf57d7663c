"""Every file of ``configs/advantage`` builds the estimator its comment promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

import posttrain
from posttrain.advantage import BatchWhiten, Chain, GroupAdvantage, Reward

FOLDER = Path(posttrain.__file__).parents[1] / "configs" / "advantage"
EXPECTED = {
    "group_norm": GroupAdvantage(),
    "group_center": GroupAdvantage(scale="none"),
    "loo": GroupAdvantage("loo", "none", singleton="error"),
    "reward": Reward(),
    "batch_whiten": BatchWhiten(),
    "group_center_whiten": Chain({"center": GroupAdvantage(scale="none"), "whiten": BatchWhiten()}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_file_builds(name: str) -> None:
    assert instantiate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), _convert_="all") == EXPECTED[name]


def test_every_file_is_expected() -> None:
    assert {p.stem for p in FOLDER.glob("*.yaml")} - {"none"} == set(EXPECTED)
