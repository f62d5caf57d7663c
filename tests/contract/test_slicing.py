"""The gradient of every shipped loss does not depend on micro-batches, ranks, packing or padding, or on where a pair or group is cut.

A real causal model is run forward and backward; ranks are a partition whose gradients are added up (the learner's suite does it with processes).
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, mask, reference, regularizer
from posttrain.records import TokenBatch
from posttrain.testing.check import CheckFailed, check_slicing
from tests.loss.cases import CASES, Data, columns, flat, make

RTOL = 1e-11
EVERYTHING = {
    "entropy": regularizer.Entropy(0.1),
    "kl": regularizer.KL("k2", coef=0.3),
    "full": regularizer.FullKL("reverse", coef=0.2),
    "forward": regularizer.FullKL("forward", coef=0.2, aggregation=aggregate.SequenceMeanTokenSum()),
}


def with_regularizers() -> Objective:
    stream = Stream(
        source=("policy",),
        likelihood=likelihood.Token(ratio="sequence_geometric"),
        reference=reference.Named("behaviour"),
        advantage=advantage.Column(),
        aggregation=aggregate.SequenceMeanTokenMean(),
        masks={"clip": mask.RatioClip(0.05, 0.05), "tis": mask.Truncate(1.1, level="token"), "long": mask.DropTruncated()},
    )
    return Objective({"rollouts": stream}, EVERYTHING)


def kept_tokens() -> Objective:
    stream = Stream(
        source=("policy",),
        likelihood=likelihood.Token(),
        reference=reference.Named(),
        advantage=advantage.Column(),
        aggregation=aggregate.TokenMean("kept"),
        masks={"clip": mask.RatioClip()},
    )
    return Objective({"rollouts": stream}, {"entropy": regularizer.Entropy(0.1), "kl": regularizer.KL("k3", coef=0.1)})


OBJECTIVES = {name: case.load for name, case in CASES.items()} | {"every regulariser": with_regularizers, "kept tokens": kept_tokens}


def forward(data: Data, batch: TokenBatch, padded: bool) -> Tensor:
    """Log-probabilities over the vocabulary, ``[N, V]``."""
    if not padded or batch.num_tokens == 0:
        return data.model.packed(batch.input_ids, batch.positions, batch.seq)
    inputs = [batch.input_ids[batch.seq == i].tolist() for i in range(batch.num_sequences)]
    return torch.cat(data.model.padded(inputs))


def gradient(
    objective: Objective, data: Data, parts: list[list[int]], padded: bool = False
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """What a learner does: totals on the whole, two passes when a coupled set is cut, then micro-batches whose gradients add up."""
    batch = data.batch()
    batch = batch.replace(totals=objective.totals(batch))
    two_passes = objective.needs.keep_whole is not None and len(parts) > 1
    weights, first = objective.weigh(batch) if two_passes else (None, {})
    total, metrics = torch.zeros(sum(p.numel() for p in data.model.parameters()), dtype=torch.float64), {}
    for part in parts:
        micro = batch.take(part)
        rows = forward(data, micro, padded)
        logp = rows.gather(1, micro.target_ids[:, None])[:, 0]
        out = objective(micro, logp, columns(objective, rows), None if weights is None else weights[batch.columns_of(part)])
        assert out.loss.requires_grad, "a micro-batch with nothing to learn must still run backward"
        total += flat(torch.autograd.grad(out.loss, list(data.model.parameters()), allow_unused=True), data.model)
        for key, (s, n) in out.metrics.items():
            was = metrics.get(key, (0.0, 0.0))
            metrics[key] = (was[0] + s, was[1] + n)
    return total, {**metrics, **first}


def cut(data: Data, micro_batches: int, ranks: int, seed: int) -> list[list[int]]:
    """A random partition into ``ranks * micro_batches`` parts, of unequal size, pairs and groups cut anywhere, one part empty when there are four."""
    rng = random.Random(seed)
    order = list(range(len(data.rows)))
    rng.shuffle(order)
    parts = micro_batches * ranks
    edges = sorted(rng.sample(range(1, len(order)), parts - 1)) if parts > 1 else []
    pieces = [order[a:b] for a, b in zip([0, *edges], [*edges, len(order)], strict=True)]
    return [*pieces[:-2], pieces[-2] + pieces[-1], []] if parts >= 4 else pieces


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_and_metrics_do_not_depend_on_the_slicing(name: str) -> None:
    objective, case = OBJECTIVES[name](), CASES.get(name)
    data = case.make(5) if case else make(5, None, 0.3)
    whole, metrics = gradient(objective, data, [list(range(len(data.rows)))])
    assert float(whole.norm()) > 1e-6
    for micro_batches, ranks in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
        got, added = gradient(objective, data, cut(data, micro_batches, ranks, seed=micro_batches + 10 * ranks))
        assert float((got - whole).norm()) <= RTOL * float(whole.norm()), (micro_batches, ranks)
        assert set(added) == set(metrics)
        for key in metrics:
            assert added[key] == (pytest.approx(metrics[key][0], rel=1e-9, abs=1e-9), pytest.approx(metrics[key][1])), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name: str) -> None:
    objective, case = OBJECTIVES[name](), CASES.get(name)
    data = case.make(6) if case else make(6, None, 0.3)
    parts = [list(range(len(data.rows)))]
    packed, padded = (gradient(objective, data, parts, p)[0] for p in (False, True))
    assert float((packed - padded).norm()) <= RTOL * float(packed.norm())


def test_a_mean_of_means_would_be_caught() -> None:
    """The classical bug, reproduced: totals taken from each micro-batch."""
    data, objective = make(5), CASES["sft"].load()
    whole, _ = gradient(objective, data, [list(range(len(data.rows)))])
    batch, total = data.batch(), torch.zeros_like(whole)
    parts = [p for p in cut(data, 2, 1, seed=1) if p]
    for part in parts:
        micro = batch.take(part)
        rows = forward(data, micro, False)
        out = objective(micro.replace(totals=None), rows.gather(1, micro.target_ids[:, None])[:, 0])
        total += flat(torch.autograd.grad(out.loss, list(data.model.parameters()), allow_unused=True), data.model) / len(parts)
    assert float((total - whole).norm()) > 0.01 * float(whole.norm())


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo"])
def test_a_cut_pair_without_weights_is_an_error_that_names_the_way_out(name: str) -> None:
    data, objective = make(5), CASES[name].load()
    batch = data.batch()
    batch = batch.replace(totals=objective.totals(batch))
    chosen = next(i for i, s in enumerate(data.seqs) if s.get("side") == "chosen")
    with pytest.raises(ValueError, match=r"0 rejected answers here instead of 1.*weights="):
        objective(batch.take([chosen]))
    assert objective.needs.keep_whole == "group"


def test_a_kept_denominator_refuses_a_part_of_the_step() -> None:
    data, objective = make(5), kept_tokens()
    batch = data.batch()
    batch = batch.replace(totals=objective.totals(batch))
    assert objective.needs.keep_whole == "batch"
    with pytest.raises(ValueError, match="whole optimizer step"):
        objective.weights(batch.take([0, 1, 2]))


def test_check_slicing_on_every_shipped_loss_where_sets_are_whole_and_cut() -> None:
    for name in ("grpo", "dpo", "dapo as printed", "gspo"):
        case = CASES[name]
        batch = case.make(7).batch()
        check_slicing(case.load(), batch)
        check_slicing(case.load(), batch, [[i] for i in range(batch.num_sequences)])


def test_an_undeclared_coupling_is_caught() -> None:
    class Secret(aggregate.GroupMeanTokenMean):
        live = False

    stream = Stream(("policy",), likelihood.Token(), reference.Current(), advantage.Column(), Secret())
    with pytest.raises(CheckFailed, match="depends on the slicing"):
        check_slicing(Objective({"rollouts": stream}), make(7).batch())
