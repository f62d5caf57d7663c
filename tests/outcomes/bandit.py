"""BANDIT and PREF: eight answers of one token under one prompt, with known rewards, and preferences drawn from a Bradley-Terry model of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.records import Group, Pair, Rollout, Segment, Source
from tests.outcomes.toys import Policy, Table, demo_of, one_row, probabilities, prompt_of, values

ACTIONS = 8
REWARDS = torch.linspace(-2.0, 2.0, ACTIONS, dtype=torch.float64)
BASE = torch.linspace(0.5, -0.5, ACTIONS, dtype=torch.float64)
"""Logits of the start: it likes the bad answers a little better."""
PROMPT = prompt_of(0, ACTIONS)


def policy(start: Tensor = BASE) -> Policy:
    return Policy([Table(values(1, ACTIONS, start), one_row)], ACTIONS)


def logp(of: Policy) -> Tensor:
    return probabilities(of).log()


def pair(name: str, chosen: int, rejected: int, **rewards: float) -> Pair:
    return Pair(name, demo_of(f"{name}+", PROMPT, (chosen,), rewards=rewards), demo_of(f"{name}-", PROMPT, (rejected,), rewards=rewards))


def preferences(seed: int, count: int = 60, flips: float = 0.0, scale: float = 3.0) -> list[Pair]:
    """Of two answers the better one is preferred with probability sigmoid(scale * difference); a share ``flips`` of the labels is turned round."""
    rng, out = random.Random(seed), []
    for i in range(count):
        a, b = rng.sample(range(ACTIONS), 2)
        better = rng.random() < 1 / (1 + math.exp(-scale * float(REWARDS[a] - REWARDS[b])))
        out.append(pair(f"p{i}", a, b) if better != (rng.random() < flips) else pair(f"p{i}", b, a))
    return out


def ranked(of: Policy, start: Tensor = BASE) -> float:
    """Share of the pairs of answers whose order by log-ratio to the start is that of their rewards."""
    d = logp(of) - torch.log_softmax(start, 0)
    right = [float(d[a] > d[b]) for a in range(ACTIONS) for b in range(a)]
    return sum(right) / len(right)


def expected(of: Policy) -> float:
    return float((logp(of).exp() * REWARDS).sum())


def optimum(beta: float, start: Tensor = BASE) -> Tensor:
    """The best policy under a KL penalty: ``start * exp(reward / beta)``, normalised."""
    return torch.softmax(start + REWARDS / beta, 0)


def distance(of: Policy, to: Tensor) -> float:
    """Total variation."""
    return float((logp(of).exp() - to).abs().sum() / 2)


def group(answers: Sequence[int], noise: Sequence[float] | None = None, logps: Tensor | None = None, name: str = "g") -> Group:
    """A group of given answers with their rewards; ``logps``: of the policy that is said to have sampled them."""
    rollouts = []
    for i, a in enumerate(answers):
        behaviour = float(logps[a]) if logps is not None else 0.0
        segment = Segment((a,), Source.policy, logprobs=(behaviour,), version=0)
        rollouts.append(Rollout(f"{name}/{i}", PROMPT, (segment,), reward=float(REWARDS[a]) + (noise[i] if noise is not None else 0.0)))
    return Group(PROMPT, tuple(rollouts))
