"""Claims about second attempts: SCoRe and RLTF."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from posttrain.advantage import Constant
from posttrain.mixture.turns import WithoutCritique
from posttrain.records import Group, Rollout, Score, Segment, Source
from tests.outcomes.claims import Claim
from tests.outcomes.reinforcement import NORM
from tests.outcomes.toys import Policy, Run, Table, probabilities, prompt_of, values

# -- SCoRe: two attempts of one token; both read what is known of the prompt, the second also copies the first ---------------------------------------------------------
V, PROMPTS = 6, 3


def reviser(right: float = 0.3, copies: float = 3.0) -> Policy:
    """Right answers are the prompt's number."""
    known = math.log(right / (1 - right) * (V - 1)) * torch.eye(PROMPTS, V, dtype=torch.float64)
    second = torch.zeros(V + 1, V, dtype=torch.float64)
    second[1:] = copies * torch.eye(V, dtype=torch.float64)
    return Policy([Table(values(PROMPTS, V, known), lambda p, t, last: p), Table(values(V + 1, V, second), lambda p, t, last: torch.where(t == 0, 0, 1 + last))], V, 2)


def attempts(policy: Policy) -> tuple[float, float, float]:
    """Probabilities that the first attempt is right, that the second is, and that the second repeats the first; exact."""
    first = second = same = 0.0
    for p in range(PROMPTS):
        one = probabilities(policy, p)
        two = torch.stack([probabilities(policy, p, 1, token) for token in range(V)])
        first += float(one[p]) / PROMPTS
        second += float(one @ two[:, p]) / PROMPTS
        same += float((one * two.diagonal()).sum()) / PROMPTS
    return first, second, same


@cache
def improved(alpha: float, seed: int) -> tuple[float, float, float]:
    """When the second attempt is first right with probability 0.7, after 20 steps of the first stage."""
    policy, draw, found = reviser(), torch.Generator().manual_seed(seed), []

    def episodes(step: int) -> list[Group]:
        groups = []
        for g in range(12):
            prompt, rollouts = prompt_of(g % PROMPTS, V), []
            for i, answer in enumerate(policy.sample([g % PROMPTS] * 4, draw)):
                segments = tuple(Segment((t,), Source.policy, turn=k, logprobs=(x,), version=step) for k, (t, x) in enumerate(answer))
                scores = {f"turn_{k + 1}": Score(float(t == g % PROMPTS)) for k, (t, _) in enumerate(answer)}
                rollouts.append(Rollout(f"q{g}/{i}", prompt, segments, reward=scores["turn_2"].value, scores=scores))
            groups.append(Group(prompt, tuple(rollouts)))
        return Constant()(groups)

    def watch(run: Run, step: int) -> None:
        now = attempts(policy)
        if not found and now[1] >= 0.7:
            found.append(now)

    paid = "streams.turns.advantage"
    common: dict[str, Any] = {"seed": seed, "fixed": episodes}
    Run(policy, "score", (f"{paid}.weights=[[0.0,0.0],[0.0,1.0]]", f"{paid}.kl=[0.1,0.01]"), steps=20, rate=1.0, **common).go()
    Run(policy, "score", (f"{paid}.weights=[[1.0,0.0],[{-alpha},{1 + alpha}]]",), steps=60, rate=1.0 / (1 + alpha), watch=watch, **common).go()
    return found[0] if found else attempts(policy)


def bonus(seed: int) -> dict[str, float]:
    with_it, without = improved(10.0, seed), improved(0.0, seed)
    return {"alpha 10": with_it[1] - with_it[0], "alpha 0": without[1] - without[0], "repeats, alpha 10": with_it[2], "repeats, alpha 0": without[2]}


# -- RLTF: a critic that names two answers of eight, one of which is right ---------------------------------------------------------------------------------------------
ANSWERS, HINTS = 8, 4
SAID = ANSWERS + HINTS


def advised(right: float = 0.01, heeds: float = 4.0) -> Policy:
    """Prompt 0; the right answer is 5.  Hint h speaks of the answers 2h and 2h + 1.  An answer is read alike as the first and after a critique."""
    own = torch.zeros(1, SAID, dtype=torch.float64)
    own[0, ANSWERS:] = -12.0
    own[0, 5] = math.log(right / (1 - right) * (ANSWERS - 1))
    heard = torch.zeros(SAID + 1, SAID, dtype=torch.float64)
    for h in range(HINTS):
        heard[1 + ANSWERS + h, 2 * h : 2 * h + 2] = heeds
    heard[1 + ANSWERS + 2, 5] += 3.0
    return Policy([Table(values(1, SAID, own), lambda p, t, last: torch.zeros_like(p)), Table(values(SAID + 1, SAID, heard), lambda p, t, last: torch.where(t == 0, 0, 1 + last))], SAID, 3)


def single(policy: Policy) -> float:
    """Probability of a right first answer."""
    return float(probabilities(policy)[5])


def from_critiques(seed: int) -> dict[str, float]:
    """After 30 steps of 32 answers: 16 episodes of two, or 32 of one."""
    policy, draw, prompt = advised(), torch.Generator().manual_seed(seed), prompt_of(0, SAID)

    def episodes(step: int) -> list[Group]:
        first = [a[0] for a in policy.sample([0] * 16, draw)]
        given = [(min(t, ANSWERS - 1), ANSWERS + 2) for t, _ in first]
        second = [a[0] for a in policy.sample([0] * 16, draw, given)]
        rollouts = []
        for i, (one, two) in enumerate(zip(first, second, strict=True)):
            segments = (Segment((one[0],), Source.policy, logprobs=(one[1],), version=step), Segment((ANSWERS + 2,), Source.tool, turn=1),
                        Segment((two[0],), Source.policy, turn=1, logprobs=(two[1],), version=step))  # fmt: skip
            scores = {"turn_1": Score(float(one[0] == 5)), "turn_2": Score(float(two[0] == 5))}
            rollouts.append(Rollout(f"q0/{i}", prompt, segments, reward=scores["turn_2"].value, scores=scores))
        return [Group(prompt, tuple(rollouts))]

    Run(policy, "rltf", steps=30, rate=0.5, seed=seed, fixed=episodes, gate=WithoutCritique()).go()
    alone = advised()
    alone.length = 1
    Run(alone, "grpo", steps=30, rate=0.5, seed=seed, reward=lambda p, a: float(a[0] == 5), prompts=[0] * 4, n=8, advantage=NORM).go()
    return {"RLTF": single(policy), "GRPO": single(alone), "start": single(advised())}


CLAIMS = (
    Claim(
        "SCoRe's bonus for improvement",
        ("score",),
        "2409.12917",
        "With the bonus the second attempt is better than the first by more than without it, and repeats it less.",
        "two attempts of one token, copying is easy; after 20 steps of the first stage, when the second attempt is first right with probability 0.7",
        "gain of the second attempt; how often it repeats the first",
        bonus,
        "holds",
        effect=lambda n: min(n["alpha 10"] - n["alpha 0"], n["repeats, alpha 0"] - n["repeats, alpha 10"]),
        effect_is="difference of the gains, and of the repeats, the smaller",
    ),
    Claim(
        "SCoRe's second attempt",
        ("score",),
        "2409.12917",
        "The second attempt is right more often than the first.",
        "two attempts of one token, copying is easy; after 20 steps of the first stage, when the second attempt is first right with probability 0.7",
        "gain of the second attempt",
        lambda seed: {"alpha 10": bonus(seed)["alpha 10"]},
        "holds",
    ),
    Claim(
        "RLTF without its critic",
        ("rltf", "grpo"),
        "2602.02482",
        "Learning second answers under the first prompt raises first answers beyond GRPO with as many answers sampled.",
        "BANDIT, the right answer at 0.01; the critic names two answers of eight; 30 steps of 32 answers",
        "probability of a right first answer",
        from_critiques,
        "holds",
    ),
)
