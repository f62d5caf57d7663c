"""Every recipe and every choice of every group composes, builds, and passes the checks with a small model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from posttrain.cli import _set_search_path, build_stages, compose_stages, stages_of
from posttrain.config import ConfigError
from posttrain.help import groups, recipes
from posttrain.paths import CONFIGS
from posttrain.words import Words
from tests.cli.conftest import TINY

MORE = {
    "sft": ["data.train.path=x.jsonl"],
    "dpo": ["data.train.path=x.jsonl"],
    "early_experience": ["data.train.path=x.jsonl"],
    "kto": ["data.train.path=x.jsonl"],
    "ppo": ["data.train.path=x.jsonl", "reward.fn.mine._target_=builtins.len"],
    "reward_model": ["data.train.path=x.jsonl"],
    "self_rewarding": ["data.train.path=x.jsonl"],
    "grpo": ["data.train.path=x.jsonl", "reward.fn.mine._target_=builtins.len"],
}


@pytest.fixture(scope="module", autouse=True)
def composer() -> Iterator[None]:
    """One composer for all of them: reading the tree anew for each would take twice as long."""
    from hydra import initialize_config_dir

    _set_search_path(None, [])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


BESIDE = {"mixture": ["advantage=group_norm"], "rollout": ["mixture=first_bad_step"]}
"""What a choice of one group reads from others."""


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_composes_and_passes(name: str) -> None:
    stages = stages_of(Words([f"recipe={name}", "model=tiny", *TINY, *MORE.get(name, [])]))
    for config, text in stages.values():
        assert config.name and f"name: {config.name}" in text
        assert config.loss.streams and config.steps > 0
        pairs = config.rollout.kind == "replay" or getattr(config.mixture.gate, "makes_pairs", False)
        assert (config.advantage is None) == pairs, "an advantage where, and only where, sampled answers are weighed by it"


@pytest.mark.parametrize("name", [n for n in recipes() if n not in ("quickstart",)])
def test_a_recipe_asks_for_a_model(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        stages_of(Words([f"recipe={name}", *MORE.get(name, [])]))


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g, choices in groups().items() for c in choices])
def test_a_choice_composes_and_builds(group: str, choice: str) -> None:
    composed = compose_stages(Words([f"{group}={choice}", *BESIDE.get(group, [])]))
    try:
        (config,) = build_stages(composed).values()
    except ConfigError as error:  # a choice may leave one thing open, and then says which
        asked = str(error).split(" is not set")[0]
        assert asked.startswith(f"{group}.") and str(error) == f"{asked} is not set; give {asked}=VALUE"
        return
    built: Any = getattr(config, group)
    assert built is not None or choice == "none"
