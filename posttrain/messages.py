"""Errors in one readable message each: what is wrong, where, and what to change."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

from posttrain.config import ConfigError


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word a mistyped one was probably meant to be.  A dotted key is also found by its last part (``lr`` -> ``learner.lr``)."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1)
    if not found:
        last = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
        found = last if len(last) == 1 else []
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """``; did you mean 'x'?``, or what is said otherwise."""
    near = nearest(word, known)
    said = f"did you mean {near!r}?" if near else otherwise
    return f"; {said}" if said else ""


def listing(names: Iterable[str], most: int = 16) -> str:
    """Names with commas, cut when they are many."""
    names = list(names)
    return ", ".join(names if len(names) <= most else [*names[: most - 1], f"and {len(names) - most + 1} more"])


def exit_code(error: BaseException) -> int:
    """2 for what the user can mend, 1 for anything else."""
    return 2 if isinstance(error, (ValueError, OSError, LookupError)) else 1


def describe(error: BaseException) -> str:
    """The message for an error: its innermost cause that says what to change, without a stack; then what was noted on it on the way up."""
    return "\n  ".join([_said(error), *getattr(error, "__notes__", [])])


def _said(error: BaseException) -> str:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = getattr(cause, "cause", None) if type(cause).__name__.startswith("RayTaskError") else cause.__cause__
    error = next((e for e in seen if isinstance(e, ConfigError)), error)
    if type(error).__name__.startswith("RayTaskError"):
        error = seen[seen.index(error) + 1] if seen.index(error) + 1 < len(seen) else error
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError):
        return _os_error(error, text)
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text}\n  (--traceback shows where)"


def _os_error(error: OSError, text: str) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk{where}; free some, or set run_dir to another disk; a run goes on with the same command and resume=auto"
    if error.errno == errno.ENOENT and error.filename:
        return f"no such file or folder{where}"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and error.filename:
        return f"not allowed to write or read there{where}; set run_dir to a folder of yours, or change its permissions"
    return text if error.errno is None else f"{text} (--traceback shows where)"


# -- the composer's own errors ------------------------------------------------------------------------------------------------------
def reword(error: BaseException, settings: Iterable[str], groups: dict[str, list[str]], recipes: Iterable[str] = ()) -> str:
    """An error of Hydra or OmegaConf as one sentence.  ``settings``: every key there is; ``groups``: every choice there is."""
    text = str(error).strip()
    if cause := str(error.__cause__ or "").strip():
        text += "\n" + cause
    if found := re.search(r"Key '([^']+)' (?:is )?not in ", text):
        full = re.search(r"full_key: (\S+)", text)
        name = full.group(1) if full else found.group(1)
        return f"unknown setting {name!r}" + did_you_mean(name, [*settings, *groups], "--cfg job prints every setting")
    if found := re.search(r"(?:In '([^']+)': )?Could not (?:find|load) '([^']+)'", text):
        group, _, choice = found.group(2).rpartition("/")
        if group in groups:
            return f"no {group}={choice}{did_you_mean(choice, groups[group])} (there are: {listing(groups[group])})"
        near = did_you_mean(found.group(2), ["train", *recipes], "it lists train, recipes, and files beside the recipe")
        return f"the 'defaults' of {found.group(1) or 'the recipe'} name {found.group(2)!r}, which does not exist{near}"
    if found := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return f"no group {found.group(1)!r}" + did_you_mean(found.group(1), groups, f"there are: {', '.join(groups)}")
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = found.group(1).partition("=")
        return f"{key}={value} has several values: write '{key}=[{value}]' for a list, or add --multirun for one run with each"
    if "OverrideParse" in type(error).__name__:
        reason = text.splitlines()[0]
        return f"a word cannot be read ({reason}); quote what has special characters: 'key=\"a: b\"', 'key=[1,2]'"
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        name = full.group(1) if (full := re.search(r"full_key: (\S+)", text)) else found.group(1)
        return f"{name} is not set; give {name}=VALUE"
    if found := re.search(r"Interpolation key '([^']+)' not found", text):
        key = re.search(r"full_key: (\S+)", text)
        return f"{key.group(1) if key else 'a setting'} refers to ${{{found.group(1)}}}, which does not exist"
    kept = [line.strip() for line in text.splitlines() if line.strip() and "hydra.cc" not in line and "provider=" not in line]
    return "; ".join(dict.fromkeys(line for line in kept if not line.startswith(("object_type", "Config search path"))))
