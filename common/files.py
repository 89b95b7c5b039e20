"""Files that are complete or absent, read within bounds; settings as JSON; and run folders.

Each file is written to a temporary name and then renamed. What is read may be a stranger's (SECURITY.md): text, JSON,
YAML with plain values alone, files of `torch.save`, and arrays with a description in safetensors files. The header of
such a file tells the type and shape of each tensor, and the format's reader checks that together they take the bytes
that follow: so no more is allocated than the file is long.

One writer and one reader serve all dataclasses of settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import platformdirs
from safetensors import SafetensorError, safe_open

from ..errors import CHECK_PATH, ConfigError, DataError, RankPilotError, RunFolderError, first_line, not_written, shown
from .arrays import Arrays
from .termination import Terminated

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def is_whole_archive(path: Path) -> bool:
    """Whether a file that `torch.save` wrote is whole. It packs nothing, so no entry can be longer than the file.

    Raises:
        OSError, BadZipFile, NotImplementedError, RuntimeError, EOFError: it cannot be read as an archive.
    """
    from zipfile import ZIP_STORED, ZipFile

    with ZipFile(path) as archive:
        entries = archive.infolist()
        plain = all(entry.compress_type == ZIP_STORED for entry in entries)
        return plain and sum(entry.file_size for entry in entries) <= path.stat().st_size and not archive.testzip()


def load_archive(path: Path, device: torch.device | str = "cpu") -> Any:
    """Tensors, numbers and texts from a file that `torch.save` wrote; objects of other kinds are refused.

    Raises:
        DataError: an entry is torn, or unpacks to more than the file is long.
        Exception: whatever zipfile and torch raise for other files.
    """
    import torch

    if not is_whole_archive(path):
        raise DataError(f"{path.name} is torn")
    return torch.load(path, map_location=device, weights_only=True)


MOST_TEXT_BYTES = 2**26
"""Bytes of a text or JSON file, at most; more are refused before they are read."""

_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)

MOST_LINES_BYTES = 2**29
"""Bytes of a file of JSON lines, at most."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    It works for a file and for a folder; an existing file or folder of that name is replaced. A reader sees either the
    old content or the new one, never a part of it. While a folder is replaced, there is none for a moment.

    Raises:
        RunFolderError: the system refuses to write it, as on a full disk.
    """
    with writing(path), _whole(path) as temporary:
        yield temporary


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunFolderError where the system refuses what the block writes to `path`, as on a full disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RankPilotError) or not not_written(error):
            raise
        raise RunFolderError(f"{path} cannot be written: {first_line(error)}. {CHECK_PATH}") from error


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    replaced = scratch / "replaced"
    try:
        temporary = scratch / path.name
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rename(replaced)
        temporary.replace(path)
    except BaseException:
        if replaced.is_dir() and not path.exists():
            replaced.rename(path)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def as_plain(value: Any) -> Any:
    """A value of dicts, tuples, paths and scalars as it comes back from JSON: lists for tuples, text for paths."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe to which nobody writes is then empty, and not waited for."""
    if not hasattr(os, "O_NONBLOCK"):
        return os.open(path, flags)
    opened = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(opened, True)
    return opened


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file; of a pipe or a device no more than `most` is read either.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes.
    """
    with open(path, "rb", opener=_without_waiting) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise DataError(f"{path} has more than {most:,} bytes, which is the most that is read of such a file.")
    return content


def read_text(path: Path, most: int = MOST_TEXT_BYTES) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, or is no text in UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {first_line(error)}.") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested more deeply than Python reads, or has half of a surrogate pair in a text,
            which no file could be written with.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise DataError("It is nested too deeply.") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("It has half of a surrogate pair in a text.") from error
    return value


def read_json(path: Path, most: int = MOST_TEXT_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, or is no JSON.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {first_line(error)}") from error


def read_object(path: Path, most: int = MOST_TEXT_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds values by name.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, is no JSON, or holds something else.
    """
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no values by name: {shown(value)}.")
    return value


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object and flush it to disk.

    A last line that a killed process left incomplete is ended first; `read_json_lines` skips it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                stream.write(b"\n")
        stream.write((json.dumps(value) + "\n").encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON objects, one a line, in one step; NaN and infinity are refused."""
    write_text(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSON-lines file; an absent file counts as empty.

    Raises:
        DataError: it has more than `MOST_LINES_BYTES`, or is no text in UTF-8.
    """
    if not path.exists():
        return []
    rows = []
    for line in read_text(path, MOST_LINES_BYTES).splitlines():
        with suppress(ValueError):
            rows.append(parse_json(line))
    return rows


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


MOST_YAML_BYTES = 2**22
"""Bytes of a YAML file, at most: reading takes some seconds for each MiB."""

_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises besides its own errors, for values such as `!!int ''` or a 13th month."""


@cache
def _plain_loader() -> Any:
    """PyYAML, and its safe loader without references: a few of them stand for more values than any memory holds."""
    import yaml  # which takes a while, and most commands read none

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "references (*name) are not read; write values out", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    told = f"{shown(key.value)} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml, PlainLoader


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: dicts, lists and scalars, each in one place only.

    Raises:
        YAMLError: it is no YAML, is nested more deeply than Python reads, has a key twice, references (`*name`), or
            tags that ask for objects.
    """
    yaml, loader = _plain_loader()
    try:
        return yaml.load(text, loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except _FAULTS as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from error


MOST_TENSOR_BYTES = 2**31
"""Bytes of a file of tensors, at most."""

PICKLES = (b"PK", b"\x80")
"""How files begin that `torch.save` and `pickle` write, which are never opened."""


def check_tensor_file(path: Path, most: int = MOST_TENSOR_BYTES) -> None:
    """Refuse a file before it is opened as one of tensors.

    Raises:
        OSError: there is no such file.
        DataError: it is no file, has more than `most` bytes, or is a pickle.
    """
    size = path.stat().st_size
    if not path.is_file() or size > most:
        raise DataError(f"{path} is no file, or has more than {most:,} bytes, the most that is read of such a file.")
    with path.open("rb") as stream:
        head = stream.read(9)
    if head.startswith(PICKLES) and head[8:] != b"{":  # the header follows its length, whose bytes may be any
        raise DataError(f"{path} is a pickle or zip file in disguise and was not opened.")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a file, by name; only its header is read.

    Raises:
        DataError: the file is missing or no safetensors file.
    """
    try:
        check_tensor_file(path, most=2**63)
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as tensors: {first_line(error)}") from error


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """All arrays of a file by name, and the texts that describe them.

    Raises:
        DataError: the file is missing, too large, no safetensors file, or holds types that numpy does not have.
    """
    try:
        check_tensor_file(path)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file is no dict)
        return arrays, metadata
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as arrays: {first_line(error)}") from error


def expanded(name: str) -> Path:
    """A path with the home folder in place of ~; that of a user who is not there stays as it is."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser would raise)


CACHE_VARIABLE = "RANKPILOT_CACHE"
"""Environment variable that moves the cache folder."""


def cache_folder() -> Path:
    """The folder that holds downloads: `RANKPILOT_CACHE`, or else the user's cache folder for rankpilot."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (expanded(chosen) if chosen else platformdirs.user_cache_path("rankpilot")).absolute()


CONFIG = "config.json"

LOCK = ".lock"
"""File in the folder that the process which uses it has locked. The system frees the lock when the process ends."""


@contextmanager
def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Claim a run folder for as long as the block lasts.

    Args:
        folder: the run's folder.
        config: what the run does, as JSON values; written there.
        resume: go on with what is there; the settings must be the same.

    Raises:
        RunFolderError: it holds another run or one with other settings, it is a file, or another process uses it.
    """
    from filelock import FileLock, Timeout  # which loads asyncio

    refuse_file(folder)
    # A run that wrote no settings has left nothing but its lock.
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        _check(folder, config, resume)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFolderError(
            f"Another process works in {folder}. Wait until it ends, or pass another --output."
        ) from error
    try:
        if (folder / CONFIG).exists():
            _check(folder, config, resume)  # once more: another process may have been faster
        else:
            write_json(folder / CONFIG, config)
        try:
            yield
        except RankPilotError:
            if {path.name for path in folder.iterdir()} <= {CONFIG, LOCK}:  # nothing is done: the name is free again
                (folder / CONFIG).unlink(missing_ok=True)
            raise
    except (KeyboardInterrupt, Terminated) as end:
        end.add_note("The same command with --resume continues from here.")
        raise
    finally:
        lock.release()


def refuse_file(folder: Path) -> None:
    """Raise RunFolderError where a folder is to be and a file is, or where none can be."""
    if "\0" in str(folder):
        raise RunFolderError(f"{shown(str(folder))} is no name of a folder. Pass another one as --output.")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file. Pass the name of a folder as --output.")


def _check(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that does not hold this run."""
    if not resume:
        raise RunFolderError(f"{folder} exists already. Pass --resume to go on with it, or another --output.")
    path = folder / CONFIG
    if not path.exists():
        raise RunFolderError(f"{folder} is not empty and holds no {CONFIG}, so it is no run of rankpilot's.")
    try:
        previous = read_object(path)
    except ValueError as error:
        raise RunFolderError(f"This version of rankpilot cannot go on with {path}: {error}") from error
    differing = sorted(key for key in {*previous, *config} if previous.get(key) != config.get(key))
    if differing:
        told = "; ".join(
            f"{key:.80}: {shown(previous.get(key))} there, {shown(config.get(key))} now" for key in differing[:3]
        )
        raise RunFolderError(f"{folder} was started with other settings ({told}). Use those, or another --output.")


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
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        problems = []
        for argument in arguments:
            if argument is not NoneType:
                try:
                    return _read(argument, value, name)
                except ConfigError as error:
                    problems.append(str(error).removesuffix(f"; got {shown(value)}."))
        others = "".join(f", or {problem.removeprefix(f'{name} is ')}" for problem in problems[1:])
        raise ConfigError(f"{problems[0]}{others}; got {shown(value)}.")
    if is_dataclass(expected):
        assert isinstance(expected, type)
        try:
            return from_json(expected, value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, name) for item in value)
    if origin is Literal and any(type(value) is type(each) and value == each for each in arguments):
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
