"""Answers under a word for their outcome: what the swap changes, what is learnt, and what the word does to a policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.advantage import Constant
from posttrain.data.rows import to_rows
from posttrain.loss import load
from posttrain.mixture.demos import Demos
from posttrain.mixture.gate import InTurn, Success
from posttrain.mixture.pairs import BestWorst
from posttrain.mixture.tagged import OutcomeTag
from posttrain.records import Group, Prompt, Rollout, Row, Score, Segment, Source, TokenBatch
from tests.outcomes.toys import Policy, Run, Table, probabilities, values

WORDS = {"good": (40, 41), "bad": (50,), "it failed": (60, 61, 62)}
TAG = OutcomeTag("good", "bad", encode=lambda text: WORDS[text])
ASKED = Prompt("q", (1, 40, 41, 2))


def group(*rewards: float | None, detail: str = "", asked: Prompt = ASKED) -> Group:
    scores = {"tests": Score(0.0, detail=detail)}
    first, second = (Segment(ids, Source.policy, logprobs=(-1.0, -2.0)[: len(ids)], version=4) for ids in ((7, 8), (8,)))
    segments = (first, Segment((9,), Source.tool), second)
    return Group(asked, tuple(Rollout(f"q/{i}", asked, segments, scores=scores, reward=r) for i, r in enumerate(rewards)))


def rows_of(gate: OutcomeTag, group: Group) -> list[Row]:
    return to_rows(gate([group], Demos(), 0, 0.0))


def test_the_swap_changes_the_context_and_nothing_else() -> None:
    """The same answer, once right and once wrong."""
    right, wrong = rows_of(TAG, group(1.0, 0.0))
    assert list(right.ids) == [1, 40, 41, 2, 7, 8, 9, 8] and list(wrong.ids) == [1, 50, 2, 7, 8, 9, 8]
    for row, start in ((right, 4), (wrong, 3)):
        assert list(row.ids[start:]) == [7, 8, 9, 8] and not row.logps and row.advantage == 1.0
        assert [s.name for s in row.sources[start:]] == ["demo", "demo", "tool", "demo"]
        assert list(row.trainable) == [False] * start + [True, True, False, True]
    batch = TokenBatch.from_sequences([right, wrong], dtype=torch.float64)
    weights = load("leti").weights(batch.with_logps(current=torch.zeros(13, dtype=torch.float64)))
    assert weights[weights != 0].tolist() == pytest.approx([1 / 6] * 6), "good and bad answers weigh alike"


def test_experts_of_another_prompt_are_not_replayed() -> None:
    read = group(0.0)
    read = replace(read, rollouts=tuple(replace(r, routing=torch.zeros(8, 1, 1, dtype=torch.int16)) for r in read.rollouts))
    assert rows_of(TAG, read)[0].routing is None


def test_what_the_verifier_said_is_learnt_behind_the_answer() -> None:
    told = replace(TAG, feedback="tests")
    (row,) = rows_of(told, group(0.0, detail="it failed"))
    assert list(row.ids[-4:]) == [8, 60, 61, 62] and list(row.trainable[-4:]) == [True] * 4 and row.sources[-1] == Source.tool
    assert list(rows_of(replace(told, max_feedback_tokens=1), group(0.0, detail="it failed"))[0].ids[-2:]) == [8, 60]
    assert len(rows_of(told, group(1.0))[0].ids) == 8, "nothing was said"
    batch = TokenBatch.from_sequences([row], dtype=torch.float64).with_logps(current=torch.zeros(len(row.ids) - 1, dtype=torch.float64))
    both, answers, text = (load("leti", overrides).weights(batch) for overrides in ([], ["streams.feedback=null"], ["streams.demos=null"]))
    assert (both != 0).sum() == 6 and (answers != 0).sum() == 3 == (text != 0).sum()
    torch.testing.assert_close(both, answers + text, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"has no reward 'other' \(it has tests\)"):
        rows_of(replace(TAG, feedback="other"), group(0.0))


def test_no_verdict_is_neither_good_nor_bad() -> None:
    assert len(rows_of(TAG, group(1.0, None))) == 1
    (out,) = TAG([group(None, None)], Demos(), 0, 0.0)
    passing = [replace(group(1.0), dropped="dead"), "other"]
    assert out.dropped == "no_verdict" and TAG(passing, Demos(), 0, 0.0) == passing
    half = replace(TAG, success=Success(threshold=0.5))
    assert [len(r.ids) for r in rows_of(half, group(0.5, 0.4))] == [8, 7] and [len(r.ids) for r in rows_of(TAG, group(0.5, 0.4))] == [7, 7]


@pytest.mark.parametrize("ids", [(1, 2), (40, 41, 2, 40, 41), (1, 40, 2)])
def test_a_prompt_that_does_not_hold_the_word_once_is_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.prompt_template"):
        rows_of(TAG, group(0.0, asked=Prompt("q", ids)))


def test_settings_are_checked_and_the_run_gives_the_gate_its_tokenizer() -> None:
    for bad in ({"good": "x", "bad": "x"}, {"good": "", "bad": "x"}, {"good": "x", "bad": "y", "max_feedback_tokens": 0}):
        with pytest.raises(ValueError, match="must be"):
            OutcomeTag(**bad)  # type: ignore[arg-type]
    both = InTurn({"tag": OutcomeTag("good", "bad"), "none": None}).with_encode(TAG.encode)
    assert both.makes_demos and not InTurn({"pairs": BestWorst()}).makes_demos
    assert both([group(0.0)], Demos(), 0, 0.0) == TAG([group(0.0)], Demos(), 0, 0.0)


def learnt(gate: OutcomeTag | None, seed: int) -> tuple[float, float]:
    """Eight answers of which two are right.  Probability of a right one under the word for good (prompt 0) and that for bad (prompt 1)."""
    policy = Policy([Table(values(2, 8), lambda p, t, last: p)], 8)
    Run(policy, "leti", steps=60, rate=1.0, seed=seed, reward=lambda p, a: float(a[0] < 2), n=32, advantage=Constant(), gate=gate).go()
    return float(probabilities(policy, 0)[:2].sum()), float(probabilities(policy, 1)[:2].sum())


def test_asked_under_the_good_word_the_policy_gets_better_and_under_the_bad_word_it_errs() -> None:
    """From a quarter each.  Without a swap the likelihood of one's own answers teaches nothing: the control."""
    told = [learnt(OutcomeTag("good", "bad", encode=lambda text: [8 if text == "good" else 9]), seed) for seed in range(4)]
    same = [learnt(OutcomeTag("good", "good too", encode=lambda text: [8]), seed) for seed in range(4)]
    assert min(good for good, _ in told) > 0.95 and max(bad for _, bad in told) < 0.15
    assert max(good for good, _ in same) < 0.7
