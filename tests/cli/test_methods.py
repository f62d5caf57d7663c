"""``posttrain explain`` with sources and pictures, and ``posttrain methods``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.paths import CONFIGS
from tests.cli.conftest import Said

Posttrain = Callable[..., Said]


def test_explain_says_where_a_loss_comes_from(posttrain: Posttrain) -> None:
    said = posttrain("explain", "loss=asft").out
    sources = said.split("\nsources\n")[1].split("\nneeds\n")[0]
    for words in (
        "ASFT (arXiv 2509.23753)",
        "https://arxiv.org/abs/2509.23753",
        "run with: advantage=none.",
        "releases: The release divides",
        "Unit: DFT, arXiv",
    ):
        assert words in sources
    assert "releases: no difference is noted" in posttrain("explain", "loss=opo").out


def test_explain_draws_plain_letters_where_there_is_no_terminal(posttrain: Posttrain) -> None:
    said = posttrain("explain", "loss=sft_plus_rl").out
    assert said.isascii() and "\033" not in said
    for words in (
        "rollouts: weight of a token by its probability",
        "rollouts: weight of a token by its advantage",
        "demos: weight of a token by its",
    ):
        assert words in said
    assert "weight of a token" not in posttrain("explain", "recipe=quickstart").out, "a recipe is drawn on request only"


def test_explain_draws_an_image(posttrain: Posttrain, fails: Any, tmp_path: Path) -> None:
    from PIL import Image

    assert "drawn in weights.png" in posttrain("explain", "loss=grpo", "png=weights.png").out
    with Image.open(tmp_path / "weights.png") as image:
        width, height = image.size
    posttrain("explain", "recipe=quickstart", f"png={tmp_path / 'both.png'}")
    with Image.open(tmp_path / "both.png") as image:
        assert image.size == (width, 2 * height), "one row per stream of every stage"
    assert "must end in .png" in fails("explain", "loss=grpo", "png=weights.jpg")
    assert "there is no folder" in fails("explain", "loss=grpo", "png=no/where.png")


def test_explain_reads_the_notes_of_a_loss_of_ones_own(posttrain: Posttrain, tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    text = (CONFIGS / "loss" / "sft.yaml").read_text().split("_target_", 1)[1].replace("name: sft", "name: mine")
    (tmp_path / "loss" / "mine.yaml").write_text("# Mine (arXiv 2401.00001): all of it. The release has none of it.\n_target_" + text)
    said = posttrain("explain", "--config-dir", tmp_path, "loss=mine").out
    assert "https://arxiv.org/abs/2401.00001" in said and "releases: The release has none of it." in said


@pytest.mark.slow
def test_methods_lists_everything(posttrain: Posttrain) -> None:
    said = posttrain("methods").out
    for group in ("loss", "advantage", "mixture"):
        part = said.split(f"({group}=NAME)")[1]
        for path in (CONFIGS / group).glob("*.yaml"):
            assert f"\n  {path.stem}:" in part or f"\n  {path.stem}\n" in part, path.stem
    assert "rollouts: Token | Named | Column | RatioClip(high=0.28), DualClip(c=10) | TokenMean" in said


@pytest.mark.slow
def test_methods_looks_for_words(posttrain: Posttrain, fails: Any) -> None:
    said = posttrain("methods", "2509.23753", "anchored").out
    assert "  asft: ASFT" in said and "  dapo" not in said
    assert "no loss, advantage or mixture has nothing like it" in fails("methods", "nothing like it")
    assert "takes words to look for, not 'loss=dpo'" in fails("methods", "loss=dpo")
