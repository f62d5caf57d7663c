"""A conversation becomes text through the model's chat template, with the character spans that the assistant would have generated.

Where the spans come from:

* a template that marks them with ``{% generation %} ... {% endgeneration %}`` is believed;
* otherwise the conversation is rendered turn by turn and compared: an assistant turn is what its message adds to the conversation before it
  plus the generation prompt.  That is exact when each rendering is a prefix of the next, and refused when it is not.

Text from data cannot forge turns: a control token spelt in a message (``<|im_end|>`` in a user's text or a tool's output) is replaced by a
private character before rendering, and spelt out in ordinary tokens afterwards (see :mod:`posttrain.data.render`).  That holds for all
tokens a tokenizer declares special, in contents, tool calls and tool schemas.  It does not hold for markers a tokenizer keeps as ordinary
text (``<think>`` in most), nor where a template itself assembles a control token out of message text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
Span = tuple[int, int]

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIX = (
    "put {% generation %} before and {% endgeneration %} after what the assistant writes in the template, the end-of-turn token included "
    "(model.chat_template takes a file)"
)


class TemplateError(ValueError):
    """A chat template that cannot be used as asked.  The message says what to add or change."""


@dataclass(frozen=True)
class Rendered:
    """``answers[k]`` is the span of assistant message ``k``; ``tools`` are spans of observations by message, what tools answered among them; ``literals`` maps each private character
    of ``text`` to the control token that stood there."""

    text: str
    answers: tuple[Span, ...] = ()
    tools: Mapping[int, Span] = field(default_factory=dict)
    literals: Mapping[str, str] = field(default_factory=dict)


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading entries (characters, tokens, messages) two sequences have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def special_tokens(tokenizer: Any) -> list[str]:
    """Every text the tokenizer would turn into a control token, longest first."""
    added = [str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special]
    return sorted({*map(str, tokenizer.all_special_tokens), *added}, key=lambda t: (-len(t), t))


def normalise(messages: Sequence[Message], where: str = "") -> list[dict[str, Any]]:
    """Messages in the one form templates expect: no null fields, text content present, tool-call arguments as a mapping.

    Arguments are accepted as a mapping or as JSON text (the form of the OpenAI API and of Parquet files); both give the same tokens.
    """
    out = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}message {number} is {message!r:.80}; a message is a mapping with 'role' and 'content'")
        clean = {k: v for k, v in message.items() if v is not None}
        clean.setdefault("content", "")
        if "tool_calls" in clean:
            clean["tool_calls"] = [_tool_call(call, f"{where}message {number}") for call in clean["tool_calls"]]
            if not clean["tool_calls"]:
                del clean["tool_calls"]
        out.append(clean)
    return out


def _tool_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    call = {k: v for k, v in call.items() if v is not None}
    if "function" in call:
        return {**call, "function": _tool_call(call["function"], where)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: the arguments of tool call {call.get('name')!r} are not JSON ({error}): {arguments!r:.80}"
            ) from None
    return {**call, "arguments": arguments} if arguments is not None else call


def render_text(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    marks: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]]:
    """The template applied to messages, and the spans its generation marks enclose (with ``marks``)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(None, list(tools) if tools else None)
    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **{**tokenizer.special_tokens_map, **(variables or {})},
        )
    except Exception as error:
        roles = " ".join(str(m.get("role")) for m in messages) or "(no messages)"
        raise TemplateError(f"the chat template failed on a conversation with roles: {roles}: {type(error).__name__}: {error}") from error
    return texts[0], [tuple(s) for s in spans[0]] if marks else []


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    first_answer: int = 0,
    variables: Mapping[str, Any] | None = None,
    control: Sequence[str] = (),
    observed: Sequence[int] = (),
) -> Rendered:
    """Render a conversation.  Spans of assistant messages before number ``first_answer`` are not needed and may be left empty.  ``control``
    are the tokens that data must not contain as such (:func:`special_tokens`).  ``observed``: messages that are observations beside those of tools.

    Raises :class:`TemplateError` when the template fails, or when what the assistant writes cannot be told from the rest.
    """
    messages, tools, literals = _protect(messages, tools, control)

    def text_of(upto: int, prompt: bool = False) -> str:
        return render_text(tokenizer, messages[:upto], tools, add_generation_prompt=prompt, variables=variables)[0]

    answered = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    marked = bool(MARK.search(tokenizer.get_chat_template(None, list(tools) if tools else None)))
    text, spans = render_text(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, marks=marked, variables=variables)
    if marked:
        answers = _marked_spans(text, spans, messages, answered, text_of, first_answer)
    else:
        answers = [(0, 0)] * min(first_answer, len(answered))
        answers += [_span_by_difference(text, k, i, text_of) for k, i in enumerate(answered) if k >= first_answer]
    tool_spans = {}
    for i, message in enumerate(messages):
        if message["role"] == "tool" or i in observed:
            start, end = (shared_length(text, text_of(upto)) for upto in (i, i + 1))
            tool_spans[i] = (start, max(start, end))
    return Rendered(text, tuple(answers), tool_spans, literals)


def _marked_spans(
    text: str, spans: list[Span], messages: list[dict[str, Any]], answered: list[int], text_of: Any, first_answer: int
) -> list[Span]:
    """One span per assistant message.  A template may mark several pieces of one turn; they are joined when turns can be told apart."""
    if len(spans) != len(answered):
        joined = []
        for i in answered:
            start = len(text_of(i))
            end = shared_length(text, text_of(i + 1))
            inside = [s for s in spans if start <= s[0] and s[1] <= end] if text.startswith(text_of(i)) else []
            joined.append((inside[0][0], inside[-1][1]) if inside else (0, 0))
        if sum(a <= s[0] and s[1] <= b for s in spans for a, b in joined) != len(spans):
            raise TemplateError(
                f"the chat template marks {len(spans)} generated spans for {len(answered)} assistant messages that cannot be matched; {FIX}"
            )
        spans = joined
    for k, (span, i) in enumerate(zip(spans, answered, strict=True)):
        content = messages[i]["content"]
        words = content.strip() if isinstance(content, str) else ""
        if k >= first_answer and words and words in text and words not in text[span[0] : span[1]]:
            raise TemplateError(
                f"the chat template's generation marks do not enclose what assistant message {k} says ({words!r:.60}); {FIX}"
            )
    return spans


def _span_by_difference(text: str, number: int, index: int, text_of: Any) -> Span:
    """What message ``index`` adds to the conversation before it and the generation prompt."""
    try:
        before = text_of(index, True)
    except TemplateError as error:
        raise TemplateError(
            f"assistant message {number} cannot be told from the rest, because the turns before it do not render alone: {error}; {FIX}"
        ) from error
    after = text_of(index + 1)
    if not before or not after.startswith(before) or after == before:
        raise TemplateError(
            f"assistant message {number} cannot be told from the rest: the generation prompt ends in {before[-40:]!r}, but the turn "
            f"finished reads {after[max(len(before) - 40, 0) :][:80]!r}; {FIX}"
        )
    if not text.startswith(after):
        raise TemplateError(
            f"assistant message {number} is rendered differently once later messages follow (templates that hide reasoning do this), so "
            f"its tokens would not be the ones generated; {FIX}, or learn from the last turn only (loss_on=last_turn)"
        )
    return len(before), len(after)


def _protect(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, control: Sequence[str]
) -> tuple[list[dict[str, Any]], Any, dict[str, str]]:
    """Replace control tokens spelt in data by private characters that occur nowhere else."""
    content = [{k: v for k, v in m.items() if k != "role"} for m in messages]
    everything = json.dumps([content, list(tools or [])], ensure_ascii=False, default=str)
    found = [t for t in control if json.dumps(t, ensure_ascii=False)[1:-1] in everything]
    if not found:
        return [dict(m) for m in messages], tools, {}
    free = (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in everything)
    private = dict(zip(found, free, strict=False))

    def swap(value: Any) -> Any:
        if isinstance(value, str):
            for token, character in private.items():
                value = value.replace(token, character)
            return value
        if isinstance(value, Mapping):
            return {swap(k): swap(v) for k, v in value.items()}
        return [swap(v) for v in value] if isinstance(value, (list, tuple)) else value

    safe = [{k: v if k == "role" else swap(v) for k, v in m.items()} for m in messages]
    return safe, swap(list(tools)) if tools else tools, {character: token for token, character in private.items()}
