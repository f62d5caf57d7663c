"""The model reads its own first choices beside the given tokens: against a transcription with whole embeddings, one sequence at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config import LearnerConfig, LoraConfig, ModelConfig
from posttrain.data.pack import empty_like
from posttrain.learner.forward import forward
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.loss.regularizer import KL, FullKL
from posttrain.records import TokenBatch
from tests.learner.test_forward import module

ROWS = [
    {"ids": [5, 6, 7, 8, 9, 10, 3], "sources": ["prompt", "prompt", "demo", "demo", "tool", "demo", "demo"]},
    {"ids": [11, 12], "sources": ["prompt", "demo"]},
    {"ids": [20, 21, 22, 23, 24, 25, 26], "sources": ["prompt"] * 3 + ["demo"] * 4},
]
SHARE = 0.4


@pytest.fixture
def batch() -> TokenBatch:
    return TokenBatch.from_sequences(ROWS)


def transcription(model: torch.nn.Module, share: float, shift: int = 1, detach: bool = False) -> Tensor:
    """Log-probs ``[N]`` by whole rows of embeddings: at the input of an answer's token j stands what was predicted for j, at j - ``shift``."""
    out, table = [], model.get_input_embeddings()  # type: ignore[operator]
    for row in ROWS:
        ids = torch.tensor([row["ids"]])
        with torch.no_grad():
            guess = model(input_ids=ids).logits.argmax(-1)
        given = table(ids)
        other = table(torch.cat([ids[:, :shift], guess[:, : ids.shape[1] - shift]], 1))
        answer = torch.tensor([[s == "demo" for s in row["sources"]]])[..., None]
        mixed = torch.where(answer, (1 - share) * given + share * (other.detach() if detach else other), given)
        rows = torch.log_softmax(model(inputs_embeds=mixed).logits[0, :-1], -1)
        out.append(rows.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(out)


def mix_of(batch: TokenBatch, share: float = SHARE) -> Tensor:
    found = load("ift", (f"streams.demos.own_input={share}",)).own_input(batch)
    assert found is not None and found.tolist() == [share if on else 0.0 for on in batch.trainable.tolist()]
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_the_transcription(tiny: str, batch: TokenBatch, lora: bool) -> None:
    policy = module(tiny, lora=LoraConfig(r=4) if lora else None)
    ours = forward(policy, batch, only_trainable=False, mix=mix_of(batch))[0]
    torch.testing.assert_close(ours, transcription(policy.inner, SHARE), rtol=0, atol=1e-11)
    # wrong: the guess made at the token's own place; all places, prompts too; the plain forward
    for wrong in (transcription(policy.inner, SHARE, shift=0), transcription(policy.inner, 0.0), transcription(policy.inner, 1.0)):
        assert float((ours - wrong).detach().abs().max()) > 1e-3


def test_prompts_are_read_as_they_are(tiny: str, batch: TokenBatch) -> None:
    """What is predicted behind prompts, and behind nothing but one, is what it was; what is predicted behind answers is not, nor across sequences."""
    policy = module(tiny)
    plain, mixed = (forward(policy, batch, only_trainable=False, mix=m)[0].detach() for m in (None, mix_of(batch)))
    behind = torch.zeros(batch.num_tokens, dtype=torch.bool)  # columns that read some token of an answer
    for column in range(1, batch.num_tokens):
        if int(batch.seq[column]) == int(batch.seq[column - 1]):
            behind[column] = behind[column - 1] or bool(batch.trainable[column - 1])
    assert behind.tolist() == [False] * 2 + [True] * 4 + [False] + [False] * 3 + [True] * 3
    assert torch.equal(plain[~behind], mixed[~behind])
    assert float((plain - mixed)[behind].abs().min()) > 0


def test_a_share_of_0_is_the_plain_forward(tiny: str, batch: TokenBatch) -> None:
    policy = module(tiny)
    assert load("ift", ("streams.demos.own_input=0",)).own_input(batch) is None
    zero = forward(policy, batch, mix=torch.zeros(batch.num_tokens, dtype=torch.float64))[0]
    assert torch.equal(zero, forward(policy, batch)[0])


def test_it_leaves_one_graph(tiny: str, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = module(tiny)
    recorded: list[tuple[bool, Any]] = []
    original = type(policy).hidden

    def hidden(self: Any, *args: Any) -> Tensor:
        out = original(self, *args)
        recorded.append((out.requires_grad, args[3]))
        return out

    monkeypatch.setattr(type(policy), "hidden", hidden)
    forward(policy, batch, mix=mix_of(batch))
    assert [grad for grad, _ in recorded] == [False, True] and recorded[0][1] is None and recorded[1][1] is not None


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_reaches_both_uses_of_the_embeddings(tmp_path: Any, batch: TokenBatch, tied: bool) -> None:
    from posttrain.testing.tiny import create_tiny_model

    sizes = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1, "intermediate_size": 96}
    policy = module(str(create_tiny_model(tmp_path / "model", tie_word_embeddings=tied, **sizes)))
    assert (policy.head.weight is policy.inner.get_input_embeddings().weight) is tied
    weights = torch.randn(batch.num_tokens, dtype=torch.float64) * batch.trainable
    (forward(policy, batch, mix=mix_of(batch))[0] * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters()}
    for detach in (False, True):
        policy.zero_grad()
        (transcription(policy.inner, SHARE, detach=detach) * weights).sum().backward()
        gaps = {name: float((ours[name] - p.grad).abs().max()) for name, p in policy.named_parameters()}
        embeddings = next(name for name in gaps if "embed_tokens" in name)
        assert max(v for k, v in gaps.items() if k != embeddings or not detach) < 1e-10
        assert not detach or gaps[embeddings] > 1e-6, "a prediction's embedding learns too"


def gradient(tiny: str, batch: TokenBatch, cuts: list[list[int]], *overrides: str, idle: bool = False) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    goal = load("ift", overrides)
    one = TorchEngine(ModelConfig(path=tiny, dtype="float64"), LearnerConfig(engine="torch", head_chunk=3), goal, total_steps=1)  # type: ignore[arg-type]
    batch = batch.replace(totals=goal.totals(batch))
    added: dict[str, tuple[float, float]] = {}
    for part in cuts:
        for name, (total, count) in one.forward_backward(batch.take(part)).items():
            before = added.get(name, (0.0, 0.0))
            added[name] = (before[0] + total, before[1] + count)
    if idle:
        assert one.forward_backward(empty_like(batch)) == {} == one.forward_backward(batch.take([]))
    return torch.cat([one.grads[p].flatten() for _, p in one.named]), added


@pytest.mark.parametrize("cuts", [[[0], [1], [2]], [[2, 0], [1]], [[1, 2, 0]]])
def test_neither_slicing_nor_packing_changes_it(tiny: str, batch: TokenBatch, cuts: list[list[int]]) -> None:
    whole, metrics = gradient(tiny, batch, [[0, 1, 2]])
    cut, same = gradient(tiny, batch, cuts, idle=True)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12 * float(whole.abs().max()) * 100)
    assert {k: v[0] for k, v in same.items()} == pytest.approx({k: v[0] for k, v in metrics.items()}, abs=1e-9)


def test_the_loss_is_that_of_the_mixed_reading(tiny: str, batch: TokenBatch) -> None:
    own, metrics = gradient(tiny, batch, [[0, 1, 2]])
    policy = module(tiny)
    logp = transcription(policy.inner, 0.2)
    goal = load("ift")
    out = goal(batch.replace(totals=goal.totals(batch)), logp=logp)
    out.loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
    assert metrics["demos/nll"][0] == pytest.approx(out.metrics["demos/nll"][0])
    plain = gradient(tiny, batch, [[0, 1, 2]], "streams.demos.own_input=0")[0]
    assert float((own - plain).abs().max()) > 1e-4


def test_checkpointed_layers_give_the_same(tiny: str, batch: TokenBatch) -> None:
    mix, weights = mix_of(batch), torch.randn(batch.num_tokens, dtype=torch.float64) * batch.trainable
    found = []
    for on in (False, True):
        policy = module(tiny, gradient_checkpointing=on)
        policy.train()
        (forward(policy, batch, mix=mix)[0] * weights).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_a_schedule_may_stand_there(tiny: str, batch: TokenBatch) -> None:
    ramp = "streams.demos.own_input={_target_: posttrain.mixture.schedule.Linear, start: 0.0, end: 0.4}"
    late = gradient(tiny, batch.replace(progress=0.5), [[0, 1], [2]], ramp, idle=True)[0]
    torch.testing.assert_close(late, gradient(tiny, batch, [[0, 1, 2]])[0], rtol=0, atol=1e-10)
    assert load("ift", (ramp,)).own_input(batch) is None
    steep = load("ift", ("streams.demos.own_input={_target_: posttrain.mixture.schedule.Linear, start: 0.0, end: 2.0}",))
    with pytest.raises(ValueError, match="own_input is 2 at progress 1; it is a share"):
        steep.own_input(batch.replace(progress=1.0))


def test_only_the_streams_that_ask_for_it() -> None:
    goal = load("ift", ("streams.demos.own_input=0.3",))
    both = replace(goal, streams={**goal.streams, "rollouts": replace(goal.streams["demos"], source=("policy",), own_input=0.0)})
    mix = both.own_input(TokenBatch.from_sequences([*ROWS, {"ids": [1, 2, 3], "sources": ["prompt", "policy", "policy"]}]))
    assert mix is not None and set(mix[:-2].tolist()) == {0.0, 0.3} and mix[-2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("share", [1.5, -0.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"own_input={share} .* between 0 and 1"):
        load("ift", (f"streams.demos.own_input={share}",))


def test_what_is_read_without_the_mixture_is_refused() -> None:
    goal = load("ift")
    with pytest.raises(ValueError, match=r"own_input changes what the model reads .* and 'base' is computed where the given tokens"):
        replace(goal, regularizers={"kl": KL()})
    with pytest.raises(ValueError, match="and coupling batch is computed"):
        load("loss_reweighting", ("streams.demos.own_input=0.2",))
    with pytest.raises(ValueError, match="and 'kl_forward:base' is computed"):
        replace(goal, regularizers={"kl": FullKL("forward")})
    with pytest.raises(ValueError, match="and a scalar head is computed"):
        load("reward_model", ("streams.pairs.own_input=0.2",))
