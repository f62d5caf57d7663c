"""One chain of thought, left early in several places: after each of them words that force an answer, which nobody learns from, and the answer.

A chain and the answers forced on it are one group.  The tokens they share are those that were sampled, with their log-probs; ``advantage.exits``
decides which copy of them is learnt from.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from posttrain.data.seeds import derive
from posttrain.records import Group, Rollout, Segment, Source
from posttrain.rollout.environment import who_read
from posttrain.rollout.strategy import Around, Ask, Fixed, StepInfo

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Tokens:
    """Every token of the chain is a place to leave it."""

    def __call__(self, ids: Sequence[int], decode: Decode) -> list[int]:
        return list(range(1, len(ids)))


@dataclass(frozen=True)
class Blocks:
    """A chain is left where a block ends: behind a ``delimiter``, however often it is repeated there."""

    delimiter: str = "\n\n"

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise ValueError("rollout.exits.Blocks: delimiter must say something")

    def __call__(self, ids: Sequence[int], decode: Decode) -> list[int]:
        ends = [m.end() for m in re.finditer(f"(?:{re.escape(self.delimiter)})+", decode(ids))]
        found = dict.fromkeys(tokens_of(ids, end, decode) for end in ends)
        return [k for k in found if 0 < k < len(ids)]


def tokens_of(ids: Sequence[int], characters: int, decode: Decode) -> int:
    """How many tokens it takes until the text has so many characters: a text grows with its tokens."""
    return bisect_left(range(len(ids)), characters, key=lambda k: len(decode(ids[:k])))


@dataclass(frozen=True)
class Exits(Around):
    """Another strategy, and of each of its answers (the chains) some that leave it early and are made to answer.

    Source: the serial group of S-GRPO, arXiv 2505.07686; the forced answers of MRT, arXiv 2503.07572.

    ``exits``: places per chain, drawn among those that ``at`` allows; null takes them all.  ``at``: where a chain may be left (:class:`Tokens`,
    :class:`Blocks`), always behind a token that was sampled, so never inside given ones.  ``start``: also before its first token.  ``until``: only
    before this text, where it occurs.  ``samples``: answers at each place.  ``text``: the words that force an answer.  ``answer_tokens``: how long it
    may be, null for ``rollout.max_tokens``.  ``judged``: what a reward sees of such a sample, the ``answer`` or the forcing words before it too
    (``words_and_answer``).  ``seed``: of the draws.  ``inner``: the strategy, ``Fixed`` by default; it decides on the chains alone.

    Places where words and answer do not fit into the engine's context are not used.  A group without an exit is dropped as ``no_exit``.
    ``rollout.n`` counts chains; the rewards in the metrics are those of chains and exits together.
    """

    exits: int | None = 8
    at: Any = field(default_factory=Tokens)
    start: bool = False
    until: str | None = None
    samples: int = 1
    text: str = "Time is limited, stop thinking and start answering.\n</think>\n\n"
    answer_tokens: int | None = None
    judged: Literal["answer", "words_and_answer"] = "answer"
    seed: int = 0
    inner: Any = field(default_factory=Fixed)
    words: tuple[int, ...] = ()
    limit: int | None = None
    decode: Decode | None = None

    def __post_init__(self) -> None:
        for name, value in (("exits", self.exits), ("samples", self.samples), ("answer_tokens", self.answer_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"rollout.strategy.{name}={value} must be at least 1")
        if not self.text.strip() or self.until == "":
            raise ValueError("rollout.strategy.text forces an answer and must say something, and so must until (or be null)")
        if self.judged not in ("answer", "words_and_answer"):
            raise ValueError(f"rollout.strategy.judged={self.judged!r} does not exist; choose answer or words_and_answer")

    # -- what it is told --------------------------------------------------------------------------------------------------------
    def bound(self, n: int) -> Exits:
        return replace(self, inner=self.inner.bound(n))

    @property
    def needs_demos(self) -> bool:
        return getattr(self.inner, "needs_demos", False)

    def with_demos(self, demos: Any) -> Exits:
        return replace(self, inner=self.inner.with_demos(demos))

    def forced_tokens(self, tokenizer: Any, max_tokens: int) -> int:
        """Room that the words and an answer take."""
        return len(_encode(tokenizer, self.text)) + (self.answer_tokens or max_tokens)

    def with_tokenizer(self, tokenizer: Any, max_tokens: int, limit: int) -> Exits:
        """A copy that can cut.  ``max_tokens``: of an answer without a limit of its own.  ``limit``: tokens an engine takes.  Raises ``ValueError``
        where words and answer leave no room for a question."""
        words, answer = _encode(tokenizer, self.text), self.answer_tokens or max_tokens
        if len(words) + answer >= limit:
            raise ValueError(
                f"rollout.strategy.text has {len(words)} tokens and its answer may have {answer}, which leaves nothing of the engine's {limit}; "
                "shorten the text, lower rollout.strategy.answer_tokens, or raise rollout.max_model_len"
            )
        read = partial(tokenizer.decode, skip_special_tokens=True)
        return replace(self, words=words, answer_tokens=answer, limit=limit, decode=read)

    # -- where, and what is asked there ---------------------------------------------------------------------------------------------
    def places(self, chain: Rollout, step: int) -> list[int]:
        """After how many of its tokens a chain is left, in order."""
        assert self.decode is not None and self.limit is not None and self.answer_tokens is not None, "with_tokenizer comes first"
        ids, sampled = chain_ids(chain), [s.source == Source.policy for s in chain.segments for _ in s.ids]
        if chain.finish not in ("stop", "length") or not any(sampled):
            return []
        room = self.limit - len(chain.prompt.ids) - len(self.words) - self.answer_tokens
        last = room
        if self.until is not None and (found := self.decode(ids).find(self.until)) >= 0:
            last = min(room, tokens_of(ids, found + 1, self.decode) - 1)
        possible = [k for k in self.at(ids, self.decode) if k <= last and sampled[k - 1]]
        draw = random.Random(derive(self.seed, "exits", step, chain.sample_id))
        drawn = possible if self.exits is None or len(possible) <= self.exits else draw.sample(possible, self.exits)
        return [*([0] if self.start and last >= 0 else []), *sorted(drawn)]

    def begin(self, chain: Rollout, place: int) -> Rollout:
        """A chain up to there, and the words."""
        assert self.decode is not None
        forced = Segment(self.words, Source.tool, turn=1, trainable=False)
        text = self.text if self.judged == "words_and_answer" else ""
        said = (("assistant", self.decode(chain_ids(chain)[:place])), ("user", self.text))
        routing = None if chain.routing is None else chain.routing[: len(chain.prompt.ids) + place]
        kept = (*cut(chain.segments, place), forced)
        left = (chain.sample_id, place)
        return Rollout(chain.sample_id, chain.prompt, kept, "given", chain.sampling, text, turns=said, routing=routing, left=left)

    # -- the strategy ---------------------------------------------------------------------------------------------------------------
    def observe(self, group: Group, info: StepInfo) -> list[Ask]:
        if any(r.left is not None for r in group.rollouts):
            return []
        if more := self.inner.observe(group, info):
            return more
        begins = [self.begin(chain, place) for chain in group.rollouts for place in self.places(chain, info.step)]
        return [Ask(group.prompt, self.samples, len(group.rollouts), begin=begin, max_tokens=self.answer_tokens) for begin in begins]

    def admit(self, group: Group, info: StepInfo) -> str | None:
        chains = tuple(r for r in group.rollouts if r.left is None)
        return self.inner.admit(replace(group, rollouts=chains), info) or (None if len(chains) < len(group.rollouts) else "no_exit")


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def chain_ids(rollout: Rollout) -> list[int]:
    """The tokens behind the prompt."""
    return [i for s in rollout.segments for i in s.ids]


def cut(segments: Sequence[Segment], tokens: int) -> tuple[Segment, ...]:
    """The first ``tokens`` tokens, with everything that is known of them."""
    out = []
    for segment in segments:
        n = min(tokens, len(segment.ids))
        tokens -= n
        if n:
            whole = ("ids", "logprobs", "inputs", "stored", "trainable")
            out.append(replace(segment, **{k: v[:n] for k in whole if isinstance(v := getattr(segment, k), tuple)}))
    return tuple(out)


def go_on(group: Group, begin: Rollout) -> Group:
    """Answers to ``begin`` as samples of its prompt: what was shared, the words, and the answer."""
    return replace(group, prompt=replace(group.prompt, ids=begin.prompt.ids), rollouts=tuple(_go_on(r, begin) for r in group.rollouts))


def _go_on(answer: Rollout, begin: Rollout) -> Rollout:
    return replace(
        answer,
        prompt=replace(answer.prompt, ids=begin.prompt.ids),
        segments=(*begin.segments, *(replace(s, turn=1) for s in answer.segments)),
        text=begin.text + answer.text,
        turns=(*begin.turns, ("assistant", answer.text)),
        routing=who_read(begin.routing, answer.routing),
        left=begin.left,
    )
