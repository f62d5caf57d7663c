"""Replayed experts in the learner: the recorded ones are used, the gradient goes through their scores, and a dense model knows nothing of it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from posttrain.advantage import GroupAdvantage
from posttrain.config import LearnerConfig, ModelConfig
from posttrain.data.pack import Packer, empty_like
from posttrain.data.rows import to_rows
from posttrain.learner.core import build_module, device_of
from posttrain.learner.forward import PolicyModule, forward
from posttrain.learner.routing import Routers
from posttrain.learner.torch_engine import TorchEngine
from posttrain.loss import load
from posttrain.records import NO_EXPERT, Demo, Group, Prompt, Rollout, Row, Segment, Source, TokenBatch
from posttrain.testing.tiny import create_tiny_model
from posttrain.update import Learn

LAYERS, EXPERTS, CHOSEN = 2, 4, 2
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
OWN: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**OWN, "num_experts": 6, "head_dim": 16, "norm_topk_prob": True},
    "Qwen2Moe": {**OWN, "num_experts": 6, "shared_expert_intermediate_size": 16},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "eos_token_id": 1, "pad_token_id": 0},
    "GptOss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16},
    "GraniteMoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Glm4Moe": {**OWN, "n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16},
    # chooses two of four groups before it chooses two of eight experts
    "DeepseekV3": {**OWN, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                   "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": LAYERS, "intermediate_size": 32}
    return str(create_tiny_model(tmp_path_factory.mktemp("mixture"), **sizes, num_experts=EXPERTS, experts_per_token=CHOSEN))


def engine(path: str, loss: str = "sft", overrides: tuple[str, ...] = (), dtype: str = "float64", **model: Any) -> TorchEngine:
    cfg = ModelConfig(path=path, dtype=dtype, **model)  # type: ignore[arg-type]
    return TorchEngine(cfg, LearnerConfig(engine="torch", lr=1e-2), load(loss, overrides), total_steps=4)


def rows(seed: int = 0, routed: bool = True, count: int = 5) -> list[Row]:
    """Ragged sequences, read by experts that no router chose."""
    draw, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    out = []
    for i in range(count):
        ids = [rng.randrange(9, 90) for _ in range(rng.randint(3, 9))]
        experts = torch.stack([torch.randperm(EXPERTS, generator=draw)[:CHOSEN] for _ in range(len(ids) * LAYERS)]).view(len(ids), LAYERS, CHOSEN)
        out.append(Row(ids=ids, sources=["prompt", *["demo"] * (len(ids) - 1)], sample_id=str(i), routing=experts.to(torch.int16) if routed else None))
    return out


def batch_of(found: list[Row]) -> TokenBatch:
    return TokenBatch.from_sequences(found, dtype=torch.float64)


def gradient(one: TorchEngine, batch: TokenBatch, cuts: list[list[int]] | None = None) -> Tensor:
    batch = batch.replace(totals=one.core.objective.totals(batch))
    for parameter, grad in one.grads.items():
        grad.zero_()
        parameter.grad = None
    for part in [list(range(batch.num_sequences))] if cuts is None else cuts:
        one.forward_backward(batch.take(part) if part else empty_like(batch))
    return torch.cat([one.grads[p].flatten() for _, p in one.named])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_with_the_experts_it_is_given(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        ids = torch.randint(0, 64, (1, 9))
    plain, routers = model(ids).logits, Routers(model)
    moe = [i for i in range(3) if i >= (getattr(config, "first_k_dense_replace", None) or 0)]
    assert routers.layers == moe
    routers.replay(None, keep=True)
    assert torch.equal(model(ids).logits, plain)
    own = routers.chosen()
    assert own.shape == (9, 3, 2) and all((own[:, i] == NO_EXPERT).all() == (i not in moe) for i in range(3))
    routers.replay(own)
    assert torch.allclose(model(ids).logits, plain, atol=1e-6) and routers.agreement == (18.0 * len(moe), 18.0 * len(moe))
    other = torch.where(own == NO_EXPERT, own, (own + 1) % 6)
    routers.replay(other, keep=True)
    moved = model(ids).logits
    assert torch.equal(routers.chosen(), other) and float((moved - plain).abs().max()) > 1e-4
    agreed, of = routers.agreement
    assert agreed < of == 18.0 * len(moe)
    names = [name for name, _ in model.named_parameters() if name.endswith(("gate.weight", "router.weight", "router.layer.weight")) and ".shared" not in name]
    found = torch.autograd.grad(moved.log_softmax(-1)[..., 0].sum(), [dict(model.named_parameters())[n] for n in names])
    assert len(names) == len(moe) and all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in found), "the scores of the chosen experts learn"
    routers.replay(None)
    assert torch.equal(model(ids).logits, plain), "nothing stays behind"


def test_replayed_scores_are_those_of_the_named_experts(mixture: str) -> None:
    """Against a transcription: softmax over all experts, the named ones' shares of their sum, each expert's own product."""
    module = PolicyModule(engine(mixture).module.model)
    layer = module.inner.model.layers[0].mlp
    hidden = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    experts = torch.tensor([[0, 3], [1, 2], [3, 1], [NO_EXPERT, NO_EXPERT], [2, 0]])
    recorded = torch.full((5, LAYERS, CHOSEN), NO_EXPERT, dtype=torch.int16)
    recorded[:, 0] = experts
    module.routers.replay(recorded)
    with torch.no_grad():
        ours = layer(hidden[None])[0]
        shares = (hidden @ layer.gate.weight.T).softmax(-1)
        for t in range(5):
            named = experts[t].tolist() if int(experts[t, 0]) != NO_EXPERT else shares[t].topk(CHOSEN).indices.tolist()
            total, out = sum(float(shares[t, e]) for e in named), torch.zeros(64, dtype=torch.float64)
            for e in named:
                gate, up = (layer.experts.gate_up_proj[e] @ hidden[t]).chunk(2)
                out += float(shares[t, e]) / total * (layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
            assert torch.allclose(ours[t], out, atol=1e-6), t  # shares are float32 in the router


def test_the_cut_does_not_show(mixture: str) -> None:
    one, batch = engine(mixture), batch_of(rows())
    whole = gradient(one, batch)
    assert torch.allclose(gradient(one, batch, [[3, 0], [], [4], [1, 2]]), whole, rtol=1e-6, atol=1e-9)
    plain = gradient(one, batch_of(rows(routed=False)))
    assert float((plain - whole).norm() / whole.norm()) > 1e-2, "other experts, another gradient"
    shifted = batch.replace(routing=batch.routing.roll(1, 0))  # type: ignore[union-attr]
    assert float((gradient(one, shifted) - whole).norm() / whole.norm()) > 1e-2, "every token has its own"


def test_backward_computes_again_with_the_same_experts(mixture: str) -> None:
    batch = batch_of(rows())
    kept, again = (gradient(engine(mixture, gradient_checkpointing=flag), batch) for flag in (False, True))
    assert torch.allclose(kept, again, rtol=1e-9, atol=1e-12)


def test_a_dense_model_knows_nothing_of_it(tiny: str) -> None:
    one, found = engine(tiny), rows()
    assert one.module.routers.layers == []
    routed, plain = gradient(one, batch_of(found)), gradient(one, batch_of(rows(routed=False)))
    assert torch.equal(routed, plain)
    assert one.module.routers.agreement == (0.0, 0.0)


def test_replayed_the_first_ratio_is_one(mixture: str) -> None:
    """What a router would decide otherwise between two passes is decided once."""
    one, batch = engine(mixture, dtype="float32"), TokenBatch.from_sequences(rows(routed=False))
    first = one.score(batch, routing=True)
    assert first["routing"].shape == (batch.num_tokens, LAYERS, CHOSEN)
    batch = batch.replace(routing=first["routing"])
    again = one.score(batch)["logp"]
    assert float((again - first["logp"]).abs().max()) < 1e-6
    with torch.no_grad():  # a router that would now choose others
        for layer in one.module.inner.model.layers:
            layer.mlp.gate.weight.neg_()
    assert torch.equal(one.score(batch, routing=True)["routing"], first["routing"]) and one.module.routers.agreement[0] < one.module.routers.agreement[1]


def test_frozen_models_choose_for_themselves(mixture: str) -> None:
    one = engine(mixture)
    routed, plain = batch_of(rows()), batch_of(rows(routed=False))
    assert torch.equal(one.score(routed, "base")["logp"], one.score(plain, "base")["logp"])
    assert not torch.allclose(one.score(routed)["logp"], one.score(plain)["logp"])


def groups(updates: int) -> list[Group]:
    rng, out = random.Random(3), []
    for q in range(2 * updates):
        prompt, rollouts = Prompt(f"q{q}", tuple(rng.randrange(9, 90) for _ in range(4))), []
        for i in range(3):
            ids = tuple(rng.randrange(9, 90) for _ in range(rng.randint(2, 6)))
            experts = torch.tensor([[rng.sample(range(EXPERTS), CHOSEN) for _ in range(LAYERS)] for _ in range(4 + len(ids))], dtype=torch.int16)
            experts[-1] = NO_EXPERT
            segment = Segment(ids, Source.policy, logprobs=(-4.5,) * len(ids), version=0)
            rollouts.append(Rollout(f"q{q}/{i}", prompt, (segment,), reward=float(i == q % 3), routing=experts))
        out.append(Group(prompt, tuple(rollouts)))
    return GroupAdvantage()(out)


class Local:
    """A learner group of one rank, in this process, that remembers what it was asked to learn from."""

    def __init__(self, one: TorchEngine) -> None:
        self.one, self.seen = one, []

    async def score(self, micro: Any, policy: str = "current", entropy: bool = False, routing: bool = False) -> list[dict[str, Tensor]]:
        return [self.one.score(batch, policy, entropy, routing) for batch in micro]

    async def step(self, micro: Any, weights: Any = None) -> Any:
        from posttrain.learner.actor import StepReport, add_metrics

        self.seen += micro
        parts = [self.one.forward_backward(b, w) for b, w in zip(micro, weights or [None] * len(micro), strict=True)]
        return StepReport(add_metrics(parts), self.one.optim_step())


@pytest.mark.parametrize("room", [1000, 12])
def test_the_old_learner_s_experts_are_recorded_and_replayed(mixture: str, room: int) -> None:
    def run(routing: str, updates: int) -> tuple[dict[str, float], Local]:
        one = engine(mixture, "grpo", dtype="float32")
        local, items = Local(one), groups(2)
        items = items if routing == "engine" else [_bare(g) for g in items]
        learn = Learn(one.core.objective, Packer(room, 1, updates), local, routing=routing)
        return asyncio.run(learn.learn(0, items, 0.0)).result(), local

    metrics, local = run("old", 2)
    assert all(b.routing is not None and (b.routing[b.trainable] != NO_EXPERT).all() for b in local.seen)
    assert 0.5 < metrics["mismatch/routing"] <= 1.0, "before the first update the router agrees with itself"
    metrics, local = run("engine", 1)
    assert 0.2 < metrics["mismatch/routing"] < 0.8, "drawn at random, two of four agree by half"
    metrics, local = run("own", 2)
    assert "mismatch/routing" not in metrics and all(b.routing is None for b in local.seen)


def _bare(group: Group) -> Group:
    from dataclasses import replace

    return replace(group, rollouts=tuple(replace(r, routing=None) for r in group.rollouts))


def test_rows_of_rollouts_and_of_other_data(mixture: str) -> None:
    (group,) = groups(2)[:1]
    demo = Demo("d", (Segment((9, 10), Source.prompt), Segment((11, 12, 13), Source.demo)))
    found = to_rows([group, demo])
    assert found[-1].routing is None and all(r.routing is not None and len(r.routing) == len(r.ids) for r in found[:-1])
    batch = TokenBatch.from_sequences(found)
    assert batch.routing is not None and len(batch.routing) == batch.num_tokens
    assert (batch.routing[batch.seq == len(found) - 1] == NO_EXPERT).all() and (batch.routing[batch.seq < len(found) - 1] != NO_EXPERT).all()
    assert torch.equal(batch.take([2, 0]).routing, torch.cat([batch.routing[batch.seq == 2], batch.routing[batch.seq == 0]]))
    assert empty_like(batch).routing is None


def test_tokens_after_the_engine_s_last_word_have_none(mixture: str) -> None:
    from dataclasses import replace

    (group,) = groups(2)[:1]
    longer = replace(group.rollouts[0], segments=(*group.rollouts[0].segments, Segment((20, 21), Source.tool)))
    (row,) = to_rows([replace(group, rollouts=(longer,))])
    assert row.routing is not None and (row.routing[-2:] == NO_EXPERT).all() and len(row.routing) == len(row.ids)


def test_what_does_not_fit_is_refused(mixture: str, tiny: str) -> None:
    one = engine(mixture)
    found = rows()
    found[0].routing = torch.zeros(len(found[0].ids), LAYERS + 1, CHOSEN, dtype=torch.int16)
    with pytest.raises(ValueError, match="must come from one model"):
        batch_of(found)
    with pytest.raises(ValueError, match="engine and learner must be the same model"):
        one.score(batch_of(found[:1]))
    found[0].routing = torch.zeros(2, LAYERS, CHOSEN, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"routing has 2 entries but ids has \d"):
        batch_of(found[:1])
    for routing in ("engine", "old"):
        cfg = LearnerConfig(engine="torch", routing=routing)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"learner.routing={routing} replays the experts of a mixture, and no router was found in Qwen3ForCausalLM"):
            build_module(ModelConfig(path=tiny, dtype="float32"), cfg, load("grpo"), device_of(0), 0)


def test_a_router_that_does_not_choose_with_topk_is_named(mixture: str) -> None:
    model = engine(mixture).module.model
    gate = model.model.layers[1].mlp.gate
    gate.forward = lambda hidden: (None, torch.full((hidden.shape[0], CHOSEN), 0.5, dtype=hidden.dtype), torch.zeros(hidden.shape[0], CHOSEN, dtype=torch.int64))
    module = PolicyModule(model)
    with pytest.raises(ValueError, match="Qwen3MoeTopKRouter of layer 1 did not choose with topk"):
        forward(module, batch_of(rows()))


def test_weights_are_published_and_exported_by_the_expert(mixture: str, tmp_path: Path) -> None:
    one = engine(mixture, dtype="float32")
    names = [name for name, _ in one.state()]
    assert sum(".experts." in n for n in names) == LAYERS * EXPERTS * 3 and f"model.layers.0.mlp.experts.{EXPERTS - 1}.up_proj.weight" in names
    one.export(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), one.module.inner.state_dict().values(), strict=True))


def test_the_base_follows_a_mixture_too(mixture: str) -> None:
    one, batch = engine(mixture), batch_of(rows(routed=False))
    with torch.no_grad():
        for parameter in one.module.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(one.score(batch, "base")["logp"], one.score(batch)["logp"])
    one.move_base(1.0)
    assert torch.equal(one.score(batch, "base")["logp"], one.score(batch)["logp"])
