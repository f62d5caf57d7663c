"""The example of a user's own mask, gate and reward: checked like shipped ones, found beside its recipe, and run with the real engines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from posttrain import paths
from posttrain.mixture.demos import Demos
from posttrain.testing.check import check_term, example_batch, objective_with
from posttrain.testing.stage import example_step
from posttrain.words import Words
from tests.recipes.conftest import ROOT, SMALL, train

FOLDER = ROOT / "recipes" / "plugin_example"
RECIPE = FOLDER / "plugin_example.yaml"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing knows of the folder, before and after."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(FOLDER)])
    monkeypatch.setattr(paths, "OWN_CODE", [])
    monkeypatch.delitem(sys.modules, "own_terms", raising=False)
    yield
    sys.modules.pop("own_terms", None)


@pytest.fixture
def own(clean: None) -> ModuleType:
    paths.import_from(FOLDER)
    import own_terms

    return own_terms


def test_every_term_keeps_the_rules(own: ModuleType) -> None:
    check_term(own.Fading(half_life=4.0), own.Fading(half_life=1.0))
    check_term(own.MostUneven(share=0.5), own.MostUneven(share=1.0))
    check_term(own.letters_in_place)


def test_the_mask_halves_every_half_life(own: ModuleType) -> None:
    mask = own.Fading(half_life=2.0)
    view = objective_with(mask).views(example_batch())["rollouts"]
    factor = mask.factor(view, view.batch.advantage)
    for sequence in range(view.num_sequences):
        learnt = factor[view.on & (view.batch.seq == sequence)]
        assert torch.allclose(learnt, 2.0 ** (-torch.arange(len(learnt), dtype=torch.float64) / 2)), "tool tokens in between do not count"
    assert int(view.seq_len().max()) >= 4
    with pytest.raises(ValueError, match="half_life=0 is a number of tokens"):
        own.Fading(half_life=0)


@pytest.mark.parametrize(
    ("share", "kept"), [(0.2, {"mixed"}), (0.4, {"mixed", "in doubt"}), (1.0, {"mixed", "in doubt", "solved", "unsolved", "unknown"})]
)
def test_the_gate_keeps_the_groups_that_differ(own: ModuleType, share: float, kept: set[str]) -> None:
    out = own.MostUneven(share=share)(example_step(), Demos(), 0, 0.0)
    groups = {item.id: item.dropped for item in out if isinstance(item, type(out[0]))}
    assert {name for name, why in groups.items() if why is None} == kept
    assert groups["left out"] == "all rewards equal" and {groups[name] for name in set(groups) - kept - {"left out"}} <= {"too_even"}
    with pytest.raises(ValueError, match="share=0 is a part of the groups"):
        own.MostUneven(share=0)


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [("abcd", "abcd", 1.0), (" abcd\n", "abcd", 1.0), ("abxx", "abcd", 0.5), ("", "abcd", 0.0), ("abcdabcd", "abcd", 0.5), ("", "", 0.0)],
)
def test_the_reward(own: ModuleType, completion: str, answer: str, value: float) -> None:
    assert own.letters_in_place(completion, answer) == value


def test_the_recipe_finds_its_module_from_anywhere(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.cli import build_stages, compose_stages

    monkeypatch.chdir(tmp_path)
    (config,) = build_stages(compose_stages(Words([f"recipe={RECIPE}"]))).values()
    assert type(config.loss.streams["rollouts"].masks["fading"]).__module__ == "own_terms"
    assert type(config.mixture.gate).__name__ == "MostUneven" and config.reward.fn["letters"]("ab", "ab") == 1.0
    assert [str(FOLDER)] == paths.OWN_CODE, "every process of the run is told"


def test_a_module_that_is_nowhere(clean: None, tmp_path: Path) -> None:
    from posttrain.cli import build_stages, compose_stages

    alone = tmp_path / "alone.yaml"
    alone.write_text(RECIPE.read_text())
    with pytest.raises(ValueError, match=r"there is no module 'own_terms'; it must be installed, or lie beside the recipe"):
        build_stages(compose_stages(Words([f"recipe={alone}"])))


def test_the_examples_of_the_page_run(own: ModuleType) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), flags=re.S)
    exec(compile(block, "README.md", "exec"), {})


def test_the_folder_can_be_installed() -> None:
    import tomllib

    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    assert modules == [p.stem for p in FOLDER.glob("*.py")] and project["project"]["dependencies"] == ["posttrain"]


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_steps_with_the_real_engines(tmp_path: Path) -> None:
    sizes = ["steps=2", "rollout.prompts_per_step=4", "rollout.n=4", "data.train.num=64", "eval.limit=4", "learner.warmup_steps=0"]
    run = train(tmp_path / "run", f"recipe={RECIPE}", *SMALL, *sizes, "check.weights_moved=false")
    assert run.summary["exit"] == "finished" and len(run.rows) == 2
    for row in run.rows:
        assert row["mixture/groups_left_out"] == 2.0 and row["data/dropped/too_even"] == 8.0
        assert 0.0 <= row["reward/letters/mean"] <= 1.0 and row["mismatch/mean_abs"] < 1e-4
        assert 0.0 < row["rollouts/fading/factor"] < 1.0, "answers of several tokens fade"
    assert any(_rewards(run.folder)), "part of an answer earns part of the reward"


def _rewards(folder: Path) -> list[Any]:
    import json

    lines = [line for path in sorted((folder / "completions").iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["reward"] for line in lines]
