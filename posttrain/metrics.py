"""Every metric name, how it is reduced, and what it means; and the accumulator that reduces it.

A metric reaches the accumulator as a ``(sum, count)`` pair per micro-batch and rank.  Pairs are added and divided once, at the end, so a
value depends neither on how the step was cut nor on how many ranks took part.  Names are declared below, with ``{}`` for the parts a recipe
chooses; ``docs/metrics.md`` is made from this table (``python -m posttrain.metrics > docs/metrics.md``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

Reduce = Literal["sum", "mean", "max", "quantile"]
Pairs = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Metric:
    """One name.  ``denominator`` says what a mean divides by, ``quantile`` in [0, 1] which one is taken."""

    name: str
    reduce: Reduce
    denominator: str
    unit: str
    doc: str
    quantile: float | None = None

    def __post_init__(self) -> None:
        if (self.reduce == "quantile") != (self.quantile is not None):
            raise ValueError(f"metric {self.name!r}: reduce='quantile' and quantile=... must be given together")
        if self.reduce == "mean" and not self.denominator:
            raise ValueError(f"metric {self.name!r} is a mean and must say of what: set denominator")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names this declaration covers; a ``{part}`` has no slash."""
        return re.compile("".join("[^/]+" if p.startswith("{") else re.escape(p) for p in re.split(r"(\{[a-z]+\})", self.name)))


def _family(rows: str) -> list[Metric]:
    """``name | reduce | denominator | unit | doc`` per line."""
    out = []
    for line in rows.strip().splitlines():
        name, reduce, denominator, unit, doc = (part.strip() for part in line.split("|"))
        out.append(Metric(name, reduce, denominator, unit, doc))  # type: ignore[arg-type]
    return out


FAMILIES: dict[str, list[Metric]] = {
    "Signal": _family("""
        reward/mean | mean | scored rollouts | reward | combined reward, shaping included
        reward/std | mean | steps | reward | standard deviation of the combined reward over the step's rollouts
        reward/unshaped | mean | scored rollouts | reward | the primary reward alone, before weights and shaping
        reward/constant_groups | mean | groups | share | groups whose rollouts all have one reward: they teach nothing
        reward/{reward}/mean | mean | valid scores | reward | one reward function's own value
        reward/{reward}/min | mean | steps | reward | its smallest value in the step
        reward/{reward}/max | max | | reward | its largest value in the step
        reward/{reward}/{part}/mean | mean | valid scores | reward | a further number of a reward that returns several
        reward/{reward}/{part}/min | mean | steps | reward | its smallest value in the step
        reward/{reward}/{part}/max | max | | reward | its largest value in the step
        advantage/abs | mean | rollouts | advantage | mean absolute advantage
        advantage/dead | mean | rollouts | share | rollouts whose advantage is exactly 0
        advantage/dead_groups | mean | groups | share | groups of several with equal rewards
        advantage/single_groups | mean | groups | share | groups left with one scored rollout, which has no baseline
    """),
    "Mixture": _family("""
        mixture/demonstrations | sum | | demonstrations | demonstrations a gate let in beside the groups
        mixture/groups_left_out | sum | | groups | groups a gate left out, demonstrations learnt in their place
        mixture/pairs | sum | | pairs | preference pairs made of this step's groups
        mixture/injected | sum | | demonstrations | demonstrations inside groups, sharing their baseline
    """),
    "Verifiers": _family("""
        reward/failed | mean | rollouts | share | rollouts whose verdict failed: masked, never counted as 0
        reward/masked | sum | | rollouts | finished rollouts without a reward, because a required verdict failed
        reward/unfinished | sum | | rollouts | rollouts that were aborted and therefore not scored
        reward/workers_killed | max | | processes | verifier processes ended for overrunning, since the start
        reward/{reward}/ok | sum | | verdicts | verdicts given
        reward/{reward}/bad_format | sum | | verdicts | answers that could not be read; a real score
        reward/{reward}/timeout | sum | | verdicts | verdicts that took too long; masked
        reward/{reward}/error | sum | | verdicts | verdicts that raised; masked
    """),
    "Streams of the loss (a stream is a name of the recipe: rollouts, demos, pairs, ...)": _family("""
        loss | sum | | nats | the coefficient-form loss; comparable within one method only
        {stream}/tokens | sum | | tokens | tokens the stream learns from
        {stream}/score | mean | columns | reward | the number a scalar head gives: a reward model's score, a critic's value
        {stream}/value_loss | mean | columns | nats or squared reward | the published loss of a scalar head towards a label or a return
        {stream}/value_error | mean | columns | squared reward | squared distance of a critic's value from the return, before clipping
        {stream}/value_clipped | mean | columns | share | columns where the clipped value error is the larger one, so that nothing is learnt
        {stream}/nll | mean | tokens | nats per token | negative log-prob; over sampled tokens an estimate of the policy's entropy
        {stream}/objective | sum | | objective | the stream's own published objective, where it has one
        {stream}/advantage_abs | mean | tokens | advantage | mean absolute advantage per token
        {stream}/zero_weight | mean | tokens | share | tokens whose weight in the gradient is exactly 0
        {stream}/{term}/masked | mean | tokens | share | tokens a mask removes (clip: outside the trust region on the wrong side)
        {stream}/{term}/factor | mean | tokens | factor | mean factor of a mask
        {stream}/{term}/clamped | mean | tokens | share | tokens whose log-ratio was clamped before a KL estimate
        {stream}/opponents | mean | answers | answers | how many answers of the group make up the opponent in effect
        {stream}/information | mean | answers | nats | how much likelier a thought makes the text behind it
        {stream}/alone | mean | tokens | share | tokens at places that no other answer of their group reaches, where a baseline is taken place by place
        {stream}/{regularizer}/drift | mean | tokens | nats per token | log-ratio to the policy a gated KL stays near, of this step's tokens
        {stream}/{regularizer}/running | mean | optimizer steps | nats per token | running mean of that, which the threshold is compared with
        {stream}/{regularizer}/gate | mean | optimizer steps | factor | what a gated KL is multiplied by, by the entropy
        {stream}/{regularizer}/reward | mean | answers | reward | combined reward of the stream's answers, for a controller to follow
        {stream}/reward_kl | mean | answers | nats | estimated KL of a whole answer, where it is part of the reward
        {stream}/log_ratio | mean | tokens | nats | log-ratio of two policies that serves as the advantage (teacher over policy: minus the KL)
        {stream}/log_ratio_clamped | mean | tokens | share | tokens whose log-ratio was clamped before it became an advantage
        {stream}/preference_loss | mean | pairs | nats | the published preference loss, per pair, list or labelled answer
        {stream}/classification_loss | mean | groups | nats | the published loss of rewards as labels
        {stream}/right_by_row | mean | rows | 1 | rows of the matrix led by a right entry
        {stream}/right_by_column | mean | columns | 1 | columns of the matrix led by a right entry
        {stream}/accuracy | mean | pairs | share | pairs ranked the right way round, lists whose best is first, answers on their label's side
        {stream}/margin | mean | pairs | reward | implicit reward of the chosen minus that of the rejected
        {stream}/chosen_score | mean | pairs | reward | implicit reward of the chosen answer
        {stream}/rejected_score | mean | pairs | reward | implicit reward of the rejected answer
        {stream}/implicit_reward | mean | answers | reward | sum of the rewards an implicit process reward model gives the tokens of an answer
        {stream}/good | mean | answers | share | answers labelled good
        {stream}/good_score | mean | good answers | reward | implicit reward of the answers labelled good
        {stream}/bad_score | mean | bad answers | reward | implicit reward of the answers labelled bad
        {stream}/shift | mean | answers | reward | what labelled answers are compared with: the estimated KL, or the running mean
        lookahead/{name} | mean | looks | slope | how much the utility would gain from more of a coefficient in the step before, as its controller scales it
        control/{name} | mean | optimizer steps | coefficient | a coefficient that follows a metric, as this step used it
        {stream}/{regularizer} | mean | tokens | nats per token | a regulariser's value: KL to a reference, entropy, ...
    """),
    "Train/rollout mismatch": _family("""
        mismatch/tokens | sum | | tokens | sampled tokens compared
        mismatch/mean_abs | mean | tokens | nats | mean absolute difference of the learner's and the engine's log-prob
        mismatch/max_abs | max | | nats | largest absolute difference
        mismatch/mean_exp_abs | mean | tokens | factor | mean of exp of the absolute difference; 1 is perfect
        mismatch/k1 | mean | tokens | nats | estimate of KL(engine, learner), unbiased and signed
        mismatch/k3 | mean | tokens | nats | estimate of KL(engine, learner), never negative
        mismatch/routing | mean | choices | share | replayed experts that the learner would have chosen too
    """),
    "Rollouts": _family("""
        rollout/generated | sum | | rollouts | rollouts sampled for this step
        rollout/kept | sum | | groups | groups that went on to the learner
        rollout/dropped/{reason} | sum | | groups | groups left out, by reason
        rollout/rounds | sum | | rounds | rounds of sampling it took to fill the step
        rollout/prompts | sum | | prompts | prompts used
        rollout/tokens_mean | mean | rollouts | tokens | length of a rollout
        rollout/tokens_max | max | | tokens | the longest rollout
        rollout/truncated | mean | rollouts | share | rollouts that hit the token limit
        rollout/repetition | mean | rollouts | share | 4-grams of a rollout that occurred in it before
        rollout/staleness | max | | versions | age of the oldest token when it was learnt from, waiting included
        rollout/engines | mean | steps | engines | engines alive
        rollout/engine_deaths | max | | deaths | engines lost since the start
        rollout/retried_groups | max | | groups | groups asked for again after an engine was lost, since the start
    """),
    "Learner": _family("""
        learner/grad_norm | mean | optimizer steps | norm | gradient norm before clipping
        learner/lr | mean | optimizer steps | rate | learning rate
        learner/update_norm_ratio | mean | optimizer steps | ratio | norm of the update over norm of the weights
        learner/tokens | sum | | tokens | columns seen, prompts included
        learner/time_s | sum | | seconds | time in optimizer steps, forward and backward included
        learner/two_passes | mean | optimizer steps | share | steps whose token weights were formed in a pass of their own
        learner/base_moved | sum | | moves | times the base the loss compares with was moved towards the policy
    """),
    "Critic": _family("""
        critic/tokens | sum | | tokens | sampled tokens whose states were valued
        critic/score | mean | tokens | reward | the value of a state
        critic/value_loss | mean | tokens | squared reward | the critic's published loss
        critic/value_error | mean | tokens | squared reward | squared distance of a value from the return, before clipping
        critic/value_clipped | mean | tokens | share | states where the clipped error is the larger one, so that nothing is learnt
        critic/explained_variance | mean | optimizer steps | share | of the returns' variance, by the values recorded before the step
        critic/objective | sum | | objective | the critic's own objective, where it has one
        critic/loss | sum | | loss | the critic's loss
        critic/advantage_abs | mean | tokens | reward | mean absolute distance that a value is drawn
        critic/zero_weight | mean | tokens | share | states that nothing is learnt from
        critic/grad_norm | mean | optimizer steps | norm | gradient norm before clipping
        critic/lr | mean | optimizer steps | rate | learning rate
        critic/update_norm_ratio | mean | optimizer steps | ratio | norm of the update over norm of the weights
        critic/time_s | sum | | seconds | time in the critic's optimizer steps
    """),
    "Packing and data": _family("""
        pack/tokens | sum | | tokens | columns packed
        pack/sequences | sum | | sequences | sequences packed
        pack/micro_batches | sum | | micro-batches | micro-batches, all ranks
        pack/empty | sum | | micro-batches | empty ones, run so that every rank takes part
        pack/oversize | sum | | sequences | sequences longer than learner.micro_batch_tokens, each alone
        pack/cut_sets | sum | | sets | groups or pairs that did not fit one micro-batch; their weights take two passes
        pack/fill | mean | optimizer steps | share | tokens over room
        pack/imbalance | max | | ratio | the busiest rank's tokens over the mean rank's
        data/dropped/{reason} | sum | | items | items the step did not learn from, by reason
    """),
    "Evaluation": _family("""
        eval/accuracy | mean | held-out prompts | share | held-out accuracy
        eval/low | mean | held-out prompts | share | lower end of its 95 % interval
        eval/high | mean | held-out prompts | share | upper end of its 95 % interval
    """),
    "Time": _family("""
        progress/step | max | | steps | finished steps of the stage
        time/step_s | sum | | seconds | from the end of the last step to the end of this one
        time/tokens_per_s | mean | seconds | tokens per second | tokens learnt from, over the whole step's time
        time/{phase}_s | sum | | seconds | time of one phase of this step: rollout, learn, publish, evaluate, checkpoint
    """),
}
METRICS: tuple[Metric, ...] = tuple(m for family in FAMILIES.values() for m in family)


@cache
def find(name: str) -> Metric | None:
    """The declaration of a name, the one with the fewest free parts first; ``None`` when there is none."""
    fitting = [m for m in METRICS if m.pattern.fullmatch(name)]
    return min(fitting, key=lambda m: m.name.count("{"), default=None)


class Accumulator:
    """Reduces pairs by name: the order and the number of the slices do not matter.

    A name that is not declared is a mean, or a sum when its counts are all 0.  A mean over nothing (every micro-batch masked) is left out of the
    result instead of being NaN.

    >>> a = Accumulator(); a.add({"demos/nll": (6.0, 3.0)}); a.add({"demos/nll": (2.0, 1.0)}); a.result()
    {'demos/nll': 2.0}
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float, float]] = {}
        self._values: dict[str, list[float]] = {}

    def add(self, pairs: Pairs) -> None:
        """Add ``name -> (sum, count)``.  For a maximum the first number is the value, and a count of 0 means that there was nothing."""
        for name, (value, count) in pairs.items():
            metric = find(name)
            if metric is not None and metric.reduce == "quantile":
                raise ValueError(f"{name} is a quantile and cannot be formed from sums; give its values to observe()")
            old, n = self._pairs.get(name, (None, 0.0))
            if metric is not None and metric.reduce == "max":
                if count:
                    self._pairs[name] = (value if old is None else max(old, value), n + count)
            else:
                self._pairs[name] = ((old or 0.0) + value, n + count)

    def observe(self, name: str, values: Iterable[float]) -> None:
        """Add single values of a metric, of any reduction."""
        self._values.setdefault(name, []).extend(values)

    def merge(self, other: Accumulator) -> None:
        """Add everything another accumulator holds."""
        self.add(other._pairs)
        for name, values in other._values.items():
            self.observe(name, values)

    @property
    def pairs(self) -> dict[str, tuple[float, float]]:
        """What was added so far, still in a form that can be added."""
        return dict(self._pairs)

    def result(self) -> dict[str, float]:
        """One number per metric."""
        pairs = dict(self._pairs)
        out: dict[str, float] = {}
        for name, values in self._values.items():
            metric = find(name)
            if metric is not None and metric.quantile is not None:
                out |= {name: quantile(values, metric.quantile)} if values else {}
            elif metric is not None and metric.reduce == "max":
                out |= {name: max(values)} if values else {}
            else:
                old, n = pairs.get(name, (0.0, 0.0))
                pairs[name] = (old + math.fsum(values), n + len(values))
        for name, (total, count) in pairs.items():
            metric = find(name)
            reduce = metric.reduce if metric is not None else ("mean" if count else "sum")
            if reduce != "mean":
                out[name] = max(total, out.get(name, -math.inf)) if reduce == "max" else total
            elif count:
                out[name] = total / count
        return out


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile, linear between neighbours."""
    if not values or not 0 <= q <= 1:
        raise ValueError(f"a quantile needs values and 0 <= q <= 1, got {len(values)} values and q={q}")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a sequence that occurred in it before; 0 for one too short to repeat."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def render_docs() -> str:
    """``docs/metrics.md``."""
    from posttrain.alarms import default_rules

    lines = [
        "# Metrics",
        "",
        "Made from `posttrain/metrics.py` and `posttrain/alarms.py` by `python -m posttrain.metrics > docs/metrics.md`; a test keeps them equal.",
        "",
        "Names are an interface. They are the keys of a row of `metrics.jsonl` (beside `step`, `stage` and `time`, seconds since 1970) and the names in",
        "TensorBoard and Weights & Biases. Steps count finished steps, from 1. A part in braces is chosen by the recipe. Sums and counts are",
        "added over micro-batches and ranks and divided once, so no value depends on micro-batching, packing or the number of ranks. A metric with",
        "nothing to average (a masked batch, a step without evaluation) is absent, never NaN.",
        "",
    ]
    for family, metrics in FAMILIES.items():
        lines += [f"## {family}", "", "| name | reduction | unit | meaning |", "|---|---|---|---|"]
        for m in metrics:
            how = (
                f"{m.reduce} over {m.denominator}" if m.reduce == "mean" else m.reduce if m.quantile is None else f"quantile {m.quantile:g}"
            )
            lines.append(f"| `{m.name}` | {how} | {m.unit} | {m.doc} |")
        lines.append("")
    lines += [
        "## Alarms",
        "",
        "Rules over the recent rows. One is told once when it begins and again only after it has cleared. The thresholds are ours and are settings",
        "of the rule. `check.alarm=stop` turns an alarm into an error.",
        "",
        "| alarm | fires when | what to look at |",
        "|---|---|---|",
    ]
    for rule in default_rules():
        lines.append(f"| `{rule.name}` | {rule.when} | {rule.advice} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_docs(), end="")
