"""Log-probabilities of a packed batch against the model's own logits, the full-vocabulary columns, and the load-time check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import LoraConfig, ModelConfig
from posttrain.learner.forward import PolicyModule, forward, self_check
from posttrain.learner.model import load_model, plain
from posttrain.records import TokenBatch

ROWS = [
    {"ids": [5, 6, 7, 8, 9], "sources": ["prompt", "prompt", "policy", "policy", "policy"]},
    {"ids": [11, 12], "sources": ["prompt", "prompt"]},
    {"ids": [20, 21, 22, 23, 24, 25, 26], "sources": ["prompt"] * 4 + ["policy"] * 3},
]


@pytest.fixture
def batch() -> TokenBatch:
    return TokenBatch.from_sequences(ROWS)


def module(tiny: str, **changes: Any) -> PolicyModule:
    return PolicyModule(load_model(ModelConfig(path=tiny, **{"dtype": "float64", **changes})), chunk=3)


def rows_of(model: torch.nn.Module, temperature: float = 1.0) -> Tensor:
    """``[N, V]`` log-probabilities from the model's own logits, one sequence at a time."""
    return torch.cat([torch.log_softmax(model(input_ids=torch.tensor([r["ids"]])).logits[0, :-1] / temperature, -1) for r in ROWS])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_and_entropy(tiny: str, batch: TokenBatch, temperature: float) -> None:
    policy = module(tiny)
    logp, columns = forward(policy, batch, temperature=temperature, columns=["entropy"], only_trainable=False)
    rows = rows_of(policy.inner, temperature)
    torch.testing.assert_close(logp, rows.gather(1, batch.target_ids[:, None])[:, 0], rtol=0, atol=1e-11)
    torch.testing.assert_close(columns["entropy"], -(rows.exp() * rows).sum(1), rtol=0, atol=1e-11)


def test_only_trainable_columns_are_computed(tiny: str, batch: TokenBatch) -> None:
    policy = module(tiny)
    some, _ = forward(policy, batch)
    every, _ = forward(policy, batch, only_trainable=False)
    assert 0 < int(batch.trainable.sum()) < batch.num_tokens
    torch.testing.assert_close(some[batch.trainable], every[batch.trainable], rtol=0, atol=1e-12)
    assert float(some[~batch.trainable].abs().max()) == 0.0 and float(every[~batch.trainable].abs().min()) > 0.0


def test_gradient_equals_that_of_the_logits(tiny: str, batch: TokenBatch) -> None:
    policy = module(tiny)
    weights = torch.randn(batch.num_tokens, dtype=torch.float64) * batch.trainable
    (forward(policy, batch)[0] * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    (rows_of(policy.inner).gather(1, batch.target_ids[:, None])[:, 0] * weights).sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-12)


def perturbed(policy: PolicyModule) -> PolicyModule:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("lora", [False, True])
def test_kl_columns(tiny: str, batch: TokenBatch, lora: bool) -> None:
    """Against the frozen start: a second model, or the same one with its adapters off."""
    policy = perturbed(module(tiny, lora=LoraConfig(r=4) if lora else None))
    base = module(tiny)
    names = ["kl_reverse:base", "kl_forward:base", "entropy"]
    _, columns = forward(policy, batch, columns=names, only_trainable=False, base_model=None if lora else base)
    p, q = rows_of(policy.model), rows_of(base.inner)
    torch.testing.assert_close(columns["kl_reverse:base"], (p.exp() * (p - q)).sum(1), rtol=0, atol=1e-10)
    torch.testing.assert_close(columns["kl_forward:base"], (q.exp() * (q - p)).sum(1), rtol=0, atol=1e-10)
    assert float(columns["kl_reverse:base"].detach().min()) > 1e-6
    _, alone = forward(policy, batch, columns=["kl_forward:base"], only_trainable=False, base_model=None if lora else base)
    torch.testing.assert_close(alone["kl_forward:base"], columns["kl_forward:base"])
    columns["kl_reverse:base"].sum().backward()
    assert all(p.grad is None for p in base.parameters()) or lora
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in policy.parameters())


def test_adapter_off_is_the_start(tiny: str, batch: TokenBatch) -> None:
    policy = perturbed(module(tiny, lora=LoraConfig(r=4)))
    start, _ = forward(module(tiny), batch)
    assert torch.equal(forward(policy, batch, adapter=False)[0], start)
    assert not torch.equal(forward(policy, batch)[0], start)


def test_untied_head(tmp_path: Any, batch: TokenBatch) -> None:
    from posttrain.testing.tiny import create_tiny_model

    sizes = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1, "intermediate_size": 96}
    folder = create_tiny_model(tmp_path / "untied", tie_word_embeddings=False, **sizes)
    policy = module(str(folder))
    forward(policy, batch)[0].sum().backward()
    assert policy.head.weight.grad is not None and policy.head.weight is not policy.inner.get_input_embeddings().weight


def test_head_still_gives_logits(tiny: str) -> None:
    policy, other = module(tiny), load_model(ModelConfig(path=tiny, dtype="float64"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(policy.inner(input_ids=ids).logits, other(input_ids=ids).logits)


def test_self_check(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, limit in (("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.05)):
        assert self_check(module(tiny, dtype=dtype)) < limit
    policy = module(tiny)
    original = policy.inner.forward

    def softcapped(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = 3.0 * torch.tanh(out.logits / 3.0)
        return out

    monkeypatch.setattr(policy.inner, "forward", softcapped)
    with torch.no_grad():
        plain(policy.model).get_input_embeddings().weight.mul_(20.0)
    with pytest.raises(ValueError, match="differ from the model's own by"):
        self_check(policy)


def test_self_check_sees_a_leak_between_sequences(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = module(tiny)
    layer = policy.inner.model.layers[0]
    original = layer.forward

    def leaking(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(hidden + 0.5 * hidden.roll(1, dims=1), *args, **kwargs)

    monkeypatch.setattr(layer, "forward", leaking)
    with pytest.raises(ValueError, match="mix packed sequences"):
        self_check(policy)


def test_clear_errors(tiny: str, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = module(tiny)
    with pytest.raises(ValueError, match="unknown full-vocabulary column 'varentropy'"):
        forward(policy, batch, columns=["varentropy"])
    with pytest.raises(ValueError, match="needs the frozen start"):
        forward(policy, batch, columns=["kl_reverse:base"])
    with pytest.raises(ValueError, match="the batch is empty"):
        forward(policy, batch.take([]))
    monkeypatch.setattr(policy.inner, "get_output_embeddings", lambda: None)
    with pytest.raises(ValueError, match="no linear output layer"):
        PolicyModule(policy.inner)
