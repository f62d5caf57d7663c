"""The command line: Hydra in, RunConfig out.  The only file that sees a DictConfig.

    posttrain train recipe=NAME [key=value ...]     run a recipe (a file of recipes/, or a path to your own YAML)
    posttrain eval|export|explain|doctor ...        the same words, other verbs

A recipe is Hydra's primary config; ``stages: {name: [override, ...]}`` in it makes a pipeline, and ``stages.NAME.key=value`` on the command
line changes one stage.  Settings under open maps (terms, rewards, data readers) need no ``+``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain import help as pages
from posttrain import targets
from posttrain.checks import check
from posttrain.config import ConfigError, RunConfig, from_mapping
from posttrain.messages import describe, did_you_mean, exit_code, listing, reword
from posttrain.paths import CONFIGS, RECIPES, import_from
from posttrain.preflight import PREVIOUS
from posttrain.words import SHOWS, Words, open_map


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.  Exit code 0 on success, 2 for a mistake the user can mend, 1 for anything else, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args or bool(os.environ.get("POSTTRAIN_TRACEBACK"))
    args = [a for a in args if a != "--traceback"]
    code = 0
    try:
        code = _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted" + ("; go on with the same command and resume=auto" if args[:1] == ["train"] else ""), 130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if traceback:
            raise
        _fail(describe(error), exit_code(error))
    if code:
        sys.exit(code)


def _run(args: list[str]) -> int:
    commands = {"train": _train, "eval": _eval, "export": _export, "explain": _explain, "methods": _methods}
    commands |= {"doctor": _doctor, "preview": _preview}
    if args[:1] == ["--version"]:
        print(f"posttrain {importlib.metadata.version('posttrain')}")
        return 0
    if not args or args[0] == "help" or any(a in ("-h", "--help") for a in args):
        print(pages.page(next((a for a in args if a in commands), None)))
        return 0
    command, rest = args[0], args[1:]
    if command not in commands:
        hint = f"write posttrain train {command}" if "=" in command else f"choose from {', '.join(commands)}"
        raise ConfigError(f"unknown command {command!r}{did_you_mean(command, commands, hint)}")
    _prepare()
    return commands[command](rest)


def _fail(message: str, code: int = 2) -> None:
    print(f"posttrain: {message}", file=sys.stderr)
    sys.exit(code)


def _prepare() -> None:
    """The user's own modules can be named in settings; what libraries say on import is not wanted."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


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
_FOLDERS: list[Path] = []


def _set_search_path(recipe: Path | None, folders: Sequence[Path]) -> None:
    """Let Hydra find recipes as primary configs, groups and modules beside the recipe, and groups of the user's own."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    beside = [] if recipe is None or recipe.parent == RECIPES else [recipe.parent]
    _FOLDERS[:] = [*folders, *beside, RECIPES]
    for folder in beside:
        import_from(folder)
    known = Plugins.instance().discover(SearchPathPlugin)
    if any(plugin.__name__ == "RecipeSearchPath" for plugin in known):
        return

    class RecipeSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: Any) -> None:
            for folder in _FOLDERS:
                search_path.append("posttrain", f"file://{folder}")

    Plugins.instance().register(RecipeSearchPath)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Errors of the composer become one sentence."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}not YAML: {getattr(error, 'problem', None) or error}") from error
    except Exception as error:
        if type(error).__module__.startswith("hydra.") or isinstance(error, OmegaConfBaseException):
            raise ConfigError(reword(error, _known_keys(), pages.groups(), pages.recipes())) from error
        raise


def _compose(config_name: str, overrides: Sequence[str], recipe: Path | None = None, folders: Sequence[Path] = ()) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with _readable():
        if GlobalHydra.instance().is_initialized():
            return compose(config_name, overrides=list(overrides))
        _set_search_path(recipe, folders)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))


def compose_words(words: Words, stage: Sequence[str] = (), name: str = "") -> Any:
    """The composed settings, of one stage when its overrides are given.  The command line has the last word."""
    try:
        return _compose(words.config_name, [*stage, *words.overrides, *words.stages.get(name, [])], words.recipe, words.folders)
    except ConfigError as error:
        if name:
            raise ConfigError(f"stage {name}: {error}") from error
        raise


@contextlib.contextmanager
def composing() -> Iterator[None]:
    """Many compositions in a row of what is shipped, twice as fast."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        yield
        return
    _set_search_path(None, [])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def compose_choice(group: str, name: str, build: bool = False) -> Any:
    """The settings of ``GROUP=NAME`` by themselves, or what they build; what they take from the rest of a run must then have a value of its own."""
    import warnings

    from omegaconf import OmegaConf

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Defaults list is missing")
        composed = _compose(f"{group}/{name}", [])
    with _readable():
        raw = OmegaConf.to_container(composed[group] if composed else composed, resolve=build)
        return _build(raw, group) if build else raw


def compose_loss(name: str, overrides: Sequence[str] = ()) -> Any:
    """The composed objective of ``configs/loss/NAME.yaml``, with overrides relative to it (``streams.rollouts.masks.clip.low=0.1``).

    What a loss takes from the rest of a run (the number of steps, the longest answer) has the value that the file gives for its absence."""
    import warnings

    from omegaconf import OmegaConf

    known = pages.groups()["loss"]
    if name not in known:
        raise ConfigError(f"no loss {name!r}{did_you_mean(name, known)}" + f"; available: {listing(known)}")
    full = [o if o.startswith("~") else f"++loss.{o.lstrip('+')}" for o in overrides]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Defaults list is missing")
        composed = _compose(f"loss/{name}", full)
    with _readable():
        return _build(OmegaConf.to_container(composed.loss, resolve=True), "loss")


def _instantiate(node: Any, path: str) -> Any:
    from hydra.utils import instantiate

    targets.examine(node, path)
    try:
        return instantiate(node, _convert_="all")
    except Exception as error:
        cause = error.__cause__ or error
        where = re.search(r"full_key: (\S+)", str(error))
        raise ConfigError(f"{path}{'.' + where.group(1) if where else ''}: {' '.join(str(cause).split())}") from error


def build_config(cfg: Any) -> RunConfig:
    """Composed settings (a DictConfig, or the plain mapping of a run's ``stages/NAME.yaml``) -> RunConfig: resolve, build terms, check types."""
    from omegaconf import OmegaConf

    with _readable():
        raw = OmegaConf.to_container(cfg if OmegaConf.is_config(cfg) else OmegaConf.create(dict(cfg)), resolve=True, throw_on_missing=True)
    return _typed({str(key): value for key, value in raw.items() if key != "hydra"})  # type: ignore[union-attr]


def _typed(raw: dict[str, Any]) -> RunConfig:
    if "model" not in raw or "cluster" not in raw:
        raise ConfigError("these settings are not a whole run: a recipe begins with  defaults: [train, _self_]")
    if not isinstance(raw.get("loss"), dict) or "_target_" not in raw["loss"]:
        raise ConfigError(f"loss is not an objective; choose loss=NAME ({listing(pages.groups()['loss'])})")
    for optional in ("advantage", "critic"):
        if raw.get(optional) == {}:
            raw[optional] = None
    if isinstance(tiny := (raw.get("model") or {}).get("tiny"), dict):
        from posttrain.testing.tiny import create_tiny_model

        targets.arguments(create_tiny_model, tiny, "model.tiny", but=("path",))
    reward = raw.get("reward")
    rewards = (reward.pop("fn", None) or {}) if isinstance(reward, dict) else {}
    values = {key: value if key == "stages" else _build(value, key) for key, value in raw.items()}
    if rewards:
        values["reward"]["fn"] = {name: _reward(name, node) for name, node in rewards.items() if node is not None}
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
        raise ConfigError(
            f"reward.fn.{name}={node!r} is not a reward; give reward.fn.{name}._target_=module.function, or null to leave it out"
        )
    if not node.get("_target_"):
        raise ConfigError(f"reward.fn.{name} needs a _target_: the dotted name of a function or class")
    thing = targets.locate(node["_target_"], f"reward.fn.{name}")
    return _instantiate(dict(node) if inspect.isclass(thing) else {**node, "_partial_": True}, f"reward.fn.{name}")


def compose_stages(words: Words) -> dict[str, Any]:
    """Stage name -> its composed settings.  A recipe without ``stages`` is one stage called ``train``."""
    from omegaconf import OmegaConf

    cfg = compose_words(words)
    listed = OmegaConf.to_container(cfg.stages) if cfg.get("stages") else None
    if listed is None:
        if words.stages:
            raise ConfigError(f"stages.{next(iter(words.stages))}: this recipe has no stages; write the key without 'stages.NAME.'")
        return {"train": cfg}
    if not isinstance(listed, dict) or any(not isinstance(v, (list, type(None))) for v in listed.values()):
        raise ConfigError("stages must map each name to a list of settings, as in  stages: {sft: [loss=sft, steps=70], grpo: [loss=grpo]}")
    unknown = sorted(set(words.stages) - set(listed))
    if unknown:
        raise ConfigError(
            f"no stage {unknown[0]!r}{did_you_mean(unknown[0], map(str, listed))}" + f"; this recipe has {', '.join(map(str, listed))}"
        )
    return {str(name): compose_words(words, [open_map(str(o)) for o in (overrides or [])], str(name)) for name, overrides in listed.items()}


def build_stages(composed: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Stage name -> its typed settings.  A later stage without a model begins where the one before it ended."""
    out: dict[str, RunConfig] = {}
    for name, cfg in composed.items():
        try:
            out[name] = build_config(cfg)
        except ConfigError as error:
            if len(composed) > 1:
                raise ConfigError(f"stage {name}: {error}") from error
            raise
    return out


def stages_of(words: Words) -> dict[str, tuple[RunConfig, str]]:
    """Stage name -> (its config, its YAML), every one checked."""
    from omegaconf import OmegaConf

    composed = compose_stages(words)
    configs = build_stages(composed)
    first = next(iter(configs))
    for name, config in configs.items():
        if name != first and config.model.path is None and config.model.tiny is None:
            config.model.path = PREVIOUS
        try:
            check(config)
        except ConfigError as error:
            if len(configs) > 1:
                raise ConfigError(f"stage {name}: {error}") from error
            raise
    return {name: (config, OmegaConf.to_yaml(composed[name])) for name, config in configs.items()}


# -- commands ----------------------------------------------------------------------------------------------------------------------
def _train(args: list[str]) -> int:
    words = Words(args)
    if any(f in SHOWS for f in words.flags):
        return _show(words)
    failures: list[tuple[str, Exception]] = []

    def job() -> None:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        own = words.of_job(list(hydra.overrides.task)) if words.many else words
        if words.many:
            same = {w.lower() for w in words.again}
            print(f"run {hydra.job.num + 1}: {' '.join(w for w in own.again if w.lower() not in same)}", flush=True)
        command = ["posttrain", "train", *(args if not words.many else own.again)]
        try:
            _launch(own, command)
        except Exception as error:
            if not words.many:
                raise _Held(error) from error
            failures.append((" ".join(own.again), error))

    if words.many and any(w.startswith("run_dir=") and "${" not in w for w in words.overrides):
        raise ConfigError("--multirun needs one folder per run: leave run_dir out, or name the run in it, run_dir='runs/sweep-${seed}'")
    held: _Held | None = None
    try:
        _through_hydra(words, job)
    except _Held as found:
        held = found
    if held:
        raise held.error
    for which, error in failures:
        print(f"posttrain: failed: train {which}: {describe(error)}", file=sys.stderr)
    return max((exit_code(error) for _, error in failures), default=0)


class _Held(BaseException):
    """Carries an error past Hydra, which would report it in its own words."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _launch(words: Words, command: list[str]) -> None:
    from omegaconf import OmegaConf

    from posttrain.preflight import preflight
    from posttrain.run import launch

    stages = stages_of(words)
    preflight({name: config for name, (config, _) in stages.items()})
    launch(stages, OmegaConf.to_yaml(compose_words(words)), command=command)


def _through_hydra(words: Words, job: Any) -> None:
    """Run ``job`` once, or with --multirun once for every combination of settings, as Hydra's application."""
    import hydra

    _set_search_path(words.recipe, words.folders)
    ours = ("hydra/job_logging=stdout", "hydra/hydra_logging=none", "hydra.sweep.dir=runs")
    own = [w for w in ours if not any(o.startswith(w.partition("=")[0]) for o in words.overrides)]
    before, environment = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["posttrain", *words.flags, *own, *(words.through_hydra() if words.many else words.overrides)]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _readable():
            hydra.main(config_path=str(CONFIGS), config_name=words.config_name, version_base="1.3")(lambda cfg: job())()
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR") if environment is None else os.environ.update(HYDRA_FULL_ERROR=environment)


def _show(words: Words) -> int:
    """``--cfg job``: every setting as composed, one document per stage.  The other flags that only show something are Hydra's own."""
    from omegaconf import OmegaConf

    if [f for f in words.flags if f != "--resolve"] not in (["--cfg", "job"], ["-c", "job"]):
        _through_hydra(words, lambda: None)
        return 0
    composed = compose_stages(words)
    documents = []
    for name, cfg in composed.items():
        with _readable():
            text = OmegaConf.to_yaml(cfg, resolve="--resolve" in words.flags)
        documents.append(text if len(composed) == 1 else f"# stage {name}\n{text}")
    print("---\n".join(documents), end="")
    return 0


def _words(args: list[str]) -> Words | None:
    """The words of a command that starts no sweep; ``None`` when they only asked to be shown the settings."""
    words = Words(args)
    if words.many:
        raise ConfigError("--multirun is for posttrain train")
    if words.flags:
        _show(words)
        return None
    return words


def _eval(args: list[str]) -> int:
    from posttrain.run import evaluate_model

    words = _words(args)
    if words is None:
        return 0
    name, cfg = list(compose_stages(words).items())[-1]
    return evaluate_model(build_stages({name: cfg})[name])


def _export(args: list[str]) -> int:
    from posttrain.run import export_checkpoint

    values: dict[str, str] = {}
    cluster: dict[str, Any] = {}
    for arg in args:
        key, equals, value = arg.partition("=")
        if key.startswith("cluster.") and equals:
            import yaml

            cluster[key.removeprefix("cluster.")] = yaml.safe_load(value)
        elif key in ("run_dir", "stage", "step", "out") and equals:
            values[key] = value
        else:
            raise ConfigError(f"export takes run_dir=FOLDER [stage=NAME] [step=N] [out=FOLDER] [cluster.KEY=VALUE], not {arg!r}")
    if "run_dir" not in values:
        raise ConfigError("which run? export run_dir=FOLDER [stage=NAME] [step=N] [out=FOLDER]")
    if not values.get("step", "0").isdigit():
        raise ConfigError(f"step={values['step']} must be a whole number")
    step = int(values["step"]) if "step" in values else None
    print(export_checkpoint(Path(values["run_dir"]), values.get("stage"), step, values.get("out"), cluster))
    return 0


def _explain(args: list[str]) -> int:
    from posttrain.report import draw
    from posttrain.report.curve import pictures
    from posttrain.report.explain import explain, facts_of, idle_settings
    from posttrain.report.notes import notes_of

    png = [a.removeprefix("png=") for a in args if a.startswith("png=")]
    words = _words([a for a in args if not a.startswith("png=")])
    if words is None:
        return 0
    alone = words.recipe is None and all(w.removeprefix("++").startswith("loss") for w in words.overrides)
    if alone and not words.overrides:
        raise ConfigError(f"what? explain loss=NAME or recipe=NAME (losses: {listing(pages.groups()['loss'])})")
    configs = build_stages(compose_stages(words))
    drawn = {name if len(configs) > 1 else config.loss.name: pictures(config.loss) for name, config in configs.items() if png or not words.recipe}
    if png:
        draw.png(drawn, Path(png[-1]))
    for number, (name, config) in enumerate(configs.items()):
        if len(configs) > 1:
            print(("\n" if number else "") + f"stage {name}")
        run, more = (None, []) if alone else (facts_of(config), idle_settings(config))
        print(explain(config.loss, config.advantage, run, more, notes_of("loss", config.loss.name, words.folders)))
    if not words.recipe:
        print("\n" + draw.text([picture for each in drawn.values() for picture in each], live=draw.fancy()))
    if png:
        print(f"\ndrawn in {png[-1]}")
    return 0


def _methods(args: list[str]) -> int:
    from posttrain.report.methods import CHAPTERS, WORDS, lines, matching, methods

    if odd := next((a for a in args if a.startswith("-") or "=" in a), None):
        raise ConfigError(f"methods takes words to look for, not {odd!r}: methods kl base")
    shown: list[str] = []
    for group, title in CHAPTERS.items():
        for method in matching(methods(group), args):
            if group not in shown:
                print(("\n" if shown else "") + f"{title.lower()} ({group}=NAME)" + (f"; each stream: {WORDS}" if group == "loss" else ""))
                shown.append(group)
            print("\n".join(lines(method)), flush=True)
    if not shown:
        raise ConfigError(f"no loss, advantage or mixture has {' and '.join(args)} in its name, its notes or its terms")
    return 0


def _doctor(args: list[str]) -> int:
    from posttrain.doctor import examine

    words = _words(args)
    if words is None:
        return 0
    return examine(build_stages(compose_stages(words)) if args else {})


def _preview(args: list[str]) -> int:
    from posttrain.run import preview_data

    words = _words(args)
    if words is None:
        return 0
    return preview_data(build_stages(compose_stages(words)))


if __name__ == "__main__":
    main()
