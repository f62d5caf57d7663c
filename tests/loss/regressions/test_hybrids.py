"""Bugs of released code for SFT and its mixtures with reinforcement learning: what the wrong version does, and that ours does not."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.contrib.guided import AdvantageSaturating
from posttrain.data.rows import to_rows
from posttrain.mixture.buffer import Buffer
from posttrain.mixture.demos import Demos
from posttrain.records import Demo, Row, Segment, Source, TokenBatch
from tests.loss.cases import composed
from tests.loss.test_identities_hybrids import F64, given
from tests.mixture.conftest import demo, group


def norm_of_step(batch: TokenBatch, parts: list[list[int]], wrong: bool) -> float:
    """The norm of the token weights of a step cut into ``parts``; ``wrong`` counts each micro-batch by itself and adds the means up."""
    objective = composed("hpt", ("regularizers.entropy=null",))
    whole = batch.replace(totals=objective.totals(batch))
    found = torch.cat([objective.weights(part.replace(totals=None) if wrong else part) for part in map(whole.take, parts)])
    return float(found.norm())


def test_imitation_does_not_grow_with_the_number_of_micro_batches() -> None:
    """A mixture release takes the demonstrations' token mean per micro-batch and adds micro-batches up: three demonstrations in three
    micro-batches weigh three times what they weigh in one.  Nor is it a mean of means."""
    batch = given([-1.0] * 4, [-1.0] * 4, [-1.0] * 4)
    one, three = [[0, 1, 2]], [[0], [1], [2]]
    assert norm_of_step(batch, three, wrong=True) == pytest.approx(3 * norm_of_step(batch, one, wrong=True))
    assert norm_of_step(batch, three, wrong=False) == pytest.approx(norm_of_step(batch, one, wrong=False))


def test_the_weight_of_dft_carries_no_gradient() -> None:
    """Differentiated, ``p log p`` has the slope p (1 + log p), which changes its sign at p = 1/e: improbable right tokens would be pushed down."""
    for p in (0.2, 0.6):
        x = torch.tensor(math.log(p), dtype=F64, requires_grad=True)
        (wrong,) = torch.autograd.grad(x.exp() * x, x)
        assert (float(wrong) > 0) == (p > 1 / math.e)
        assert float(composed("dft").weights(given([math.log(p)]))) == pytest.approx(p)


def test_a_threshold_may_average_over_survivors_or_over_all() -> None:
    """A release shrinks the loss mask before it counts, so its step does not shrink with the mask; sequence parallelism turned every objective into
    plain likelihood there."""
    batch = given([math.log(0.9), math.log(0.05), math.log(0.8), math.log(0.01)])
    band = "streams.demos.masks.band={_target_: posttrain.loss.mask.ProbabilityBand, min: 0.1}"
    over_all = composed("dft", (band,)).weights(batch)
    over_survivors = composed("dft", (band, "streams.demos.aggregation.denominator=kept")).weights(batch)
    assert over_all.tolist() == pytest.approx([0.225, 0.0, 0.2, 0.0]) and over_survivors.tolist() == pytest.approx([0.45, 0.0, 0.4, 0.0])
    assert not bool(
        composed("dft", (band.replace("min: 0.1", "min: 0.95"), "streams.demos.aggregation.denominator=kept")).weights(batch).any()
    )


def test_a_clamp_with_exchanged_bounds_is_a_constant() -> None:
    """``clamp(x, min=0.001, max=-0.001)`` returns the maximum for every x, so the released gamma never followed the advantage; and a denominator of
    p - 0.001 amplifies a token of p = 0.00101 a hundredfold."""
    x = torch.linspace(-0.01, 0.01, 5)
    assert x.clamp(min=0.001, max=-0.001).tolist() == pytest.approx([-0.001] * 5)
    p = 0.00101
    assert p / (p - 0.001) == pytest.approx(101.0)
    with pytest.raises(ValueError, match=r"at_low=0\.001 must not be above at_high=-0\.001"):
        AdvantageSaturating(at_low=0.001, at_high=-0.001)
    with pytest.raises(ValueError, match=r"gamma=-0\.001 must be above 0"):
        composed.__wrapped__("luffy", ("streams.demos.reference.gamma=-0.001",))


def test_a_first_step_without_failures_leaves_the_buffer_empty() -> None:
    """A release starts with None for a buffer and takes its length."""
    gate = Buffer(size=1)
    assert gate([group("a", 1.0, 0.0)], Demos([demo("a")]), 0, 0.0)[1:] == [] and gate.waiting == []
    assert [i.id for i in gate([group("a", 0.0, 0.0)], Demos([demo("a")]), 1, 0.0) if isinstance(i, Demo)] == ["a"]


def test_exactly_the_sampled_tokens_are_learnt_whatever_the_padding() -> None:
    """A release finds the answer by comparing padded places with unpadded prompt lengths, and is off by one: under left padding prompt tokens leak in, and the first
    sampled token is lost."""
    prompt, answer, width = [1, 2], [3, 4, 5], 8
    padded = [0] * (width - 5) + prompt + answer
    wrong = [padded[i] for i in range(width) if i > len(prompt)]
    assert wrong != answer and set(wrong) & set(prompt)
    rows = [Row(ids=prompt + answer, sources=["prompt"] * 2 + ["policy"] * 3)]
    batch = TokenBatch.from_sequences(rows, dtype=F64).with_logps(current=torch.full((4,), -1.0, dtype=F64))
    view = composed("entropy_min").views(batch)["rollouts"]
    assert batch.target_ids[view.on].tolist() == answer and batch.input_ids[view.on].tolist() == [2, 3, 4]


def test_a_corrupted_input_is_no_padding() -> None:
    """Where attention is built from ``ids != pad`` and the mask token is the padding, corrupted places vanish: here nothing is derived from ids."""
    plain = Demo("d", (Segment((1, 2), Source.prompt, trainable=False), Segment((7, 8, 9), Source.demo)))
    hidden = Demo("d", (plain.segments[0], Segment((7, 8, 9), Source.demo, inputs=(0, 0, 9))))
    a, b = (TokenBatch.from_sequences(to_rows([d])) for d in (plain, hidden))
    assert (
        a.positions.tolist() == b.positions.tolist()
        and a.lengths.tolist() == b.lengths.tolist()
        and a.trainable.tolist() == b.trainable.tolist()
    )


def test_an_entropy_of_another_temperature_is_another_loss() -> None:
    """The release samples and takes the entropy at temperature 0.5: at 1 the gradient in the logits differs in size and direction."""
    assert composed("entropy_min").needs.temperature == 0.5
    z, found = torch.tensor([1.0, 0.2, -0.7], dtype=F64), {}
    for tau in (0.5, 1.0):
        leaf = z.clone().requires_grad_()
        row = torch.log_softmax(leaf / tau, 0)
        out = composed("entropy_min")(given([0.0], source="policy"), row[:1], {"entropy": -(row.exp() * row).sum()[None]})
        found[tau] = -torch.autograd.grad(out.loss, leaf)[0]
        p = row.exp().detach()
        exact = p * (row.detach() - (p * row.detach()).sum()) / tau
        torch.testing.assert_close(found[tau], exact, rtol=1e-10, atol=1e-14)
    assert float((found[0.5] - found[1.0]).norm() / found[1.0].norm()) > 0.1


def test_a_mean_of_micro_batch_means_favours_short_micro_batches() -> None:
    """Several frameworks, and the releases of DFT, ASFT and the probability family, average the micro-batches' own token means."""
    batch, parts = given([-1.0] * 2, [-1.0] * 9), [[0], [1]]
    for name in ("sft", "dft", "asft", "probability_power"):
        objective = composed(name, ("regularizers.kl=null",))
        whole = batch.replace(totals=objective.totals(batch))
        ours = torch.cat([objective.weights(whole.take(part)) for part in parts])
        wrong = torch.cat([objective.weights(batch.take(part).replace(totals=None)) / 2 for part in parts])
        assert float(ours.max()) == pytest.approx(float(ours.min())) and float(wrong[0] / wrong[-1]) == pytest.approx(4.5)


def test_masked_teacher_tokens_do_not_fall_back_to_the_clipped_ratio() -> None:
    """A release drops an improbable token of a bad answer from its own ratio only, so the ordinary one goes on pushing it down."""
    rows = [Row(ids=[1, 2, 3], sources=["prompt", "prefix", "policy"], logps={"current": [0.0, math.log(0.001), -1.0], "old": [0.0, math.log(0.0011), -1.0]}, advantage=-1.0)]
    batch = TokenBatch.from_sequences(rows, dtype=F64, fresh=False)
    weights = composed("think_tuning").weights(batch).tolist()
    assert weights[0] == 0.0 and weights[1] == pytest.approx(-1.0)
    ordinary = composed("grpo", ("streams.rollouts.source=[policy,prefix]", "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.TokenMean}"))
    assert ordinary.weights(batch).tolist()[0] == pytest.approx(-0.5 * 0.001 / 0.0011)


def test_old_failures_wait_behind_new_ones_only_where_told() -> None:
    """The release puts new failures in front, so that the oldest can wait for ever."""
    shelf = Demos([demo(name) for name in ("a", "b", "c")])
    failed = [group(name, 0.0, 0.0) for name in ("a", "b", "c")]
    for order, expected in (("newest", ["c", "b"]), ("oldest", ["a", "b"])):
        gate = Buffer(size=2, order=order)
        gate(failed[:1], shelf, 0, 0.0)
        out = gate(failed[1:], shelf, 1, 0.0)
        assert sorted(i.id for i in out if isinstance(i, Demo)) == sorted(expected)


def test_a_ramp_is_no_jump() -> None:
    """A release multiplies its coefficient by the share of the run done, 0 to 0.1, and then by 1: what should be half way up at a twentieth is a twentieth of the way."""
    released = [0.5 * (u if u < 0.1 else 1.0) for u in (0.0, 0.05, 0.0999, 0.1, 1.0)]
    ours = [composed("weak_to_strong").regularizers["own"].coef(u) for u in (0.0, 0.05, 0.0999, 0.1, 1.0)]
    assert ours == pytest.approx([0.0, 0.25, 0.4995, 0.5, 0.5]) and released[1:3] == pytest.approx([0.025, 0.04995])
    batch = given([-1.0, -2.0]).replace(progress=0.05)
    assert composed("weak_to_strong").weights(batch).tolist() == pytest.approx([0.75 / 2] * 2)


def test_shares_of_losses_are_those_of_the_step() -> None:
    """A release weighs the sequences of one micro-step over all ranks: under accumulation every micro-step has a largest loss of its own."""
    batch = given([-0.5], [-1.0], [-2.0], [-4.0])
    objective = composed("loss_reweighting", ("streams.demos.advantage.r=0.4",))
    whole = batch.replace(totals=objective.totals(batch))
    local = torch.cat([objective.weights(batch.take(part).replace(totals=None)) / 2 for part in ([0, 1], [2, 3])])
    assert local.tolist() == pytest.approx([0.5 / (1 + math.exp(2.5)), 0.5 / (1 + math.exp(-2.5))] * 2), "0 and 1 mapped to both micro-steps"
    assert float((local - objective.weights(batch)).norm()) > 0.3
    with pytest.raises(ValueError, match="LossSoftmax must see the whole optimizer step"):
        objective.weights(whole.take([0, 1]))


def test_means_weighted_by_counts_of_sequences_are_not_means_over_the_step() -> None:
    """A release weighs each micro-batch's token mean by its number of sequences, so an expert's long answer beside short ones counts its tokens for less."""
    batch = given([-1.0] * 2, [-1.0] * 8, [-1.0] * 2)
    objective = composed("chord_phi")
    whole = batch.replace(totals=objective.totals(batch))
    ours = torch.cat([objective.weights(whole.take(part)) for part in ([0, 1], [2])])
    wrong = torch.cat([objective.weights(batch.take(part).replace(totals=None)) * len(part) / 3 for part in ([0, 1], [2])])
    assert float(ours.max()) == pytest.approx(float(ours.min())) and float(wrong[-1] / wrong[0]) == pytest.approx((1 / 3 / 2) / (2 / 3 / 10))


def test_the_trust_region_of_given_texts_has_one_side() -> None:
    """A release sets a lower and a dual clip beside the upper one; at an advantage of 1 neither can act, at any ratio."""
    dual = "streams.demos.masks.dual={_target_: posttrain.loss.mask.DualClip, c: 3.0}"
    for r in (0.01, 0.5, 1.0, 1.2, 1.4, 20.0):
        batch = given([-9.0 + math.log(r)], old=[-9.0], fresh=False)
        released = composed("psft", ("streams.demos.masks.clip.low=0.2", dual))
        assert released.weights(batch).tolist() == composed("psft").weights(batch).tolist()


def test_what_tools_said_is_learnt_and_what_the_agent_did_is_not() -> None:
    """Before imitation only the environment's tokens are labels: another label for the agent's action changes nothing, another observation does."""
    rows = [Row(ids=[1, 2, 3, 4], sources=["prompt", "policy", "tool", "tool"], trainable=[False, False, True, True])]
    batch = TokenBatch.from_sequences(rows, dtype=F64).with_logps(current=torch.tensor([-3.0, -1.0, -2.0], dtype=F64))
    objective = composed("world_model")
    assert objective.weights(batch).tolist() == pytest.approx([0.0, 0.5, 0.5])
    losses = [float(objective(batch, torch.tensor(logp, dtype=F64)).loss) for logp in ([-3.0, -1.0, -2.0], [-9.0, -1.0, -2.0], [-3.0, -5.0, -2.0])]
    assert losses[0] == losses[1] != losses[2]
