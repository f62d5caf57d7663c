"""Every file of configs/mixture composes into a gate, and none is left undocumented."""

from __future__ import annotations

import random
from typing import Any

import pytest

from posttrain.cli import _build, _compose
from posttrain.paths import CONFIGS

FILES = sorted(p.stem for p in (CONFIGS / "mixture").glob("*.yaml"))


def gate_of(name: str, *overrides: str) -> Any:
    from omegaconf import OmegaConf

    token = ["mixture.gate.token=3"] if name == "masked_thought" else []
    composed = _compose("train", [f"mixture={name}", "advantage=group_center", *token, *overrides])
    return _build(OmegaConf.to_container(composed, resolve=True), "")["mixture"]["gate"]


@pytest.mark.parametrize("name", FILES)
def test_a_mixture_composes(name: str) -> None:
    gate = gate_of(name)
    if name == "none":
        assert gate is None
    else:
        assert callable(gate) and isinstance(gate.uses_demos, bool)
        assert (CONFIGS / "mixture" / f"{name}.yaml").read_text().startswith("#")


def test_an_injected_demonstration_takes_the_runs_estimator() -> None:
    from posttrain.advantage import GroupAdvantage

    assert gate_of("luffy").advantage == GroupAdvantage(scale="none")
    assert gate_of("luffy", "advantage=group_norm").advantage == GroupAdvantage()


@pytest.mark.parametrize(("name", "samples"), [("prefix", 1), ("hint", None)])
def test_a_rollout_with_prefixes_composes(name: str, samples: int | None) -> None:
    from omegaconf import OmegaConf

    composed = _compose("train", [f"rollout={name}", "steps=500"])
    strategy = _build(OmegaConf.to_container(composed, resolve=True), "")["rollout"]["strategy"].bound(4)
    assert strategy.samples == samples and strategy.needs_demos and 0 <= strategy.length(random.Random(0), 0.5) <= 0.95
