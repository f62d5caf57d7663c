"""Records to rows: what is learnt from, what is left out, and that every reason is counted."""

import math

import pytest

from posttrain.data.report import Report
from posttrain.data.rows import to_rows
from posttrain.records import Demo, Group, Pair, Prompt, Rollout, Score, Segment, Source, TokenBatch

PROMPT = Prompt(id="q1", ids=(1, 2, 3))


def rollout(sample_id="q1/0", advantage: float | None = 0.5, segments=None, **kw):
    segments = segments or (Segment((4, 5), Source.policy, turn=0, logprobs=(-0.1, -0.2), version=7),)
    return Rollout(sample_id, PROMPT, segments, advantage=advantage, **kw)


def demo(name, ids=(1, 2, 8, 9), prompt=2, weight=1.0):
    return Demo(name, (Segment(ids[:prompt], Source.prompt, trainable=False), Segment(ids[prompt:], Source.demo)), weight)


def test_rollout_row_holds_prompt_then_segments():
    turns = (
        Segment((4, 5), Source.policy, turn=0, logprobs=(-0.1, -0.2), version=7),
        Segment((6, 6, 6), Source.tool, turn=0),
        Segment((7,), Source.policy, turn=1, logprobs=(-0.3,), version=8),
    )
    scores = {"exact": Score(1.0), "format": Score(None, "timeout")}
    [row] = to_rows([Group(PROMPT, (rollout(segments=turns, scores=scores, reward=0.25, finish="length"),))])
    assert list(row.ids) == [1, 2, 3, 4, 5, 6, 6, 6, 7]
    assert [Source(s).name for s in row.sources] == ["prompt"] * 3 + ["policy"] * 2 + ["tool"] * 3 + ["policy"]
    assert list(row.trainable) == [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert list(row.version) == [-1] * 3 + [7, 7] + [-1] * 3 + [8]
    assert list(row.turn)[-1] == 1
    assert row.advantage == 0.5 and row.group == "q1" and row.sample_id == "q1/0" and row.finish == "length"
    assert row.rewards == {"exact": 1.0, "reward": 0.25}
    known = [not math.isnan(x) for x in row.logps["behaviour"]]
    assert known == [s == Source.policy for s in row.sources]
    batch = TokenBatch.from_sequences([row])
    assert batch.target_ids[batch.trainable].tolist() == [4, 5, 7]
    assert batch.logps["behaviour"][batch.trainable].tolist() == pytest.approx([-0.1, -0.2, -0.3])


def test_flags_per_token_are_taken_as_given_even_on_tool_output():
    segments = (Segment((4,), Source.policy, logprobs=(-1.0,), version=0), Segment((5, 6), Source.tool, trainable=(False, True)))
    [row] = to_rows([Group(PROMPT, (rollout(segments=segments),))])
    assert list(row.trainable) == [False, False, False, True, False, True]


def test_left_out_rollouts_are_counted():
    report = Report()
    empty = rollout("q1/2", segments=(Segment((), Source.policy, logprobs=(), version=0),))
    groups = [
        Group(PROMPT, (rollout("q1/0"), rollout("q1/1", None), empty)),
        Group(Prompt("q2", (1, 2)), (rollout("q2/0"), rollout("q2/1")), dropped="no_spread"),
    ]
    rows = to_rows(groups, report)
    assert [r.sample_id for r in rows] == ["q1/0"]
    assert report.dropped == {"no_advantage": 1, "no_trainable_tokens": 1, "no_spread": 2}
    assert (report.read, report.kept, report.tokens, report.trainable_tokens) == (5, 1, 5, 2)
    report.check()


def test_two_groups_of_one_prompt_keep_their_baselines_apart():
    rows = to_rows([Group(PROMPT, (rollout("a"), rollout("b"))), Group(PROMPT, (rollout("c"),))])
    assert TokenBatch.from_sequences(rows).group.tolist() == [0, 0, 1]


def test_pairs_come_whole_or_not_at_all():
    report = Report()
    good = Pair("p", demo("p+"), demo("p-", (1, 2, 7)))
    bad = Pair("r", demo("r+"), demo("r-", (1, 2), 2))
    rows = to_rows([good, bad, good], report)
    assert [(r.pair, r.side, r.sample_id) for r in rows] == [
        ("p", "chosen", "p/chosen"),
        ("p", "rejected", "p/rejected"),
        ("p#2", "chosen", "p#2/chosen"),
        ("p#2", "rejected", "p#2/rejected"),
    ]
    assert report.dropped == {"no_trainable_tokens": 2}
    batch = TokenBatch.from_sequences(rows)
    assert batch.pair.tolist() == [0, 0, 1, 1] and batch.side.tolist() == [1, -1, 1, -1] and batch.group.tolist() == [-1] * 4


def test_demo_weight_and_learnable_tokens():
    [row] = to_rows([demo("d", weight=0.5)])
    batch = TokenBatch.from_sequences([row])
    assert batch.weight.tolist() == [0.5] * 3 and batch.trainable.tolist() == [False, True, True] and batch.finish == ("given",)


def test_a_demo_of_one_token_has_nothing_to_predict():
    report = Report()
    assert to_rows([demo("d", (5,), 0)], report) == []
    assert report.dropped == {"no_trainable_tokens": 1}


@pytest.mark.parametrize(
    ("segment", "what"),
    [(Segment((4, 5), Source.policy, logprobs=(-1.0,), version=0), "log-prob"), (Segment((4, 5), Source.demo, trainable=(True,)), "flags")],
)
def test_lengths_that_disagree_name_the_sample(segment, what):
    with pytest.raises(ValueError, match=f"q1/0.*2 tokens but 1.*{what}"):
        to_rows([Group(PROMPT, (rollout(segments=(segment,)),))])


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="not Prompt"):
        to_rows([PROMPT])
