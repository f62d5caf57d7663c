"""Sampling with the real engine: what comes back is what was drawn, from the distribution that was asked for."""

import os

import pytest
import torch

from posttrain.records import Sampling
from posttrain.rollout.engine import EngineConfig, Request, _end_ids
from posttrain.sync.base import SyncError

pytestmark = pytest.mark.vllm


def draw(twin, prompt, seeds=(1,), **sampling):
    requests = [Request(f"s{seed}", tuple(prompt), Sampling(**{"max_tokens": 12, "seed": seed} | sampling)) for seed in seeds]
    return twin.engine.sample(requests)


def test_logprobs_equal_transformers(twin):
    assert twin.gap(twin.prompt(3), twin.prompt(40), twin.prompt(200)) < 1e-5


def test_behaviour_logprobs_are_those_of_the_full_distribution_at_temperature_one(twin):
    prompt = twin.prompt(10)
    for sampled in draw(twin, prompt, range(4), max_tokens=20):
        expected = twin.reference([*prompt, *sampled.ids])[len(prompt) - 1 :]
        assert sampled.logprobs == pytest.approx(expected, abs=1e-5)


def test_behaviour_logprobs_are_processed(twin):
    """Temperature and top-k are part of the policy that sampled: the log-prob is renormalised over what could be drawn."""
    prompt = list(twin.prompt(10))
    (sampled,) = draw(twin, prompt, temperature=0.7, top_k=5)
    logits = twin.model(torch.tensor([[*prompt, *sampled.ids]])).logits[0, len(prompt) - 1 : -1].double() / 0.7
    kept = logits.masked_fill(logits < logits.topk(5, -1).values[:, -1:], -torch.inf).log_softmax(-1)
    expected = kept[range(len(sampled.ids)), list(sampled.ids)].tolist()
    assert sampled.logprobs == pytest.approx(expected, abs=1e-5)
    raw = twin.reference([*prompt, *sampled.ids])[len(prompt) - 1 :]
    assert max(abs(a - b) for a, b in zip(raw, sampled.logprobs, strict=True)) > 0.1


def test_logprobs_at_another_temperature(twin):
    prompt = twin.prompt(8)
    (sampled,) = draw(twin, prompt, temperature=0.7)
    (row,) = twin.engine.logprobs([[*prompt, *sampled.ids]], temperature=0.7)
    assert row[len(prompt) :] == pytest.approx(sampled.logprobs, abs=1e-5)


def test_same_seed_same_tokens_whatever_else_runs(twin):
    prompt = twin.prompt(12)
    alone = [draw(twin, prompt, [seed])[0].ids for seed in range(6)]
    together = [s.ids for s in draw(twin, prompt, range(6))]
    twin.engine.submit([Request(f"noise{i}", twin.prompt(5 + i), Sampling(max_tokens=30, seed=i)) for i in range(5)])
    beside = {
        s.id: s.ids for s in twin.engine.sample([Request(f"s{i}", prompt, Sampling(max_tokens=12, seed=i)) for i in reversed(range(6))])
    }
    twin.engine.abort()
    assert alone == together == [beside[f"s{i}"] for i in range(6)]
    assert len(set(alone)) == 6


def test_seeded_prompts_beyond_what_one_step_takes(twin):
    """vLLM would cut the last prompt of a full step in two and rewind its random stream, which fails on CPU."""
    budget = twin.engine._engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = [twin.prompt(200) for _ in range(budget // 200 + 3)]
    drawn = twin.engine.sample([Request(f"many{i}", p, Sampling(max_tokens=2, seed=i)) for i, p in enumerate(prompts)])
    alone = draw(twin, prompts[-1], [len(prompts) - 1], max_tokens=2)[0]
    assert all(len(s.ids) in (1, 2) for s in drawn) and drawn[-1].ids == alone.ids


def test_engine_samples_by_the_model_distribution(twin):
    """A thousand one-token draws match the probabilities; with the model's generation_config.json they would all be the top token."""
    prompt = twin.prompt(6)
    drawn = torch.tensor([s.ids[0] for s in draw(twin, prompt, range(1000), max_tokens=1)])
    p = twin.model(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    observed = torch.bincount(drawn, minlength=len(p)) / 1000
    assert float((observed - p).abs().sum()) < 3 * float((p * (1 - p) / 1000).sqrt().sum())
    assert len(set(drawn.tolist())) > 10


def test_greedy(twin):
    prompt = twin.prompt(6)
    (sampled,) = draw(twin, prompt, temperature=0.0, max_tokens=5)
    ids = list(prompt)
    for _ in range(5):
        ids.append(int(twin.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(sampled.ids) == ids[6:]


def test_finish_reasons(twin):
    prompt = twin.prompt(10)
    (free,) = draw(twin, prompt, max_tokens=8)
    assert free.finish == "length" and len(free.ids) == len(free.logprobs) == 8
    stop_at = free.ids[3]
    (stopped,) = draw(twin, prompt, max_tokens=8, stop_token_ids=(stop_at,))
    assert stopped.finish == "stop" and stopped.ids == free.ids[: free.ids.index(stop_at) + 1]


def test_stop_string_keeps_the_tokens_that_spell_it(twin):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(twin.path)
    prompt = twin.prompt(10)
    (free,) = draw(twin, prompt, max_tokens=8)
    text = tokenizer.decode(free.ids[:5])
    (stopped,) = draw(twin, prompt, max_tokens=8, stop=(text[-2:],))
    assert stopped.finish == "stop" and stopped.logprobs == pytest.approx(free.logprobs[: len(stopped.ids)], abs=1e-5)
    assert tokenizer.decode(stopped.ids).endswith(text[-2:]) and stopped.ids == free.ids[: len(stopped.ids)]


def test_every_end_id_of_the_model_stops(twin):
    assert twin.engine.stop_ids == _end_ids(str(twin.path)) and 7 in twin.engine.stop_ids
    drawn = draw(twin, twin.prompt(4), range(60), max_tokens=200, temperature=1.5)
    ends = {s.ids[-1] for s in drawn if s.finish == "stop"}
    assert ends == set(twin.engine.stop_ids)
    assert not any(set(s.ids[:-1]) & set(twin.engine.stop_ids) for s in drawn)


def test_impossible_requests_fail_alone_and_say_why(twin):
    good = Request("good", twin.prompt(4), Sampling(max_tokens=2, seed=0))
    bad = [
        Request("long", (9,) * 256, Sampling()),
        Request("empty", (), Sampling()),
        Request("foreign", (9, 100_000), Sampling()),
        Request("none", (9,), Sampling(max_tokens=0)),
    ]
    first, *rest = twin.engine.sample([good, *bad])
    assert first.finish == "length"
    assert [s.finish for s in rest] == ["env_error"] * 4 and not any(s.ids for s in rest)
    for sampled, words in zip(rest, ("max_model_len=256", "empty", "100000", "max_tokens=0"), strict=True):
        assert words in sampled.error


def test_answer_ends_at_the_context_limit(twin):
    (sampled,) = draw(twin, (9,) * 250, max_tokens=100)
    assert sampled.finish == "length" and len(sampled.ids) == 6


def test_abort_returns_what_there_was(twin):
    prompt = twin.prompt(9)
    (whole,) = draw(twin, prompt, max_tokens=20)
    twin.engine.submit([Request("a", prompt, Sampling(max_tokens=20, seed=1)), Request("b", prompt, Sampling(max_tokens=20, seed=2))])
    for _ in range(5):
        twin.engine.step()
    (partial,) = twin.engine.abort(["a"])
    assert partial.finish == "aborted" and partial.ids == whole.ids[:5] and len(partial.logprobs) == 5
    assert twin.engine.num_unfinished == 1
    twin.engine.abort()
    assert twin.engine.num_unfinished == 0


def test_duplicate_ids_are_refused(twin):
    request = Request("twice", twin.prompt(3), Sampling(max_tokens=1))
    with pytest.raises(ValueError, match="unique"):
        twin.engine.sample([request, request])


def test_sampling_with_another_version_is_refused(twin):
    held = twin.engine.version
    with pytest.raises(SyncError, match=f"version {held + 1} but the engine holds version {held}"):
        twin.engine.sample([Request("r", twin.prompt(3))], expect_version=held + 1)


def test_nothing_of_the_process_is_changed(twin):
    assert "tcmalloc" not in os.environ.get("LD_PRELOAD", "")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(("setting", "words"), [({"dtype": "auto"}, "auto"), ({"tensor_parallel": 2}, "num_engines")])
def test_config_refuses(setting, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(model="m", **setting)


def test_logprobs_may_be_asked_for_while_others_are_sampled(twin):
    prompt = twin.prompt(10)
    (alone,) = draw(twin, prompt, max_tokens=1)
    twin.engine.submit([Request("s1", prompt, Sampling(max_tokens=1, seed=1))])
    assert twin.gap(twin.prompt(20)) < 1e-5
    assert twin.engine.num_unfinished == 1
    assert [s.ids for s in twin.engine.step()] == [alone.ids] and twin.engine.num_unfinished == 0
