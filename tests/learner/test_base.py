"""A base that follows the policy: how it moves, when, what survives a checkpoint, and a base that is another model."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
from posttrain.data.pack import Packer
from posttrain.learner.actor import StepReport
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.records import Demo, Pair, Row, Segment, Source, TokenBatch
from posttrain.testing.tiny import create_tiny_model
from posttrain.update import Learn

SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2, "intermediate_size": 96}
BATCH = TokenBatch.from_sequences([Row(ids=[5, 6, 7, 8, 9], sources=["prompt", "prompt", "demo", "demo", "demo"])])


def engine(path: str, **model: Any) -> TorchEngine:
    return TorchEngine(ModelConfig(path=path, **{"dtype": "float64", **model}), LearnerConfig(engine="torch", lr=1e-2), load("tr_dpo"), total_steps=9)


def pair(name: str, chosen: int, rejected: int) -> Pair:
    asked = Segment((5, 6), Source.prompt, trainable=False)
    return Pair(name, *(Demo(f"{name}/{i}", (asked, Segment((i, 7), Source.demo))) for i in (chosen, rejected)))


PAIRS = [pair("a", 8, 9), pair("b", 9, 10)]


class InProcess:
    """A learner's group with one engine in this process; counts how often the base moved."""

    def __init__(self, one: TorchEngine) -> None:
        self.one, self.moved, self.batches = one, 0, []

    async def score(self, micro: list[TokenBatch], policy: str = "current", entropy: bool = False) -> list[dict[str, torch.Tensor]]:
        return [self.one.score(b, policy, entropy) for b in micro]

    async def step(self, micro: list[TokenBatch], weights: Any) -> StepReport:
        self.batches += micro
        return StepReport(self.one.forward_backward(micro[0]), self.one.optim_step())

    async def move_base(self, mix: float) -> None:
        self.moved += 1
        self.one.move_base(mix)


def train(learner: InProcess, steps: range, every: int, mix: float) -> list[dict[str, float]]:
    learn = Learn(learner.one.core.objective, Packer(64), learner, base_every=every, base_mix=mix)
    return [asyncio.run(learn.learn(step, PAIRS, 0.0)).result() for step in steps]


def weights(one: TorchEngine, which: str) -> dict[str, torch.Tensor]:
    if which == "policy":
        return dict(one.state())
    return {name: p.detach().clone() for name, p in one.core.base.model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_the_base_moves_towards_the_policy_by_its_share(tiny: str, mix: float) -> None:
    learner = InProcess(engine(tiny))
    train(learner, range(2), every=0, mix=1.0)
    before, policy = weights(learner.one, "base"), weights(learner.one, "policy")
    learner.one.move_base(mix)
    after = weights(learner.one, "base")
    assert max(float((policy[n] - before[n]).abs().max()) for n in policy) > 1e-3
    for name, tensor in policy.items():
        torch.testing.assert_close(after[name], mix * tensor + (1 - mix) * before[name], rtol=1e-12, atol=1e-14)


def test_it_moves_exactly_when_told_and_not_otherwise(tiny: str) -> None:
    learner = InProcess(engine(tiny))
    moved = [row.get("learner/base_moved", 0.0) for row in train(learner, range(7), every=3, mix=0.6)]
    assert moved == [0, 0, 1, 0, 0, 1, 0] and learner.moved == 2


def test_a_base_copied_after_every_batch_leaves_the_margin_at_zero(tiny: str) -> None:
    """The limit of the soft update: pure contrast, with weight beta / 2.  A base that stays lets the margin grow."""
    copied = train(InProcess(engine(tiny)), range(3), every=1, mix=1.0)
    assert [row["pairs/margin"] for row in copied] == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert [row["pairs/preference_loss"] for row in copied] == pytest.approx([math.log(2)] * 3)
    assert [row["pairs/advantage_abs"] for row in copied] == pytest.approx([0.025] * 3)
    fixed = train(InProcess(engine(tiny)), range(3), every=0, mix=1.0)
    assert fixed[-1]["pairs/margin"] > 1e-3


def test_base_log_probs_are_scored_anew_after_a_move(tiny: str) -> None:
    """Log-probs of the first base kept in a cache would belong to another model."""
    learner = InProcess(engine(tiny))
    train(learner, range(2), every=1, mix=0.6)
    first, second = (b.logps["base"] for b in learner.batches)
    assert float((first - second).abs().max()) > 1e-4
    torch.testing.assert_close(second.double(), _base_before_last_move(tiny)[: len(second)], rtol=0, atol=1e-5)


def _base_before_last_move(tiny: str) -> torch.Tensor:
    learner = InProcess(engine(tiny))
    train(learner, range(1), every=0, mix=1.0)
    learner.one.move_base(0.6)
    return learner.one.score(learner.batches[0], "base")["logp"].double()


def test_a_moved_base_survives_a_checkpoint(tiny: str, tmp_path: Path) -> None:
    learner = InProcess(engine(tiny))
    train(learner, range(4), every=2, mix=0.6)
    learner.one.save(tmp_path)
    resumed = InProcess(engine(tiny))
    resumed.one.load(tmp_path)
    for name, tensor in weights(learner.one, "base").items():
        assert torch.equal(tensor, weights(resumed.one, "base")[name])
    rows = [train(one, range(4, 7), every=2, mix=0.6) for one in (learner, resumed)]
    assert [r["pairs/margin"] for r in rows[0]] == [r["pairs/margin"] for r in rows[1]]


def test_a_base_that_never_moved_is_not_in_the_checkpoint(tiny: str, tmp_path: Path) -> None:
    one = engine(tiny)
    one.score(BATCH, "base")
    one.save(tmp_path)
    assert torch.load(next(tmp_path.glob("*.pt")), weights_only=True)["base"] is None
    one.move_base(1.0)
    one.load(tmp_path)
    torch.testing.assert_close(one.score(BATCH, "base")["logp"], engine(tiny).score(BATCH, "base")["logp"])


def test_with_adapters_the_base_becomes_a_model_of_its_own(tiny: str) -> None:
    learner = InProcess(engine(tiny, lora=LoraConfig(r=4)))
    start = learner.one.score(BATCH, "base")["logp"]
    train(learner, range(2), every=0, mix=1.0)
    torch.testing.assert_close(learner.one.score(BATCH, "base")["logp"], start)
    learner.one.move_base(1.0)
    torch.testing.assert_close(learner.one.score(BATCH, "base")["logp"], learner.one.score(BATCH)["logp"], rtol=0, atol=1e-6)
    assert float((learner.one.score(BATCH, "base")["logp"] - start).abs().max()) > 1e-4


def test_low_precision_bases_are_mixed_in_float32(tiny: str) -> None:
    one = engine(tiny, dtype="bfloat16")
    name, start = next((n, p.detach().clone()) for n, p in one.core._own_base().model.named_parameters())
    with torch.no_grad():
        other = (start.float() * 1.5).to(torch.bfloat16)
    one.core.move_base([(name, other)], 0.3)
    expected = (0.7 * start.float() + 0.3 * other.float()).to(torch.bfloat16)
    assert torch.equal(weights(one, "base")[name], expected)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_the_base_may_be_another_model(tiny: str, tmp_path: Path, lora: LoraConfig | None) -> None:
    other = str(create_tiny_model(tmp_path / "other", seed=11, **SIZES))
    one = engine(tiny, base=other, lora=lora)
    torch.testing.assert_close(one.score(BATCH, "base")["logp"], engine(other).score(BATCH)["logp"])
    assert float((one.score(BATCH, "base")["logp"] - one.score(BATCH)["logp"]).abs().max()) > 1e-3


def test_impossible_bases_are_refused(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base_mix=1\.5"):
        engine(tiny).move_base(1.5)
    foreign = str(create_tiny_model(tmp_path / "foreign", alphabet="abc", **SIZES))
    with pytest.raises(ValueError, match=r"model\.base=.* has a vocabulary"):
        engine(tiny, base=foreign).score(BATCH, "base")
