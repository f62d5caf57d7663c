"""The quickstart as it is shipped: it learns, its ten pinned numbers hold, and its folder has everything a script would want."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import ROOT, Finished, train
from tests.recipes.pins import TOLERANCE, numbers

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(tmp_path_factory.mktemp("quickstart") / "run", "recipe=quickstart", timeout=1700)


def test_the_pinned_numbers_hold(run: Finished) -> None:
    pinned = json.loads((ROOT / "recipes" / "quickstart.pinned.json").read_text())
    assert pinned.keys() == TOLERANCE.keys() and len(pinned) == 10
    found = numbers(run.folder)
    off = {name: (found[name], pin) for name, pin in pinned.items() if abs(found[name] - pin["value"]) > pin["tolerance"]}
    assert not off


def test_grpo_gains_at_least_twenty_points_over_sft(run: Finished) -> None:
    stages = run.summary["stages"]
    before, after = (stages[name]["evaluation"]["after"]["accuracy"] for name in ("sft", "grpo"))
    assert after >= before + 0.2


def test_it_prints_what_a_newcomer_needs(run: Finished) -> None:
    for words in ("held-out accuracy", "after sft", "after grpo", "checkpoint", "Hugging Face", "run folder", "go on with"):
        assert words in run.output, words
    assert "Traceback" not in run.output and "WARNING" not in run.output


def test_the_export_is_a_model_that_transformers_loads(run: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(run.folder) / "export" / "grpo"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "k(abcd)"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model(**ids).logits.isfinite().all()


def test_the_run_folder_is_complete(run: Finished) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "completions", "checkpoints", "export"):
        assert (run.folder / name).exists(), name
    assert run.summary["exit"] == "finished"
    for row in run.rows:
        if row["stage"] == "grpo":
            assert row["mismatch/mean_abs"] < 1e-4
