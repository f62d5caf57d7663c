"""Rewards of pieces of an answer: where pieces end, at which token that is, and what the loss makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from posttrain.advantage import Placed
from posttrain.data.rows import to_rows
from posttrain.loss import Objective, load
from posttrain.records import Group, Prompt, Rollout, Score, Segment, Source, TokenBatch
from posttrain.reward.base import Signature
from posttrain.reward.combine import Product, Sum
from posttrain.reward.place import EachPiece, paid, pieces
from posttrain.reward.pool import RewardPool

Q = Prompt("q", (1, 2), text="q", answer="4")
WORDS = {10: "It is", 11: " four", 12: ".", 13: " Yes", 14: "!", 15: ""}
TEXT = "It is four. Yes!"


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def rollout(ids: tuple[int, ...] = (10, 11, 12, 13, 14, 15), before: tuple[Segment, ...] = ()) -> Rollout:
    own = Segment(ids, Source.policy, logprobs=(-1.0,) * len(ids), version=0)
    return Rollout("q/0", Q, (*before, own), text=decode(ids))


@pytest.mark.parametrize(
    ("text", "level", "expected"),
    [
        (TEXT, "sentence", [(11, "It is four."), (16, "Yes!")]),
        ("a, b; c.\nd", "clause", [(2, "a,"), (5, "b;"), (8, "c."), (10, "d")]),
        ("one\n\ntwo\n", "line", [(3, "one"), (8, "two")]),
        ("3.5 is not 3. 5", "sentence", [(13, "3.5 is not 3."), (15, "5")]),
        ("Hm...  \n", "sentence", [(5, "Hm...")]),
        ("", "sentence", []),
        ("  ", "line", []),
    ],
)
def test_where_pieces_end(text: str, level: str, expected: list[tuple[int, str]]) -> None:
    assert pieces(text, level) == expected


def test_every_piece_is_scored_by_itself_and_paid_where_it_ends() -> None:
    score = EachPiece(lambda completion, answer: float(len(completion) + (answer == "4")))(rollout())
    assert score == Score(17.0, places=((11, 12.0), (16, 5.0)))
    failed = EachPiece(lambda completion: None if "Yes" in completion else 1.0)(rollout())
    assert failed.value is None and failed.status == "error" and "'Yes!'" in failed.detail
    assert EachPiece(lambda completion: 1.0)(replace(rollout(), text="")) == Score(0.0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: EachPiece(lambda completion: 1.0, level="word"), "level='word' does not exist; choose from line, sentence, clause"),
        (lambda: EachPiece(lambda completions: [1.0]), "one piece at a time"),
        (lambda: Score(1.0, places=((3, 0.5),)), "add up to 0.5, not to its value 1.0"),
        (lambda: Score(None, "error", places=((3, 0.5),)), "add up to 0.5"),
        (lambda: Score(1.0, places=((-1, 1.0),)), "cannot be -1"),
    ],
)
def test_what_cannot_be_placed_is_refused(make, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_characters_become_tokens_and_weights_count() -> None:
    scores = {"fact": Score(0.5, places=((11, 1.0), (16, -0.5))), "whole": Score(2.0)}
    found = paid(rollout(), scores, Sum({"fact": 0.5, "whole": 0.25}), 0.0, decode)
    assert found == (0.0, 0.0, 0.5, 0.0, -0.25 + 0.5, 0.0), "what names no place is paid where the text ends"
    assert sum(found) == pytest.approx(Sum({"fact": 0.5, "whole": 0.25})({n: s.value for n, s in scores.items()}, 0.0))
    assert paid(rollout(), {"whole": Score(2.0)}, Sum(), 0.0, decode) is None
    assert paid(rollout(), {**scores, "failed": Score(None, "error")}, Sum({"fact": 1.0, "failed": 0.0}), 0.0, decode)[2] == 1.0


def test_a_place_behind_the_text_is_its_end_and_a_hint_is_not_paid() -> None:
    cut = rollout((10, 11))
    assert paid(cut, {"a": Score(1.0, places=((99, 1.0),))}, Sum(), 0.0, decode) == (0.0, 1.0)
    hinted = replace(rollout((13, 14), (Segment((10, 11, 12), Source.prefix),)), text=TEXT)
    assert paid(hinted, {"a": Score(3.0, places=((5, 1.0), (16, 2.0)))}, Sum(), 0.0, decode) == (0.0, 0.0, 0.0, 1.0, 2.0)
    turns = replace(rollout((13, 14), (Segment((10,), Source.policy, version=0), Segment((11,), Source.tool))), text=" Yes!")
    assert paid(turns, {"a": Score(1.0, places=((5, 1.0),))}, Sum(), 0.0, decode) == (0.0, 0.0, 0.0, 1.0), "the text is the last answer"
    assert paid(replace(rollout(), segments=()), {"a": Score(1.0, places=((5, 1.0),))}, Sum(), 0.0, decode) is None


def test_a_product_has_no_place() -> None:
    with pytest.raises(ValueError, match=r"reward.combine=Product is not a weighted sum"):
        paid(rollout(), {"a": Score(1.0, places=((5, 1.0),))}, Product(), 0.0, decode)


def scored(**rewards) -> Group:
    pool = RewardPool(rewards, decode=decode)
    (group,) = asyncio.run(pool.score([Group(Q, (rollout(),))], 0))
    return group


def good(completion: str) -> float:
    return 1.0 if "four" in completion else -1.0


good.execution = "inline"


def test_from_the_reward_to_the_loss() -> None:
    """A right first sentence and a bad second one: an earlier token is paid for both, a token of the second only for the second."""
    (group,) = Placed()([scored(fact=EachPiece(good))])
    (one,) = group.rollouts
    assert one.reward == 0.0 == one.advantage and one.paid == (0.0, 0.0, 1.0, 0.0, -1.0, 0.0)
    batch = TokenBatch.from_sequences(to_rows([group]), dtype=torch.float64)
    flat = batch.weight * 0.0
    batch = batch.with_logps(current=flat - 1.0, base=flat - 1.0, old=flat - 1.0, value=flat)
    whitened = load("fine_grained", ["streams.rollouts.advantage.inner.lam=1.0"])
    (stream,) = whitened.streams.values()
    plain = Objective({"rollouts": replace(stream, advantage=stream.advantage.inner)})
    weights = plain.weights(batch)[batch.source == int(Source.policy)] * 6
    assert weights.tolist() == pytest.approx([0.0, 0.0, 0.0, -1.0, -1.0, 0.0])


def test_one_piece_is_the_reward_of_the_whole() -> None:
    (group,) = Placed()([scored(whole=good)])
    (one,) = group.rollouts
    assert one.paid == (0.0,) * 5 + (1.0,) and one.advantage == 1.0
    (failed,) = Placed()([Group(Q, (replace(one, reward=None, paid=None),))])
    assert failed.rollouts[0].advantage is None


def test_the_names_a_reward_of_pieces_asks_for() -> None:
    assert Signature.of("fact", EachPiece(good)).wanted == ("rollout", "progress")
