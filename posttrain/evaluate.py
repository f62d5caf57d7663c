"""Accuracy from scored groups: pass@k, average, majority vote, by level, each with its interval.  No engine here: groups in, numbers out.

Verifier errors are reported, never counted as wrong: a rollout without a value leaves the numbers and is listed under ``failed``;
``lowest`` and ``highest`` say what the accuracy would be had all of them been wrong or right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from posttrain.records import Group, Rollout
from posttrain.statistics import Interval, multi_bootstrap, wilson

RIGHT = 1 - 1e-9


def pass_at_k(n: int, c: int, k: int) -> float:
    """``1 - C(n-c, k) / C(n, k)``: chance that ``k`` out of ``n`` samples, ``c`` of them right, hold a right one (arXiv 2107.03374)."""
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(
            f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, but n={n} samples have c={c} right; sample more, or ask for a smaller k"
        )
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def average_at_n(right: Sequence[bool]) -> float:
    """Share of right samples."""
    if not right:
        raise ValueError("there are no samples to average")
    return sum(right) / len(right)


def majority_at_k(answers: Sequence[str], right: Sequence[bool], k: int | None = None) -> float:
    """Accuracy of the most frequent answer among the first ``k`` samples; equally frequent answers share the vote equally.

    ``right[i]`` says whether ``answers[i]`` is right; samples with one answer may be judged differently (many right expressions), then the
    answer counts by its share of right ones.
    """
    k = len(answers) if k is None else k
    if not 1 <= k <= len(answers) or len(answers) != len(right):
        raise ValueError(f"majority@{k} needs that many samples, but there are {len(answers)} answers and {len(right)} verdicts")
    votes = Counter(answers[:k])
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    shares = [average_at_n([r for a, r in zip(answers[:k], right[:k], strict=True) if a == winner]) for winner in winners]
    return math.fsum(shares) / len(shares)


def item_interval(per_item: Sequence[float], level: float = 0.95, rng: int = 0) -> Interval:
    """Interval of the mean over test items for one given model: Wilson when every item is 0 or 1, else a bootstrap over items."""
    if not per_item:
        raise ValueError("there are no items to report on; every verifier failed, or the evaluation set is empty")
    if all(v in (0.0, 1.0) for v in per_item):
        return wilson(sum(per_item), len(per_item), level)
    return multi_bootstrap(np.asarray(per_item)[None], over=("items",), level=level, rng=rng)


def _value(rollout: Rollout, score: str | None) -> float | None:
    if score is None:
        return rollout.reward
    if score not in rollout.scores:
        if not rollout.scores:  # aborted before it was scored
            return None
        raise ValueError(f"rollout {rollout.sample_id!r} has no score {score!r}; it has {', '.join(rollout.scores) or 'none'}")
    return rollout.scores[score].value


def accuracy_report(
    groups: Iterable[Group],
    *,
    score: str | None = None,
    k: Sequence[int] = (),
    answer_of: Callable[[Rollout], str] | None = None,
    threshold: float = RIGHT,
    level: float = 0.95,
) -> dict[str, Any]:
    """One JSON-ready report on one model.

    ``score``       the reward that decides what is right (a value of at least ``threshold``); ``None``: the combined reward
    ``k``           which pass@k to report; a prompt with fewer valid samples refuses
    ``answer_of``   how to read a rollout's answer for the majority vote; ``None``: no vote

    Returns ``accuracy``, ``interval`` (low, high), ``method``, ``n`` (prompts counted), ``samples``, ``failed``, ``unscored_prompts``,
    ``lowest`` and ``highest``, ``truncated``, ``mean_tokens``, ``pass@k``, ``majority``, and ``by_level``.  Raises ``ValueError`` for
    duplicate prompts.
    """
    groups = list(groups)
    repeated = [i for i, count in Counter(g.id for g in groups).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} prompts occur more than once in the evaluation (e.g. {repeated[0]!r}); remove the duplicates")
    verdicts: list[tuple[Group, list[tuple[Rollout, bool]]]] = []
    failed = bounds_low = bounds_high = 0.0
    for group in groups:
        valued = [(r, _value(r, score)) for r in group.rollouts]
        valid = [(r, v >= threshold) for r, v in valued if v is not None]
        missing, size = len(valued) - len(valid), max(1, len(valued))
        failed += missing
        bounds_low += sum(right for _, right in valid) / size
        bounds_high += (sum(right for _, right in valid) + missing) / size
        verdicts.append((group, valid))
    scored = [(group, valid) for group, valid in verdicts if valid]
    per_item = [average_at_n([right for _, right in valid]) for _, valid in scored]
    whole = item_interval(per_item, level)
    rollouts = [r for _, valid in scored for r, _ in valid]
    report: dict[str, Any] = {
        "accuracy": whole.mean,
        "interval": (whole.low, whole.high),
        "level": level,
        "method": whole.method,
        "n": len(scored),
        "samples": len(rollouts),
        "failed": int(failed),
        "unscored_prompts": len(groups) - len(scored),
        "lowest": bounds_low / len(groups),
        "highest": bounds_high / len(groups),
        "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        "mean_tokens": sum(r.num_tokens for r in rollouts) / len(rollouts),
    }
    for width in k:
        rates = [pass_at_k(len(valid), sum(right for _, right in valid), width) for _, valid in scored]
        report[f"pass@{width}"] = _short(item_interval(rates, level))
    if answer_of is not None:
        votes = [majority_at_k([answer_of(r) for r, _ in valid], [right for _, right in valid]) for _, valid in scored]
        report["majority"] = _short(item_interval(votes, level))
    levels = sorted({group.prompt.level for group, _ in scored if group.prompt.level is not None})
    by_level = {n: [v for (group, _), v in zip(scored, per_item, strict=True) if group.prompt.level == n] for n in levels}
    report["by_level"] = {n: _short(item_interval(values, level)) for n, values in by_level.items()}
    return report


def _short(interval: Interval) -> Mapping[str, Any]:
    fields = asdict(interval)
    return {"accuracy": fields["mean"], "interval": (fields["low"], fields["high"]), "n": fields["num_items"], "method": fields["method"]}
