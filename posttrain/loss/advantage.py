"""Advantage terms: how good a token was, seen from inside the loss.  Above 0 raises the probability.

Estimates that need only rewards (group baselines, whitening) are made before, in ``posttrain.advantage``, and arrive as the batch's column;
the terms here read that column, or the current log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.loss.preference import check_beta, check_stream, label_column, pair_difference, require_pairs, reward_column, sequence_score
from posttrain.loss.reference import number
from posttrain.loss.view import Metrics, TokenView
from posttrain.mixture.schedule import Scalar

SCORES = ("log_ratio_sum", "log_ratio_mean", "logp_sum", "logp_mean", "value")
SHAPES = ("logistic", "squared", "hinge", "sigmoid", "reverse_kl")
TRANSFORMS = ("identity", "log_odds", "power", "log_sigmoid")


@dataclass(frozen=True)
class One:
    """A constant, the same for every token: imitate what is given.

    Equation: ``A = value``.
    Source: maximum likelihood.

    ``value``: 1; 0 leaves only the regularisers, a negative number unlearns.  A number or a schedule.

    Wrong when: the tokens carry advantages: they are ignored.
    """

    value: Scalar = 1.0
    constant = True

    @property
    def formula(self) -> str:
        return "" if self.value == 1.0 else number(self.value)

    def values(self, view: TokenView) -> Tensor:
        return torch.full_like(view.logp, view.at(self.value))


@dataclass(frozen=True)
class Column:
    """The advantage column of the batch, estimated before the batch was packed.

    Equation: ``A = batch.advantage[t]``.
    Source: whatever ``posttrain.advantage`` computed; see there.

    Wrong when: nothing filled the column: it is 1 everywhere by default, and the loss is maximum likelihood.
    """

    reads_column = True

    @property
    def formula(self) -> str:
        return "A"

    def values(self, view: TokenView) -> Tensor:
        return view.batch.advantage.to(view.logp.dtype)


@dataclass(frozen=True)
class ColumnMinusKL:
    """The advantage column less a KL penalty in the *reward*, estimated by k1.

    Equation: ``gamma**(tokens after t) * A[t] - coef * sum_{s in credit(t)} gamma**(s-t) * (log pi_over[s] - log pi_to[s])``.
    Source: KL in the reward, RLOO, arXiv 2402.14740, and PPO for language models; reward-to-go is the exact gradient of the sequence KL.

    ``coef``: strength, a number or a schedule.  ``to``: the policy to stay near.  ``over``: whose tokens were sampled: ``old``,
    ``behaviour`` or ``self``.  ``credit``: ``to_go`` (this token and the later ones), ``sequence`` (all of them) or ``own`` (this token
    alone, which equals k2 as a loss: a local KL).  ``gamma``: discount per token, for ``to_go``: the column is the reward of the last token.
    No baseline is taken from the KL part: unbiased, with more variance than a group-centred one.

    Wrong when: the tokens are far off-policy and the reference has no importance ratio; or the column is no reward at the end but differs
    between tokens, and ``gamma`` is not 1.
    """

    coef: Scalar = 0.05
    to: str = "base"
    over: str = "old"
    credit: Literal["to_go", "sequence", "own"] = "to_go"
    gamma: float = 1.0
    reads_column = True
    coupling = "sequence"

    def __post_init__(self) -> None:
        if self.credit not in ("to_go", "sequence", "own"):
            raise ValueError(f"advantage.ColumnMinusKL: credit={self.credit!r} does not exist; choose to_go, sequence or own")
        if self.to == self.over:
            raise ValueError(f"advantage.ColumnMinusKL: the KL from {self.over} to itself is 0; name two different policies")
        if not 0 < self.gamma <= 1 or (self.gamma != 1 and self.credit != "to_go"):
            raise ValueError(f"advantage.ColumnMinusKL: gamma={self.gamma} must be above 0 and at most 1, and acts on credit=to_go only")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to, self.over}) - {"self"}

    @property
    def live(self) -> bool:
        return "self" in (self.to, self.over)

    @property
    def formula(self) -> str:
        over = "pi" if self.over == "self" else f"pi_{self.over}"
        discount = "" if self.gamma == 1 else f", both discounted by {self.gamma:g} per token"
        return f"(A - {number(self.coef)} * sum_{self.credit} log({over}/pi_{self.to}){discount})"

    def values(self, view: TokenView) -> Tensor:
        d, column = view.log_ratio(self.to, self.over, "token"), view.batch.advantage.to(view.logp.dtype)
        if self.credit == "sequence":
            d = view.spread(view.seq_sum(d))
        elif self.credit == "to_go":
            d = view.discounted(d, self.gamma)
        if self.gamma != 1:
            column = column * self.gamma ** (view.discounted(torch.ones_like(d)) - 1)
        return column - view.at(self.coef) * d

    def metrics(self, view: TokenView) -> Metrics:
        """The estimated KL of a whole answer, whatever the ``credit``."""
        return {"reward_kl": (float(view.log_ratio(self.to, self.over, "token").sum()), float(view.member.sum()))}


@dataclass(frozen=True)
class GeneralizedAdvantage:
    """Generalised advantage estimation from a recorded value of every token.

    Equation: ``delta[t] = r[t] + gamma V[t+1] - V[t]``, ``A[t] = sum_{s >= t} (gamma lam)**(s-t) delta[s]`` over the stream's tokens; ``V`` behind the last is
    0.  ``r[t] = R [t is the last] - coef (log pi_over[t] - log pi_to[t])``.
    Source: arXiv 1506.02438; PPO, arXiv 1707.06347; ``lam_by_length``: VAPO, arXiv 2504.05118.

    ``gamma``, ``lam``: discount per token and how far ahead rewards are trusted over values: 1 is ``R - V``, 0 one step.  ``lam_by_length``: above 0,
    ``lam = 1 - 1/(lam_by_length T)`` instead, 0.05 as published.  ``rewards``: where the advantage column is paid out: its value at the ``last`` token, or as a
    reward of ``each`` token (segment rewards).  ``coef``, ``to``, ``over``: a KL in the reward, off at 0.  ``values_from``: the column that holds ``V``, recorded
    before the update as a log-prob is, NaN where there is none.  ``earned``: a term whose value of every token is its reward, in the place of the column:
    ``LogRatio`` of two frozen models, its ``credit: own``.

    Wrong when: answers were cut off: the end of the budget is taken for the end of the answer, worth 0.  Tokens of other sources are passed over: a
    value carries across a tool's output without discount.
    """

    gamma: float = 1.0
    lam: float = 0.95
    rewards: Literal["last", "each"] = "last"
    coef: Scalar = 0.0
    to: str = "base"
    over: str = "old"
    values_from: str = "value"
    lam_by_length: float = 0.0
    earned: Any = None
    coupling = "sequence"

    def __post_init__(self) -> None:
        if self.earned is not None and (getattr(self.earned, "live", False) or getattr(self.earned, "coupling", "token") != "token"):
            raise ValueError(
                f"advantage.GeneralizedAdvantage.earned={type(self.earned).__name__} must be a reward of each token by itself that does not move with the policy; give "
                "LogRatio with credit=own and two frozen models"
            )
        if self.earned is not None and self.rewards != "each":
            raise ValueError("advantage.GeneralizedAdvantage: earned gives every token a reward of its own; set rewards=each")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1 and self.lam_by_length >= 0):
            raise ValueError(
                f"advantage.GeneralizedAdvantage: gamma={self.gamma} and lam={self.lam} lie between 0 and 1, lam_by_length={self.lam_by_length} is not negative"
            )
        if self.rewards not in ("last", "each"):
            raise ValueError(f"advantage.GeneralizedAdvantage: rewards={self.rewards!r} does not exist; choose last or each")
        if self.to == self.over:
            raise ValueError(f"advantage.GeneralizedAdvantage: the KL from {self.over} to itself is 0; name two different policies")

    @property
    def _with_kl(self) -> bool:
        return callable(self.coef) or self.coef != 0

    @property
    def needs(self) -> frozenset[str]:
        own = frozenset(getattr(self.earned, "needs", ()))
        return frozenset({self.values_from} | own | ({self.to, self.over} - {"self"} if self._with_kl else set()))

    @property
    def reads_column(self) -> bool:
        return self.earned is None

    @property
    def live(self) -> bool:
        return self._with_kl and "self" in (self.to, self.over)

    @property
    def formula(self) -> str:
        lam = f"1-1/({self.lam_by_length:g} T)" if self.lam_by_length else f"{self.lam:g}"
        kl = f", KL {number(self.coef)} to pi_{self.to} in the reward" if self._with_kl else ""
        rewards = f"rewards at {self.rewards}" if self.earned is None else f"rewards {self.earned.formula}"
        return f"GAE(gamma {self.gamma:g}, lambda {lam}, {rewards}{kl})"

    def values(self, view: TokenView) -> Tensor:
        rewards = view.batch.advantage.to(view.logp.dtype) if self.earned is None else self.earned.values(view)
        value, column = view.select(view.reference(self.values_from)), view.select(rewards)
        behind = view.following(torch.ones_like(value))
        reward = column if self.rewards == "each" else torch.where(behind > 0, torch.zeros_like(column), column)
        if self._with_kl:
            reward = reward - view.at(self.coef) * view.log_ratio(self.to, self.over, "token")
        delta = reward + self.gamma * view.following(value) - value
        lam: float | Tensor = self.lam
        if self.lam_by_length:
            lam = view.spread(1.0 - 1.0 / (self.lam_by_length * view.seq_len().clamp(min=1))).clamp(min=0.0)
        return view.discounted(delta, self.gamma * lam)

    def returns(self, view: TokenView) -> Tensor:
        """What a critic is drawn towards, ``A + V``, ``[N]``."""
        return self.values(view) + view.select(view.reference(self.values_from))

    def metrics(self, view: TokenView) -> Metrics:
        if not self._with_kl:
            return {}
        return {"reward_kl": (float(view.log_ratio(self.to, self.over, "token").sum()), float(view.member.sum()))}


@dataclass(frozen=True)
class LogRatio:
    """How much more probable a token is to one policy than to another: a reward that needs no verifier.

    Equation: ``A[t] = sum_{s in credit(t)} (log pi_num[s] - log pi_den[s])``.
    Source: reverse-KL distillation on own samples as a policy gradient, GKD, arXiv 2306.13649, and MiniLLM, arXiv 2306.08543; two frozen models:
    Self-Rewarding PPO, arXiv 2510.21090.

    ``num``, ``den``: the policies; with ``den`` the one that sampled, the mean over samples is minus a KL, ``self`` reads the current one.
    ``credit``: ``own`` (this token alone: the KL at every visited position, histories held fixed), ``to_go`` (and the later ones: the KL of whole
    answers) or ``sequence`` (all of them: the same mean, more noise).  ``limit``: bounds each token's log-ratio; a token impossible for ``num``
    has none otherwise.

    Wrong when: the two models do not share a tokenizer; or their log-probs are of different temperatures.
    """

    num: str = "teacher"
    den: str = "self"
    credit: Literal["own", "to_go", "sequence"] = "own"
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.credit not in ("own", "to_go", "sequence"):
            raise ValueError(f"advantage.LogRatio: credit={self.credit!r} does not exist; choose own, to_go or sequence")
        if self.num == self.den:
            raise ValueError(f"advantage.LogRatio: the ratio of {self.num} to itself is 1; name two different policies")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"advantage.LogRatio: limit={self.limit} must be above 0, or null for none")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.num, self.den}) - {"self"}

    @property
    def coupling(self) -> str:
        return "token" if self.credit == "own" else "sequence"

    @property
    def live(self) -> bool:
        return "self" in (self.num, self.den)

    @property
    def formula(self) -> str:
        num, den = ("pi" if name == "self" else f"pi_{name}" for name in (self.num, self.den))
        bound = "" if self.limit is None else f", each within {self.limit:g}"
        return f"log({num}/{den})" if self.credit == "own" and not bound else f"(sum_{self.credit} log({num}/{den}){bound})"

    def _each(self, view: TokenView) -> Tensor:
        return view.log_ratio(self.den, self.num, "token")

    def values(self, view: TokenView) -> Tensor:
        d = self._each(view)
        d = d if self.limit is None else d.clamp(-self.limit, self.limit)
        if self.credit == "sequence":
            return view.spread(view.seq_sum(d))
        return d if self.credit == "own" else view.discounted(d, 1.0)

    def metrics(self, view: TokenView) -> Metrics:
        """The mean log-ratio of a token and the share beyond the limit."""
        d, tokens = view.select(self._each(view)), float(view.on.sum())
        beyond = 0.0 if self.limit is None else float((view.on & (d.abs() > self.limit)).sum())
        return {"log_ratio": (float(d.sum()), tokens), "log_ratio_clamped": (beyond, tokens)}


@dataclass(frozen=True)
class Whiten:
    """Another advantage, brought to mean 0 and deviation 1 over the step's tokens.

    Equation: ``(A - mean) / (std + eps)``, or ``/ sqrt(var + eps)`` with ``eps_on="variance"``.
    Source: REINFORCE++, arXiv 2501.03262; PPO for language models.

    ``inner``: the advantage term.  ``over``: the population: ``tokens`` count alike, or ``sequences`` do, each spread over its tokens.  ``center``: subtract
    the mean.  ``ddof``, ``eps``, ``eps_on``: as in ``posttrain.advantage.BatchWhiten``, which does the same for a column that needs no log-probs and
    costs no second pass.

    Wrong when: the advantages mean something by their size: what is small because nothing was at stake becomes as large as the rest.  A step of equal
    values gives 0.
    """

    inner: Any = field(default_factory=Column)
    over: Literal["tokens", "sequences"] = "tokens"
    center: bool = True
    ddof: int = 0
    eps: float = 1e-8
    eps_on: Literal["std", "variance"] = "std"
    coupling = "batch"
    live = True

    def __post_init__(self) -> None:
        if self.over not in ("tokens", "sequences") or self.eps_on not in ("std", "variance") or self.ddof not in (0, 1):
            raise ValueError(
                f"advantage.Whiten: over={self.over!r} is tokens or sequences, eps_on={self.eps_on!r} is std or variance, ddof={self.ddof} is 0 or 1"
            )
        if not self.eps >= 0:
            raise ValueError(f"advantage.Whiten: eps={self.eps} must not be negative")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(getattr(self.inner, "needs", ()))

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset(getattr(self.inner, "contexts", ()))

    @property
    def reads_column(self) -> bool:
        return bool(getattr(self.inner, "reads_column", False))

    @property
    def formula(self) -> str:
        guard = f"sqrt(var + {self.eps:g})" if self.eps_on == "variance" else f"(std + {self.eps:g})"
        inner = getattr(self.inner, "formula", type(self.inner).__name__)
        return f"({inner}{' - mean' if self.center else ''})/{guard} [over {self.over}]"

    def values(self, view: TokenView) -> Tensor:
        view.require_whole("advantage.Whiten")
        values = view.select(self.inner.values(view))
        if not bool(view.on.any()):
            return values
        weight = view.select(1.0 / view.spread(view.seq_len().clamp(min=1)) if self.over == "sequences" else torch.ones_like(values))
        total = float(weight.sum())
        mean = (weight * values).sum() / total
        variance = (weight * (values - mean) ** 2).sum() / max(total - self.ddof, 1.0)
        scale = torch.sqrt(variance + self.eps) if self.eps_on == "variance" else torch.sqrt(variance) + self.eps
        centred = values - mean if self.center else values
        equal = bool((values[view.on] == values[view.on][0]).all())
        return torch.zeros_like(values) if equal and self.center else centred / torch.where(scale > 0, scale, 1.0)

    def metrics(self, view: TokenView) -> Metrics:
        return self.inner.metrics(view) if hasattr(self.inner, "metrics") else {}


@dataclass(frozen=True)
class GroupCenter:
    """Another advantage less its mean over the group, whatever the answers were sampled from.

    Equation: ``(v_i - mean v) / divide`` with ``v_i`` the mean of ``inner`` over the answer.  With ``inner = A - beta log(pi/pi_to)`` of whole answers it is
    the gradient of the group variance ``1/(2(k-1)) sum (v_i - mean v)**2`` over ``beta``, which is least exactly where ``pi ~ pi_to exp(A/beta)``:
    the unknown log-partition leaves with the mean.
    Source: GVPO, arXiv 2504.19599; over pairs: CoPG, arXiv 2406.19185, and REBEL, arXiv 2404.16767.

    ``inner``: the advantage term.  ``divide``: by nothing (``none``), the number of answers (``size``) or one less (``peers``).  An answer that nothing is
    learnt from does not count; a group of one gives 0.

    Wrong when: the rewards are normalised, which changes the temperature of the optimum from group to group: take ``advantage=reward`` or
    ``group_center``.  A cut group costs a second pass.
    """

    inner: Any = field(default_factory=lambda: ColumnMinusKL(over="self", credit="sequence"))
    divide: Literal["none", "size", "peers"] = "peers"
    live = True

    def __post_init__(self) -> None:
        if self.divide not in ("none", "size", "peers"):
            raise ValueError(f"advantage.GroupCenter: divide={self.divide!r} does not exist; choose none, size or peers")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(getattr(self.inner, "needs", ()))

    @property
    def coupling(self) -> str:
        return "batch" if getattr(self.inner, "coupling", "token") == "batch" else "group"

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset(getattr(self.inner, "contexts", ()))

    @property
    def reads_column(self) -> bool:
        return bool(getattr(self.inner, "reads_column", False))

    @property
    def formula(self) -> str:
        inner = getattr(self.inner, "formula", type(self.inner).__name__)
        return f"({inner} - group mean)" + {"none": "", "size": "/k", "peers": "/(k-1)"}[self.divide]

    def values(self, view: TokenView) -> Tensor:
        group, here = view.batch.group, view.seq_len() > 0
        alone = here & (group < 0)
        if bool(alone.any()):
            sample = view.batch.sample_ids[int(alone.nonzero()[0])]
            raise ValueError(f"stream {view.name!r}: advantage.GroupCenter compares the answers of a group; sample {sample!r} is in none")
        each = torch.where(here, view.seq_mean(self.inner.values(view)), 0.0)
        count = view.code_count(group, here).to(each.dtype)
        centred = each - view.code_sum(group, each) / count
        return view.spread(centred / {"none": 1.0, "size": count, "peers": (count - 1).clamp(min=1)}[self.divide])

    def metrics(self, view: TokenView) -> Metrics:
        return self.inner.metrics(view) if hasattr(self.inner, "metrics") else {}


@dataclass(frozen=True)
class Pairwise:
    """A preference pair: push the chosen answer up and the rejected one down, less and less as the margin is reached.

    Equation: ``h = s(chosen) - s(rejected)``, ``x = beta h - margin - gap``, ``A = -df/ds`` on each side; ``logistic``: ``f = -log sigmoid(x)``;
    ``squared``: ``f = ((x - 1/2) / beta)**2``, that is ``(h - 1/(2 beta))**2``; ``hinge``: ``f = max(0, 1 - x)``; ``sigmoid``:
    ``f = 1 - sigmoid(x)``; ``reverse_kl``: ``f = p log(p / (1-e)) + (1-p) log((1-p) / e)`` with ``p = sigmoid(x)``, ``e`` = ``label_smoothing``.
    Source: DPO, arXiv 2305.18290; IPO, arXiv 2310.12036; hinge, arXiv 2305.10425 and 2309.06657; label smoothing, Mitchell 2023; ``debias``,
    arXiv 2403.00409; ``reverse_kl``, EXO, arXiv 2402.00856; ``sigmoid``, arXiv 2408.06266; ``margin``, SimPO, arXiv 2405.14734; ``log_odds``,
    ORPO, arXiv 2403.07691; ``power``, AlphaPO, arXiv 2501.03884, and f-DPO, arXiv 2309.16240; ``shortfall``, DPOP, arXiv 2402.13228.

    ``f``: the loss.  ``score``: ``log_ratio_sum`` or ``log_ratio_mean`` against ``to``, or ``logp_sum``, ``logp_mean`` without a reference;
    the aggregation must match (``PairSum`` for sums, ``PairTokenMean`` for means); ``value``: what a scalar head says of the answer.  ``beta``: inverse temperature; with ``squared`` the
    target margin is ``1/(2 beta)``.  ``label_smoothing``: the assumed share of flipped labels, for ``logistic`` (0: none) and ``reverse_kl``
    (above 0); ``debias`` makes the smoothed logistic loss unbiased for it.  ``label``: a reward column of the chosen answer with the
    probability that it is the better one, in the place of a hard label; logistic only.  ``margin``: subtracted from ``beta h``, in its
    units.  ``gap``: a reward column whose difference, chosen minus rejected, is subtracted too: the pair's own margin.  ``transform`` of the
    score: ``identity``; ``log_odds`` ``x - log(1 - exp(x))``, of ``logp`` scores; ``power`` ``(1 - exp(-alpha x)) / alpha``; ``log_sigmoid``
    ``log sigmoid(x)``.  ``alpha``: the exponent of ``power``; 0 is the identity, 1 on log-ratios the forward KL.  ``limit``: beyond
    ``|alpha x|`` of this size ``power`` is flat, with gradient 0.  ``shortfall``: the chosen score counts ``1 + shortfall`` times while it
    is below the reference's.

    Wrong when: a pair is cut between micro-batches: an error unless the weights come from the whole step.  ``beta`` is not comparable
    between sums and means (0.1 and 5), nor learning rates between ``logistic`` and ``squared`` (first weights ``beta/2`` and ``1/beta``).
    ``sigmoid`` and ``reverse_kl`` give no gradient to a pair that is ranked wrong by far.
    """

    f: Literal["logistic", "squared", "hinge", "sigmoid", "reverse_kl"] = "logistic"
    score: Literal["log_ratio_sum", "log_ratio_mean", "logp_sum", "logp_mean", "value"] = "log_ratio_sum"
    to: str = "base"
    beta: Scalar = 0.1
    label_smoothing: float = 0.0
    debias: bool = False
    label: str | None = None
    margin: Scalar = 0.0
    gap: str | None = None
    transform: Literal["identity", "log_odds", "power", "log_sigmoid"] = "identity"
    alpha: float = 0.0
    limit: float | None = None
    shortfall: Scalar = 0.0
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        name = "advantage.Pairwise"
        for key, value, known in (("f", self.f, SHAPES), ("score", self.score, SCORES), ("transform", self.transform, TRANSFORMS)):
            if value not in known:
                raise ValueError(f"{name}: {key}={value!r} does not exist; choose from {', '.join(known)}")
        check_beta(name, self.beta, self.score, self.f in ("logistic", "sigmoid", "reverse_kl") and self.transform == "identity")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{name}: label_smoothing={self.label_smoothing} is a share of flipped labels, between 0 and 1")
        if self.f not in ("logistic", "reverse_kl") and self.label_smoothing:
            raise ValueError(
                f"{name}: label_smoothing and debias act on f=logistic only, and label_smoothing on reverse_kl, not on f={self.f}"
            )
        if self.f != "logistic" and (self.debias or self.label is not None):
            raise ValueError(f"{name}: label and debias act on f=logistic only, not on f={self.f}")
        if self.f == "reverse_kl" and not 0 < self.label_smoothing < 1:
            raise ValueError(
                f"{name}: f=reverse_kl needs label_smoothing strictly between 0 and 1 (1e-3 is usual): log(0) stands in it otherwise"
            )
        if self.debias and self.label_smoothing >= 0.5:
            raise ValueError(f"{name}: debias needs label_smoothing below 0.5, not {self.label_smoothing}: half-flipped labels say nothing")
        if self.label is not None and self.label_smoothing:
            raise ValueError(f"{name}: label={self.label} already says how sure the label is; set label_smoothing=0")
        if self.transform == "log_odds" and not self.score.startswith("logp"):
            raise ValueError(f"{name}: transform=log_odds needs a probability: score=logp_mean or logp_sum, not {self.score}")
        if self.transform != "power" and (self.alpha or self.limit is not None):
            raise ValueError(f"{name}: alpha and limit belong to transform=power, not {self.transform}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"{name}: limit={self.limit} must be above 0, or null for none")
        if self.shortfall != 0 and not self.score.startswith("log_ratio"):
            raise ValueError(f"{name}: shortfall looks at scores below the reference's, so it needs score=log_ratio_sum or log_ratio_mean")
        if not callable(self.shortfall) and self.shortfall < 0:
            raise ValueError(f"{name}: shortfall={self.shortfall} must not be negative")

    def fits(self, stream: Any) -> None:
        check_stream("advantage.Pairwise", self.score, stream, both_sides=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to}) if self.score.startswith("log_ratio") else frozenset()

    @property
    def formula(self) -> str:
        beta, e = number(self.beta), self.label_smoothing
        x = f"{beta} h" + (f" - {number(self.margin)}" if self.margin != 0 else "") + (f" - gap({self.gap})" if self.gap else "")
        plain = x == f"{beta} h"
        f = {
            "logistic": f"-log sigmoid({x})",
            "squared": f"(h - 1/(2*{beta}))^2" if plain else f"(({x} - 1/2)/{beta})^2",
            "hinge": f"max(0, 1 - {x})" if plain else f"max(0, 1 - ({x}))",
            "sigmoid": f"1 - sigmoid({x})",
            "reverse_kl": f"KL(sigmoid({x}) || {1 - e:g})",
        }[self.f]
        if self.label is not None:
            f += f" with labels {self.label}"
        if e and self.f == "logistic":
            f += f" smoothed by {e:g}" + (", debiased" if self.debias else "")
        part = f"log(pi/pi_{self.to})" if self.score.startswith("log_ratio") else "log pi"
        score = "r" if self.score == "value" else f"{self.score.rsplit('_', 1)[1]} {part}"
        if self.transform != "identity":
            score = f"{self.transform}{f'[{self.alpha:g}]' if self.transform == 'power' else ''}({score})"
        if self.shortfall != 0:
            score += f", below 0 times 1 + {number(self.shortfall)} when chosen"
        return f"(-/+ f'(h)) [f = {f}, h = {score}, chosen - rejected]"

    def values(self, view: TokenView) -> Tensor:
        h, _, slope = self._margin(view)
        outer = self._slope(h, view.at(self.beta), self._offset(view), self._label(view))
        return view.spread(-view.batch.side.to(h.dtype) * outer * slope)

    def objective(self, view: TokenView) -> Metrics:
        """The published loss, the share of pairs ranked right, the margin ``beta h`` and ``beta`` times the score of each side, per pair."""
        h, score, _ = self._margin(view)
        chosen, rejected = (view.in_pair & (view.batch.side == side) for side in (1, -1))
        pairs = float(chosen.sum())
        beta = view.at(self.beta)
        loss = self._loss(h, beta, self._offset(view), self._label(view))
        return {
            "preference_loss": (float(loss[chosen].sum()), pairs),
            "margin": (beta * float(h[chosen].sum()), pairs),
            "accuracy": (float((h[chosen] > 0).sum()), pairs),
            "chosen_score": (beta * float(score[chosen].sum()), pairs),
            "rejected_score": (beta * float(score[rejected].sum()), pairs),
        }

    def _margin(self, view: TokenView) -> tuple[Tensor, Tensor, Tensor]:
        """The margin ``h`` of each sequence's pair, each sequence's score and its derivative by the raw one, all ``[S]``."""
        require_pairs(view, "advantage.Pairwise")
        raw = sequence_score(view, self.score, self.to)
        score, slope = self._transformed(raw)
        if (more := view.at(self.shortfall)) != 0:
            short = (view.batch.side == 1) & (raw < 0)
            score, slope = torch.where(short, (1 + more) * score, score), torch.where(short, (1 + more) * slope, slope)
        return pair_difference(view, score), score, slope

    def _transformed(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        if self.transform == "log_odds":
            x = raw.clamp(max=-torch.finfo(raw.dtype).eps)  # an answer of probability 1 has infinite odds
            return x - torch.log(-torch.expm1(x)), -1.0 / torch.expm1(x)
        if self.transform == "log_sigmoid":
            return logsigmoid(raw), torch.sigmoid(-raw)
        if self.transform == "power" and self.alpha:
            x = self.alpha * raw
            bound = torch.inf if self.limit is None else self.limit
            flat = x.abs() > bound
            x = x.clamp(-bound, bound)
            return -torch.expm1(-x) / self.alpha, torch.where(flat, torch.zeros_like(x), torch.exp(-x))
        return raw, torch.ones_like(raw)

    def _offset(self, view: TokenView) -> Tensor | float:
        """What is subtracted from ``beta h``: one number, or one per sequence ``[S]``."""
        margin = view.at(self.margin)
        if self.gap is None:
            return margin
        return margin + pair_difference(view, reward_column(view, self.gap, view.in_pair, "advantage.Pairwise.gap"))

    def _label(self, view: TokenView) -> Tensor | float:
        """The probability that the chosen answer is the better one, on both sides of the pair."""
        if self.label is None:
            return 1.0
        chosen = view.in_pair & (view.batch.side == 1)
        label = torch.where(chosen, label_column(view, self.label, chosen, "advantage.Pairwise.label"), 0.0)
        return pair_difference(view, label)

    def _slope(self, h: Tensor, beta: float, offset: Tensor | float, label: Tensor | float) -> Tensor:
        """``df/dh``."""
        x, e = beta * h - offset, self.label_smoothing
        if self.f == "squared":
            return 2.0 * (x - 0.5) / beta
        if self.f == "hinge":
            return -beta * (x < 1.0).to(h.dtype)
        if self.f == "sigmoid":
            return -beta * torch.sigmoid(x) * torch.sigmoid(-x)
        if self.f == "reverse_kl":
            # p(1-p) before x - logit(1-e): at |x| = 1e4 the product is 0, not 0 * inf
            return beta * torch.sigmoid(x) * torch.sigmoid(-x) * (x - math.log1p(-e) + math.log(e))
        if self.debias:
            return -beta * (torch.sigmoid(-x) + e / (1 - 2 * e))
        # label * sigmoid(-x) - (1 - label) * sigmoid(x), smoothed
        return -beta * (torch.sigmoid(-x) - (1.0 - label) - e)

    def _loss(self, h: Tensor, beta: float, offset: Tensor | float, label: Tensor | float) -> Tensor:
        x, e = beta * h - offset, self.label_smoothing
        if self.f == "squared":
            return ((x - 0.5) / beta) ** 2
        if self.f == "hinge":
            return (1.0 - x).clamp(min=0.0)
        if self.f == "sigmoid":
            return torch.sigmoid(-x)
        if self.f == "reverse_kl":
            up, down = logsigmoid(x), logsigmoid(-x)
            return torch.exp(up) * (up - math.log1p(-e)) + torch.exp(down) * (down - math.log(e))
        if self.label is not None:
            return -label * logsigmoid(x) - (1.0 - label) * logsigmoid(-x)
        smoothed = -(1 - e) * logsigmoid(x)
        if e:
            smoothed = smoothed + (e if self.debias else -e) * logsigmoid(-x)
        return smoothed / (1 - 2 * e) if self.debias else smoothed


@dataclass(frozen=True)
class Pointwise:
    """Labelled answers, one by one: push a good one up and a bad one down.  No pairs are needed.

    Equation: ``r = beta (s - shift)``, ``y`` the label, ``A = -df/ds``; ``logistic``: ``f = -good y log sigmoid(r) - bad (1-y) log sigmoid(-r)``;
    ``sigmoid``: ``f = good y (1 - sigmoid(r)) + bad (1-y) (1 - sigmoid(-r))``; ``squared``: ``f = (good y + bad (1-y)) (s - (y - 1/2)/beta)**2``.
    Source: ``sigmoid`` with ``shift=mismatched``, KTO, arXiv 2402.01306; without a shift, on pairs, APO-zero, arXiv 2408.06266; ``logistic``
    with ``shift=running_mean``, BCO, arXiv 2404.04656; without, an outcome reward model, arXiv 2412.01981; ``squared``, SPPO, arXiv 2405.00675.

    ``f``: the loss.  ``score``, ``to``: as in :class:`Pairwise`.  ``beta``: inverse temperature.  ``label``: a reward column between 0 (bad) and
    1 (good), hard or soft; ``side`` takes the sides of pairs.  ``shift``: what the score is compared with, never differentiated: ``none`` 0;
    ``mismatched`` the mean log-ratio of answers put under other prompts of the step, at least 0: an estimate of the KL to the reference;
    ``running_mean`` the mean score of all answers seen in the run, this step's included, carried on from step to step.  ``good``, ``bad``:
    weights of the two classes, numbers or schedules.

    Wrong when: the classes are far from balanced and ``good`` and ``bad`` are equal: the larger class decides.  With a shift the whole step is
    coupled: the mean must not be taken per micro-batch.  ``sigmoid`` gives no gradient to an answer that is wrong by far.
    """

    f: Literal["logistic", "sigmoid", "squared"] = "logistic"
    score: Literal["log_ratio_sum", "log_ratio_mean", "logp_sum", "logp_mean", "value"] = "log_ratio_sum"
    to: str = "base"
    beta: Scalar = 0.1
    label: str = "label"
    shift: Literal["none", "mismatched", "running_mean"] = "none"
    good: Scalar = 1.0
    bad: Scalar = 1.0
    live = True

    def __post_init__(self) -> None:
        name = "advantage.Pointwise"
        known = {"f": ("logistic", "sigmoid", "squared"), "score": SCORES, "shift": ("none", "mismatched", "running_mean")}
        for key, choices in known.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{name}: {key}={getattr(self, key)!r} does not exist; choose from {', '.join(choices)}")
        check_beta(name, self.beta, self.score, self.f != "squared")
        for key in ("good", "bad"):
            value = getattr(self, key)
            if not callable(value) and value < 0:
                raise ValueError(f"{name}: {key}={value} is the weight of a class and must not be negative")
        if self.f == "squared" and self.shift != "none":
            raise ValueError(f"{name}: f=squared pins each score to its own target; set shift=none (it is {self.shift})")
        if self.shift == "mismatched" and not self.score.startswith("log_ratio"):
            raise ValueError(
                f"{name}: shift=mismatched estimates a KL, so it needs score=log_ratio_sum or log_ratio_mean, not {self.score}"
            )

    def fits(self, stream: Any) -> None:
        check_stream("advantage.Pointwise", self.score, stream)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to}) if self.score.startswith("log_ratio") else frozenset()

    @property
    def coupling(self) -> str:
        return "sequence" if self.shift == "none" else "batch"

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset({"mismatched"}) if self.shift == "mismatched" else frozenset()

    @property
    def remembers(self) -> bool:
        return self.shift == "running_mean"

    @property
    def formula(self) -> str:
        part = f"log(pi/pi_{self.to})" if self.score.startswith("log_ratio") else "log pi"
        beta, score = number(self.beta), "value" if self.score == "value" else f"{self.score.rsplit('_', 1)[1]} {part}"
        if self.f == "squared":
            return f"(-f'(s)) [f = (s - (y - 1/2)/{beta})^2, s = {score}, y = {self.label}]"
        weights = "" if (self.good, self.bad) == (1.0, 1.0) else f", good {number(self.good)}, bad {number(self.bad)}"
        shift = {"none": "", "mismatched": " - KL", "running_mean": " - running mean"}[self.shift]
        f = {"logistic": "-log sigmoid(+/- r)", "sigmoid": "1 - sigmoid(+/- r)"}[self.f]
        return f"(-f'(s)) [f = {f}, r = {beta} (s{shift}), s = {score}, + where {self.label}{weights}]"

    def values(self, view: TokenView) -> Tensor:
        score, beta, y, good, bad = self._parts(view)
        if self.f == "squared":
            return view.spread(-2.0 * (good + bad) * (score - (y - 0.5) / beta))
        r = beta * (score - self._shift(view))
        if self.f == "sigmoid":
            return view.spread(beta * (good - bad) * torch.sigmoid(r) * torch.sigmoid(-r))
        return view.spread(beta * (good * torch.sigmoid(-r) - bad * torch.sigmoid(r)))

    def objective(self, view: TokenView) -> Metrics:
        """The published loss, the share of answers on the right side of the shift, the share of good ones, ``beta`` times the score of each
        class, and ``beta`` times the shift, per answer."""
        score, beta, y, good, bad = self._parts(view)
        shift = self._shift(view)
        r = beta * (score - shift)
        loss = {
            "squared": lambda: (good + bad) * (score - (y - 0.5) / beta) ** 2,
            "sigmoid": lambda: good * torch.sigmoid(-r) + bad * torch.sigmoid(r),
            "logistic": lambda: -good * logsigmoid(r) - bad * logsigmoid(-r),
        }[self.f]()
        here, up = view.member, view.member & (y > 0.5)
        count, many = float(here.sum()), float(up.sum())
        return {
            "preference_loss": (float(loss[here].sum()), count),
            "accuracy": (float(((r > 0) == (y > 0.5))[here].sum()), count),
            "good": (many, count),
            "good_score": (beta * float(score[up].sum()), many),
            "bad_score": (beta * float(score[here & ~up].sum()), count - many),
            **({} if self.shift == "none" else {"shift": (beta * float(shift) * count, count)}),
        }

    def remember(self, view: TokenView) -> dict[str, float]:
        score = sequence_score(view, self.score, self.to)
        return {
            "sum": view.recall(self, "sum") + float(score[view.member].double().sum()),
            "count": view.recall(self, "count") + float(view.member.sum()),
        }

    def _parts(self, view: TokenView) -> tuple[Tensor, float, Tensor, Tensor, Tensor]:
        """Score, beta, label, and the label's two parts with their weights."""
        y = label_column(view, self.label, view.member, "advantage.Pointwise.label")
        return sequence_score(view, self.score, self.to), view.at(self.beta), y, view.at(self.good) * y, view.at(self.bad) * (1 - y)

    def _shift(self, view: TokenView) -> Tensor | float:
        if self.shift == "none" or not bool(view.on.any()):
            return 0.0
        view.require_whole(f"advantage.Pointwise(shift={self.shift})")
        if self.shift == "running_mean":
            now = self.remember(view)
            return now["sum"] / now["count"]
        other = view.beside("mismatched")
        if not bool(other.on.any()):
            raise ValueError(
                f"stream {view.name!r}: advantage.Pointwise(shift=mismatched) needs rows whose answer stands under another prompt (context "
                "'mismatched'), and the batch has none; posttrain.data.contexts makes them from a step with two different prompts"
            )
        return sequence_score(other, self.score, self.to)[other.member].mean().clamp(min=0.0)


@dataclass(frozen=True)
class Listwise:
    """Several answers to one prompt with a reward each: draw the policy's shares of them towards the rewards' shares.

    Equation: over a list of K answers ``q = softmax(R / temperature)``, ``r = beta s``, ``p = softmax(r)``, ``A = -df/ds``; ``softmax``:
    ``f = -sum q log p``; ``reverse_kl``: ``f = sum p (log p - log q)``; ``noise_contrastive``: ``f = -sum (q log sigmoid(r) + log sigmoid(-r) / K)``.
    Source: ``softmax`` (InfoNCA) and ``noise_contrastive`` (NCA), arXiv 2402.05369; ``reverse_kl``, EXO, arXiv 2402.00856.

    ``f``: the loss.  ``score``, ``to``, ``beta``: as in :class:`Pairwise`.  ``of``: the reward column compared within a group; ``side`` compares
    the two sides of a pair instead (rewards 1 and 0).  ``temperature``: of the rewards; 0 puts the whole target on the best (shared by ties).

    Wrong when: rewards of different scale share one ``temperature``; or the aggregation does not count lists (``PairSum`` for sides,
    ``GroupSum`` for groups).  ``noise_contrastive`` also bounds the likelihood itself: ``p`` of a lone best answer stops at ``r = log(K q)``.
    """

    f: Literal["softmax", "reverse_kl", "noise_contrastive"] = "softmax"
    score: Literal["log_ratio_sum", "log_ratio_mean", "logp_sum", "logp_mean", "value"] = "log_ratio_sum"
    to: str = "base"
    beta: Scalar = 0.1
    of: str = "reward"
    temperature: float = 1.0
    coupling = "group"
    live = True

    def __post_init__(self) -> None:
        name = "advantage.Listwise"
        for key, value, known in (("f", self.f, ("softmax", "reverse_kl", "noise_contrastive")), ("score", self.score, SCORES)):
            if value not in known:
                raise ValueError(f"{name}: {key}={value!r} does not exist; choose from {', '.join(known)}")
        check_beta(name, self.beta, self.score, True)
        if not self.temperature >= 0:
            raise ValueError(f"{name}: temperature={self.temperature} must not be negative")
        if self.f == "reverse_kl" and self.temperature == 0:
            raise ValueError(f"{name}: f=reverse_kl needs a temperature above 0: against a hard target it is infinite")

    def fits(self, stream: Any) -> None:
        check_stream("advantage.Listwise", self.score, stream, both_sides=True)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.to}) if self.score.startswith("log_ratio") else frozenset()

    @property
    def formula(self) -> str:
        part = f"log(pi/pi_{self.to})" if self.score.startswith("log_ratio") else "log pi"
        f = {"softmax": "-sum q log p", "reverse_kl": "KL(p || q)", "noise_contrastive": "-sum (q log sigmoid(r) + log sigmoid(-r)/K)"}[
            self.f
        ]
        r = f"{number(self.beta)} " + ("value" if self.score == "value" else f"{self.score.rsplit('_', 1)[1]} {part}")
        return f"(-f'(s)) [f = {f}, p = softmax(r), r = {r}, q = softmax({self.of}/{self.temperature:g}), over the {self._unit}]"

    @property
    def _unit(self) -> str:
        return "pair" if self.of == "side" else "group"

    def values(self, view: TokenView) -> Tensor:
        view = self._whole(view)
        beta, r, target, log_target, codes, count = self._parts(view)
        if self.f == "noise_contrastive":
            return view.spread(beta * (target * torch.sigmoid(-r) - torch.sigmoid(r) / count))
        log_p = self._log_softmax(view, codes, r)
        p = torch.exp(log_p)
        if self.f == "softmax":
            return view.spread(beta * (target - p))
        gap = log_p - log_target
        return view.spread(-beta * p * (gap - view.code_sum(codes, p * gap)))

    def objective(self, view: TokenView) -> Metrics:
        """The published loss per list, and how often the policy's favourite is the one with the highest reward."""
        view = self._whole(view)
        _, r, target, log_target, codes, count = self._parts(view)
        log_p = self._log_softmax(view, codes, r)
        if self.f == "noise_contrastive":
            each = -target * logsigmoid(r) - logsigmoid(-r) / count
        elif self.f == "softmax":
            each = torch.where(target > 0, -target * log_p, 0.0)
        else:
            each = torch.exp(log_p) * (log_p - log_target)
        here = view.member
        lists = float((here / count).sum())
        best = (r == view.code_max(codes, r)) & (target == view.code_max(codes, target))
        hits = (view.code_count(codes, best) > 0) & here
        return {
            "preference_loss": (float(each[here].sum()), lists),
            "accuracy": (float((hits / count).sum()), lists),
        }

    def _whole(self, view: TokenView) -> TokenView:
        """The stream with both sides of its pairs as members: an empty answer is on the list too."""
        if self.of != "side":
            return view
        require_pairs(view, "advantage.Listwise")
        return replace(view, member=view.in_pair)

    def _parts(self, view: TokenView) -> tuple[float, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """beta, r, target and its logarithm, the lists' codes and their sizes (1 outside lists)."""
        if self.of == "side":
            codes, reward = view.batch.pair, (view.batch.side == 1).to(view.logp.dtype)
        else:
            codes = view.batch.group
            alone = view.member & (codes < 0)
            if bool(alone.any()):
                sample = view.batch.sample_ids[int(alone.nonzero()[0])]
                raise ValueError(f"stream {view.name!r}: advantage.Listwise compares the answers of a group; sample {sample!r} is in none")
            reward = reward_column(view, self.of, view.member, "advantage.Listwise.of")
        count = view.code_count(codes, view.member).clamp(min=1)
        if self.temperature:
            log_target = self._log_softmax(view, codes, reward / self.temperature)
        else:
            best = reward == view.code_max(codes, reward)
            log_target = torch.where(best, -torch.log(view.code_count(codes, best).to(reward.dtype)), -torch.inf)
        beta = view.at(self.beta)
        return beta, beta * sequence_score(view, self.score, self.to), torch.exp(log_target), log_target, codes, count

    def _log_softmax(self, view: TokenView, codes: Tensor, values: Tensor) -> Tensor:
        """Within each list, ``[S]``; outside lists no number to be used."""
        shifted = values - view.code_max(codes, values)
        return shifted - torch.log(view.code_sum(codes, torch.exp(shifted)))
