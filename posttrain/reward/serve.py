"""Engines for the rewards that ask a language model: which models a run must serve beside its policy, and who asks which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.reward.judge import POLICY, text_of

MARGIN = 32
"""Tokens a question may have beyond those counted: the template's fields cut words differently than they were sampled."""


def judges(rewards: Mapping[str, Any]) -> dict[str, Any]:
    """The rewards that ask a model, by name."""
    return {name: reward for name, reward in rewards.items() if hasattr(reward, "bound") and hasattr(reward, "model")}


def frozen(rewards: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Model -> the judges that ask it, the policy left out: each model is served once."""
    out: dict[str, list[Any]] = {}
    for judge in judges(rewards).values():
        if judge.model != POLICY:
            out.setdefault(judge.model, []).append(judge)
    return out


def num_engines(rewards: Mapping[str, Any]) -> int:
    """Engines of frozen judges."""
    return sum(max(j.num_engines for j in asked) for asked in frozen(rewards).values())


def asks_policy(rewards: Mapping[str, Any]) -> bool:
    return any(j.model == POLICY for j in judges(rewards).values())


def length(judge: Any, renderer: Any, prompt_tokens: int, answer_tokens: int) -> int:
    """Positions the judge's engine needs for its longest question and verdict."""
    if judge.max_model_len is not None:
        return int(judge.max_model_len)
    template = len(renderer.prompt(text_of(judge)).ids) + sum(len(renderer.tokenizer(p)["input_ids"]) + 4 for p in judge.principles)
    answers = judge.answers + (judge.uses_reference and "{reference}" in text_of(judge))
    return template + prompt_tokens + answers * answer_tokens + judge.verdict.max_tokens + MARGIN


def longest(asked: Sequence[Any], renderer: Any, prompt_tokens: int, answer_tokens: int) -> int:
    return max((length(j, renderer, prompt_tokens, answer_tokens) for j in asked), default=0)


def bind(rewards: Mapping[str, Any], engines: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The rewards, judges bound to their engines.  ``engines``: model -> (pool, renderer)."""
    asked = judges(rewards)
    return {name: reward.bound(name, *engines[reward.model]) if name in asked else reward for name, reward in rewards.items()}
