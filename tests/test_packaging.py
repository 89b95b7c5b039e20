"""The wheel and the sdist: every package, every file that the package reads of its own, and that it works installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from .data.small_models import WORDS, save, write_rows

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_OURS = ("tests", "build", "dist", "docs", "examples", "scripts", "runs", "benchmarks", "tools")


def source_folders() -> set[str]:
    """Folders that hold an `__init__.py`, as dotted names below `rankpilot`."""
    paths = (path.parent.relative_to(ROOT).parts for path in ROOT.rglob("__init__.py"))
    return {".".join(("rankpilot", *parts)) for parts in paths if not parts or _is_ours(parts[0])}


def _is_ours(top: str) -> bool:
    return not top.startswith(".") and top not in NOT_OURS


LEFT_OUT = [f"env/{pattern}" for pattern in SETTINGS["exclude-package-data"]["rankpilot.env"]]
"""What the wheel does not hold: the bases of the test split alone."""


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def test_every_folder_of_source_is_a_package() -> None:
    assert sorted(source_folders()) == sorted(SETTINGS["packages"])
    assert SETTINGS["packages"] == sorted(SETTINGS["packages"])


def test_every_module_lies_in_a_package() -> None:
    folders = {folder_of(package) for package in SETTINGS["packages"]}
    modules = [path for path in ROOT.rglob("*.py") if _is_ours(path.relative_to(ROOT).parts[0])]
    modules.remove(ROOT / "integrations/site/sitecustomize.py")  # Python looks for it in a folder
    assert not [path for path in modules if path.parent not in folders]


def package_files() -> set[str]:
    """Files of the packages that belong to the checkout and to a wheel, as paths in it: source and data."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("only a git checkout tells which files belong to it")
    folders = [folder_of(package) for package in SETTINGS["packages"] if package != "rankpilot"]
    paths = [Path(line) for line in tracked.stdout.splitlines()]
    inside = [path for path in paths if any((ROOT / path).is_relative_to(folder) for folder in folders)]
    inside += [path for path in paths if len(path.parts) == 1 and path.suffix == ".py"]
    return {str(path) for path in inside if not any(path.match(pattern) for pattern in LEFT_OUT)}


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


MOST_BYTES = 6_000_000
"""Size of a wheel or an sdist, at most."""

SHIPPED = (
    "decide/plan/worth.json",
    "env/weights/llama-4x32/model.safetensors",
    "cost/devices.json",
    "data/assets.json",
    "cost/forecast/published_models.json",
    "integrations/site/sitecustomize.py",
    "study/assets/page.html",
    "study/assets/uplot/LICENSE",
    "study/assets/uplot/uPlot.iife.min.js",
    "py.typed",
)
"""Some of what the package reads of its own, of each kind."""

SOURCES = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the checkout, and a wheel that was built from the sdist alone."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    for name in package_files() | {*SOURCES, "py.typed", "Makefile", "CONTRIBUTING.md", "tests/test_packaging.py"}:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    _build(folder / "source", "sdist")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    source.rename(folder / "unpacked" / "rankpilot")
    _build(folder / "unpacked" / "rankpilot", "wheel", "../..")
    return folder


def _build(source: Path, kind: str, to: str = "..") -> None:
    code = f"from setuptools.build_meta import build_{kind} as build; build({to!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_sdist_holds_what_a_wheel_is_made_of_and_nothing_else(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    assert archive.stat().st_size <= MOST_BYTES
    with tarfile.open(archive) as file:
        held = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert held - made == package_files() | SOURCES | {"py.typed"}


def test_the_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size <= MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        held = {name for name in names if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        licences = {name.partition("/licenses/")[2] for name in names if ".dist-info/licenses/" in name}
    assert held == {f"rankpilot/{name}" for name in package_files() | {"py.typed"}}
    assert {f"rankpilot/{name}" for name in SHIPPED} <= held
    assert licences == {"LICENSE", "study/assets/uplot/LICENSE"}
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a virtual environment that has no other rankpilot; the folder of its programs.

    The packages that it needs come from the environment of the tests.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = (folder / "lib").glob("python3.*/site-packages")
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", f"--prefix={folder}"]
    done = subprocess.run(
        [*command, "--ignore-installed", str(wheel)], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # After the environment's own packages, so that an editable rankpilot among the others does not count.
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin"


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(installed: Path, folder: Path, *words: str) -> str:
    """What a program of the environment prints."""
    command = [str(installed / words[0]), *words[1:]]
    if words[0] == "rankpilot":
        command.insert(0, str(installed / "python"))
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


COMMANDS = """
import json, sys
from importlib.metadata import entry_points

(script,) = entry_points(group="console_scripts", name="rankpilot")
main = script.load()
for words in json.load(open(sys.argv[1])):
    sys.argv = words
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
"""
"""Runs command lines of programs in a file, one after the other, in one process that loads the libraries once."""


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    place = run(installed, tmp_path, "python", "-c", "import rankpilot; print(rankpilot.__file__)").strip()
    assert Path(place).is_relative_to(installed.parent)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(installed, tmp_path, "rankpilot", "--version").strip() == version
    options = ["--device-memory", "24GiB", "--batch-size", "1", "--max-length", "256", "--output", "card"]
    memory = ["rankpilot", "memory", "bert-base-uncased", *options]
    model = save("bert", tmp_path / "model")
    rows = [{"text": f"the film was {word}", "label": index % 3} for index, word in enumerate(WORDS * 8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--batch-size", "4", "--max-length", "16", "--steps", "12", "--budget", "80%", "--for", "peft"]
    allocate = ["rankpilot", "plan", model, data, *options, "--output", "plan.json", "--log", "log"]
    study = ["rankpilot", "study", "log", "--output", "page.html"]
    (tmp_path / "commands.json").write_text(json.dumps([[*memory, "--json"], allocate, study]))
    printed = run(installed, tmp_path, "python", "-c", COMMANDS, "commands.json")
    told, _ = json.JSONDecoder().raw_decode(printed)
    assert told["fits"]
    assert json.loads((tmp_path / "plan.json").read_text())["rank_pattern"]
    assert (tmp_path / "page.html").stat().st_size > 50_000
