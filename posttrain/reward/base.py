"""What a reward is, and how one call of it becomes a :class:`Score`.

A reward is a plain function (or an object with ``__call__``), sync or async, that names the arguments it wants::

    def my_reward(completion, answer):            # any of ARGUMENTS, in any order; **kwargs receives all of them
        return float(answer in completion)

It returns a number, a ``Score``, or a mapping with ``value`` (and optionally ``status``, ``detail``, and further numbers, which are kept
beside it as ``name/part``).  A function that names the plural forms (``prompts``, ``completions``, ``answers``, ...) is called with lists,
once per group, and returns one result per rollout.

Attributes a reward may carry (all optional):

``execution``   ``"process"`` (default for sync: can be killed at its deadline), ``"inline"`` (for bounded, trusted code: no overhead),
                ``"thread"`` (for functions that cannot be sent to a process; a hang is counted but goes on using the thread)
``timeout_s``   its own deadline in seconds per call, by the clock on the wall
``cpu_s``       processor seconds one call may use (process only): a limit that does not depend on how busy the machine is
``scope``       for the plural form: ``"group"`` (default, whole groups) or ``"batch"`` (everything at once)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.records import Rollout, Score

Execution = Literal["process", "inline", "thread", "async"]
Reward = Callable[..., Any]
"""A plain function, or an object with ``__call__``."""

ARGUMENTS = ("prompt", "completion", "answer", "rollout", "meta", "ids", "finish", "progress", "env", "level", "num_tokens")
PLURALS = {f"{name}s": name for name in ("prompt", "completion", "answer", "rollout", "env", "level")} | {
    "metas": "meta",
    "ids_list": "ids",
    "finishes": "finish",
    "nums_tokens": "num_tokens",
}


def arguments_of(rollout: Rollout, progress: float) -> dict[str, Any]:
    """Everything a reward may ask for about one rollout.  ``ids`` are the tokens after the prompt, ``completion`` their text."""
    prompt = rollout.prompt
    return {
        "prompt": prompt.text,
        "completion": rollout.text,
        "answer": prompt.answer,
        "rollout": rollout,
        "meta": prompt.meta,
        "ids": tuple(i for segment in rollout.segments for i in segment.ids),
        "finish": rollout.finish,
        "progress": progress,
        "env": prompt.env,
        "level": prompt.level,
        "num_tokens": rollout.num_tokens,
    }


@dataclass(frozen=True)
class Signature:
    """What a reward asks for and how it is to be called; made once per reward by :meth:`of`."""

    wanted: tuple[str, ...]
    batched: bool
    execution: Execution
    scope: Literal["sample", "group", "batch"]
    timeout_s: float | None
    cpu_s: float | None = None

    @classmethod
    def of(cls, name: str, reward: Reward) -> Signature:
        """Raises ``ValueError`` naming the reward and the argument nobody can supply."""
        if not callable(reward):
            raise ValueError(
                f"reward {name!r} is a {type(reward).__name__}, which cannot be called; give a function or an object with __call__"
            )
        parameters = inspect.signature(reward).parameters.values()
        bound = getattr(reward, "keywords", {})  # functools.partial
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in bound]
        catch_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        batched = any(p.name in PLURALS for p in named)
        known = [*PLURALS, "progress"] if batched else list(ARGUMENTS)
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        unknown = positional + [p.name for p in named if p.name not in known and p.default is p.empty]
        if unknown:
            raise ValueError(f"reward {name!r} asks for {', '.join(unknown)}; a reward may name {', '.join(known)}, or give a default")
        wanted = tuple(known) if catch_all else tuple(p.name for p in named if p.name in known)

        def declared(what: str, otherwise: Any) -> Any:
            return getattr(reward, what, getattr(getattr(reward, "func", None), what, otherwise))

        is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004
        is_async = is_async or inspect.iscoroutinefunction(getattr(reward, "func", None))
        execution = "async" if is_async else declared("execution", "process")
        scope = declared("scope", "group") if batched else "sample"
        if execution not in ("process", "inline", "thread", "async") or scope not in ("sample", "group", "batch"):
            raise ValueError(
                f"reward {name!r}: execution={execution!r}, scope={scope!r}; use process, inline or thread, and group or batch"
            )
        return cls(wanted, batched, execution, scope, declared("timeout_s", None), declared("cpu_s", None))

    def arguments(self, rollouts: Sequence[Rollout], progress: float) -> dict[str, Any]:
        """Keyword arguments of one call: of one rollout, or lists over several for the plural form."""
        items = [arguments_of(rollout, progress) for rollout in rollouts]
        if not self.batched:
            return {name: items[0][name] for name in self.wanted}
        return {name: progress if name == "progress" else [item[PLURALS[name]] for item in items] for name in self.wanted}


def read(result: Any) -> tuple[Score, dict[str, Score]]:
    """One result as a score and its named parts.  What is not a finite number becomes an ``error`` that says what came instead."""
    if isinstance(result, Score):
        return result, {}
    if isinstance(result, Mapping):
        if "value" not in result:
            return Score(None, "error", f"a mapping without 'value' (it has {', '.join(map(str, result))[:200]})"), {}
        parts = {str(k): read(v)[0] for k, v in result.items() if k not in ("value", "status", "detail")}
        status, detail = result.get("status", "ok"), str(result.get("detail", ""))
        if status in ("timeout", "error"):
            return Score(None, status, detail), parts
        score = read(result["value"])[0]
        if score.value is None:
            return score, parts
        if status not in ("ok", "bad_format"):
            return Score(None, "error", f"unknown status {status!r}"), parts
        return Score(score.value, status, detail), parts
    if result is None:
        return Score(None, "error", "returned None; return a number"), {}
    try:
        value = float(result)
    except (TypeError, ValueError) as error:
        return Score(None, "error", f"returned a {type(result).__name__}, not a number ({error})"), {}
    if not math.isfinite(value):
        return Score(None, "error", f"returned {value}"), {}
    return Score(value), {}


def read_many(result: Any, count: int) -> list[tuple[Score, dict[str, Score]]]:
    """The results of one call of the plural form; a wrong count makes every one of them an ``error``."""
    try:
        results = list(result)
    except TypeError:
        results = None
    if results is None or len(results) != count:
        got = f"a {type(result).__name__}" if results is None else f"{len(results)} results"
        return [(Score(None, "error", f"returned {got} for {count} rollouts"), {})] * count
    return [read(item) for item in results]
