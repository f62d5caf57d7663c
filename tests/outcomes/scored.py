"""Claims about models that answer with a number: reward models, rewards of steps, critics."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from posttrain.advantage import Reward
from posttrain.records import Demo, Pair, Segment, Source
from tests.outcomes import bandit
from tests.outcomes.bandit import ACTIONS, REWARDS
from tests.outcomes.claims import Claim
from tests.outcomes.reinforcement import LOO, adder, hit, is_first, solved, sums
from tests.outcomes.toys import Judge, Policy, Run, Table, demo_of, prompt_of, values

SCALE = 3.0
GAE = "streams.rollouts.advantage.inner"


# -- PREF: eight answers, scored by a table --------------------------------------------------------------------------------------------------------------
def answer_judge(start: float = 0.0) -> Judge:
    return Judge(torch.full((ACTIONS,), start, dtype=torch.float64, requires_grad=True), lambda prompt, position, last, before: last, ACTIONS)


def agreement(scores: Tensor) -> float:
    """Share of new labels that the order of the scores foretells, exactly: the best possible is the Bayes rate."""
    right = []
    for a in range(ACTIONS):
        for b in range(a):
            better = 1 / (1 + math.exp(-SCALE * float(REWARDS[a] - REWARDS[b])))
            right.append(better if scores[a] > scores[b] else 1 - better)
    return sum(right) / len(right)


@cache
def reward_model(seed: int, count: int = 60, overrides: tuple[str, ...] = (), start: float = 0.0) -> Tensor:
    """Scores after 40 steps on all pairs.  A pair's margin is the difference of the true rewards, as a labeller would give it."""
    items = []
    for i, pair in enumerate(bandit.preferences(seed, count, scale=SCALE)):
        (a,), (b,) = pair.chosen.segments[-1].ids, pair.rejected.segments[-1].ids
        strength = abs(float(REWARDS[a] - REWARDS[b]))
        items.append(Pair(f"p{i}", replace(pair.chosen, rewards={"margin": strength}), replace(pair.rejected, rewards={"margin": 0.0})))
    judge = answer_judge(start)
    Run(judge, "reward_model", overrides, steps=40, rate=0.3, optimizer="adam", fixed=items).go()
    return judge.values.detach()


MARGIN, CENTRE = ("streams.pairs.advantage.gap=margin",), ("regularizers.centre.coef=0.01",)


def against_bayes(seed: int) -> dict[str, float]:
    return {"reward model": agreement(reward_model(seed)), "Bayes rate": agreement(REWARDS)}


def with_margin(seed: int) -> dict[str, float]:
    return {"margin": agreement(reward_model(seed, 30, MARGIN)), "none": agreement(reward_model(seed, 30))}


def centred(seed: int) -> dict[str, float]:
    return {name: abs(float(reward_model(seed, 60, more, 2.0).mean())) for name, more in (("centred", CENTRE), ("not", ()))}


# -- STEPS: four steps, each the last plus the prompt; the start takes each rightly with probability ``q`` ---------------------------------------------------------
V, T, PROMPTS = 6, 4, 3


def right_step(prompt: int, last: int) -> int:
    return (last + prompt + 1) % V


def walker(q: float) -> Policy:
    start = torch.zeros(PROMPTS * V, V, dtype=torch.float64)
    for p in range(PROMPTS):
        for last in range(V):
            start[p * V + last, right_step(p, last)] = math.log(q / (1 - q) * (V - 1))
    return Policy([Table(values(PROMPTS * V, V, start), lambda p, t, last: p * V + last)], V, T)


def wrong_steps(prompt: int, answer: tuple[int, ...]) -> list[int]:
    return [t for t, (last, token) in enumerate(zip((0, *answer), answer, strict=False)) if token != right_step(prompt, last)]


def walks(q: float, seed: int, count: int) -> list[tuple[int, tuple[int, ...]]]:
    prompts = [i % PROMPTS for i in range(count)]
    found = walker(q).sample(prompts, torch.Generator().manual_seed(seed))
    return [(p, tuple(t for t, _ in a)) for p, a in zip(prompts, found, strict=True)]


@cache
def planted(seed: int) -> tuple[tuple[int, tuple[int, ...], int], ...]:
    """New answers with one wrong step, and which."""
    found = [(p, a, wrong_steps(p, a)) for p, a in walks(0.8, 1000 + seed, 600)]
    return tuple((p, a, w[0]) for p, a, w in found if len(w) == 1)


def step_judge() -> Judge:
    return Judge(torch.zeros(PROMPTS * V * V, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: (p * V + before) * V + last, V)


def located_by(judge: Judge, seed: int) -> float:
    """How often the step with the lowest score is the wrong one."""
    r, hits = judge.values.detach(), []
    for p, answer, wrong in planted(seed):
        scores = [float(r[(p * V + last) * V + token]) for last, token in zip((0, *answer), answer, strict=False)]
        hits.append(float(scores.index(min(scores)) == wrong))
    return sum(hits) / len(hits)


def step_labels(seed: int) -> dict[str, float]:
    """300 answers; a tenth of the labels, of steps or of answers, is turned round."""
    flip = torch.rand(300, T, generator=torch.Generator().manual_seed(seed)) < 0.1
    steps, whole = [], []
    for i, (p, answer) in enumerate(walks(0.8, seed, 300)):
        wrong = wrong_steps(p, answer)
        segments = [Segment((token,), Source.demo, turn=t, label=float((t in wrong) == bool(flip[i, t]))) for t, token in enumerate(answer)]
        steps.append(Demo(f"d{i}", (Segment(prompt_of(p, V).ids, Source.prompt, trainable=False), *segments), prompt=prompt_of(p, V)))
        whole.append(demo_of(f"d{i}", prompt_of(p, V), answer, rewards={"label": float(bool(wrong) == bool(flip[i, 0]))}))
    process, outcome = step_judge(), step_judge()
    Run(process, "process_reward_model", steps=30, rate=0.3, optimizer="adam", fixed=steps).go()
    Run(outcome, "reward_model_pointwise", steps=30, rate=0.3, optimizer="adam", fixed=whole).go()
    return {"labels of steps": located_by(process, seed), "labels of answers": located_by(outcome, seed)}


@cache
def implicit(q: float, seed: int, count: int) -> Policy:
    """Trained on whether whole answers are right, nothing else."""
    items = [demo_of(f"d{i}", prompt_of(p, V), a, rewards={"label": float(not wrong_steps(p, a))}) for i, (p, a) in enumerate(walks(q, seed, count))]
    return Run(walker(q), "implicit_prm", steps=30, rate=0.3, optimizer="adam", fixed=items).go().policy


def located_without_labels(seed: int) -> dict[str, float]:
    own, base = (torch.log_softmax(x.tables[0].values.detach(), 1) for x in (implicit(0.8, seed, 300), walker(0.8)))
    hits = []
    for p, answer, wrong in planted(seed):
        reward = [float((own - base)[p * V + last, token]) for last, token in zip((0, *answer), answer, strict=False)]
        hits.append(float(reward.index(min(reward)) == wrong))
    return {"implicit rewards": sum(hits) / len(hits), "chance": 1 / T}


def walked(policy: Policy) -> float:
    """Probability that all steps are right, exactly, mean over prompts."""
    rows = torch.softmax(policy.tables[0].values.detach(), 1)
    total = 0.0
    for p in range(PROMPTS):
        chance, last = 1.0, 0
        for _ in range(T):
            chance, last = chance * float(rows[p * V + last, right_step(p, last)]), right_step(p, last)
        total += chance / PROMPTS
    return total


def prime(seed: int) -> dict[str, float]:
    """With process rewards and without, all else equal; the implicit model has seen 400 answers of the start."""
    out = {}
    for name, more in (("PRIME", ()), ("outcome alone", ("streams.rollouts.advantage.inner.process=0.0",))):
        run = Run(walker(0.5), "prime", more, steps=30, rate=3.0, seed=seed, reward=lambda p, a: float(not wrong_steps(p, a)), prompts=[0, 1, 2] * 2, n=4,
                  advantage=LOO, teacher=implicit(0.5, seed, 400))  # fmt: skip
        out[name] = walked(run.go().policy)
    return out


# -- critics ------------------------------------------------------------------------------------------------------------------------------------------------
def adding_critic() -> Judge:
    """Of ADD: the prompt's value before the first token, that of prompt and first token before the second."""
    return Judge(torch.zeros(36, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: (p * 2 + t) * 6 + last, 6)


def with_critic(seed: int) -> dict[str, float]:
    common: dict[str, Any] = {"steps": 40, "rate": 10.0, "seed": seed, "reward": sums, "prompts": [0, 1, 2] * 4, "n": 8}
    run = Run(adder(seed), "ppo_gae", advantage=Reward(), critic=adding_critic(), updates=2, **common).go()
    return {"PPO": solved(run.policy), "start": solved(adder(seed))}


def explained(seed: int) -> dict[str, float]:
    """Of the returns of ADD, by a critic that learnt alone for 200 steps; mean over the last 20."""
    run = Run(adder(seed), "ppo_gae", steps=200, seed=seed, reward=sums, prompts=[0, 1, 2] * 2, n=8, advantage=Reward(), critic=adding_critic(), critic_alone=200).go()
    last = [m["critic/explained_variance"] for m in run.metrics[-20:]]
    answers, logp = adder(seed).all_answers(3)
    right = torch.stack([((answers[:, 0] + p) % 6 == answers[:, 1]).double() for p in range(3)])
    joint, first = (logp.exp() * right).view(3, 6, 6).sum(2), logp.exp().view(3, 6, 6).sum(2)
    mean = joint.sum(1).mean()
    known = ((joint.sum(1) - mean) ** 2).mean() + (first * (joint / first - mean) ** 2).sum(1).mean()
    return {"explained": sum(last) / len(last), "by the true values": float(known / 2 / (mean * (1 - mean)))}


SPREAD = [0.05, 0.3, 0.7, 0.95]


def critic_variance(seed: int) -> dict[str, float]:
    """Variance of one step over its squared mean, prompts of four difficulties, two answers each; the critic learnt for 80 steps, or says 0."""

    def critic() -> Judge:
        return Judge(torch.zeros(len(SPREAD), dtype=torch.float64, requires_grad=True), lambda p, t, last, before: p, 8)

    learnt, common = critic(), {"reward": is_first, "prompts": [0, 1, 2, 3] * 2, "n": 2, "advantage": Reward()}
    Run(hit(SPREAD), "ppo_gae", steps=80, seed=seed, critic=learnt, critic_alone=80, critic_rate=0.5, **common).go()
    out = {}
    for name, made in (("critic", learnt), ("none", critic())):
        moves = []
        for i in range(40):
            policy = hit(SPREAD)
            before = policy.tables[0].values.detach().clone()
            Run(policy, "ppo_gae", steps=1, rate=1.0, seed=1000 * seed + i, critic=made.copy(), critic_rate=0.0, **common).go()
            moves.append((policy.tables[0].values.detach() - before).flatten())
        found = torch.stack(moves)
        out[name] = float(found.var(0).sum() / found.mean(0).square().sum())
    return {"none": out["none"], "critic": out["critic"]}


CLAIMS = (
    Claim(
        "a reward model and the Bayes rate",
        ("reward_model",),
        "2203.02155",
        "The order of the scores foretells new labels nearly as well as is possible (within 0.02).",
        "PREF, 60 pairs, 40 updates",
        "share of labels foretold",
        against_bayes,
        "not decided",
        effect=lambda n: n["reward model"] - n["Bayes rate"] + 0.02,
        effect_is="difference + 0.02",
        seeds=8,
    ),
    Claim(
        "a margin by strength of preference",
        ("reward_model",),
        "2307.09288",
        "Subtracting a margin where the preference is strong makes a reward model more accurate.",
        "PREF, 30 pairs, the margin is the difference of the rewards; 40 updates",
        "share of labels foretold",
        with_margin,
        "not decided",
        seeds=8,
        note="A table shares nothing between answers: the margin moves only the order of answers that few pairs speak of.",
    ),
    Claim(
        "centred scores",
        ("reward_model",),
        "2312.09244",
        "A penalty on the sum of a pair's scores draws their mean to 0; without it nothing does.",
        "PREF, 60 pairs, scores begin at 2; 40 updates",
        "absolute mean of the scores",
        centred,
        "holds",
        effect=lambda n: n["not"] - n["centred"] - 0.5,
        effect_is="difference - 0.5",
    ),
    Claim(
        "labels of steps find the wrong step",
        ("process_reward_model", "reward_model_pointwise"),
        "2305.20050",
        "A model trained on labels of steps finds the wrong step more often than one trained on labels of answers.",
        "STEPS, 300 answers, a tenth of the labels turned round; 30 updates",
        "wrong step has the lowest score",
        step_labels,
        "holds",
        effect=lambda n: n[next(iter(n))] - list(n.values())[1] - 0.5,
        effect_is="difference - 0.5",
    ),
    Claim(
        "a reward of steps without labels of steps",
        ("implicit_prm",),
        "2412.01981",
        "A model trained on outcomes as a log-ratio gives the wrong step the lowest reward more often than chance.",
        "STEPS, 300 answers, 30 updates",
        "wrong step has the lowest reward",
        located_without_labels,
        "holds",
    ),
    Claim(
        "PRIME against the outcome alone",
        ("prime", "implicit_prm"),
        "2502.01456",
        "Implicit process rewards learn faster than the outcome alone.",
        "STEPS, four answers a prompt, 30 steps of 24 answers; the implicit model is fixed",
        "probability that all steps are right",
        prime,
        "not decided",
    ),
    Claim(
        "PPO with a critic solves ADD",
        ("ppo_gae", "value"),
        "1707.06347",
        "PPO with a critic that starts from nothing reaches 0.9.",
        "ADD, 40 steps of 96 rollouts, two updates each",
        "success",
        with_critic,
        "holds",
        effect=lambda n: n["PPO"] - 0.9,
        effect_is="above 0.9",
        seeds=3,
    ),
    Claim(
        "a critic explains the returns",
        ("ppo_gae", "value"),
        "expected",
        "After 200 steps alone a critic explains more than half of the variance of the returns.",
        "ADD, 200 steps of 48 rollouts",
        "explained variance",
        explained,
        "does not hold",
        effect=lambda n: n["explained"] - 0.5,
        effect_is="explained - 0.5",
        seeds=3,
        note="Nor can any critic: what the start has said so far decides little of how it ends.",
    ),
    Claim(
        "a critic's baseline lowers the variance",
        ("ppo_gae", "value"),
        "1506.02438",
        "With a critic's values as baseline the gradient varies less than without.",
        "BANDIT, prompts of four difficulties, two answers each, 40 steps from one start",
        "variance over squared mean",
        critic_variance,
        "holds",
        seeds=4,
    ),
)
