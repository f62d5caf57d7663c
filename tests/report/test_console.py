"""What people see while a run goes on, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest

from posttrain.records import Prompt, Rollout, Segment, Source
from posttrain.report.console import Console, duration, headline, is_live, readable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rollout(text: str, reward: float | None = 1.0, prompt: str = "abc") -> Rollout:
    return Rollout("s", Prompt("p", (1,), text=prompt), (Segment((2,), Source.policy),), text=text, reward=reward)


METRICS = {"reward/mean": 0.5, "rollouts/nll": 0.7, "learner/grad_norm": 1.25, "time/tokens_per_s": 412.3, "rollout/tokens_mean": 12.0}


def plain(total: int, steps: int, stages: int = 1) -> list[str]:
    out = io.StringIO()
    with Console(total_stages=stages, stream=out) as console:
        console.start_stage("grpo", total)
        for step in range(1, steps + 1):
            console.step(step, METRICS | ({"eval/accuracy": 0.25} if step == 5 else {}), [rollout("cba")])
    return out.getvalue().splitlines()


def test_plain_lines_without_a_terminal() -> None:
    lines = plain(total=20, steps=20, stages=2)
    assert lines[0] == "stage grpo (1 of 2): 20 steps"
    steps = [line for line in lines if line.startswith("[grpo ")]
    assert len(steps) == 20
    assert re.fullmatch(r"\[grpo 1/20\]  reward 0.500  rollouts nll 0.700  length 12  grad norm 1.2  tokens/s 412  left \d+ s", steps[0])
    assert "accuracy" not in steps[3] and "accuracy 25.0 %" in steps[4] and "accuracy 25.0 %" in steps[19], "the last one measured is kept"
    assert "      1.00  abc -> cba" in lines
    assert "\x1b" not in "\n".join(lines)


def test_long_runs_stay_short_in_a_log() -> None:
    lines = plain(total=5000, steps=5000)
    assert 100 <= sum(line.startswith("[grpo") for line in lines) <= 103
    assert any(line.startswith("[grpo 5/5000]") for line in lines), "an evaluation is always told"
    assert any(line.startswith("[grpo 5000/5000]") for line in lines)


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("posttrain.report.console.time.monotonic", lambda: now[0])
    console = Console(stream=io.StringIO())
    console.start_stage("grpo", 100, start=40)
    assert console.left_s is None
    now[0] += 30.0
    console.step(50, METRICS)
    assert console.left_s == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("environ", "live"), [({}, True), ({"NO_COLOR": "1"}, False), ({"CI": "true"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)]
)
def test_environment_decides(environ: dict[str, str], live: bool) -> None:
    assert is_live(Terminal(), environ) is live
    assert is_live(io.StringIO(), environ) is False


def test_live_display_shows_stage_numbers_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "50")
    out = Terminal()
    with Console(total_stages=2, stream=out, live=True) as console:
        console.start_stage("grpo", 20)
        console.step(3, METRICS | {"eval/accuracy": 0.25}, [rollout("[bold]cba[/bold]"), rollout("x", None)])
        console.message("held-out accuracy [1, 2]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for part in ("stage grpo (1 of 2)", "3/20", "reward 0.500", "accuracy 25.0 %", "tokens/s 412", "left ", "completion", "failed"):
        assert part in text, part
    assert "[bold]cba[/bold]" in text, "markup in an answer is text"
    assert "held-out accuracy [1, 2]" in text
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor is given back"


def test_the_terminal_is_given_back_after_an_error() -> None:
    out = Terminal()
    with pytest.raises(RuntimeError), Console(stream=out, live=True) as console:
        console.start_stage("sft", 2)
        raise RuntimeError
    assert "\x1b[?25h" in out.getvalue()


def test_finish_prints_below_and_may_be_called_inside() -> None:
    out = io.StringIO()
    with Console(stream=out) as console:
        console.finish("the end")
    assert out.getvalue() == "the end\n"


def test_hostile_text_cannot_steer_a_terminal() -> None:
    shown = readable("a\x1b[2Jb\nc\r\u202e\x07", 60)
    assert shown == "a\\x1b[2Jb\\nc\\r\\u202e\\x07" and shown.isprintable()
    assert len(readable("x" * 10_000, 60)) == 60 and readable("x" * 10_000, 60).endswith("...")
    assert len(readable("\x1b" * 50, 60)) == 60
    assert readable("x" * 60, 60) == "x" * 60


def test_prompt_shows_the_users_words_when_known() -> None:
    out = io.StringIO()
    asked = Rollout("s", Prompt("p", (1,), text="<|user|>hi<|end|>", messages=({"role": "user", "content": "hi"},)), (), text="yo", reward=None)
    console = Console(stream=out)
    console.start_stage("grpo", 1)
    console.step(1, {}, [asked])
    assert "failed  hi -> yo" in out.getvalue()


def test_headline_of_supervised_and_preference_steps() -> None:
    assert headline({"demos/nll": 0.5, "demos/clip/masked": 0.1}) == {"demos nll": "0.500"}
    assert headline({"pairs/accuracy": 0.75})["pairs ranked right"] == "75 %"
    assert headline({}) == {}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
