"""Every shipped loss gives the same gradient over two ranks and ZeRO stages 0 to 3 as one plain PyTorch process that saw the step whole.

One pair of processes walks them all: micro-batches of unequal size, an empty one among them, pairs and groups cut across ranks anywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.paths import CONFIGS
from posttrain.records import TokenBatch
from posttrain.testing.tiny import create_tiny_model
from tests.loss.cases import CASES

sys.path.insert(0, str(Path(__file__).parent))
import losses_worker as worker

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORLD, PATIENCE_S = 2, 800.0
TOLERANCE = 2e-5
"""Of the gradient's norm, in float32."""
WRONG = "a mean of means"
LOSSES = sorted(p.stem for p in CONFIGS.joinpath("loss").glob("*.yaml"))


def batch_of(name: str) -> TokenBatch:
    return TokenBatch.from_sequences(CASES[name].make(5).rows, fresh=False)


def recorded(engine: object, batch: TokenBatch) -> TokenBatch:
    """The batch as if this model had sampled it: recorded log-probs a little away from its own, absent where they were."""
    own = engine.score(batch)["logp"]  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(7)
    for policy in ("old", "behaviour", "base"):
        if policy in batch.logps:
            there = ~torch.isnan(batch.logps[policy])
            near = own + worker.NOISE * torch.randn(own.shape, generator=draw)
            batch = batch.with_logps(**{policy: torch.where(there, near, torch.nan)})
    return batch


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]]:
    """``(plain PyTorch's by loss, {stage: by loss})``."""
    folder = tmp_path_factory.mktemp("losses")
    for seed, part in enumerate(("model", "base", "teacher")):
        create_tiny_model(
            folder / part, seed=seed, hidden_size=32, num_heads=1, num_kv_heads=1, num_layers=1, intermediate_size=32, alphabet="abcdefgh"
        )
    engines = {head: worker.build(folder, None, head=head) for head in worker.HEADS}
    goals = {name: CASES[name].load() for name in LOSSES}
    batches = {name: (goal, recorded(engines[goal.needs.head], batch_of(name))) for name, goal in goals.items()}
    batches[WRONG] = (worker.wrong(), batches["grpo"][1])
    truth = {
        name: worker.learn(engines[goal.needs.head], goal, b, [list(range(b.num_sequences))], 0, 1) for name, (goal, b) in batches.items()
    }
    ahead, b = batches["amft"]
    truth[worker.AHEAD] = worker.along(engines["lm"], ahead, b, [list(range(b.num_sequences))], 0, 1)
    torch.save(batches, folder / "batches.pt")
    env = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(WORLD):
            with open(folder / f"log{rank}.txt", "w") as log:
                command = [sys.executable, worker.__file__, str(rank), str(WORLD), str(folder / "meet"), str(folder)]
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + PATIENCE_S
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks) and time.monotonic() < end:
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"log{rank}.txt").read_text()[-2000:] for rank in range(WORLD))
    missing = [stage for stage in worker.STAGES if not (folder / f"stage{stage}of{WORLD}.pt").exists()]
    assert not missing, f"stages {missing} never finished; the ranks' logs:\n{logs}"
    yield truth, {stage: torch.load(folder / f"stage{stage}of{WORLD}.pt", weights_only=True) for stage in worker.STAGES}


def distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_and_stages_do_not_change_the_gradient(gradients: tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]], name: str) -> None:
    truth, found = gradients
    assert float(truth[name].norm()) > 1e-12, "nothing to compare"  # a tenth power of a small probability is tiny
    for stage, ours in found.items():
        assert distance(ours[name], truth[name]) < TOLERANCE, f"ZeRO stage {stage}, {WORLD} ranks"


def test_ranks_and_stages_do_not_change_what_a_coefficient_does(gradients: tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]) -> None:
    """The direction of a coefficient that looks ahead; ZeRO-3 has no whole gradients and is refused."""
    truth, found = gradients
    assert [stage for stage, ours in found.items() if worker.AHEAD in ours] == [0, 1, 2]
    for ours in (found[stage] for stage in (0, 1, 2)):
        assert distance(ours[worker.AHEAD], truth[worker.AHEAD]) < TOLERANCE
    assert distance(truth[worker.AHEAD], truth["amft"]) > 0.1


def test_a_mean_of_means_is_caught(gradients: tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]) -> None:
    truth, found = gradients
    far = [distance(ours[WRONG], truth[WRONG]) for ours in found.values()]
    assert min(far) > 1000 * TOLERANCE, far


def test_gradients_differ_between_losses(gradients: tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]) -> None:
    """A worker that kept the gradient of the loss before would agree with itself only."""
    truth, _ = gradients
    assert distance(truth["dft"], truth["sft"]) > 0.01 and distance(truth["grpo"], truth["rloo"]) > 0.01
