"""What preference losses do to a policy: a softmax over eight answers of one token, pairs drawn from a Bradley-Terry model of known rewards."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest
import torch
from torch import Tensor

from posttrain.loss import Objective
from posttrain.records import Row, TokenBatch
from tests.loss.cases import composed

REWARDS = torch.tensor([-2.0, -1.4, -0.8, -0.3, 0.3, 0.8, 1.4, 2.0], dtype=torch.float64)
ACTIONS, SEEDS = len(REWARDS), (0, 1)
BASE = torch.log_softmax(torch.linspace(0.5, -0.5, ACTIONS, dtype=torch.float64), 0)  # the base likes the bad answers better


def answers(sides: list[tuple[int, dict[str, object]]], source: str = "demo") -> TokenBatch:
    """One-token answers; the token's id is the action."""
    rows = [Row(ids=[ACTIONS, a], sources=["prompt", source], logps={"base": [math.nan, float(BASE[a])]}, **more) for a, more in sides]  # type: ignore[arg-type]
    return TokenBatch.from_sequences(rows, dtype=torch.float64)


@cache
def preferences(seed: int, flips: float = 0.0, count: int = 60) -> tuple[tuple[int, int], ...]:
    """(preferred, other), from sigmoid of the difference of rewards times 3; a share ``flips`` of the labels is turned round."""
    rng, out = random.Random(seed), []
    for _ in range(count):
        a, b = rng.sample(range(ACTIONS), 2)
        better = rng.random() < 1 / (1 + math.exp(-3 * float(REWARDS[a] - REWARDS[b])))
        out.append((a, b) if better != (rng.random() < flips) else (b, a))
    return tuple(out)


def pairs(found: tuple[tuple[int, int], ...], source: str = "demo") -> TokenBatch:
    known = {"score": 0.0, "deviation": 0.0}
    sides = [
        (a, {"pair": i, "side": s, "rewards": known})
        for i, pair in enumerate(found)
        for a, s in zip(pair, ("chosen", "rejected"), strict=True)
    ]
    return answers(sides, source)


def labelled(found: tuple[tuple[int, int], ...]) -> TokenBatch:
    """The same answers without their pairs, and answers under another prompt, whose log-ratio is that of the policy's own answers here."""
    rows = [(a, {"rewards": {"label": float(good)}}) for pair in found for a, good in zip(pair, (True, False), strict=True)]
    return answers([*rows, *((a, {"context": "mismatched"}) for pair in found for a in pair)])


def train(objective: Objective, batch: TokenBatch, steps: int = 50, rate: float = 0.1, start: Tensor = BASE) -> Tensor:
    """Log-probs of all answers after so many steps of Adam on the whole batch."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    for _ in range(steps):
        logp = torch.log_softmax(logits, 0)[batch.target_ids]
        optimizer.zero_grad()
        objective(batch, logp).loss.backward()
        optimizer.step()
    return torch.log_softmax(logits.detach(), 0)


def ranked(logp: Tensor, against: Tensor = BASE) -> float:
    """Share of the pairs of answers whose order by log-ratio is that of their rewards."""
    d = logp - against
    right = [(float(d[a] - d[b]) > 0) == (float(REWARDS[a] - REWARDS[b]) > 0) for a in range(ACTIONS) for b in range(a)]
    return sum(right) / len(right)


PAIRED = ["dpo", "cdpo", "robust_dpo", "ipo", "rso", "slic", "dpo_norm", "simpo", "alphapo", "cpo", "cpo_simpo", "orpo", "exo", "nca", "bco_pair",
          "apo_zero", "sppo", "iterative_rpo", "rpo", "dpop", "mpo", "tr_dpo", "f_dpo", "wpo", "ld_dpo", "ddpo", "dorpo", "step_apo",
          "ids", "aot"]  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_every_pairwise_loss_learns_the_order_of_the_rewards(name: str) -> None:
    """None may be near chance, 0.5; a sorted loss learns which *distribution* is better and no more of the pairs than that."""
    accuracy = [ranked(train(composed(name), pairs(preferences(seed)))) for seed in SEEDS]
    assert min(accuracy) >= 0.75, accuracy


@pytest.mark.parametrize("name", ["kto", "bco", "implicit_prm"])
def test_labels_without_pairs_rank_about_as_well_as_pairs(name: str) -> None:
    found = [preferences(seed, count=150) for seed in SEEDS]
    alone = [ranked(train(composed(name), labelled(f), steps=150)) for f in found]  # the saturating one is slower
    assert sum(alone) / len(alone) >= sum(ranked(train(composed("dpo"), pairs(f), steps=150)) for f in found) / len(found) - 0.05, alone


# -- one deterministic preference: where the margin goes -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "overrides", "margin"),
    [
        ("ipo", (), 5.0),
        ("cdpo", (), math.log(9) / 0.1),
        ("cdpo", ("streams.pairs.advantage.label_smoothing=0.2",), math.log(4) / 0.1),
        ("exo", ("streams.pairs.advantage.label_smoothing=0.1",), math.log(9) / 0.1),
        ("rso", (), 10.0),
        ("dpo", ("streams.pairs.advantage.label=score",), 0.0),
        ("discopop", (), -1.1),
    ],
)
def test_bounded_losses_stop_at_their_margin(name: str, overrides: tuple[str, ...], margin: float) -> None:
    """The searched loss stops on the wrong side: the bump at the base keeps it there."""
    rate = 0.03 if name == "rso" else 0.1
    assert margin_after(name, 400, rate, *overrides) == pytest.approx(margin, abs=0.8 if name == "rso" else 0.2)


def margin_after(name: str, steps: int, rate: float, *overrides: str, start: Tensor = BASE) -> float:
    """Of one pair: the best answer against the worst."""
    batch = answers([(7, {"pair": 0, "side": "chosen", "rewards": {"score": 0.5}}), (0, {"pair": 0, "side": "rejected"})])
    d = train(composed(name, overrides), batch, steps, rate, start) - BASE
    return float(d[7] - d[0])


def test_the_logistic_loss_has_no_margin_to_stop_at() -> None:
    margins = [margin_after("dpo", steps, 0.1) for steps in (100, 200, 400)]
    assert margins == sorted(margins) and margins[-1] > 1.5 * margins[0] > 15


def test_the_searched_loss_learns_only_from_beyond_its_bump() -> None:
    beyond = BASE + torch.tensor([0.0] * 7 + [1.5], dtype=torch.float64)
    assert margin_after("discopop", 100, 0.1, start=beyond) > 5.0


@pytest.mark.parametrize("name", ["iterative_rpo", "orpo", "cpo", "nca"])
def test_anchored_losses_keep_the_chosen_answers_likely(name: str) -> None:
    """One chosen answer against two rejected ones that it shares its mass with: its own log-prob must not fall."""
    chosen = 6
    found = tuple((chosen, other) for other in (5, 7))
    logp = train(composed(name), pairs(found))
    assert float(logp[chosen]) > float(BASE[chosen])


def test_flipped_labels_cost_the_debiased_loss_no_ranking() -> None:
    accuracy = {name: [ranked(train(composed(name, ("streams.pairs.advantage.label_smoothing=0.2",)), pairs(preferences(seed, 0.2, 150)))) for seed in SEEDS]
                for name in ("robust_dpo", "cdpo")}  # fmt: skip
    plain = [ranked(train(composed("dpo"), pairs(preferences(seed, 0.2, 150)))) for seed in SEEDS]
    assert sum(accuracy["robust_dpo"]) >= sum(plain) - 0.1
    assert min(accuracy["cdpo"]) > 0.7


# -- sampling now: rewards far from the base -----------------------------------------------------------------------------------------
def test_pairs_sampled_now_move_mass_further_than_pairs_sampled_before() -> None:
    """The best answer is rare under the base; pairs of the policy's own samples go on bringing it closer, a fixed set of pairs does not."""
    rare = torch.log_softmax(torch.linspace(3.0, -3.0, ACTIONS, dtype=torch.float64), 0)

    def sampled(logits: Tensor, draw: torch.Generator) -> tuple[tuple[int, int], ...]:
        two = torch.multinomial(torch.softmax(logits.detach(), 0), 64, replacement=True, generator=draw).view(32, 2).tolist()
        return tuple((a, b) if REWARDS[a] > REWARDS[b] else (b, a) for a, b in two if a != b)

    ends = {}
    for online in (True, False):
        draw = torch.Generator().manual_seed(0)
        logits = rare.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        batch = pairs(sampled(logits, draw), "policy")
        for _ in range(120):
            batch = pairs(sampled(logits, draw), "policy") if online else batch
            batch = batch.with_logps(base=rare[batch.target_ids])
            optimizer.zero_grad()
            composed("online_dpo")(batch, torch.log_softmax(logits, 0)[batch.target_ids]).loss.backward()
            optimizer.step()
        ends[online] = float((torch.softmax(logits.detach(), 0) * REWARDS).sum())
    assert ends[True] > ends[False] + 0.2 > float((rare.exp() * REWARDS).sum())
