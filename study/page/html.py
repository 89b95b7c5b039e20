"""The study page as one file: its text, style, code and data, and nothing that is fetched."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.files import write_text

ASSETS = Path(__file__).parent / "assets"

STYLES = ("uplot/uPlot.min.css", "page.css")
SCRIPTS = (
    "uplot/uPlot.iife.min.js",
    "unpack.js",
    "elements.js",
    "heatmap.js",
    "charts.js",
    "evidence.js",
    "decisions.js",
    "page.js",
)
"""In the order in which they run; each uses what those before it define."""


def study_html(data: Mapping[str, Any]) -> str:
    """The page of some runs.

    Args:
        data: see `page_data`.
    """
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0)
    parts = {
        "style": "\n".join(_asset(name) for name in STYLES),
        "script": "\n".join(_asset(name) for name in SCRIPTS),
        "data": base64.b64encode(packed).decode("ascii"),
    }
    # In one pass: what is put in may look like a place to put something.
    return re.sub(r"\{\{(style|script|data)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def write_page(data: Mapping[str, Any], path: Path) -> None:
    """Write the page of some runs; equal data give equal bytes.

    Args:
        data: see `page_data`.
        path: of the page; a file that is there is replaced.
    """
    write_text(path, study_html(data))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
