"""What was once taken without a word and did nothing, or something else: settings, state, and parts of a step that were left out."""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.advantage import (
    Among,
    BatchWhiten,
    Chain,
    Constant,
    Extremes,
    GreedyBaseline,
    GroupAdvantage,
    PerReward,
    Placed,
    Reward,
    RunningBaseline,
)
from posttrain.advantage.exits import Progress, Serial
from posttrain.advantage.shape import TailRisk
from posttrain.build import DataSet, estimator_of, policy_steps
from posttrain.checks import check
from posttrain.cli import compose_loss, stages_of
from posttrain.config import ConfigError, CriticConfig
from posttrain.data.contexts import with_contexts
from posttrain.data.pack import Packer
from posttrain.data.sampler import Sampler
from posttrain.mixture.buffer import Buffer
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Add, Inject, InTurn, Success, Unsolved, as_rollout
from posttrain.mixture.pairs import BestWorst
from posttrain.mixture.tagged import OutcomeTag
from posttrain.mixture.thoughts import BeforeText
from posttrain.preflight import names
from posttrain.records import Demo, Group, Prompt, Rollout, Row, Segment, Source, TokenBatch
from posttrain.report.explain import idle_settings, settings_that_cannot_act
from posttrain.rollout.exits import Exits
from posttrain.rollout.strategy import Dynamic, WithGreedy
from posttrain.words import Words
from tests.advantage.test_group import group, values
from tests.test_config import settings


def thought(place: int, number: int) -> Row:
    """A prompt of two tokens, a thought, and the word behind it."""
    n = 1 + (place + number) % 3
    return Row(
        ids=list(range(3 + n)),
        sources=["prompt"] * 2 + ["policy"] * n + ["tool"],
        trainable=[False] * 2 + [True] * n + [False],
        sample_id=f"{place}/{number}",
        group=str(place),
    )


@pytest.mark.parametrize("updates", [1, 4, 12])
def test_thoughts_on_many_places_may_be_dealt_into_several_updates(updates: int) -> None:
    """Codes of groups are those of the whole batch, also in a step that holds a few of them: a small step once had no room for the large codes."""
    loss = compose_loss("rlp")
    rows = with_contexts([thought(place, number) for place in range(12) for number in range(2)], loss.needs.contexts)
    steps = list(Packer(64, 1, updates).plan(rows, "batch", dtype=torch.float64))
    assert len(steps) == updates
    for step in steps:
        whole = step.whole
        logp = -torch.linspace(0.1, 2.0, whole.num_tokens, dtype=torch.float64)
        filled = whole.with_logps(current=logp, old=logp, base=logp.flip(0))
        weights = loss.weights(filled.replace(totals=loss.totals(filled)))
        codes = {int(c): i for i, c in enumerate(dict.fromkeys(filled.group.tolist()))}
        small = filled.replace(group=torch.tensor([codes[int(c)] for c in filled.group]))
        assert bool(weights.any()) and torch.equal(weights, loss.weights(small.replace(totals=loss.totals(small))))


def test_a_thought_without_words_behind_it_gains_nothing_whatever_its_group() -> None:
    loss = compose_loss("rlp")
    rows = [replace(thought(place, 0), sources=None, group=str(place)) for place in (0, 1)]
    batch = TokenBatch.from_sequences([replace(r, sources=["prompt"] * 2 + ["policy"] * (len(r.ids) - 2)) for r in rows], dtype=torch.float64)
    logp = -torch.ones(batch.num_tokens, dtype=torch.float64)
    filled = batch.take([1]).with_logps(**{name: logp[batch.columns_of([1])] for name in ("current", "old", "base")})
    assert not bool(loss.weights(filled.replace(totals=loss.totals(filled))).any())


def released_credit(bundle: Sequence[Sequence[float]], low: float, high: float, a: float = 0.2, b: float = 0.8, w: float = 1.5) -> list[list[float]]:
    """A bundle's advantages as RiskPO's release shares them out: over the deviations of the bundle's scores and of the question's rewards."""
    scores = [sum(each) for each in zip(*bundle, strict=True)]
    risk = [(w * -max(low - s, 0.0) / a + (max(s - low, 0.0) - max(s - high, 0.0) + low - high) / (b - a)) / (w + 1) for s in scores]
    spread = [statistics.stdev(rewards) for rewards in bundle]
    return [[r / statistics.stdev(scores) / (own if own > 1e-3 else 1.0) for r in risk] for own in spread]


def test_a_question_of_little_spread_gets_more_of_the_tail_and_not_less() -> None:
    bundle = [(1.0, 0.0, 1.0), (0.5, 0.5, 0.4), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.2, 0.0, 0.1)]
    found = values(TailRisk(quantiles=[1.5, 3.0]), *(group(*rewards, name=str(i)) for i, rewards in enumerate(bundle)))
    assert found == pytest.approx([x for each in released_credit(bundle, 1.5, 3.0) for x in each])


def test_an_answer_that_nothing_is_learnt_from_takes_no_share_of_the_right_ones() -> None:
    """The sum of no log-probs is 0, the most probable answer there can be."""
    loss = compose_loss("multi_target")
    told = [{"ids": [1, 2, 3], "sources": ["prompt", "policy", "policy"], "group": "g", "logps": {"current": [0.0, -1.0, p]}} for p in (-1.0, -3.0)]
    masked = {**told[0], "trainable": False, "sample_id": "masked"}
    both, three = (TokenBatch.from_sequences(rows, dtype=torch.float64) for rows in (told, [*told, masked]))
    weights = loss.weights(three)
    assert torch.equal(weights[:4], loss.weights(both)) and not bool(weights[4:].any())
    assert float(weights[0] + weights[2]) == pytest.approx(1.0)


def test_what_a_chain_of_estimators_asks_for_is_asked_for() -> None:
    """Without exits every answer is a chain of its own, and all would get 0; a reward of every token is none of an answer, whatever it stands in."""
    check(settings(rollout__strategy=Exits(), advantage=Chain({"serial": Serial()})))
    for advantage in (Chain({"serial": Serial()}), Chain({"inner": Chain({"progress": Progress(inner=None)})}), Among(inner=Serial())):
        with pytest.raises(ConfigError, match=r"(Serial|Progress) compares exits of a chain, and nobody leaves one: choose rollout=exits"):
            check(settings(advantage=advantage))
    with pytest.raises(ConfigError, match=r"hands on a reward for every token, and loss 'grpo' does not add them up"):
        check(settings(advantage=Chain({"placed": Placed()})))


def test_a_number_behind_those_of_every_token_is_refused() -> None:
    """The tokens would keep theirs, and what whitens or scales would do nothing."""
    made = group(1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match=r"advantage\.steps\.white gives sample '\S+' one number, and the step before has given its tokens numbers"):
        Chain({"placed": Placed(), "white": BatchWhiten()})([made])
    kept = Chain({"placed": Placed(), "best": Extremes(best=1, worst=0)})([made])[0].rollouts
    assert [r.advantage for r in kept] == [1.0, None, None] and all(r.placed for r in kept)
    assert values(Chain({"white": BatchWhiten(), "reward": Reward()}), made) == [1.0, 0.0, 0.5]


def answered(name: str, *rewards: float) -> Group:
    prompt = Prompt(name, (ord(name),))
    said = (Segment((2, 3), Source.policy),)
    return Group(prompt, tuple(Rollout(f"{name}/{i}", prompt, said, reward=r, advantage=0.0) for i, r in enumerate(rewards)))


def shown(name: str) -> Demo:
    return Demo(f"demo {name}", (Segment((ord(name),), Source.prompt), Segment((4,), Source.demo)), prompt=Prompt(name, (ord(name),)))


def test_groups_that_demonstrations_join_are_whitened_over_the_step() -> None:
    """Each was once estimated by itself: whitened over a batch of one group, and an annealed reward aged by as many steps as there were groups."""
    made = [answered("a", 1.0, 0.0), answered("b", 0.0, 0.0), answered("c", 0.0, 0.5)]
    demos = Demos([shown(name) for name in ("a", "b")])
    estimator = Chain({"center": GroupAdvantage(scale="none"), "whiten": BatchWhiten(over="sequences")})
    joint = [replace(g, rollouts=(*g.rollouts, as_rollout(demos.of(g.prompt)[0], 1.0))) for g in made[:2]]
    expected = estimator([*joint, made[2]])
    found = Inject(estimator)(made, demos, 0, 0.0)
    assert [r.advantage for g in found[:2] for r in g.rollouts] == pytest.approx([r.advantage for g in expected[:2] for r in g.rollouts])
    assert found[2] is made[2]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: Among(inner=inner, keep=2),
        lambda inner: Serial(inner=inner),
        lambda inner: Progress(inner=inner),
        lambda inner: PerReward(inner=inner),
        lambda inner: Chain({"around": Serial(inner=Chain({"base": inner}))}),
        Inject,
    ],
)
def test_what_an_estimator_inside_another_one_remembers_is_saved(wrap: Callable[[Any], Any]) -> None:
    moved, fresh = RunningBaseline(by="all", baselines={"all": 0.7}), RunningBaseline(by="all")
    wrap(fresh).load_state_dict(json.loads(json.dumps(wrap(moved).state_dict())))
    assert fresh.baselines == {"all": 0.7}


GATED = "{_target_: posttrain.contrib.gated.GatedKL, to: %s, threshold: 0.1}"


def test_two_terms_that_would_share_a_memory_are_refused() -> None:
    """Both wrote one running mean, of two different policies."""
    compose_loss("safe")
    with pytest.raises(ConfigError, match="stream 'rollouts' has GatedKL more than once, and what they remember would be one"):
        compose_loss("safe", [f"regularizers.other={GATED % 'teacher'}"])
    with pytest.raises(ConfigError, match="Whiten holds DualWeight, which remembers, and does not hand it on"):
        inner = "{_target_: posttrain.contrib.supervised.DualWeight}"
        compose_loss("grpo", [f"streams.rollouts.advantage={{_target_: posttrain.loss.advantage.Whiten, inner: {inner}}}"])


@pytest.mark.parametrize("around", ["Whiten", "GroupCenter, divide: none"])
def test_a_term_around_another_asks_for_what_that_one_needs(around: str) -> None:
    gain = "{_target_: posttrain.contrib.information.InformationGain, center: none}"
    needs = compose_loss("grpo", [f"streams.rollouts.advantage={{_target_: posttrain.loss.advantage.{around}, inner: {gain}}}"]).needs
    assert (needs.contexts, needs.coupling) == (frozenset({"without_thought"}), "batch")


REPLAY = {"rollout__kind": "replay", "data__kind": "demos", "advantage": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture__gate": BestWorst()}, "BestWorst makes pairs .* and loss 'grpo' learns from none, it would imitate both sides"),
        ({"loss": "a3t", "mixture__gate": InTurn({"pairs": BestWorst()})}, "BestWorst makes pairs .* and loss 'a3t' learns from none"),
        ({"mixture__gate": OutcomeTag("good", "bad")}, "OutcomeTag turns sampled answers into given ones, and loss 'grpo' learns from none"),
        ({"mixture__gate": Add(), "data__demos": {}}, "Add brings demonstrations, and loss 'grpo' learns from none: choose loss=sft_plus_rl"),
        ({"loss": "luffy"}, r"loss 'luffy' has the stream 'demos' for given answers, and nothing brings any.*loss\.streams\.demos=null"),
        ({"loss": "uft"}, r"loss 'uft' has the stream 'hints' for given beginnings of answers, and nothing brings any: choose rollout=prefix"),
        ({"loss": "rlp"}, "reads what a text says behind every thought, and nothing puts it there: choose mixture=before_text"),
        ({"mixture__gate": BeforeText()}, "this loss does not read them: choose loss=rlp"),
        ({"loss": "sft", **REPLAY, "data__loss_on": "environment"}, "loss 'sft' learns from no such tokens: choose loss=world_model"),
        ({"loss": "world_model", **REPLAY}, r"data\.loss_on=assistant marks none of it: set data\.loss_on=environment"),
    ],
)
def test_a_mixture_that_a_loss_does_not_learn_from_is_refused(changes: dict[str, Any], message: str) -> None:
    """Each of these ran to its end; pairs under a loss without any were both imitated, the others taught nothing, in whole or in part."""
    with pytest.raises(ConfigError, match=message):
        check(settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "luffy", "mixture__gate": Inject(GroupAdvantage())},
        {"mixture__gate": Inject(GroupAdvantage())},
        {"loss": "chord_mu", "mixture__gate": InTurn({"add": Add(), "off": None})},
        {"loss": ("luffy", ("streams.demos=null",))},
        {"loss": ("sft_plus_rl", ("streams.demos.coef=0.0",))},
        {"loss": "leti", "mixture__gate": OutcomeTag("good", "bad")},
        {"loss": "rlp", "mixture__gate": BeforeText()},
        {"loss": "world_model", **REPLAY, "data__loss_on": "environment"},
        {"loss": "sft", **REPLAY},
    ],
)
def test_a_mixture_that_a_loss_learns_from_passes(changes: dict[str, Any]) -> None:
    check(settings(**changes))


@pytest.mark.parametrize("loss", ["nash_md_mixture", "on_policy_distillation", "cgpo"])
def test_what_explain_advises_for_an_advantage_nobody_reads_is_accepted(loss: str) -> None:
    """advantage=none was advised, an error under strict=true, and refused for sampled answers."""
    objective = compose_loss(loss)
    (line,) = settings_that_cannot_act(objective, GroupAdvantage(), group_size=8)
    assert line.startswith("advantage: no stream of this loss reads the advantage column; set advantage=constant")
    for advised in (Constant(), Reward()):
        assert settings_that_cannot_act(objective, advised, group_size=8) == []
        check(settings(loss=loss, advantage=advised, model__teacher="somewhere"))
    (line,) = settings_that_cannot_act(compose_loss("online_dpo"), GroupAdvantage(), group_size=8)
    assert line.endswith("set advantage=none")
    check(settings(loss="online_dpo", advantage=None, mixture__gate=BestWorst()))


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["posttrain", "--version"])
    runpy.run_module("posttrain", run_name="__main__")
    assert capsys.readouterr().out.startswith("posttrain ")


def test_a_falling_rate_ends_with_the_run() -> None:
    """Batches in which a critic learns alone were counted as the policy's, and steps that a gate takes beside the others were not."""
    critic = CriticConfig(loss=compose_loss("value"), warmup_batches=20)
    config = settings(loss="ppo_gae", critic=critic, steps=100, learner__updates_per_batch=2)
    check(config)
    assert policy_steps(config) == 160 and policy_steps(settings(steps=100)) == 100
    check(settings(loss="relift", mixture__gate=Buffer()))
    with pytest.raises(ConfigError, match=r"schedule=cosine falls over .* mixture\.gate=Buffer takes more of them.*set learner\.schedule=constant"):
        check(settings(loss="relift", mixture__gate=InTurn({"buffer": Buffer()}), learner__schedule="cosine"))


def test_a_greedy_answer_is_added_where_and_only_where_it_is_the_baseline() -> None:
    """Under another estimator it was a sample of its group like the others, and learnt from."""
    check(settings(rollout__strategy=WithGreedy(), advantage=GreedyBaseline()))
    with pytest.raises(ConfigError, match=r"adds a greedy answer .*, which advantage GroupAdvantage takes for a sample: choose advantage=greedy"):
        check(settings(rollout__strategy=Exits(inner=WithGreedy()), advantage=GroupAdvantage()))
    with pytest.raises(ConfigError, match=r"nobody adds one: choose rollout=greedy_baseline"):
        check(settings(advantage=Chain({"greedy": GreedyBaseline()})))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("mixture.gate.success.metric", {"mixture__gate": Unsolved(success=Success("nope"))}),
        ("mixture.gate.gates.one.metric", {"mixture__gate": InTurn({"off": None, "one": BestWorst("nope")})}),
        ("rollout.strategy.metric", {"rollout__strategy": Dynamic(metric="nope")}),
    ],
)
def test_a_score_that_no_reward_gives_is_refused(key: str, changes: dict[str, Any]) -> None:
    """A gate that looked for it found every prompt unjudged, and let in nothing."""
    with pytest.raises(ConfigError, match=rf"{key}=nope: the rewards are r; reward takes them combined"):
        names(settings(data__demos={}, **changes))
    names(settings(data__demos={}, mixture__gate=InTurn({"one": Unsolved(success=Success("r/part"))})))


def test_routes_of_rewards_can_be_said_on_the_command_line() -> None:
    words = ["model=tiny", "data.train.path=x.jsonl", "reward=math", "loss=grpo", "rollout=vllm", "advantage=group_norm"]
    for said in ("reward.routes.sums=[answer]", "reward.routes={sums: [answer]}"):
        ((config, _),) = stages_of(Words([*words, said])).values()
        assert config.reward.routes == {"sums": ["answer"]}


def test_a_base_that_nothing_compares_with_or_that_never_moves_is_named() -> None:
    assert idle_settings(settings(loss="dpo", model__base="there")) == []
    lines = idle_settings(settings(loss="reinforce", model__base="there", learner__base_mix=0.5))
    assert [line.split(":")[0] for line in lines] == ["model.base", "learner.base_mix=0.5"]


def test_an_answer_that_was_left_out_stays_out() -> None:
    """Whitened behind it, the greedy answer of a group was learnt from, with its reward for an advantage."""
    made = group(1.0, 0.0, 0.5)
    greedy = replace(made.rollouts[2], sampling=replace(made.rollouts[2].sampling, temperature=0.0))
    held = replace(made, rollouts=(*made.rollouts[:2], greedy))
    assert values(Chain({"greedy": GreedyBaseline()}), held) == [0.5, -0.5, None]
    with pytest.raises(ValueError, match=r"advantage\.steps\.white gives sample '\S+' a number, which the step before has left out: put white first"):
        Chain({"greedy": GreedyBaseline(), "white": BatchWhiten()})([held])
    assert values(Chain({"white": BatchWhiten(over="sequences"), "best": Extremes(best=1, worst=0)}), made)[1:] == [None, None]


def test_scored_lists_are_weighed_by_the_advantage_and_other_given_data_say_that_they_are_not() -> None:
    """advantage=reward advantage.baseline=0.5 of loss=a3t left trajectories of 1 and 0 as they were: those of 0 taught nothing."""
    lists = {"loss": "a3t", "rollout__kind": "replay", "data__kind": "lists"}
    base = Reward(baseline=0.5)
    check(settings(**lists, advantage=base))
    assert estimator_of(settings(**lists, advantage=base)) is base and estimator_of(settings(advantage=base)) is base
    assert idle_settings(settings(**lists, advantage=base)) == idle_settings(settings(**lists, advantage=None))
    with pytest.raises(ConfigError, match="Serial compares exits of a chain"):
        check(settings(**lists, advantage=Serial()))
    demos = settings(loss="sft", **{**REPLAY, "advantage": base})
    assert estimator_of(demos) is None
    assert any("advantage: rewards are compared of sampled answers and of data.kind=lists" in line for line in idle_settings(demos))


def test_what_weighs_scored_lists_remembers_over_a_restart() -> None:
    moved, fresh = (DataSet([], Sampler([1, 2], 0), 1, RunningBaseline(baselines=start)) for start in ({"default": 0.4}, {}))
    fresh.load(json.loads(json.dumps(moved.state)))
    assert fresh.advantage.baselines == {"default": 0.4}
    DataSet([], Sampler([1, 2], 0), 1).load(DataSet([], Sampler([1, 2], 0), 1).state)


def test_given_answers_have_no_sampled_tokens_to_be_whitened_over() -> None:
    made = answered("a", 1.0, 0.0)
    given = replace(made, rollouts=tuple(replace(r, segments=(Segment((2, 3), Source.demo),), advantage=r.reward) for r in made.rollouts))
    with pytest.raises(ValueError, match=r"over=tokens counts sampled tokens, and these answers are given ones; set advantage\.over=sequences"):
        BatchWhiten()([given])
    assert values(BatchWhiten(over="sequences"), given) == pytest.approx([1.0, -1.0])
