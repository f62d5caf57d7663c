"""DeepSpeed against plain PyTorch, on real processes: the same weights after five optimizer steps, whatever the sharding.

Micro-batches hold unequal numbers of tokens, some hold nothing to learn, and in one step a whole rank has nothing to learn; clipping, weight decay,
warm-up and a cosine schedule act.  Every case is compared with the float32 master weights of a single plain PyTorch process that saw all
micro-batches.  A distance is relative to how far that process moved its weights, so a gradient that is averaged instead of summed, dropped, or
counted twice shows at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.testing.tiny import create_tiny_model

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "contract" / "learner_worker.py"

# relative distance between weight movements, and between gradient norms.  bfloat16 differs by the order in which rounded gradients are added.
MOVEMENT = {"float32": 1e-4, "bfloat16": 5e-2}
NORM = {"float32": 1e-4, "bfloat16": 2e-2}

TORCH = ["torch-stage0-float32", "torch-stage0-bfloat16"]
STAGES = [
    f"deepspeed-stage{stage}-{dtype}{'-offload' if offload else ''}"
    for dtype in ("float32", "bfloat16")
    for stage in (0, 1, 2, 3)
    for offload in (False, True)
    if stage or not offload
]
MORE = [
    *[f"deepspeed-stage{stage}-float32-lora" for stage in (0, 2, 3)],
    *[f"deepspeed-stage{stage}-float32-checkpointing" for stage in (2, 3)],
    "deepspeed-stage3-float32-lora-checkpointing-kl",
    "deepspeed-stage3-float32-kl",
    "deepspeed-stage2-float32-two_pass",
    *[f"torch-stage0-float32-{extra}" for extra in ("lora", "kl", "lora-kl")],
]
RESUME = [TORCH[0], *[name for name in STAGES if "float32" in name], "deepspeed-stage3-float32-lora"]


class Results:
    """What the workers wrote: ``results(case, world_size, rank)``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache: dict[Path, Any] = {}

    def __call__(self, case: str, world_size: int, rank: int = 0) -> dict[str, Any]:
        file = self.folder / f"{case}-rank{rank}of{world_size}.pt"
        if file not in self.cache:
            assert file.exists(), f"rank {rank} of {world_size} never ran {case}; its log:\n{self.log(world_size, rank)}"
            self.cache[file] = torch.load(file, weights_only=True)
        found = self.cache[file]
        assert "error" not in found, f"{case}, rank {rank} of {world_size}: {found['error']}; its log:\n{self.log(world_size, rank)}"
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
    running = []
    for world_size in (2, 1):
        for rank in range(world_size):
            command = [sys.executable, str(WORKER), str(rank), str(world_size), str(folder / f"meet{world_size}"), str(folder), str(model)]
            with open(folder / f"log-{rank}of{world_size}.txt", "w") as log:
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in running:
            process.wait(timeout=900)
        yield Results(folder)
    finally:
        for process in running:
            process.kill()
            process.wait()


def reference_of(case: str) -> str:
    words = case.split("-")
    return "-".join(["torch", "stage0", words[2], *[w for w in words[3:] if w in ("lora", "kl")]])


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def check(results: Results, case: str, world_size: int) -> None:
    ours, truth = results(case, world_size), results(reference_of(case), 1)
    dtype = case.split("-")[2]
    assert set(ours["end"]) == set(truth["end"])
    moved = flat(truth["end"]) - flat(truth["start"])
    distance = float((flat(ours["end"]) - flat(truth["end"])).norm() / moved.norm())
    assert distance < MOVEMENT[dtype], f"{case} on {world_size} ranks is {distance:.2e} of the movement away from plain PyTorch"
    for step, (a, b) in enumerate(zip(ours["reports"], truth["reports"], strict=True)):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=NORM[dtype]), f"step {step}"
        assert a["lr"] == b["lr"]
        assert a["update_norm_ratio"] == pytest.approx(b["update_norm_ratio"], rel=10 * NORM[dtype]), f"step {step}"


def test_the_reference_is_worth_comparing_with(results: Results) -> None:
    """It moves, clipping acts in some steps and not in others, and the schedule changes the rate."""
    truth = results(TORCH[0], 1)
    norms = [r["grad_norm"] for r in truth["reports"]]
    assert max(norms) > 0.5, norms
    assert len({r["lr"] for r in truth["reports"]}) > 2
    assert float((flat(truth["end"]) - flat(truth["start"])).abs().max()) > 1e-3
    assert truth["frozen"] == [] and len(truth["frozen_at_start"]) == len(truth["start"])


@pytest.mark.parametrize("case", [*TORCH, *STAGES, *MORE])
def test_two_ranks_equal_one_process(results: Results, case: str) -> None:
    check(results, case, 2)


@pytest.mark.parametrize("case", STAGES)
def test_one_rank_equals_plain_pytorch(results: Results, case: str) -> None:
    check(results, case, 1)


@pytest.mark.parametrize("case", [*TORCH, *STAGES, *MORE])
def test_ranks_agree(results: Results, case: str) -> None:
    """After the last step all ranks publish the same bits, and the bits are those of the weights they handed out."""
    first, second = results(case, 2, 0), results(case, 2, 1)
    assert first["fingerprint"] == second["fingerprint"]
    assert set(first["state"]) == set(first["fingerprint"])
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["frozen"] == second["frozen"] == []


@pytest.mark.parametrize("case", [*STAGES, *MORE])
def test_scores_agree(results: Results, case: str) -> None:
    """Log-probs of the trained policy and of the frozen start, against plain PyTorch."""
    ours, truth = results(case, 2), results(reference_of(case), 1)
    tolerance = 1e-4 if "float32" in case else 0.1
    torch.testing.assert_close(ours["logp"], truth["logp"], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours["base"], truth["base"], rtol=0, atol=tolerance)
    assert float((ours["logp"] - ours["base"]).abs().max()) > 10 * tolerance / (1 if "float32" in case else 20), "training changed nothing"


@pytest.mark.parametrize("case", RESUME)
def test_resume_is_bit_exact(results: Results, case: str) -> None:
    """Saved after step 2 and continued to step 5 by a new engine: the same bits as never stopping."""
    for rank in (0, 1):
        found = results(case, 2, rank)
        resumed = found["resumed"]
        assert resumed["identical"] and resumed["fingerprint"] == found["fingerprint"]
        assert resumed["reports"] == found["reports"][2:]


def test_gradient_checkpointing_changes_nothing(results: Results) -> None:
    for stage in (2, 3):
        plain, recomputed = results(f"deepspeed-stage{stage}-float32", 2), results(f"deepspeed-stage{stage}-float32-checkpointing", 2)
        torch.testing.assert_close(flat(plain["end"]), flat(recomputed["end"]), rtol=0, atol=1e-6)


def test_full_kl_acts(results: Results) -> None:
    """The penalty towards the frozen start changes the run, so its agreement above means something."""
    with_kl, without = results("torch-stage0-float32-kl", 1), results(TORCH[0], 1)
    assert float((flat(with_kl["end"]) - flat(without["end"])).abs().max()) > 1e-5


def test_only_adapters_are_trained(results: Results) -> None:
    found = results("deepspeed-stage3-float32-lora", 2)
    assert found["end"] and all(".lora_" in name for name in found["end"])
    assert not any("lora" in name for name in found["state"])
