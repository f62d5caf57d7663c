"""What the verbs beside ``train`` print, and what ``train`` hands on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import run as runs
from posttrain.help import COMMANDS, GROUPS, groups, recipes
from tests.cli.conftest import TINY, Said

Posttrain = Callable[..., Said]
Rows = Callable[..., Path]
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# -- help ----------------------------------------------------------------------------------------------------------------------------
def test_help_teaches(posttrain: Posttrain) -> None:
    text = posttrain("--help").out
    assert text == posttrain().out == posttrain("help").out
    for name in (*COMMANDS, *recipes(), *groups(), "recipe=quickstart", "--cfg job", "--traceback"):
        assert name in text
    assert set(GROUPS) == set(groups())
    assert all(recipes().values()), "every recipe begins with a comment that says what it is"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(posttrain: Posttrain, command: str) -> None:
    for words in ([command, "--help"], ["--help", command], [command, "recipe=quickstart", "-h"]):
        said = posttrain(*words)
        assert said.code == 0 and said.out.startswith(COMMANDS[command]) and said.out.count(f"posttrain {command} ") >= 2


def test_version(posttrain: Posttrain) -> None:
    assert posttrain("--version").out.startswith("posttrain 0.")


# -- Hydra's flags -------------------------------------------------------------------------------------------------------------------
def test_cfg_prints_every_stage_as_it_would_run(posttrain: Posttrain) -> None:
    said = posttrain("train", "recipe=quickstart", "--cfg", "job", "seed=3", "stages.grpo.steps=7")
    sft, grpo = yaml.safe_load_all(said.out)
    assert (sft["loss"]["name"], grpo["loss"]["name"]) == ("sft", "grpo")
    assert sft["seed"] == grpo["seed"] == 3 and grpo["steps"] == 7 != sft["steps"]
    assert said.out.splitlines()[0] == "# stage sft" and said.code == 0


def test_cfg_needs_no_model_and_no_data(posttrain: Posttrain) -> None:
    for command in ("train", "explain", "doctor", "preview", "eval"):
        shown = yaml.safe_load(posttrain(command, "recipe=sft", "learner.lr=0.5", "--cfg", "job").out)
        assert shown["learner"]["lr"] == 0.5 and shown["model"]["path"] is None
    assert "${data.train}" in posttrain("train", "reward=world", "--cfg", "job").out
    assert "${data.train}" not in posttrain("train", "reward=world", "data=composition", "--cfg", "job", "--resolve").out


def test_hydras_other_flags(posttrain: Posttrain) -> None:
    assert posttrain("train", "recipe=quickstart", "--cfg", "job", "--package", "learner").out.startswith("# @package learner")
    assert "recipes" in posttrain("train", "recipe=quickstart", "--info", "searchpath").out


@pytest.mark.slow
def test_multirun_starts_one_run_for_each_combination(posttrain: Posttrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def launch(stages: dict[str, Any], composed: str, command: list[str]) -> int:
        config = stages["grpo"][0]
        seen.append((config.seed, config.learner.lr, stages["sft"][0].learner.lr, yaml.safe_load(composed)["seed"], command))
        if config.seed == 1 and config.learner.lr == 0.5:
            raise ValueError("this one fails")
        return 0

    monkeypatch.setattr(runs, "launch", launch)
    said = posttrain("train", "recipe=quickstart", *TINY, "--multirun", "seed=0,1", "stages.grpo.learner.lr=0.25,0.5")
    assert [(s[0], s[1], s[3]) for s in seen] == [(0, 0.25, 0), (0, 0.5, 0), (1, 0.25, 1), (1, 0.5, 1)]
    assert len({s[2] for s in seen}) == 1, "the other stage keeps its own"
    assert (
        seen[1][4][:3] == ["posttrain", "train", "recipe=quickstart"]
        and "stages.grpo.learner.lr=0.5" in seen[1][4]
        and "--multirun" not in seen[1][4]
    )
    assert "run 2: seed=0 stages.grpo.learner.lr=0.5" in said.out
    assert said.code == 2 and said.err.count("posttrain: ") == 1 and "seed=1 stages.grpo.learner.lr=0.5: this one fails" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"], "no logs beside the runs"


def test_train_hands_on_what_was_composed(posttrain: Posttrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(runs, "launch", lambda stages, composed, command: seen.update(stages=stages, composed=composed, command=command))
    before = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    said = posttrain("train", "recipe=quickstart", *TINY, "stages.grpo.steps=7", "~stages.sft")
    assert said.code == 0 and list(seen["stages"]) == ["grpo"] and seen["stages"]["grpo"][0].steps == 7
    assert "cannot act in this run; posttrain explain" in said.out, "what cannot act is reported"
    assert yaml.safe_load(seen["stages"]["grpo"][1])["steps"] == 7
    assert (list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")) == before and list(tmp_path.iterdir()) == []


# -- explain -------------------------------------------------------------------------------------------------------------------------
def test_explain_a_loss_with_its_settings(posttrain: Posttrain) -> None:
    text = posttrain("explain", "loss=grpo", "loss.streams.rollouts.masks.clip.high=0.28").out
    assert "keep(pi/pi_old in [0.8, 1.28], one-sided) * (pi/pi_old) * A * grad l" in text
    assert "cannot act" not in text, "nothing is known about the run"


def test_explain_knows_the_run(posttrain: Posttrain) -> None:
    text = posttrain("explain", "recipe=quickstart").out
    assert text.startswith("stage sft") and "stage grpo" in text and "GroupAdvantage(" in text
    assert "loss.streams.rollouts.masks.clip: with one update per batch" in text
    assert "A: {}" not in text and "reads the advantage column; set advantage=none" not in text
    again = posttrain("explain", "recipe=quickstart", "stages.grpo.learner.updates_per_batch=2").out
    assert "masks.clip: with one update" not in again
    alone = posttrain("explain", "loss=grpo", "advantage=group_norm", "learner.updates_per_batch=2").out
    assert "every setting can act" in alone


def test_explain_needs_no_model_and_no_data(posttrain: Posttrain) -> None:
    for name in recipes():
        said = posttrain("explain", f"recipe={name}")
        assert said.code == 0 and "maximise J" in said.out, (name, said.err)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["recipe=sft", "reward=number"], "reward: nothing is sampled and nothing is evaluated"),
        (["recipe=sft", "learner.schedule=constant"], "learner.min_lr_ratio=0.1: learner.schedule=constant never comes down"),
        (["recipe=sft", "learner.lr=0"], "learner.lr=0: no weight can move"),
        (["recipe=sft", "eval.every=999"], "eval.every=999: the run has 200 steps"),
        (["recipe=sft", "eval.at_end=true", "eval.n=4"], "eval.n=4: at eval.temperature=0"),
        (["recipe=sft", "rollout.strategy._target_=posttrain.rollout.strategy.Fixed"], "rollout.strategy: nothing is sampled"),
        (["recipe=sft", "data.demos.path=x.jsonl"], "data.demos: no gate asks for demonstrations"),
        (["recipe=sft", "reward.weights.answer=1"], "reward.weights: there is no reward"),
        (["recipe=grpo", "reward=number", "data.loss_on=last_turn"], "data.loss_on=last_turn: sampled answers are learnt from whole"),
        (["recipe=sft", "model=tiny", "model.path=somewhere"], "model.tiny: model.path is set"),
    ],
)
def test_settings_beside_the_objective_that_cannot_act(posttrain: Posttrain, words: list[str], line: str) -> None:
    assert f"  - {line}" in posttrain("explain", *words).out
    assert line not in posttrain("explain", words[0]).out


# -- doctor --------------------------------------------------------------------------------------------------------------------------
def test_doctor_of_the_machine_alone(posttrain: Posttrain) -> None:
    said = posttrain("doctor")
    assert said.code == 0 and "cores" in said.out and "torch" in said.out and "stage" not in said.out


def test_doctor_finds_nothing_wrong_with_the_quickstart(posttrain: Posttrain) -> None:
    said = posttrain("doctor", "recipe=quickstart", *TINY)
    assert said.code == 0 and "ERROR" not in said.out and said.out.endswith("no error found\n"), said.out
    sft, grpo = said.out.split("stage sft")[1].split("stage grpo")
    assert "the settings fit together" in sft and "64 demos per step over 1 update and 1 rank" in sft
    assert "model created on the spot" in sft and "model of the stage before" in grpo
    assert "learner: 1 rank, about" in sft and "rollout: 1 engine" in sft and "memory for all actors together: about" in sft
    assert "has the columns prompt, answer, level" in sft
    assert (
        "the chat template marks what the assistant writes" in sft
        and "<|im_end|>'; 300 of 300 answers end with a learnt end of turn" in sft
    )
    assert "256 evaluation prompts, 0 of them also in the training data" in sft
    assert "<|assistant|>', and the answer follows" in grpo and "cannot act here: loss.streams.rollouts.masks.clip" in grpo


def test_doctor_of_a_folder_and_a_file(posttrain: Posttrain, model: Path, rows: Rows, tmp_path: Path) -> None:
    path = rows({"question": "2+2?", "gold": "4"})
    given = [
        "doctor",
        "recipe=sft",
        f"model.path={model}",
        f"data.train.path={path}",
        "data.train.columns={prompt: question, completion: gold}",
    ]
    said = posttrain(*given)
    assert said.code == 0 and "data.train has the columns question, gold; read as prompt, completion" in said.out
    (tmp_path / "plain.jinja").write_text(CHATML)
    assert "has no generation marks; answers are found by comparing renderings" in posttrain(*given, "model.chat_template=plain.jinja").out


def test_doctor_says_when_nothing_asks_for_an_answer(posttrain: Posttrain, model: Path, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text(BARE)
    given = ["doctor", "recipe=sft", f"model.path={model}", f"data.train.path={rows({'prompt': 'a', 'completion': 'b'})}"]
    assert "warning the chat template has no generation prompt" in posttrain(*given, "model.chat_template=bare.jinja").out
    assert "no generation prompt" not in posttrain(*given).out


def test_doctor_says_when_the_model_would_never_stop(posttrain: Posttrain, model_without_template: Path, rows: Rows) -> None:
    path = rows({"prompt": "a", "completion": "b"})
    given = ["doctor", "recipe=sft", f"model.path={model_without_template}", f"data.train.path={path}"]
    said = posttrain(*given)
    assert "warning the tokenizer has no chat template" in said.out and "1 of 1 answers end with a learnt end of turn" in said.out
    assert "the model never learns to stop" in posttrain(*given, "data.train.add_eos=false").out


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["recipe=sft"], "model.path is not set"),
        (["recipe=sft", "model=tiny"], "data.train is not set"),
        (["recipe=sft", "model=tiny", "data.train.path=none.jsonl"], "no such data file"),
        (["recipe=sft", "model.path=/nowhere/model", "data.train.path=none.jsonl"], "model.path=/nowhere/model: there is no such folder"),
        (
            ["recipe=sft", "model=tiny", "data=composition", "data.kind=demos", "learner.micro_batch_tokens=999999999"],
            "memory for all actors together",
        ),
        (["recipe=sft", "model=tiny", "data=composition", "data.kind=demos", "learner.updates_per_batch=99"], "more updates than demos"),
        (["recipe=sft", "model=tiny", "data=composition", "data.kind=demos", "cluster=gpu"], "this machine has 0"),
        (["recipe=sft", "model=tiny", "data=composition", "data.kind=demos", "loss=dpo"], "learns from pairs"),
    ],
)
def test_doctor_finds(posttrain: Posttrain, monkeypatch: pytest.MonkeyPatch, words: list[str], finding: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    said = posttrain("doctor", *words)
    found = [line for line in said.out.splitlines() if line.lstrip().startswith("ERROR")]
    assert said.code == 2 and any(finding in line for line in found), said.out
    assert said.err == "" and said.out.endswith("there are errors; nothing was started\n")


def test_doctor_counts_what_does_not_divide(posttrain: Posttrain, model: Path) -> None:
    given = ["doctor", "recipe=sft", f"model.path={model}", "data=composition", "data.kind=demos"]
    said = posttrain(*given, "rollout.prompts_per_step=7", "learner.world_size=2", "learner.micro_batch_tokens=64")
    assert "warning 7 demos per step over 1 update and 2 ranks: not divisible" in said.out
    assert "more than learner.micro_batch_tokens=64; it then runs alone" in said.out


def test_doctor_counts_a_frozen_start(posttrain: Posttrain, model: Path, rows: Rows) -> None:
    path = rows({"prompt": "a", "chosen": "b", "rejected": "c"})
    said = posttrain("doctor", "recipe=dpo", f"model.path={model}", f"data.train.path={path}")
    assert "frozen start" in said.out and "rollout:" not in said.out
    assert "2 of 2 answers end with a learnt end of turn" in said.out


# -- preview -------------------------------------------------------------------------------------------------------------------------
def test_preview_marks_what_is_learnt(posttrain: Posttrain, model: Path, rows: Rows) -> None:
    path = rows({"prompt": "2+2?", "completion": "4", "id": "d"})
    said = posttrain("preview", "recipe=sft", f"model.path={model}", f"data.train.path={path}")
    assert "demonstration d 9 tokens, 2 learnt\n<|user|>2+2?<|im_end|><|assistant|>[+4<|im_end|>+]\n" in said.out
    assert "1 rows read, 1 kept" in said.out and "tokens per row" in said.out


def test_preview_of_every_stage(posttrain: Posttrain) -> None:
    said = posttrain("preview", "recipe=quickstart", *TINY)
    sft, grpo = said.out.removeprefix("stage sft\n").split("\nstage grpo\n")
    assert sft.startswith("demonstration composition-") and "[+" in sft
    assert grpo.startswith("prompt composition-") and "[+" not in grpo
    assert "model.path is not set" in posttrain("preview", "recipe=sft", "data.train.path=x.jsonl").err


# -- noise ---------------------------------------------------------------------------------------------------------------------------
def test_libraries_are_quiet(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, "-m", "posttrain.cli", "doctor", "recipe=quickstart", *TINY]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stderr == "" and "Setting accelerator" not in said.stdout and list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from posttrain.cli import main; sys.stdout.flush(); main(['--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
