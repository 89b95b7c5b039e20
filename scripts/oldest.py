"""Prints the oldest version of each package that pyproject.toml allows, one a line, as pip takes constraints."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oldest(extra: str | None = None) -> dict[str, str]:
    """The lowest version of each direct dependency, by name.

    Args:
        extra: with the packages of this extra, and of the extras that it names.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions: dict[str, str] = {}
    waiting = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    while waiting:
        line = waiting.pop(0)
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[([a-z0-9,]+)\])?(?:>=([0-9.]+)(?:,<[0-9.]+)?)?", line)
        if match is None or (match[3] is None and match[1] != project["name"]):
            raise ValueError(f"{line!r} in pyproject.toml has no lowest version, as NAME>=VERSION.")
        if match[1] == project["name"]:
            waiting += [needed for other in match[2].split(",") for needed in project["optional-dependencies"][other]]
        else:
            versions[match[1]] = match[3]
    return versions


def main() -> None:
    """Print the constraints, with the extra that is given."""
    extra = sys.argv[1] if len(sys.argv) > 1 else None
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in oldest(extra).items()))


if __name__ == "__main__":
    main()
