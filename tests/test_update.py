"""One batch of experience through packer, passes and a real learner: how it was cut must not show, neither in the weights nor in the metrics."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.advantage import GroupAdvantage
from posttrain.config import LearnerConfig, ModelConfig
from posttrain.data.pack import Packer
from posttrain.learner.actor import StepReport, add_metrics
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Segment, Source
from posttrain.rollout.mismatch import MismatchError
from posttrain.testing.tiny import create_tiny_model
from posttrain.update import Critic, Learn


class Local:
    """A learner group of one rank, in this process."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.scored = engine, 0

    async def score(self, micro: Sequence[Any], policy: str = "current", entropy: bool = False) -> list[dict[str, Tensor]]:
        self.scored += 1
        return [self.engine.score(batch, policy, entropy) for batch in micro]

    async def step(self, micro: Sequence[Any], weights: Sequence[Tensor] | None = None) -> StepReport:
        given = weights or [None] * len(micro)
        parts = [self.engine.forward_backward(b, w, last=b is micro[-1]) for b, w in zip(micro, given, strict=True)]
        return StepReport(add_metrics(parts), self.engine.optim_step())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(create_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32, num_heads=1, num_kv_heads=1, num_layers=1, intermediate_size=48))


def ids(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.randrange(9, 90) for _ in range(rng.randint(low, high)))


def pairs() -> list[Any]:
    rng = random.Random(0)

    def demo(name: str, prompt: tuple[int, ...]) -> Demo:
        return Demo(name, (Segment(prompt, Source.prompt), Segment(ids(rng, 2, 7), Source.demo)))

    prompts = [ids(rng, 2, 4) for _ in range(6)]
    return [Pair(f"p{i}", demo(f"p{i}+", prompt), demo(f"p{i}-", prompt)) for i, prompt in enumerate(prompts)]


def groups(offset: float = 0.0) -> list[Any]:
    """Answers with log-probs that no model gave them: ratios differ from 1, so clips act."""
    rng, out = random.Random(1), []
    for question in range(4):
        prompt = Prompt(f"q{question}", ids(rng, 2, 4))
        rollouts = []
        for i in range(4):
            answer = ids(rng, 2, 7)
            segment = Segment(answer, Source.policy, logprobs=tuple(-4.4 + offset + rng.gauss(0, 0.3) for _ in answer), version=0)
            rollouts.append(Rollout(f"q{question}/{i}", prompt, (segment,), "stop", reward=float(rng.random() < 0.5)))
        out.append(Group(prompt, tuple(rollouts)))
    return GroupAdvantage()(out)


def learnt(tiny: str, loss: str, items: list[Any], room: int, updates: int = 1, overrides: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, float], Local]:
    """Weights, metrics and learner after one batch cut to rows of ``room`` tokens."""
    objective = load(loss, overrides)
    engine = TorchEngine(ModelConfig(path=tiny, dtype="float64"), LearnerConfig(engine="torch", lr=1e-2), objective, total_steps=4)  # type: ignore[arg-type]
    learner = Local(engine)
    totals = asyncio.run(Learn(objective, Packer(room, 1, updates), learner).learn(0, items, 0.0))
    return {name: tensor.clone() for name, tensor in engine.state()}, totals.result(), learner


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-9, atol=1e-12) for name in one)


@pytest.mark.parametrize(
    ("loss", "make", "live"),
    [("sft", pairs, False), ("dpo", pairs, True), ("ipo", pairs, True), ("grpo", groups, False), ("dapo", groups, False), ("gspo", groups, False)],
)
def test_the_cut_does_not_show(tiny: str, loss: str, make: Callable[[], list[Any]], live: bool) -> None:
    whole, cut = (learnt(tiny, loss, make(), room) for room in (10_000, 9))
    assert close(whole[0], cut[0])
    assert whole[1]["learner/two_passes"] == 0.0 and cut[1]["learner/two_passes"] == float(live), "a cut pair takes two passes, a cut group need not"
    for name, value in whole[1].items():
        if not name.startswith(("pack/", "learner/", "mismatch/")):
            assert cut[1][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_learning_pair_by_half_would_be_another_thing(tiny: str) -> None:
    """The comparison above can fail: without the first pass a cut pair is an error, and another batch gives other weights."""
    assert not close(learnt(tiny, "dpo", pairs(), 10_000)[0], learnt(tiny, "dpo", pairs()[:-1], 10_000)[0])


def test_several_updates_see_the_policy_they_started_from(tiny: str) -> None:
    """``old`` is scored once, before the first update; the second update's ratios are then not 1."""
    one, several = (learnt(tiny, "grpo", groups(), 10_000, updates, ("streams.rollouts.masks.clip.low=0.01", "streams.rollouts.masks.clip.high=0.01")) for updates in (1, 2))
    assert one[1]["rollouts/clip/masked"] == 0.0, "on the first update the policy is its own old one"
    assert several[1]["rollouts/clip/masked"] > 0.0
    assert several[2].scored == 2 and one[2].scored == 0, "each of the two steps' parts once, nothing when there is one"


def test_mismatch_is_measured_on_every_fresh_batch(tiny: str) -> None:
    metrics = learnt(tiny, "grpo", groups(), 10_000)[1]
    tokens = sum(r.num_tokens for g in groups() for r in g.rollouts)
    assert metrics["mismatch/tokens"] == tokens and metrics["mismatch/mean_abs"] > 0.1 and metrics["mismatch/k3"] >= 0.0
    twice = learnt(tiny, "grpo", groups(), 10_000, updates=2)[1]
    assert 0 < twice["mismatch/tokens"] < tokens, "not on what is learnt from after the weights have moved"


def test_sampled_tokens_that_are_not_learnt_are_no_mismatch(tiny: str) -> None:
    """The learner has no log-prob of theirs to compare with: the forward pass leaves them out."""

    def without_first(r: Rollout) -> Rollout:
        return replace(r, segments=tuple(replace(s, trainable=(False,) + (True,) * (len(s.ids) - 1)) for s in r.segments))

    halves = [replace(g, rollouts=tuple(map(without_first, g.rollouts))) for g in groups()]
    whole, part = (learnt(tiny, "grpo", items, 10_000)[1] for items in (groups(), halves))
    assert part["mismatch/tokens"] == whole["mismatch/tokens"] - sum(len(g.rollouts) for g in halves) == part["rollouts/tokens"]
    assert part["mismatch/max_abs"] <= whole["mismatch/max_abs"]


def test_the_first_batch_must_agree(tiny: str) -> None:
    objective = load("grpo")
    engine = TorchEngine(ModelConfig(path=tiny, dtype="float64"), LearnerConfig(engine="torch", lr=1e-2), objective, total_steps=4)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in engine.state()}
    with pytest.raises(MismatchError, match="differ by"):
        asyncio.run(Learn(objective, Packer(100), Local(engine), tolerance=0.05).learn(0, groups(offset=1.0), 0.0))
    assert close(before, dict(engine.state())), "before anything is learnt"


def test_nothing_left_is_an_error_with_the_reasons(tiny: str) -> None:
    prompt = Prompt("q", (9, 10))
    failed = Group(prompt, (Rollout("q/0", prompt, (Segment((11,), Source.policy, logprobs=(-1.0,), version=0),), "stop", reward=None),))
    with pytest.raises(ValueError, match="step 0: nothing is left to learn from"):
        learnt(tiny, "grpo", GroupAdvantage()([failed]), 100)


def test_a_critic_values_first_and_learns_after(tiny: str) -> None:
    """Its values are those before its step, whatever the cut; with lambda 1 it is drawn towards the rewards themselves; warm-up leaves the
    policy alone."""
    goal, own = load("ppo_gae", ["streams.rollouts.advantage.inner.lam=1.0", "streams.rollouts.advantage.inner.coef=0.0"]), load("value")

    def run(room: int, updates: int = 1, warmup: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        cfg = LearnerConfig(engine="torch", lr=1e-2)
        policy, critic = (TorchEngine(ModelConfig(path=tiny, dtype="float64"), cfg, o, total_steps=4) for o in (goal, own))  # type: ignore[arg-type]
        learn = Learn(goal, Packer(room, 1, updates), Local(policy), critic=Critic(Local(critic), own, warmup))
        totals = asyncio.run(learn.learn(0, groups(), 0.0))
        return ({n: t.clone() for n, t in dict(e.state()).items()} for e in (policy, critic)), totals.result()  # type: ignore[return-value]

    (policy, critic), metrics = run(10_000)
    (policy_cut, critic_cut), metrics_cut = run(9)
    assert close(policy, policy_cut) and close(critic, critic_cut)
    for name in ("critic/value_loss", "critic/explained_variance", "rollouts/objective"):
        assert metrics[name] == pytest.approx(metrics_cut[name], rel=1e-9)
    start = dict(TorchEngine(ModelConfig(path=tiny, dtype="float64"), LearnerConfig(engine="torch"), goal).state())  # type: ignore[arg-type]
    (policy, critic), metrics = run(10_000, warmup=1)
    assert close(policy, start) and close(critic, critic_cut) and "learner/grad_norm" not in metrics
    rewards = [r.advantage for g in groups() for r in g.rollouts for _ in range(r.num_tokens)]
    # with lambda 1 the return of every token is the reward of its answer; a new critic says next to nothing
    assert metrics["critic/value_error"] == pytest.approx(sum(a * a for a in rewards) / len(rewards), rel=0.3)
    assert abs(metrics["critic/score"]) < 0.3
    assert run(10_000, updates=2)[1]["critic/tokens"] == metrics["critic/tokens"]
