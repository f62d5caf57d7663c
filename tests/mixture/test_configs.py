"""Every file of configs/mixture composes into a gate, and none is left undocumented."""

from __future__ import annotations

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
