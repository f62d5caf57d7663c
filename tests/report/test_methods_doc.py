"""docs/methods.md is what configs/ and the docstrings say, and the list of methods holds every one of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import posttrain
from posttrain.loss import load
from posttrain.paths import CONFIGS
from posttrain.report.methods import CHAPTERS, Method, _safe, _wrapped, lines, matching, methods, methods_markdown, rows, word

ROOT = Path(posttrain.__file__).parents[1]


@cache
def page() -> str:
    return methods_markdown()


@cache
def found(group: str) -> dict[str, Method]:
    return {m.name: m for m in methods(group)}


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


def test_the_page_is_what_the_generator_says() -> None:
    fix = "python -c \"from posttrain.report.methods import write; write('docs/methods.md')\""
    assert (ROOT / "docs" / "methods.md").read_text() == page(), f"out of date; run: {fix}"


@pytest.mark.parametrize("group", CHAPTERS)
def test_every_choice_is_on_the_page_and_in_the_list(group: str) -> None:
    assert list(found(group)) == names(group)
    for name in names(group):
        assert f'<a id="{group}-{name}"></a>`{group}={name}`' in page() and f"[{name}](#{group}-{name})" in page()


def test_a_section_has_equation_terms_and_papers() -> None:
    section = page().split('<a id="loss-dapo">')[1].split("### ")[0]
    assert "DAPO (arXiv 2503.14476): clip-higher" in section and "[2503.14476](https://arxiv.org/abs/2503.14476)" in section
    assert "- *Run with:* Published with advantage=group_norm" in section
    assert "| rollouts | Token | Named | Column | RatioClip(high=0.28), DualClip(c=10) | TokenMean |" in section
    assert "grad = 1/N_tok * keep(pi/pi_old in [0.8, 1.28], one-sided)" in section
    assert "- *Releases:*" in page().split('<a id="loss-asft">')[1].split("### ")[0]


def test_a_gate_and_an_estimator_have_their_term_and_its_source() -> None:
    section = page().split('<a id="mixture-hpt">')[1].split("### ")[0]
    assert "- *Term:* `Unsolved`" in section and "- *Source:* the switch of HPT" in section
    assert "`GroupAdvantage(center=loo, scale=none, singleton=error)`" in page().split('<a id="advantage-loo">')[1].split("### ")[0]


def test_a_list_has_every_stream_and_every_regulariser() -> None:
    mpo = rows(found("loss")["mpo"])
    assert [row.split(":")[0] for row in mpo] == ["pairs", "chosen", "quality"]
    assert rows(found("loss")["asft"])[1] == "- kl: FullKL(direction=forward, coef=0.1)"
    assert lines(found("loss")["dpo"])[0] == "  dpo: DPO (arXiv 2305.18290)"
    assert rows(found("advantage")["none"]) == ["nothing"]


def test_what_is_made_is_what_a_run_would_make() -> None:
    for name in ("grpo", "simpo", "chord_phi"):
        assert found("loss")[name].made == load(name)


def test_settings_as_words() -> None:
    clip = "posttrain.loss.mask.RatioClip"
    assert word({"_target_": clip, "low": 0.2, "high": 0.28}) == "RatioClip(high=0.28)"
    assert word({"_target_": clip, "low": "???"}) == "RatioClip(low=???)"
    gate = {"_target_": "posttrain.mixture.gate.Unsolved", "success": {"_target_": "posttrain.mixture.gate.Success", "threshold": 1.0}}
    assert word(gate) == "Unsolved"
    gate["success"]["threshold"] = 0.5  # type: ignore[index]
    assert word(gate) == "Unsolved(success=Success(threshold=0.5))"
    assert word({"_target_": "posttrain.reward.text.number", "x": {"a": 1}}) == "number(x={a: 1})"


def test_words_are_looked_for_everywhere() -> None:
    everything = [m for group in CHAPTERS for m in found(group).values()]
    assert {m.name for m in matching(everything, ["2404.04656"])} >= {"bco"}
    assert [m.name for m in matching(everything, ["FullKL", "forward", "DFT"])] == ["asft"]
    assert list(matching(everything, ["no such thing"])) == []


def test_prose_stays_prose_in_markdown() -> None:
    assert (
        _safe("A*-PO, a * b, *inside*, {_target_: x}, group_norm, <tag>")
        == r"A\*-PO, a * b, \*inside\*, {\_target\_: x}, group_norm, \<tag>"
    )
    wrapped = _wrapped("x" * 138 + " - not a list " + "y" * 138 + " 1. neither")
    assert wrapped[1].startswith(r"\- not") and wrapped[-1].startswith(r"1\. neither")
