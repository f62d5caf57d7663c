"""Early experience: what the environment answers where an agent does something else than the expert, asked once and kept (arXiv 2510.08558).

    python -m posttrain.data.branches --model FOLDER --data transcripts.jsonl --environment module.Class --out branches.jsonl --k 8

At every state an expert's transcript passes through, the model acts ``k`` times by itself, and the environment, brought to that state again by the expert's
actions, answers.  One row per answer: the transcript up to there, the own action (``by: own``) and the observation (``by: environment``).
``data.loss_on=environment`` learns the observations alone (``loss=world_model``).  With ``--reflections FILE`` the model also says, state by state, why the
expert's action does better, with the outcomes before it: rows for imitation, whose last turn is the rationale followed by the expert's action.

A transcript has ``messages`` whose assistant turns are the expert's.  Its own answers must be what the environment says again when it is asked again: one
that cannot be brought back to its states is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from posttrain.data.columns import row_id
from posttrain.data.files import DataError
from posttrain.data.prompts import make_prompt
from posttrain.data.render import Renderer
from posttrain.data.seeds import derive
from posttrain.records import Sampling

WHY = (
    "Think about the choice that comes next. A good choice here is:\n{expert}\nWhich leads to:\n{outcome}\nOther choices and what they lead to:\n{others}\n"
    "Without mentioning that you were told, explain in a few sentences why the good choice is the better one."
)
"""What is asked for a rationale.  The wording is ours."""
OVER = "(the end)"

Sample = Callable[[Sequence[tuple[str, tuple[int, ...], Sampling]]], Sequence[tuple[tuple[int, ...], bool]]]
"""Named prompts to answers: their ids, and whether the model ended them itself."""


@dataclass(frozen=True)
class State:
    """A place where the expert acted.  ``before``: the messages up to there; ``action``: the expert's, with its ``outcome``, None at an episode's end."""

    name: str
    before: tuple[Mapping[str, Any], ...]
    action: str
    outcome: str | None
    row: Mapping[str, Any]

    @property
    def past(self) -> list[str]:
        return [m["content"] for m in self.before if m["role"] == "assistant"]


def states_of(row: Mapping[str, Any], number: int) -> list[State]:
    """The states of one transcript, in order.  Raises :class:`DataError` naming the row when it is none."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not any(m.get("role") == "assistant" for m in messages):
        raise DataError(f"row {number} has no messages of an assistant; branches start where an expert acted")
    if any(not isinstance(m.get("content"), str) for m in messages) or any(m.get("tool_calls") for m in messages):
        raise DataError(f"row {number}: every message must say something in plain text, for an environment answers texts")
    if any(a["role"] == b["role"] == "assistant" for a, b in pairwise(messages)):
        raise DataError(f"row {number} has two actions in a row; between them stands what the environment answered to the first")
    if messages[0]["role"] == "assistant":
        raise DataError(f"row {number} begins with an action; a transcript begins with what the agent is asked")
    name, out = row_id(row, "messages"), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            answered = messages[i + 1]["content"] if i + 1 < len(messages) else None
            before = tuple({k: m[k] for k in ("role", "content")} for m in messages[:i])
            out.append(State(f"{name}/{len(out)}", before, message["content"], answered, row))
    return out


def ask(environment: Any, state: State, ids: tuple[int, ...], action: str, seed: int) -> tuple[str | None, str]:
    """``(observation, role)`` after ``action`` in a state, whose past is played again first; None when the episode is over.

    Raises :class:`DataError` when the environment does not answer the expert's actions as it did.
    """

    async def play() -> tuple[str | None, str]:
        asked = [m for i, m in enumerate(state.before) if not any(x["role"] == "assistant" for x in state.before[: i + 1])]
        dialogue = environment.begin(make_prompt(state.name, ids, asked, state.row, tuple(asked)), seed)
        then = [m["content"] for m in state.before[len(asked) :] if m["role"] != "assistant"]
        for turn, (done, told) in enumerate(zip(state.past, then, strict=True)):
            again = await _said(dialogue.reply(done))
            if again.text != told:
                raise DataError(
                    f"{state.name}: asked again, the environment answers the expert's action {turn} with {again.text!r:.80}, and the transcript has {told!r:.80}; "
                    "it must come back to the states of the transcripts (no chance, no clock, the same version)"
                )
        answer = await _said(dialogue.reply(action))
        return answer.text, answer.role

    return asyncio.run(play())


async def _said(reply: Any) -> Any:
    return await reply if inspect.isawaitable(reply) else reply


def branches(
    rows: Iterable[Mapping[str, Any]], sample: Sample, renderer: Renderer, environment: Any, k: int, sampling: Sampling, seed: int = 0, counts: Counter[str] | None = None
) -> Iterator[tuple[State, list[dict[str, Any]]]]:
    """Every state with its rows.  Left out and counted in ``counts``: ``same_as_expert``, ``repeated`` and ``cut_off`` actions, ends of episodes (``over``), and
    observations longer than the environment's ``max_reply_chars`` (``too_long``), whose cut would hide what happened."""
    counts = Counter() if counts is None else counts
    states = [s for number, row in enumerate(rows) for s in states_of(row, number)]
    prompts = [renderer.prompt(list(s.before)).ids for s in states]
    drawn = sample(
        [
            (f"{s.name}/{j}", ids, replace(sampling, seed=derive(seed, "branches", s.name, j)))
            for s, ids in zip(states, prompts, strict=True)
            for j in range(k)
        ]
    )
    for index, (state, ids) in enumerate(zip(states, prompts, strict=True)):
        seen, kept = {state.action.strip()}, []
        for j, (answer, ended) in enumerate(drawn[index * k : (index + 1) * k]):
            action = renderer.tokenizer.decode(answer, skip_special_tokens=True)
            counts["actions"] += 1
            if not ended:
                counts["cut_off"] += 1
            elif action.strip() in seen or not action.strip():
                counts["same_as_expert" if action.strip() == state.action.strip() else "repeated"] += 1
            else:
                seen.add(action.strip())
                told, role = ask(environment, state, ids, action, derive(seed, "environment", state.name))
                reason = "over" if told is None else "too_long" if len(told) > environment.max_reply_chars else "kept"
                counts[reason] += 1
                if reason == "kept":
                    past = [{**m, "by": "expert"} if m["role"] == "assistant" else m for m in state.before]
                    own = [{"role": "assistant", "content": action, "by": "own"}, {"role": role, "content": told, "by": "environment"}]
                    kept.append({"id": f"{state.name}/{j}", "messages": [*past, *own]})
        yield state, kept


def reflections(found: Sequence[tuple[State, list[dict[str, Any]]]], sample: Sample, renderer: Renderer, sampling: Sampling, seed: int = 0, ask_why: str = WHY) -> Iterator[dict[str, Any]]:
    """A row for every state with another outcome to speak of: its last turn is a rationale and then the expert's action.  Rationales that were cut off are left out."""
    told = [(state, rows) for state, rows in found if rows]
    asked = []
    for state, rows in told:
        others = "\n".join(f"- {r['messages'][-2]['content']}\n  leads to: {r['messages'][-1]['content']}" for r in rows)
        text = ask_why.replace("{expert}", state.action).replace("{outcome}", OVER if state.outcome is None else state.outcome).replace("{others}", others)
        *before, last = state.before
        question = [*before, {**last, "content": f"{last['content']}\n\n{text}"}] if last["role"] == "user" else [*state.before, {"role": "user", "content": text}]
        asked.append((f"{state.name}/why", renderer.prompt(question).ids, replace(sampling, seed=derive(seed, "why", state.name))))
    for (state, _), (answer, ended) in zip(told, sample(asked) if asked else (), strict=True):
        rationale = renderer.tokenizer.decode(answer, skip_special_tokens=True).strip()
        if ended and rationale:
            past = [{**m, "by": "own"} if m["role"] == "assistant" else m for m in state.before]
            yield {"id": f"{state.name}/why", "messages": [*past, {"role": "assistant", "content": f"{rationale}\n{state.action}", "by": "expert"}]}


def _sampler(model: str, dtype: str, limit: int | None) -> Sample:
    from posttrain.rollout.engine import EngineConfig, Request, VllmEngine

    engine = VllmEngine(EngineConfig(model, dtype=dtype, max_model_len=limit))

    def sample(asked: Sequence[tuple[str, tuple[int, ...], Sampling]]) -> list[tuple[tuple[int, ...], bool]]:
        found = engine.sample([Request(name, ids, sampling) for name, ids, sampling in asked])
        failed = next((f for f in found if f.finish == "env_error"), None)
        if failed is not None:
            raise DataError(f"{failed.id}: {failed.error}")
        return [(f.ids, f.finish == "stop") for f in found]

    return sample


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m posttrain.data.branches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of the agent")
    parser.add_argument("--data", required=True, help="transcripts: messages whose assistant turns are the expert's")
    parser.add_argument("--environment", required=True, help="module.Class of an environment, as rollout.environment takes one")
    parser.add_argument("--options", default="{}", help="its arguments as JSON")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--reflections", type=Path, help="also write rationales with the expert's actions here")
    parser.add_argument("--k", type=int, default=8, help="actions of its own in every state (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=256, help="of an action or rationale (default 256)")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    from posttrain.data.columns import Columns
    from posttrain.data.files import read_rows
    from posttrain.rollout.environment import check_environment

    try:
        environment = pkgutil.resolve_name(chosen.environment)(**json.loads(chosen.options))
        check_environment(environment)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        parser.error(f"--environment {chosen.environment} --options {chosen.options}: {error}")
    renderer, counts = Renderer(AutoTokenizer.from_pretrained(chosen.model)), Counter()
    sample = _sampler(chosen.model, chosen.dtype, chosen.max_model_len)
    sampling = Sampling(temperature=chosen.temperature, max_tokens=chosen.max_tokens)
    found = list(branches(Columns().apply(read_rows(chosen.data)), sample, renderer, environment, chosen.k, sampling, chosen.seed, counts))
    written = _write(chosen.out, (row for _, rows in found for row in rows))
    print(f"{chosen.out}: {written} observations in {len(found)} states; " + ", ".join(f"{n} {why}" for why, n in sorted(counts.items())))
    if chosen.reflections is not None:
        said = _write(chosen.reflections, reflections(found, sample, renderer, sampling, chosen.seed))
        print(f"{chosen.reflections}: {said} rationales")


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines))
    return len(lines)


if __name__ == "__main__":
    main()
