"""How one call of a reward becomes a score: which arguments it gets, and what counts as a failure."""

from functools import partial

import numpy as np
import pytest

from posttrain.records import Prompt, Rollout, Score, Segment, Source
from posttrain.reward.base import ARGUMENTS, Signature, read, read_many


def rollout(text="hi", answer="4", **fields) -> Rollout:
    prompt = Prompt("p", (1, 2), text="2+2=", answer=answer, env="sums", level=3, meta={"k": 1})
    segments = (Segment((7, 8), Source.policy, logprobs=(0.0, 0.0), version=0), Segment((9,), Source.tool))
    return Rollout("s", prompt, segments, text=text, **fields)


def test_only_what_is_named_is_passed():
    signature = Signature.of("r", lambda answer, completion: 1)
    assert signature.arguments([rollout()], 0.5) == {"answer": "4", "completion": "hi"}
    every = Signature.of("r", lambda **everything: 1).arguments([rollout()], 0.5)
    assert set(every) == set(ARGUMENTS)
    assert (every["prompt"], every["meta"], every["ids"], every["progress"], every["level"]) == ("2+2=", {"k": 1}, (7, 8, 9), 0.5, 3)
    assert (every["env"], every["finish"], every["num_tokens"]) == ("sums", "stop", 3)


def test_defaults_and_partial_arguments_stay_the_users():
    def reward(completion, tolerance=0.1, *, answer="mine"):
        return 1

    assert Signature.of("r", reward).wanted == ("completion", "answer")
    assert Signature.of("r", partial(reward, answer="bound")).wanted == ("completion",)


def test_plural_names_make_a_batch_form():
    signature = Signature.of("r", lambda completions, answers, progress: [1])
    assert signature.batched and signature.scope == "group"
    assert signature.arguments([rollout("a"), rollout("b")], 0.2) == {"completions": ["a", "b"], "answers": ["4", "4"], "progress": 0.2}


def test_execution_is_declared_or_found():
    async def waits(completion):
        return 1

    class Inline:
        execution = "inline"
        timeout_s = 3.0

        def __call__(self, completion):
            return 1

    class Waits:
        async def __call__(self, completion):
            return 1

    def bounded(completion, limit):
        return 1

    bounded.execution, bounded.timeout_s = "inline", 2.0
    bound = Signature.of("r", partial(bounded, limit=3))
    assert (bound.execution, bound.timeout_s, bound.wanted) == ("inline", 2.0, ("completion",))

    assert Signature.of("r", lambda completion: 1).execution == "process"
    assert Signature.of("r", Inline()).execution == "inline" and Signature.of("r", Inline()).timeout_s == 3.0
    assert (
        Signature.of("r", waits).execution == Signature.of("r", Waits()).execution == Signature.of("r", partial(waits)).execution == "async"
    )


@pytest.mark.parametrize(
    ("reward", "message"), [(3, "give a function"), (lambda text: 1, "asks for text"), (lambda completion, /: 1, "asks for completion")]
)
def test_what_cannot_be_called_is_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        Signature.of("r", reward)


@pytest.mark.parametrize(
    ("result", "value"),
    [(1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), ("0.25", 0.25), (Score(0.0, "bad_format"), 0.0), ({"value": 2}, 2.0)],
)
def test_numbers_are_read(result, value):
    assert read(result)[0].value == value


@pytest.mark.parametrize(
    "result", [None, float("nan"), float("inf"), "word", [1, 2], {"part": 1}, {"value": None}, {"value": 1, "status": "?"}, object()]
)
def test_everything_else_is_an_error_and_not_a_zero(result):
    score, _ = read(result)
    assert score.value is None and score.status == "error" and score.detail


def test_mappings_keep_parts_status_and_detail():
    score, parts = read({"value": 0.5, "status": "bad_format", "detail": "why", "style": 1.0, "broken": float("nan")})
    assert (score.value, score.status, score.detail) == (0.5, "bad_format", "why")
    assert parts["style"].value == 1.0 and parts["broken"].status == "error"
    assert read({"value": None, "status": "timeout"})[0].status == "timeout"


def test_a_wrong_count_is_an_error_of_all():
    assert [s.value for s, _ in read_many([1, 2], 2)] == [1.0, 2.0]
    for result in ([1], [1, 2, 3], 5, None):
        scores = [s for s, _ in read_many(result, 2)]
        assert len(scores) == 2 and all(s.status == "error" for s in scores)
    assert [s.status for s, _ in read_many([None, 1], 2)] == ["error", "ok"]
