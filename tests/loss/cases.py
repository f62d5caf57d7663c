"""Random ragged data in both forms, plain dicts for the naive transcriptions and a TokenBatch for the package, and the table of what is compared."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from posttrain.advantage import GroupAdvantage, Reward
from posttrain.loss import Objective, load
from posttrain.records import Group, Prompt, Rollout, Row, Score, Segment, Source, TokenBatch
from tests.loss import naive

POLICIES = ("old", "behaviour", "base")


@dataclass
class Data:
    """The same sequences twice: ``seqs`` as dicts of lists, ``rows`` as records, in the same order."""

    seqs: list[naive.Sequence]
    rows: list[Row]
    model: naive.TinyCausal

    def batch(self) -> TokenBatch:
        """Packed, with the model's log-probs as ``current``."""
        batch = TokenBatch.from_sequences(self.rows, fresh=False, dtype=torch.float64)
        return batch.with_logps(current=self.logp(batch).detach())

    def logp(self, batch: TokenBatch) -> Tensor:
        return self.rows_of(batch).gather(1, batch.target_ids[:, None])[:, 0]

    def rows_of(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities over the vocabulary, ``[N, V]``."""
        return self.model.packed(batch.input_ids, batch.positions, batch.seq)

    def naive_gradient(self, objective: naive.Objective) -> Tensor:
        """Gradient of ``-J`` with respect to the model, every sequence scored alone."""
        for s in self.seqs:
            rows = self.model.rows_alone(s["ids"])
            s["rows"] = [None, *rows.unbind()]
            s["l"] = [None, *(row[i] for row, i in zip(rows.unbind(), s["ids"][1:], strict=True))]
        return flat(torch.autograd.grad(-objective(self.seqs), list(self.model.parameters()), allow_unused=True), self.model)


def columns(objective: Objective, rows: Tensor) -> dict[str, Tensor]:
    """The full-vocabulary columns an objective needs, from log-probabilities ``[N, V]``; base and teacher are fixed other distributions.
    Logits are the log-probabilities plus half the first of them, whose log-sum-exp is that half."""
    p, out = rows.exp(), {}
    for name in objective.needs.columns:
        kind, _, to = name.partition(":")
        if not to:
            out[name] = {"entropy": -(p * rows).sum(1), "logp_greedy": rows.max(1).values, "logsumexp": rows[:, 0] / 2}[kind]
            continue
        logq = {"base": naive.base_row, "teacher": naive.teacher_row}[to](rows.shape[1])
        if kind == "kl_reverse":
            out[name] = (p * (rows - logq)).sum(1)
        elif kind == "kl_forward":
            out[name] = (logq.exp() * (logq - rows)).sum(1)
        else:
            beta = float(kind.removeprefix("jsd_"))
            logm = torch.log(beta * logq.exp() + (1 - beta) * p)
            out[name] = (beta * logq.exp() * (logq - logm) + (1 - beta) * p * (rows - logm)).sum(1)
    return out


def stand_ins(objective: Objective, batch: TokenBatch) -> dict[str, Tensor]:
    """Full-vocabulary columns where there is no model: zeros with a gradient of their own."""
    return {name: torch.zeros_like(batch.logps["current"]).requires_grad_() for name in objective.needs.columns}


def flat(grads: tuple[Tensor | None, ...], model: torch.nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, model.parameters(), strict=True)])


@cache
def make(seed: int, advantage: Callable | None = None, spread: float = 0.25) -> Data:
    """Nine rollouts (groups of 4, 3 and a dead one of 2; one wholly untrainable; tool tokens inside), three pairs and two demonstrations."""
    rng, guess = random.Random(seed), random.Random(seed + 1000)
    model = naive.TinyCausal(seed=seed)
    seqs: list[naive.Sequence] = []
    reward = {"q1": [1.0, 0.0, 0.25, 0.0], "q2": [0.0, 1.0, 1.0], "q3": [1.0, 1.0]}
    for question, values in reward.items():
        prompt = [rng.randrange(13) for _ in range(rng.randint(1, 3))]
        for i, value in enumerate(values):
            answer = rng.randint(1, 6)
            sources = ["prompt"] * len(prompt) + ["policy"] * answer
            if answer > 3:
                sources[len(prompt) + 2] = "tool"
            seqs.append(
                {"ids": [*prompt, *(rng.randrange(13) for _ in range(answer))], "sources": sources, "question": question, "reward": value}
            )
            seqs[-1]["untrainable"] = (question, i) == ("q1", 3)
            seqs[-1]["scores"] = {"answer": value, "form": (0.0, 1.0, 1.0, 0.5)[i]}
    for pair in ("p1", "p2", "p3"):
        prompt = [rng.randrange(13) for _ in range(2)]
        for side in ("chosen", "rejected"):
            answer = rng.randint(1, 5)
            ids = [*prompt, *(rng.randrange(13) for _ in range(answer))]
            seqs.append({"ids": ids, "sources": ["prompt"] * 2 + ["demo"] * answer, "pair": pair, "side": side})
    for _ in range(2):
        answer = rng.randint(2, 6)
        seqs.append({"ids": [rng.randrange(13) for _ in range(answer + 2)], "sources": ["prompt"] * 2 + ["demo"] * answer})
    rng.shuffle(seqs)
    rows = []
    values = advantages(seqs, advantage) if advantage else {}
    for i, s in enumerate(seqs):
        length = len(s["ids"])
        learnable = [source in ("policy", "demo") and not s.get("untrainable") for source in s["sources"]]
        holes = [source == "demo" and rng.random() < 0.15 and t < length - 1 for t, source in enumerate(s["sources"])]
        s["trainable"] = [on and not hole for on, hole in zip(learnable, holes, strict=True)]
        s["a"] = [rng.gauss(0.0, 1.0) for _ in range(length)]
        with torch.no_grad():
            rows_alone = model.rows_alone(s["ids"])
            logp = [math.nan, *(float(row[i]) for row, i in zip(rows_alone, s["ids"][1:], strict=True))]
            s["value"] = [guess.random() for _ in range(length)]
            s["entropy"] = [math.nan, *(-(rows_alone.exp() * rows_alone).sum(1)).tolist()]
            s["collision"] = [math.nan, *torch.log((rows_alone.exp() ** 2).sum(1)).tolist()]
        for name in POLICIES:
            given = name == "base" or "policy" in s["sources"]
            s[name] = [
                logp[t] + rng.gauss(0.0, spread if name != "behaviour" else 2 * spread) if given and t else math.nan for t in range(length)
            ]
        rows.append(
            Row(
                ids=s["ids"],
                sources=s["sources"],
                trainable=s["trainable"],
                logps={n: s[n] for n in (*POLICIES, "entropy", "collision", "value")},
                advantage=values.get(i, s["a"]),
                group=s.get("question"),
                pair=s.get("pair"),
                side=s.get("side"),
                rewards={**s["scores"], "reward": s["reward"]} if "scores" in s else {},
                sample_id=str(i),
            )
        )
    return Data(seqs, rows, model)


def advantages(seqs: list[naive.Sequence], estimator: Callable) -> dict[int, float]:
    """The package's advantages of the rollouts, by index: all groups of the step at once."""
    groups = []
    for question in ("q1", "q2", "q3"):
        prompt = Prompt(question, (0,))
        groups.append(Group(prompt, tuple(_rollout(i, s, prompt) for i, s in enumerate(seqs) if s.get("question") == question)))
    return {int(r.sample_id): r.advantage for group in estimator(groups) for r in group.rollouts}


def _rollout(i: int, s: naive.Sequence, prompt: Prompt) -> Rollout:
    n = s["sources"].count("policy")
    segment = Segment((0,) * n, Source.policy, logprobs=(-1.0,) * n, version=0, trainable=not s["untrainable"])
    return Rollout(str(i), prompt, (segment,), reward=s["reward"], scores={k: Score(v) for k, v in s["scores"].items()})


NORM, CENTER, LOO, REWARD = GroupAdvantage(), GroupAdvantage(scale="none"), GroupAdvantage(center="loo", scale="none"), Reward()


@cache
def composed(loss: str, overrides: tuple[str, ...] = ()) -> Objective:
    """Objectives are frozen, so one composition serves every test."""
    return load(loss, overrides)


@dataclass(frozen=True)
class Case:
    """One comparison: a shipped loss with overrides, the transcription, and the advantages it is published with.  ``data`` makes the sequences,
    with the arguments of :func:`make`."""

    loss: str
    objective: naive.Objective
    advantage: Callable | None = None
    overrides: tuple[str, ...] = ()
    wrong: tuple[naive.Objective, ...] = ()
    spread: float = 0.25
    data: Callable[..., Data] = make

    def load(self) -> Objective:
        return composed(self.loss, self.overrides)

    def make(self, seed: int, spread: float | None = None) -> Data:
        return self.data(seed, self.advantage, self.spread if spread is None else spread)


K3 = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, estimator: k3, to: base, coef: 0.04}"
BEHAVIOUR = "streams.rollouts.reference.to=behaviour"
MASKS = "streams.rollouts.masks"
DEMOS_SHARE = "streams.demos.coef=0.1"

CASES: dict[str, Case] = {
    "sft": Case("sft", naive.sft, wrong=(naive.dft,)),
    "dft": Case("dft", naive.dft, wrong=(naive.sft, naive.dft_without_stop_gradient)),
    "reinforce": Case("reinforce", naive.reinforce, REWARD, wrong=(naive.rloo,)),
    "rloo": Case("rloo", naive.rloo, LOO, wrong=(naive.reinforce, lambda seqs: naive.reinforce(seqs, naive.advantage_center))),
    "rloo with KL in the reward": Case(
        "rloo",
        naive.rloo_with_kl_in_reward,
        LOO,
        ("streams.rollouts.advantage={_target_: posttrain.loss.advantage.ColumnMinusKL, coef: 0.05}",),
        (naive.rloo, lambda seqs: naive.rloo_with_kl_in_reward(seqs, -0.05)),
    ),
    "rloo with a clipped product ratio": Case(
        "rloo",
        naive.rloo_with_product_clip,
        LOO,
        (
            "streams.rollouts.likelihood.ratio=sequence",
            "streams.rollouts.reference={_target_: posttrain.loss.reference.Named, to: old}",
            f"{MASKS}.clip={{_target_: posttrain.loss.mask.RatioClip, low: 0.2, high: 0.2}}",
        ),
        (naive.rloo,),
    ),
    "ppo": Case("ppo", naive.ppo, wrong=(naive.ppo_without_min,)),
    "grpo": Case("grpo", naive.grpo, NORM, wrong=(naive.dapo, lambda seqs: naive.grpo(seqs, advantage=naive.advantage_center))),
    "grpo with k3": Case("grpo", naive.grpo_with_k3, NORM, (K3,), (naive.grpo, lambda seqs: naive.grpo(seqs, beta=-0.04))),
    "dr_grpo": Case("dr_grpo", naive.dr_grpo, CENTER, wrong=(lambda seqs: naive.grpo(seqs, advantage=naive.advantage_center),)),
    "dapo": Case("dapo", naive.dapo, NORM, wrong=(naive.grpo, lambda seqs: naive.dapo(seqs, high=0.2)), spread=0.4),
    "dapo, dual clip reached": Case(
        "dapo", lambda seqs: naive.dapo(seqs, c=1.5), NORM, (f"{MASKS}.dual.c=1.5",), (naive.dapo,), spread=0.6
    ),
    "dapo as printed": Case(
        "dapo",
        naive.group_mean,
        NORM,
        (f"{MASKS}.dual=null", "streams.rollouts.aggregation={_target_: posttrain.loss.aggregate.GroupMeanTokenMean}"),
        (naive.dapo,),
    ),
    "gspo": Case("gspo", naive.gspo, NORM, wrong=(naive.gspo_with_product_ratio, naive.grpo), spread=0.01),
    "cispo": Case("cispo", lambda seqs: naive.cispo(seqs, 1.3), NORM, (f"{MASKS}.cap.max=1.3",), (naive.cispo, naive.dapo)),
    "dpo": Case("dpo", naive.dpo, wrong=(naive.ipo, lambda seqs: naive.dpo(seqs, 0.2))),
    "cdpo": Case("cdpo", naive.cdpo, wrong=(naive.dpo, naive.robust_dpo)),
    "robust dpo": Case("cdpo", naive.robust_dpo, None, ("streams.pairs.advantage.debias=true",), (naive.cdpo, naive.dpo)),
    "hinge": Case("dpo", naive.hinge, None, ("streams.pairs.advantage.f=hinge",), (naive.dpo,)),
    "ipo": Case("ipo", naive.ipo, wrong=(naive.ipo_with_sums, naive.dpo)),
    "ipo with sums": Case(
        "ipo",
        naive.ipo_with_sums,
        None,
        ("streams.pairs.advantage.score=log_ratio_sum", "streams.pairs.aggregation._target_=posttrain.loss.aggregate.PairSum"),
        (naive.ipo,),
    ),
    "rmt": Case("rmt", lambda seqs: naive.sft_plus_rl(seqs, 1.0), NORM, wrong=(lambda seqs: naive.sft_plus_rl(seqs, 0.5), naive.sft)),
    "sft_plus_rl": Case("sft_plus_rl", naive.sft_plus_rl, NORM, wrong=(lambda seqs: naive.sft_plus_rl(seqs, 0.2), naive.sft)),
    "truncated importance sampling": Case(
        "grpo",
        naive.truncated_importance_sampling,
        NORM,
        (BEHAVIOUR, f"{MASKS}.tis={{_target_: posttrain.loss.mask.Truncate, max: 2.0}}"),
        (naive.grpo, lambda seqs: naive.truncated_importance_sampling(seqs, 1.0)),
        spread=0.5,
    ),
    "truncated importance sampling, as a weight": Case(
        "grpo",
        naive.truncated_importance_sampling,
        NORM,
        (f"{MASKS}.tis={{_target_: posttrain.loss.mask.Truncate, max: 2.0, apply: weight}}",),
        (naive.grpo,),
        spread=0.5,
    ),
    "decoupled ppo": Case("ppo", naive.decoupled_ppo, NORM, (BEHAVIOUR,), (naive.ppo,)),
}
"""What is compared.  Every file of ``configs/loss`` appears under its own name.  Families of methods add theirs in ``families/``."""

for _found in sorted(Path(__file__).with_name("families").glob("[a-z]*.py")):
    _cases = import_module(f"tests.loss.families.{_found.stem}").CASES
    if _twice := CASES.keys() & _cases.keys():
        raise ValueError(f"{_found.name}: {sorted(_twice)[0]!r} is compared already")
    CASES |= _cases
