"""Settings: typed, strict, and every refusal says what to change."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.advantage import Reward
from posttrain.checks import check
from posttrain.cli import compose_loss
from posttrain.config import ConfigError, LearnerConfig, RunConfig, from_mapping
from posttrain.mixture.gate import InTurn
from posttrain.mixture.pairs import BestWorst
from posttrain.words import Words, open_map

ROUTED = {"learner__routing": "old", "loss": "gspo"}
VALUES = ["streams.rollouts.advantage={_target_: posttrain.loss.advantage.GeneralizedAdvantage}"]
DISTILL = ["regularizers.kl={_target_: posttrain.loss.regularizer.KL, to: teacher, coef: 0.1}"]


def settings(**changes: Any) -> RunConfig:
    """A config that passes, with changes at dotted paths written ``a__b``."""
    name = changes.pop("loss", "grpo")
    loss = compose_loss(name) if isinstance(name, str) else compose_loss(*name)
    config = from_mapping(
        RunConfig,
        {
            "loss": loss,
            "advantage": object(),
            "model": {"path": "somewhere"},
            "data": {"train": {"path": "x.jsonl"}, "kind": "prompts"},
            "reward": {"fn": {"r": len}},
        },
    )
    for path, value in changes.items():
        target: Any = config
        *parents, last = path.split("__")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return config


def test_a_good_config_passes() -> None:
    config = settings()
    check(config)
    assert config.rollout.n == 8


def test_sampled_pairs_and_a_base_that_moves_pass() -> None:
    check(settings(loss="online_dpo", mixture__gate=InTurn({"pairs": BestWorst()}), learner__base_every=5, learner__base_mix=0.6))


@pytest.mark.parametrize(("loss", "term"), [("otb", "TokenBaseline"), ("gvpo", "GroupCenter"), ("nash_md_mixture", "WinAgainstMixture")])
def test_terms_that_compare_answers_need_more_than_one(loss: str, term: str) -> None:
    check(settings(loss=loss))
    with pytest.raises(ConfigError, match=f"rollout.n=1: {term} of loss '{loss}' compares answers to one prompt"):
        check(settings(loss=loss, rollout__n=1, advantage=Reward()))


def test_experts_are_replayed_where_there_are_some_to_replay() -> None:
    check(settings(learner__routing="engine"))
    check(settings(**ROUTED, learner__updates_per_batch=2))
    with pytest.raises(ConfigError, match=r"it needs learner\.updates_per_batch above 1"):
        check(settings(**ROUTED))
    with pytest.raises(ConfigError, match="a loss that compares with the old policy"):
        check(settings(**{**ROUTED, "loss": "reinforce"}, learner__updates_per_batch=2))
    with pytest.raises(ConfigError, match="with rollout=replay nothing is sampled"):
        check(settings(loss="sft", learner__routing="engine", rollout__kind="replay", data__kind="demos", advantage=None))


def test_imitation_may_be_sampled_at_another_temperature() -> None:
    check(settings(loss="osft", rollout__temperature=0.6))
    with pytest.raises(ConfigError, match=r"sampled at 0\.6"):
        check(settings(loss="on_policy_distillation", rollout__temperature=0.6, model__teacher="somewhere"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1.0}, "unknown key learner.lrr; did you mean learner.lr?"),
        ({"lr": "fast"}, "learner.lr='fast' must be a number, not str"),
        ({"zero_stage": True}, "learner.zero_stage=True must be a whole number, not bool"),
        ({"engine": "megatron"}, "learner.engine='megatron'; choose one of deepspeed, torch"),
        ({"betas": 0.9}, "learner.betas=0.9 must be a list"),
        ({"betas": [0.9, "x"]}, r"learner.betas\[1\]='x' must be a number"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(LearnerConfig, values, "learner")


def test_whole_numbers_are_numbers() -> None:
    assert from_mapping(LearnerConfig, {"lr": 1}).lr == 1.0
    assert isinstance(from_mapping(LearnerConfig, {"lr": 1}).lr, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__n": 0}, "rollout.n=0 must be at least 1"),
        ({"model__path": None}, "model.path is not set"),
        ({"data__train": None}, "data.train is not set"),
        ({"learner__engine": "torch", "learner__zero_stage": 2}, "learner.engine=torch cannot shard"),
        ({"learner__offload_optimizer": True}, "offload_optimizer needs"),
        ({"rollout__temperature": 0.0}, "needs a temperature above 0"),
        ({"rollout__temperature": 0.7}, "sampled at 0.7"),
        ({"rollout__kind": "replay"}, "set data.kind to demos, pairs, lists or steps"),
        ({"rollout__kind": "replay", "data__kind": "demos"}, "learns from sampled tokens only"),
        ({"data__kind": "pairs"}, "data.kind must be prompts"),
        ({"advantage": None}, "rollouts need an advantage"),
        ({"loss": "online_dpo"}, "nothing makes pairs of the sampled answers: choose mixture=best_worst"),
        ({"loss": "online_dpo", "mixture__gate": BestWorst(), "rollout__n": 1}, "the best answer to a prompt needs a worst"),
        ({"learner__base_every": -1}, "0 never moves the base"),
        ({"learner__base_mix": 0.0}, "above 0 and at most 1"),
        ({"learner__base_every": 5}, "loss 'grpo' compares with no base"),
        ({"loss": "nash_md", "learner__base_every": 5, "learner__base_mix": 0.01}, "lost to rounding"),
        ({"reward__fn": {}}, "needs a reward"),
        ({"loss": "sft"}, "no stream for sampled tokens"),
        ({"loss": "sft", "rollout__kind": "replay", "data__kind": "pairs"}, "needs a preference loss"),
        ({"loss": "dpo", "rollout__kind": "replay", "data__kind": "demos"}, "set data.kind=pairs"),
        ({"eval__at_end": True}, "data.eval is not set"),
        ({"rollout__max_model_len": 100}, "cannot hold"),
        ({"loss": ("ppo", VALUES)}, "reads the values of a critic, and the run has none: choose critic=value"),
        ({"loss": ("grpo", DISTILL)}, "give model.teacher=FOLDER_OR_ID"),
    ],
)
def test_impossible_pairs_name_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(settings(**changes))


def test_words_take_a_command_line_apart() -> None:
    words = Words(["recipe=quickstart", "learner.lr=1", "stages.grpo.steps=7", "--cfg", "job", "reward.fn.mine._target_=a.b"])
    assert words.config_name == "quickstart"
    assert words.overrides == ["learner.lr=1", "++reward.fn.mine._target_=a.b"]
    assert words.stages == {"grpo": ["steps=7"]}
    assert words.flags == ["--cfg", "job"]


@pytest.mark.parametrize(("word", "message"), [("recipe=quickstrt", "did you mean 'quickstart'"), ("steps", "is not a setting")])
def test_words_refuse_what_is_no_setting(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Words([word])


def test_open_maps_need_no_plus() -> None:
    assert open_map("loss.streams.rollouts.coef=2") == "++loss.streams.rollouts.coef=2"
    assert open_map("reward.weights={answer: 1}") == "++reward.weights={answer: 1}"
    assert open_map("reward.weights=null") == "reward.weights=null" and open_map("loss={a: 1}") == "loss={a: 1}"
    assert open_map("loss=dapo") == "loss=dapo"
    assert open_map("learner.lr=2") == "learner.lr=2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss=s_grpo", "advantage=serial"], r"advantage Serial compares exits of a chain, and nobody leaves one: choose rollout=exits or rollout=blocks"),
        (["loss=mrt", "advantage=progress", "rollout=blocks", "rollout.n=1"], r"rollout\.n=1: Progress compares answers to one prompt"),
        (["loss=s_grpo", "rollout=exits", "advantage=serial", "rollout.environment={_target_: posttrain.rollout.environment.Retry}"], r"a strategy with exits do not go together"),
        (["loss=ppo_gae", "advantage=reward"], r"reads the values of a critic, and the run has none: choose critic=value"),
        (["loss=grpo", "advantage=group_norm", "critic=value"], r"critic is set, but loss 'grpo' reads no values; choose loss=ppo_gae, or critic=none"),
        (["loss=ppo_gae", "advantage=reward", "critic=value", "critic.warmup_batches=100"], r"critic.warmup_batches=100 must be at least 0 and below steps=100"),
        (["loss=safe", "advantage=reward", "critic=soft_min", "critic.heads=0"], r"critic.heads=0 must be 1 or more"),
        (["loss=safe", "advantage=reward", "critic=value", "critic.heads=2"], r"critic.heads=2 are combined by a soft minimum: give its temperature"),
        (["loss=safe", "advantage=reward", "critic=value", "critic.alpha=0.3"], r"critic.alpha=0.3 combines several heads, and there is one"),
        (["loss=safe", "advantage=reward", "critic=soft_min", "critic.alpha=-0.1"], r"critic.alpha=-0.1 is the temperature of a soft minimum"),
        (["loss=fine_grained", "advantage=reward", "critic=value"], r"adds up a reward of every token.*choose advantage=placed"),
        (["loss=ppo_gae", "advantage=placed", "critic=value"], r"hands on a reward for every token, and loss 'ppo_gae' does not add them up; choose loss=fine_grained"),
        (["loss=grpo", "advantage=placed"], r"hands on a reward for every token, and loss 'grpo' does not add them up"),
        (["loss=offline_kd", "rollout=replay", "data.kind=demos", "loss.regularizers.distill.to=stored"], r"compares with a stored distribution; set data.kind=stored \(it is demos\)"),
        (["loss=sft", "rollout=replay", "data.kind=stored"], r"holds a teacher's probabilities, which loss 'sft' does not read; choose to: stored"),
        (["loss=reward_model", "advantage=group_norm"], r"trains a scalar head, which cannot sample; set rollout=replay"),
        (["loss=value", "rollout=replay", "data.kind=demos"], r"loss 'value' reads what a critic said before and cannot be run by itself"),
        (["loss=sft", "rollout=replay", "data.kind=steps"], r"data.kind=steps labels the ends of steps; loss 'sft' does not read there"),
        (["loss=process_reward_model", "rollout=replay", "data.kind=demos"], r"learns from labelled steps; set data.kind=steps \(it is demos\)"),
        (["loss=reward_model", "rollout=replay", "data.kind=pairs", "eval.at_end=true"], r"cannot answer prompts: set eval.at_start=false"),
    ],
)
def test_heads_and_what_they_learn_from(words: list[str], message: str) -> None:
    from posttrain.cli import stages_of
    from posttrain.words import Words

    common = ["model=tiny", "data.train.path=x.jsonl", "reward.fn.mine._target_=builtins.len"]
    with pytest.raises(ConfigError, match=message):
        stages_of(Words([*common, *words]))
