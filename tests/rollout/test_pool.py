"""The pool's decisions, with actors that only pretend: routing, retries, restarts, deadlines."""

import asyncio
import socket

import pytest
from ray.exceptions import RayActorError, RayTaskError

from posttrain.records import Prompt, Sampling
from posttrain.rollout.actor import Health
from posttrain.rollout.engine import EngineConfig, Sampled
from posttrain.rollout.pool import EnginePool, RolloutError
from posttrain.sync.base import SyncError

PROMPTS = [Prompt(name, (1, 2, 3)) for name in "abcdefgh"]


class Verb:
    """``actor.verb.remote(...)``, as Ray spells a call."""

    def __init__(self, function):
        self.function = function

    def remote(self, *args):
        return self.function(*args)


class FakeEngine:
    def __init__(self, name):
        self.name, self.version, self.calls, self.broken, self.slow, self.finished = name, 0, [], None, 0.0, 10**9
        self.submit, self.result = Verb(self._submit), Verb(self._result)
        self.load_weights, self.health = Verb(self._load), Verb(self._health)

    async def _submit(self, requests, expect_version):
        assert expect_version == self.version
        self.calls.append([r.id for r in requests])

    async def _result(self, ids):
        """``finished`` groups are answered before it breaks."""
        await asyncio.sleep(self.slow)
        self.finished -= 1
        if self.broken and self.finished < 0:
            raise self.broken
        return [Sampled(i, (7, 8), (-0.5, -1.5), "stop", self.version, ((self.version, 0, 2),)) for i in ids]

    async def _load(self, version, buckets, fingerprint):
        if self.broken:
            raise self.broken
        await asyncio.sleep(0)
        self.version = version

    async def _health(self):
        return Health(self.name, socket.gethostname(), 0, self.version, 3, "sampling", 17)


class FakePool(EnginePool):
    """Boots a new FakeEngine where the real one starts an actor."""

    def __init__(self, num_engines=2, **settings):
        super().__init__(EngineConfig(model="m"), lambda ids: "+".join(map(str, ids)), num_engines=num_engines, run_seed=5, **settings)
        self.booted = []

    async def _boot(self, member):
        await asyncio.sleep(0.01)
        member.actor = FakeEngine(member.name)
        self.booted.append(member.actor)
        member.health = await member.actor.health.remote()
        held = None
        while held is not self._newest:
            held = self._newest
            await self._load(member, member.actor, held, float("inf"))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    import ray

    killed = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: killed.append(actor))
    return killed


def dead():
    return RayActorError(error_msg="the worker died: out of memory")


async def test_groups_come_back_in_order_with_everything_recorded():
    pool = FakePool()
    groups = await pool.sample(PROMPTS, 3, Sampling(max_tokens=4, temperature=0.9), step=6)
    assert [g.id for g in groups] == list("abcdefgh")
    rollout = groups[1].rollouts[2]
    assert rollout.sample_id == "6/b/2" and rollout.text == "7+8" and rollout.finish == "stop"
    (segment,) = rollout.segments
    assert segment.ids == (7, 8) and segment.logprobs == (-0.5, -1.5) and segment.version == 0 and segment.source.name == "policy"
    assert rollout.sampling.temperature == 0.9 and rollout.sampling.seed is not None


async def test_every_sample_has_a_seed_of_its_own_that_only_its_name_decides():
    def seeds(groups):
        return {r.sample_id: r.sampling.seed for g in groups for r in g.rollouts}

    first = seeds(await FakePool().sample(PROMPTS, 4, Sampling(), step=1))
    again = seeds(await FakePool(num_engines=3).sample(PROMPTS[::-1], 4, Sampling(), step=1))
    later = seeds(await FakePool().sample(PROMPTS, 4, Sampling(), step=2))
    assert first == again and len({*first.values(), *later.values()}) == 64
    assert all(0 <= seed < 2**63 for seed in first.values())


async def test_a_group_continued_and_a_prompt_drawn_twice_keep_ids_unique():
    pool = FakePool()
    twice = await pool.sample([PROMPTS[0], PROMPTS[0]], 2, Sampling(), step=0)
    more = await pool.sample(PROMPTS[:1], 2, Sampling(), step=0, first=4)
    ids = [r.sample_id for g in [*twice, *more] for r in g.rollouts]
    assert ids == [f"0/a/{i}" for i in range(6)]


async def test_work_is_shared_evenly():
    pool = FakePool(num_engines=4)
    await pool.sample(PROMPTS, 2, Sampling(), step=0)
    assert [[len(call) for call in e.calls] for e in pool.booted] == [[4], [4], [4], [4]], "one batch of two groups each"


async def test_equal_calls_make_equal_batches():
    pool, again = FakePool(num_engines=3), FakePool(num_engines=3)
    for each in (pool, again):
        await each.sample(PROMPTS, 3, Sampling(), step=0)
        await each.sample(PROMPTS, 2, Sampling(), step=1)
    assert [e.calls for e in pool.booted] == [e.calls for e in again.booted]


async def test_a_dead_engine_is_replaced_and_its_groups_drawn_elsewhere(no_ray):
    pool = FakePool()
    await pool.publish(3, ["bucket"], None)
    victim = pool.booted[0]
    victim.broken, victim.slow, victim.finished = dead(), 0.01, 1
    groups = await pool.sample(PROMPTS, 2, Sampling(), step=0)
    assert [g.id for g in groups] == list("abcdefgh") and victim.calls and victim in no_ray
    assert pool.metrics() == {"rollout/engines": 1.0, "rollout/engine_deaths": 1.0, "rollout/retried_groups": 3.0}, "what was finished is kept"
    await pool.ready()
    assert len(pool.booted) == 3 and pool.booted[2].version == 3, "the new engine must hold the newest weights"


async def test_the_only_engine_dies():
    pool = FakePool(num_engines=1)
    await pool.ready()
    pool.booted[0].broken, pool.booted[0].finished = dead(), 0
    groups = await pool.sample(PROMPTS, 1, Sampling(), step=0)
    assert len(groups) == 8 and len(pool.booted) == 2


async def test_an_engine_that_keeps_dying_stops_the_run():
    class Cursed(FakePool):
        async def _boot(self, member):
            await super()._boot(member)
            member.actor.broken, member.actor.finished = dead(), 0

    with pytest.raises(RolloutError, match=r"engine 0 .* died 3 times, last with: .*out of memory.*kv_cache_gb"):
        await Cursed(num_engines=1, max_restarts=2).sample(PROMPTS, 1, Sampling(), step=0)


async def test_a_crash_inside_vllm_counts_as_a_death():
    pool = FakePool()
    await pool.ready()
    pool.booted[0].finished = 0
    pool.booted[0].broken = RayTaskError("step", "traceback", MemoryError("cache"))
    assert len(await pool.sample(PROMPTS, 1, Sampling(), step=0)) == 8
    assert pool.metrics()["rollout/engine_deaths"] == 1


async def test_death_during_publish():
    pool = FakePool()
    await pool.ready()
    pool.booted[1].broken = dead()
    await pool.publish(1, ["bucket"], None)
    await pool.ready()
    assert [e.version for e in (pool.booted[0], pool.booted[2])] == [1, 1] and pool.version == 1


async def test_wrong_weights_are_not_retried():
    pool = FakePool()
    await pool.ready()
    pool.booted[1].broken = RayTaskError("load", "traceback", SyncError("tensor x differs"))
    with pytest.raises(SyncError, match="tensor x differs"):
        await pool.publish(1, ["bucket"], None)
    with pytest.raises(SyncError, match="stale"):
        await pool.publish(0, ["bucket"], None)


async def test_an_engine_that_cannot_start_fails_at_once():
    class Broken(FakePool):
        async def _boot(self, member):
            async def start():
                raise RayTaskError("start", "traceback", OSError("no such model"))

            await self._wait(member, start(), "starting the engine", float("inf"), final=True)

    with pytest.raises(RolloutError, match=r"starting the engine: engine 0 not placed yet.*OSError: no such model"):
        await Broken().sample(PROMPTS, 1, Sampling(), step=0)


async def test_deadline_says_who_is_stuck_on_what():
    pool = FakePool(timeout_s=0.05)
    await pool.ready()
    for engine in pool.booted:
        engine.slow = 60.0
    with pytest.raises(RolloutError) as told:
        await pool.sample(PROMPTS, 2, Sampling(), step=9)
    for part in (
        "sampling step 9",
        "engine ",
        f"on {socket.gethostname()} (pid 0)",
        "weights version 0",
        "8 requests queued",
        "phase 'sampling'",
        "17 engine",
    ):
        assert part in str(told.value)
    pool.booted[0].health = Verb(lambda: asyncio.sleep(60))
    pool.close()


async def test_deadline_when_the_actor_does_not_answer_at_all(monkeypatch):
    monkeypatch.setattr("posttrain.rollout.pool.HEALTH_S", 0.02)
    pool = FakePool(num_engines=1, timeout_s=0.02)
    await pool.ready()
    pool.booted[0].slow = 60.0
    pool.booted[0].health = Verb(lambda: asyncio.sleep(60))
    with pytest.raises(RolloutError, match="does not answer a health check"):
        await pool.sample(PROMPTS, 1, Sampling(), step=0)


async def test_a_closed_pool_says_so(no_ray):
    pool = FakePool()
    await pool.ready()
    pool.close()
    with pytest.raises(RolloutError, match="closed"):
        await pool.sample(PROMPTS, 1, Sampling(), step=0)


async def test_no_prompts_no_work():
    assert await FakePool().sample([], 4, Sampling(), step=0) == []


def test_at_least_one_engine():
    with pytest.raises(ValueError, match="num_engines=0"):
        FakePool(num_engines=0)
