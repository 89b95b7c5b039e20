"""The file that a page or its data go into: a name that is free, or one that was written before."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigError

PAGE = "study.html"
"""The usual name of a page."""


def check_page_output(output: Path | None, *, json: bool) -> None:
    """Refuse a file that something else would be lost from.

    Args:
        output: as given; None for the usual place.
        json: whether data are written, and no page.

    Raises:
        ConfigError: it is a folder, or a file that is neither a page nor data.
    """
    if output is None or not output.exists():
        return
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder. Pass the name of a file, such as {output / PAGE}.")
    start = b"{" if json else b"<!DOCTYPE html>"
    with output.open("rb") as stream:
        if stream.read(len(start)) != start:
            kind = "JSON" if json else "page"
            raise ConfigError(f"--output {output} exists and is no {kind}. Pass a name that is free.")
