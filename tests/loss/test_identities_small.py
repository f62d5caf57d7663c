"""Identities of small methods made of other parts: the best answer in a direction, trajectories with negatives, a reward learnt from data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.advantage import Reward
from posttrain.records import Pair, Row, TokenBatch
from tests.loss.cases import composed
from tests.loss.families.hybrids import CASES as HYBRIDS
from tests.outcomes import bandit
from tests.outcomes.bandit import ACTIONS
from tests.outcomes.scored import answer_judge
from tests.outcomes.toys import Judge, Run, probabilities

ANSWERS = [("policy", 1.0), ("policy", -1.0), ("demo", 1.0), ("demo", -1.0), ("policy", 0.0)]


def batch(old: float = 0.0, rewards: tuple[float, ...] = tuple(a for _, a in ANSWERS)) -> TokenBatch:
    nan = float("nan")
    rows = [
        Row(
            ids=[1, 2, 3],
            sources=["prompt", s, s],
            advantage=a,
            group=0,
            logps={"current": [nan, -0.5, -1.0], "old": [nan, -0.5 - old, -1.0], "behaviour": [nan, -0.2 - old, -1.0]},
        )
        for (s, _), a in zip(ANSWERS, rewards, strict=True)
    ]
    return TokenBatch.from_sequences(rows, dtype=torch.float64, fresh=False)


# -- trajectories with a binary reward ---------------------------------------------------------------------------------------------------
def test_without_negatives_trajectories_are_rejection_sampling() -> None:
    """On the policy's own tokens; with them, the failed ones are pushed down and nothing else changes."""
    no_kl = ("regularizers.kl=null",)
    data = HYBRIDS["dpa"].make(3).batch()
    own = (*no_kl, "streams.trajectories.source=[policy]")
    torch.testing.assert_close(composed("a3t", own[1:]).weights(data), composed("raft", no_kl).weights(data), rtol=1e-12, atol=0)
    good, all_of_them = (composed("a3t").weights(batch(rewards=r)) for r in ((1.0, 0.0, 1.0, 0.0, 0.0), (1.0, -1.0, 1.0, -1.0, 0.0)))
    assert (good >= 0).all() and good.tolist() == pytest.approx([0.1] * 2 + [0.0] * 2 + [0.1] * 2 + [0.0] * 4)
    torch.testing.assert_close(all_of_them, good - good.roll(2), rtol=1e-12, atol=0)


def test_no_importance_ratio_on_what_was_written_behind_the_action() -> None:
    """Whatever the behaviour and the old policy say, of sampled tokens and of rationales alike; a loss with a ratio follows them."""
    objective = composed("a3t")
    assert not objective.needs.references and torch.equal(objective.weights(batch()), objective.weights(batch(old=0.7)))
    named = composed("a3t", ("streams.trajectories.reference={_target_: posttrain.loss.reference.Named, to: old}",))
    assert not torch.equal(named.weights(batch()), named.weights(batch(old=0.7)))
    rationale = [Row(ids=[1, 2], sources=["prompt", "demo"], advantage=-1.0, logps={"current": [float("nan"), -0.5]})]
    assert composed("a3t").weights(TokenBatch.from_sequences(rationale, dtype=torch.float64)).tolist() == [-1.0]


# -- a direction ------------------------------------------------------------------------------------------------------------------------
def test_a_direction_s_objective_is_rejection_sampling_without_a_kl() -> None:
    data = HYBRIDS["dpa"].make(3).batch()
    own, plain = composed("dpa"), composed("raft", ("regularizers.kl=null",))
    assert torch.equal(own.weights(data), plain.weights(data)) and not own.needs.references and composed("raft").needs.references == {"base"}


# -- a reward from data -------------------------------------------------------------------------------------------------------------------
DATA = torch.tensor([1, 2, 24, 3, 16, 2, 12, 4], dtype=torch.float64) / 64
"""How often each of eight answers is given: neither the start's order nor its opposite."""
BETA = 0.5
KL = (f"regularizers.kl={{_target_: posttrain.loss.regularizer.KL, estimator: k2, to: base, coef: {BETA}}}",)


def reward_step(judge: Judge, own: list[int], rate: float, overrides: tuple[str, ...] = ()) -> None:
    """One short outer step: the data, exactly as often as it is, against as many of the policy's own answers."""
    given = [a for a in range(ACTIONS) for _ in range(round(float(DATA[a]) * len(own)))]
    items: list[Pair] = [bandit.pair(f"p{i}", a, b) for i, (a, b) in enumerate(zip(given, own, strict=True))]
    Run(judge, "reward_from_data", overrides, steps=1, rate=rate, fixed=items).go()


def learnt(seed: int, overrides: tuple[str, ...] = (), rounds: int = 60) -> tuple[float, float]:
    """Total variation to the data: of the optimum that belongs to the learnt reward, and of the policy that policy gradient has reached."""
    judge, policy, base = answer_judge(), bandit.policy(), bandit.policy()
    for i in range(rounds):
        rate = 1.0 if i < rounds // 2 else 0.3
        inner = Run(policy, "reinforce", KL, steps=25, rate=1.0, seed=1000 * seed + i, base=base, n=64, advantage=Reward())
        inner.reward = lambda p, a: float(judge.values[a[0]].detach())
        inner.go()
        draw = torch.Generator().manual_seed(1000 * seed + i)
        reward_step(judge, torch.multinomial(probabilities(policy), 128, replacement=True, generator=draw).tolist(), rate, overrides)
    optimum = torch.softmax(bandit.BASE + judge.values.detach() / BETA, 0)
    return float((optimum - DATA).abs().sum() / 2), bandit.distance(policy, DATA)


@pytest.mark.slow
def test_the_learnt_reward_s_optimum_is_the_data_s_distribution() -> None:
    """Without the policy's own answers the reward grows without end, and its optimum is the most frequent answer."""
    start = float((torch.softmax(bandit.BASE, 0) - DATA).abs().sum() / 2)
    found = [learnt(seed) for seed in range(2)]
    assert start > 0.4
    assert max(of_reward for of_reward, _ in found) < 0.08 and max(of_policy for _, of_policy in found) < 0.15
    assert learnt(0, ("streams.own=null",))[0] > 0.3


def test_the_outer_step_is_the_gradient_of_the_data_s_likelihood_under_the_inner_optimum() -> None:
    """Exactly, where the policy's own answers are as frequent as the optimum says; autograd goes through the optimum here."""
    reward = torch.tensor([0.1, -0.4, 0.3, 0.0, 0.2, -0.1, 0.5, -0.6], dtype=torch.float64, requires_grad=True)
    inner = torch.log_softmax(bandit.BASE + reward / BETA, 0)
    (exact,) = torch.autograd.grad((DATA * inner).sum(), reward)
    rows = [
        Row(
            ids=[8, a, 0],
            sources=["prompt", "demo", "demo"],
            trainable=[False, False, True],
            weight=float(w * ACTIONS),
            pair=a,
            side=side,  # type: ignore[arg-type]
            logps={"current": [0.0] * 3},
        )
        for a in range(ACTIONS)
        for side, w in (("chosen", DATA[a]), ("rejected", inner[a].detach().exp()))
    ]
    made = TokenBatch.from_sequences(rows, dtype=torch.float64)
    weights = composed("reward_from_data").weights(made)[made.trainable].view(ACTIONS, 2)
    torch.testing.assert_close(weights.sum(1) / BETA, exact, rtol=1e-9, atol=1e-15)
    assert (weights[:, 0] > 0).all() and (weights[:, 1] < 0).all() and float(weights.sum()) == pytest.approx(0.0, abs=1e-12)
    assert not torch.allclose(composed("reward_from_data", ("streams.own=null",)).weights(made)[made.trainable].view(ACTIONS, 2).sum(1) / BETA, exact)
    swapped = replace(made, side=-made.side)
    torch.testing.assert_close(composed("reward_from_data").weights(swapped)[made.trainable].view(ACTIONS, 2), -weights, rtol=1e-12, atol=0)
