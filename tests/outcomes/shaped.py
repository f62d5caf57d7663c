"""Claims about which samples are kept, where rewards are paid, how ratios scatter, and about transcripts with actions and observations."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from posttrain.advantage import Chain, Constant, Extremes, Placed, PromptBaseline, Reward, soft_maximum
from posttrain.advantage.shape import Diverse, TailRisk
from posttrain.data.rows import to_rows
from posttrain.mixture.thoughts import BeforeText
from posttrain.records import Demo, Group, Rollout, Score, Segment, Source, TokenBatch
from posttrain.reward.judge import Labels, PairJudge
from tests.loss.cases import composed
from tests.outcomes import bandit
from tests.outcomes.bandit import ACTIONS, REWARDS
from tests.outcomes.claims import Claim
from tests.outcomes.preference import shifted
from tests.outcomes.reinforcement import CENTER, NORM, chances, hit, is_first, length_of, stopper
from tests.outcomes.scored import PROMPTS, SCALE, T, V, right_step, walked, walker
from tests.outcomes.supervised import chain, divergence, sampled
from tests.outcomes.toys import Judge, Policy, Run, Table, demo_of, number_of, one_row, probabilities, prompt_of, values

# -- best-of-K on BANDIT ------------------------------------------------------------------------------------------------------------------------------------------------
KS = (1, 4, 16)


def order_statistic(k: int) -> float:
    """Mean reward of the best of ``k``: answer j, in the order of rewards, with probability F_j^k - F_(j-1)^k."""
    at = [0.0, *accumulate(bandit.logp(bandit.policy()).exp().tolist())]
    return sum(float(REWARDS[j]) * (at[j + 1] ** k - at[j] ** k) for j in range(ACTIONS))


def kept(seed: int) -> dict[str, float]:
    """Mean reward of what RAFT learns from, 8000 samples at each K."""
    pick = Chain({"one": Constant(unscored=False), "best": Extremes(best=1, worst=0)})
    out = {}
    for k in KS:
        policy = bandit.policy()
        run = Run(policy, "raft", reward=lambda p, a: float(REWARDS[a[0]]), prompts=[0] * (8000 // k), n=k, advantage=pick)
        rows = to_rows(run.sampled(policy, 0, 0.0, torch.Generator().manual_seed(100 * seed + k)))
        out[f"K = {k}"] = sum(row.rewards["reward"] for row in rows) / len(rows)
    return out


def off_by(numbers: Mapping[str, float]) -> float:
    return 0.05 - max(abs(found - order_statistic(k)) for k, found in zip(KS, numbers.values(), strict=True))


# -- DARLING: three of eight answers are right, one of them is liked from the start --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Classified:
    """Every answer is a class of its own."""

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return [replace(g, rollouts=tuple(replace(r, scores={"class": Score(float(r.segments[0].ids[0]))}) for r in g.rollouts)) for g in groups]


def distinct(advantage: Any, seed: int) -> float:
    """Effective number of right answers when 0.9 are right; of the start's policy 0.4 are."""
    start = torch.tensor([0.28, 0.06, 0.06, *[0.12] * 5], dtype=torch.float64).log()
    policy = Policy([Table(values(1, 8, start), one_row)], 8)
    found: list[float] = []

    def watch(run: Run, step: int) -> None:
        p = probabilities(run.policy)
        if not found and float(p[:3].sum()) >= 0.9:
            share = p[:3] / p[:3].sum()
            found.append(math.exp(-float((share * share.log()).sum())))

    Run(policy, "darling", steps=120, rate=1.0, seed=seed, reward=lambda p, a: float(a[0] < 3), prompts=[0] * 8, n=8, advantage=advantage, watch=watch).go()
    return found[0] if found else math.nan


def diverse(seed: int) -> dict[str, float]:
    return {"DARLING": distinct(Chain({"class": Classified(), "shape": Diverse(), "center": CENTER}), seed), "reward alone": distinct(CENTER, seed)}


# -- fine-grained rewards on STEPS ---------------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Earned:
    """A quarter for every right step, paid there or all at the end."""

    there: bool

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        return Placed()([replace(g, rollouts=tuple(self._one(r) for r in g.rollouts)) for g in groups])

    def _one(self, r: Rollout) -> Rollout:
        if not self.there:
            return r
        ids = r.segments[0].ids
        return replace(r, paid=tuple(float(token == right_step(int(r.prompt.answer), last)) / T for last, token in zip((0, *ids), ids, strict=False)))


def steps_right(prompt: int, answer: tuple[int, ...]) -> float:
    return sum(token == right_step(prompt, last) for last, token in zip((0, *answer), answer, strict=False)) / T


@cache
def walked_by(there: bool, seed: int) -> tuple[float, float]:
    """Steps until 0.8 of the walks are right, and the share in the end, after 80."""
    reached: list[int] = []

    def watch(run: Run, step: int) -> None:
        if not reached and walked(run.policy) >= 0.8:
            reached.append(step + 1)

    critic = Judge(torch.zeros(PROMPTS * T * V, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: (p * T + t) * V + last, V)
    policy = walker(0.5)
    Run(policy, "fine_grained", ("streams.rollouts.advantage.inner.coef=0.0",), steps=80, rate=5.0, seed=seed, reward=steps_right, prompts=[0, 1, 2] * 2, n=8, advantage=Earned(there),
        critic=critic, watch=watch).go()  # fmt: skip
    return float(reached[0] if reached else 81), walked(policy)


def placed(seed: int) -> dict[str, float]:
    there, end = walked_by(True, seed), walked_by(False, seed)
    return {"steps, paid where earned": there[0], "steps, paid at the end": end[0], "share, paid where earned": there[1], "share, paid at the end": end[1]}


def sooner_and_as_far(n: Mapping[str, float]) -> float:
    there, end, last_there, last_end = n.values()
    return min(1 - there / end, 0.05 - abs(last_there - last_end))


# -- ratios under NOISE --------------------------------------------------------------------------------------------------------------------------------------------------
def ratios(loss: str, length: int, sigma: float, seed: int, *overrides: str) -> Tensor:
    """Weight over advantage and count of 2000 answers of ``length`` tokens whose recorded log-probs are off by a normal error: the ratio that is learnt with, per token."""
    draw = torch.Generator().manual_seed(seed)
    policy = Policy([Table(values(length * 6, 6, torch.randn(length * 6, 6, generator=draw, dtype=torch.float64)), lambda p, t, last: t * 6 + last)], 6, length)
    run = Run(policy, loss, reward=lambda p, a: 1.0, prompts=[0], n=2000, advantage=Constant(), noise=lambda x, g: [v + sigma * float(torch.randn((), generator=g)) for v in x])
    batch = TokenBatch.from_sequences(to_rows(run.sampled(policy, 0, 0.0, draw)), dtype=torch.float64)
    batch = batch.with_logps(current=policy.rows(batch).gather(1, batch.target_ids[:, None])[:, 0].detach(), old=batch.logps["behaviour"])
    return composed(loss, overrides).weights(batch)[batch.trainable] * 2000 * length


def falls_with_length(seed: int) -> dict[str, float]:
    """Variance of GSPO's ratio times the number of tokens, sigma 0.1, without its clip."""
    found = {t: ratios("gspo", t, 0.1, seed, "streams.rollouts.masks.clip=null").view(-1, t)[:, 0] for t in (1, 4, 16)}
    return {f"T = {t}": t * float(s.var()) for t, s in found.items()}


def of_the_ratio(seed: int) -> dict[str, float]:
    """Variance of the ratio that tokens are learnt with, 16 tokens, sigma 0.3; with clipped tokens, whose weight is 0, and without."""
    found = {"GRPO": ratios("grpo", 16, 0.3, seed), "GMPO": ratios("gmpo", 16, 0.3, seed)}
    return {**{name: float(r.var()) for name, r in found.items()}, **{f"{name}, of unclipped tokens": float(r[r != 0].var()) for name, r in found.items()}}


# -- a judge of pairs with a bias of position ----------------------------------------------------------------------------------------------------------------------------
def first_wins(a: int, b: int) -> float:
    return 1 / (1 + math.exp(-SCALE * float(REWARDS[a] - REWARDS[b]) - 1.0))


def position(seed: int) -> dict[str, float]:
    """How much oftener than not an answer is said to win for standing first: mean over pairs of P(a beats b, a first) + P(b beats a, b first) - 1, for a judge that learnt from
    600 labels whose log-odds had 1 added for what stood first."""
    rng, seen = random.Random(seed), Counter[tuple[int, int, bool]]()
    for _ in range(600):
        a, b = rng.sample(range(ACTIONS), 2)
        seen[a, b, rng.random() < first_wins(a, b)] += 1
    items = [
        replace(demo_of(f"d{i}", prompt_of(0, ACTIONS), (a, b), rewards={"label": float(first)}), weight=count * len(seen) / 600) for i, ((a, b, first), count) in enumerate(seen.items())
    ]
    judge = Judge(torch.zeros(ACTIONS * ACTIONS, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: before * ACTIONS + last, ACTIONS)
    Run(judge, "reward_model_pointwise", steps=100, rate=0.1, optimizer="adam", fixed=items).go()
    first = torch.sigmoid(judge.values.detach()).view(ACTIONS, ACTIONS)
    pairs = [(a, b) for a in range(ACTIONS) for b in range(a)]
    out = {"planted": sum(first_wins(a, b) + first_wins(b, a) - 1 for a, b in pairs) / len(pairs)}
    for name, orders in (("one order", "one"), ("both orders", "log_odds")):
        decide = PairJudge("{prompt} {a} {b}", Labels({"A": 1.0, "B": 0.0}), orders=orders).decide  # type: ignore[arg-type]
        wins = {(a, b): decide(float(first[a, b]), None if orders == "one" else float(first[b, a])) for x, y in pairs for a, b in ((x, y), (y, x))}
        out[name] = sum(wins[a, b] + wins[b, a] - 1 for a, b in pairs) / len(pairs)
    return out


# -- distillation from texts the student wrote once ----------------------------------------------------------------------------------------------------------------------
def stored(seed: int) -> dict[str, float]:
    """KL from the teacher's whole answers to the student's, after 80 updates on 48 texts."""
    out, teacher = {}, chain(seed)
    for name, loss in (("likelihood of the teacher's texts", "sft"), ("its distributions on the student's texts", "offline_kd"), ("the same, on new texts each time", "offline_kd")):
        student, draw = Policy([Table(values(18, 6), lambda p, t, last: t * 6 + last)], 6, 3), torch.Generator().manual_seed(seed)
        texts = sampled(teacher if loss == "sft" else student, draw, 48)
        given: Any = texts if "new" not in name else lambda step, student=student, draw=draw: sampled(student, draw, 48)
        Run(student, loss, steps=80, rate=5.0, fixed=given, teacher=teacher).go()
        out[name] = divergence(teacher, student)
    return out


# -- two arms, one of them good ------------------------------------------------------------------------------------------------------------------------------------------
def transcripts(rng: random.Random, expert: bool, count: int = 1000) -> list[Demo]:
    """An arm, what came of it (a token for arm and outcome; the good arm pays 3 times in 4, the other once), an arm.  The expert knows the good one; a learner tries either, and the label is
    what the expert would have done.  Equal transcripts are one, with a weight."""
    prompt, seen = prompt_of(0, 6), Counter[tuple[int, int, int]]()
    for _ in range(count):
        good = rng.randrange(2)
        took = good if expert else rng.randrange(2)
        seen[good, took, 2 + 2 * took + (rng.random() < (0.75 if took == good else 0.25))] += 1
    out = []
    for (good, took, outcome), times in seen.items():
        parts = (Segment(prompt.ids, Source.prompt, trainable=False), Segment((good,), Source.demo, inputs=(took,)), Segment((outcome,), Source.tool), Segment((good,), Source.demo))
        out.append(Demo(f"{good}{took}{outcome}", parts, weight=times * len(seen) / count, prompt=prompt))
    return out


def believed(expert: bool, seed: int) -> float:
    """Mean distance of P(the same arm again) from the posterior, over the four histories of an own first action."""
    policy = Policy([Table(values(18, 6), lambda p, t, last: t * 6 + last)], 6, 3)
    Run(policy, "sft", steps=60, rate=20.0, fixed=transcripts(random.Random(seed), expert)).go()
    off = [abs(float(probabilities(policy, 0, 2, 2 + 2 * arm + paid)[arm]) - (0.75 if paid else 0.25)) for arm in (0, 1) for paid in (0, 1)]
    return sum(off) / len(off)


def deluded(seed: int) -> dict[str, float]:
    return {"the expert's transcripts": believed(True, seed), "own actions, relabelled": believed(False, seed)}


# -- a ring of places whose names mean nothing ---------------------------------------------------------------------------------------------------------------------------
RING, RATE = 12, 0.1


@dataclass
class Walker:
    """Places have vectors; an action is read off the vector of the place, and where it leads is a place whose vector is near the moved one.  Tokens: the places, then back and on."""

    place: Tensor
    act: Tensor
    move: Tensor
    vocabulary: int = RING + 2

    def copy(self) -> Walker:
        return replace(self, place=self.place.detach().clone(), act=self.act.detach().clone(), move=self.move.detach().clone())

    def trained(self) -> list[Tensor]:
        return [self.place, self.act, self.move]

    def at(self, prompt: Tensor, position: Tensor, last: Tensor) -> Tensor:
        here = self.place[prompt]
        action = torch.cat([torch.full((len(prompt), RING), -30.0, dtype=torch.float64), here @ self.act], 1)
        moved = torch.einsum("ni,nij->nj", here, self.move[(last - RING).clamp(0, 1)])
        there = torch.cat([moved @ self.place.T, torch.full((len(prompt), 2), -30.0, dtype=torch.float64)], 1)
        return torch.where((position == 0)[:, None], action, there)

    def rows(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        prompt = batch.input_ids[batch.cu_seqlens[:-1]][batch.seq] - self.vocabulary
        return torch.log_softmax(self.at(prompt, batch.positions, batch.input_ids) / temperature, -1)


def the_way(place: int) -> int:
    """To place 0 by the shorter side."""
    return RING + (place > RING // 2)


@cache
def found_way(worlds: int, seed: int, updates: int = 80) -> float:
    """Share of the places without a demonstration from which the right action is the likelier one, after ``updates`` of which ``worlds`` were on what own actions led to."""
    draw, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    places = [p for p in range(RING) if p not in (0, RING // 2)]
    shown = rng.sample(places, 5)
    make = lambda *shape: (0.5 * torch.randn(*shape, generator=draw, dtype=torch.float64)).requires_grad_()  # noqa: E731
    policy = Walker(make(RING, 4), make(4, 2), make(2, 4, 4))
    experts = [demo_of(f"e{p}", prompt_of(p, policy.vocabulary), (the_way(p),)) for p in shown]
    tried, branches = Counter((p, RING + rng.randrange(2)) for p in shown for _ in range(8)), []
    for (p, action), times in tried.items():
        there, prompt = (p + (1 if action == RING + 1 else -1)) % RING, prompt_of(p, policy.vocabulary)
        own = Segment((action,), Source.policy, logprobs=(0.0,), version=0, trainable=False)
        parts = (Segment(prompt.ids, Source.prompt, trainable=False), own, Segment((there,), Source.tool, trainable=(True,)))
        branches.append(Demo(f"b{p}.{action}", parts, weight=times * len(tried) / (8 * len(shown)), prompt=prompt))
    if worlds:
        Run(policy, "world_model", steps=worlds, rate=RATE, optimizer="adam", fixed=branches).go()
    Run(policy, "sft", steps=updates - worlds, rate=RATE, optimizer="adam", fixed=experts).go()
    rest = torch.tensor([p for p in places if p not in shown])
    logits = policy.at(rest, torch.zeros_like(rest), rest).detach()
    return float((logits.argmax(1) == torch.tensor([the_way(int(p)) for p in rest])).double().mean())


def world(seed: int) -> dict[str, float]:
    """Five draws of places and vectors to a seed."""
    mean: Callable[[int], float] = lambda worlds: sum(found_way(worlds, 10 * seed + i) for i in range(5)) / 5  # noqa: E731
    return {"world model, then imitation": mean(40), "imitation alone": mean(0)}


# -- regression on rewards against a value known beforehand, feedback, tails, lengths ------------------------------------------------------------------------------------------
def starred(seed: int) -> dict[str, float]:
    """Total variation to the KL-regularised optimum at beta 1 after 200 steps of 32 answers of the base; the optimal value from eight other base samples, or exactly."""
    start, out = shifted(seed), {}
    base = torch.softmax(start, 0)
    exact = float((base * REWARDS.exp()).sum().log())
    eight = soft_maximum(REWARDS[torch.multinomial(base, 8, replacement=True, generator=torch.Generator().manual_seed(seed))].tolist(), 1.0)
    for name, v in (("from eight", eight), ("exactly", exact)):
        draw = torch.Generator().manual_seed(1000 + seed)

        def batch(step: int, draw: torch.Generator = draw, v: float = v) -> list[Group]:
            found = torch.multinomial(base, 32, replacement=True, generator=draw).tolist()
            groups = [bandit.group([a], logps=base.log(), name=f"g{i}") for i, a in enumerate(found)]
            return PromptBaseline("v_star")([replace(g, prompt=replace(g.prompt, meta={"v_star": v})) for g in groups])

        policy = bandit.policy(start)
        Run(policy, "a_star_po", ("streams.rollouts.advantage.coef=1.0", "streams.rollouts.coef=2.0"), steps=200, rate=0.3, seed=seed, fixed=batch).go()
        out[name] = bandit.distance(policy, bandit.optimum(1.0, start))
    return out


def told(seed: int) -> dict[str, float]:
    """Probability of the best answer after 150 steps on a teacher's word: whether the answer was better than the policy is on average."""
    policy = bandit.policy()
    best = float(probabilities(policy)[-1])
    feedback: Callable[[int, tuple[int, ...]], float] = lambda p, a: math.copysign(1.0, float(REWARDS[a[0]]) - bandit.expected(policy))  # noqa: E731
    Run(policy, "coach", steps=150, rate=1.0, seed=seed, reward=feedback, prompts=[0] * 8, n=8, advantage=Reward()).go()
    return {"told": float(probabilities(policy)[-1]), "start": best}


def hardest(loss: str, advantage: Any, seed: int) -> float:
    """Success on the hardest of five prompts when the mean is first 0.6."""
    policy = hit([0.05, 0.1, 0.3, 0.5, 0.7])
    found: list[float] = []

    def watch(run: Run, step: int) -> None:
        p = chances(run.policy)
        if not found and sum(p) / len(p) >= 0.6:
            found.append(p[0])

    Run(policy, loss, steps=150, rate=3.0, seed=seed, reward=is_first, prompts=[0, 1, 2, 3, 4] * 4, n=8, advantage=advantage, watch=watch).go()
    return found[0] if found else chances(policy)[0]


def tail(seed: int) -> dict[str, float]:
    return {"RiskPO": hardest("riskpo", TailRisk(), seed), "GRPO": hardest("grpo", NORM, seed)}


def lengthened(right: float, seed: int) -> float:
    """Change of the expected length after 20 steps in which an answer is right with this probability whatever its length, paid 1 or -1; values are 0."""
    policy, rng = stopper(), random.Random(seed)
    before = length_of(policy)
    critic = Judge(torch.zeros(1, dtype=torch.float64, requires_grad=True), lambda p, t, last, before: torch.zeros_like(p), 4)
    Run(policy, "concise_rl", steps=20, rate=0.3, seed=seed, reward=lambda p, a: 1.0 if rng.random() < right else -1.0, prompts=[0] * 16, n=8, advantage=Reward(), critic=critic,
        critic_rate=0.0).go()  # fmt: skip
    return length_of(policy) - before


def copies(says: Callable[[int, random.Random], int], seed: int) -> float:
    """Probability that a thought copies the prompt's key, after 60 steps on text alone: thought 0 or 1, and behind it word 2 or 3, which the policy finds likely
    behind thought 0 or 1.  ``says``: the text's next word behind a key."""
    rng, before = random.Random(seed), BeforeText("", "", encode=lambda word: (int(word),))
    start = torch.tensor([[0.0, 0.0, -3.0, -3.0]] * 2 + [[-5.0, -5.0, 1.5, -1.5], [-5.0, -5.0, -1.5, 1.5]], dtype=torch.float64)
    policy = Policy([Table(values(4, 4, start), lambda p, t, last: torch.where(t == 0, p, 2 + last.clamp(max=1)))], 4)

    def gate(items: Sequence[Any], demos: Any, step: int, progress: float) -> list[Any]:
        told = {id(g): str(says(number_of(g.prompt), rng)) for g in items}
        return before([replace(g, rollouts=tuple(replace(r, prompt=replace(r.prompt, answer=told[id(g)])) for r in g.rollouts)) for g in items], demos, step, progress)

    Run(policy, "rlp", steps=60, rate=1.0, seed=seed, reward=lambda p, a: 0.0, prompts=[0, 1] * 4, n=8, advantage=Constant(), gate=gate, base_every=1, base_mix=0.1).go()
    return sum(float(probabilities(policy, key)[key]) for key in (0, 1)) / 2


def thoughts(seed: int) -> dict[str, float]:
    return {"the word is the key": copies(lambda key, rng: 2 + key, seed), "the word is any": copies(lambda key, rng: 2 + rng.randrange(2), seed)}


CLAIMS = (
    Claim(
        "thoughts are learnt from plain text",
        ("rlp",),
        "2510.01265",
        "Paid only with what it tells of the text's next word, a thought comes to copy the key that the word hangs on (above 0.9).",
        "COPY, two keys, two thoughts, 60 steps of 64 thoughts, a copy that follows by a tenth",
        "probability of copying the key",
        thoughts,
        "holds",
        effect=lambda n: n["the word is the key"] - 0.9,
        effect_is="above 0.9",
        seeds=4,
        note="Of words that hang on nothing no thought gains on average, and single runs wander: that they stay near one half was asked first and does not hold.",
    ),
    Claim(
        "A*-PO's optimum from eight base samples",
        ("a_star_po",),
        "expected",
        "With the optimal value estimated from eight samples of the base the regression ends near the KL-regularised optimum (within 0.05).",
        "BANDIT, answers of the base, beta 1 in both places (published: 0.5 and 0.001), 200 steps of 32",
        "total variation to the optimum",
        starred,
        "does not hold",
        effect=lambda n: 0.05 - n["from eight"],
        effect_is="0.05 - distance from eight",
        note="With the exact value it does: rewards from -2 to 2 at beta 1 make the value hang on answers that eight samples may not hold.",
    ),
    Claim(
        "COACH and a teacher who says better or worse",
        ("coach",),
        "expected",
        "Feedback that is the sign of the advantage leads to the best answer (above 0.9).",
        "BANDIT, 150 steps of 64 answers",
        "probability of the best answer",
        told,
        "not decided",
        effect=lambda n: n["told"] - 0.9,
        effect_is="above 0.9",
        seeds=4,
        note="Every answer better than the average is told so alike, and the run may stay with the second best.",
    ),
    Claim(
        "RiskPO and the hard tail",
        ("riskpo", "grpo"),
        "2510.00911",
        "The hardest prompt is solved more often than under GRPO when the mean is the same.",
        "BANDIT, five prompts of different difficulty in a bundle, when 0.6 are right on average",
        "success on the hardest",
        tail,
        "does not hold",
        seeds=4,
        note="A question's credit is over the deviation of its rewards, as in the release's maths run.",
    ),
    Claim(
        "length as a by-product of lambda",
        ("concise_rl",),
        "2504.05185",
        "With values near 0 and lambda 0.95, answers that are mostly right (0.7) grow shorter and answers that never are grow longer.",
        "LENGTH, success independent of length, rewards 1 and -1, 20 steps of 128 answers",
        "change of the expected length",
        lambda seed: {"right 7 times in 10": lengthened(0.7, seed), "never right": lengthened(0.0, seed)},
        "holds",
        effect=lambda n: min(-n["right 7 times in 10"], n["never right"]),
        effect_is="the smaller of what one lost and the other gained",
        seeds=4,
    ),
    Claim(
        "best of K and the order statistic",
        ("raft",),
        "expected",
        "The mean reward of what is kept rises with K as the order statistic says (within 0.05).",
        "BANDIT, 8000 samples at each K",
        "mean reward of the kept",
        kept,
        "holds",
        seeds=4,
        effect=off_by,
        effect_is="0.05 - largest distance from the order statistic",
        note="Exactly, by the order statistic: " + ", ".join(f"{order_statistic(k):.3f} (K = {k})" for k in KS) + ".",
    ),
    Claim(
        "DARLING and distinct right answers",
        ("darling",),
        "2509.02534",
        "With diversity in the reward more right answers are in use, at equal accuracy.",
        "BANDIT, three of eight answers right, one of them liked from the start; when 0.9 are right",
        "effective number of right answers",
        diverse,
        "holds",
        seeds=4,
    ),
    Claim(
        "rewards where they are earned",
        ("fine_grained",),
        "2306.01693",
        "Paid step by step the policy learns in fewer steps than paid at the end, and gets as far (within 0.05).",
        "STEPS, four steps, a quarter for each right one, a critic; until 0.8 of the answers are right, and after 80 steps of 48 answers",
        "steps; share of right answers",
        placed,
        "holds",
        effect=sooner_and_as_far,
        effect_is="the share of steps saved, and 0.05 - distance in the end, the smaller",
        seeds=4,
    ),
    Claim(
        "GSPO's ratio and the length",
        ("gspo",),
        "expected",
        "Where recorded log-probs are noisy, the variance of the ratio falls as 1/T: times T it stays (within a fifth).",
        "NOISE, deviation 0.1, 2000 answers of 1, 4 and 16 tokens",
        "variance of the ratio, times T",
        falls_with_length,
        "holds",
        effect=lambda n: 0.2 - max(abs(v / 0.01 - 1) for v in n.values()),
        effect_is="0.2 - largest relative distance from 0.01",
        seeds=4,
    ),
    Claim(
        "GMPO's ratio and GRPO's",
        ("gmpo", "grpo"),
        "2507.20673",
        "The ratio that tokens are learnt with varies less.",
        "NOISE, deviation 0.3, 2000 answers of 16 tokens",
        "variance of the ratio",
        of_the_ratio,
        "holds",
        effect=lambda n: min(n["GRPO"] - n["GMPO"], n["GRPO, of unclipped tokens"] - n["GMPO, of unclipped tokens"]),
        effect_is="GRPO less GMPO, the smaller of the two",
        seeds=4,
    ),
    Claim(
        "a judge asked in both orders",
        ("reward_model_pointwise",),
        "expected",
        "A judge asked in one order has the bias of position it was taught (within a quarter); averaging the log-odds of both orders removes it exactly.",
        "PREF, a judge of pairs trained on 600 labels biased by 1 in log-odds",
        "bias: P + P swapped - 1",
        position,
        "holds",
        effect=lambda n: min(0.25 - abs(n["one order"] / n["planted"] - 1), 1e-9 - abs(n["both orders"])),
        effect_is="0.25 - relative distance of one order, and 1e-9 - bias of both, the smaller",
        seeds=4,
    ),
    Claim(
        "distillation from texts written once",
        ("offline_kd", "sft"),
        "expected",
        "The teacher's whole distributions on stored texts of the student teach more than as many texts of the teacher.",
        "a Markov chain of three tokens, 48 texts, 80 updates",
        "KL(teacher || student) of answers",
        stored,
        "holds",
    ),
    Claim(
        "own actions are no evidence",
        ("sft",),
        "2110.10819",
        "A policy fitted to the expert's transcripts is certain after its own first action (further than 0.2 from the posterior); fitted to its own actions under the expert's labels, "
        "masked elsewhere, it stays on the posterior (within 0.05).",
        "two arms, the good one hidden; 1000 transcripts",
        "distance from the posterior",
        deluded,
        "holds",
        effect=lambda n: min(n["the expert's transcripts"] - 0.2, 0.05 - n["own actions, relabelled"]),
        effect_is="distance of the first - 0.2, and 0.05 - distance of the second, the smaller",
        seeds=4,
    ),
    Claim(
        "what own actions lead to, before imitation",
        ("world_model", "sft"),
        "secondary",
        "At equal updates, half of them on outcomes of own actions, imitation is right more often from places never shown.",
        "a ring of twelve places, vectors shared by actions and outcomes, five places shown, 80 updates, five draws to a seed",
        "right from places not shown",
        world,
        "not decided",
        seeds=4,
        note="Both are at chance: nothing that either arm learns here says where a place lies that was neither shown nor reached, so the run decides nothing about the method.",
    ),
)
