"""What the model reads may be corrupted; what it learns to say, never."""

from __future__ import annotations

import pytest

from posttrain.data.rows import to_rows
from posttrain.mixture.context import Corrupt
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import answer_of
from posttrain.mixture.schedule import Linear
from posttrain.records import Demo, Row, Segment, Source, TokenBatch
from tests.mixture.conftest import demo, group

MASK = 99


def long(name: str, n: int = 200) -> Demo:
    return Demo(name, (Segment((1, 2), Source.prompt, trainable=False), Segment(tuple(range(10, 10 + n)), Source.demo)))


def corrupted(one: Demo, rate: object, step: int = 0, progress: float = 0.0, seed: int = 0) -> Demo:
    return Corrupt(MASK, rate, seed)([one], Demos(), step, progress)[0]  # type: ignore[arg-type]


def test_a_rate_of_0_changes_nothing_and_a_rate_of_1_leaves_the_prompt() -> None:
    one = long("a", 5)
    assert corrupted(one, 0.0) is one
    batch = TokenBatch.from_sequences(to_rows([corrupted(one, 1.0)]))
    assert batch.input_ids.tolist() == [1, 2, MASK, MASK, MASK, MASK] and batch.target_ids.tolist() == [2, 10, 11, 12, 13, 14]
    plain = TokenBatch.from_sequences(to_rows([one]))
    for name in ("target_ids", "positions", "source", "trainable", "weight"):
        assert getattr(batch, name).tolist() == getattr(plain, name).tolist()


def test_draws_differ_between_steps_samples_and_seeds_and_repeat_otherwise() -> None:
    first = corrupted(long("a"), 0.4)
    assert first == corrupted(long("a"), 0.4)
    places = {
        tuple(i == MASK for i in d.segments[1].inputs or ())
        for d in (first, corrupted(long("a"), 0.4, step=1), corrupted(long("b"), 0.4), corrupted(long("a"), 0.4, seed=1))
    }
    assert len(places) == 4
    share = sum(i == MASK for i in first.segments[1].inputs or ()) / 200
    assert 0.25 < share < 0.55 and first.segments[0].inputs is None


def test_a_schedule_of_rates_and_what_passes() -> None:
    rate = Linear(0.0, 1.0, 0.0, 0.5)
    assert corrupted(long("a"), rate).segments[1].inputs is None
    assert set(corrupted(long("a"), rate, progress=0.6).segments[1].inputs or ()) == {MASK}
    items = [group("g", 1.0)]
    assert Corrupt(MASK, 1.0)(items, Demos(), 0, 0.0) == items


def test_inputs_are_cut_with_their_segment() -> None:
    one = demo("a")
    joined = Demo("j", (Segment((*one.prompt.ids, 7, 8), Source.demo, inputs=(*one.prompt.ids, 70, 80)),), prompt=one.prompt)
    assert [(s.ids, s.inputs) for s in answer_of(joined)] == [((7, 8), (70, 80))]


def test_a_learners_own_action_is_read_under_the_experts_label() -> None:
    """An action the learner took stays in the context; what the expert would have done is the label.  Unlabelled actions are not learnt from."""
    took, expert, observation = 5, 6, 7
    given = Demo(
        "t",
        (
            Segment((1,), Source.prompt),
            Segment((expert,), Source.demo, inputs=(took,)),
            Segment((observation,), Source.tool),
            Segment((took,), Source.policy, logprobs=(-1.0,), version=0, trainable=False),
            Segment((expert,), Source.demo),
        ),
    )
    batch = TokenBatch.from_sequences(to_rows([given]))
    assert batch.input_ids.tolist() == [1, took, observation, took] and batch.target_ids.tolist() == [expert, observation, took, expert]
    assert batch.trainable.tolist() == [True, False, False, True]


@pytest.mark.parametrize(("make", "reason"), [(lambda: Corrupt(-1), "id of a token"), (lambda: Corrupt(1, 1.5), "between 0 and 1")])
def test_impossible_settings_are_refused(make, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_inputs_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 inputs"):
        to_rows([Demo("x", (Segment((1, 2), Source.demo, inputs=(1,)),))])
    with pytest.raises(ValueError, match="inputs has 1 entries but ids has 2"):
        TokenBatch.from_sequences([Row(ids=[1, 2], inputs=[1])])
