"""A baseline for every place of an answer, and weights of pairs aligned to sampled tokens: limits, sums, exact variances, hostile numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.advantage import GroupAdvantage
from posttrain.contrib.baseline import TokenBaseline, energy
from posttrain.contrib.preference import PairProbability
from posttrain.loss import advantage
from posttrain.loss.view import TokenView
from posttrain.records import Row, TokenBatch
from posttrain.testing.check import check_slicing, example_batch, objective_with
from tests.loss.cases import composed, make
from tests.loss.test_identities import policy_batch

F64 = torch.float64
BINARY = math.log(0.5)
"""Of two tokens alike: ``pi`` is 1/2 and so is ``sum_v pi_v**2``, so every token adds 1/2."""


def view_of(batch: TokenBatch, term: Any) -> TokenView:
    return objective_with(term).views(batch)["rollouts"]


def values(batch: TokenBatch, alone: str = "own", **more: Any) -> list[float]:
    term = TokenBaseline(alone=alone, **more)  # type: ignore[arg-type]
    return term.values(view_of(batch, term)).tolist()


def even(lengths: list[int], rewards: list[float]) -> TokenBatch:
    """Answers of one group whose tokens all add as much."""
    logps = [[BINARY] * n for n in lengths]
    return policy_batch(logps, rewards, collision=logps)


def by_place(batch: TokenBatch, term: TokenBaseline) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """``(W, A)`` of the answers at every place of every group, counted here one token at a time."""
    view = view_of(batch, term)
    found, gathered, nth = {}, {}, {}
    for t, (a, w) in enumerate(zip(term.values(view).tolist(), energy(view).tolist(), strict=True)):
        s = int(batch.seq[t])
        if view.on[t]:
            gathered[s], nth[s] = gathered.get(s, 0.0) + w, nth.get(s, 0) + 1
            found.setdefault((int(batch.group[s]), nth[s]), []).append((gathered[s], a))
    return found


# -- what a token adds ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("height", [0.0, 1.0, 30.0])
def test_what_a_token_adds_is_the_squared_gradient_of_its_log_prob_by_the_logits(height: float) -> None:
    torch.manual_seed(0)
    z = height * torch.randn(5, 7, dtype=F64).requires_grad_()
    logp = torch.log_softmax(z, 1)
    ids = torch.arange(5) % 7
    drawn = logp.gather(1, ids[:, None])[:, 0]
    (grad,) = torch.autograd.grad(drawn.sum(), z)
    batch = policy_batch([drawn.tolist()], [1.0], collision=[(logp.exp() ** 2).sum(1).log().tolist()])
    torch.testing.assert_close(energy(view_of(batch, TokenBaseline())), (grad**2).sum(1), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("p", [0.0, 1e-8, 0.3, 1.0 - 1e-7, 1.0])
def test_rounding_never_makes_it_negative(p: float) -> None:
    """In float32, where ``1 - 2 p + p**2`` falls below 0."""
    logp = [[math.log(p) if p else -math.inf]]
    batch = policy_batch(logp, [1.0], collision=[[2 * logp[0][0] - 1e-6]])
    view = view_of(batch.with_logps(**{k: v.float() for k, v in batch.logps.items()}), TokenBaseline())
    assert view.logp.dtype == torch.float32 and float(energy(view)) == pytest.approx((1 - p) ** 2, abs=1e-6) and float(energy(view)) >= 0


# -- limits -----------------------------------------------------------------------------------------------------------------------
def test_where_all_have_gathered_as_much_it_is_the_mean_of_the_group() -> None:
    """Equal lengths too: the baseline of the group's mean.  Unequal ones: at each place the mean of those that get there."""
    rewards = [1.0, 0.0, 0.25, 0.5]
    expected = GroupAdvantage(center="mean", scale="none").values(rewards)
    assert values(even([3] * 4, rewards)) == pytest.approx([a for a in expected for _ in range(3)])
    assert values(even([1, 2, 2, 3], rewards)) == pytest.approx([0.5625, -0.4375, -0.25, -0.1875, 0.0, 0.0625, 0.25, 0.0])


def test_a_number_by_hand() -> None:
    """Half against nine tenths of a certain token: the first token adds .5, or .01 + .01; the second one .5 more on each side."""
    first, second = [BINARY, BINARY], [math.log(0.9), BINARY]
    batch = policy_batch([first, second], [1.0, 0.0], collision=[first, [math.log(0.82), BINARY]])
    one, two = 0.5 / 0.52, 1.0 / 1.52
    assert values(batch) == pytest.approx([1 - one, 1 - two, -one, -two])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("inner", [advantage.Column(), advantage.ColumnMinusKL(0.3)])
def test_weighed_by_what_was_gathered_the_advantages_at_a_place_add_up_to_nothing(seed: int, inner: Any) -> None:
    batch, term = example_batch(seed), TokenBaseline(inner)
    places = by_place(batch, term)
    assert sum(len(found) > 1 for found in places.values()) >= 4
    for found in places.values():
        assert math.fsum(w * a for w, a in found) == pytest.approx(0.0, abs=1e-12)
    assert any(abs(math.fsum(a for _, a in found)) > 1e-3 for found in places.values()), "unweighed they do not"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_number_added_to_a_whole_group_changes_nothing(seed: int) -> None:
    data = make(seed)
    batch, objective = data.batch(), composed("otb")
    reward = batch.replace(advantage=torch.randn(batch.num_sequences, dtype=F64, generator=torch.Generator().manual_seed(seed))[batch.seq])
    level = torch.where(batch.group >= 0, 3.0 * batch.group + 1.0, 0.0)[batch.seq]
    shifted = reward.replace(advantage=reward.advantage + level)
    torch.testing.assert_close(objective.weights(shifted), objective.weights(reward), rtol=1e-12, atol=1e-12)
    raw = composed("otb", ("streams.rollouts.advantage.alone=zero",))
    assert not torch.allclose(raw.weights(shifted), raw.weights(reward)), "where an answer is alone it is not compared"


def test_it_is_the_baseline_of_least_variance_of_the_gradient_by_the_logits() -> None:
    """Actions of probability 1/2, 1/4, 1/8, 1/8, each as often in the group as it is probable: the variance over the group is that of the distribution."""
    p, reward = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=F64), torch.tensor([0.0, 1.0, 0.3, 0.9], dtype=F64)
    actions = torch.repeat_interleave(torch.arange(4), (8 * p).long())
    batch = policy_batch([[float(p[a].log())] for a in actions], reward[actions].tolist(), collision=[[float((p**2).sum().log())]] * 8)
    baseline = float(reward[actions[0]]) - values(batch)[0]

    def variance(b: float) -> float:
        grads = (reward[actions] - b)[:, None] * (torch.eye(4, dtype=F64)[actions] - p)
        return float(((grads - grads.mean(0)) ** 2).sum(1).mean())

    mean = float(reward[actions].mean())
    assert abs(baseline - mean) > 0.01
    assert variance(baseline) < variance(mean) - 1e-3
    assert variance(baseline) <= min(variance(baseline + x) for x in (-1e-3, 1e-3, -0.1, 0.1))


# -- lengths, masks, slices ---------------------------------------------------------------------------------------------------------
def test_behind_the_end_of_an_answer_it_does_not_count() -> None:
    """The first of two answers ends: the other is alone, and compared with itself or with nothing."""
    batch = even([1, 3], [1.0, 0.0])
    assert values(batch) == pytest.approx([0.5, -0.5, 0.0, 0.0])
    batch = even([3, 1], [1.0, 0.0])
    assert values(batch) == pytest.approx([0.5, 0.0, 0.0, -0.5])
    assert values(batch, "zero") == pytest.approx([0.5, 1.0, 1.0, -0.5])
    term = TokenBaseline()
    assert term.metrics(view_of(batch, term)) == {"alone": (2.0, 4.0)}


@pytest.mark.parametrize(("alone", "expected"), [("own", 0.0), ("zero", 0.7)])
def test_a_group_of_one_is_alone_everywhere(alone: str, expected: float) -> None:
    assert values(even([2], [0.7]), alone) == [expected, expected]


def test_tokens_that_are_not_learnt_take_no_place() -> None:
    """A tool's output in between, a token that is masked: the same advantages on the same tokens."""
    plain = policy_batch([[-0.3, -1.0], [-0.7, -2.0]], [1.0, 0.0], collision=[[-0.2, -0.9], [-0.6, -1.5]])

    def row(ids: int, sources: list[str], logp: list[float], collision: list[float], reward: float, trainable: list[bool]) -> Row:
        return Row(ids=[1] * ids, sources=sources, logps={"current": logp, "collision": collision}, advantage=reward, group="g", trainable=trainable)

    holes = TokenBatch.from_sequences(
        [
            row(4, ["prompt", "policy", "tool", "policy"], [0, -0.3, -0.1, -1.0], [0, -0.2, -0.1, -0.9], 1.0, [False, True, False, True]),
            row(4, ["prompt", "policy", "policy", "policy"], [0, -0.4, -0.7, -2.0], [0, -0.1, -0.6, -1.5], 0.0, [False, False, True, True]),
        ],
        dtype=F64,
        fresh=False,
    )
    on = view_of(holes, TokenBaseline()).on
    assert torch.tensor(values(holes), dtype=F64)[on].tolist() == pytest.approx(values(plain))


@pytest.mark.parametrize("alone", ["own", "zero"])
def test_the_gradient_is_the_same_wherever_a_group_is_cut(alone: str) -> None:
    batch, objective = make(3).batch(), composed("otb", (f"streams.rollouts.advantage.alone={alone}",))
    batch = batch.replace(totals=objective.totals(batch))
    assert objective.needs.keep_whole == "group" and "collision" in objective.needs.references
    check_slicing(objective, batch)
    check_slicing(objective, batch, [[i] for i in range(batch.num_sequences)])
    cut = torch.cat([objective.weights(batch.take([i])) for i in range(batch.num_sequences)])
    assert not torch.allclose(cut, objective.weights(batch)), "without the whole group it is another baseline"


# -- hostile numbers ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_certain_tokens_gather_nothing_and_the_plain_mean_stands_in(dtype: torch.dtype) -> None:
    batch = policy_batch([[0.0, BINARY], [0.0, 0.0]], [1.0, 0.0], collision=[[0.0, BINARY], [0.0, 0.0]])
    batch = batch.with_logps(**{k: v.to(dtype) for k, v in batch.logps.items()})
    assert values(batch) == [0.5, 0.0, -0.5, -1.0], "then all of the weight is on the answer that was not certain"


@pytest.mark.parametrize("reward", [0.0, 0.7, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_rewards_give_exactly_nothing(reward: float, dtype: torch.dtype) -> None:
    batch = example_batch(1, dtype=dtype)
    assert not any(values(batch.replace(advantage=torch.full_like(batch.advantage, reward))))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("logp", [100.0, -100.0, -math.inf, 0.0])
def test_extreme_log_probs_leave_a_baseline_between_the_returns(dtype: torch.dtype, logp: float) -> None:
    batch = policy_batch([[logp, -1.0], [-1.0, logp]], [1.0, 0.0], collision=[[-100.0, -0.5], [-0.5, 0.0]])
    found = values(batch.with_logps(**{k: v.to(dtype) for k, v in batch.logps.items()}))
    assert all(0 <= a <= 1 for a in found[:2]) and all(-1 <= a <= 0 for a in found[2:])


def test_the_same_answer_twice_in_a_group() -> None:
    assert values(even([2, 2], [0.3, 0.3])) == [0.0] * 4


def test_without_tokens_there_is_nothing_to_compare() -> None:
    batch, term = example_batch(2), TokenBaseline()
    none = batch.replace(trainable=torch.zeros_like(batch.trainable))
    assert not any(values(none)) and term.metrics(view_of(none, term)) == {"alone": (0.0, 0.0)}
    assert objective_with(term).weights(none).abs().sum() == 0


def test_what_is_refused() -> None:
    batch = even([1, 1], [1.0, 0.0])
    with pytest.raises(ValueError, match="is in none"):
        values(batch.replace(group=torch.tensor([0, -1])))
    with pytest.raises(ValueError, match="needs the log-prob column 'collision'"):
        values(batch.replace(logps={"current": batch.logps["current"]}))
    with pytest.raises(ValueError, match="alone='nobody'"):
        TokenBaseline(alone="nobody")  # type: ignore[arg-type]
    for wrong in ({"alignment": "greedy"}, {"limit": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PairProbability(**wrong)  # type: ignore[arg-type]


def test_running_sums_stay_inside_the_sequence_and_mirror_those_to_come() -> None:
    view = view_of(example_batch(4), TokenBaseline())
    x = torch.randn(len(view.logp), dtype=F64, generator=torch.Generator().manual_seed(0))
    here = view.running(x) + view.discounted(x) - view.select(x)
    torch.testing.assert_close(view.select(here), view.select(view.spread(view.seq_sum(x))), rtol=0, atol=1e-12)
    last: dict[int, float] = {}
    for t, value in enumerate(view.running(x).tolist()):
        s = int(view.batch.seq[t])
        last[s] = last.get(s, 0.0) + (float(x[t]) if view.on[t] else 0.0)
        assert value == pytest.approx(last[s], abs=1e-12)


# -- weights of pairs, aligned ------------------------------------------------------------------------------------------------------
def pair_weight(term: PairProbability, logps: tuple[list[float], list[float]], collision: tuple[list[float], list[float]]) -> Tensor:
    rows = [
        Row(
            ids=[1] * (len(logp) + 1),
            sources=["prompt"] + ["policy"] * len(logp),
            logps={"current": [0.0, *logp], "collision": [0.0, *both]},
            pair="p",
            side=side,  # type: ignore[arg-type]
        )
        for side, logp, both in zip(("chosen", "rejected"), logps, collision, strict=True)
    ]
    batch = TokenBatch.from_sequences(rows, dtype=F64, fresh=False)
    found = torch.exp(term.log_factor(view_of(batch, term), batch.advantage))
    assert bool((found == found[0]).all())
    return found[0]


SAMPLED = PairProbability(alignment="sampled")


@pytest.mark.parametrize("size", [2, 50])
def test_pairs_of_uniform_distributions_weigh_one_whatever_their_size(size: int) -> None:
    logp = -math.log(size)
    pair = ([logp] * 3, [logp])
    assert float(pair_weight(SAMPLED, pair, pair)) == pytest.approx(1.0)
    assert float(pair_weight(PairProbability(), pair, pair)) == pytest.approx(size**-2)


def test_the_expected_weight_of_a_sampled_token_is_one() -> None:
    """``sum_v p_v (p_v / sum_u p_u**2) = 1``: what alignment is for."""
    p = torch.softmax(torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(0)), 0)
    both, certain = float((p**2).sum().log()), ([0.0], [0.0])
    each = [float(pair_weight(SAMPLED, ([float(p[v].log())], certain[1]), ([both], certain[1]))) for v in range(6)]
    assert math.fsum(float(p[v]) * each[v] for v in range(6)) == pytest.approx(1.0)
    assert max(each) > 1.0


def test_certain_tokens_weigh_alike_aligned_or_not_and_the_limit_holds() -> None:
    certain = ([0.0, 0.0], [0.0])
    assert float(pair_weight(SAMPLED, certain, certain)) == float(pair_weight(PairProbability(), certain, certain)) == 1.0
    likely, flat = ([-1.0], [-1.0]), ([-3.0], [-3.0])
    assert float(pair_weight(SAMPLED, likely, flat)) == pytest.approx(math.exp(4.0))
    assert float(pair_weight(PairProbability(1.0, "sampled", 1.0), likely, flat)) == 1.0
    assert float(pair_weight(PairProbability(0.5, "sampled", 5.0), likely, flat)) == pytest.approx(5.0)
    assert float(pair_weight(PairProbability(0.5, "sampled", 10.0), likely, flat)) == pytest.approx(math.exp(2.0))


def test_only_aligned_weights_ask_for_a_pass_over_the_vocabulary() -> None:
    assert "collision" not in composed("wpo").needs.references
    assert "collision" in composed("wpo", ("streams.pairs.masks.probability.alignment=sampled",)).needs.references
