"""Planted overlaps go and nothing else; counts add up; order, sharding and repetition change nothing."""

import random

import pytest

from posttrain.data.decontaminate import decontaminate, words

RNG = random.Random(0)
VOCABULARY = [f"w{i}" for i in range(400)]


def sentence(n):
    return " ".join(RNG.choice(VOCABULARY) for _ in range(n))


EVALS = {"math": [sentence(20) for _ in range(30)], "code": [sentence(30) for _ in range(30)]}
CLEAN = [{"id": f"c{i}", "prompt": sentence(30), "completion": sentence(30)} for i in range(200)]
PLANTED = [
    {"id": "whole", "prompt": f"{sentence(5)} {EVALS['math'][3]} {sentence(5)}", "completion": "ok"},
    {"id": "answer side", "prompt": "hm", "completion": EVALS["code"][7].upper().replace(" ", ",\n ")},
    {"id": "two thirds", "prompt": " ".join(EVALS["code"][1].split()[:20]), "completion": "ok"},
    {"id": "chat", "messages": [{"role": "user", "content": EVALS["math"][0]}, {"role": "assistant", "content": None}]},
]
NEAR = [
    {"id": "a third", "prompt": " ".join(EVALS["code"][2].split()[:10])},
    {"id": "seven words", "prompt": " ".join(EVALS["math"][1].split()[:7])},
]


def run(rows, **kw):
    kept, report = decontaminate(rows, EVALS, **kw)
    return [r["id"] for r in kept], report


def test_planted_overlaps_are_removed_and_nothing_else():
    rows = CLEAN[:100] + PLANTED + NEAR + CLEAN[100:]
    kept, report = run(rows)
    assert kept == [r["id"] for r in rows if r not in PLANTED]
    assert (report.read, report.kept, report.removed) == (206, 202, 4)
    assert report.by_set == {("math", "prompt"): 1, ("code", "completion"): 1, ("code", "prompt"): 1, ("math", "messages"): 1}
    found = {(m.row, m.side, m.eval_set, m.item, round(m.score, 2)) for m in report.matches}
    assert found == {
        (100, "prompt", "math", 3, 1.0),
        (101, "completion", "code", 7, 1.0),
        (102, "prompt", "code", 1, 0.67),
        (103, "messages", "math", 0, 1.0),
    }
    assert "paraphrases and changed numbers are not caught" in str(report) and "code, completion: 1 rows" in str(report)


def test_order_sharding_and_repetition_change_nothing():
    rows = CLEAN + PLANTED + NEAR
    kept = set(run(rows)[0])
    assert set(run(rows[::-1])[0]) == kept
    assert set(run(rows[::2])[0]) | set(run(rows[1::2])[0]) == kept
    again, report = run([r for r in rows if r["id"] in kept])
    assert set(again) == kept and report.removed == 0


def test_cover_is_the_best_single_document_not_the_sum():
    text = EVALS["code"][5].split()
    halves = [{"id": 0, "prompt": " ".join(text[:14])}, {"id": 1, "prompt": " ".join(text[14:])}]
    assert run(halves)[0] == [0], "14 of 30 stay, 16 of 30 go"
    assert run(halves, cover=0.4)[0] == [] and run(halves, cover=1.0)[0] == [0, 1]
    assert run(halves, n=17)[0] == [0, 1]


def test_short_items_only_by_equality():
    kept, report = decontaminate([{"p": "What is 2+2?"}, {"p": "what  IS 2 2"}, {"p": "what is 2+2? tell me"}], {"short": ["What is 2+2"]})
    assert list(kept) == [{"p": "what is 2+2? tell me"}] and report.short == {"short": 1}
    assert all(m.exact for m in report.matches)
    assert len(list(decontaminate([{"p": "What is 2+2?"}], {"short": ["What is 2+2"]}, also_exact=False)[0])) == 1


def test_boilerplate_is_no_match_and_is_reported():
    instruction = "please reason step by step and put your final answer within boxed braces now"
    evals = {"e": [f"{instruction} {sentence(6)}" for _ in range(40)]}
    kept, report = decontaminate([{"p": f"{instruction} {sentence(6)}"}], evals)
    assert len(list(kept)) == 1 and report.stop and min(report.stop.values()) > 2
    strict, report = decontaminate([{"p": f"{instruction} {sentence(6)}"}], evals, max_share=1.0)
    assert not list(strict) and not report.stop


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Caf\u00e9 \u2460", "cafe\u0301 1"),
        (r"$x^{2}\,+\,y$", "x 2 + y"),
        (r"\left( a \right)", "(a)"),
        ("\uff21\u3000b\n\tC", "a b c"),
        ("don't", "don t"),
    ],
)
def test_one_normaliser(a, b):
    assert words(a) == words(b)


def test_what_is_not_caught_is_not_caught():
    changed = " ".join("w999" if i % 7 == 3 else w for i, w in enumerate(EVALS["math"][4].split()))
    assert run([{"id": "changed", "prompt": changed}])[0] == ["changed"]


def test_settings_are_checked_and_sides_can_be_chosen():
    with pytest.raises(ValueError, match="0 < cover <= 1"):
        decontaminate([], EVALS, cover=0.0)
    kept, _ = decontaminate(PLANTED[:2], EVALS, texts=lambda row: {"prompt": row["prompt"]})
    assert [r["id"] for r in kept] == ["answer side"]
