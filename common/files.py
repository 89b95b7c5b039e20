"""Atomic file writes and bounded reads; settings as JSON; and run folders.

Each file is written to a temporary name and then renamed. Files to read may be untrusted (SECURITY.md): text, JSON,
YAML limited to plain values, `torch.save` files, and safetensors files of arrays with a description. The header of a
safetensors file gives the type and shape of each tensor, and the format's reader checks their total size against the
file: memory use is therefore limited to the file's size.

One writer and one reader serve all settings dataclasses.
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

from .arrays import Arrays
from .errors import (
    CHECK_PATH,
    REMOVED,
    ConfigError,
    DataError,
    RankPilotError,
    RunFolderError,
    first_line,
    not_written,
    shown,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def is_whole_archive(path: Path) -> bool:
    """True if a `torch.save` file is complete. It is uncompressed, so no entry can be longer than the file.

    Raises:
        OSError, BadZipFile, NotImplementedError, RuntimeError, EOFError: it cannot be read as an archive.
    """
    from zipfile import ZIP_STORED, ZipFile

    with ZipFile(path) as archive:
        entries = archive.infolist()
        plain = all(entry.compress_type == ZIP_STORED for entry in entries)
        return plain and sum(entry.file_size for entry in entries) <= path.stat().st_size and not archive.testzip()


def load_archive(path: Path) -> Any:
    """Load tensors, numbers and texts from a `torch.save` file; objects of other kinds are rejected.

    Raises:
        DataError: an entry is truncated, or unpacks to more than the file's size.
        Exception: any error of zipfile and torch for other files.
    """
    import torch

    if not is_whole_archive(path):
        raise DataError(f"{path.name} is corrupt")
    return torch.load(path, map_location="cpu", weights_only=True)


MOST_TEXT_BYTES = 2**26
"""Maximum bytes of a text or JSON file, checked before reading."""

_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)

MOST_LINES_BYTES = 2**29
"""Maximum bytes of a JSON-lines file."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    Works for files and folders; an existing one of that name is replaced. A reader sees either the old or the new
    content, never a mix. While a folder is being replaced, it is briefly absent.

    Raises:
        RunFolderError: the system refuses the write, for example on a full disk.
    """
    with writing(path), _whole(path) as temporary:
        yield temporary


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunFolderError if the system refuses the block's writes to `path`, for example on a full disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RankPilotError) or not not_written(error):
            raise
        raise RunFolderError(f"Cannot write {path}: {first_line(error)}. {CHECK_PATH}") from error


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
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically; NaN and infinity are rejected."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def as_plain(value: Any) -> Any:
    """Convert dicts, tuples, paths and scalars as a JSON round trip would: tuples to lists, paths to text."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking; a named pipe without a writer reads as empty."""
    if not hasattr(os, "O_NONBLOCK"):
        return os.open(path, flags)
    opened = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(opened, True)
    return opened


def read_bytes(path: Path, most: int) -> bytes:
    """Read the content of a file; at most `most` bytes are read even from a pipe or a device.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes.
    """
    with open(path, "rb", opener=_without_waiting) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise DataError(f"{path} exceeds {most:,} bytes, the limit for such a file.")
    return content


def read_text(path: Path, most: int = MOST_TEXT_BYTES) -> str:
    """Read the text of a file, without a byte order mark.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, or is not valid UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {first_line(error)}.") from error


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not JSON, exceeds Python's nesting limit, or contains half of a surrogate pair, impossible to
            write to a file.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise DataError("It is nested too deeply.") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("It contains half of a surrogate pair.") from error
    return value


def read_json(path: Path, most: int = MOST_TEXT_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, or is not JSON.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {first_line(error)}") from error


def read_object(path: Path, most: int = MOST_TEXT_BYTES) -> dict[str, Any]:
    """Read a JSON file containing an object.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it has more than `most` bytes, is not JSON, or holds something else.
    """
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise DataError(f"{path} must be a mapping of names to values; got {shown(value)}.")
    return value


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object and flush it to disk.

    An incomplete last line, left by a killed process, is terminated first; `read_json_lines` skips it.
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
    """Write JSON objects atomically, one per line; NaN and infinity are rejected."""
    write_text(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines of a JSON-lines file; a missing file counts as empty.

    Raises:
        DataError: it has more than `MOST_LINES_BYTES`, or is not valid UTF-8.
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
"""Maximum bytes of a YAML file: parsing takes some seconds per MiB."""

_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors raised by PyYAML besides its own, for values such as `!!int ''` or a 13th month."""


@cache
def _plain_loader() -> Any:
    """Return PyYAML, and its safe loader without references: a few of them can expand beyond any memory."""
    import yaml  # slow to import, and most commands read no YAML

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                told = "references (*name) are not supported; write the values out"
                raise yaml.composer.ComposerError(None, None, told, self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    told = f"{shown(key.value)} appears twice"
                    raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml, PlainLoader


def parse_yaml(text: str) -> Any:
    """Parse a YAML text: dicts, lists and scalars, without aliases.

    Raises:
        YAMLError: it is not YAML, exceeds Python's nesting limit, has a duplicate key, references (`*name`), or object
            tags.
    """
    yaml, loader = _plain_loader()
    try:
        return yaml.load(text, loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except _FAULTS as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from error


MOST_TENSOR_BYTES = 2**31
"""Maximum bytes of a tensor file."""

PICKLES = (b"PK", b"\x80")
"""First bytes of `torch.save` and `pickle` files, never opened here."""


def check_tensor_file(path: Path, most: int = MOST_TENSOR_BYTES) -> None:
    """Check a file before opening it as a tensor file.

    Raises:
        OSError: there is no such file.
        DataError: it is not a regular file, has more than `most` bytes, or is a pickle.
    """
    size = path.stat().st_size
    if not path.is_file() or size > most:
        raise DataError(f"{path} is not a file, or exceeds {most:,} bytes, the limit for such a file.")
    with path.open("rb") as stream:
        head = stream.read(9)
    if head.startswith(PICKLES) and head[8:] != b"{":  # the header follows its length, encoded in arbitrary bytes
        raise DataError(f"{path} is a pickle or zip file in disguise and was not opened.")


@contextmanager
def _tensors(path: Path, what: str, most: int) -> Iterator[Any]:
    """Open a tensor file; DataError if it, or what the block reads of it, is invalid."""
    try:
        check_tensor_file(path, most)
        with safe_open(path, framework="np") as file:
            yield file
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"Cannot read {path} as {what}: {first_line(error)}") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a file's tensors, by name, from the header alone.

    Raises:
        DataError: the file is missing or not a safetensors file.
    """
    with _tensors(path, "tensors", most=2**63) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read all arrays of a file by name, and its metadata.

    Raises:
        DataError: the file is missing, too large, not a safetensors file, or holds types without a NumPy equivalent.
    """
    with _tensors(path, "arrays", MOST_TENSOR_BYTES) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (no dict)


def expanded(name: str) -> Path:
    """Expand ~ to the home folder; the path of an unknown user is unchanged."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser would raise)


CACHE_VARIABLE = "RANKPILOT_CACHE"
"""Environment variable for the cache folder."""


def cache_folder() -> Path:
    """Folder for downloads: `RANKPILOT_CACHE`, or else the user's cache folder for rankpilot."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (expanded(chosen) if chosen else platformdirs.user_cache_path("rankpilot")).absolute()


CONFIG = "config.json"

LOCK = ".lock"
"""Lock file of the process using the folder. The system releases the lock when the process ends."""


@contextmanager
def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Claim a run folder for the duration of the block.

    Args:
        folder: the run's folder.
        config: settings of the run, as JSON values; written to the folder.
        resume: continue an existing run; the settings must be the same.

    Raises:
        RunFolderError: it holds another run or one with other settings, it is a file, or another process uses it.
    """
    from filelock import FileLock, Timeout  # loads asyncio

    refuse_file(folder)
    # A run that wrote no settings has left only its lock.
    if not folder.exists() or all(path.name == LOCK for path in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        _check(folder, config, resume)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        advice = "Wait until it ends, or pass another --output."
        raise RunFolderError(f"Another process is using {folder}. {advice}") from error
    try:
        if (folder / CONFIG).exists():
            _check(folder, config, resume)  # again: another process may have been faster
        else:
            write_json(folder / CONFIG, config)
        try:
            yield
        except RankPilotError:
            if {path.name for path in folder.iterdir()} <= {CONFIG, LOCK}:  # nothing is done: free the name again
                (folder / CONFIG).unlink(missing_ok=True)
            raise
    except KeyboardInterrupt as end:
        end.add_note("Run the same command with --resume to continue.")
        raise
    finally:
        lock.release()


def refuse_file(folder: Path) -> None:
    """Raise RunFolderError if a file is in the folder's place, or the folder cannot be created."""
    if "\0" in str(folder):
        raise RunFolderError(f"{shown(str(folder))} is not a valid folder name. Pass another one as --output.")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file. Pass a folder as --output.")


def _check(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Raise RunFolderError if a folder does not hold this run."""
    if not resume:
        raise RunFolderError(f"{folder} already exists. Pass --resume to continue it, or another --output.")
    path = folder / CONFIG
    if not path.exists():
        raise RunFolderError(f"{folder} is not empty and has no {CONFIG}, so it is not a run of rankpilot.")
    try:
        previous = read_object(path)
    except ValueError as error:
        raise RunFolderError(f"This version of rankpilot cannot continue {path}: {error}") from error
    differing = sorted(key for key in {*previous, *config} if previous.get(key) != config.get(key))
    if differing:
        told = "; ".join(
            f"{key:.80}: {shown(previous.get(key))} then, {shown(config.get(key))} now" for key in differing[:3]
        )
        raise RunFolderError(f"{folder} was started with other settings ({told}). Use those, or another --output.")


MOST_LISTED = 20
"""Maximum keys of one kind listed in an error."""


def as_json(kind: type[DataclassInstance], settings: DataclassInstance) -> dict[str, Any]:
    """Convert settings to JSON values: the fields of the dataclass `kind`, without those added by a subclass."""
    values = asdict(settings)
    return {field.name: as_plain(values[field.name]) for field in fields(kind)}


def from_json(kind: type[Settings], values: Any, *, base: Settings | None = None, complete: bool = False) -> Settings:
    """Restore settings from the output of `as_json`, or part of it.

    Args:
        kind: the dataclass.
        values: JSON values by key.
        base: source of settings missing from `values`; default: the class's defaults.
        complete: reject values with a missing key, even one with a default.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type, or the class rejects it.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"settings must be a mapping of names to values; got {shown(values)}.")
    names = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}
    unknown = [key for key in values if key not in names]
    needed = [] if base else [name for name, required in names.items() if required or complete]
    missing = [name for name in needed if name not in values]
    for key in REMOVED.keys() & {*unknown}:
        raise ConfigError(f"The option {key} was removed: {REMOVED[key]}")
    if unknown or missing:
        both = (("unknown", unknown), ("missing", missing))
        problems = [f"{label} {', '.join(map(shown, keys[:MOST_LISTED]))}" for label, keys in both if keys]
        raise ConfigError(f"{' and '.join(problems)}; valid settings are {', '.join(names)}.")
    types = get_type_hints(kind)
    read = {name: _read(types[name], value, name) for name, value in values.items()}
    return replace(base, **read) if base else kind(**read)


def _read(expected: Any, value: Any, name: str) -> Any:
    """Convert one value to the type of its field; ConfigError if it has another type."""
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
        others = "".join(f", or {problem.removeprefix(f'{name} must be ')}" for problem in problems[1:])
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
    raise ConfigError(f"{name} must be {allowed}; got {shown(value)}.")


_WORDS = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}


def _words(expected: Any) -> str:
    """Name of a type in errors."""
    if get_origin(expected) is tuple:
        return f"a list where each item is {_words(get_args(expected)[0])}"
    return _WORDS.get(expected, str(expected))
