"""The weight of a token over its probability and its advantage, against the formulas written out; and how it is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posttrain.loss import Objective, Stream, advantage, aggregate, likelihood, load, reference, regularizer
from posttrain.loss.view import TokenView
from posttrain.paths import CONFIGS
from posttrain.report import draw
from posttrain.report.curve import Curve, Panel, Picture, pictures
from tests.loss.cases import composed

POINTS = (0.05, 0.3, 0.41, 0.5, 0.59, 0.61, 0.9)
PUSHES = (-2.0, -0.5, 0.0, 1.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def clip(p: float, a: float) -> float:
    r = p / 0.5
    return 0.0 if (a > 0 and r > 1.2) or (a < 0 and r < 0.8) else r * a


PUBLISHED: dict[str, Callable[[float, float], float]] = {
    "grpo": clip,
    "reinforce": lambda p, a: a,
    "cispo": lambda p, a: min(p / 0.5, 5.0) * a,
    "luffy": lambda p, a: p / 0.5 * a,
}
GIVEN: dict[str, tuple[Callable[[float], float], ...]] = {
    "sft": (lambda p: 1.0,),
    "dft": (lambda p: p,),
    "probability_power": (lambda p: p**10,),
    "entropy_min": (lambda p: 0.0,),
    "dpo": (lambda p: 0.1 * sigmoid(-0.1 * math.log(2 * p)), lambda p: -0.1 * sigmoid(0.1 * math.log(2 * p))),
    "simpo": (lambda p: 2 * sigmoid(-2 * math.log(2 * p) + 0.5), lambda p: -2 * sigmoid(2 * math.log(2 * p) + 0.5)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_losses_that_read_the_advantage(name: str) -> None:
    picture = pictures(composed(name), POINTS, PUSHES)[0]
    over_p, over_a = picture.panels
    assert [c.label for c in over_p.curves] == ["A = +1", "A = -1"] and [c.label for c in over_a.curves] == [
        "p = 0.25",
        "p = 0.5",
        "p = 0.75",
    ]
    for sign, curve in zip((1.0, -1.0), over_p.curves, strict=True):
        assert curve.y == pytest.approx([PUBLISHED[name](p, sign) for p in POINTS], rel=1e-9, abs=1e-12)
    for p, curve in zip((0.25, 0.5, 0.75), over_a.curves, strict=True):
        assert curve.y == pytest.approx([PUBLISHED[name](p, a) for a in PUSHES], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", GIVEN)
def test_the_weights_of_losses_that_do_not(name: str) -> None:
    picture = pictures(composed(name), POINTS, PUSHES)[0]
    (panel,) = picture.panels
    assert picture.notes[0] == "the weight does not depend on the advantage column"
    assert [c.label for c in panel.curves] == (["every token"] if len(GIVEN[name]) == 1 else ["chosen", "rejected"])
    for formula, curve in zip(GIVEN[name], panel.curves, strict=True):
        assert curve.y == pytest.approx([formula(p) for p in POINTS], rel=1e-9, abs=1e-12)


def test_a_penalty_on_sampled_tokens_is_in_the_weight() -> None:
    kl = "regularizers.kl={_target_: posttrain.loss.regularizer.KL, estimator: k2, to: base, coef: 0.5}"
    curve = pictures(load("reinforce", [kl]), POINTS, PUSHES)[0].panels[0].curves[0]
    assert curve.y == pytest.approx([1 - 0.5 * math.log(2 * p) for p in POINTS])


def test_a_penalty_over_the_vocabulary_is_named_instead() -> None:
    picture = pictures(composed("asft"), POINTS, PUSHES)[0]
    assert "kl: over the whole vocabulary, so not in the picture" in picture.notes


def test_streams_have_pictures_of_their_own() -> None:
    rollouts, demos = pictures(composed("sft_plus_rl"), POINTS, PUSHES)
    assert (rollouts.stream, demos.stream) == ("rollouts", "demos") and len(rollouts.panels) == 2
    assert demos.panels[0].curves[0].y == pytest.approx([0.1] * len(POINTS)), "the coefficient at the start of the run"


def test_labels_decide_where_there_are_no_pairs() -> None:
    labels = [c.label for c in pictures(composed("bco"), POINTS, PUSHES)[0].panels[0].curves]
    assert labels == ["reward 1", "reward 0"]


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "loss").glob("*.yaml")))
def test_every_shipped_loss_is_drawn(name: str) -> None:
    for picture in pictures(composed(name), (0.3, 0.7), (1.0,)):
        assert picture.panels, picture.notes
        drawn = [y for panel in picture.panels for curve in panel.curves for y in curve.y if y is not None]
        assert drawn and all(math.isfinite(y) for y in drawn)


class Needy(advantage.Column):
    def values(self, view: TokenView) -> torch.Tensor:
        raise ValueError("this needs a critic")


class Pole(advantage.One):
    def values(self, view: TokenView) -> torch.Tensor:
        return torch.where(view.logp < -1.0, torch.inf, 1.0)


def alone(term: advantage.One | advantage.Column) -> Objective:
    return Objective({"rollouts": Stream(("policy",), likelihood.Token(), reference.Current(), term, aggregate.TokenMean())})


def test_what_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    (picture,) = pictures(alone(Needy()), POINTS, PUSHES)
    assert picture.panels == () and picture.notes == ("no picture: this needs a critic",)
    assert "no picture: this needs a critic" in draw.text([picture])
    with pytest.raises(ValueError, match="this needs a critic"):
        draw.png({"x": [picture]}, tmp_path / "x.png")


def test_where_there_is_no_finite_weight_there_is_a_gap() -> None:
    (picture,) = pictures(alone(Pole()), (0.1, 0.2, 0.6, 0.9), PUSHES)
    assert picture.panels[0].curves[0].y == (None, None, 1.0, 1.0)
    body = draw.text([picture]).split("|")
    assert "*" in "".join(body) and not any(row.lstrip("- ")[:1] == "*" and row.startswith("*") for row in body[1:])


def test_a_regulariser_that_names_its_streams() -> None:
    stream = composed("sft").streams["demos"]
    kl = regularizer.KL(estimator="k2", to="base", coef=1.0, streams=("a",))
    first, second = pictures(Objective({"a": stream, "b": stream}, {"kl": kl}), POINTS, PUSHES)
    assert first.panels[0].curves[0].y == pytest.approx([1 - math.log(2 * p) for p in POINTS]) and second.panels[0].curves[0].y == (
        1.0,
    ) * len(POINTS)


# -- drawing -------------------------------------------------------------------------------------------------------------------------
LINE = Picture(
    "s",
    (Panel("a title", "an axis", (Curve("up", (0.0, 1.0, 2.0), (0.0, 1.0, 2.0)), Curve("down", (0.0, 1.0, 2.0), (0.0, -1.0, -2.0)))),),
    ("a note",),
)


def test_letters() -> None:
    said = draw.text([LINE])
    assert said.isascii() and "\033" not in said
    rows = [line.split("|", 1)[1].ljust(draw.COLUMNS) for line in said.splitlines() if "|" in line]
    assert len(rows) == draw.ROWS and all(len(row) == draw.COLUMNS for row in rows)
    assert rows[0][-1] == "*" and rows[-1][-1] == "o" and rows[draw.ROWS // 2][0] == draw.BOTH and set(rows[draw.ROWS // 2][30:31]) == {"-"}
    assert rows[0].strip() == "*" * len(rows[0].strip()), "the highest row holds nothing but the rising line"
    for word in ("s: a title", "an axis", "* up   o down", "a note", "2 |", "-2 |"):
        assert word in said


def test_braille_and_colours_on_a_terminal() -> None:
    said = draw.text([LINE], live=True)
    assert "\033[36m" in said and "\033[33m" in said and "─" in said
    dots = [c for c in said if 0x2800 < ord(c) < 0x2900]
    assert len(dots) > draw.COLUMNS


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_one_that_shows_colours_and_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert draw.fancy(Terminal()) and not draw.fancy(io.StringIO())
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    assert not draw.fancy(Terminal())
    monkeypatch.setattr(Terminal, "encoding", "utf-8")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not draw.fancy(Terminal())


def test_a_flat_line_has_a_range() -> None:
    assert draw.bounds([Curve("x", (0.0, 1.0), (0.0, 0.0))]) == (-1.0, 1.0)
    assert draw.bounds([Curve("x", (0.0, 1.0), (0.5, None))]) == (0.0, 0.5)


def test_png(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "weights.png"
    draw.png({"a loss": [LINE, LINE]}, path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (draw.WIDTH, 2 * draw.HEIGHT)
        colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(255, 255, 255), *draw.INKS[:2]} <= colours, "both lines are there, each in its colour"


@pytest.mark.parametrize(("name", "message"), [("x.jpg", "must end in .png"), ("no/x.png", "there is no folder")])
def test_png_refuses(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw.png({"a": [LINE]}, tmp_path / name)
