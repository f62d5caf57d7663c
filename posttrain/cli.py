"""The command line: Hydra in, RunConfig out.  The only file that sees a DictConfig.

    posttrain train recipe=NAME [key=value ...]     run a recipe (a file of recipes/, or a path to your own YAML)
    posttrain eval|export|explain|doctor ...        the same words, other verbs

A recipe is Hydra's primary config; ``stages: {name: [override, ...]}`` in it makes a pipeline, and ``stages.NAME.key=value`` on the command
line changes one stage.  Settings under open maps (terms, rewards, data readers) need no ``+``.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import ConfigError, RunConfig, check, from_mapping
from posttrain.paths import CONFIGS, RECIPES

OPEN = ("reward.fn.", "reward.weights.", "reward.combine.", "loss.", "advantage.", "data.train.", "data.eval.", "data.demos.", "model.tiny.")
OPEN += ("rollout.strategy.", "mixture.gate.", "model.lora.")
HELP = """\
posttrain: post-train a language model with one loss and swappable terms

  posttrain train recipe=quickstart                    a small model learns on this machine, about five minutes
  posttrain train recipe=gsm8k_grpo model.path=FOLDER  your model, real data
  posttrain train recipe=my.yaml learner.lr=1e-5       your own recipe; any key can be set on the command line
  posttrain train recipe=quickstart stages.grpo.steps=200     one stage's setting
  posttrain train run_dir=FOLDER resume=auto recipe=...       go on after a crash, from the last good checkpoint

  posttrain eval    recipe=... model.path=FOLDER       held-out accuracy with an interval
  posttrain export  run_dir=FOLDER                     newest checkpoint -> Hugging Face folder
  posttrain explain recipe=... | loss=NAME             the objective as an equation, and which settings cannot act
  posttrain doctor  recipe=...                         checks machine, config, memory, data and template before a run
  posttrain preview recipe=...                         one coloured row of the data: what is learnt from, token by token

Every command takes --help, --traceback (show where an error came from), and Hydra's flags (--cfg job, --multirun).
Groups: {groups}
Recipes: {recipes}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.  Exit code 0 on success, 2 for a mistake the user can mend, 1 for anything else, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args or bool(os.environ.get("POSTTRAIN_TRACEBACK"))
    args = [a for a in args if a != "--traceback"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP.format(groups=", ".join(_groups()), recipes=", ".join(_recipes())))
        return
    command, rest = args[0], args[1:]
    commands = {"train": _train, "eval": _eval, "export": _export, "explain": _explain, "doctor": _doctor, "preview": _preview}
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        _fail(f"unknown command {command!r}" + (f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(commands)}"))
    if any(a in ("-h", "--help") for a in rest):
        print(HELP.format(groups=", ".join(_groups()), recipes=", ".join(_recipes())))
        return
    try:
        code = commands[command](rest)
    except KeyboardInterrupt:
        _fail("interrupted; go on with the same command and resume=auto", 130)
    except Exception as error:
        if traceback:
            raise
        _fail(describe(error), 2 if isinstance(error, (ValueError, OSError, LookupError)) else 1)
    sys.exit(code or 0)


def _fail(message: str, code: int = 2) -> None:
    print(f"posttrain: {message}", file=sys.stderr)
    sys.exit(code)


def describe(error: BaseException) -> str:
    """One readable message for an error: the innermost cause a user can act on, without a stack."""
    import omegaconf.errors

    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = getattr(cause, "cause", None) if type(cause).__name__.startswith("RayTaskError") else cause.__cause__
    error = next((e for e in seen if isinstance(e, ConfigError)), error)
    text = str(error).strip() or type(error).__name__
    if type(error).__module__.startswith("hydra") or isinstance(error, omegaconf.errors.OmegaConfBaseException):
        inner = next((e for e in reversed(seen) if str(e).strip()), error)
        text = f"{text}\n  {inner}" if str(inner) not in text else text
        if unknown := re.search(r"Key '([^']+)' is not in struct", text):
            full = re.search(r"full_key: (\S+)", text)
            name = full.group(1) if full else unknown.group(1)
            near = difflib.get_close_matches(name, _known_keys(), n=1)
            text = f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --cfg job for every setting")
    if not isinstance(error, (ValueError, OSError, LookupError)) or type(error).__name__.startswith("RayTaskError"):
        text = f"{type(error).__name__}: {text.splitlines()[-1] if type(error).__name__.startswith('RayTaskError') else text}"
    return text + ("" if isinstance(error, ValueError) else "\n  (--traceback shows where)")


def _groups() -> list[str]:
    return sorted(p.name for p in CONFIGS.iterdir() if p.is_dir())


def _recipes() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def _known_keys() -> list[str]:
    import dataclasses

    out: list[str] = []

    def walk(cls: type, path: str) -> None:
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            out.append(path + f.name)
            if callable(f.default_factory) and dataclasses.is_dataclass(f.default_factory):
                walk(f.default_factory, f"{path}{f.name}.")  # type: ignore[arg-type]

    walk(RunConfig, "")
    return out


# -- from words to a composed config ---------------------------------------------------------------------------------------------
class Words:
    """A command line taken apart: recipe, overrides for everything, overrides per stage, and Hydra's own flags."""

    def __init__(self, args: Sequence[str]) -> None:
        self.recipe: Path | None = None
        self.overrides: list[str] = []
        self.stages: dict[str, list[str]] = {}
        self.flags: list[str] = []
        flag_value = False
        for arg in args:
            if flag_value or arg.startswith("-"):
                self.flags.append(arg)
                flag_value = arg in ("--cfg", "-c", "--package", "-p", "--info", "-i") and not flag_value
            elif arg.startswith("recipe="):
                self.recipe = _recipe_path(arg.removeprefix("recipe="))
            elif found := re.match(r"(\+{0,2})stages\.([^.=]+)\.(.+)", arg):
                self.stages.setdefault(found.group(2), []).append(_open(found.group(1) + found.group(3)))
            elif "=" not in arg and not arg.startswith("~"):
                raise ConfigError(f"{arg!r} is not a setting; write key=value (a recipe is chosen with recipe=NAME)")
            else:
                self.overrides.append(_open(arg))

    @property
    def config_name(self) -> str:
        return self.recipe.stem if self.recipe else "train"


def _open(override: str) -> str:
    """Add ``++`` where a map is open to new keys."""
    return f"++{override}" if override.startswith(OPEN) else override


def _recipe_path(name: str) -> Path:
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path.resolve()
    near = difflib.get_close_matches(name, _recipes(), n=1)
    raise ConfigError(f"no recipe {name!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f" (recipes: {', '.join(_recipes())}; or a path to a YAML)")


def _add_search_path(recipe: Path | None) -> None:
    """Let Hydra find recipes as primary configs."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    folders = [RECIPES] if recipe is None or recipe.parent == RECIPES else [recipe.parent, RECIPES]

    class RecipeSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: Any) -> None:
            for folder in folders:
                search_path.append("posttrain", f"file://{folder}")

    Plugins.instance().register(RecipeSearchPath)


def _compose(config_name: str, overrides: Sequence[str], recipe: Path | None = None) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return compose(config_name, overrides=list(overrides))
    _add_search_path(recipe)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


def compose_loss(name: str, overrides: Sequence[str] = ()) -> Any:
    """The composed objective of ``configs/loss/NAME.yaml``, with overrides relative to it (``streams.rollouts.masks.clip.low=0.1``)."""
    from hydra.utils import instantiate

    known = sorted(p.stem for p in (CONFIGS / "loss").glob("*.yaml"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"no loss {name!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f"; available: {', '.join(known)}")
    full = [o if o.startswith("~") else f"++loss.{o.lstrip('+')}" for o in overrides]
    return instantiate(_compose("train", [f"loss={name}", *full]).loss, _convert_="all")


def _instantiate(node: Any, path: str) -> Any:
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{path}: {str(cause).splitlines()[0]}") from error


def build_config(cfg: Any) -> RunConfig:
    """DictConfig -> RunConfig: resolve, build terms, check types."""
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(raw, dict)
    raw.pop("hydra", None)
    for name, node in dict(raw.get("reward", {}).get("fn") or {}).items():
        raw["reward"]["fn"][name] = _reward(name, node)
    raw["reward"]["fn"] = {k: v for k, v in (raw["reward"].get("fn") or {}).items() if v is not None}
    values = {key: value if key in ("stages",) else _build(value, key) for key, value in raw.items()}
    return from_mapping(RunConfig, values)


def _build(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _instantiate(value, path)
        return {k: _build(v, f"{path}.{k}") for k, v in value.items()}
    return value


def _reward(name: str, node: Any) -> Any:
    """A reward is a class (built) or a plain function (kept, with its settings bound)."""
    if not isinstance(node, Mapping):
        return node
    from hydra.utils import get_object

    target = node.get("_target_")
    if not target:
        raise ConfigError(f"reward.fn.{name} needs a _target_: the dotted name of a function or class")
    sys.path.insert(0, os.getcwd()) if os.getcwd() not in sys.path else None
    try:
        thing = get_object(target)
    except Exception as error:
        raise ConfigError(f"reward.fn.{name}._target_={target}: {str(error).splitlines()[0]}; give module.name of a function that can be imported from here") from error
    return _instantiate(dict(node) if inspect.isclass(thing) else {**node, "_partial_": True}, f"reward.fn.{name}")


def stages_of(cfg: Any, words: Words) -> dict[str, tuple[RunConfig, str]]:
    """Stage name -> (its config, its YAML).  A recipe without ``stages`` is one stage called ``train``."""
    from omegaconf import OmegaConf

    listed = OmegaConf.to_container(cfg.stages) if cfg.get("stages") else None
    if listed is None:
        if words.stages:
            raise ConfigError(f"stages.{next(iter(words.stages))}: this recipe has no stages; write the key without 'stages.NAME.'")
        return {"train": (_checked(cfg), OmegaConf.to_yaml(cfg))}
    assert isinstance(listed, dict)
    unknown = set(words.stages) - set(listed)
    if unknown:
        raise ConfigError(f"no stage {sorted(unknown)[0]!r}; this recipe has {', '.join(map(str, listed))}")
    out = {}
    for name, overrides in listed.items():
        own = [_open(str(o)) for o in (overrides or [])]
        composed = _compose(words.config_name, [*own, *words.overrides, *words.stages.get(str(name), [])], words.recipe)
        out[str(name)] = (_checked(composed, first=name == next(iter(listed))), OmegaConf.to_yaml(composed))
    return out


def _checked(cfg: Any, first: bool = True) -> RunConfig:
    config = build_config(cfg)
    if not first and config.model.path is None and config.model.tiny is None:
        config.model.path = "<previous stage>"
    check(config)
    return config


# -- commands ----------------------------------------------------------------------------------------------------------------------
def _train(args: list[str]) -> int:
    import hydra
    from omegaconf import OmegaConf

    words = Words(args)
    _add_search_path(words.recipe)
    exit_code = 0

    def job(cfg: Any) -> None:
        nonlocal exit_code
        from posttrain.run import launch

        stages = stages_of(cfg, words)
        exit_code = launch(stages, OmegaConf.to_yaml(cfg), command=["posttrain", "train", *args])

    sys.argv = ["posttrain", *words.flags, *words.overrides]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    hydra.main(config_path=str(CONFIGS), config_name=words.config_name, version_base="1.3")(job)()
    return exit_code


def _load_stages(args: list[str], extra: Sequence[str] = ()) -> dict[str, tuple[RunConfig, str]]:
    words = Words([*args, *extra])
    if words.flags:
        raise ConfigError(f"unknown flag {words.flags[0]!r} for this command")
    return stages_of(_compose(words.config_name, words.overrides, words.recipe), words)


def _eval(args: list[str]) -> int:
    from posttrain.run import evaluate_model

    stages = _load_stages(args)
    name = list(stages)[-1]
    return evaluate_model(stages[name][0])


def _export(args: list[str]) -> int:
    from posttrain.run import export_checkpoint

    values = dict(a.split("=", 1) for a in args if "=" in a)
    unknown = set(values) - {"run_dir", "stage", "step", "out"}
    if unknown or "run_dir" not in values:
        raise ConfigError("export takes run_dir=FOLDER [stage=NAME] [step=N] [out=FOLDER]" + (f", not {sorted(unknown)[0]}" if unknown else ""))
    print(export_checkpoint(Path(values["run_dir"]), values.get("stage"), int(values["step"]) if "step" in values else None, values.get("out")))
    return 0


def _explain(args: list[str]) -> int:
    from posttrain.report.explain import explain

    if not any(a.startswith("recipe=") for a in args) and any(a.startswith("loss=") for a in args):
        name = next(a for a in args if a.startswith("loss=")).removeprefix("loss=")
        print(explain(compose_loss(name, [a.removeprefix("loss.") for a in args if not a.startswith("loss=")])))
        return 0
    for name, (config, _) in _load_stages(args).items():
        print(textwrap.dedent(f"stage {name}"))
        print(explain(config.loss, advantage=config.advantage, updates_per_batch=config.learner.updates_per_batch, group_size=config.rollout.n))
    return 0


def _doctor(args: list[str]) -> int:
    from posttrain.doctor import examine

    return examine(_load_stages(args))


def _preview(args: list[str]) -> int:
    from posttrain.run import preview_data

    return preview_data(next(iter(_load_stages(args).values()))[0])


if __name__ == "__main__":
    main()
