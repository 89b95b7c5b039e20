"""The wheel: every package, and every file that the package reads of its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_OURS = ("tests", "build", "dist", "docs", "examples", "scripts", "runs")


def source_folders() -> set[str]:
    """Folders that hold an `__init__.py`, as dotted names below `rankpilot`."""
    paths = (path.parent.relative_to(ROOT).parts for path in ROOT.rglob("__init__.py"))
    return {".".join(("rankpilot", *parts)) for parts in paths if not parts or _is_ours(parts[0])}


def _is_ours(top: str) -> bool:
    return not top.startswith(".") and top not in NOT_OURS


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def test_every_folder_of_source_is_a_package() -> None:
    assert sorted(source_folders()) == sorted(SETTINGS["packages"])
    assert SETTINGS["packages"] == sorted(SETTINGS["packages"])


def test_every_module_lies_in_a_package() -> None:
    folders = {folder_of(package) for package in SETTINGS["packages"]}
    modules = [path for path in ROOT.rglob("*.py") if _is_ours(path.relative_to(ROOT).parts[0])]
    assert not [path for path in modules if path.parent not in folders]


def package_files() -> set[str]:
    """Files of the packages that belong to the checkout, as paths in it: source and data."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("only a git checkout tells which files belong to it")
    folders = [folder_of(package) for package in SETTINGS["packages"] if package != "rankpilot"]
    paths = [Path(line) for line in tracked.stdout.splitlines()]
    inside = [path for path in paths if any((ROOT / path).is_relative_to(folder) for folder in folders)]
    return {str(path) for path in [*inside, *(path for path in paths if len(path.parts) == 1 and path.suffix == ".py")]}


def test_every_file_of_a_package_is_named() -> None:
    named = {
        str(path.relative_to(ROOT))
        for package, patterns in SETTINGS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    assert not sorted(name for name in package_files() - named if not name.endswith(".py"))
    for package, patterns in SETTINGS["package-data"].items():
        for pattern in patterns:
            assert any(folder_of(package).glob(pattern)), f"{package}: nothing matches {pattern}"


def test_the_wheel_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    names = package_files() | {"pyproject.toml", "README.md", "LICENSE", "py.typed"}
    for name in names:
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "source", capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {f"rankpilot/{name}" for name in names - {"pyproject.toml", "README.md", "LICENSE"}}
