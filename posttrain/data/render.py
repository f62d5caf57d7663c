"""Text becomes tokens that say where they came from and whether they are learnt from.

What is learnt (``loss_on``): ``assistant``, every turn the assistant wrote; ``last_turn``, the last of them; ``completion``, what follows
the given prompt, or the last user message.  In each, the token that ends the turn is learnt and nothing after it is: the model must learn
to stop, and never sees what comes later.

Ids are those a rollout would see: where tokenising prompt and answer together would merge the two at the seam, they are tokenised apart.
Padding plays no part anywhere, so a tokenizer whose padding token is its EOS loses nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from posttrain.data.template import (
    Message,
    Rendered,
    Span,
    TemplateError,
    has_template,
    normalise,
    render_chat,
    render_text,
    special_tokens,
)
from posttrain.records import Segment, Source

PLACE = "this-is-the-answer"
"""Stands for an answer that was sampled, and is never tokenised."""
ACTED = ("by", "expert")
"""Keys of messages in transcripts: who acted (``expert``, ``own``) or answered (``environment``), and what the expert would have said in the place of the learner."""
LossOn = Literal["assistant", "last_turn", "completion", "expert", "environment"]
Text = str | Sequence[Message]
NO_TEMPLATE = (
    "the tokenizer has no chat template; give one with model.chat_template (a file), or use prompt and completion columns of plain text"
)


@dataclass(frozen=True)
class Encoded:
    """Parallel per-token columns of one rendered text.  ``turn`` counts assistant messages: what leads up to an answer shares its number.
    ``events`` names what happened on the way (``eos_added``, ...)."""

    ids: tuple[int, ...]
    sources: tuple[Source, ...]
    trainable: tuple[bool, ...]
    turn: tuple[int, ...]
    events: tuple[str, ...] = ()

    @property
    def num_trainable(self) -> int:
        """Trainable tokens that are predicted at all: the first token of a sequence never is."""
        return sum(self.trainable[1:])

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Everything before the first trainable token."""
        first = self.trainable.index(True) if any(self.trainable) else len(self.ids)
        return self.ids[:first]

    def cut(self, max_length: int) -> Encoded:
        """The first ``max_length`` tokens.  No EOS is put at the cut: the answer did not end there."""
        return replace(self, **{name: getattr(self, name)[:max_length] for name in ("ids", "sources", "trainable", "turn")})

    def segments(self) -> tuple[Segment, ...]:
        """Runs of one source and turn, in order."""
        starts = [i for i in range(len(self.ids)) if i == 0 or (self.sources[i], self.turn[i]) != (self.sources[i - 1], self.turn[i - 1])]
        return tuple(
            Segment(self.ids[a:b], self.sources[a], self.turn[a], trainable=self.trainable[a:b])
            for a, b in zip(starts, [*starts[1:], len(self.ids)], strict=True)
        )


class Renderer:
    """Turns prompts, conversations and plain texts into tokens with one tokenizer.

    ``chat``: ``True`` renders a plain string prompt as one user turn, ``False`` leaves strings as they are, ``"auto"`` asks whether the
    tokenizer has a template.  Lists of messages always need the template.  ``variables`` are passed to the template (``enable_thinking``).
    ``add_eos`` ends a complete answer with EOS where neither the template nor the text did.  ``allowed_special`` lists control tokens that
    data may contain as such; in plain (not chat) text all control tokens act as the tokenizer makes them act.

    ``stop_ids`` are the tokens that end an assistant's turn: the tokenizer's EOS and whatever the template writes after an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool | Literal["auto"] = "auto",
        variables: Mapping[str, Any] | None = None,
        add_eos: bool = True,
        allowed_special: Sequence[str] = (),
    ) -> None:
        if chat is True and not has_template(tokenizer):
            raise TemplateError(NO_TEMPLATE)
        if add_eos and tokenizer.eos_token_id is None:
            raise ValueError("add_eos is on but the tokenizer has no EOS token; set one, or set add_eos=false")
        self.tokenizer = tokenizer
        self.chat = has_template(tokenizer) if chat == "auto" else chat
        self.variables = dict(variables or {})
        self.add_eos = add_eos
        self.control = [t for t in special_tokens(tokenizer) if t not in allowed_special]
        bare = tokenizer("", add_special_tokens=True)["input_ids"]
        self.bos: tuple[int, ...] = tuple(bare[:1]) if tokenizer.bos_token_id is not None and bare[:1] == [tokenizer.bos_token_id] else ()
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
        self.stop_ids = {tokenizer.eos_token_id} - {None}
        self.template_ends_turns = False
        if has_template(tokenizer):
            end = self._template_end()
            self.template_ends_turns = end is not None
            self.stop_ids |= {end} - {None}

    # -- public --------------------------------------------------------------------------------------------------------
    def prompt(self, prompt: Text, tools: Any = None) -> Encoded:
        """A question for the model to answer: nothing in it is learnt from, and the generation prompt stands at its end."""
        if isinstance(prompt, str) and not self.chat:
            return self.plain(prompt, None)
        messages = self._messages(prompt)
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError(
                "a prompt must end with a turn the assistant can answer; it ends with " + ("an assistant turn" if messages else "nothing")
            )
        rendered = self._render(messages, tools, first_answer=len(messages), add_generation_prompt=True)
        return self._encode(rendered, [])

    def answer(self, prompt: Text, completion: Text, tools: Any = None, *, loss_on: LossOn = "assistant", complete: bool = True) -> Encoded:
        """A prompt with its given answer.  ``complete=False`` says that the answer was cut off, and then no end-of-turn token is learnt."""
        if isinstance(prompt, str) and isinstance(completion, str) and not self.chat:
            return self.plain(prompt, completion, complete)
        before = self._messages(prompt)
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else normalise(completion)
        return self.conversation([*before, *after], tools, loss_on=loss_on, num_prompt=len(before), complete=complete)

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Any = None,
        *,
        loss_on: LossOn = "assistant",
        num_prompt: int | None = None,
        complete: bool = True,
    ) -> Encoded:
        """A whole conversation.  ``num_prompt`` messages are given (default, for ``completion``: up to the last user message).

        ``expert``: every assistant message says who acted, ``by: expert`` or ``by: own``, and the expert's alone are learnt from.  ``environment``: the
        messages ``by: environment`` are, or where none says so, what tools answered after the first assistant message; and nothing that was done.
        """
        messages = normalise(messages)
        by = [m.get("by") for m in messages if m["role"] == "assistant"]
        observed = [i for i, m in enumerate(messages) if m.get("by") == "environment"]
        messages = [{k: v for k, v in m.items() if k not in ACTED} for m in messages]
        answered = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if loss_on == "completion":
            users = [i + 1 for i, m in enumerate(messages) if m["role"] == "user"]
            given = num_prompt if num_prompt is not None else (users[-1] if users else 0)
            first = sum(i < given for i in answered)
        elif loss_on == "last_turn":
            first = max(len(answered) - 1, 0)
        elif loss_on in ("assistant", "expert", "environment"):
            first = 0
        else:
            raise ValueError(f"unknown loss_on {loss_on!r}; choose assistant, last_turn, completion, expert or environment")
        learnt = [number >= first for number in range(len(answered))]
        if loss_on == "expert":
            unknown = [i for i, who in zip(answered, by, strict=True) if who not in ("expert", "own")]
            if unknown:
                raise ValueError(
                    f"loss_on=expert: message {unknown[0]} has by={by[answered.index(unknown[0])]!r}; every assistant message must say by: expert or "
                    "by: own, for what the learner did itself is no evidence of what the expert would do"
                )
            learnt = [who == "expert" for who in by]
        rendered = self._render(messages, tools, first_answer=first, observed=observed)
        if loss_on == "environment":
            acted = [i for i in observed if messages[i]["role"] == "assistant"]
            if acted:
                raise ValueError(f"loss_on=environment: message {acted[0]} of the assistant says by: environment; it is for what was answered to the assistant")
            told = observed or [i for i in rendered.tools if answered and i > answered[0]]
            return self._encode(rendered, [rendered.tools[i] for i in told])
        encoded = self._encode(rendered, [span for span, on in zip(rendered.answers, learnt, strict=True) if on])
        ends_with_answer = bool(answered) and answered[-1] == len(messages) - 1 and learnt[-1]
        return self._finish(encoded, complete) if ends_with_answer and encoded.num_trainable else encoded

    def text(self, text: str) -> Encoded:
        """Plain text, all of it learnt from."""
        return self.plain("", text)

    def reply(self, messages: Sequence[Message], text: str, role: str, prompt_ids: Sequence[int], last_id: int | None) -> tuple[int, ...]:
        """The tokens between an answer and the next one: what the template writes after the answer that ends ``messages``, ``text`` as said by ``role``,
        and the generation prompt.  ``last_id`` is the answer's last token: an end of turn that was sampled is not written twice.

        Raises :class:`TemplateError` when the conversation so far would be rendered otherwise than it was sampled from ``prompt_ids``.
        """
        if not self.chat:
            return tuple(self._ids(text))
        *before, _ = self._messages(messages)
        asked = [m for i, m in enumerate(before) if not any(x["role"] == "assistant" for x in before[: i + 1])]
        first = self._encode(self._render(asked, None, first_answer=len(asked), add_generation_prompt=True), []).ids
        conversation = [*before, {"role": "assistant", "content": PLACE}, {"role": role, "content": text}]
        rendered = self._render(conversation, None, first_answer=len(conversation), add_generation_prompt=True)
        begin = self._render(before, None, first_answer=len(before), add_generation_prompt=True).text
        if tuple(first) != tuple(prompt_ids) or not rendered.text.startswith(begin + PLACE):
            raise TemplateError(
                "the chat template renders earlier turns differently once a reply follows, or the prompt has tools: an episode of several turns cannot go on "
                "from the tokens that were sampled; use a template that only appends (model.chat_template)"
            )
        place = len(begin) + len(PLACE)
        ids, offsets = self._tokens(rendered, [place])
        glue = [i for i, (start, _) in zip(ids, offsets, strict=True) if start >= place]
        return tuple(glue[1:] if glue and glue[0] == last_id and last_id in self.stop_ids else glue)

    # -- chat ----------------------------------------------------------------------------------------------------------
    def _messages(self, prompt: Text) -> list[dict[str, Any]]:
        return normalise([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def _render(
        self, messages: Sequence[Message], tools: Any, *, first_answer: int, add_generation_prompt: bool = False, observed: Sequence[int] = ()
    ) -> Rendered:
        if not has_template(self.tokenizer):
            raise TemplateError(NO_TEMPLATE)
        return render_chat(
            self.tokenizer,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            first_answer=first_answer,
            variables=self.variables,
            control=self.control,
            observed=observed,
        )

    def _encode(self, rendered: Rendered, learnt: Sequence[Span]) -> Encoded:
        ids, offsets = self._tokens(rendered)
        edges = {edge for span in rendered.answers for edge in span if span[0] < span[1]}
        starts = [a for a, _ in offsets]
        crossed = sorted(e for e in edges if (i := bisect_left(starts, e) - 1) >= 0 and offsets[i][1] > e)
        if crossed or not self.tokenizer.is_fast:
            ids, offsets = self._tokens(rendered, sorted(edges) if not self.tokenizer.is_fast else crossed)
        n = len(ids)
        sources, trainable, turn = [Source.prompt] * n, [False] * n, [0] * n
        for span in rendered.tools.values():
            for i in _tokens_of(span, offsets):
                sources[i], trainable[i] = Source.tool, span in learnt
        start = 0
        for number, span in enumerate(rendered.answers):
            tokens = self._answer_tokens(span, ids, offsets, rendered.text)
            for i in tokens:
                sources[i], trainable[i] = (Source.demo, True) if span in learnt else (Source.prompt, False)
            end = tokens[-1] + 1 if tokens else start
            turn[start:end] = [number] * (end - start)
            start = end
        turn[start:] = [len(rendered.answers)] * (n - start)
        events = ["seam_split"] * bool(crossed) + ["control_tokens_spelt_out"] * bool(rendered.literals) + self._unknown(ids)
        if self.bos and list(ids[:2]) == [self.bos[0]] * 2:
            ids, sources, trainable, turn, events = ids[1:], sources[1:], trainable[1:], turn[1:], [*events, "double_bos_removed"]
        return Encoded(tuple(ids), tuple(sources), tuple(trainable), tuple(turn), tuple(events))

    def _answer_tokens(self, span: Span, ids: Sequence[int], offsets: Sequence[Span], text: str) -> list[int]:
        """Token indices of one turn, up to and with the token that ends it."""
        inside = _tokens_of(span, offsets)
        if not inside:
            return []
        stops = [i for i in inside if ids[i] in self.stop_ids]
        if stops:
            return [i for i in inside if i <= stops[-1]]
        following = inside[-1] + 1
        while following < len(ids) and ids[following] not in self.special_ids and not text[span[1] : offsets[following][1]].strip():
            following += 1
        return list(range(inside[0], following + 1)) if following < len(ids) and ids[following] in self.stop_ids else inside

    def _finish(self, encoded: Encoded, complete: bool) -> Encoded:
        """The end of an answer that stands last: with EOS when it is complete, without any end-of-turn token when it was cut off."""
        last = max(i for i, t in enumerate(encoded.trainable) if t)
        ends = encoded.ids[last] in self.stop_ids
        if not complete:
            return replace(encoded.cut(last if ends else last + 1), events=(*encoded.events, "cut_off_answer"))
        if ends or not self.add_eos:
            return encoded if ends else replace(encoded, events=(*encoded.events, "no_eos"))
        return self._append_eos(encoded)

    def _append_eos(self, encoded: Encoded) -> Encoded:
        turn = encoded.turn[-1] if encoded.turn else 0
        return Encoded(
            (*encoded.ids, self.tokenizer.eos_token_id),
            (*encoded.sources, Source.demo),
            (*encoded.trainable, True),
            (*encoded.turn, turn),
            (*encoded.events, "eos_added"),
        )

    def _tokens(self, rendered: Rendered, breaks: Iterable[int] = ()) -> tuple[list[int], list[Span]]:
        """Ids and character offsets, tokenised apart at ``breaks`` and around control tokens that are spelt out."""
        text, literals = rendered.text, rendered.literals
        cuts = {0, len(text), *breaks}
        cuts |= {edge for i, c in enumerate(text) if c in literals for edge in (i, i + 1)} if literals else set()
        ids: list[int] = []
        offsets: list[Span] = []
        ordered = sorted(cuts)
        for a, b in pairwise(ordered):
            if text[a:b] in literals:
                spelt = self._spell(literals[text[a:b]])
                ids += spelt
                offsets += [(a, b)] * len(spelt)
            elif self.tokenizer.is_fast:
                out = self.tokenizer(text[a:b], add_special_tokens=False, return_offsets_mapping=True)
                ids += out["input_ids"]
                offsets += [(a + s, a + e) for s, e in out["offset_mapping"]]
            else:
                piece = self._ids(text[a:b])
                ids += piece
                offsets += [(a, b)] * len(piece)
        return ids, offsets

    def _spell(self, control: str) -> list[int]:
        """A control token's text in ordinary tokens: taken apart after its first character, it is no longer recognised."""
        return self._ids(control[:1]) + self._ids(control[1:])

    def _template_end(self) -> int | None:
        """The control token the template writes directly after a finished answer, if any."""
        answer = PLACE
        try:
            probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
            text, _ = render_text(self.tokenizer, probe, variables=self.variables)
        except TemplateError:
            return None
        after = self._ids(text[text.rindex(answer) + len(answer) :].lstrip()) if answer in text else []
        return after[0] if after and after[0] in self.special_ids and after[0] != self.tokenizer.bos_token_id else None

    # -- plain ---------------------------------------------------------------------------------------------------------
    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def plain(self, prompt: str, completion: str | None, complete: bool = True) -> Encoded:
        """``[BOS] prompt completion [EOS]``.  The tokenizer's own habit of adding an EOS is ignored: a prompt must not end with one."""
        before = self._ids(prompt)
        head = () if before[:1] == list(self.bos) else self.bos
        ids, events = list(before), []
        if completion is not None:
            ids = self._ids(prompt + completion)
            if ids[: len(before)] != before:
                ids, events = before + self._ids(completion), ["seam_split"]
        n, m = len(head) + len(before), len(ids) - len(before)
        encoded = Encoded(
            (*head, *ids),
            (Source.prompt,) * n + (Source.demo,) * m,
            (False,) * n + (True,) * m,
            (0,) * (n + m),
            (*events, *self._unknown(ids)),
        )
        if completion is None or not (m or complete):
            return encoded
        return self._finish(encoded, complete) if m else (self._append_eos(encoded) if self.add_eos else encoded)

    def _unknown(self, ids: Sequence[int]) -> list[str]:
        unknown = self.tokenizer.unk_token_id
        return ["unknown_characters"] if unknown is not None and unknown in ids and unknown not in self.stop_ids else []


def _tokens_of(span: Span, offsets: Sequence[Span]) -> list[int]:
    """Indices of the tokens that lie wholly inside a span of characters.  Offsets ascend."""
    first, after = (bisect_left(offsets, edge, key=lambda offset: offset[0]) for edge in span)
    return [i for i in range(first, after) if offsets[i][1] <= span[1]]
