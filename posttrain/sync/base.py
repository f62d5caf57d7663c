"""What makes a weight update trustworthy: every tensor arrived, the versions follow each other, and both sides hold the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SHOWN = 5


class SyncError(RuntimeError):
    """The engine does not hold the weights it was asked to hold.  The message names the tensors."""


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def check_names(given: Iterable[str], wanted: Iterable[str], version: int) -> None:
    """Every tensor of the engine arrived exactly under its Hugging Face name.  Raises :class:`SyncError` naming what is missing or
    unknown."""
    given, wanted = set(given), set(wanted)
    if missing := wanted - given:
        raise SyncError(
            f"version {version}: {len(missing)} of the engine's {len(wanted)} tensors were not in the update: {_names(missing)}; the "
            "learner must "
            "publish every tensor under its Hugging Face name (adapters merged)"
        )
    if unknown := given - wanted:
        raise SyncError(
            f"version {version}: the engine has no tensor called {_names(unknown)}; learner and engine must be built from the same "
            "model configuration"
        )


def check_version(current: int, new: int) -> None:
    """Versions never go back.  The same version may be loaded again: a restarted engine and a repeated message are harmless."""
    if new < current:
        raise SyncError(f"asked to load version {new} but the engine already holds version {current}: the update is stale")


def compare(learner: Mapping[str, tuple[int, int]], engine: Mapping[str, tuple[int, int]], version: int) -> None:
    """Both fingerprints (name -> (numel, sum of bit patterns)) agree on every tensor.  Raises :class:`SyncError` naming those that
    differ."""
    check_names(learner, engine, version)
    wrong = {name for name, value in engine.items() if tuple(learner[name]) != tuple(value)}
    if not wrong:
        return
    first = min(wrong)
    raise SyncError(
        f"version {version}: after loading, {len(wrong)} of {len(engine)} tensors differ between learner and engine: {_names(wrong)} "
        f"({first}: learner "
        f"{tuple(learner[first])}, engine {tuple(engine[first])}, as (elements, sum of bits)); both must hash the engine's dtype, and "
        "nothing may "
        "change the weights between publish and load"
    )
