"""Bugs and silent differences of released off-policy code, reproduced: the other version is shown to differ, ours to be what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.loss import mask
from posttrain.records import TokenBatch
from posttrain.testing.check import example_batch, objective_with
from tests.loss.cases import CASES, NORM, REWARD, composed, make
from tests.loss.test_identities import policy_batch

F64 = torch.float64


def differs(a: Tensor, b: Tensor, least: float) -> bool:
    return float((a - b).norm()) > least * float(b.norm())


def masked(batch: TokenBatch, term: mask.SecondMoment, parts: list[list[int]]) -> Tensor:
    out = torch.ones(batch.num_tokens, dtype=F64)
    for part in parts:
        piece = batch.take(part)
        out[batch.columns_of(part)] = term.factor(objective_with(term).views(piece)["rollouts"], piece.advantage)
    return out


def test_a_second_moment_per_micro_batch_drops_other_tokens() -> None:
    batch, term = example_batch(1, 1.0), mask.SecondMoment(0.2)
    step = masked(batch, term, [list(range(9))])
    assert not torch.equal(step, masked(batch, term, [[0, 1, 2, 3], [4, 5, 6, 7, 8]]))
    objective = objective_with(term)
    batch = batch.replace(totals=objective.totals(batch))
    with pytest.raises(ValueError, match=r"mask\.SecondMoment must see the whole optimizer step"):
        objective.weights(batch.take([0, 1, 2]))


def test_group_means_of_a_cut_group_are_others() -> None:
    """Mean rewards and log-ratios over what a micro-batch happens to hold of a group."""
    case = CASES["gvpo"]
    batch, objective = case.make(5).batch(), case.load()
    whole = batch.replace(totals=objective.totals(batch))
    local = torch.zeros(batch.num_tokens, dtype=F64)
    for start in range(0, batch.num_sequences, 3):
        part = list(range(start, min(start + 3, batch.num_sequences)))
        local[batch.columns_of(part)] = objective.weights(whole.take(part))
    assert differs(local, objective.weights(whole), 0.1)
    assert objective.needs.keep_whole == "group"


def test_a_squared_log_ratio_per_token_is_not_that_of_the_answer() -> None:
    batch = make(0, REWARD, 0.5).batch()
    per_token = composed("kimi_k15", ("streams.rollouts.advantage.credit=own",))
    assert differs(per_token.weights(batch), composed("kimi_k15").weights(batch), 0.02)


@pytest.mark.parametrize(("length", "product", "geometric"), [(1, 0.0, 0.0), (10, 0.0, 0.0), (100, 1.0, 0.0)])
def test_sequence_means_two_things(length: int, product: float, geometric: float) -> None:
    """A drift of 1 % per token: the product of a long answer leaves any bound, its geometric mean never does."""
    batch = policy_batch([[-1.0] * length], [1.0], old=[[-1.0] * length], behaviour=[[-1.01] * length])
    for level, expected in (("sequence", product), ("sequence_geometric", geometric)):
        term = mask.Reject(0.0, 2.0, level=level)
        found = term.factor(objective_with(term).views(batch)["rollouts"], batch.advantage)
        assert float((found == 0).double().mean()) == expected


def test_a_correction_is_not_applied_twice_where_the_reference_holds_it() -> None:
    """With ``behaviour`` as the reference the ratio is in the weight already: ``apply=weight`` beside it squares it."""
    batch = policy_batch([[-1.0]], [1.0], old=[[-1.0]], behaviour=[[-1.0 - math.log(1.5)]])
    assert composed("tis").weights(batch).tolist() == pytest.approx([1.5])
    assert composed("tis", ("streams.rollouts.masks.tis.apply=weight",)).weights(batch).tolist() == pytest.approx([2.25])
    from_old = ("streams.rollouts.masks.tis.apply=weight", "streams.rollouts.reference.to=old")
    assert composed("tis", from_old).weights(batch).tolist() == pytest.approx([1.5])


def test_clipping_against_the_sampler_is_not_clipping_against_the_learner() -> None:
    """The mask's reference is a setting of its own: an answer two updates old is not clipped for what older updates did."""
    batch = policy_batch([[-1.0]], [1.0], old=[[-1.0]], behaviour=[[-1.0 - math.log(1.5)]])
    merged = ("streams.rollouts.masks.clip.to=behaviour",)
    assert composed("decoupled_ppo").weights(batch).tolist() == pytest.approx([1.5])
    assert composed("decoupled_ppo", merged).weights(batch).tolist() == [0.0]


def test_the_ratio_of_the_token_is_not_that_of_the_answer_in_the_taper() -> None:
    batch = make(0, NORM, 0.4).batch()
    per_token = composed("topr", ("streams.rollouts.masks.taper.level=token",))
    assert differs(per_token.weights(batch), composed("topr").weights(batch), 0.02)


def test_a_missing_sampling_policy_is_an_error_and_not_a_ratio_of_1() -> None:
    batch = make(0, NORM).batch()
    lean = batch.replace(logps={k: v for k, v in batch.logps.items() if k != "behaviour"})
    for name in ("tis", "mis", "icepop", "decoupled_ppo", "opsm", "topr"):
        with pytest.raises(ValueError, match="needs the log-prob column 'behaviour'"):
            composed(name).weights(lean)
