"""A scalar head on the backbone: the numbers are transformers' own, and it trains, saves and loads like any model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from posttrain.config import CriticModelConfig, LearnerConfig, LoraConfig, ModelConfig
from posttrain.data.scored import read_at
from posttrain.learner.model import load_model
from posttrain.learner.scalar import ScalarModule, scalar_self_check, soft_min
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


# -- several heads ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_soft_minimum_lies_between_the_least_and_the_mean(dtype: torch.dtype) -> None:
    one_two = torch.tensor([[1.0, 2.0]], dtype=dtype)
    for alpha, expected in ((0.0, 1.0), (1e-6, 1.0), (0.3, 1.197), (1000.0, 1.49988), (math.inf, 1.5)):
        assert float(soft_min(one_two, alpha)) == pytest.approx(expected, abs=5e-4 if alpha == 0.3 else 6e-6), alpha
    naive = -0.3 * math.log((math.exp(-1 / 0.3) + math.exp(-2 / 0.3)) / 2)
    assert float(soft_min(one_two, 0.3)) == pytest.approx(naive, rel=1e-6) and naive != pytest.approx(1.0, abs=0.1)
    same = torch.full((3, 4), -7.25, dtype=dtype)
    assert all(torch.equal(soft_min(same, alpha), same[:, 0]) for alpha in (0.0, 1e-6, 0.3, 1000.0, math.inf)), "equal critics say what they say"
    far = soft_min(torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype), 0.1)
    assert float(far) == pytest.approx(-1e4 + 0.1 * math.log(3), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 10.0])
def test_its_derivative_is_a_share_of_every_head(alpha: float) -> None:
    numbers = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (share,) = torch.autograd.grad(soft_min(numbers, alpha).sum(), numbers)
    torch.testing.assert_close(share, torch.softmax(-numbers.detach() / alpha, -1))
    assert torch.autograd.gradcheck(lambda x: soft_min(x, alpha), (numbers,))


def critic(path: str, heads: int, alpha: float = 0.3, **model: object) -> TorchEngine:
    cfg = CriticModelConfig(path=path, dtype="float64", heads=heads, alpha=alpha, **model)  # type: ignore[arg-type]
    return TorchEngine(cfg, LearnerConfig(engine="torch", lr=1e-2), load("value"), total_steps=9)


def valued() -> TokenBatch:
    rows = [Row(ids=[9 + i, 20, 30 + i, 12][: 3 + i % 2], sources=["prompt"] + ["policy"] * (2 + i % 2), advantage=float(i), logps={"value": [0.0] * (3 + i % 2)}) for i in range(4)]
    batch = TokenBatch.from_sequences(read_at(rows, "before"), dtype=torch.float64)
    return batch.replace(totals=load("value").totals(batch))


@pytest.mark.parametrize("lora", [False, True])
def test_two_heads_are_one_critic(tiny: str, lora: bool) -> None:
    one = critic(tiny, 2, lora=LoraConfig(r=4) if lora else None)
    batch = valued()
    weight = one.module.head.weight
    assert weight.shape == (2, 64) and weight.requires_grad and float((weight[0] - weight[1]).abs().min()) > 0, "equal heads would stay equal"
    found = one.score(batch)["logp"]
    with torch.no_grad():
        captured: list[torch.Tensor] = []
        hook = one.module.head.register_forward_hook(lambda *args: captured.append(args[2]))
        one.score(batch)
        hook.remove()
    naive = -0.3 * torch.log(torch.exp(-captured[0] / 0.3).mean(-1))
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-12)
    assert not torch.allclose(found, captured[0].mean(-1), rtol=0, atol=1e-9) or float((captured[0][:, 0] - captured[0][:, 1]).abs().max()) < 1e-3
    before, errors = weight.detach().clone(), []
    for _ in range(6):
        total, count = one.forward_backward(batch)["rollouts/value_error"]
        errors.append(total / count)
        one.optim_step()
    assert errors[-1] < errors[0] and float((one.module.head.weight - before).abs().min()) > 0, "both heads learn"


def test_heads_start_where_the_folder_is(tiny: str, tmp_path: Path) -> None:
    single = engine(tiny)
    step(single, pairs())
    single.export(tmp_path / "out")
    path, batch = str(tmp_path / "out"), valued()
    one, two = critic(path, 1), critic(path, 2)
    torch.testing.assert_close(two.module.head.weight[:1], one.module.head.weight, rtol=0, atol=0)
    assert 0 < float((two.module.head.weight[1] - two.module.head.weight[0]).std()) < 2 / 65
    assert torch.equal(critic(path, 2).module.head.weight, two.module.head.weight), "every rank draws the same"
    least, mean = (critic(path, 2, alpha).score(batch)["logp"] for alpha in (0.0, math.inf))
    between = two.score(batch)["logp"]
    assert bool((least <= between).all()) and bool((between <= mean).all()) and float((mean - least).max()) > 0


def test_the_heads_of_a_critic_are_kept(tiny: str, tmp_path: Path) -> None:
    one, batch = critic(tiny, 3), valued()
    one.forward_backward(batch)
    one.optim_step()
    one.save(tmp_path / "saved")
    again = critic(tiny, 3)
    assert not torch.equal(again.score(batch)["logp"], one.score(batch)["logp"])
    again.load(tmp_path / "saved")
    assert torch.equal(again.score(batch)["logp"], one.score(batch)["logp"])
