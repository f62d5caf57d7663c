"""Identities of SFT with weights of its own, of self-training, and of the mixtures that add to reinforcement learning."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.contrib.guided import AdvantageSaturating
from posttrain.loss import advantage
from posttrain.records import Row, TokenBatch
from posttrain.testing.check import objective_with
from tests.loss.cases import CENTER, NORM, composed
from tests.loss.families.hybrids import PREFIXES, TURNS, mixed
from tests.loss.test_identities_hybrids import F64, given

TOKEN_MEAN = "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.TokenMean}"
SEQUENCE_MEAN = "streams.demos.aggregation={_target_: posttrain.loss.aggregate.SequenceMeanTokenMean}"


def answers(*losses: list[float], groups: list[object] | None = None, **row: Any) -> TokenBatch:
    """Demonstrations with these losses per token, named 0, 1, 2, ..."""
    rows = [
        Row(
            ids=[1] * (len(n) + 1),
            sources=["prompt"] + ["demo"] * len(n),
            logps={"current": [0.0, *(-x for x in n)]},
            sample_id=str(i),
            group=groups[i] if groups else None,
            **{k: v[i] for k, v in row.items()},
        )
        for i, n in enumerate(losses)
    ]
    return TokenBatch.from_sequences(rows, dtype=F64)


def per_answer(loss: str, batch: TokenBatch, *overrides: str) -> list[float]:
    weights = composed(loss, overrides).weights(batch)
    return [float(weights[batch.seq == i].sum()) for i in range(batch.num_sequences)]


# -- proximal ------------------------------------------------------------------------------------------------------------------------
def test_proximal_sft_begins_as_sft() -> None:
    batch = given([-1.0, -0.2], [-3.0])
    assert torch.equal(composed("psft").weights(batch), composed("sft").weights(batch))


@pytest.mark.parametrize(("r", "expected"), [(0.1, 0.1), (1.0, 1.0), (1.279, 1.279), (1.281, 0.0), (50.0, 0.0), (math.exp(100), 0.0)])
def test_a_token_leaves_when_it_has_risen_by_the_cap(r: float, expected: float) -> None:
    batch = given([-200.0 + math.log(r)], old=[-200.0], fresh=False)
    assert float(composed("psft").weights(batch)) == pytest.approx(expected)
    lower = ("streams.demos.masks.clip.low=0.2",)
    assert float(composed("psft", lower).weights(batch)) == pytest.approx(expected), "the lower clip cannot act on a positive advantage"


# -- by the log-ratio to the start ------------------------------------------------------------------------------------------------------
def moved(delta: float, tokens: int = 3) -> TokenBatch:
    return given([-1.0] * tokens, base=[-1.0 - delta] * tokens)


def test_an_answer_that_has_not_moved_counts_half_of_beta() -> None:
    sft = composed("sft", (SEQUENCE_MEAN,)).weights(moved(0.0))
    torch.testing.assert_close(composed("minor_sft").weights(moved(0.0)), 0.05 * sft, rtol=1e-14, atol=0)
    torch.testing.assert_close(composed("minor_sft", ("streams.demos.advantage.scale=20.0",)).weights(moved(0.0)), sft)


def test_it_counts_less_and_less_and_never_nan() -> None:
    found = [float(composed("minor_sft").weights(moved(d))[0]) for d in (-1e4, -5.0, 0.0, 5.0, 1e4)]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(0.1 / 3) and found[-1] == pytest.approx(0.0, abs=1e-300)
    near = composed("minor_sft", ("streams.demos.advantage.beta=1e-6", "streams.demos.advantage.scale=2e6")).weights(moved(3.0))
    torch.testing.assert_close(near, composed("sft", (SEQUENCE_MEAN,)).weights(moved(3.0)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "total", "expected"),
    [("identity", 33.0, 0.05), ("pearson", 40.0, 0.0), ("pearson", 60.0, -0.025), ("hellinger", 20.0, 0.0125)],
)
def test_slopes_of_divergences(shape: str, total: float, expected: float) -> None:
    """At beta = 0.05: total variation is constant, Pearson crosses 0 at beta * Delta = 2, Hellinger falls as 1 / (1 + x)^2."""
    found = composed("f_divergence_sft", (f"streams.demos.advantage.shape={shape}",)).weights(moved(total / 2, tokens=2))
    assert found.tolist() == pytest.approx([expected] * 2, abs=1e-15)


def test_the_pole_of_hellinger_is_an_error_with_the_sample() -> None:
    with pytest.raises(FloatingPointError, match=r"pole at beta s = -1, and sample '0' is at -1\.5"):
        composed("f_divergence_sft", ("streams.demos.advantage.shape=hellinger",)).weights(moved(-10.0))


# -- by class, by loss, by what is to come ----------------------------------------------------------------------------------------------
def test_only_the_proportion_of_class_weights_matters() -> None:
    losses = [[1.0, 2.0], [0.5], [3.0, 1.0, 1.0]]
    some, scaled = (per_answer("openchat", answers(*losses, weight=[c * w for w in (1.0, 0.1, 0.1)])) for c in (1.0, 7.0))
    assert some == pytest.approx([1 / 1.2, 0.1 / 1.2, 0.1 / 1.2]) and scaled == pytest.approx(some)
    assert per_answer("openchat", answers(*losses)) == pytest.approx([1 / 3] * 3)
    without = per_answer("openchat", answers(*losses, weight=[1.0, 0.0, 1.0]))
    assert without == pytest.approx([0.5, 0.0, 0.5])
    assert not any(per_answer("openchat", answers(*losses, weight=[0.0, 0.0, 0.0])))


SHARES = {
    "linupper": (0.0421, 0.0860, 0.3589, 0.5130),
    "quadratic": (0.0589, 0.2004, 0.6818, 0.0589),
    "extremes": (0.3836, 0.1878, 0.0450, 0.3836),
}


@pytest.mark.parametrize("shape", SHARES)
def test_published_shares_of_losses(shape: str) -> None:
    batch = answers([0.5, 0.5], [1.0], [2.0, 1.0, 3.0], [4.0])
    path = "streams.demos.advantage"
    found = per_answer("loss_reweighting", batch, f"{path}.shape={shape}", f"{path}.r=0.4")
    assert found == pytest.approx(SHARES[shape], abs=5e-5) and sum(found) == pytest.approx(1.0)
    assert per_answer("loss_reweighting", batch, f"{path}.shape={shape}", f"{path}.r=inf") == pytest.approx([0.25] * 4)
    assert per_answer("loss_reweighting", answers([2.0], [2.0]), f"{path}.shape={shape}") == pytest.approx([0.5, 0.5])


def test_an_infinite_loss_has_no_range() -> None:
    with pytest.raises(FloatingPointError, match="no range of losses"):
        composed("loss_reweighting").weights(answers([1.0], [math.inf]))


def test_published_weights_of_losses_to_come() -> None:
    batch = answers([-math.log(x) for x in (0.5, 0.2, 0.9, 0.05)])
    detached = ("streams.demos.advantage.detach=true",)
    assert composed("ift").weights(batch).tolist() == pytest.approx([0.2808, 0.2723, 0.0991, 0.2182], abs=5e-5)
    assert composed("ift", detached).weights(batch).tolist() == pytest.approx([0.3205, 0.2895, 0.1936, 0.1965], abs=5e-5)
    assert composed("ift", detached).weights(answers([0.0, 0.0])).tolist() == [0.5, 0.5]
    assert composed("ift").weights(answers([3.0])).tolist() == pytest.approx([1.0])


# -- several right answers --------------------------------------------------------------------------------------------------------------
def test_shares_of_several_answers() -> None:
    two = answers([1.0, 1.0], [0.5], groups=["q", "q"])
    beta = "streams.targets.advantage.beta"
    shares = [per_answer("multi_target", two, f"{beta}={b}") for b in (1e-9, 0.25, 1.0)]
    assert shares[0] == pytest.approx([2 * 0.5, 0.5]) and shares[2][1] == pytest.approx(1 / (1 + math.exp(-1.5)))
    twice = answers([1.0, 1.0], [0.5], [0.5], groups=["q", "q", "q"])
    split = per_answer("multi_target", twice, f"{beta}=1e-9")
    assert split[1] == split[2] == pytest.approx(1 / 3)
    copied = per_answer("multi_target", answers([0.5], [0.5], groups=["q", "q"]), f"{beta}=1.0")
    assert copied == pytest.approx([0.5, 0.5]), "a copy takes half of its twin's share"
    alone = answers([1.0, 1.0], [2.0], groups=["a", "b"])
    assert composed("multi_target").weights(alone).tolist() == pytest.approx([0.5] * 3), "one answer per prompt is maximum likelihood"
    huge = answers([5000.0], [5001.0], groups=["q", "q"])
    assert per_answer("multi_target", huge, f"{beta}=1.0") == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_long_answers_need_not_lose_to_short_ones() -> None:
    """By sums an answer of twice the length at the same likelihood per token has almost no share; by means both have half."""
    batch = answers([2.0] * 10, [2.0] * 20, groups=["q", "q"])
    by_mean = ("streams.targets.advantage.length_norm=true", "streams.targets.aggregation._target_=posttrain.loss.aggregate.GroupSumTokenMean")
    sums = per_answer("multi_target", batch, "streams.targets.advantage.beta=1.0")
    assert sums[1] / sums[0] == pytest.approx(2 * math.exp(-20.0))
    assert per_answer("multi_target", batch, *by_mean) == pytest.approx([0.5, 0.5])


# -- multipliers ------------------------------------------------------------------------------------------------------------------------
def run_duals(loss: float, steps: int, memory: dict[str, float] | None = None, **settings: float) -> tuple[list[float], dict[str, float]]:
    objective = composed("feasible", tuple(f"streams.demos.advantage.{k}={v}" for k, v in settings.items()))
    memory, seen = memory or {}, []
    for _ in range(steps):
        batch = answers([loss, loss]).replace(memory=memory)
        seen.append(2 * float(objective.weights(batch)[0]))
        memory = objective.remember(batch)
    return seen, memory


def test_a_multiplier_settles_at_its_fixed_point() -> None:
    seen, _ = run_duals(2.0, 60, eps=0.5, alpha=2.0)
    assert seen[0] == 1.0 and seen[1] == pytest.approx(1.0 + 1.5 - 0.5) and seen[-1] == pytest.approx(3.0)
    assert run_duals(0.1, 10, eps=0.5)[0][-1] == 0.0
    endless = run_duals(2.0, 10, eps=0.5, alpha=math.inf)[0]
    assert endless == pytest.approx([1.0 + 1.5 * k for k in range(10)])


def test_multipliers_belong_to_their_samples_and_survive_a_resume() -> None:
    _, memory = run_duals(2.0, 3, eps=0.5)
    assert run_duals(2.0, 2, memory, eps=0.5)[0] == pytest.approx(run_duals(2.0, 5, eps=0.5)[0][3:])
    objective = composed("feasible")
    other = answers([1.0], [1.0]).replace(memory={"demos/DualWeight.1": 0.25})
    assert per_answer("feasible", other) == pytest.approx([0.5, 0.125]) and objective.remembers


# -- self-training ----------------------------------------------------------------------------------------------------------------------
def update(z: Tensor, sampled: Tensor, temperature: float) -> Tensor:
    """The expected change of the logits when tokens drawn from ``sampled`` are imitated at a training temperature."""
    objective, total = composed("osft"), torch.zeros_like(z)
    for y, q in enumerate(sampled.tolist()):
        leaf = z.clone().requires_grad_()
        logp = torch.log_softmax(leaf / temperature, 0)
        out = objective(given([0.0], source="policy"), logp[y : y + 1])
        total -= q * torch.autograd.grad(out.loss, leaf)[0]
    return total


def test_self_training_moves_only_where_sampler_and_learner_differ() -> None:
    z = torch.tensor([0.2, 1.0, -0.5, 0.1], dtype=F64)
    for s, t in itertools.product((0.6, 1.0, 1.4), repeat=2):
        expected = (torch.softmax(z / s, 0) - torch.softmax(z / t, 0)) / t
        torch.testing.assert_close(update(z, torch.softmax(z / s, 0), t), expected, rtol=1e-10, atol=1e-14)
    best = int(z.argmax())
    assert float(update(z, torch.softmax(z / 0.6, 0), 1.0)[best]) > 0 > float(update(z, torch.softmax(z / 1.4, 0), 1.0)[best])
    nucleus = torch.softmax(z, 0)
    nucleus[z.argmin()] = 0
    assert float(update(z, nucleus / nucleus.sum(), 1.0).norm()) > 0.01, "top-p alone breaks the balance"


@pytest.mark.parametrize("start", [(0.45, 0.30, 0.25), (0.30, 0.45, 0.25)])
def test_minimising_entropy_amplifies_the_mode_whatever_it_is(start: tuple[float, ...]) -> None:
    z, objective = torch.tensor(start, dtype=F64).log(), composed("entropy_min")
    batch = given([0.0], source="policy")
    for _ in range(40):
        leaf = z.clone().requires_grad_()
        row = torch.log_softmax(leaf, 0)
        entropy = -(row.exp() * row).sum()
        (grad,) = torch.autograd.grad(objective(batch, row[:1], {"entropy": entropy[None]}).loss, leaf)
        exact = (row.exp() * row.detach())[:, None] * (torch.eye(3, dtype=F64) - row.exp())
        torch.testing.assert_close(-grad, exact.sum(0).detach(), rtol=1e-9, atol=1e-14)  # the policy gradient with A = sg(log p)
        z = z - grad
    assert float(torch.softmax(z, 0).max()) == pytest.approx(0.996, abs=1e-3) and int(z.argmax()) == start.index(0.45)


@pytest.mark.parametrize("beta", [-0.1, 0.0, 0.5])
def test_one_token_rollouts_are_dft_in_expectation(beta: float) -> None:
    """Draws from the policy itself, paid 1 for the label and beta otherwise: (1 - beta) p (onehot - p) for every beta."""
    p = torch.softmax(torch.tensor([0.3, -1.0, 0.8], dtype=F64), 0)
    for label in range(3):
        paid = torch.full((3,), beta, dtype=F64)
        paid[label] = 1.0
        drawn = sum(p[a] * paid[a] * (torch.eye(3, dtype=F64)[a] - p) for a in range(3))
        w = float(composed("otr", (f"streams.demos.advantage.value={1 - beta}",)).weights(given([float(p[label].log())])))
        torch.testing.assert_close(w * (torch.eye(3, dtype=F64)[label] - p), drawn, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("temperature", "same"), [(1.0, True), (1.3, False)])
def test_drawn_tokens_come_to_the_closed_form_at_temperature_1_alone(temperature: float, same: bool) -> None:
    """K draws at a position, paid 1 for the label and -0.1 otherwise: their mean tends to the closed form, and K times its variance stays; at another
    temperature the direction differs and the part of beta does not cancel."""
    draw, label, beta = torch.Generator().manual_seed(0), 1, -0.1
    z = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=F64)
    p, q, eye = torch.softmax(z, 0), torch.softmax(z / temperature, 0), torch.eye(4, dtype=F64)
    closed = float(composed("otr").weights(given([float(p[label].log())]))) * (eye[label] - p)
    spread = []
    for k in (4, 64):
        tokens = torch.multinomial(q, 2000 * k, replacement=True, generator=draw).view(2000, k)
        paid = torch.where(tokens == label, 1.0, beta).to(F64)
        estimates = (paid[..., None] * (eye[tokens] - p)).mean(1)
        spread.append(k * float(estimates.var(0).sum()))
        near = float((estimates.mean(0) - closed).norm() / closed.norm())
        assert near < 0.1 if same else near > 0.2
    assert spread[0] == pytest.approx(spread[1], rel=0.1)
    exact = sum(q[a] * (1.0 if a == label else beta) * (eye[a] - p) for a in range(4))
    zero = sum(q[a] * (eye[a] - p) for a in range(4))
    assert (float((exact - closed).norm()) < 1e-12) is same and (float(zero.norm()) < 1e-12) is same


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_the_best_of_one_is_self_training(p: float) -> None:
    """Every answer is its group's best: at equal temperatures the expected update is 0, whatever the rewards."""
    row = torch.tensor([math.log(p), math.log1p(-p)], dtype=F64)
    weights = [float(composed("raft", ("regularizers.kl=null",)).weights(given([float(x)], source="policy", advantage=1.0))) for x in row]
    assert weights == [float(composed("osft").weights(given([float(x)], source="policy"))) for x in row] == [1.0, 1.0]
    drift = sum(row[y].exp() * weights[y] * (torch.eye(2, dtype=F64)[y] - row.exp()) for y in range(2))
    assert float(drift.norm()) < 1e-15


# -- by outcome and certainty -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("h", "demo", "right"), [(0.0, 0.5, 0.1), (1.0, 0.1839, 0.2718), (2.0, 0.0677, 0.7389)])
def test_weights_by_entropy(h: float, demo: float, right: float) -> None:
    entropy = {"entropy": [2 * h, 0.0]}  # the mean counts
    only = ("streams.members=null", "regularizers.entropy=null")
    assert composed("srft", only).weights(given([-1.0, -1.0], **entropy)).tolist() == pytest.approx([demo / 2] * 2, abs=5e-5)
    rows = [
        Row(
            ids=[1, 2, 3],
            sources=["prompt", "policy", "policy"],
            rewards={"reward": reward},
            logps={"current": [0, -1, -1], "entropy": [0, 2 * h, 0.0]},
        )
        for reward in (1.0, 0.0)
    ]
    found = composed("srft", only).weights(TokenBatch.from_sequences(rows, dtype=F64)) * 8192
    assert found.tolist() == pytest.approx([right] * 2 + [-1.0] * 2, abs=5e-5)


def test_an_answer_without_a_verdict_is_neither_right_nor_wrong() -> None:
    with pytest.raises(ValueError, match="needs the reward 'reward'"):
        composed("srft", ("regularizers.entropy=null",)).weights(given([-1.0], source="policy", entropy=[1.0]))


@pytest.mark.parametrize(("first", "second", "paid"), [(0, 0, 0), (0, 1, 11), (1, 0, -10), (1, 1, 1)])
def test_the_second_attempt_is_paid_for_the_improvement(first: int, second: int, paid: int) -> None:
    row = Row(
        ids=[1, 2, 3],
        sources=["prompt", "policy", "policy"],
        turn=[0, 0, 1],
        logps={"current": [0, -1, -1]},
        rewards={"turn_1": first, "turn_2": second},
    )
    batch = TokenBatch.from_sequences([row], dtype=F64)
    assert composed("score", ("streams.turns.advantage.kl=[]",)).weights(batch).tolist() == pytest.approx([first, paid])
    late = batch.replace(turn=batch.turn + 1)
    with pytest.raises(ValueError, match="has a turn 2"):
        composed("score", ("streams.turns.advantage.kl=[]",)).weights(late)


def test_the_kl_of_a_turn_is_divided_by_its_length() -> None:
    batch = TURNS(1).batch()
    objective = composed("score", ("streams.turns.advantage.weights=[[0, 0], [0, 0]]", "streams.turns.advantage.kl=[1.0, 0.0]"))
    view = objective.views(batch)["turns"]
    values = objective.streams["turns"].advantage.values(view)
    d = (batch.logps["current"] - batch.logps["base"])[view.on]
    for i in range(batch.num_sequences):
        mine = (batch.seq == i)[view.on] & (batch.turn == 0)[view.on]
        if bool(mine.any()):
            assert values[view.on][mine].tolist() == pytest.approx([-float(d[mine].mean())] * int(mine.sum()))
    assert not bool(values[view.on & (batch.turn == 1)].any())


# -- added to reinforcement learning ------------------------------------------------------------------------------------------------------
def without(batch: TokenBatch, source: int) -> TokenBatch:
    keep = [i for i in range(batch.num_sequences) if not bool((batch.source[batch.seq == i] == source).any())]
    return batch.take(keep)


@pytest.mark.parametrize("loss", ["ahpo", "uft", "prefix_rft", "think_tuning"])
def test_without_help_it_is_plain_reinforcement_learning(loss: str) -> None:
    """No demonstration, hint, prefix or teacher's word in the step: the gradient is that of the clipped surrogate, and nothing is NaN."""
    batch = without(mixed(2, NORM).batch(), 2)
    quiet = ("regularizers.entropy=null", "regularizers.kl=null")
    found = composed(loss, quiet).weights(batch)
    dual = () if loss in ("ahpo", "uft") else ("streams.rollouts.masks.dual={_target_: posttrain.loss.mask.DualClip}",)
    plain = composed("grpo", (TOKEN_MEAN, *dual)).weights(batch)
    scale = int((batch.trainable & (batch.source == 1)).sum()) / 256 if loss == "prefix_rft" else 1.0
    torch.testing.assert_close(found, plain * scale, rtol=1e-12, atol=0)


def test_a_demonstration_shrinks_the_rollouts_of_a_common_normaliser() -> None:
    batch = mixed(2, NORM).batch()
    own, demos = (int((batch.trainable & (batch.source == s)).sum()) for s in (1, 2))
    alone, together = composed("ahpo").weights(without(batch, 2)), composed("ahpo").weights(batch)
    rollouts = batch.columns_of([i for i in range(batch.num_sequences) if not bool((batch.source[batch.seq == i] == 2).any())])
    torch.testing.assert_close(together[rollouts], alone * own / (own + demos), rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_most_uncertain_share_of_all_prefixes_is_learnt(share: float) -> None:
    batch = PREFIXES(3, NORM).batch()
    objective = composed("prefix_rft", (f"streams.prefixes.masks.certain.share={share}", "streams.prefixes.masks.clip=null"))
    on = objective.views(batch)["prefixes"].on
    certain = sorted(batch.logps["entropy"][on].tolist(), reverse=True)
    bound = certain[math.ceil(share * len(certain)) - 1]
    weights, metrics = objective.weigh(batch)
    dropped, tokens = metrics["prefixes/certain/masked"]
    assert tokens == len(certain) > 3 and tokens - dropped == sum(h >= bound for h in certain), "ties are kept"
    assert not bool(weights[on & (batch.logps["entropy"] < bound)].any())


def test_distillation_beside_rewards() -> None:
    batch = mixed(2, NORM).batch()
    path = "regularizers.kl.coef=0.0"
    torch.testing.assert_close(composed("kdrl", (path,)).weights(batch), composed("grpo", (TOKEN_MEAN,)).weights(batch), rtol=1e-12, atol=0)
    same = batch.with_logps(teacher=batch.logps["current"])
    torch.testing.assert_close(composed("kdrl").weights(same), composed("kdrl", (path,)).weights(same), rtol=1e-12, atol=0)
    difference = composed("kdrl").weights(batch) - composed("kdrl", (path,)).weights(batch)
    on = batch.trainable & (batch.source == 1)
    expected = 0.005 * (batch.logps["teacher"] - batch.logps["current"]) / int(on.sum())
    torch.testing.assert_close(difference[on], expected[on], rtol=1e-9, atol=1e-15)


WRONG_ONLY = (
    "regularizers.kl=null",
    "streams.distil={_target_: posttrain.loss.Stream, source: [policy], coef: 0.005, likelihood: {_target_: posttrain.loss.likelihood.Token}, "
    "reference: {_target_: posttrain.loss.reference.Current}, advantage: {_target_: posttrain.contrib.outcome.ByReward, "
    "right: {_target_: posttrain.loss.advantage.One, value: 0.0}, wrong: {_target_: posttrain.loss.advantage.LogRatio, num: teacher}}, "
    "aggregation: {_target_: posttrain.loss.aggregate.TokenMean}}",
)
"""What configs/loss/kdrl.yaml says of distilling from wrong answers only."""


def test_distillation_of_wrong_answers_only() -> None:
    batch = mixed(2, NORM).batch()
    off, everywhere, wrong = (composed("kdrl", o).weights(batch) for o in (("regularizers.kl.coef=0.0",), (), WRONG_ONLY))
    right = (batch.rewards["reward"] >= 1)[batch.seq]
    on = batch.trainable & (batch.source == 1)
    assert bool((on & right).any()) and bool((on & ~right).any())
    torch.testing.assert_close(wrong, torch.where(right, off, everywhere), rtol=1e-12, atol=1e-15)
    assert not torch.allclose(off[on], everywhere[on], rtol=1e-6)


@pytest.mark.parametrize("loss", ["hpt", "luffy", "relift"])
def test_without_a_demonstration_the_ratio_sum_is_that_of_centred_rewards(loss: str) -> None:
    """A gate that lets none through, an empty buffer: the rollouts' part alone, which is a constant-length surrogate without a clip."""
    batch = without(mixed(2, CENTER).batch(), 2)
    plain = ("streams.rollouts.masks.clip=null", "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.Constant, length: 8192, per: step}")
    found = composed(loss, ("regularizers.entropy=null",)).weights(batch)
    torch.testing.assert_close(found, composed("dr_grpo", plain).weights(batch), rtol=1e-12, atol=0)
    assert bool(found.any())


@pytest.mark.parametrize("c", [1.0, 2.0, 0.5])
def test_self_reward_is_at_rest_at_a_mixture_of_the_two_models(c: float) -> None:
    """With a KL of strength c to the base the optimum is base^(1 - 1/c) sft^(1/c): at c = 1 the fine-tuned model itself, on every single sample."""
    draw = torch.Generator().manual_seed(0)
    base, sft = (torch.log_softmax(torch.randn(6, generator=draw, dtype=F64), 0) for _ in range(2))
    logp = torch.log_softmax((1 - 1 / c) * base + sft / c, 0)
    objective = composed("self_rewarding", (f"regularizers.kl.coef={c}",))
    total = torch.zeros(6, dtype=F64)
    for y in range(6):
        w = float(objective.weights(given([float(logp[y])], source="policy", teacher=[float(sft[y])], base=[float(base[y])])))
        assert c != 1.0 or abs(w) < 1e-14
        total += logp[y].exp() * w * (torch.eye(6, dtype=F64)[y] - logp.exp())
    assert float(total.norm()) < 1e-14


def test_a_critic_that_knows_nothing_gives_the_sum_to_come() -> None:
    """Without values and discount a token's advantage is what the later tokens earn, less their KL; paid per token or at the end, an answer earns the same."""
    rows = {"teacher": [-0.5, -1.0, -0.2], "base": [-1.0, -0.7, -0.9], "old": [-0.9, -0.8, -0.4]}
    earned = advantage.LogRatio("teacher", "base")
    plain = advantage.GeneralizedAdvantage(lam=1.0, rewards="each", earned=earned)
    batch = given([-0.9, -0.8, -0.4], source="policy", value=[0.0, 0.0, 0.0], advantage=7.0, **rows)
    (view,) = objective_with(plain).views(batch).values()
    to_go = [0.9, 0.4, 0.7]
    assert plain.values(view)[view.on].tolist() == pytest.approx(to_go)
    assert plain.values(view)[view.on].tolist() == pytest.approx(advantage.LogRatio("teacher", "base", "to_go").values(view)[view.on].tolist())
    assert not plain.reads_column and plain.needs == {"teacher", "base", "value"}
    whole = sum(rows["teacher"]) - sum(rows["base"])
    assert to_go[0] == pytest.approx(whole)
    with_kl = advantage.GeneralizedAdvantage(lam=1.0, rewards="each", earned=earned, coef=1.0)
    found = with_kl.values(view)[view.on].tolist()
    assert found == pytest.approx([sum(rows["teacher"][i:]) - sum(rows["old"][i:]) for i in range(3)]), "c = 1: how far the fine-tuned model is above the policy"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"earned": advantage.LogRatio("teacher", "self"), "rewards": "each"}, "must be a reward of each token by itself"),
        ({"earned": advantage.LogRatio("teacher", "base", "to_go"), "rewards": "each"}, "must be a reward of each token by itself"),
        ({"earned": advantage.LogRatio("teacher", "base")}, "set rewards=each"),
    ],
)
def test_what_cannot_be_earned_token_by_token_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        advantage.GeneralizedAdvantage(**settings)


def test_gamma_follows_the_advantage() -> None:
    """A held-back improbable token for good answers, none for the average one, and a bound where the denominator vanishes."""
    term = AdvantageSaturating()
    objective = objective_with(term)

    def factor(p: float, a: float) -> float:
        view = objective.views(given([math.log(p)], source="policy", advantage=a))["rollouts"]
        return float(term.log_ratio(view).exp())

    assert (
        factor(0.5, 0.0) == pytest.approx(1.0)
        and factor(0.1, 4.0) == pytest.approx(0.1 / 0.101)
        and factor(0.1, -4.0) == pytest.approx(0.1 / 0.099)
    )
    assert [factor(0.01, a) for a in (-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0)] == sorted(
        (factor(0.01, a) for a in (-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0)), reverse=True
    )
    for p in (0.00101, 0.001, 1e-6):
        assert factor(p, -4.0) == pytest.approx(10.0)
