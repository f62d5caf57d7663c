"""Rule verifiers: gold scores 1, hostile text scores 0 or less without an exception, tables from the sources hold."""

from fractions import Fraction
from itertools import pairwise

import pytest

from posttrain.data.worlds import Arithmetic, Composition
from posttrain.reward.rules import Choice, Exact, Format, Numeric, SoftOverlong, WorldVerifier
from posttrain.reward.text import extract, last_boxed, number
from posttrain.testing.hostile import HOSTILE

GOLD = [
    (Exact(), "blue whale", "blue whale"),
    (Exact(("casefold", "no_punctuation", "spaces")), "Blue  whale!", "blue whale"),
    (Exact(extract="answer_tag"), "<think>red</think><answer>blue</answer>", "blue"),
    (Exact(extract="last_line"), "so\nblue\n", "blue"),
    (Numeric(), "it is 18", "She sells 9.\n#### 18"),
    (Numeric(), "so 1,000 it is", "1000.0"),
    (Numeric(), "first 5 #### 7\n", "7"),
    (Numeric(), "5 \\boxed{\\text{is }7} 9", 7),
    (Numeric(tolerance=0.01), "3.1416", "3.14"),
    (Choice(), "The answer is (B).", "B"),
    (Choice(), "A or B? \\boxed{C}", "(C)"),
]


@pytest.mark.parametrize(("verifier", "text", "answer"), GOLD)
def test_gold_scores_one_and_others_zero(verifier, text, answer):
    assert verifier(text, answer).value == 1.0
    assert verifier("nothing of the kind 123456", answer).value == 0.0


@pytest.mark.parametrize("verifier", [Exact(), Exact(extract="boxed"), Numeric(), Choice(), Format()], ids=lambda v: type(v).__name__)
def test_hostile_text_is_wrong_and_nothing_worse(verifier):
    for text in HOSTILE:
        score = verifier(text) if isinstance(verifier, Format) else verifier(text, "B" if isinstance(verifier, Choice) else "77123")
        assert score.value == 0.0 and score.status in ("ok", "bad_format"), text[:40]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", Fraction(2469, 2)),
        ("a 3/4 b", Fraction(3, 4)),
        ("-7", -7),
        ("1e3", 1000),
        ("1,2", 2),
        (".5", Fraction(1, 2)),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("1/0", None),
        ("none", None),
    ],
)
def test_numbers(text, value):
    found = number(text)
    assert found == value or (value is None and (found is None or abs(found) < 10**10))


def test_numeric_tolerance_is_explicit():
    assert Numeric()("0.333", "1/3").value == 0.0
    assert Numeric(tolerance=0.001)("0.333", "1/3").value == 1.0
    assert Numeric(relative=0.001)("1000.5", "1000").value == 1.0 and Numeric(relative=0.0001)("1000.5", "1000").value == 0.0


def test_unreadable_references_are_errors_of_the_data():
    with pytest.raises(ValueError, match="holds no number"):
        Numeric()("1", "none")
    with pytest.raises(ValueError, match="not one of the options"):
        Choice()("A", "Z")


def test_last_boxed_reads_nested_braces():
    assert last_boxed("\\boxed{1} and \\boxed{\\frac{a}{b}}") == "\\frac{a}{b}"
    assert last_boxed("\\boxed{1} then \\boxed{2") == "1"
    assert last_boxed("no box") is None
    assert last_boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}" and last_boxed("\\boxed{\\boxed{3}}") == "3"
    assert last_boxed("}}} \\boxed{4} {{{") == "4" and last_boxed("\\boxed{" * 200_000) is None
    assert extract("a #### b #### c", "hash") == " c"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think></think>\n<answer></answer> ", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("</think>a<think><answer>b</answer>", 0),
    ],
)
def test_format(text, value):
    score = Format()(text)
    assert score.value == value and score.status == ("ok" if value else "bad_format")


def test_format_ignores_content_and_can_allow_text_outside():
    assert {Format()(f"<think>{c}</think><answer>{c}</answer>").value for c in ("", "1", "x" * 999, "{}")} == {1.0}
    assert Format(outside=True)("so <think>a</think> hence <answer>b</answer>.").value == 1.0


def test_soft_overlong_table_and_continuity():
    penalty = SoftOverlong(20480, 4096)
    assert [penalty(n) for n in (0, 16384, 18432, 20480, 20481)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    steps = [penalty(n) for n in range(16000, 21000)]
    assert all(-1.0 <= b <= a <= 0.0 and a - b <= 1 / 4096 + 1e-12 for a, b in pairwise(steps))
    with pytest.raises(ValueError, match="cache"):
        SoftOverlong(100, 0)


def test_world_verifier_routes_by_environment():
    worlds = {"arithmetic": Arithmetic(), "composition": Composition()}
    verifier = WorldVerifier(worlds)
    for world in worlds.values():
        row = world.rows("test", 1)[0]
        arguments = {k: row[k] for k in ("prompt", "answer", "env", "level")}
        assert verifier(row["completion"], **arguments).value == WorldVerifier(world)(row["completion"], **arguments).value == 1.0
        assert verifier("?", **arguments).value == 0.0
    with pytest.raises(ValueError, match="no world for environment"):
        verifier("x", "p", "a", "elsewhere", 1)


def test_wrong_settings_are_refused():
    for make in (lambda: Exact(("upper",)), lambda: Exact(extract="first"), lambda: Numeric(-1.0), lambda: Format(())):
        with pytest.raises(ValueError):
            make()
