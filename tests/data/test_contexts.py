"""Rows scored beside those that are learnt from, and the way through a step that reads them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from posttrain.data.contexts import with_contexts
from posttrain.data.pack import Packer
from posttrain.learner.actor import StepReport
from posttrain.loss import load
from posttrain.records import Demo, Row, Segment, Source, TokenBatch
from posttrain.update import Learn


def row(prompt: list[int], answer: list[int], **more: Any) -> Row:
    sources = [Source.prompt] * len(prompt) + [Source.demo] * len(answer)
    trainable = [s == Source.demo for s in sources]
    return Row(ids=[*prompt, *answer], sources=sources, trainable=trainable, rewards={"label": 1.0}, **{"sample_id": "x", **more})


def test_an_answer_stands_under_the_next_prompt() -> None:
    rows = [row([1], [5, 6], sample_id="a"), row([2, 3], [7], sample_id="b"), row([4], [8, 9], sample_id="c")]
    out = with_contexts(rows, {"mismatched"})
    assert [r.ids for r in out] == [r.ids for r in rows] + [[1, 7], [2, 3, 8, 9], [4, 5, 6]]
    assert [r.context for r in out] == [""] * 3 + ["mismatched"] * 3
    assert out[4].sources == [Source.prompt] * 2 + [Source.demo] * 2 and out[4].trainable == [False, False, True, True]
    assert out[4].sample_id == "c under b" and not out[4].rewards and not out[4].logps
    assert [out[i].group == out[i + 3].group is not None for i in range(3)] == [True] * 3
    assert len({r.group for r in out}) == 3


def test_a_micro_batch_of_one_prompt_would_estimate_the_wrong_thing() -> None:
    with pytest.raises(ValueError, match=r"2 answers to one prompt.*prompts_per_step"):
        with_contexts([row([1], [5]), row([1], [6])], {"mismatched"})


def test_answers_to_the_same_prompt_are_passed_over() -> None:
    rows = [row([1], [5], group="q"), row([1], [6], group="q"), row([2], [7], group="r")]
    out = with_contexts(rows, {"mismatched"})[3:]
    assert [r.ids for r in out] == [[1, 7], [1, 7], [2, 5]]
    assert [r.group for r in out] == ["q", "q", "r"]


def test_holes_and_tools_of_an_answer_travel_with_it() -> None:
    given = row([1], [5, 6, 7])
    given.sources[2], given.trainable[2] = Source.tool, False
    out = with_contexts([given, row([2], [8])], {"mismatched"})
    assert out[3].sources == [Source.prompt, Source.demo, Source.tool, Source.demo]
    assert out[3].trainable == [False, True, False, True]


def test_rows_by_hand_may_leave_sources_and_flags_out() -> None:
    rows = [Row(ids=[1, 2, 3], sources=["prompt", "demo", "tool"]), Row(ids=[4, 5])]
    out = with_contexts(rows, {"mismatched"})[2:]
    assert [r.ids for r in out] == [[1, 5], [4, 2, 3]]
    assert [r.trainable for r in out] == [[False, True], [False, True, False]]
    assert TokenBatch.from_sequences(out).num_sequences == 2


def test_without_contexts_nothing_changes_and_an_unknown_one_is_named() -> None:
    rows = [row([1], [5])]
    assert with_contexts(rows, frozenset()) == rows
    with pytest.raises(ValueError, match="'reversed'"):
        with_contexts(rows, {"reversed"})


def test_a_row_and_its_companion_meet_in_one_optimizer_step() -> None:
    rows = with_contexts([row([i], [20 + i], sample_id=str(i)) for i in range(1, 9)], {"mismatched"})
    for step in Packer(64, updates_per_batch=3).plan(rows, "batch"):
        names = step.whole.sample_ids
        own = {n for n, c in zip(names, step.whole.contexts, strict=True) if not c}
        under = {n.rsplit(" ", 1)[1] for n, c in zip(names, step.whole.contexts, strict=True) if c}
        assert own == under and own


class Recorder:
    """A learner without a model: its log-probs are a function of the token; keeps what it was given."""

    def __init__(self) -> None:
        self.scored: list[tuple[str, list[TokenBatch]]] = []
        self.learnt: list[tuple[list[TokenBatch], Any]] = []
        self.drift = 0.0

    async def score(self, micro: list[TokenBatch], policy: str = "current", entropy: bool = False) -> list[dict[str, torch.Tensor]]:
        self.scored.append((policy, micro))
        shift = -0.1 - self.drift if policy == "current" else -0.3
        return [{"logp": shift - b.target_ids.double() / 10 + 0.02 * b.input_ids} for b in micro]

    async def step(self, micro: list[TokenBatch], weights: Any) -> StepReport:
        self.learnt.append((micro, weights))
        self.drift += 0.05
        return StepReport({}, {})


def demos(*labels: float) -> list[Demo]:
    out = []
    for i, label in enumerate(labels):
        asked, answer = Segment((1 + i,), Source.prompt, trainable=False), Segment((10 + i, 20 - i), Source.demo)
        out.append(Demo(str(i), (asked, answer), rewards={"label": label}))
    return out


def test_a_step_of_labelled_answers_scores_companions_and_learns_without_them() -> None:
    learner, objective = Recorder(), load("kto")
    learn = Learn(objective, Packer(6), learner)
    totals = asyncio.run(learn.learn(0, demos(1.0, 0.0, 1.0), 0.0)).result()
    assert {policy for policy, _ in learner.scored} == {"base", "current"}
    for _, micro in learner.scored:
        assert sum(c == "mismatched" for b in micro for c in b.contexts) == 3
    micro, weights = learner.learnt[0]
    assert len(micro) > 1 and not any(c == "mismatched" for b in micro for c in b.contexts)
    assert sum(b.num_sequences for b in micro if b.trainable.any()) == 3
    assert totals["labelled/good"] == pytest.approx(2 / 3) and totals["labelled/tokens"] == 6
    whole = torch.cat([w for b, w in zip(micro, weights, strict=True) if b.trainable.any()])
    d = 0.2 * 2  # the log-ratio of every answer of two tokens, right or wrong prompt alike, is the estimated KL too
    assert totals["labelled/shift"] == pytest.approx(0.1 * d, rel=1e-5)
    assert sorted(whole[whole != 0].abs().tolist()) == pytest.approx([0.1 / 4 / 3] * 6, rel=1e-5)


def test_the_running_mean_is_carried_from_step_to_step_and_over_a_resume() -> None:
    learner, objective = Recorder(), load("bco")
    learn = Learn(objective, Packer(64), learner)
    shifts = [asyncio.run(learn.learn(step, demos(1.0, 0.0), 0.0)).result()["labelled/shift"] for step in range(3)]
    seen = [2 * (0.2 - 0.05 * step) for step in range(3)]
    assert shifts == pytest.approx([0.1 * sum(seen[: n + 1]) / (n + 1) for n in range(3)], rel=1e-5)
    resumed = Learn(objective, Packer(64), learner)
    resumed.load(learn.state)
    after = asyncio.run(resumed.learn(3, demos(1.0, 0.0), 0.0)).result()["labelled/shift"]
    assert after == pytest.approx(0.1 * (sum(seen) + 2 * (0.2 - 0.15)) / 4, rel=1e-5)
    fresh = asyncio.run(Learn(objective, Packer(64), learner).learn(3, demos(1.0, 0.0), 0.0)).result()["labelled/shift"]
    assert abs(fresh - after) > 1e-3


def test_what_a_term_keeps_of_every_pair_stays_where_the_step_is_weighed() -> None:
    from posttrain.records import Pair

    asked = Segment((1,), Source.prompt, trainable=False)
    sides = [Demo(f"p/{i}", (asked, Segment((10 + i, 20), Source.demo))) for i in range(2)]
    learner, objective = Recorder(), load("ids")
    learn = Learn(objective, Packer(64), learner, memory={"control/kl": 0.5})
    for step in range(2):
        asyncio.run(learn.learn(step, [Pair("p", *sides)], 0.0))
    assert set(learn.memory) == {"control/kl", "pairs/SelfLabelled.p/chosen"} and 0.9 < learn.memory["pairs/SelfLabelled.p/chosen"] < 1.0
    for micro in (m for m, _ in learner.learnt):
        assert all(b.memory == {"control/kl": 0.5} for b in micro)
