"""What is told of the project beside its code: licences of the packages that it needs, and how to cite it."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FAMILIES = {
    "Apache": "Apache",
    "MIT": "MIT",
    "BSD": "BSD",
    "MPL": "MPL|Mozilla",
    "PSF": "Python Software Foundation|PSF",
}
"""What licences begin with, and the words by which a package's own description tells them."""


def needed() -> dict[str, str]:
    """The extra of each package that the project needs, by name; empty for those that are always installed."""
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    named = {name(line): extra for extra, lines in extras.items() for line in lines}
    return {package: extra for package, extra in named.items() if package != "rankpilot"}


def name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return match[0]


def listed() -> dict[str, tuple[str, str]]:
    """(licence, extra) of each package in LICENCES.md."""
    text = (ROOT / "LICENCES.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    kept = [row for row in rows if row[0] != "package" and not row[0].startswith("---")]
    assert all(all(row) for row in kept), "an empty cell"
    found = {row[0]: (row[1], row[2] if len(row) == 4 else "") for row in kept}
    assert len(found) == len(kept), "a package is listed twice"
    return found


def test_every_package_is_listed_with_its_extra() -> None:
    assert {package: extra for package, (_, extra) in listed().items()} == needed()


def test_a_licence_is_the_one_that_the_package_tells() -> None:
    told_by = 0
    for package in needed():
        try:
            told = metadata(package)
        except PackageNotFoundError:
            continue
        texts = [told.get("License-Expression"), told.get("License"), *(told.get_all("Classifier") or ())]
        words = " ".join(text for text in texts if text and ("License ::" in text or "::" not in text))
        if not words:
            continue
        family = re.match(r"[A-Z][A-Za-z]+", listed()[package][0])
        assert family, package
        assert re.search(FAMILIES[family[0]], words), (package, words[:300])
        told_by += 1
    assert told_by > 5


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["type"] == "software"
    assert citation["title"].startswith(PROJECT["name"])
    assert citation["message"]
    assert all(author["name"] for author in citation["authors"])
