"""The words of a command line: which recipe, which settings for all of it, which for one stage, and which flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from posttrain import help as pages
from posttrain.config import ConfigError
from posttrain.messages import did_you_mean, listing
from posttrain.paths import CONFIGS, RECIPES

OPEN = (
    "reward.fn.",
    "reward.weights.",
    "reward.combine.",
    "reward.routes.",
    "loss.",
    "advantage.",
    "data.train.",
    "data.eval.",
    "data.demos.",
    "model.tiny.",
    "model.lora.",
    "rollout.strategy.",
    "mixture.gate.",
)
"""Maps that may get keys of their own."""
FLAGS = ("--cfg", "-c", "--package", "-p", "--resolve", "--multirun", "-m", "--info", "-i", "--config-dir", "-cd", "--hydra-help")
VALUED = {"--cfg": "job", "-c": "job", "--package": "", "-p": "", "--info": "all", "-i": "all", "--config-dir": "", "-cd": ""}
"""Flags that take a word, and what they mean without one."""
SHOWS = ("--cfg", "-c", "--info", "-i", "--hydra-help")
STAGE = "++_stage."
"""How a setting of one stage travels through Hydra, which knows no stages: ``stages.a.b.c=1`` as ``++_stage.a.b$c=1``."""


class Words:
    """A command line taken apart: recipe, overrides for everything, overrides per stage, and Hydra's own flags."""

    def __init__(self, args: Sequence[str]) -> None:
        self.recipe: Path | None = None
        self.overrides: list[str] = []
        self.stages: dict[str, list[str]] = {}
        self.flags: list[str] = []
        self.folders: list[Path] = []
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            if arg.startswith("-"):
                self._flag(arg, rest)
            elif arg.startswith("recipe="):
                self.recipe = recipe_path(arg.removeprefix("recipe="))
            elif found := re.match(r"(\+{0,2})stages\.([^.=]+)\.(.+)", arg):
                self.stages.setdefault(found.group(2), []).append(_chosen(open_map(found.group(1) + found.group(3))))
            elif "=" not in arg and not arg.startswith("~"):
                hint = f"recipe={arg}" if arg in pages.recipes() else "key=value (a recipe is chosen with recipe=NAME)"
                raise ConfigError(f"{arg!r} is not a setting; write {hint}")
            else:
                self.overrides.append(_chosen(open_map(arg)))

    def _flag(self, arg: str, rest: list[str]) -> None:
        """One flag, with the word after it when it takes one."""
        name, _, value = arg.partition("=")
        if name not in FLAGS:
            if value:
                raise ConfigError(f"unknown flag {name}; settings have no dashes: {arg.lstrip('-')}")
            raise ConfigError(f"unknown flag {name}{did_you_mean(name, FLAGS, 'flags: ' + ', '.join(f for f in FLAGS if f[:2] == '--'))}")
        if name in VALUED and not value:
            value = rest.pop(0) if rest and "=" not in rest[0] and not rest[0].startswith("-") else VALUED[name]
        if name in ("--config-dir", "-cd"):
            if not Path(value).is_dir():
                raise ConfigError(f"{name} {value}: there is no such folder")
            self.folders.append(Path(value).resolve())
        else:
            self.flags += [name, value] if value else [name]

    @property
    def config_name(self) -> str:
        return self.recipe.stem if self.recipe else "train"

    @property
    def many(self) -> bool:
        return any(f in ("--multirun", "-m") for f in self.flags)

    def through_hydra(self) -> list[str]:
        """All overrides in a form that Hydra can sweep over."""
        return self.overrides + [
            f"{STAGE}{name}.{key.lstrip('+').replace('.', '$')}={value}"
            for name, words in self.stages.items()
            for key, _, value in (w.partition("=") for w in words)
        ]

    @property
    def again(self) -> list[str]:
        """The same words, as a command line."""
        recipe = [] if self.recipe is None else [f"recipe={self.recipe.stem if self.recipe.parent == RECIPES else self.recipe}"]
        return [*recipe, *self.overrides, *(f"stages.{name}.{w.lstrip('+')}" for name, own in self.stages.items() for w in own)]

    def of_job(self, overrides: Sequence[str]) -> Words:
        """The words of one run of several."""
        own = []
        for word in overrides:
            if word.startswith(STAGE):
                key, _, value = word.removeprefix(STAGE).partition("=")
                word = f"stages.{key.replace('$', '.')}={value}"
            own.append(word)
        return Words(
            [*([f"recipe={self.recipe}"] if self.recipe else []), *(w for f in self.folders for w in ("--config-dir", str(f))), *own]
        )


def open_map(override: str) -> str:
    """Add ``++`` where a map is open to new keys, one at a time or all at once (``reward.weights={answer: 1, format: 0.1}``)."""
    key, _, value = override.partition("=")
    whole = "." in key and f"{key}." in OPEN and value.startswith("{")
    return f"++{override}" if whole or override.startswith(OPEN) else override


def _chosen(override: str) -> str:
    """Refuse a group that is set like a single setting: ``learner=3``."""
    key, _, value = override.partition("=")
    group, groups = key.lstrip("+"), pages.groups()
    if group in groups and (value in ("null", "true", "false") or not re.fullmatch(r"[A-Za-z_][\w/.,() -]*", value)):
        raise ConfigError(
            f"{override}: {group} is a group of settings; choose {group}=NAME ({listing(groups[group])}), or set {group}.KEY=VALUE"
        )
    return override


def recipe_path(name: str) -> Path:
    """The file of a recipe's name or path.  Raises :class:`ConfigError` with the nearest name."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            if path.parent.resolve() != RECIPES and (CONFIGS / f"{path.stem}.yaml").exists():
                raise ConfigError(f"recipe={name}: {path.stem}.yaml is the name of the root of all settings; give your recipe another one")
            return path.resolve()
    near = did_you_mean(name, pages.recipes())
    if name.endswith((".yaml", ".yml")):
        raise ConfigError(f"recipe={name}: there is no such file (looked in {Path(name).resolve().parent})")
    raise ConfigError(f"no recipe {name!r}{near} (recipes: {', '.join(pages.recipes())}; or a path to a YAML)")
