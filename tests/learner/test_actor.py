"""Two learner ranks as Ray actors: dealing, summing, publishing, saving, and what a failing rank says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import ClusterConfig, LearnerConfig, ModelConfig
from posttrain.learner.actor import LearnerError, LearnerGroup, add_metrics, deal
from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, reference
from posttrain.records import Row, TokenBatch


def goal() -> Objective:
    stream = Stream(
        source=("demo",), likelihood=likelihood.Token(), reference=reference.Current(), advantage=advantage.One(), aggregation=aggregate.TokenMean()
    )
    return Objective({"demos": stream})


def micro_batches(count: int = 3) -> list[TokenBatch]:
    whole = TokenBatch.from_sequences([Row(ids=list(range(5, 9 + 2 * i))) for i in range(count)])
    whole = whole.replace(totals=goal().totals(whole))
    return [whole.take([i]) for i in range(count)]


def group(tiny: str, world_size: int = 2, **learner: Any) -> LearnerGroup:
    settings = {"engine": "deepspeed", "zero_stage": 2, "world_size": world_size, "lr": 1e-2, "threads": 1, **learner}
    return LearnerGroup(ModelConfig(path=tiny, dtype="float32"), LearnerConfig(**settings), goal(), total_steps=4, publish_dtype="bfloat16", bucket_mb=1)


def test_deal() -> None:
    assert deal(4, 2) == [[0, 2], [1, 3]] and deal(3, 3) == [[0], [1], [2]] and deal(2, 1) == [[0, 1]]


def test_metrics_add_up() -> None:
    assert add_metrics([{"a": (1.0, 2.0)}, {"a": (3.0, 1.0), "b": (5.0, 0.0)}, {}]) == {"a": (4.0, 3.0), "b": (5.0, 0.0)}


async def test_not_started(tiny: str) -> None:
    with pytest.raises(LearnerError, match="has not been started"):
        await group(tiny).score(micro_batches())
    with pytest.raises(ValueError, match="at least one micro-batch"):
        await group(tiny).step([])
    group(tiny).close()


def poison(module: Any, inputs: Any, output: torch.Tensor) -> None:
    """A forward hook: the gradient that comes back through ``output`` is NaN, the loss stays finite."""
    output.register_hook(lambda grad: grad * torch.nan)


def plant_nan(actor: Any) -> None:
    actor.engine.module.inner.model.norm.register_forward_hook(poison)


def surroundings(_: Any) -> tuple[str, bool, int, str, bool]:
    """What the environment of a CPU rank has led to, in the libraries that read it."""
    import os

    import torch
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name(), torch.compile(surroundings) is surroundings, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], torch.cuda.is_available()


async def inside(learner: LearnerGroup, look: Callable[[Any], Any], rank: int = 0) -> Any:
    """``look(actor)``, called in the process of a rank."""
    return await learner.actors[rank].__ray_call__.remote(look)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Any]:
    from posttrain.cluster import session

    with session(ClusterConfig(num_cpus=2, object_store_gb=0.2)) as ray:
        yield ray


@pytest.mark.ray
@pytest.mark.slow
async def test_two_ranks(tiny: str, tmp_path: Path, ray_session: Any) -> None:
    """The whole life of a group, against the plain engine in this process."""
    from posttrain.learner.torch_engine import TorchEngine
    from posttrain.sync.object_store import read

    learner = group(tiny)
    plain = TorchEngine(learner.model_cfg, LearnerConfig(engine="torch", lr=1e-2), goal(), total_steps=4)
    try:
        status = await learner.ready()
        assert [s["rank"] for s in status] == [0, 1] and len({s["pid"] for s in status}) == 2
        assert await inside(learner, surroundings, rank=1) == ("cpu", True, 1, "1", False)
        for _ in range(2):
            # three micro-batches on two ranks: the second rank runs an empty one
            report = await learner.step(micro_batches())
            wanted = add_metrics([plain.forward_backward(b) for b in micro_batches()])
            scalars = plain.optim_step()
            assert report.scalars["grad_norm"] == pytest.approx(scalars["grad_norm"], rel=1e-4)
            assert report.scalars["tokens"] == sum(b.num_tokens for b in micro_batches())
            assert {k: pytest.approx(v, rel=1e-4) for k, v in wanted.items()} == report.metrics
        scored = await learner.score(micro_batches(), entropy=True)
        for ours, batch in zip(scored, micro_batches(), strict=True):
            torch.testing.assert_close(ours["logp"], plain.score(batch)["logp"], rtol=0, atol=1e-4)
            assert ours["entropy"].shape == (batch.num_tokens,)
        assert await learner.frozen() == []

        refs, fingerprint = await learner.publish(7)
        received = dict(read(refs))
        assert set(received) == set(fingerprint) == {name for name, _ in plain.state()}
        assert {t.dtype for t in received.values()} == {torch.bfloat16}
        for name, tensor in plain.state():
            torch.testing.assert_close(received[name].float(), tensor, rtol=1e-2, atol=1e-2)

        await learner.save(str(tmp_path / "saved"))
        before = await learner.fingerprint()
        await learner.step(micro_batches())
        assert await learner.fingerprint() != before
        await learner.load(str(tmp_path / "saved"))
        assert await learner.fingerprint() == before
        await learner.export(str(tmp_path / "export"))
        assert (tmp_path / "export" / "model.safetensors").exists()

        with pytest.raises(ValueError, match=re.escape("loading, learner rank ")):
            await learner.load(str(tmp_path / "nowhere"))
    finally:
        learner.close()


@pytest.mark.ray
@pytest.mark.slow
async def test_deadline_nan_and_death(tiny: str, ray_session: Any) -> None:
    """A wait that is too long names phase, rank, host and version, also while the rank is busy; a NaN
    keeps its kind and its tensor's name on the way here; a dead rank is an error at once."""
    learner = group(tiny, world_size=1, engine="torch", zero_stage=0)
    try:
        await learner.ready()
        learner.cfg.timeout_s = 0.0
        with pytest.raises(LearnerError, match=r"publishing version 3: rank 0 of 1 gave no answer within 0 s; on host \S+ \(pid \d+\) it has been "):
            await learner.publish(3)
        learner.cfg.timeout_s = 60.0
        before = await learner.fingerprint()
        await inside(learner, plant_nan)
        with pytest.raises(FloatingPointError, match=r"learning, learner rank 0: optimizer step 0, rank 0: the gradient of model\.\S+ "):
            await learner.step(micro_batches())
        assert await learner.fingerprint() == before
        await inside(learner, lambda actor: setattr(actor.engine, "forward_backward", lambda *_, **__: time.sleep(600)))
        learner.cfg.timeout_s = 1.0
        with pytest.raises(LearnerError, match=r"within 1 s; .* it has been 'learning, micro-batch 1 of 3' for \d+\.\d s; last version 3"):
            await learner.step(micro_batches())
        learner.cfg.timeout_s = 60.0
        ray_session.kill(learner.actors[0], no_restart=True)
        with pytest.raises(LearnerError, match="learning: learner rank 0 died"):
            await learner.step(micro_batches())
    finally:
        learner.close()
