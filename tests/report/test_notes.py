"""The comment at the head of a config file, taken apart."""

from __future__ import annotations

import pytest

from posttrain.loss.mask import RatioClip
from posttrain.loss.reference import Current
from posttrain.paths import CONFIGS
from posttrain.report.notes import Notes, header, notes_of, read, sentences, source_of

TEXT = """\
# Dr. XYZ (arXiv 2503.20783, after 2402.03300): no division, e.g. by the length.  The coefficient
# is 0.5. Published with advantage=group_norm; one framework uses loo. advantage.eps=0 is
# exact. Frameworks average per micro-batch. With a teacher: model.teacher=FOLDER. The sign is unverified.
_target_: posttrain.loss.Objective  # not in the header
# nor this
"""


def test_sentences_go_to_what_they_speak_of() -> None:
    assert read(TEXT) == Notes(
        title="Dr. XYZ (arXiv 2503.20783, after 2402.03300)",
        about="Dr. XYZ (arXiv 2503.20783, after 2402.03300): no division, e.g. by the length. The coefficient is 0.5.",
        run_with="Published with advantage=group_norm. advantage.eps=0 is exact. With a teacher: model.teacher=FOLDER.",
        releases="one framework uses loo. Frameworks average per micro-batch. The sign is unverified.",
        papers=("2503.20783", "2402.03300"),
    )


@pytest.mark.parametrize(
    ("sentence", "part"),
    [
        ("The release divides by 8192.", "releases"),
        ("Others compare with the old policy.", "releases"),
        ("The released code halves it (streams.pairs.coef=0.5).", "releases"),
        ("That it is a mean is our reading.", "releases"),
        ("a=10 is the release's setting; a=1 is another method.", "releases"),
        ("rollout.n=2, a reward as the judge.", "run_with"),
        ("On given data: data.kind=pairs.", "run_with"),
        ("The others of the group count too.", "about"),
        ("mu is 0.9 at the start.", "about"),
    ],
)
def test_where_a_sentence_goes(sentence: str, part: str) -> None:
    notes = read(f"# A name: what it is. {sentence}\n")
    assert getattr(notes, part).endswith(sentence)
    assert sum(sentence in text for text in (notes.about, notes.run_with, notes.releases)) == 1


def test_what_is_said_of_releases_where_nothing_is() -> None:
    assert read("# A: it is (our reading). advantage=none.\n").differences == "what is said above"
    assert read("# A: it is. advantage=none.\n").differences == "no difference is noted"
    assert read("# A: it is. The release differs.\n").differences == "The release differs."


def test_a_file_without_a_comment_has_no_notes() -> None:
    assert read("name: x\n") == Notes() and header("\n# later\n") == ""


def test_nothing_of_a_comment_is_lost() -> None:
    """Every word of every shipped comment is in one of the three parts."""
    files = [path for group in ("loss", "advantage", "mixture") for path in (CONFIGS / group).glob("*.yaml")]
    assert len(files) > 50
    for path in files:
        notes, text = read(path.read_text()), header(path.read_text())
        parts = " ".join([notes.about, notes.run_with, notes.releases])
        assert sorted(parts.replace(".", "").replace(";", "").split()) == sorted(text.replace(".", "").replace(";", "").split()), path.name


def test_every_shipped_loss_says_what_it_is() -> None:
    for path in (CONFIGS / "loss").glob("*.yaml"):
        notes = notes_of("loss", path.stem)
        assert notes is not None and notes.about, path.name


def test_a_folder_of_ones_own_comes_first(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "dpo.yaml").write_text("# Mine: another one.\n")
    mine = notes_of("loss", "dpo", [tmp_path])
    assert mine is not None and mine.title == "Mine"
    shipped = notes_of("loss", "dpo")
    assert shipped is not None and shipped.papers == ("2305.18290",) and notes_of("loss", "no_such_loss") is None


def test_sources_are_read_from_docstrings() -> None:
    assert source_of(RatioClip) == "PPO, arXiv 1707.06347; high > low is clip-higher, DAPO, arXiv 2503.14476."
    assert source_of(Current).startswith("Williams 1992") and source_of(int) == ""
    assert sentences("Dr. X did it (i.e. Y). 0.5 is used! c is 3.") == ["Dr. X did it (i.e. Y).", "0.5 is used!", "c is 3."]


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("bnpo", "token mean of the local batch by this name"),
        ("ipo", "prime-rl gives this name to another thing"),
        ("ipo", "a factor of the length in the target"),
        ("sapo", "Another method of this name shares rollouts"),
        ("dppo_tv", "loss=decoupled_ppo"),
        ("iterative_rpo", "Not arXiv 2405.16436"),
        ("rpo", "Not iterative RPO"),
        ("cpo", "also that of constrained"),
        ("apo_zero", "step_apo (DPO on steps) and a_star_po"),
        ("rso", 'what several frameworks call "hinge"'),
        ("tis", "by the product of the answer"),
        ("cispo", "under the name epsilon_high"),
        ("bco_pair", "its documentation shows another formula"),
        ("simpo", "states gamma/beta"),
        ("sppo", "without the half"),
        ("dro", "squares the log-ratio per token"),
        ("grpo", "mean over all tokens instead"),
        ("gpg", "counts non-zero rewards instead"),
        ("cdpo", "calls it label smoothing"),
        ("dpo", "half the sequences"),
        ("gvpo", "Not GMPO, GDPO or CPGD"),
        ("orpo", "prompt *and* answer"),
        ("exo", "4.5e-5"),
    ],
)
def test_a_name_or_a_number_that_means_something_else_elsewhere_is_told(loss: str, told: str) -> None:
    """Under its own name, where a user looks: the comment, which is what ``posttrain explain`` prints."""
    notes = notes_of("loss", loss)
    assert notes is not None and told in " ".join((notes.about, notes.run_with, notes.releases))
