"""Published objectives, transcribed one sequence and one token at a time.  Independent of the package: plain Python loops over plain dicts, and
autograd for the gradient.  Every function returns ``J``, to be maximised.

A sequence is a dict of lists with one entry per *token* (entry 0 unused): ``l`` current log-probs with gradient, ``rows`` the same over the
whole vocabulary, ``old`` / ``behaviour`` / ``base`` log-probs and ``entropy`` without; ``sources``, ``trainable``; ``reward``, ``scores`` and
``question``; or ``pair`` and ``side``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sequence = dict
Objective = Callable[[list[Sequence]], Tensor]


class TinyCausal(torch.nn.Module):
    """Embedding, two attention layers, head; float64.  One forward for a lone sequence, a padded batch or a packed row."""

    def __init__(self, vocabulary: int = 13, width: int = 8, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(rows))

        self.tokens, self.places = matrix(vocabulary, width), matrix(32, width)
        self.qkv = torch.nn.ParameterList(matrix(width, 3 * width) for _ in range(layers))
        self.out = torch.nn.ParameterList(matrix(width, width) for _ in range(layers))
        self.head = matrix(width, vocabulary)

    def forward(self, ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """``[..., n]`` ids and positions, ``[..., n, n]`` allowed attention -> ``[..., n, vocabulary]`` log-probabilities."""
        x = self.tokens[ids] + self.places[positions]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = torch.tanh(x @ qkv).chunk(3, dim=-1)
            scores = (2.0 * q @ k.transpose(-1, -2)).masked_fill(~allowed, -math.inf)
            x = x + torch.softmax(scores, dim=-1) @ v @ out
        return torch.log_softmax(1.5 * x @ self.head, dim=-1)

    def rows_alone(self, ids: list[int]) -> Tensor:
        """Log-probabilities over the vocabulary of every token of one sequence but the first, ``[n - 1, vocabulary]``."""
        n = len(ids) - 1
        return self(torch.tensor(ids[:-1]), torch.arange(n), torch.ones(n, n).tril().bool())

    def alone(self, ids: list[int]) -> Tensor:
        """Log-prob of every token of one sequence but the first, ``[n - 1]``."""
        rows = self.rows_alone(ids)
        return torch.stack([rows[t, ids[t + 1]] for t in range(len(ids) - 1)])

    def packed(self, ids: Tensor, positions: Tensor, seq: Tensor) -> Tensor:
        """All rows of a packed batch, ``[N, vocabulary]``; attention stays inside a sequence."""
        n = len(ids)
        allowed = (seq[:, None] == seq[None, :]) & torch.ones(n, n).tril().bool()
        return self(ids, positions, allowed) if n else self.head.new_zeros(0, self.head.shape[1]) + 0 * self.head.sum()

    def padded(self, sequences: list[list[int]]) -> list[Tensor]:
        """The rows of each sequence, ``[n_i, vocabulary]``, from one padded forward."""
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        positions = torch.arange(longest).expand(len(sequences), longest)
        rows = self(ids, positions, torch.ones(longest, longest).tril().bool().expand(len(sequences), longest, longest))
        return [rows[i, : len(s)] for i, s in enumerate(sequences)]


def base_row(vocabulary: int) -> Tensor:
    """The fixed other distribution that stands for the base policy where whole rows are compared, as log-probabilities."""
    return torch.log_softmax(torch.linspace(-1, 1, vocabulary, dtype=torch.float64), 0)


def teacher_row(vocabulary: int) -> Tensor:
    """The same for the teacher."""
    return torch.log_softmax(torch.cos(torch.arange(vocabulary, dtype=torch.float64)), 0)


# -- pieces --------------------------------------------------------------------------------------------------------------------
def learnt(s: Sequence, source: str) -> list[int]:
    """Indices of the tokens a loss looks at."""
    return [t for t in range(1, len(s["ids"])) if s["sources"][t] == source and s["trainable"][t]]


def of(seqs: list[Sequence], source: str, paired: bool | None = None) -> list[Sequence]:
    chosen = [s for s in seqs if source in s["sources"][1:]]
    return [s for s in chosen if paired is None or (s.get("pair") is not None) == paired]


def r(s: Sequence, t: int, to: str = "old") -> Tensor:
    return torch.exp(s["l"][t] - s[to][t])


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(x, 1 - low, 1 + high)


def total(terms: list[Tensor]) -> Tensor:
    out = torch.zeros((), dtype=torch.float64)
    for term in terms:
        out = out + term
    return out


def rewards(seqs: list[Sequence], s: Sequence) -> list[float]:
    return [o["reward"] for o in seqs if o.get("question") == s["question"]]


def advantage_reward(seqs: list[Sequence], s: Sequence) -> float:
    return s["reward"]


def advantage_center(seqs: list[Sequence], s: Sequence) -> float:
    group = rewards(seqs, s)
    return s["reward"] - sum(group) / len(group)


def advantage_loo(seqs: list[Sequence], s: Sequence) -> float:
    others = [o["reward"] for o in seqs if o.get("question") == s["question"] and o is not s]
    return s["reward"] - sum(others) / len(others)


def advantage_norm(seqs: list[Sequence], s: Sequence) -> float:
    group = rewards(seqs, s)
    mean = sum(group) / len(group)
    variance = sum((x - mean) ** 2 for x in group) / len(group)
    return 0.0 if max(group) == min(group) else (s["reward"] - mean) / (math.sqrt(variance) + 1e-6)


# -- objectives ----------------------------------------------------------------------------------------------------------------
def sft(seqs: list[Sequence]) -> Tensor:
    tokens = [(s, t) for s in of(seqs, "demo", paired=False) for t in learnt(s, "demo")]
    return total([s["l"][t] for s, t in tokens]) / len(tokens)


def dft(seqs: list[Sequence]) -> Tensor:
    """arXiv 2508.05629: loss ``sg(p) * (-log p)`` per token, mean over tokens."""
    tokens = [(s, t) for s in of(seqs, "demo", paired=False) for t in learnt(s, "demo")]
    return total([torch.exp(s["l"][t]).detach() * s["l"][t] for s, t in tokens]) / len(tokens)


def dft_without_stop_gradient(seqs: list[Sequence]) -> Tensor:
    tokens = [(s, t) for s in of(seqs, "demo", paired=False) for t in learnt(s, "demo")]
    return total([torch.exp(s["l"][t]) * s["l"][t] for s, t in tokens]) / len(tokens)


def reinforce(seqs: list[Sequence], advantage: Callable = advantage_reward) -> Tensor:
    group = of(seqs, "policy")
    return total([advantage(seqs, s) * total([s["l"][t] for t in learnt(s, "policy")]) for s in group]) / len(group)


def rloo(seqs: list[Sequence]) -> Tensor:
    return reinforce(seqs, advantage_loo)


def surrogate(s: Sequence, t: int, a: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    return torch.minimum(r(s, t) * a, clip(r(s, t), low, high) * a)


def ppo(seqs: list[Sequence]) -> Tensor:
    """Token-level advantages ``a`` from a critic."""
    tokens = [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    return total([surrogate(s, t, s["a"][t]) for s, t in tokens]) / len(tokens)


def ppo_without_min(seqs: list[Sequence]) -> Tensor:
    tokens = [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    return total([clip(r(s, t), 0.2, 0.2) * s["a"][t] for s, t in tokens]) / len(tokens)


def grpo(seqs: list[Sequence], beta: float = 0.0, advantage: Callable = advantage_norm) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        for t in tokens:
            term = surrogate(s, t, advantage(seqs, s))
            if beta:
                d = s["l"][t] - s["base"][t]
                term = term - beta * (torch.exp(-d) + d - 1)
            out.append(term / len(tokens))
    return total(out) / len(group)


def grpo_with_k3(seqs: list[Sequence]) -> Tensor:
    return grpo(seqs, beta=0.04)


def dr_grpo(seqs: list[Sequence], length: float = 256.0) -> Tensor:
    group = of(seqs, "policy")
    return total([surrogate(s, t, advantage_center(seqs, s)) for s in group for t in learnt(s, "policy")]) / (len(group) * length)


def dapo(seqs: list[Sequence], c: float = 10.0, high: float = 0.28) -> Tensor:
    out = []
    for s in of(seqs, "policy"):
        a = advantage_norm(seqs, s)
        for t in learnt(s, "policy"):
            term = surrogate(s, t, a, 0.2, high)
            out.append(torch.maximum(term, torch.tensor(c * a, dtype=torch.float64)) if a < 0 else term)
    return total(out) / len(out)


def gspo(seqs: list[Sequence], mean: bool = True) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        if not tokens:
            continue
        log_ratio = total([s["l"][t] - s["old"][t] for t in tokens])
        ratio, a = torch.exp(log_ratio / len(tokens) if mean else log_ratio), advantage_norm(seqs, s)
        out.append(torch.minimum(ratio * a, torch.clamp(ratio, 1 - 3e-4, 1 + 4e-4) * a))
    return total(out) / len(group)


def gspo_with_product_ratio(seqs: list[Sequence]) -> Tensor:
    return gspo(seqs, mean=False)


def cispo(seqs: list[Sequence], cap: float = 5.0) -> Tensor:
    tokens = [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    return total([torch.clamp(r(s, t), max=cap).detach() * advantage_norm(seqs, s) * s["l"][t] for s, t in tokens]) / len(tokens)


def margins(seqs: list[Sequence], mean: bool = False) -> list[Tensor]:
    pairs = of(seqs, "demo", paired=True)

    def score(name: str, side: str) -> Tensor:
        s = next(s for s in pairs if s["pair"] == name and s["side"] == side)
        tokens = learnt(s, "demo")
        value = total([s["l"][t] - s["base"][t] for t in tokens])
        return value / len(tokens) if mean else value

    return [score(name, "chosen") - score(name, "rejected") for name in sorted({s["pair"] for s in pairs})]


def dpo(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    hs = margins(seqs)
    return -total([-torch.log(torch.sigmoid(beta * h)) for h in hs]) / len(hs)


def cdpo(seqs: list[Sequence], beta: float = 0.1, e: float = 0.1) -> Tensor:
    hs = margins(seqs)
    return -total([-(1 - e) * torch.log(torch.sigmoid(beta * h)) - e * torch.log(torch.sigmoid(-beta * h)) for h in hs]) / len(hs)


def robust_dpo(seqs: list[Sequence], beta: float = 0.1, e: float = 0.1) -> Tensor:
    hs = margins(seqs)

    def loss(h: Tensor) -> Tensor:
        return -torch.log(torch.sigmoid(beta * h))

    return -total([((1 - e) * loss(h) - e * loss(-h)) / (1 - 2 * e) for h in hs]) / len(hs)


def hinge(seqs: list[Sequence], beta: float = 0.1) -> Tensor:
    hs = margins(seqs)
    return -total([torch.relu(1 - beta * h) for h in hs]) / len(hs)


def ipo(seqs: list[Sequence], beta: float = 0.1, mean: bool = True) -> Tensor:
    hs = margins(seqs, mean=mean)
    return -total([(h - 1 / (2 * beta)) ** 2 for h in hs]) / len(hs)


def ipo_with_sums(seqs: list[Sequence]) -> Tensor:
    return ipo(seqs, mean=False)


def sft_plus_rl(seqs: list[Sequence], share: float = 0.1) -> Tensor:
    """The token mean of the clipped surrogate plus ``share`` times the token mean of the demonstrations' log-likelihood."""
    tokens = [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    demos = [(s, t) for s in of(seqs, "demo") for t in learnt(s, "demo")]
    surrogates = total([surrogate(s, t, advantage_norm(seqs, s)) for s, t in tokens]) / len(tokens)
    return surrogates + share * total([s["l"][t] for s, t in demos]) / len(demos)


# -- corrections for stale and mismatched samples --------------------------------------------------------------------------------
def truncated_importance_sampling(seqs: list[Sequence], cap: float = 2.0) -> Tensor:
    """GRPO's gradient times ``sg(min(pi_old / pi_behaviour, C))``."""
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        for t in tokens:
            rho = math.exp(min(s["old"][t] - s["behaviour"][t], math.log(cap)))
            out.append(rho * surrogate(s, t, advantage_norm(seqs, s)) / len(tokens))
    return total(out) / len(group)


def icepop(seqs: list[Sequence], least: float = 0.5, most: float = 5.0) -> Tensor:
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        for t in tokens:
            rho = math.exp(s["old"][t] - s["behaviour"][t])
            out.append((rho if least <= rho <= most else 0.0) * surrogate(s, t, advantage_norm(seqs, s)) / len(tokens))
    return total(out) / len(group)


def decoupled_ppo(seqs: list[Sequence]) -> Tensor:
    """arXiv 2110.00641: clip against the proximal policy, weight against the behaviour policy."""
    tokens = [(s, t) for s in of(seqs, "policy") for t in learnt(s, "policy")]
    return total([math.exp(s["old"][t] - s["behaviour"][t]) * surrogate(s, t, advantage_norm(seqs, s)) for s, t in tokens]) / len(tokens)


def rloo_with_kl_in_reward(seqs: list[Sequence], coef: float = 0.05) -> Tensor:
    """REINFORCE with reward-to-go on ``A - coef * sum of later k1``."""
    group, out = of(seqs, "policy"), []
    for s in group:
        tokens = learnt(s, "policy")
        for i, t in enumerate(tokens):
            later = sum(s["old"][u] - s["base"][u] for u in tokens[i:])
            out.append((advantage_loo(seqs, s) - coef * later) * s["l"][t])
    return total(out) / len(group)


def rloo_with_product_clip(seqs: list[Sequence]) -> Tensor:
    """A released variant: the answer's product ratio, clipped by 0.2."""
    group, out = of(seqs, "policy"), []
    for s in group:
        ratio = torch.exp(total([s["l"][t] - s["old"][t] for t in learnt(s, "policy")]))
        a = advantage_loo(seqs, s)
        out.append(torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a))
    return total(out) / len(group)


def group_mean(seqs: list[Sequence]) -> Tensor:
    """DAPO's objective as printed: token mean inside each group, then the mean over groups."""
    group = of(seqs, "policy")
    questions = {s["question"] for s in group}
    out = []
    for q in questions:
        tokens = [(s, t) for s in group if s["question"] == q for t in learnt(s, "policy")]
        out.append(total([surrogate(s, t, advantage_norm(seqs, s), 0.2, 0.28) for s, t in tokens]) / len(tokens))
    return total(out) / len(questions)
