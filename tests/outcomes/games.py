"""Claims about preferences that are sampled anew, judged in a game, or of data better or worse than the model: BANDIT and rock, paper, scissors."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from posttrain.advantage import Reward
from posttrain.mixture.demos import Demos
from posttrain.mixture.pairs import GivenAgainstSampled
from posttrain.records import Pair
from tests.outcomes import bandit
from tests.outcomes.bandit import ACTIONS, REWARDS
from tests.outcomes.claims import Claim
from tests.outcomes.preference import FAR, pairs_of, shifted
from tests.outcomes.toys import Judge, Policy, Run, Table, demo_of, one_row, probabilities, prompt_of, values


# -- DPO on what nobody doubts ------------------------------------------------------------------------------------------------------------------------------
def without_doubt(seed: int) -> dict[str, float]:
    """Every pair of answers, the better one always preferred: share ordered rightly, and the mean margin after 60 and after 120 updates."""
    items = [bandit.pair(f"p{a}{b}", a, b) for a in range(ACTIONS) for b in range(a)]
    start = shifted(seed)
    policy, margins = bandit.policy(start), []

    def watch(run: Run, step: int) -> None:
        if step % 60 == 59:
            d = bandit.logp(policy) - torch.log_softmax(start, 0)
            margins.append(float(torch.stack([d[a] - d[b] for a in range(ACTIONS) for b in range(a)]).mean()))

    Run(policy, "dpo", steps=120, optimizer="adam", fixed=items, watch=watch).go()
    return {"ordered": bandit.ranked(policy, start), "margin at 60": margins[0], "margin at 120": margins[1]}


# -- rounds --------------------------------------------------------------------------------------------------------------------------------------------------
def in_rounds(fresh: bool, seed: int) -> list[float]:
    """Expected reward after each of three rounds of 25 updates on 16 pairs, sampled by the policy a round begins with, or all by the first."""
    policy, out, held = bandit.policy(FAR / 2), [], []

    def pairs(step: int) -> list[Pair]:
        if step % 25 == 0 and (fresh or not held):
            held[:] = pairs_of(policy, 1000 * seed + step)
        return list(held)

    def watch(run: Run, step: int) -> None:
        if step % 25 == 24:
            out.append(bandit.expected(policy))

    Run(policy, "dpo", steps=75, rate=0.05, optimizer="adam", seed=seed, fixed=pairs, base_every=25 if fresh else 0, watch=watch).go()
    return out


def iterated(seed: int) -> dict[str, float]:
    first, second, third = in_rounds(True, seed)
    return {"round 1": first, "round 2": second, "round 3": third, "the first pairs, as many updates": in_rounds(False, seed)[-1]}


def self_play(seed: int) -> dict[str, float]:
    """Total variation to the data's distribution, which 64 texts stand for; SPIN in four iterations of 25 updates."""
    draw = torch.Generator().manual_seed(seed)
    goal = torch.softmax(torch.randn(ACTIONS, generator=draw, dtype=torch.float64), 0)
    found = torch.multinomial(goal, 64, replacement=True, generator=draw).tolist()
    data = torch.bincount(torch.tensor(found), minlength=ACTIONS).double() / 64
    given = [demo_of(f"d{i}", bandit.PROMPT, (a,)) for i, a in enumerate(found)]
    imitated = Run(bandit.policy(shifted(seed)), "sft", steps=100, rate=0.05, optimizer="adam", fixed=given).go().policy
    policy = bandit.policy(shifted(seed))

    def pairs(step: int) -> list[Pair]:
        own = policy.sample([0] * 64, torch.Generator().manual_seed(1000 * seed + step))
        return [Pair(f"p{i}", g, demo_of(f"o{i}", bandit.PROMPT, (a[0][0],))) for i, (g, a) in enumerate(zip(given, own, strict=True)) if g.segments[-1].ids != (a[0][0],)]

    Run(policy, "spin", steps=100, rate=0.05, optimizer="adam", fixed=pairs, base_every=25).go()
    return {"SFT": bandit.distance(imitated, data), "SPIN": bandit.distance(policy, data)}


# -- data better or worse than the model ---------------------------------------------------------------------------------------------------------------------
def fitted(name: str, good_model: bool, seed: int) -> float:
    """Expected reward after 40 updates on pairs of the four middle answers; the start likes the two best, or the two worst."""
    tilt = torch.linspace(-2.0, 2.0, ACTIONS, dtype=torch.float64) * (1.0 if good_model else -1.0)
    draw, items = torch.Generator().manual_seed(seed), []
    for i in range(24):
        a, b = sorted((2 + torch.randperm(4, generator=draw)[:2]).tolist(), reverse=True)
        items.append(bandit.pair(f"p{i}", a, b))
    return bandit.expected(Run(bandit.policy(tilt), name, steps=40, rate=0.1, optimizer="adam", fixed=items).go().policy)


def apo(seed: int) -> dict[str, float]:
    return {f"{label}, {kind} model": fitted(name, good, seed) for good, kind in ((False, "worse"), (True, "better")) for name, label in (("apo_zero", "zero"), ("apo_down", "down"))}


# -- optimism ----------------------------------------------------------------------------------------------------------------------------------------------------
def explored(seed: int) -> dict[str, float]:
    """Expected reward after 60 updates of 16 pairs, one answer the policy's and one the start's; the best answer is rare to the start.  Plain
    gradient steps: Adam would make the smallest alpha a step of full length for the answers no pair is about."""
    base = bandit.policy(FAR)
    found = [a[0][0] for a in base.sample([0] * 500, torch.Generator().manual_seed(seed))]
    demos = Demos([demo_of(f"b{i}", bandit.PROMPT, (a,), rewards={"score": float(REWARDS[a])}) for i, a in enumerate(found)])
    out = {}
    for name, alpha in (("XPO, alpha 0.03", 0.03), ("XPO, alpha 1e-5", 1e-5), ("without optimism", 0.0)):
        run = Run(bandit.policy(FAR), "xpo", (f"streams.optimism.coef={alpha}",), steps=60, rate=5.0, seed=seed, reward=lambda p, a: float(REWARDS[a[0]]), prompts=[0],
                  n=16, advantage=Reward(), gate=GivenAgainstSampled("better"), demos=demos)  # fmt: skip
        out[name] = bandit.expected(run.go().policy)
    return out


# -- rock, paper, scissors -----------------------------------------------------------------------------------------------------------------------------------------
BEATS = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
ROCKS = torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64)


def exploited(policy: Policy) -> float:
    """By how much the best answer to it wins more than half of the time."""
    return float((BEATS @ probabilities(policy)).max()) - 0.5


def player(logits: Tensor, learn: bool = True) -> Policy:
    return Policy([Table(values(1, 3, logits, learn), one_row)], 3)


@cache
def scores_of(seed: int) -> Tensor:
    """A Bradley-Terry model of 100 pairs that the start played."""
    draw = torch.Generator().manual_seed(seed)
    found = [a[0][0] for a in player(ROCKS).sample([0] * 200, draw)]
    judge, prompt = Judge(torch.zeros(3, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: last, 3), prompt_of(0, 3)
    pairs = [(a, b) if BEATS[a, b] > 0.5 else (b, a) for a, b in zip(found[::2], found[1::2], strict=True) if a != b]
    items = [Pair(f"p{i}", demo_of(f"p{i}+", prompt, (a,)), demo_of(f"p{i}-", prompt, (b,))) for i, (a, b) in enumerate(pairs)]
    Run(judge, "reward_model", steps=40, optimizer="adam", fixed=items).go()
    return judge.values.detach()


def nash(seed: int) -> dict[str, float]:
    """After 200 steps from a start that likes rock; all are drawn to the uniform policy with coefficient 0.1."""
    base, out = torch.zeros(3, dtype=torch.float64), {}
    common: dict[str, Any] = {"steps": 200, "rate": 0.5, "seed": seed, "prompts": [0] * 16, "n": 2}
    policy = player(ROCKS)

    def wins(prompt: int, answer: tuple[int, ...]) -> float:
        opponent = torch.softmax(0.5 * probabilities(policy).log() + 0.5 * torch.log_softmax(base, 0), 0)
        return float(BEATS[answer[0]] @ opponent)

    out["Nash-MD"] = exploited(Run(policy, "nash_md", base=player(base, False), reward=wins, advantage=Reward(0.5), **common).go().policy)
    scores = scores_of(seed)
    for_scores = Run(player(ROCKS), "nash_md", base=player(base, False), reward=lambda p, a: float(torch.sigmoid(scores[a[0]] - scores.mean())), advantage=Reward(0.5), **common)
    out["a score of each answer"] = exploited(for_scores.go().policy)
    return out


CLAIMS = (
    Claim(
        "DPO on what nobody doubts",
        ("dpo",),
        "2305.18290",
        "The order of the answers is found, and the margins go on growing.",
        "PREF without noise, all 28 pairs, 120 updates",
        "share ordered; mean log-ratio margin",
        without_doubt,
        "holds",
        effect=lambda n: min(n["ordered"] - 0.95, n["margin at 120"] - 1.1 * n["margin at 60"]),
        effect_is="share - 0.95, and growth of the margin beyond a tenth, the smaller",
        seeds=4,
    ),
    Claim(
        "DPO in rounds",
        ("dpo",),
        "2312.16682",
        "Sampling new pairs and moving the reference every round gets further than the first pairs do, and every round adds something.",
        "BANDIT, three rounds of 25 updates on 16 pairs",
        "expected reward",
        iterated,
        "holds",
        effect=lambda n: min(n["round 3"] - n["the first pairs, as many updates"], n["round 2"] - n["round 1"], n["round 3"] - n["round 2"]),
        effect_is="gain over the first pairs, and of rounds 2 and 3, the smallest",
    ),
    Claim(
        "SPIN against SFT",
        ("spin", "sft"),
        "2401.01335",
        "Self-play against given texts gets nearer to their distribution than imitation.",
        "BANDIT, 64 texts, 100 updates; four iterations of SPIN",
        "total variation to the texts",
        self_play,
        "does not hold",
        note="A table can copy frequencies; its authors start where SFT has ended.",
    ),
    Claim(
        "APO fits the data's quality",
        ("apo_zero", "apo_down"),
        "2408.06266",
        "Where the chosen answers are better than the model's own, APO-zero ends higher; where they are worse, APO-down.",
        "BANDIT, 24 pairs of middling answers, the start likes the best or the worst; 40 updates",
        "expected reward",
        apo,
        "holds",
        effect=lambda n: min(n["zero, worse model"] - n["down, worse model"], n["down, better model"] - n["zero, better model"]),
        effect_is="the smaller of both margins",
    ),
    Claim(
        "XPO explores",
        ("xpo",),
        "2405.21046",
        "Optimism finds a rare good answer with fewer samples than DPO on the same kind of pairs.",
        "BANDIT, the best answer at 0.1 %; 16 pairs per update, 60 updates",
        "expected reward",
        explored,
        "does not hold",
        effect=lambda n: n["XPO, alpha 0.03"] - n["without optimism"],
        effect_is="alpha 0.03 less none",
        seeds=8,
        note="The released alpha, 1e-5, changes nothing here.",
    ),
    Claim(
        "Nash-MD in a game without a best answer",
        ("nash_md", "reward_model"),
        "2312.00886",
        "Where preferences go round in a circle, Nash-MD settles where nobody can beat it; learning a score of each answer does not.",
        "rock, paper, scissors, 200 steps of 32 answers",
        "how far it can be exploited",
        nash,
        "holds",
        effect=lambda n: min(0.05 - n["Nash-MD"], n["a score of each answer"] - 0.1),
        effect_is="0.05 - Nash-MD, and the other - 0.1, the smaller",
        seeds=4,
    ),
)
