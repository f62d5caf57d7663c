"""Branches from an expert's transcripts: states are played again, own actions differ, observations alone are learnt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.branches import WHY, branches, main, reflections, states_of
from posttrain.data.columns import Columns
from posttrain.data.files import DataError
from posttrain.data.load import load_data
from posttrain.data.render import Renderer
from posttrain.records import Prompt, Sampling
from posttrain.rollout.environment import Reply
from posttrain.testing.tiny import create_tokenizer

TOKENIZER = create_tokenizer()
RENDERER = Renderer(TOKENIZER)


@dataclass
class Line:
    """Cells 0 to 5; the question names the start, ``right`` and ``left`` move, the end is at 5.  ``drift`` makes it another world every time."""

    max_turns: int = 9
    max_reply_chars: int = 30
    drift: int = 0
    begun: list[int] = field(default_factory=list)

    def begin(self, prompt: Prompt, seed: int) -> Any:
        self.begun.append(seed)
        return _Walk(int(prompt.text.split()[-1]) + self.drift * (len(self.begun) > 1))


@dataclass
class _Walk:
    at: int

    async def reply(self, answer: str) -> Reply:
        if answer == "shout":
            return Reply("o" * 31)
        self.at += {"right": 1, "left": -1}.get(answer, 0)
        return Reply(None if self.at >= 5 else f"at {self.at}", "tool" if answer == "look" else "user")


def transcript(start: int = 3, **more: Any) -> dict[str, Any]:
    said = [("user", f"start {start}"), ("assistant", "right"), ("user", f"at {start + 1}"), ("assistant", "right")]
    return {"id": f"t{start}", "messages": [{"role": r, "content": c} for r, c in said], **more}


class Scripted:
    """Says what is written down for its turn, state by state; a star at the end marks an answer that was cut off."""

    def __init__(self, *said: str) -> None:
        self.said, self.asked = said, []

    def __call__(self, asked: Sequence[tuple[str, tuple[int, ...], Sampling]]) -> list[tuple[tuple[int, ...], bool]]:
        self.asked += list(asked)
        assert len(asked) == len(self.said)
        return [(tuple(TOKENIZER(s.rstrip("*"))["input_ids"]), not s.endswith("*")) for s in self.said]


def branch(*said: str, k: int = 3, environment: Line | None = None, rows: Sequence[Any] | None = None) -> tuple[list[tuple[Any, list[dict[str, Any]]]], Counter[str], Scripted]:
    counts, sample = Counter(), Scripted(*said)
    rows = list(Columns().apply([transcript()] if rows is None else rows))
    return list(branches(rows, sample, RENDERER, environment or Line(), k, Sampling(max_tokens=9), counts=counts)), counts, sample


def said(row: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    return [(m["role"], m["content"], m.get("by")) for m in row["messages"]]


def test_own_actions_are_answered_from_the_state_they_were_taken_in() -> None:
    found, counts, sample = branch("left", "wait", "right", "left", "left", "look")
    first, second = (rows for _, rows in found)
    asked = ("user", "start 3", None)
    assert [said(r) for r in first] == [
        [asked, ("assistant", "left", "own"), ("user", "at 2", "environment")],
        [asked, ("assistant", "wait", "own"), ("user", "at 3", "environment")],
    ]
    past = [asked, ("assistant", "right", "expert"), ("user", "at 4", None)]
    assert [said(r) for r in second] == [
        [*past, ("assistant", "left", "own"), ("user", "at 3", "environment")],
        [*past, ("assistant", "look", "own"), ("tool", "at 4", "environment")],
    ]
    assert [r["id"] for r in first + second] == ["t3/0/0", "t3/0/1", "t3/1/0", "t3/1/2"]
    assert counts == {"actions": 6, "kept": 4, "same_as_expert": 1, "repeated": 1}
    names, prompts, samplings = zip(*sample.asked, strict=True)
    assert names[:3] == ("t3/0/0", "t3/0/1", "t3/0/2") and len(set(names)) == 6 and len({s.seed for s in samplings}) == 6
    assert TOKENIZER.decode(prompts[3]) == "<|user|>start 3<|im_end|><|assistant|>right<|im_end|><|user|>at 4<|im_end|><|assistant|>"


def test_what_teaches_nothing_is_left_out_and_counted() -> None:
    environment = Line()
    found, counts, _ = branch("shout", "left*", " ", "up and on", "shout", "right ", environment=environment)
    assert [len(rows) for _, rows in found] == [0, 1] and counts == {"actions": 6, "too_long": 2, "cut_off": 1, "repeated": 1, "kept": 1, "same_as_expert": 1}
    found, counts, _ = branch("right", "left", "wait", rows=[transcript(4, messages=[transcript(4)["messages"][0], {"role": "assistant", "content": "left"}])], environment=environment)
    assert counts["over"] == 1 and [said(r)[-1][1] for r in found[0][1]] == ["at 4"], "left is the expert's, right ends the episode"


def test_a_world_that_does_not_come_back_is_refused() -> None:
    with pytest.raises(DataError, match=r"t3/1: asked again, the environment answers the expert's action 0 with 'at 5'|t3/1: .* with None"):
        branch("left", "wait", "look", "left", "wait", "look", environment=Line(drift=1))
    lied = transcript()
    lied["messages"][2]["content"] = "at 9"
    with pytest.raises(DataError, match="'at 4', and the transcript has 'at 9'"):
        branch("left", "wait", "look", "left", "wait", "look", rows=[lied])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "x"}], "no messages of an assistant"),
        ([{"role": "assistant", "content": "x"}], "begins with an action"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "assistant", "content": "z"}], "two actions in a row"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "plain text"),
        ("hello", "no messages"),
    ],
)
def test_what_is_no_transcript_is_refused(messages: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"row 7.*{reason}"):
        states_of({"messages": messages}, 7)


def test_only_the_observation_is_learnt(tmp_path: Path) -> None:
    """Flip a letter of the observation and the loss's labels change; flip the action, and only the context does."""
    found, _, _ = branch("left", "wait", "look", "left", "wait", "look")
    rows = [row for _, part in found for row in part]

    def learnt(text: str) -> list[str]:
        file = tmp_path / "branches.jsonl"
        file.write_text(text)
        demos, _ = load_data("demos", str(file), TOKENIZER, loss_on="environment")
        return ["".join(TOKENIZER.decode([i]) for s in d.segments for i, on in zip(s.ids, s.trainable, strict=True) if on) for d in demos]  # type: ignore[union-attr, arg-type]

    plain = "".join(json.dumps(r) + "\n" for r in rows)
    assert learnt(plain)[0] == "<|user|>at 2<|im_end|>" and learnt(plain)[-1] == "<|tool|>at 4<|im_end|>"
    assert len(learnt(plain)[3]) < 30, "not the observation that came before it"
    assert learnt(plain.replace("left", "l3ft")) == learnt(plain) != learnt(plain.replace("at 2", "at 7"))


@pytest.mark.parametrize(
    ("environment", "options", "reason"),
    [
        ("tests.data.test_branches.Lime", "{}", "has no attribute 'Lime'"),
        ("no.such.module", "{}", "No module named 'no'"),
        ("tests.data.test_branches.Line", '{"speed": 2}', "unexpected keyword argument 'speed'"),
        ("tests.data.test_branches.Line", "{", "Expecting property name"),
        ("tests.data.test_branches.Scripted", "{}", "is no environment"),
    ],
)
def test_a_wrong_environment_is_named_before_anything_starts(environment: str, options: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "nowhere", "--data", "x.jsonl", "--out", "y.jsonl", "--environment", environment, "--options", options])
    assert reason in capsys.readouterr().err


def test_an_observation_is_not_the_assistant_s() -> None:
    with pytest.raises(ValueError, match="message 1 of the assistant says by: environment"):
        RENDERER.conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "by": "environment"}], loss_on="environment")


def test_rationales_are_asked_for_with_both_outcomes_and_learnt_without_them(tmp_path: Path) -> None:
    found, _, _ = branch("left", "wait", "look", "right", "right", "right")
    why = Scripted("five is that way")
    (row,) = reflections(found, why, RENDERER, Sampling(max_tokens=50))
    asked = TOKENIZER.decode(why.asked[0][1])
    for part in ("start 3\n\n", "A good choice here is:\nright\nWhich leads to:\nat 4", "- left\n  leads to: at 2", "- wait\n  leads to: at 3"):
        assert part in asked, part
    assert said(row) == [("user", "start 3", None), ("assistant", "five is that way\nright", "expert")], "the question for it is not kept"
    later, _, _ = branch("right", "right", "right", "left", "wait*", "look")
    (row,) = reflections(later, Scripted("on"), RENDERER, Sampling())
    assert said(row)[1] == ("assistant", "right", "own"), "what was done before is context"
    (tmp_path / "why.jsonl").write_text(json.dumps(row) + "\n")
    (demo,), _ = load_data("demos", str(tmp_path / "why.jsonl"), TOKENIZER, loss_on="expert")
    assert TOKENIZER.decode([i for s in demo.segments for i, on in zip(s.ids, s.trainable, strict=True) if on]) == "on\nright<|im_end|>"  # type: ignore[union-attr, arg-type]
    assert list(reflections(found, Scripted("cut off*"), RENDERER, Sampling())) == [] and list(reflections([], Scripted(), RENDERER, Sampling())) == []
    assert all(f"{{{name}}}" in WHY for name in ("expert", "outcome", "others"))
