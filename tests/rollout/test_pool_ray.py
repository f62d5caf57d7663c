"""The pool with real actors and real engines: the same tokens as in-process, weight updates, and an engine killed while it works."""

import asyncio
import os
import signal

import pytest
import pytest_asyncio

from posttrain.records import Prompt, Sampling
from posttrain.rollout.engine import EngineConfig, Request
from posttrain.rollout.pool import EnginePool, RolloutError, _runs
from posttrain.sync.base import SyncError
from posttrain.sync.object_store import put

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def cluster():
    from posttrain.cluster import session
    from posttrain.config import ClusterConfig

    with session(ClusterConfig(num_cpus=2, object_store_gb=0.2)) as ray:
        yield ray


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(cluster, tiny_path):
    config = EngineConfig(model=str(tiny_path), dtype="float32", max_model_len=256, kv_cache_gb=0.05, max_num_seqs=32, threads=1)
    made = EnginePool(config, lambda ids: " ".join(map(str, ids)), num_engines=2, run_seed=1, timeout_s=200, start_timeout_s=280)
    await made.ready()
    yield made
    made.close()


def prompts(twin, count):
    return [Prompt(f"p{i}", twin.prompt(6 + i)) for i in range(count)]


def tokens(groups):
    return {r.sample_id: [i for s in r.segments for i in s.ids] for g in groups for r in g.rollouts}


async def test_story(pool, twin):
    asked = prompts(twin, 6)
    sampling = Sampling(max_tokens=40)

    # new weights reach both engines, and what they sample is what the same engine samples in this process
    weights = twin.perturb()
    refs, fingerprint = put(weights.items(), bucket_bytes=30_000)
    assert len(refs) > 2
    version = twin.next_version()
    await pool.publish(version, refs, fingerprint)
    twin.engine.load_weights(version, refs, fingerprint)
    groups = await pool.sample(asked, 3, sampling, step=0)
    seeds = {r.sample_id: r.sampling for g in groups for r in g.rollouts}
    local = twin.engine.sample([Request(name, asked[int(name.split("/")[1][1:])].ids, s) for name, s in seeds.items()])
    assert tokens(groups) == {s.id: list(s.ids) for s in local}
    assert {r.version for g in groups for r in g.rollouts} == {version}

    # the log-probs of given tokens are those of the same engine in this process, whichever engine is asked
    given = [[*p.ids, 11, 12 + i] for i, p in enumerate(asked)]
    rows, expected = await pool.logprobs(given), twin.engine.logprobs(given)
    assert [row[1:] for row in rows] == [pytest.approx(row[1:], abs=1e-5) for row in expected] and await pool.logprobs([]) == []

    # a bit flipped on the way is refused, and the next publish repairs it
    name = "model.layers.0.mlp.up_proj.weight"
    damaged = {k: v.clone() for k, v in weights.items()}
    damaged[name][0, 0] += 1.0
    with pytest.raises(SyncError, match=name):
        await pool.publish(version + 1, put(damaged.items())[0], fingerprint)
    await pool.publish(version + 2, refs, fingerprint)

    # an engine is killed while it works: nothing is lost, and the same tokens come back
    calm = tokens(await pool.sample(asked, 8, Sampling(max_tokens=100), step=1))
    victim = pool._members[0].health.pid
    work = asyncio.create_task(pool.sample(asked, 8, Sampling(max_tokens=100), step=1))
    while (await pool._members[0].actor.health.remote()).queue == 0:
        await asyncio.sleep(0.001)
    os.kill(victim, signal.SIGKILL)
    assert tokens(await work) == calm
    assert pool.metrics()["rollout/engine_deaths"] == 1 and pool.metrics()["rollout/retried_groups"] >= 1

    # its successor holds the newest weights
    healths = await pool.ready()
    assert [h.version for h in healths] == [version + 2] * 2 and victim not in [h.pid for h in healths]
    assert await pool._members[0].actor.fingerprint.remote() == fingerprint

    # nobody waits for ever, and nothing stays behind
    pool.timeout_s = 0.01
    with pytest.raises(RolloutError, match=rf"sampling step 2: .*engine \d on .*pid.*weights version {version + 2}.*phase"):
        await pool.sample(asked, 8, Sampling(max_tokens=200), step=2)
    pool.close()
    assert not [pid for _, pid in pool._pids if _runs(pid)]


async def test_a_model_that_cannot_be_served_is_one_clear_error(cluster, tmp_path):
    pool = EnginePool(EngineConfig(model=str(tmp_path), dtype="float32"), str, start_timeout_s=280)
    with pytest.raises(RolloutError, match="starting the engine: engine 0"):
        await pool.ready()
    pool.close()
