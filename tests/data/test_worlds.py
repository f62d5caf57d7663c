"""Every world: gold verifies, splits are disjoint, junk scores nothing, prompts stay inside the declared alphabet."""

import pickle
from itertools import pairwise
from random import Random

import pytest

from posttrain.data.worlds import Arithmetic, Composition, Countdown, World
from posttrain.data.worlds.composition import OPERATORS, PROBE
from posttrain.data.worlds.countdown import evaluate
from posttrain.testing.hostile import HOSTILE

WORLDS = {
    "composition": Composition(),
    "composition shown": Composition(functions=13, show_definitions=True, min_length=3, max_length=6, max_depth=4),
    "composition held out": Composition(functions=5, held_out_pairs=0.3),
    "composition answer only": Composition(show_steps=False),
    "arithmetic": Arithmetic(),
    "arithmetic base 4": Arithmetic(base=4, max_digits=6),
    "countdown": Countdown(),
    "countdown whole": Countdown(operations="+-*/", integers_only=True, max_numbers=3),
}
SPLITS = ("train", "validation", "test")


@pytest.fixture(params=WORLDS.values(), ids=WORLDS.keys())
def world(request) -> World:
    return request.param


def test_solutions_verify_and_stay_in_the_alphabet(world):
    for row in world.rows("train", 120):
        assert world.verify(row, row["completion"]).value == 1.0
        assert world.verify(row, world.solve(row)).value == 1.0
        assert world.verify(row, " " + row["completion"] + "\n").value == 1.0
        assert set(row["prompt"] + row["completion"]) <= set(world.alphabet)
        assert row["level"] in world.levels and row["env"] == world.name
    assert len(set(world.alphabet)) == len(world.alphabet)


def test_splits_are_disjoint_for_all_seeds(world):
    keys = {split: {world.key(row) for seed in (0, 1) for row in world.rows(split, 60, seed)} for split in SPLITS}
    assert all(len(found) >= 60 for found in keys.values())
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"] and not keys["test"] & keys["validation"]
    for split in SPLITS:
        assert all(world.split_of(row) == split for row in world.rows(split, 20))


def test_rows_are_deterministic_distinct_and_prefixes(world):
    rows = world.rows("train", 80, seed=3)
    assert rows == pickle.loads(pickle.dumps(world)).rows("train", 80, seed=3)
    assert rows[:30] == world.rows("train", 30, seed=3)
    assert len({world.key(r) for r in rows}) == len({r["id"] for r in rows}) == 80
    assert rows != world.rows("train", 80, seed=4)


def test_neighbouring_seeds_share_few_tasks():
    world = Arithmetic(mix=(4,))
    first, second = ({r["prompt"] for r in world.rows("train", 200, seed)} for seed in (42, 43))
    assert len(first & second) < 5


def test_junk_scores_nothing_and_never_raises(world):
    row = world.rows("test", 1)[0]
    for text in [*HOSTILE, row["prompt"], world.solve(row) + "x", world.solve(row) + "0"]:
        score = world.verify(row, text)
        assert score.value == 0.0 and score.status in ("ok", "bad_format"), text[:40]


def test_corrupting_the_final_answer_is_rejected(world):
    for row in world.rows("train", 40):
        head, mark, final = row["completion"].rpartition(">")
        for i, character in enumerate(final):
            for other in world.alphabet:
                text = head + mark + final[:i] + other + final[i + 1 :]
                if other != character and not isinstance(world, Countdown):
                    assert world.verify(row, text).value == 0.0 or (other == ">" and text.rsplit(">", 1)[1] == row["answer"])


@pytest.mark.parametrize("world", [w for w in WORLDS.values() if hasattr(w, "steps")], ids=lambda w: f"{w.name}-{w.show_steps}-{w.levels}")
def test_steps_are_checked_one_by_one(world):
    if not world.show_steps:
        return
    for row in world.rows("train", 40):
        verdict = world.steps(row, row["completion"])
        assert len(verdict) == row["level"] and all(verdict)
        where = len(row["completion"].split(">")[0]) - 1 if world.name == "composition" else row["completion"].index(">") - 1
        old = row["completion"][where]
        new = next(c for c in world.alphabet if c.isalnum() and c != old)
        spoiled = world.steps(row, row["completion"][:where] + new + row["completion"][where + 1 :])
        assert spoiled.count(False) == 1


def test_level_outside_range_and_exhausted_pool_are_refused(world):
    with pytest.raises(ValueError, match="levels"):
        world.sample(Random(0), 99)
    with pytest.raises(ValueError, match="different tasks found"):
        Arithmetic(max_digits=1).rows("train", 1000)


def test_mix_chooses_levels():
    assert {r["level"] for r in Arithmetic(mix=(2, 3)).rows("train", 50)} == {2, 3}
    weighted = Arithmetic(mix={2: 1.0, 4: 9.0}).rows("train", 300)
    assert 0.8 < sum(r["level"] == 4 for r in weighted) / 300 < 0.97
    with pytest.raises(ValueError, match="mix names levels"):
        Arithmetic(mix=(7,))
    with pytest.raises(ValueError, match="no weight"):
        Arithmetic(mix=())


def test_configured_split_is_the_default():
    world = Composition(split="test", num=7, seed=5)
    assert world.rows() == world.rows("test", 7, 5) and len(world.rows()) == 7


# -- composition -------------------------------------------------------------------------------------------------------
def test_every_operator_depends_on_its_input_and_is_told_apart_by_the_probe():
    assert len({f(PROBE) for f in OPERATORS.values()}) == len(OPERATORS)
    for f in OPERATORS.values():
        assert f("abcde") != f("badce")


def test_composition_by_hand():
    world = Composition(functions=["reverse", "shift"], max_depth=2)
    name = {operator: opaque for opaque, operator in world.operators.items()}
    task = {"prompt": f"{name['shift']}({name['reverse']}(abch))", "answer": "adcb"}
    assert world.solve(task) == "hcba>adcb"
    assert world.verify(task, "hcba>adcb").value == 1.0 and world.verify(task, "adcb").value == 1.0
    assert world.verify(task, "adcb>hcba").value == 0.0
    assert world.verify(task, "a b c").status == "bad_format"


def test_held_out_pairs_are_only_in_the_novel_split():
    world = WORLDS["composition held out"]
    assert len(world.novel_pairs) == round(0.3 * 25)

    def pairs(row):
        names = row["prompt"].split("(")[:-1]
        return set(pairwise(names))

    seen = [pairs(row) for split in SPLITS for row in world.rows(split, 80)]
    assert any(seen) and not any(p & world.novel_pairs for p in seen)
    assert all(pairs(row) & world.novel_pairs for row in world.rows("novel", 50))


def test_names_are_opaque_and_reshuffled():
    assert Composition(names_seed=0).operators != Composition(names_seed=1).operators
    assert set(Composition(functions=4).operators.values()) == set(list(OPERATORS)[:4])
    with pytest.raises(ValueError, match="functions"):
        Composition(functions=["no_such"])


# -- arithmetic --------------------------------------------------------------------------------------------------------
def test_arithmetic_by_hand():
    world = Arithmetic()
    task = {"prompt": "47+85=", "answer": "132"}
    assert world.solve(task) == "12,13>132"
    assert world.steps(task, "12,12>132") == [True, False]
    assert world.key(task) == world.key({"prompt": "85+47="})
    for row in world.rows("train", 100):
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(row["answer"])


# -- countdown ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [("2*3+7", 1), ("7+2*3", 1), ("(3*2)+7", 1), ("13", 0), ("7+7-1", 0), ("2*3+7+0", 0), ("6+7", 0), ("2+3+7", 0)],
)
def test_countdown_verdicts(text, value):
    assert Countdown().verify({"answer": "2,3,7=13"}, text).value == value


@pytest.mark.parametrize(
    "text", ["2**3", "-2", "2//3", "__import__('os')", "3 3", "2*(3", "", "9**9**9**9", "1/0", "(" * 150 + "1", "1_0", "0x1"]
)
def test_countdown_refuses_what_is_no_expression(text):
    assert Countdown().verify({"answer": "2,3,7=13"}, text).status == "bad_format"
    with pytest.raises(ValueError):
        evaluate(text)


def test_countdown_fractions_are_exact_and_optional():
    assert evaluate("1/3+1/3+1/3")[0] == 1
    task = {"answer": "3,3,8,8=24"}
    assert Countdown().verify(task, "8/(3-8/3)").value == 1.0
    assert Countdown(integers_only=True).verify(task, "8/(3-8/3)").status == "bad_format"
    assert Countdown().verify(task, Countdown().solve(task)).value == 1.0
    with pytest.raises(ValueError, match="cannot be reached"):
        Countdown().solve({"answer": "1,1=9"})
