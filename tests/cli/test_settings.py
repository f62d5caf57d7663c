"""A mistake in the settings: one message that names the setting and the way out, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.words import Words
from tests.cli.conftest import Said

Fails = Callable[..., str]
CLIP = "stages.grpo.loss.streams.rollouts.masks.clip"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learnr.lr=1", r"unknown setting 'learnr'; did you mean 'learner'\?"),
        ("learner.lrr=1", r"unknown setting 'learner.lrr'; did you mean 'learner.lr'\?"),
        ("lr=1", r"unknown setting 'lr'; did you mean 'learner.lr'\?"),
        ("+learner.foo=1", r"unknown key learner.foo; known keys: .*betas, engine"),
        ("stages.sft.learner.lrr=1", r"stage sft: unknown setting 'learner.lrr'; did you mean 'learner.lr'\?"),
        ("stages.stf.steps=1", r"no stage 'stf'; did you mean 'sft'\?; this recipe has sft, grpo"),
        (f"{CLIP}.hihg=0.3", r"stage grpo: unknown setting loss.streams.rollouts.masks.clip.hihg; did you mean 'high'\?"),
        ("stages.grpo.loss.streams.rollout.coef=2", r"there is no loss.streams.rollout; did you mean 'rollouts'\?"),
        ("stages.grpo.loss.streams.rollouts.masks.clp.high=2", r"there is no loss.streams.rollouts.masks.clp; did you mean 'clip'\?"),
        ("stages.grpo.advantage.scal=std", r"unknown setting advantage.scal; did you mean 'scale'\?"),
        ("data.train.nmu=3", r"unknown setting data.train.nmu; did you mean 'num'\?"),
        ("model.tiny.hiden_size=64", r"unknown setting model.tiny.hiden_size; did you mean 'hidden_size'\?"),
        ("loss=gprpo", r"no loss=gprpo; did you mean 'grpo'\? \(there are: "),
        ("rollout=vlm", r"no rollout=vlm; did you mean 'vllm'\? \(there are: .*vllm\)"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(fails: Fails, word: str, message: str) -> None:
    assert re.search(message, fails("train", "recipe=quickstart", word))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learner.lr=fast", r"learner.lr='fast' must be a number, not str"),
        ("steps=1.5", r"steps=1.5 must be a whole number, not float"),
        ("learner.betas=0.9", r"learner.betas=0.9 must be a list"),
        ("learner.engine=megatron", r"learner.engine='megatron'; choose one of deepspeed, torch"),
        ("learner=3", r"learner is a group of settings; choose learner=NAME \(deepspeed, torch, zero3_offload\)"),
        ("loss=null", r"loss is a group of settings"),
        (f"{CLIP}.low=big", r"masks.clip.low='big' must be a number or a schedule"),
        (f"{CLIP}.level=tokens", r"masks.clip.level='tokens' must be one of token, sequence, sequence_geometric, null"),
        (f"{CLIP}=0.2", r"there is no loss.streams.rollouts.masks.clip; a new one needs a _target_"),
        (f"{CLIP}.to=nobody", r"loss 'grpo' reads the column 'nobody', which no part of a run fills \(those that are: .*old"),
        ("stages.grpo.advantage.scale=sdt", r"advantage.scale='sdt' must be one of none, std, loo_std"),
        ("data.train.num=many", r"data.train.num='many' must be a whole number, not str"),
        ("model.tiny.hidden_size=wide", r"model.tiny.hidden_size='wide' must be a whole number"),
        ("model.tiny.hidden_size=100", r"hidden_size / num_heads is 25; it must be a multiple of 32"),
        ("rollout.max_tokens=0", r"rollout.max_tokens=0 must be at least 1"),
        ("reward.timeout_s=-1", r"reward.timeout_s=-1 must be above 0 seconds"),
        ("rollout.top_p=0", r"rollout.top_p=0 must be above 0 and at most 1"),
        ("model.lora.r=0", r"model.lora.r=0 must be at least 1"),
        ("resume=always", r"resume='always'; choose never or auto"),
        ("reward.fn.mine=5", r"reward.fn.mine=5 is not a reward; give reward.fn.mine._target_=module.function"),
    ],
)
def test_a_wrong_type_is_named_with_what_fits(fails: Fails, word: str, message: str) -> None:
    assert re.search(message, fails("train", "recipe=quickstart", word))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["recipe=quickstart", "stages.grpo.loss=dpo"],
            r"stage grpo: loss 'dpo' has no stream for sampled tokens; choose another loss or set rollout=replay",
        ),
        (["recipe=sft", "loss=dpo"], r"loss 'dpo' learns from pairs; set data.kind=pairs"),
        (["recipe=sft", "rollout=vllm"], r"data.kind must be prompts, not demos; or set rollout=replay"),
        (["recipe=quickstart", "stages.grpo.advantage=none"], r"rollouts need an advantage: choose advantage=group_norm"),
        (["recipe=quickstart", "reward=none"], r"reward"),
        (["recipe=quickstart", "reward.weights.other=2"], r"reward.weights: the weights names other, but the rewards are answer"),
        (["recipe=quickstart", "eval.metric=other"], r"eval.metric=other: the rewards are answer"),
        (["recipe=quickstart", "strict=true"], r"strict=true: cannot act here: loss.streams.rollouts.masks.clip"),
    ],
)
def test_an_impossible_pair_names_the_way_out(fails: Fails, words: list[str], message: str) -> None:
    more = ["model=tiny", "data.train.path=x.jsonl"] if "recipe=sft" in words else []
    assert re.search(message, fails("train", *words, *more))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no.such", r"reward.fn.mine._target_=no.such: there is no module 'no'"),
        ("posttrain.reward.rules.Numerik", r"posttrain.reward.rules has no 'Numerik'; did you mean 'Numeric'\?"),
        ("my_broken.thing", r"my_broken cannot be imported: SyntaxError"),
        ("my_reward.SIZE", r"is a int, not a class or function"),
    ],
)
def test_a_target_that_cannot_be_found(fails: Fails, tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "my_broken.py").write_text("def thing(:\n")
    (tmp_path / "my_reward.py").write_text("SIZE = 3\n")
    assert re.search(message, fails("train", "recipe=quickstart", f"reward.fn.mine._target_={target}"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("defaults: [train\nname: x\n", r"mine.yaml, line 2, column 5: not YAML"),
        ("defaults: [train, override loss: gprpo, _self_]\n", r"no loss=gprpo; did you mean 'grpo'\?"),
        ("defaults: [trian, _self_]\n", r"the 'defaults' of mine name 'trian', which does not exist; did you mean 'train'\?"),
        ("name: x\n", r"a recipe begins with  defaults: \[train, _self_\]"),
        ("defaults: [train, _self_]\nlearner: {lrr: 1}\n", r"unknown key learner.lrr; did you mean learner.lr\?"),
        ("defaults: [train, _self_]\ndata: {train: {path: '???'}}\n", r"data.train.path is not set; give data.train.path=VALUE"),
        ("defaults: [train, _self_]\nstages: [a, b]\n", r"stages must map each name to a list of settings"),
        ("defaults: [train, _self_]\nmodel: {path: x}\ndata: {train: {path: '${oc.env:NOT_SET_ANYWHERE}'}}\n", r"NOT_SET_ANYWHERE"),
    ],
)
def test_a_recipe_that_cannot_be_read(fails: Fails, tmp_path: Path, recipe: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(recipe)
    assert re.search(message, fails("train", "recipe=mine.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explane"], r"unknown command 'explane'; did you mean 'explain'\?"),
        (["loss=grpo"], r"write posttrain train loss=grpo"),
        (["train", "quickstart"], r"'quickstart' is not a setting; write recipe=quickstart"),
        (["train", "recipe=quickstat"], r"no recipe 'quickstat'; did you mean 'quickstart'\?"),
        (["train", "recipe=nowhere/mine.yaml"], r"there is no such file \(looked in "),
        (["train", "--recipe=quickstart"], r"unknown flag --recipe; settings have no dashes: recipe=quickstart"),
        (["train", "--cfgg", "job"], r"unknown flag --cfgg; did you mean '--cfg'\?"),
        (["train", "--config-dir", "nowhere"], r"--config-dir nowhere: there is no such folder"),
        (["train", "recipe=quickstart", "seed=0,1"], r"seed=0,1 has several values: write 'seed=\[0,1\]' for a list, or add --multirun"),
        (["train", "recipe=quickstart", "learner.betas=[0.9"], r"a word cannot be read"),
        (["explain"], r"explain loss=NAME or recipe=NAME"),
        (["explain", "recipe=quickstart", "--multirun"], r"--multirun is for posttrain train"),
        (["train", "recipe=quickstart", "--multirun", "seed=0,1", "run_dir=one"], r"--multirun needs one folder per run"),
        (["train"], r"model.path is not set"),
        (["eval", "recipe=sft", "model=tiny"], r"data.eval is not set"),
        (["eval", "data=composition", "reward=world"], r"which model\? give model.path"),
        (["export"], r"which run\? export run_dir=FOLDER"),
        (["export", "run_dri=x"], r"not 'run_dri=x'"),
        (["export", "run_dir=nowhere"], r"run_dir=nowhere holds no run"),
    ],
)
def test_a_command_that_cannot_be_understood(fails: Fails, words: list[str], message: str) -> None:
    assert re.search(message, fails(*words))


def test_a_recipe_called_like_the_root_is_refused(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [train, _self_]\n")
    assert "give your recipe another one" in fails("train", "recipe=train.yaml")


def test_the_same_file_name_in_two_folders(posttrain: Callable[..., Said], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(f"defaults: [train, _self_]\nname: {name}\n")
        assert f"name: {name}\n" in posttrain("train", f"recipe={name}/mine.yaml", "--cfg", "job").out


def test_groups_of_ones_own(posttrain: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "own" / "loss").mkdir(parents=True)
    (tmp_path / "own" / "loss" / "mine.yaml").write_text("defaults: [sft]\nname: mine\n")
    assert posttrain("explain", "--config-dir", "own", "loss=mine").out.startswith("mine: maximise J")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "beside.yaml").write_text("defaults: [sft]\nname: beside\n")
    (tmp_path / "r.yaml").write_text("defaults: [train, override loss: beside, _self_]\n")
    assert posttrain("explain", "recipe=r.yaml").out.startswith("beside: maximise J")


def test_a_stack_trace_only_when_asked(posttrain: Callable[..., Said]) -> None:
    assert "Traceback" not in posttrain("train", "recipe=quickstart", "learner.lr=fast").err
    with pytest.raises(ValueError, match=r"learner\.lr='fast'") as raised:
        posttrain("train", "recipe=quickstart", "learner.lr=fast", "--traceback")
    assert any(entry.name == "build_stages" for entry in raised.traceback)


def test_words_through_hydra_and_back() -> None:
    words = Words(["recipe=quickstart", "--multirun", "seed=0,1", "stages.grpo.loss.streams.rollouts.coef=1,2", "~stages.sft"])
    assert words.many and words.overrides == ["seed=0,1", "~stages.sft"]
    one = words.of_job([w.replace("0,1", "1").replace("1,2", "2") for w in words.through_hydra()])
    assert one.recipe == words.recipe and one.overrides == ["seed=1", "~stages.sft"]
    assert one.stages == {"grpo": ["++loss.streams.rollouts.coef=2"]}
    assert one.again == ["recipe=quickstart", "seed=1", "~stages.sft", "stages.grpo.loss.streams.rollouts.coef=2"]
