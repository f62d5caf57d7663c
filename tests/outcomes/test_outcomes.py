"""Every claim is run over its seeds, and what docs/log.md says was found is found again; a claim that decides nothing is run for finite numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.outcomes.claims import Claim, measured
from tests.outcomes.report import MODULES, claims_of

ALL = [claim for module in MODULES for claim in claims_of(module)]


@pytest.mark.slow
@pytest.mark.parametrize("claim", ALL, ids=lambda claim: claim.name)
def test_what_was_found_is_found_again(claim: Claim) -> None:
    outcome = measured(claim)
    assert all(math.isfinite(x) for interval in (*outcome.arms.values(), outcome.effect) for x in (interval.mean, interval.low, interval.high))
    if claim.found != "not decided":
        assert outcome.found == claim.found, outcome


def test_every_claim_has_a_name_of_its_own_and_enough_seeds() -> None:
    assert len({claim.name for claim in ALL}) == len(ALL)
    assert all(claim.seeds >= 3 for claim in ALL)


def test_the_methods_named_are_shipped() -> None:
    known = {path.stem for path in Path("configs/loss").glob("*.yaml")}
    assert {name for claim in ALL for name in claim.methods} <= known


def test_the_log_has_every_claim() -> None:
    """``python -m tests.outcomes.report > docs/log.md`` writes it."""
    written = Path("docs/log.md").read_text()
    for claim in ALL:
        assert any(line.startswith(f"| {claim.name} |") and f"| **{claim.found}**" in line for line in written.splitlines()), claim.name
