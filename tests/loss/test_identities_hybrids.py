"""Identities of supervised fine-tuning, its mixtures with reinforcement learning, and distillation: limits, exact numbers, exact expectations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.advantage import Chain, Constant, Extremes, PositivePart, Reward
from posttrain.data.rows import to_rows
from posttrain.loss import Objective
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import Unsolved
from posttrain.mixture.schedule import OneMinus, WarmupCosine
from posttrain.records import Row, TokenBatch
from tests.loss.cases import CENTER, NORM, composed, make
from tests.loss.families.hybrids import mixed, positive
from tests.mixture.conftest import demo, group

F64 = torch.float64


def given(*answers: list[float], source: str = "demo", advantage: float = 1.0, fresh: bool = True, **logps: list[float]) -> TokenBatch:
    """One prompt token, then one token per current log-prob; columns of ``logps`` are those of the first answer."""
    rows = [
        Row(
            ids=[1] * (len(answer) + 1),
            sources=["prompt"] + [source] * len(answer),
            logps={"current": [0.0, *answer], **{k: [0.0, *v] for k, v in logps.items()}},
            advantage=advantage,
            group=0,
        )
        for answer in answers
    ]
    return TokenBatch.from_sequences(rows, dtype=F64, fresh=fresh)


def weight(loss: str, p: float, *overrides: str, advantage: float = 1.0) -> float:
    return float(composed(loss, overrides).weights(given([math.log(p)], advantage=advantage)))


# -- the supervised family -----------------------------------------------------------------------------------------------------------
def test_every_token_of_the_step_counts_the_same() -> None:
    """Answers of 3 and 9 tokens: 1/12 everywhere; a mean of means would give 1/6 and 1/18."""
    batch = given([-1.0] * 3, [-1.0] * 9)
    assert composed("sft").weights(batch).tolist() == pytest.approx([1 / 12] * 12)
    means = composed("sft", ("streams.demos.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenMean}",))
    assert means.weights(batch).tolist() == pytest.approx([1 / 6] * 3 + [1 / 18] * 9)


def test_a_prompt_alone_changes_nothing() -> None:
    batch = given([-1.0] * 3)
    rows = [Row(ids=[1] * 4, sources=["prompt"] + ["demo"] * 3), Row(ids=[1] * 5, sources=["prompt"] * 5)]
    both = TokenBatch.from_sequences(rows, dtype=F64).with_logps(current=torch.full((7,), -1.0, dtype=F64))
    assert composed("sft").weights(both)[:3].tolist() == composed("sft").weights(batch).tolist() == pytest.approx([1 / 3] * 3)
    assert not bool(composed("sft").weights(both)[3:].any())


SAME = {
    "dft is the power 1": ("dft", (), "probability_power", ("streams.demos.reference.a=1.0",)),
    "sft is the power 0": ("sft", (), "probability_power", ("streams.demos.reference.a=0.0",)),
    "an anchor of 0 leaves dft": ("dft", (), "asft", ("regularizers.kl=null",)),
    "an anchor of 0 leaves sft": ("sft", (), "sft_kl", ("regularizers.kl=null",)),
    "a band of all probabilities is none": (
        "dft",
        (),
        "dft",
        ("streams.demos.masks.band={_target_: posttrain.loss.mask.ProbabilityBand}", "streams.demos.aggregation.denominator=kept"),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_these_are_the_same(name: str) -> None:
    one, ones, other, others = SAME[name]
    batch = make(4).batch()
    torch.testing.assert_close(composed(one, ones).weights(batch), composed(other, others).weights(batch), rtol=1e-12, atol=0)


def test_the_power_tends_to_maximum_likelihood() -> None:
    batch = make(4).batch()
    near, limit = composed("probability_power", ("streams.demos.reference.a=1e-6",)).weights(batch), composed("sft").weights(batch)
    gap = float((near - limit).norm() / limit.norm())
    assert 1e-7 < gap < 1e-5


@pytest.mark.parametrize(("a", "expected"), [(0.0, 1.0), (0.5, 0.5477), (1.0, 0.3), (-1.0, 3.3333)])
def test_one_hot_divergences_land_on_the_family(a: float, expected: float) -> None:
    """Kullback-Leibler, squared Hellinger, total variation and Pearson, at p = 0.3."""
    bound = ("streams.demos.reference.most=10.0",) if a < 0 else ()
    assert weight("probability_power", 0.3, f"streams.demos.reference.a={a}", *bound) == pytest.approx(expected, rel=1e-4)


def test_tiny_probabilities() -> None:
    assert weight("probability_power", 1e-4) == pytest.approx(1e-40, rel=1e-9)
    capped = ("streams.demos.reference.a=-1.0", "streams.demos.reference.most=50.0")
    assert weight("probability_power", 1e-12, *capped) == pytest.approx(50.0)
    assert weight("dft", 0.2) == pytest.approx(0.2) and weight("sft", 0.2) == 1.0
    batch = given([-200.0, 0.0])
    assert composed("dft").weights(batch).tolist() == pytest.approx([0.0, 0.5], abs=1e-80)


def descend(loss: str, start: float, steps: int, lr: float, *overrides: str) -> tuple[float, float]:
    """A table of 50 answers whose labels are right with 0.8 and uniform noise otherwise; gradient descent on the exact expectation from p(right) =
    ``start``.  Returns p(right) and KL(base || pi)."""
    v, objective = 50, composed(loss, overrides)
    label = torch.full((v,), 0.2 / v, dtype=F64)
    label[0] += 0.8
    base = torch.full((v,), (1 - start) / (v - 1), dtype=F64).log()
    base[0] = math.log(start)
    batch = TokenBatch.from_sequences([Row(ids=[0, y], sources=["prompt", "demo"], weight=float(v * label[y])) for y in range(v)], dtype=F64)
    z = base.clone().requires_grad_()
    for _ in range(steps):
        row = torch.log_softmax(z, 0)
        columns = {c: (base.exp() * (base - row)).sum().expand(v) for c in objective.needs.columns}
        (grad,) = torch.autograd.grad(objective(batch, row, columns).loss, z)
        z = (z - lr * grad).detach().requires_grad_()
    row = torch.log_softmax(z, 0).detach()
    return float(row[0].exp()), float((base.exp() * (base - row)).sum())


def test_label_noise_is_copied_by_sft_and_overruled_by_dft_while_the_anchor_holds() -> None:
    right, kl = descend("sft", 0.6, 300, 4.0)
    assert (right, kl) == (pytest.approx(0.804, abs=1e-3), pytest.approx(0.105, abs=5e-3))
    assert descend("dft", 0.6, 20, 1.0)[0] == pytest.approx(0.930, abs=5e-3)
    right, kl = descend("dft", 0.6, 200, 1.0)
    assert (right, kl) == (pytest.approx(0.994, abs=1e-3), pytest.approx(1.35, abs=0.02))
    assert descend("dft", 0.001, 200, 1.0)[0] < 0.002 < descend("sft", 0.001, 200, 1.0)[0]
    assert descend("asft", 0.6, 300, 10.0) == (pytest.approx(0.953, abs=3e-3), pytest.approx(0.582, abs=5e-3))
    strong = descend("asft", 0.6, 300, 10.0, "regularizers.kl.coef=0.05")
    assert strong == (pytest.approx(0.976, abs=3e-3), pytest.approx(0.830, abs=5e-3))


# -- rejection sampling --------------------------------------------------------------------------------------------------------------
NO_KL = ("regularizers.kl=null",)


def test_the_ratio_is_1_on_a_fresh_batch() -> None:
    batch = make(2, positive).batch()
    batch = batch.replace(fresh=True, logps={k: v for k, v in batch.logps.items() if k != "old"})
    torch.testing.assert_close(composed("raft_plus_plus", NO_KL).weights(batch), composed("raft", NO_KL).weights(batch), rtol=0, atol=0)


def test_rejection_sampling_is_sft_on_the_good_ones_up_to_the_count() -> None:
    for keep, factor in ((True, 2 / 5), (False, 1.0)):
        estimator = Chain({"reward": Reward(), "positive": PositivePart(keep_zeros=keep)})
        rows = to_rows(estimator([group("a", 1.0, 0.0, 0.0), group("b", 0.0, 1.0)]))
        batch = TokenBatch.from_sequences(rows, dtype=F64)
        batch = batch.with_logps(current=torch.full((batch.num_tokens,), -1.0, dtype=F64))
        found = composed("raft", NO_KL).weights(batch)
        good = (batch.advantage > 0) & batch.trainable
        assert int(good.sum()) == 4 and found[good].tolist() == pytest.approx([factor / 4] * 4)
        assert not bool(found[~good].any())
    assert to_rows(estimator([group("c", 0.0, 0.0)])) == []


@pytest.mark.parametrize("k", [1, 2, 3])
def test_best_of_k_selects_by_the_order_statistic(k: int) -> None:
    """Five answers with distinct rewards: answer j is picked with probability F_j^K - F_(j-1)^K."""
    p = [0.1, 0.3, 0.15, 0.25, 0.2]
    pick = Chain({"one": Constant(unscored=False), "best": Extremes(best=1, worst=0)})
    chosen = [0.0] * 5
    for draw in itertools.product(range(5), repeat=k):
        rollouts = pick([group("q", *(0.2 * (j + 1) for j in draw))])[0].rollouts
        (winner,) = [j for j, r in zip(draw, rollouts, strict=True) if r.advantage == 1.0]
        chosen[winner] += math.prod(p[j] for j in draw)
    cumulative = [0.0, *itertools.accumulate(p)]
    assert chosen == pytest.approx([b**k - a**k for a, b in itertools.pairwise(cumulative)])
    assert sum(chosen) == pytest.approx(1.0)


# -- mixtures ------------------------------------------------------------------------------------------------------------------------
def test_a_dead_group_may_stay_or_go_under_a_constant_but_not_under_a_mean() -> None:
    items = [group("solved", 1.0, 0.0, 0.0, 0.0), group("dead", 0.0, 0.0, 0.0, 0.0)]
    demos = Demos([demo("dead")])

    def learnt(rollouts: str, *overrides: str) -> dict[str, float]:
        rows = to_rows(Unsolved(0, rollouts)(CENTER(items), demos, 0, 0.0))
        batch = TokenBatch.from_sequences(rows, dtype=F64)
        batch = batch.with_logps(current=torch.full((batch.num_tokens,), -1.0, dtype=F64))
        objective = composed("hpt", ("regularizers.entropy=null", *overrides))
        return dict(zip((batch.sample_ids[int(s)] for s in batch.seq), objective.weights(batch).tolist(), strict=True))

    keep, drop = learnt("keep"), learnt("drop")
    assert keep["solved/0"] == drop["solved/0"] == pytest.approx(0.75 / 8192) and keep["dead"] == drop["dead"] == pytest.approx(1 / 3)
    path = "streams.rollouts.aggregation"
    mean = (f"~loss.{path}.length", f"~loss.{path}.per", f"{path}._target_=posttrain.loss.aggregate.TokenMean")
    assert learnt("keep", *mean)["solved/0"] == pytest.approx(learnt("drop", *mean)["solved/0"] / 2)


SATURATING = ("regularizers.entropy=null", "streams.demos.aggregation.length=1")


@pytest.mark.parametrize("p", [1.0, 0.5, 0.1, 0.03, 0.01, 1e-3, 1e-8])
def test_the_saturating_factor(p: float) -> None:
    factor = weight("luffy", p, *SATURATING)
    assert factor == pytest.approx(0.1 * p / (p + 0.1) ** 2)
    assert factor <= 0.25 + 1e-12
    if p >= 0.01:
        assert factor == pytest.approx(weight("luffy", 0.1 * 0.1 / p, *SATURATING)), "symmetric about gamma"


def test_the_saturating_factor_has_its_exact_numbers() -> None:
    assert weight("luffy", 1.0, *SATURATING) == pytest.approx(0.08264, abs=1e-5) == weight("luffy", 0.01, *SATURATING)
    assert weight("luffy", 0.1, *SATURATING, advantage=0.875) == pytest.approx(0.875 / 4)
    wide = (*SATURATING, "streams.demos.reference.gamma=1e8")
    assert 1e8 * weight("luffy", 0.3, *wide) == pytest.approx(weight("dft", 0.3))
    detached = (*SATURATING, "streams.demos.reference.detached=true")
    assert weight("luffy", 0.3, *detached) == pytest.approx(0.75)


def test_a_rare_token_is_learnt_at_three_rates() -> None:
    """Start probability 0.001: plain importance weighting 0.001, saturating ten times that, maximum likelihood a thousand times."""
    plain, saturating, likelihood = weight("dft", 1e-3), weight("luffy", 1e-3, *SATURATING), weight("sft", 1e-3)
    assert saturating / plain == pytest.approx(9.8, abs=0.1) and likelihood / plain == pytest.approx(1000.0)


MU = WarmupCosine(peak=0.9, valley=0.05, warmup=0, decay=200, steps=500)
EXAMPLE = WarmupCosine(peak=0.5, valley=0.02, warmup=200, decay=400, steps=1000)


@pytest.mark.parametrize(
    ("schedule", "steps", "values"),
    [(MU, (0, 50, 100, 200, 500), (0.9, 0.7755, 0.475, 0.05, 0.05)), (EXAMPLE, (0, 100, 200, 400, 600), (0.0, 0.25, 0.5, 0.26, 0.02))],
)
def test_published_schedules(schedule: WarmupCosine, steps: tuple[int, ...], values: tuple[float, ...]) -> None:
    assert [schedule(s / schedule.steps) for s in steps] == pytest.approx(list(values), abs=1e-4)
    assert [OneMinus(schedule)(s / schedule.steps) for s in steps] == pytest.approx([1 - v for v in values], abs=1e-4)
    assert OneMinus(0.3)(0.5) == 0.7


def test_the_blend_is_reinforcement_learning_at_0_and_imitation_at_1() -> None:
    batch = mixed(3, NORM).batch()
    zero, one = (composed("chord_phi", (f"streams.demos.coef={mu}",)).weights(batch) for mu in (0.0, 1.0))
    mean = ("streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.TokenMean}",)
    torch.testing.assert_close(zero, composed("grpo", mean).weights(batch), rtol=1e-12, atol=0)
    demos = batch.source == 2
    assert not bool(one[~demos].any()) and bool(one[demos].any())


@pytest.mark.parametrize("p", [1.0, 0.75, 0.5, 0.1, 1e-6])
def test_phi_is_the_slope_of_p_less_half_its_square(p: float) -> None:
    x = torch.tensor(math.log(p), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(x.exp() - x.exp() ** 2 / 2, x)
    assert weight("chord_phi", p, "streams.demos.coef=1.0") == pytest.approx(float(slope), abs=1e-15)
    assert weight("chord_phi", p, "streams.demos.coef=1.0") <= 0.25


# -- distillation --------------------------------------------------------------------------------------------------------------------
def expectation(objective: Objective, z: Tensor, teacher: Tensor) -> Tensor:
    """The exact mean over own samples of the gradient of ``J`` in the logits of an 8-way policy."""
    logp = torch.log_softmax(z, 0)
    total = torch.zeros_like(z)
    for y in range(len(z)):
        batch = given([float(logp[y])], source="policy", advantage=0.0, teacher=[float(teacher[y])])
        total += logp[y].exp() * float(objective.weights(batch)) * (torch.eye(len(z), dtype=F64)[y] - logp.exp())
    return total


def of_kl(z: Tensor, teacher: Tensor, reverse: bool) -> Tensor:
    leaf = z.clone().requires_grad_()
    row = torch.log_softmax(leaf, 0)
    value = (row.exp() * (row - teacher)).sum() if reverse else (teacher.exp() * (teacher - row)).sum()
    return torch.autograd.grad(-value, leaf)[0]


def with_estimator(estimator: str) -> Objective:
    kl = f"regularizers.kl={{_target_: posttrain.loss.regularizer.KL, estimator: {estimator}, to: teacher, coef: 1.0, force: true}}"
    return composed("reinforce", (kl,))


EXPECTED: dict[str, tuple[Callable[[], Objective], Callable[[Tensor, Tensor], Tensor]]] = {
    "sampled form: reverse KL": (lambda: composed("on_policy_distillation"), lambda z, t: of_kl(z, t, True)),
    "k2: reverse KL": (lambda: with_estimator("k2"), lambda z, t: of_kl(z, t, True)),
    "k3: forward KL": (lambda: with_estimator("k3"), lambda z, t: of_kl(z, t, False)),
    "k1: nothing": (lambda: with_estimator("k1"), lambda z, t: torch.zeros_like(z)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_exact_expectations_of_distillation(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(8, generator=draw, dtype=F64), torch.log_softmax(torch.randn(8, generator=draw, dtype=F64), 0)
    objective, expected = EXPECTED[name]
    torch.testing.assert_close(expectation(objective(), z, teacher), expected(z, teacher), rtol=1e-10, atol=1e-12)


def test_a_teacher_equal_to_the_student_teaches_nothing_on_any_sample() -> None:
    batch = given([-1.0, -2.5], source="policy", advantage=0.3, teacher=[-1.0, -2.5])
    for credit in ("own", "to_go", "sequence"):
        assert not bool(composed("on_policy_distillation", (f"streams.rollouts.advantage.credit={credit}",)).weights(batch).any())


@pytest.mark.parametrize(("credit", "exact"), [("own", False), ("to_go", True), ("sequence", True)])
def test_only_credit_for_later_tokens_gives_the_kl_of_whole_answers(credit: str, exact: bool) -> None:
    """A two-token policy over three symbols, enumerated."""
    draw = torch.Generator().manual_seed(1)
    first, second = torch.randn(3, generator=draw, dtype=F64), torch.randn(3, 3, generator=draw, dtype=F64)
    t1, t2 = (torch.log_softmax(torch.randn(*n, generator=draw, dtype=F64), -1) for n in ((3,), (3, 3)))
    leaves = [first.requires_grad_(), second.requires_grad_()]
    l1, l2 = torch.log_softmax(first, 0), torch.log_softmax(second, 1)
    joint = l1[:, None] + l2
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(-(joint.exp() * (joint - t1[:, None] - t2)).sum(), leaves, retain_graph=True)])
    objective = composed(
        "on_policy_distillation",
        (f"streams.rollouts.advantage.credit={credit}", "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenSum}"),
    )
    surrogate = torch.zeros((), dtype=F64)
    for a, b in itertools.product(range(3), repeat=2):
        pair = [float(l1[a]), float(l2[a, b])]
        w = objective.weights(given(pair, source="policy", teacher=[float(t1[a]), float(t2[a, b])]))
        surrogate = surrogate + joint[a, b].exp().detach() * (w[0] * l1[a] + w[1] * l2[a, b])
    found = torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, leaves)])
    gap = float((found - truth).norm() / truth.norm())
    assert gap < 1e-12 if exact else gap > 0.05


def test_an_impossible_token_is_bounded_by_the_limit_and_counted() -> None:
    batch = given([-1.0, -1.0], source="policy", teacher=[-300.0, -1.5])
    objective = composed("on_policy_distillation", ("streams.rollouts.advantage.limit=10.0",))
    weights, metrics = objective.weigh(batch)
    assert weights.tolist() == pytest.approx([-5.0, -0.25])
    assert metrics["rollouts/log_ratio_clamped"] == (1.0, 2.0)
    with pytest.raises(FloatingPointError, match="stream 'rollouts'"):
        composed("on_policy_distillation").weights(batch.with_logps(teacher=torch.tensor([-math.inf, -1.0], dtype=F64)))
