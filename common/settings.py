"""Settings as JSON values, and settings from JSON values: one writer and one reader for all dataclasses of settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, shown
from .files import as_plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


MOST_LISTED = 20
"""Keys of one kind that an error lists at most."""


def as_json(kind: type[DataclassInstance], settings: DataclassInstance) -> dict[str, Any]:
    """Settings as JSON values: the fields of the dataclass `kind`, without those that a subclass of it adds."""
    values = asdict(settings)
    return {field.name: as_plain(values[field.name]) for field in fields(kind)}


def from_json(kind: type[Settings], values: Any, *, base: Settings | None = None, complete: bool = False) -> Settings:
    """Settings from what `as_json` made of them, or from a part of it.

    Args:
        kind: the dataclass.
        values: JSON values by key.
        base: has the settings that `values` lacks; without it they are the class's defaults.
        complete: refuse values that lack any key, even one with a default.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type, or the class refuses it.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"settings are keys with values; got {shown(values)}.")
    names = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}
    unknown = [key for key in values if key not in names]
    needed = [] if base else [name for name, required in names.items() if required or complete]
    missing = [name for name in needed if name not in values]
    if unknown or missing:
        both = (("unknown", unknown), ("missing", missing))
        problems = [f"{label} {', '.join(map(shown, keys[:MOST_LISTED]))}" for label, keys in both if keys]
        raise ConfigError(f"{' and '.join(problems)}; the settings are {', '.join(names)}.")
    types = get_type_hints(kind)
    read = {name: _read(types[name], value, name) for name, value in values.items()}
    return replace(base, **read) if base else kind(**read)


def _read(expected: Any, value: Any, name: str) -> Any:
    """One value in the type that its field has; ConfigError if it does not have that type."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType) and NoneType in arguments:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _read(inner, value, name)
    if is_dataclass(expected):
        assert isinstance(expected, type)
        try:
            return from_json(expected, value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, name) for item in value)
    if origin is Literal and value in arguments:
        return value
    if expected is Path and isinstance(value, str):
        return Path(value)
    if expected is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is expected:
        return value
    allowed = f"one of {', '.join(map(repr, arguments))}" if origin is Literal else _words(expected)
    raise ConfigError(f"{name} is {allowed}; got {shown(value)}.")


_WORDS = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}


def _words(expected: Any) -> str:
    """What a type is called in an error."""
    if get_origin(expected) is tuple:
        return f"a list, each item {_words(get_args(expected)[0])}"
    return _WORDS.get(expected, str(expected))
