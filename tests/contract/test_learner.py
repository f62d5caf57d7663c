"""DeepSpeed against plain PyTorch, on real processes: the same gradients in each of five optimizer steps and the same weights after them,
whatever the sharding.

Micro-batches hold unequal numbers of tokens, some hold nothing to learn, and in one step a whole rank has nothing to learn; clipping, weight decay,
warm-up and a cosine schedule act.  Every case is compared with a single plain PyTorch process that saw all micro-batches: the gradients that
AdamW was given, tensor by tensor, and the float32 master weights.  A distance between weights is relative to how far they moved, so a gradient that
is averaged instead of summed, dropped, or counted twice shows at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.testing.tiny import create_tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import learner_worker as worker
from learner_worker import ALL, MORE, STAGES, TORCH, Case

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Relative.  In bfloat16 the last bit of a float32 master decides now and then how a weight is rounded, and the next gradient differs by that.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
PATIENCE_S = 900.0


def all_of(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class Results:
    """What the workers wrote: ``results(case, world_size, rank)``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache: dict[Path, Any] = {}

    def __call__(self, case: Case, world_size: int, rank: int = 0) -> dict[str, Any]:
        file = self.folder / f"{case.name}-rank{rank}of{world_size}.pt"
        if file not in self.cache:
            assert file.exists(), f"rank {rank} of {world_size} never ran {case.name}; its log:\n{self.log(world_size, rank)}"
            self.cache[file] = torch.load(file, weights_only=True)
        found = self.cache[file]
        assert "error" not in found, f"{case.name}, rank {rank} of {world_size}: {found['error']}; its log:\n{self.log(world_size, rank)}"
        return found

    def log(self, world_size: int, rank: int) -> str:
        return (self.folder / f"log-{rank}of{world_size}.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Three processes at once: a world of two ranks and a world of one, each walking all its cases."""
    folder = tmp_path_factory.mktemp("learner")
    model = create_tiny_model(folder / "model", hidden_size=64, num_heads=2, num_kv_heads=1, num_layers=2, intermediate_size=96)
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    worlds: dict[int, list[subprocess.Popen[bytes]]] = {2: [], 1: []}
    try:
        for size, ranks in worlds.items():
            for rank in range(size):
                command = [sys.executable, worker.__file__, str(rank), str(size), str(folder / f"meet{size}"), str(folder), str(model)]
                with open(folder / f"log-{rank}of{size}.txt", "w") as log:
                    ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + PATIENCE_S
        for ranks in worlds.values():
            # a rank that fails leaves the others of its world waiting for it
            while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks) and time.monotonic() < end:
                time.sleep(0.2)
    finally:
        for process in [p for ranks in worlds.values() for p in ranks]:
            process.kill()
            process.wait()
    yield Results(folder)


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def check(results: Results, case: Case, world_size: int) -> None:
    ours, truth = results(case, world_size), results(case.reference, 1)
    tolerance = TOLERANCE[case.dtype]
    assert set(ours["end"]) == set(truth["end"])
    assert len(ours["gradients"]) == len(truth["gradients"]) == worker.STEPS
    for step, (a, b) in enumerate(zip(ours["gradients"], truth["gradients"], strict=True)):
        small = 1e-3 * float(flat(b).norm())
        for name in b:
            distance = float((a[name] - b[name]).norm()) / (float(b[name].norm()) + small)
            assert distance < tolerance, f"step {step}: the gradient of {name} is {distance:.2e} away from plain PyTorch's"
    moved = flat(truth["end"]) - flat(truth["start"])
    distance = float((flat(ours["end"]) - flat(truth["end"])).norm() / moved.norm())
    assert distance < tolerance, f"the weights are {distance:.2e} of the movement away from plain PyTorch's"
    for step, (a, b) in enumerate(zip(ours["reports"], truth["reports"], strict=True)):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance), f"step {step}"
        assert a["lr"] == b["lr"]
        assert a["update_norm_ratio"] == pytest.approx(b["update_norm_ratio"], rel=tolerance), f"step {step}"


def test_the_batches_are_worth_comparing_on() -> None:
    """Unequal numbers of tokens, per micro-batch and per rank, and a rank with nothing to learn."""
    goal = worker.objective(kl=False)
    tokens: dict[tuple[int, int], list[int]] = {}
    for step in range(worker.STEPS):
        whole = worker.whole_batch(step, goal)
        assert sorted(i for part in worker.micro_batches(step) for i in part) == list(range(8))
        for rank in (0, 1):
            tokens[step, rank] = [int(whole.take(part).trainable.sum()) for part in worker.micro_batches(step, rank, 2)]
    assert all(len(tokens[step, 0]) == len(tokens[step, 1]) for step in range(worker.STEPS))
    assert sum(tokens[1, 1]) == 0 < min(sum(tokens[0, 1]), sum(tokens[1, 0]))
    assert sum(tokens[0, 0]) != sum(tokens[0, 1]) and len(set(tokens[0, 0])) > 1 and 0 in tokens[0, 0]


@pytest.mark.parametrize(("case", "limit"), [(TORCH[0], 4.0), (Case("torch", lora=True), 0.75)], ids=["full", "lora"])
def test_the_reference_is_worth_comparing_with(results: Results, case: Case, limit: float) -> None:
    """It moves, clipping acts in some steps and not in others, and the schedule changes the rate."""
    truth = results(case, 1)
    norms = [r["grad_norm"] for r in truth["reports"]]
    assert min(norms) < limit < max(norms), norms
    given = [float(flat(g).norm()) for g in truth["gradients"]]
    assert given == pytest.approx([min(n, limit) for n in norms], rel=1e-5)
    assert len({r["lr"] for r in truth["reports"]}) > 2
    assert float((flat(truth["end"]) - flat(truth["start"])).abs().max()) > 1e-3
    assert truth["frozen"] == [] and len(truth["frozen_at_start"]) == len(truth["start"])


@all_of(ALL)
def test_two_ranks_equal_one_process(results: Results, case: Case) -> None:
    check(results, case, 2)


@all_of(STAGES)
def test_one_rank_equals_plain_pytorch(results: Results, case: Case) -> None:
    check(results, case, 1)


@all_of(ALL)
def test_ranks_agree(results: Results, case: Case) -> None:
    """After the last step all ranks publish the same bits, and the bits are those of the weights they handed out."""
    first, second = results(case, 2, 0), results(case, 2, 1)
    assert first["fingerprint"] == second["fingerprint"]
    assert set(first["state"]) == set(first["fingerprint"])
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["frozen"] == second["frozen"] == []


@all_of([*STAGES, *MORE])
def test_published_weights_and_scores_agree(results: Results, case: Case) -> None:
    """Weights as they are handed out, log-probs of the trained policy and of the frozen start, against plain PyTorch."""
    ours, truth = results(case, 2), results(case.reference, 1)
    tolerance = 1e-5 if case.dtype == "float32" else 2e-2
    assert set(ours["state"]) == set(truth["state"])
    for name, tensor in truth["state"].items():
        torch.testing.assert_close(ours["state"][name], tensor, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours["logp"], truth["logp"], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours["base"], truth["base"], rtol=0, atol=tolerance)
    assert float((ours["logp"] - ours["base"]).abs().max()) > 2 * tolerance, "training changed nothing"


@all_of([case for case in ALL if case.resume])
def test_resume_is_bit_exact(results: Results, case: Case) -> None:
    """Saved after step 2 and continued to step 5 by a new engine: the same bits as never stopping."""
    for rank in (0, 1):
        found = results(case, 2, rank)
        resumed = found["resumed"]
        assert resumed["identical"] and resumed["fingerprint"] == found["fingerprint"]
        assert resumed["reports"] == found["reports"][worker.SAVE_AT :]


@all_of(ALL)
def test_a_nan_gradient_on_one_rank_stops_all_before_any_weight_changes(results: Results, case: Case) -> None:
    first, second = (results(case, 2, rank)["nan"] for rank in (0, 1))
    assert first["said"].startswith("optimizer step 5: another rank than 0 has a NaN or infinite gradient"), first["said"]
    assert second["said"].startswith("optimizer step 5, rank 1: the gradient of model."), second["said"]
    assert first["unchanged"] and second["unchanged"]
    if case in STAGES:
        alone = results(case, 1)["nan"]
        assert alone["said"].startswith("optimizer step 5, rank 0: the gradient of model.") and alone["unchanged"]


@all_of([case for case in ALL if case.resume])
def test_a_sum_of_gradients_that_overflows_stops_before_any_weight_changes(results: Results, case: Case) -> None:
    """Each gradient is finite, so no tensor is to blame."""
    for rank in (0, 1):
        found = results(case, 2, rank)["overflow"]
        assert found["said"].startswith("optimizer step 5: the norm of the summed gradient is inf"), found["said"]
        assert found["unchanged"]


def test_gradient_checkpointing_changes_nothing(results: Results) -> None:
    for stage in (2, 3):
        plain, recomputed = results(Case(stage=stage), 2), results(Case(stage=stage, checkpointing=True), 2)
        torch.testing.assert_close(flat(plain["end"]), flat(recomputed["end"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_full_kl_acts(results: Results, lora: bool) -> None:
    """The penalty towards the frozen start changes the run by far more than the tolerance, so its agreement above means something."""
    with_kl, without = results(Case("torch", kl=True, lora=lora), 1), results(Case("torch", lora=lora), 1)
    moved = flat(without["end"]) - flat(without["start"])
    assert float((flat(with_kl["end"]) - flat(without["end"])).norm() / moved.norm()) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_base_that_follows_acts(results: Results, lora: bool) -> None:
    """Moving the base half way changes what comes after by far more than the tolerance."""
    following, staying = results(Case("torch", kl=True, lora=lora, follow=True), 1), results(Case("torch", kl=True, lora=lora), 1)
    assert float((following["base"] - staying["base"]).abs().max()) > 1e-3
    moved = flat(staying["end"]) - flat(staying["start"])
    assert float((flat(following["end"]) - flat(staying["end"])).norm() / moved.norm()) > 10 * TOLERANCE["float32"]


def test_only_adapters_are_trained(results: Results) -> None:
    found = results(Case(stage=3, lora=True), 2)
    assert found["end"] and all(".lora_" in name for name in found["end"])
    assert not any("lora" in name for name in found["state"])
