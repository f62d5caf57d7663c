"""A scalar head on the backbone: the numbers are transformers' own, and it trains, saves and loads like any model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
from posttrain.data.scored import read_at
from posttrain.learner.model import load_model
from posttrain.learner.scalar import ScalarModule, scalar_self_check
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.records import Row, TokenBatch


def pairs() -> TokenBatch:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(4):
        for side in ("chosen", "rejected"):
            ids = torch.randint(9, 60, (3 + i + (side == "chosen"),), generator=draw).tolist()
            rows.append(Row(ids=ids, sources=["prompt"] + ["demo"] * (len(ids) - 1), pair=i, side=side, sample_id=f"{i}/{side}"))  # type: ignore[arg-type]
    for row in rows:
        row.trainable = [s == "demo" for s in row.sources]  # type: ignore[union-attr]
    batch = TokenBatch.from_sequences(read_at(rows, "end"))
    return batch.replace(totals=load("reward_model").totals(batch))


def engine(path: str, dtype: str = "float32", **model: object) -> TorchEngine:
    return TorchEngine(ModelConfig(path=path, dtype=dtype, **model), LearnerConfig(engine="torch", lr=1e-2), load("reward_model"), total_steps=4)  # type: ignore[arg-type]


def step(one: TorchEngine, batch: TokenBatch) -> float:
    metrics = one.forward_backward(batch)
    one.optim_step()
    total, count = metrics["pairs/preference_loss"]
    return total / count


def test_the_numbers_are_those_of_transformers(tiny: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    one = engine(tiny)
    losses = [step(one, pairs()) for _ in range(3)]
    assert losses[0] == pytest.approx(0.693, abs=0.1) and losses[2] < losses[1] < losses[0]
    one.export(tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForSequenceClassification" and theirs.config.num_labels == 1
    theirs.config.pad_token_id = 0
    batch = pairs()
    found = one.score(batch)["logp"]
    for i in range(batch.num_sequences):
        ids, last = batch.input_ids[batch.seq == i], int(((batch.seq == i) & batch.trainable).nonzero())
        assert float(theirs(input_ids=ids[None]).logits) == pytest.approx(float(found[last]), abs=1e-5)
    again = engine(str(tmp_path / "out"))
    assert torch.equal(again.score(batch)["logp"], found), "a folder with a head keeps it"


def test_both_heads_are_called_in_the_same_way() -> None:
    """The forward of a batch passes everything by position, whatever the head."""
    from inspect import signature

    from posttrain.learner.forward import PolicyModule

    assert list(signature(ScalarModule.forward).parameters) == list(signature(PolicyModule.forward).parameters)


def test_a_new_head_depends_on_the_seed_alone(tiny: str) -> None:
    config = ModelConfig(path=tiny, dtype="float32")
    one, same, other = (load_model(config, seed=seed, head="scalar").score.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(1 / 65, rel=0.3) and one.shape == (1, 64)


def test_everything_moves_at_the_first_step(tiny: str) -> None:
    one = engine(tiny)
    step(one, pairs())
    assert one.frozen() == []


def test_adapters_leave_the_head_to_learn_whole(tiny: str, tmp_path: Path) -> None:
    one = engine(tiny, lora=LoraConfig(r=4))
    names = [name for name, _ in one.named]
    assert any(".lora_A" in n for n in names) and [n for n in names if "lora" not in n] == [n for n in names if n.endswith("score.weight")] != []
    for _ in range(2):
        step(one, pairs())
    found = one.score(pairs())["logp"]
    one.export(tmp_path / "out")
    torch.testing.assert_close(engine(str(tmp_path / "out")).score(pairs())["logp"], found, rtol=0, atol=1e-5)


def test_numbers_are_wide_in_a_narrow_model(tiny: str) -> None:
    found = engine(tiny, dtype="bfloat16").score(pairs())["logp"]
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


def test_layers_that_mix_sequences_are_refused(tiny: str) -> None:
    module = ScalarModule(load_model(ModelConfig(path=tiny, dtype="float32"), head="scalar"))
    assert scalar_self_check(module) < 1e-5
    module.inner.model.norm.register_forward_hook(lambda _, __, out: out + 0.1 * out.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="the numbers of a packed row differ from those of its sequences by"):
        scalar_self_check(module)


def test_a_model_without_such_a_head_is_refused(tiny: str) -> None:
    with pytest.raises(ValueError, match="no linear head of width 1 named 'score'"):
        from posttrain.learner.model import _prepare_head

        _prepare_head(torch.nn.Linear(2, 2), fresh=True, seed=0)
