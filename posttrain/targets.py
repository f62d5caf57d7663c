"""What a ``_target_`` in a config takes: found, and its settings compared with its signature, before anything is built.

A mistyped key of a term is named with its nearest, and a number where a word belongs is refused with the path of the setting.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from posttrain.config import ConfigError, _name
from posttrain.messages import did_you_mean

OWN = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
MAPS = ("streams", "masks", "regularizers", "steps")
"""Named maps whose values are terms: an entry without a ``_target_`` is a mistyped name."""


def locate(target: Any, path: str) -> Any:
    """The object of a dotted name.  Raises :class:`ConfigError` naming what cannot be imported."""
    where = f"{path}._target_={target}"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{where}: give the dotted name of a class or function, module.Name")
    parts = target.split(".")
    for n in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:n])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                continue
            raise ConfigError(f"{where}: {name} cannot be imported: {error}") from error
        except Exception as error:
            raise ConfigError(f"{where}: {name} cannot be imported: {type(error).__name__}: {error}") from error
        for part in parts[n:]:
            if not hasattr(found, part):
                raise ConfigError(f"{where}: {name} has no {part!r}" + did_you_mean(part, dir(found)))
            found = getattr(found, part)
        return found
    raise ConfigError(f"{where}: there is no module {parts[0]!r}; it must be installed, or lie beside the recipe or in the folder you start from")


def examine(node: Any, path: str) -> None:
    """Check a settings tree: every ``_target_`` exists and takes what it is given.  Raises :class:`ConfigError`."""
    if isinstance(node, list):
        for index, child in enumerate(node):
            examine(child, f"{path}[{index}]")
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        thing = locate(node["_target_"], path)
        if not callable(thing):
            raise ConfigError(f"{path}._target_={node['_target_']} is a {type(thing).__name__}, not a class or function")
        arguments(thing, node, path, complete=inspect.isclass(thing) and not node.get("_partial_") and not node.get("_args_"))
    for key, child in node.items():
        if key in MAPS and "_target_" in node and isinstance(child, Mapping):
            _named(child, f"{path}.{key}")
        if key not in OWN:
            examine(child, f"{path}.{key}")


def _named(children: Mapping[str, Any], path: str) -> None:
    terms = [name for name, child in children.items() if isinstance(child, Mapping) and "_target_" in child]
    for name, child in children.items():
        if child is not None and name not in terms:
            raise ConfigError(f"there is no {path}.{name}{did_you_mean(name, terms, 'a new one needs a _target_')} (null switches one off)")


def arguments(thing: Any, given: Mapping[str, Any], path: str, *, complete: bool = False, but: tuple[str, ...] = ()) -> None:
    """Compare settings with a signature: unknown names, plain values of the wrong type, and (``complete``) what is missing.  ``but``: parameters
    that are not settings."""
    try:
        parameters = {n: p for n, p in inspect.signature(thing).parameters.items() if n not in but}
    except (TypeError, ValueError):
        return
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    values = {k: v for k, v in given.items() if k not in OWN}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in values:
            if key not in named:
                known = f"{thing.__name__} takes {', '.join(named) or 'no settings'}"
                raise ConfigError(f"unknown setting {path}.{key}{did_you_mean(str(key), named, known)}")
    if complete:
        for key, parameter in named.items():
            if parameter.default is parameter.empty and key not in values:
                raise ConfigError(f"{path}.{key} is not set; {thing.__name__} needs it")
    hints = _hints(thing)
    for key, value in values.items():
        if key in hints and not fits(hints[key], value):
            raise ConfigError(
                f"{path}.{key}={value!r} must be {_kinds(hints[key])}" + (f", not {type(value).__name__}" if not _words(hints[key]) else "")
            )


def _hints(thing: Any) -> dict[str, Any]:
    source = thing if dataclasses.is_dataclass(thing) or not inspect.isclass(thing) else thing.__init__
    try:
        return typing.get_type_hints(source)
    except Exception:  # annotations that cannot be resolved here are not checked
        return {}


def fits(kind: Any, value: Any) -> bool:
    """Whether a plain value can be of a type.  Nested settings and types that cannot be judged from here pass."""
    if isinstance(value, (Mapping, list)) or kind is Any or kind is inspect.Parameter.empty or isinstance(kind, (str, typing.TypeVar)):
        return True
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(option, value) for option in typing.get_args(kind))
    if origin is Literal:
        return value in typing.get_args(kind)
    if kind is None or kind is types.NoneType:
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (int, str, bool):
        return type(value) is kind
    kind = origin or kind
    return kind not in (tuple, list, dict, set, collections.abc.Callable, collections.abc.Sequence, collections.abc.Mapping)


def _words(kind: Any) -> tuple[Any, ...]:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(w for option in options if typing.get_origin(option) is Literal for w in typing.get_args(option))


def _kinds(kind: Any) -> str:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if words := _words(kind):
        return "one of " + ", ".join(map(str, words)) + (", null" if types.NoneType in options else "")
    names = []
    for option in options:
        if option is types.NoneType:
            names.append("null")
        elif typing.get_origin(option) is collections.abc.Callable or option is collections.abc.Callable:
            names.append("a schedule (_target_: posttrain.mixture.schedule.Linear)")
        elif (typing.get_origin(option) or option) in (tuple, list, collections.abc.Sequence):
            names.append("a list")
        elif (typing.get_origin(option) or option) in (dict, collections.abc.Mapping):
            names.append("a mapping")
        else:
            names.append(_name(option))
    return " or ".join(dict.fromkeys(names))
