"""Shared parts of commands: grouped options, settings from `--config FILE`, and clusters with `--cluster`."""

from __future__ import annotations

import inspect
import json
import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from ..common.errors import REMOVED, ConfigError, shown
from ..common.files import MOST_YAML_BYTES, from_json, parse_yaml, read_json, read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


TRAINER_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "eval_every": "eval_steps",
    "eval_batch_size": "per_device_eval_batch_size",
    "best": "load_best_model_at_end",
    "alpha": "lora_alpha",
}
"""Names in transformers, TRL and PEFT of settings with a shorter name here; options accept both."""

GROUPS = {
    "plan": (
        "What decides the ranks, and its limits.",
        "policy budget goal tolerance bounds exact_savers gradient_checkpointing keep_rate",
    ),
    "step": (
        "The batch, the adapter and how a step is computed.",
        "batch_size accumulation max_length target_modules target_parameters optimizer quantization prepare_kbit bf16 "
        "stream",
    ),
    "run": ("Length of the run and learning rate.", "steps epochs learning_rate control alpha scaling seed trainer"),
    "data": ("Rows and columns to read.", "task labels text_column label_column train_rows held_out_rows"),
    "evaluation": (
        "Evaluation, checkpoints and baselines.",
        "eval_every eval_batch_size best early_stopping compare_uniform compare_all_linear",
    ),
}
"""Option groups in --help, with a description and their settings; all other settings come first."""


def parse(
    kind: type[Settings],
    arguments: Sequence[str],
    default: Settings,
    prog: str,
    grouped: Mapping[str, tuple[str, str]] = GROUPS,
) -> Settings:
    """Parse settings from the command line.

    tyro shows a group for each nested dataclass, so the settings are parsed as nested dataclasses.

    Args:
        kind: dataclass of the settings.
        arguments: the command line.
        default: default settings; `tyro.MISSING` for required ones.
        prog: name of the command in --help.
        grouped: option groups in --help, each with a description and its settings in order.

    Raises:
        ConfigError: a size is 0, an option was removed, or a setting is invalid.
    """
    for size in ("--batch-size", "--per-device-train-batch-size", "--max-length"):
        if peek(arguments, size) == "0":
            raise ConfigError(f"{size} must be at least 1; got 0. Leave it out for the default.")
    hints, names = get_type_hints(kind, include_extras=True), [each.name for each in fields(kind)]
    for name, instead in REMOVED.items():
        if name not in names and any(word.partition("=")[0] == f"--{name}" for word in arguments):
            raise ConfigError(f"The option --{name} was removed: {instead}")
    groups: dict[str, Any] = {}

    def option(name: str) -> tuple[str, Any, Any]:
        hint, told = _quick(hints[name]), dict[str, Any]()
        if other := TRAINER_NAMES.get(name):
            told["aliases"] = [f"--{other.replace('_', '-')}"]
        if hints[name] in (str | None, Path | None):
            told["metavar"] = "PATH" if hints[name] == Path | None else "STR"
        if not getattr(default, name):  # its documentation says what none, no or 0 means, if it needs to
            told["help_behavior_hint"] = ""
        return name, Annotated[hint, tyro.conf.arg(**told)], getattr(default, name)

    def flat(parsed: Any) -> Settings:
        return kind(**{name: getattr(getattr(parsed, groups.get(name, ""), parsed), name) for name in names})

    made = [*map(option, names)]
    for title, (about, members) in grouped.items():
        order = members.split()
        inside = sorted((each for each in made if each[0] in order), key=lambda each: order.index(each[0]))
        if inside:
            group = make_dataclass(title, inside, frozen=True, namespace={"__doc__": f"{about}\n\n{_attributes(kind)}"})
            groups |= dict.fromkeys((name for name, *_ in inside), f"{title}_options")
            made.append((f"{title}_options", Annotated[group, tyro.conf.arg(name=title)], group()))
    about, *_ = (inspect.getdoc(kind) or "").partition("Attributes:")
    checked = {"__doc__": about + _attributes(kind), "__post_init__": flat}
    ungrouped = [each for each in made if each[0] not in groups]
    whole = make_dataclass(kind.__name__, ungrouped, frozen=True, namespace=checked)
    return flat(tyro.cli(whole, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,)))


NEW_TYRO = hasattr(tyro, "constructors")
"""False for versions below 0.9, which LLaMA-Factory requires: they parse by their own rules."""


def _texts() -> Any:
    """Return the type of `tuple[str, ...]` for tyro."""
    if not NEW_TYRO:
        return tuple[str, ...]
    spec = tyro.constructors.PrimitiveConstructorSpec[Any](
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    )
    return Annotated[tuple, spec]


def _number_or(words: tuple[Any, ...], kind: type[int | float]) -> Any:
    """A number or one of these words. Other text is passed on: the settings tell in one line what they accept."""

    def read(given: list[str]) -> Any:
        try:
            return kind(given[0])
        except ValueError:
            return given[0]

    return tyro.constructors.PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar=f"{kind.__name__.upper()}|{{{','.join(words)}}}",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | float | str),
        str_from_instance=lambda value: [str(value)],
    )


def _quick(hint: Any) -> Any:
    """Rewrite a type for tyro's own checks; for `X | Y` and `tuple[str, ...]` it would load typeguard, and asyncio."""
    if get_origin(hint) is Annotated:
        return Annotated[(_quick(hint.__origin__), *hint.__metadata__)]
    kinds = get_args(hint)
    if NEW_TYRO and len(kinds) == 2 and kinds[0] in (int, float) and get_origin(kinds[1]) is Literal:
        return Annotated[Any, _number_or(get_args(kinds[1]), kinds[0])]
    if isinstance(hint, UnionType):
        return Union[kinds]  # noqa: UP007
    return _texts() if hint == tuple[str, ...] else hint


def _attributes(kind: type) -> str:
    """Merge the attribute docs of a class and its bases into one section; subclasses take precedence."""
    docs = [re.search(r"^Attributes:\n((?: .*\n?|\n)+)", inspect.getdoc(base) or "", re.M) for base in kind.mro()[::-1]]
    return "Attributes:\n" + "".join(f"{found[1].rstrip()}\n" for found in docs if found)


def peek(arguments: Sequence[str], option: str) -> str | None:
    """Value of an option such as "--config", read ahead because it determines the defaults of the others.

    Raises:
        ConfigError: the option has no value.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option, dest="value")
    try:
        return cast(str | None, parser.parse_known_args(arguments)[0].value)
    except ArgumentError as error:
        raise ConfigError(f"{option} requires a value.") from error


def read_config_file(path: str | None) -> dict[str, Any]:
    """Read the settings in a file, as JSON values; empty without a file.

    Raises:
        ConfigError: the file is missing, is not JSON or YAML, or holds no named settings.
    """
    if path is None:
        return {}
    try:
        values = _read(Path(path))
    except (OSError, ValueError) as error:  # invalid UTF-8 or JSON is a ValueError
        raise ConfigError(f"Cannot read the config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {path} must be a mapping of setting names to values; got {shown(values)}.")
    return values


def _read(path: Path) -> Any:
    """Read a JSON file, or a YAML file by its suffix; ValueError if it is invalid."""
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    from yaml import YAMLError  # slow to import

    try:
        values = parse_yaml(read_text(path, MOST_YAML_BYTES))
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(values, dict):
        return values
    for name in ("parts", "stream"):
        if isinstance(given := values.get(name), bool):  # YAML reads on and off as booleans
            values[name] = "on" if given else "off"
    trainer = values.get("trainer")
    if isinstance(trainer, dict):  # users write it there
        values["trainer"] = [
            f"{name}={value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)}"
            for name, value in trainer.items()
        ]
    return values


def with_file_settings(base: Settings, values: dict[str, Any], path: str | None) -> Settings:
    """Apply the settings `values` of the file at `path`; missing ones come from `base`.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or out of range.
    """
    own = {other: name for name, other in TRAINER_NAMES.items()}
    try:
        return from_json(type(base), {own.get(name, name): value for name, value in values.items()}, base=base)
    except ConfigError as error:
        raise ConfigError(f"Invalid config file {path}: {error}") from error
