"""The plain engine: slicing does not matter, weights leave it merged and loadable, it continues bit for bit, and it stops on NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference, regularizer
from posttrain.records import Row, TokenBatch
from posttrain.sync.fingerprint import fingerprint


def goal() -> Objective:
    stream = Stream(
        source=("policy",),
        likelihood=likelihood.Token(),
        reference=reference.Current(),
        advantage=advantage.Column(),
        aggregation=aggregate.TokenMean(),
    )
    return Objective({"rollouts": stream}, {"entropy": regularizer.Entropy(0.1)})


def batch(seed: int = 0) -> TokenBatch:
    draw = torch.Generator().manual_seed(seed)
    rows = [
        Row(
            ids=torch.randint(5, 90, (length,), generator=draw).tolist(),
            sources=["prompt"] * 2 + ["policy"] * (length - 2),
            advantage=float(torch.randn((), generator=draw)),
        )
        for length in (4, 9, 17, 5)
    ]
    whole = TokenBatch.from_sequences(rows)
    return whole.replace(totals=goal().totals(whole))


def engine(tiny: str, *, steps: int = 5, seed: int = 0, objective: Any = None, learner: dict[str, Any] | None = None, **model: Any) -> TorchEngine:
    settings = {"engine": "torch", "lr": 1e-2, "weight_decay": 0.1, **(learner or {})}
    model_cfg = ModelConfig(path=tiny, **{"dtype": "float32", **model})
    return TorchEngine(model_cfg, LearnerConfig(**settings), objective or goal(), total_steps=steps, seed=seed)


def gradients(tiny: str, parts: list[list[int]], **model: Any) -> dict[str, torch.Tensor]:
    one, whole = engine(tiny, dtype="float64", **model), batch()
    for part in parts:
        one.forward_backward(whole.take(part))
    return {name: one.grads[p].clone() for name, p in one.named}


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3], [0], [], [2], [1]], [[2, 0, 3, 1]]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_does_not_depend_on_slicing(tiny: str, parts: list[list[int]], checkpointing: bool) -> None:
    truth = gradients(tiny, [[0, 1, 2, 3]])
    sliced = gradients(tiny, parts, gradient_checkpointing=checkpointing)
    assert max(float(g.abs().max()) for g in truth.values()) > 1e-3
    for name in truth:
        torch.testing.assert_close(sliced[name], truth[name], rtol=1e-9, atol=1e-13)


def test_a_batch_with_nothing_to_learn_gives_zero(tiny: str) -> None:
    one = engine(tiny)
    idle = batch().replace(trainable=torch.zeros(batch().num_tokens, dtype=torch.bool))
    assert one.forward_backward(idle) == {} and one.forward_backward(batch().take([])) == {}
    assert all(float(g.abs().max()) == 0.0 for g in one.grads.values())
    assert one.optim_step()["grad_norm"] == 0.0


def test_clipping_and_metrics(tiny: str) -> None:
    free, clipped = engine(tiny, learner={"max_grad_norm": 1e9}), engine(tiny, learner={"max_grad_norm": 0.01, "eps": 1e-2})
    loose = engine(tiny, learner={"max_grad_norm": 1e9, "eps": 1e-2})
    reports = []
    for one in (free, clipped, loose):
        metrics = one.forward_backward(batch())
        reports.append(one.optim_step())
    assert metrics["rollouts/tokens"][0] == float(batch().trainable.sum())
    assert reports[0]["grad_norm"] == reports[1]["grad_norm"] > 0.01
    assert reports[1]["update_norm_ratio"] < 0.5 * reports[2]["update_norm_ratio"]
    assert free.frozen() == []


def test_accumulation_is_in_float32(tiny: str) -> None:
    """256 small gradients after one large one: bfloat16 sums would lose every one of them."""
    one = engine(tiny, dtype="bfloat16")
    name, parameter = one.named[0]
    one.grads[parameter].zero_()
    for value in [1.0] + [2.0**-9] * 256:
        parameter.grad = torch.full_like(parameter, value)
        one._collect(parameter)
    assert torch.equal(one.grads[parameter], torch.full_like(one.grads[parameter], 1.5)), name


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}, {"lora": LoraConfig(r=4)}, {"lora": LoraConfig(r=4, dropout=0.2)}])
def test_resume_is_bit_exact(tiny: str, tmp_path: Path, model: dict[str, Any]) -> None:
    """Dropout included: the random state travels too."""
    one = engine(tiny, **model)

    def run(which: TorchEngine, first: int, last: int) -> list[dict[str, float]]:
        out = []
        for step in range(first, last):
            which.forward_backward(batch(step))
            out.append(which.optim_step())
        return out

    run(one, 0, 2)
    one.save(tmp_path)
    later = run(one, 2, 5)
    other = engine(tiny, seed=9, **model)
    other.load(tmp_path)
    assert run(other, 2, 5) == later
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one._masters(), other._masters(), strict=True))


def test_checkpoint_of_other_settings_is_refused(tiny: str, tmp_path: Path) -> None:
    engine(tiny).save(tmp_path)
    with pytest.raises(ValueError, match="dtype='float32', this run has dtype='bfloat16'"):
        engine(tiny, dtype="bfloat16").load(tmp_path)
    with pytest.raises(ValueError, match="disagree about"):
        engine(tiny, lora=LoraConfig(r=4)).load(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint of learner rank 0 .* \(it holds 0 ranks\)"):
        engine(tiny).load(tmp_path / "nowhere")


def test_checkpoint_cannot_run_code(tiny: str, tmp_path: Path) -> None:
    import pickle

    one = engine(tiny)
    torch.save({"meta": one._meta(), "evil": slice}, tmp_path / "learner-rank00000.pt")
    with pytest.raises(pickle.UnpicklingError):
        one.load(tmp_path)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.15)])
@pytest.mark.parametrize("lora", [False, True])
def test_export_loads_in_transformers(tiny: str, tmp_path: Path, dtype: str, tolerance: float, lora: bool) -> None:
    """Merged weights, config and tokenizer; the exported model gives the learner's log-probs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = engine(tiny, dtype=dtype, lora=LoraConfig(r=4) if lora else None)
    for step in range(3):
        one.forward_backward(batch(step))
        one.optim_step()
    one.export(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.dtype == one.module.head.weight.dtype and model.config.use_cache
    found = one.score(batch())["logp"]
    ids = torch.cat([batch().input_ids[:3], batch().target_ids[2:3]])
    logits = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), -1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found[:3], logits, rtol=0, atol=tolerance)
    assert fingerprint(model.named_parameters()) == one.fingerprint()
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template
    assert (tmp_path / "export" / "adapter" / "adapter_model.safetensors").exists() == lora


def test_exported_adapter_loads_in_peft(tiny: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one = engine(tiny, lora=LoraConfig(r=4))
    for step in range(2):
        one.forward_backward(batch(step))
        one.optim_step()
    one.export(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter").merge_and_unload()
    for name, tensor in one.state():
        torch.testing.assert_close(dict(model.named_parameters())[name], tensor, rtol=0, atol=1e-6)


def test_base_is_the_start(tiny: str) -> None:
    one = engine(tiny)
    start = one.score(batch())["logp"]
    one.forward_backward(batch())
    one.optim_step()
    assert torch.equal(one.score(batch(), "base")["logp"], start) and not torch.equal(one.score(batch())["logp"], start)
    scored = one.score(batch(), entropy=True)
    assert set(scored) == {"logp", "entropy"} and float(scored["entropy"].min()) > 0
    assert one.score(batch().take([]))["logp"].shape == (0,)
    with pytest.raises(ValueError, match="no policy 'nobody'"):
        one.score(batch(), "nobody")


def test_frozen_names_what_did_not_move(tiny: str) -> None:
    one = engine(tiny, learner={"lr": 1e-2, "weight_decay": 0.0})
    name, parameter = one.named[2]
    parameter.register_hook(torch.zeros_like)
    one.forward_backward(batch())
    one.optim_step()
    assert one.frozen() == [name]


def poison(module: Any, inputs: Any, output: torch.Tensor) -> None:
    """A forward hook: the gradient that comes back through ``output`` is NaN, the loss stays finite."""
    output.register_hook(lambda grad: grad * torch.nan)


def everything(one: TorchEngine) -> dict[str, torch.Tensor]:
    """Weights, masters, optimizer state and the count of steps, copied."""
    found = {f"weight {name}": p for name, p in one.named} | {f"master {name}": m for name, m in one._masters()}
    found |= {f"{key} {name}": value for name, m in one._masters() for key, value in one.optimizer.state[m].items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()} | {"steps": torch.tensor(one.steps_taken)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_gradient_stops_before_anything_changes(tiny: str, dtype: str) -> None:
    """One bad micro-batch among good ones; its loss is finite, so only the gradient can tell."""
    one = engine(tiny, dtype=dtype)
    one.forward_backward(batch(0))
    one.optim_step()
    before = everything(one)
    one.forward_backward(batch(1))
    planted = one.module.inner.model.layers[0].register_forward_hook(poison)
    assert math.isfinite(one.forward_backward(batch(2))["loss"][0])
    planted.remove()
    one.forward_backward(batch(3))
    with pytest.raises(FloatingPointError, match=r"optimizer step 1, rank 0: the gradient of model\.model\.(layers\.0|embed)\S+ \(and \d+ more\) is NaN"):
        one.optim_step()
    after = everything(one)
    assert len(before) > 4 * len(one.named) and all(torch.equal(before[name], after[name]) for name in before)


def test_a_sum_of_gradients_that_overflows_stops_before_anything_changes(tiny: str) -> None:
    """Two finite gradients whose sum is not, behind the watch that looks at each of them."""
    one = engine(tiny)
    one.named[3][1].register_hook(lambda grad: torch.full_like(grad, 3e38))
    one.forward_backward(batch(0))
    before = everything(one)
    one.forward_backward(batch(1))
    with pytest.raises(FloatingPointError, match="optimizer step 0: the norm of the summed gradient is inf; the weights were not changed"):
        one.optim_step()
    assert all(torch.equal(before[name], tensor) for name, tensor in everything(one).items())


def test_a_large_gradient_is_clipped_by_its_true_norm(tiny: str) -> None:
    """Its square does not fit into float32."""
    one = engine(tiny, learner={"max_grad_norm": 1.0, "eps": 1.0, "weight_decay": 0.0})
    name, parameter = one.named[3]
    parameter.register_hook(lambda grad: torch.full_like(grad, 1e30))
    one.forward_backward(batch(0))
    assert one.optim_step()["grad_norm"] == pytest.approx(1e30 * parameter.numel() ** 0.5, rel=1e-6), name
    given = one.optimizer.state[one.master[parameter]]["exp_avg"] / (1 - one.cfg.betas[0])
    torch.testing.assert_close(given, torch.full_like(given, parameter.numel() ** -0.5))


def test_a_loss_that_is_not_finite_stops_at_its_micro_batch(tiny: str) -> None:
    one, whole = engine(tiny), batch()
    with pytest.raises(FloatingPointError, match=r"the loss of .* is nan"):
        one.forward_backward(whole, weights=torch.full((whole.num_tokens,), torch.nan))


def test_sharding_is_refused(tiny: str) -> None:
    with pytest.raises(ValueError, match=r"learner.engine=torch cannot shard"):
        engine(tiny, learner={"zero_stage": 2})


def test_untouched_parameters_stay_bit_for_bit(tiny: str, tmp_path: Path) -> None:
    """Under weight decay, over a checkpoint and a resume: only what ``model.train_only`` names moves, and it does."""
    one = engine(tiny, train_only=r"mlp\.")
    start = {name: p.detach().clone() for name, p in one.module.named_parameters()}
    for step in range(2):
        one.forward_backward(batch(step))
        one.optim_step()
    one.save(tmp_path)
    again = engine(tiny, train_only=r"mlp\.")
    again.load(tmp_path)
    again.forward_backward(batch(5))
    again.optim_step()
    for name, parameter in again.module.named_parameters():
        assert torch.equal(parameter, start[name]) == ("mlp." not in name), name
    assert not again.frozen()
