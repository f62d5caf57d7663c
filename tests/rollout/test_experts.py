"""A mixture of experts: its weights in the engine, which experts read which token, and the learner that replays them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from posttrain.learner.forward import PolicyModule, forward
from posttrain.learner.weights import hf_state
from posttrain.records import NO_EXPERT, Sampling, TokenBatch
from posttrain.rollout.engine import EngineConfig, Request, VllmEngine
from posttrain.sync.base import SyncError
from posttrain.sync.fingerprint import fingerprint
from posttrain.testing.tiny import create_tiny_model
from tests.rollout.conftest import SMALL, Twin

pytestmark = pytest.mark.vllm
LAYERS, EXPERTS, CHOSEN = SMALL["num_layers"], 4, 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of a width that is no multiple of what the CPU's packed kernels take."""
    return create_tiny_model(tmp_path_factory.mktemp("mixture"), **SMALL | {"intermediate_size": 48}, num_experts=EXPERTS, experts_per_token=CHOSEN)


@pytest.fixture(scope="module")
def moe(mixture: Path) -> Twin:
    made = Twin(mixture, return_routing=True)
    yield made
    made.engine.close()


def sampled(moe: Twin, count: int = 6, max_tokens: int = 9) -> list[tuple[tuple[int, ...], object]]:
    """Prompts of several lengths, two of them the same, sampled in one batch."""
    prompts = [moe.prompt(5 + 3 * i) for i in range(count - 1)]
    prompts.append(prompts[0])
    requests = [Request(f"{moe.engine.version}/{i}", p, Sampling(max_tokens=max_tokens, seed=i)) for i, p in enumerate(prompts)]
    return list(zip(prompts, moe.engine.sample(requests), strict=True))


def chosen_by_the_model(moe: Twin, ids: tuple[int, ...]) -> torch.Tensor:
    module = PolicyModule(moe.model)
    batch = TokenBatch.from_sequences([{"ids": list(ids)}])
    forward(module, batch, keep_routing=True, only_trainable=False)
    found = module.routers.chosen()
    for router in module.modules():
        router.__dict__.pop("forward", None)
    return found


def test_every_token_that_was_read_has_its_experts(moe: Twin) -> None:
    for prompt, found in sampled(moe):
        whole = (*prompt, *found.ids)
        assert found.routing.shape == (len(whole), LAYERS, CHOSEN) and found.routing.dtype == torch.int16
        assert (found.routing[-1] == NO_EXPERT).all(), "the last token was drawn and never read"
        assert (found.routing[:-1] >= 0).all() and (found.routing[:-1] < EXPERTS).all()
        assert torch.equal(found.routing[:-1].sort(-1).values, chosen_by_the_model(moe, whole).sort(-1).values)


def test_new_weights_reach_every_expert_and_change_the_choices(moe: Twin) -> None:
    before = moe.prompt(40)
    old = chosen_by_the_model(moe, before)
    moe.perturb(0.3)
    weights = dict(hf_state(moe.model))
    assert sum(".experts." in name for name in weights) == LAYERS * EXPERTS * 3
    moe.engine.load_weights(moe.next_version(), [weights], fingerprint(weights))
    assert moe.gap(moe.prompt(20), moe.prompt(31)) < 1e-4
    assert not torch.equal(chosen_by_the_model(moe, before), old)
    for prompt, found in sampled(moe):
        assert torch.equal(found.routing[:-1].sort(-1).values, chosen_by_the_model(moe, (*prompt, *found.ids)).sort(-1).values)


def test_an_expert_that_did_not_arrive_is_named(moe: Twin) -> None:
    weights = dict(hf_state(moe.model))
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(SyncError, match=gone):
        moe.engine.load_weights(moe.next_version(), [{k: v for k, v in weights.items() if k != gone}])
    wrong = {**fingerprint(weights), gone: (1, 1)}
    with pytest.raises(SyncError, match=gone):
        moe.engine.load_weights(moe.next_version(), [weights], wrong)
    moe.engine.load_weights(moe.next_version(), [weights], fingerprint(weights))


def test_weights_in_flight_leave_the_last_reading(moe: Twin) -> None:
    """Requests whose cache is computed again under new weights: what counts is who read the tokens last."""
    engine, prompt = moe.engine, moe.prompt(12)
    engine.submit([Request("running", prompt, Sampling(max_tokens=12, seed=3))])
    for _ in range(5):
        assert not engine.step()
    moe.perturb(0.3)
    weights = dict(hf_state(moe.model))
    engine.load_weights(moe.next_version(), [weights], fingerprint(weights), running="recompute")
    done = []
    while not done:
        done = engine.step()
    whole = (*prompt, *done[0].ids)
    assert len(done[0].spans) == 2
    assert torch.equal(done[0].routing[:-1].sort(-1).values, chosen_by_the_model(moe, whole).sort(-1).values)


def test_nothing_is_kept_of_requests_that_are_done(moe: Twin) -> None:
    sampled(moe)
    moe.engine.logprobs([moe.prompt(8)])
    moe.engine.submit([Request("stopped", moe.prompt(8), Sampling(max_tokens=9))])
    moe.engine.step()
    assert len(moe.engine.abort()) == 1
    sampled(moe, count=2, max_tokens=2)
    moe.engine.submit([Request("after", moe.prompt(8), Sampling(max_tokens=1))])
    while not moe.engine.step():
        pass
    assert len(moe.engine._recorder._kept) <= 1


def test_experts_without_a_record(mixture: Path, make_twin) -> None:
    twin = make_twin(mixture)
    found = twin.engine.sample([Request("a", twin.prompt(5), Sampling(max_tokens=3))])[0]
    assert found.routing is None and twin.gap(twin.prompt(20)) < 1e-4


def test_a_dense_model_has_nothing_to_record(tiny_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set learner\.routing=own"):
        VllmEngine(EngineConfig(str(tiny_path), dtype="float32", max_model_len=64, kv_cache_gb=0.05, threads=1, return_routing=True))


def test_half_precision_agrees_where_the_learner_replays(mixture: Path, make_twin) -> None:
    """Engine and learner round differently, so near ties are decided differently: replayed, the gap of the sampled tokens shrinks or stays."""
    twin = make_twin(mixture, dtype="bfloat16", return_routing=True)
    twin.perturb(0.2)
    weights = dict(hf_state(twin.model))
    twin.engine.load_weights(1, [weights], fingerprint(weights))
    rows, behaviour = [], []
    for prompt, found in sampled(twin, count=8, max_tokens=32):
        rows.append({"ids": [*prompt, *found.ids], "routing": found.routing, "sources": ["prompt"] * len(prompt) + ["policy"] * len(found.ids)})
        behaviour += [*[math.nan] * (len(prompt) - 1), *found.logprobs]
    batch = TokenBatch.from_sequences(rows)
    module = PolicyModule(twin.model)
    engine = torch.tensor(behaviour)
    seen = ~engine.isnan()
    with torch.no_grad():
        own, replayed = (float((forward(module, batch, only_trainable=False, routed=routed)[0] - engine)[seen].abs().mean()) for routed in (False, True))
    agreed, of = module.routers.agreement
    assert of == (batch.routing != NO_EXPERT).sum() and 0.9 < agreed / of < 1.0, "near ties are decided differently"
    assert replayed < own and replayed < 0.02
