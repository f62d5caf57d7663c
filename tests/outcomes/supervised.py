"""Claims about imitation, distillation and self-training: noisy labels, Markov chains, BANDIT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from posttrain.advantage import Constant, Reward
from posttrain.mixture.demos import Demos
from posttrain.mixture.route import RightOnly
from posttrain.records import Demo
from tests.outcomes.claims import Claim
from tests.outcomes.toys import Policy, Run, Table, demo_of, one_row, probabilities, prompt_of, values

V = 50
DEMOS = "streams.demos"


# -- noisy labels: fifty tokens, the first is right; a fifth of the labels is drawn at random --------------------------------------------------------------------
def single(right: float, vocabulary: int = V) -> Policy:
    logits = torch.zeros(vocabulary, dtype=torch.float64)
    logits[0] = math.log(right / (1 - right) * (vocabulary - 1))
    return Policy([Table(values(1, vocabulary, logits), one_row)], vocabulary)


def noisy(seed: int, count: int = 100) -> list[Demo]:
    draw = torch.Generator().manual_seed(seed)
    wrong, any_token = torch.rand(count, generator=draw) < 0.2, torch.randint(V, (count,), generator=draw)
    return [demo_of(f"d{i}", prompt_of(0, V), (int(t) if w else 0,)) for i, (w, t) in enumerate(zip(wrong.tolist(), any_token.tolist(), strict=True))]


@cache
def imitated(loss: str, right: float, seed: int, overrides: tuple[str, ...] = (), steps: int = 120, rate: float = 1.0, updates: int = 1) -> Policy:
    return Run(single(right), loss, overrides, steps=steps, rate=rate, fixed=noisy(seed), updates=updates).go().policy


def right_after(loss: str, right: float, seed: int, *overrides: str) -> float:
    return float(probabilities(imitated(loss, right, seed, overrides))[0])


def flip(loss: str, label: str, *overrides: str) -> Callable[[int], dict[str, float]]:
    def measure(seed: int) -> dict[str, float]:
        return {f"{label}, strong start": right_after(loss, 0.6, seed, *overrides), "SFT, strong start": right_after("sft", 0.6, seed),
                f"{label}, weak start": right_after(loss, 0.001, seed, *overrides), "SFT, weak start": right_after("sft", 0.001, seed)}  # fmt: skip

    return measure


def kl_from(policy: Policy, right: float) -> float:
    """KL of the start from the policy, ``KL(base || policy)``."""
    base, own = probabilities(single(right)), probabilities(policy)
    return float((base * (base.log() - own.log())).sum())


def entropy_of(policy: Policy) -> float:
    p = probabilities(policy)
    return float(-(p * p.log()).sum())


def proximal(seed: int) -> dict[str, float]:
    """After ten batches of eight updates."""
    return {"PSFT": entropy_of(imitated("psft", 0.6, seed, (), 10, 3.0, 8)), "SFT": entropy_of(imitated("sft", 0.6, seed, (), 10, 3.0, 8))}


def deviation(loss: str, seed: int, *overrides: str) -> float:
    """Mean absolute log-ratio of eight answers of different rarity, when their mean negative log-likelihood first falls to 0.9."""
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy = Policy([Table(values(8, 8, 1.5 * start), lambda prompt, position, last: prompt)], 8)
    items = [demo_of(f"d{p}", prompt_of(p, 8), (p,)) for p in range(8)]
    before, found = [policy.logp_of(p, (p,)) for p in range(8)], []

    def watch(run: Run, step: int) -> None:
        now = [policy.logp_of(p, (p,)) for p in range(8)]
        if not found and -sum(now) / 8 <= 0.9:
            found.append(sum(abs(a - b) for a, b in zip(now, before, strict=True)) / 8)

    Run(policy, loss, overrides, steps=80, rate=1.0, fixed=items, watch=watch).go()
    return found[0]


# -- self-training ---------------------------------------------------------------------------------------------------------------------------------------------------
def own_samples(loss: str, start: Sequence[float], seed: int, temperature: float, rate: float, steps: int) -> Policy:
    policy = Policy([Table(values(1, len(start), torch.tensor(start, dtype=torch.float64).log()), one_row)], len(start))
    Run(policy, loss, steps=steps, rate=rate, seed=seed, temperature=temperature, reward=lambda p, a: 0.0, prompts=[0] * 8, n=8, advantage=Constant()).go()
    return policy


def mode_wins(loss: str, temperature: float, steps: int = 60) -> Callable[[int], dict[str, float]]:
    """The right answer is the first: the mode of one start, the second most likely of the other."""
    return lambda seed: {name: float(probabilities(own_samples(loss, start, seed, temperature, 1.0, steps))[0]) - start[0]
                         for name, start in (("the mode is right", (0.45, 0.30, 0.25)), ("the mode is wrong", (0.30, 0.45, 0.25)))}  # fmt: skip


def self_rewarded(seed: int) -> dict[str, float]:
    """Total variation to the fine-tuned policy, which is known through its log-probs alone."""
    draw = torch.Generator().manual_seed(seed)
    policy = Policy([Table(values(1, 8, 0.5 * torch.randn(8, generator=draw, dtype=torch.float64)), one_row)], 8)
    tuned = Policy([Table(values(1, 8, torch.randn(8, generator=draw, dtype=torch.float64), False), one_row)], 8)
    start = probabilities(policy)
    Run(policy, "self_rewarding", steps=150, rate=1.0, seed=seed, reward=lambda p, a: 0.0, prompts=[0] * 8, n=16, advantage=Constant(), teacher=tuned).go()
    goal = probabilities(tuned)
    return {"start": float((start - goal).abs().sum() / 2), "Self-Rewarding": float((probabilities(policy) - goal).abs().sum() / 2)}


def several(seed: int) -> dict[str, float]:
    """Expected number of distinct right answers among eight samples: four of eight are right, one is given."""

    def distinct(policy: Policy) -> float:
        return float((1 - (1 - probabilities(policy)[:4]) ** 8).sum())

    prompt = prompt_of(0, 8)
    gold = demo_of("gold", prompt, (0,))
    one = Run(single(0.02, 8), "sft", steps=60, rate=0.5, fixed=[gold]).go().policy
    many = (
        Run(
            single(0.02, 8),
            "multi_target",
            steps=60,
            rate=0.5,
            seed=seed,
            reward=lambda p, a: float(a[0] < 4),
            prompts=[0] * 4,
            n=8,
            advantage=Reward(),
            gate=RightOnly(),
            demos=Demos([gold]),
        )
        .go()
        .policy
    )
    return {"with own right answers": distinct(many), "the given one": distinct(one)}


# -- distillation of a Markov chain --------------------------------------------------------------------------------------------------------------------------------------
def chain(seed: int, sharp: float = 1.5, learn: bool = False) -> Policy:
    logits = sharp * torch.randn(3 * 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Policy([Table(values(18, 6, logits, learn), lambda p, t, last: t * 6 + last)], 6, 3)


def divergence(of: Policy, to: Policy) -> float:
    """``KL(of || to)`` over whole answers."""
    (_, p), (_, q) = of.all_answers(1), to.all_answers(1)
    return float((p.exp() * (p - q)).sum())


@cache
def hacked(online: bool, seed: int) -> float:
    """How much further the student is from the oracle at the end than at its best; the teacher is the oracle blurred by a draw of its own."""
    oracle, blur = chain(seed), chain(seed + 500, 0.5)
    teacher = Policy([*oracle.tables, *blur.tables], 6, 3)
    student = Policy([Table(values(18, 6), lambda p, t, last: t * 6 + last)], 6, 3)
    draw, golden = torch.Generator().manual_seed(seed), []
    fixed = sampled(teacher, draw, 24)

    def watch(run: Run, step: int) -> None:
        if step % 4 == 3:
            golden.append(divergence(oracle, student))

    given: Any = (lambda step: sampled(teacher, draw, 24)) if online else fixed
    Run(student, "sft", steps=160, rate=5.0, fixed=given, watch=watch).go()
    tail = golden[-5:]
    return sum(tail) / len(tail) - min(golden)


def sampled(policy: Policy, draw: torch.Generator, count: int) -> list[Demo]:
    return [demo_of(f"d{i}", prompt_of(0, policy.vocabulary), tuple(t for t, _ in a)) for i, a in enumerate(policy.sample([0] * count, draw))]


def copies(vocabulary: int = 5, length: int = 4) -> Policy:
    """The first token is any, the others repeat it; a slip has probability 0.01 each."""
    logits = torch.zeros(length, vocabulary, vocabulary, dtype=torch.float64)
    logits[1:] += math.log(0.99 / 0.01 * (vocabulary - 1)) * torch.eye(vocabulary, dtype=torch.float64)
    return Policy([Table(logits.view(-1, vocabulary), lambda p, t, last: t * vocabulary + last)], vocabulary, length)


def repeats(policy: Policy) -> float:
    """Probability of an answer that repeats its first token."""
    answers, logp = policy.all_answers(1)
    return float(logp.exp()[0, (answers == answers[:, :1]).all(1)].sum())


def forgetful(credit: str, seed: int) -> dict[str, float]:
    """A student that sees only the position, not the token before."""
    out = {}
    for name, loss, overrides in (("on own samples", "on_policy_distillation", (f"streams.rollouts.advantage.credit={credit}",)), ("on the teacher's", "sft", ())):
        start = 0.5 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        student = Policy([Table(values(4, 5, start), lambda p, t, last: t)], 5, 4)
        draw, teacher = torch.Generator().manual_seed(seed), copies()
        more: dict[str, Any] = (
            {"fixed": lambda step, draw=draw, teacher=teacher: sampled(teacher, draw, 32)}
            if loss == "sft"
            else {"reward": lambda p, a: 0.0, "prompts": [0] * 32, "n": 1, "advantage": Constant(), "teacher": teacher}
        )
        out[name] = repeats(Run(student, loss, overrides, steps=100, rate=2.0, seed=seed, **more).go().policy)
    return out


def flips(numbers: dict[str, float]) -> float:
    own_strong, sft_strong, own_weak, sft_weak = numbers.values()
    return min(own_strong - sft_strong, sft_weak - own_weak)


LABELS = "50 tokens, 100 labels of which a fifth is random, rate 1, 120 updates"
CLAIMS = (
    Claim(
        "DFT from a good start",
        ("dft", "sft"),
        "2508.05629",
        "Weighting tokens by their probability resists noise that SFT copies.",
        f"{LABELS}, from p = 0.6",
        "probability of the right token",
        lambda seed: {"DFT": right_after("dft", 0.6, seed), "SFT": right_after("sft", 0.6, seed)},
        "holds",
        seeds=4,
    ),
    Claim(
        "DFT from a poor start",
        ("dft", "sft"),
        "2508.05629",
        "Weighting tokens by their probability is better than SFT.",
        f"{LABELS}, from p = 0.001",
        "probability of the right token",
        lambda seed: {"DFT": right_after("dft", 0.001, seed), "SFT": right_after("sft", 0.001, seed)},
        "does not hold",
        seeds=4,
        note="Its authors do not claim it beyond mathematics, where the start is good.",
    ),
    *(
        Claim(
            f"{label}: the order turns round",
            (loss, "sft"),
            "2510.00526",
            "Objectives that lean on the prior win from a strong start and lose from a weak one.",
            f"{LABELS}, from p = 0.6 and 0.001",
            "probability of the right token",
            flip(loss, label),
            found,
            effect=flips,
            effect_is="the smaller of both margins",
            seeds=4,
            note="" if loss == "dft" else "From 0.6 its steps are 160 times shorter than SFT's: it is still on its way.",
        )
        for label, loss, found in (("p", "dft", "holds"), ("p^10", "probability_power", "does not hold"))
    ),
    Claim(
        "ASFT's anchor",
        ("asft", "dft"),
        "2509.23753",
        "The anchor keeps DFT from drifting away from its start.",
        f"{LABELS}, from p = 0.6",
        "KL of the start from the policy",
        lambda seed: {"DFT": kl_from(imitated("dft", 0.6, seed), 0.6), "ASFT": kl_from(imitated("asft", 0.6, seed), 0.6)},
        "holds",
        seeds=4,
    ),
    Claim(
        "PSFT keeps entropy",
        ("psft", "sft"),
        "2508.17784",
        "The clipped surrogate keeps the policy's entropy above SFT's.",
        "50 tokens, 100 labels of which a fifth is random; 10 batches of 8 updates, rate 3, from p = 0.6",
        "entropy, nats",
        proximal,
        "not decided",
        seeds=4,
    ),
    Claim(
        "MinorSFT deviates less",
        ("minor_sft", "sft"),
        "2408.10642",
        "At equal training loss the policy is nearer to its start than SFT's.",
        "eight prompts of one token each, until the negative log-likelihood is 0.9",
        "mean absolute log-ratio",
        lambda seed: {"SFT": deviation("sft", seed), "MinorSFT": deviation("minor_sft", seed, f"{DEMOS}.advantage.scale=20.0")},
        "not decided",
    ),
    Claim(
        "entropy minimisation sharpens the mode",
        ("entropy_min",),
        "expected",
        "The most likely answer wins, be it right (the right one rises) or wrong (it falls).",
        "BANDIT with three answers, temperature 0.5 as published, 60 updates",
        "change of the right answer's probability",
        mode_wins("entropy_min", 0.5),
        "holds",
        effect=lambda n: min(n["the mode is right"], -n["the mode is wrong"]),
        effect_is="the smaller of rise and fall",
        seeds=4,
    ),
    Claim(
        "OSFT sharpens the mode",
        ("osft",),
        "expected",
        "Imitating own samples at temperature 0.6: the most likely answer wins, be it right or wrong.",
        "BANDIT with three answers, 60 updates",
        "change of the right answer's probability",
        mode_wins("osft", 0.6),
        "holds",
        effect=lambda n: min(n["the mode is right"], -n["the mode is wrong"]),
        effect_is="the smaller of rise and fall",
        seeds=4,
    ),
    Claim(
        "Self-Rewarding finds the fine-tuned policy",
        ("self_rewarding",),
        "2510.21090",
        "With a KL of weight 1, the log-ratio of the fine-tuned to the base model as reward leads to the fine-tuned model.",
        "BANDIT, 150 updates of 128 samples",
        "total variation to it",
        self_rewarded,
        "holds",
        effect=lambda n: 0.1 - n["Self-Rewarding"],
        effect_is="0.1 - distance",
        seeds=4,
    ),
    Claim(
        "several right answers",
        ("multi_target", "sft"),
        "2205.14318",
        "Own right answers beside the given one keep more kinds of right answers alive.",
        "BANDIT, four of eight answers right, one given; 60 updates",
        "distinct right answers in eight samples",
        several,
        "holds",
        seeds=4,
    ),
    Claim(
        "teacher hacking",
        ("sft",),
        "2502.02671",
        "On a fixed set of the teacher's texts the student moves away from the oracle after a while, on fresh texts it does not.",
        "Markov chain, 24 texts, fixed or fresh; 160 updates",
        "rise of the distance to the oracle",
        lambda seed: {"fixed": hacked(False, seed), "fresh": hacked(True, seed)},
        "holds",
    ),
    *(
        Claim(
            f"distillation on own samples, {what}",
            ("on_policy_distillation", "sft"),
            "2306.13649",
            "A student that cannot be its teacher does better on its own samples than on the teacher's.",
            "answers that repeat their first token, a student that does not see it; 100 updates",
            "valid answers",
            lambda seed, credit=credit: forgetful(credit, seed),
            found,
            note=note,
        )
        for what, credit, found, note in (
            ("per token", "own", "not decided", "The first token is judged by its own log-ratio alone, which is flat: nothing tells it to commit."),
            ("whole answers", "to_go", "holds", ""),
        )
    ),
)
