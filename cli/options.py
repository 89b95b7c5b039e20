"""What commands share: settings from `--config FILE`, in JSON or YAML, and work on a cluster with `--cluster`."""

from __future__ import annotations

import json
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml

from ..common.files import MOST_YAML_BYTES, from_json, parse_yaml, read_json, read_text
from ..errors import ConfigError, shown
from .progress import console

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def peek(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option such as "--config", read ahead since it decides the defaults of the others.

    Raises:
        ConfigError: the option stands there without a value.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value")
    try:
        return cast(str | None, parser.parse_known_args(arguments)[0].value)
    except ArgumentError as error:
        raise ConfigError(f"{option} needs a value.") from error


def read_config_file(path: str | None) -> dict[str, Any]:
    """The settings in a file, as JSON values; none without a file.

    Raises:
        ConfigError: the file is missing, no JSON or YAML, or holds no settings by name.
    """
    if path is None:
        return {}
    try:
        values = _read(Path(path))
    except (OSError, ValueError) as error:  # text that is no UTF-8 or no JSON is a ValueError
        raise ConfigError(f"Cannot read the config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {path} holds no settings by name: {shown(values)}.")
    return values


def _read(path: Path) -> Any:
    """The values in a JSON file, or in a YAML file by its suffix; ValueError if they cannot be read."""
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    try:
        values = parse_yaml(read_text(path, MOST_YAML_BYTES))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    trainer = values.get("trainer") if isinstance(values, dict) else None
    if isinstance(trainer, dict):  # as people write it there
        values["trainer"] = [
            f"{name}={value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)}"
            for name, value in trainer.items()
        ]
    return values


def with_file_settings(base: Settings, values: dict[str, Any], path: str | None) -> Settings:
    """The settings `values` of the file at `path`; those that it lacks are as in `base`.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
    """
    try:
        return from_json(type(base), values, base=base)
    except ConfigError as error:
        raise ConfigError(f"The config file {path} does not fit: {error}") from error


def on_cluster(address: str | None, device: str = "cpu") -> AbstractContextManager[None]:
    """Let workers be processes of a cluster inside the block; without an address, they are this machine's.

    Args:
        address: see `running_on_cluster`.
        device: where episodes train.

    Raises:
        ConfigError: they would train on something else than CPUs, or see `running_on_cluster`.
        UnsupportedError: Ray is not installed.
    """
    if address is None:
        return nullcontext()
    from ..common.cluster import running_on_cluster
    from ..common.devices import find_device
    from ..env.stacked import rounding_digest

    if (found := find_device(device)).type != "cpu":
        raise ConfigError(f"Workers of a cluster train on CPUs, and --device {device} is {found}. Pass --device cpu.")
    return running_on_cluster(address, rounding_digest, lambda line: console.print(line, markup=False, soft_wrap=True))
