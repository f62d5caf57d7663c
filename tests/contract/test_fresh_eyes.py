"""Claims somebody tried to prove false, and did: each of these once failed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.advantage import Among, BatchWhiten, Chain, Extremes, GroupAdvantage, PerReward, Placed, Reward, RunningBaseline
from posttrain.advantage.exits import Progress, Serial
from posttrain.advantage.shape import TailRisk
from posttrain.checks import check
from posttrain.cli import compose_loss
from posttrain.config import ConfigError
from posttrain.data.contexts import with_contexts
from posttrain.data.pack import Packer
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Inject, as_rollout
from posttrain.records import Demo, Group, Prompt, Rollout, Row, Segment, Source, TokenBatch
from posttrain.rollout.exits import Exits
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


def released_credit(bundle: Sequence[Sequence[float]], low: float, high: float, a: float = 0.2, b: float = 0.8, w: float = 1.5) -> list[list[float]]:
    """A bundle's advantages as RiskPO's release shares them out with ``std``: over the deviation of the bundle's scores and over that of the question's rewards."""
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
    with pytest.raises(ValueError, match=r"advantage\.steps\.white gives sample '\S+' one number, and the step before has given its tokens numbers of their own"):
        Chain({"placed": Placed(), "white": BatchWhiten()})([made])
    kept = Chain({"placed": Placed(), "best": Extremes(best=1, worst=0)})([made])[0].rollouts
    assert [r.advantage for r in kept] == [1.0, None, None] and all(r.placed for r in kept)
    assert values(Chain({"white": BatchWhiten(), "reward": Reward()}), made) == [1.0, 0.0, 0.5]


def answered(name: str, *rewards: float) -> Group:
    prompt = Prompt(name, (ord(name),))
    return Group(prompt, tuple(Rollout(f"{name}/{i}", prompt, (Segment((2, 3), Source.policy),), reward=r, advantage=0.0) for i, r in enumerate(rewards)))


def test_groups_that_demonstrations_join_are_whitened_over_the_step() -> None:
    """Each was once estimated by itself: whitened over a batch of one group, and an annealed reward aged by as many steps as there were groups."""
    made = [answered("a", 1.0, 0.0), answered("b", 0.0, 0.0), answered("c", 0.0, 0.5)]
    demos = Demos([Demo(f"demo {n}", (Segment((ord(n),), Source.prompt), Segment((4,), Source.demo)), prompt=Prompt(n, (ord(n),))) for n in ("a", "b")])
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
        compose_loss("grpo", ["streams.rollouts.advantage={_target_: posttrain.loss.advantage.Whiten, inner: {_target_: posttrain.contrib.supervised.DualWeight}}"])


@pytest.mark.parametrize("around", ["Whiten", "GroupCenter, divide: none"])
def test_a_term_around_another_asks_for_what_that_one_needs(around: str) -> None:
    gain = "{_target_: posttrain.contrib.information.InformationGain, center: none}"
    needs = compose_loss("grpo", [f"streams.rollouts.advantage={{_target_: posttrain.loss.advantage.{around}, inner: {gain}}}"]).needs
    assert (needs.contexts, needs.coupling) == (frozenset({"without_thought"}), "batch")
