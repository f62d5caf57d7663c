"""Several turns: an environment answers what the model said, and the model goes on.  Token in, token out.

What was sampled stays as it was sampled; between two answers stand the tokens that the chat template puts there, which nobody learns from.  All episodes of a
step go on together, turn by turn, so an engine is busy and the same calls make the same batches.

A new environment is a class with ``max_turns`` and ``begin(prompt, seed)``, which returns an object with ``reply(answer)``, sync or async.  It lives as long as
its episode, so a checkpoint has nothing to keep.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from posttrain.data.render import Renderer
from posttrain.data.seeds import derive
from posttrain.records import NO_EXPERT, Group, Prompt, Rollout, Sampling, Segment, Source
from posttrain.reward.base import Signature, read

CUT = " [cut]"


@dataclass(frozen=True)
class Reply:
    """What an environment says to an answer.  ``text`` None ends the episode.  ``role``: who says it, ``user`` or ``tool``."""

    text: str | None = None
    role: Literal["user", "tool"] = "user"


class Dialogue(Protocol):
    """One episode.  ``reply`` may be a coroutine; an exception ends the episode with ``env_error``, which is masked and never a zero."""

    def reply(self, answer: str) -> Any: ...


class Environment(Protocol):
    """``max_turns``: answers of the model per episode.  ``max_reply_chars``: longer replies are cut, with a mark."""

    max_turns: int
    max_reply_chars: int

    def begin(self, prompt: Prompt, seed: int) -> Dialogue: ...


@dataclass(frozen=True)
class Retry:
    """The same words after every answer: another attempt.

    Source: the second attempt of SCoRe, arXiv 2409.12917.

    ``text``: what is said.  ``max_turns``: attempts.
    """

    text: str = "There might be an error in the solution above. Correct it if there is one, and write the solution again."
    max_turns: int = 2

    def __post_init__(self) -> None:
        if self.max_turns < 1 or not self.text.strip():
            raise ValueError(f"environment.Retry: max_turns={self.max_turns} must be at least 1, and text must say something")

    @property
    def max_reply_chars(self) -> int:
        return len(self.text)

    def begin(self, prompt: Prompt, seed: int) -> _Said:
        return _Said(self.text)


@dataclass(frozen=True)
class _Said:
    text: str

    def reply(self, answer: str) -> Reply:
        return Reply(self.text)


@dataclass(frozen=True)
class Feedback:
    """A verifier's verdict in words, and another attempt when it was wrong.

    Source: feedback between attempts, as in RLTF, arXiv 2602.02482, with an exact verifier as the critic (our reading).

    ``reward``: a reward function; at least ``threshold`` is right.  ``wrong``, ``right``: what is said; ``right`` null ends the episode there, and so does a
    last turn.  ``{detail}`` stands for the verdict's own words.
    """

    reward: Any
    wrong: str = "That is wrong. Try again."
    right: str | None = None
    threshold: float = 1.0
    max_turns: int = 2
    max_reply_chars: int = 512

    def __post_init__(self) -> None:
        Signature.of("environment.Feedback.reward", self.reward)
        if self.max_turns < 1:
            raise ValueError(f"environment.Feedback: max_turns={self.max_turns} must be at least 1")

    def begin(self, prompt: Prompt, seed: int) -> _Judged:
        return _Judged(self, prompt)


@dataclass(frozen=True)
class _Judged:
    of: Feedback
    prompt: Prompt

    async def reply(self, answer: str) -> Reply:
        signature = Signature.of("environment.Feedback.reward", self.of.reward)
        seen = Rollout("", self.prompt, (), text=answer)
        result = self.of.reward(**signature.arguments([seen], 0.0))
        result = await result if inspect.isawaitable(result) else result
        score = read(result[0] if signature.batched else result)[0]
        if score.value is None:
            raise RuntimeError(f"the verifier failed: {score.detail}")
        words = self.of.right if score.value >= self.of.threshold else self.of.wrong
        return Reply(None if words is None else words.replace("{detail}", score.detail))


@dataclass
class Episode:
    """A rollout that may go on."""

    rollout: Rollout
    dialogue: Any
    prompt: Prompt
    turns: list[tuple[str, str]] = field(default_factory=list)
    over: bool = False


@dataclass
class Playing:
    """An engine pool whose ``sample`` plays whole episodes; everything else is the pool's own.

    ``max_tokens``: the longest sequence an engine takes; an episode that cannot go on within it ends with ``finish="length"``.
    """

    pool: Any
    environment: Any
    renderer: Renderer
    max_tokens: int
    run_seed: int = 0
    timeout_s: float = 60.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    async def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        """As :meth:`posttrain.rollout.pool.EnginePool.sample`; every rollout is an episode of at most ``max_turns`` answers."""
        groups = await self.pool.sample(prompts, n, sampling, step, first=first)
        episodes = [[self._begin(r, step) for r in group.rollouts] for group in groups]
        flat = [e for each in episodes for e in each]
        for turn in range(1, self.environment.max_turns):
            replies = await asyncio.gather(*(self._reply(e) for e in flat))
            going = [(e, glue) for e, reply in zip(flat, replies, strict=True) if (glue := self._glue(e, reply, sampling)) is not None]
            if not going:
                break
            asked = [replace(e.prompt, id=f"{e.rollout.sample_id}@{turn}", ids=_ids(e.rollout) + glue) for e, glue in going]
            answers = await self.pool.sample(asked, 1, sampling, step)
            for (e, glue), group in zip(going, answers, strict=True):
                self._go_on(e, glue, group.rollouts[0], turn)
        for e in flat:
            e.rollout = replace(e.rollout, turns=tuple(e.turns))
        return [replace(g, rollouts=tuple(e.rollout for e in each)) for g, each in zip(groups, episodes, strict=True)]

    def _begin(self, rollout: Rollout, step: int) -> Episode:
        seed = derive(self.run_seed, "environment", step, rollout.sample_id)
        episode = Episode(rollout, self.environment.begin(rollout.prompt, seed), rollout.prompt, [("assistant", rollout.text)])
        episode.over = rollout.finish != "stop"  # cut off, or never sampled: there is nothing to answer
        return episode

    async def _reply(self, episode: Episode) -> Reply | None:
        """What the environment says; None when the episode is over.  An error is the environment's, not the model's."""
        if episode.over:
            return None
        try:
            found = episode.dialogue.reply(episode.turns[-1][1])
            found = await asyncio.wait_for(found, self.timeout_s) if inspect.isawaitable(found) else found
        except Exception as error:
            return self._failed(episode, f"{type(error).__name__}: {error}")
        if not isinstance(found, Reply) or found.role not in ("user", "tool"):
            return self._failed(episode, f"it returned {found!r:.80} instead of a Reply")
        episode.over = found.text is None
        return None if episode.over else found

    @staticmethod
    def _failed(episode: Episode, why: str) -> None:
        told = replace(episode.rollout.prompt, meta={**episode.rollout.prompt.meta, "error": f"environment: {why}"[:500]})
        episode.rollout, episode.over = replace(episode.rollout, finish="env_error", prompt=told), True

    def _glue(self, episode: Episode, reply: Reply | None, sampling: Sampling) -> tuple[int, ...] | None:
        """The tokens between two answers; None when the episode does not go on."""
        if reply is None or reply.text is None:
            return None
        limit = self.environment.max_reply_chars
        text = reply.text if len(reply.text) <= limit else reply.text[: max(limit - len(CUT), 0)] + CUT
        glue = self.renderer.reply(self._messages(episode), text, reply.role, episode.prompt.ids, _last_id(episode.rollout))
        if len(_ids(episode.rollout)) + len(glue) + sampling.max_tokens > self.max_tokens:
            episode.rollout, episode.over = replace(episode.rollout, finish="length"), True
            return None
        episode.turns.append((reply.role, text))
        return glue

    @staticmethod
    def _messages(episode: Episode) -> list[Mapping[str, Any]]:
        asked = list(episode.prompt.messages or [{"role": "user", "content": episode.prompt.text}])
        return [*asked, *({"role": role, "content": text} for role, text in episode.turns)]

    @staticmethod
    def _go_on(episode: Episode, glue: tuple[int, ...], answer: Rollout, turn: int) -> None:
        between = Segment(glue, Source.tool, turn=turn, trainable=False)
        own = tuple(replace(s, turn=turn) for s in answer.segments)
        segments, routing = (*episode.rollout.segments, between, *own), who_read(episode.rollout.routing, answer.routing)
        episode.rollout = replace(episode.rollout, segments=segments, finish=answer.finish, text=answer.text, routing=routing)
        episode.turns.append(("assistant", answer.text))
        episode.over = answer.finish != "stop"


def _ids(rollout: Rollout) -> tuple[int, ...]:
    return (*rollout.prompt.ids, *(i for segment in rollout.segments for i in segment.ids))


def who_read(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Who read the tokens of an episode: those that were there when they were sampled, and of the rest the last reading."""
    if before is None or now is None:
        return None
    out, known = now.clone(), before != NO_EXPERT
    out[: len(before)][known] = before[known]
    return out


def _last_id(rollout: Rollout) -> int | None:
    return rollout.segments[-1].ids[-1] if rollout.segments else None


def longest(environment: Any, max_prompt_tokens: int, max_tokens: int) -> int:
    """Tokens that a whole episode may take: a character of a reply is at most one token, and a template's own words are few."""
    return max_prompt_tokens + max_tokens + (environment.max_turns - 1) * (environment.max_reply_chars + TEMPLATE + max_tokens)


TEMPLATE = 64
"""Room for what a chat template writes around a reply."""


def check_environment(environment: Any) -> None:
    """Raises ``ValueError`` saying what an environment lacks."""
    lacks = [name for name in ("max_turns", "max_reply_chars") if not isinstance(getattr(environment, name, None), int)]
    if lacks or not callable(getattr(environment, "begin", None)):
        missing = ", ".join([*lacks, *([] if callable(getattr(environment, "begin", None)) else ["begin(prompt, seed)"])])
        raise ValueError(f"{type(environment).__name__} is no environment: it has no {missing}; see posttrain.rollout.environment.Environment")


class OfTurn:
    """A reward of one turn's answer: the inner reward sees that answer as the completion.

    ``reward``: any reward.  ``turn``: which answer, from 0; an episode that ended before has its last one judged, ``missing=last``, or gets
    ``missing`` as a number.
    """

    def __init__(self, reward: Callable[..., Any], turn: int, missing: float | Literal["last"] = "last") -> None:
        if turn < 0:
            raise ValueError(f"OfTurn: turn={turn} counts answers from 0")
        self.reward, self.turn, self.missing = reward, turn, missing
        self.inner = Signature.of("OfTurn.reward", reward)
        if self.inner.batched:
            raise ValueError("OfTurn judges one answer at a time; give it a reward with the singular arguments (completion, answer)")
        self.execution = "process" if self.inner.execution == "async" else self.inner.execution
        self.timeout_s, self.cpu_s = self.inner.timeout_s, self.inner.cpu_s

    def __call__(self, rollout: Rollout, progress: float = 0.0) -> Any:
        answers = [text for role, text in rollout.turns if role == "assistant"] or [rollout.text]
        if self.turn >= len(answers) and self.missing != "last":
            return float(self.missing)
        text = answers[min(self.turn, len(answers) - 1)]
        result = self.reward(**self.inner.arguments([replace(rollout, text=text)], progress))
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result
