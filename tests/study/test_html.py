"""The page as one file."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

from rankpilot.study.page import ASSETS, SCRIPTS, STYLES, study_html, write_page

HOSTILE = "</script><img src=x onerror=alert(1)>{{script}} \\1"


def data_of(page: str) -> object:
    packed = re.search(r'id="data">([^<]*)</script>', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_it_is_small_and_fetches_nothing() -> None:
    page = study_html({})
    assert len(page.encode()) < 300_000
    assert "default-src 'none'" in page
    assert not re.search(
        r"""\bsrc\s*=|<link|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon""", page
    )
    assert not re.search(r"""href\s*=\s*["'](?!#)""", page)


def test_data_come_back_and_cannot_end_the_script() -> None:
    page = study_html({"runs": [{"name": HOSTILE, "é": "ß"}]})
    assert data_of(page) == {"runs": [{"name": HOSTILE, "é": "ß"}]}
    assert "onerror" not in page
    assert page.count("{{") == 0
    assert page.count("</script>") == 2


def test_text_enters_the_page_as_text_alone() -> None:
    code = "".join((ASSETS / name).read_text() for name in SCRIPTS if not name.startswith("uplot"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", code)


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page({"runs": []}, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_every_asset_is_in_the_page() -> None:
    present = {str(path.relative_to(ASSETS)) for path in ASSETS.rglob("*") if path.is_file()}
    assert present == {*STYLES, *SCRIPTS, "page.html", "uplot/LICENSE"}
    for name in SCRIPTS:
        lines = (ASSETS / name).read_text().splitlines()
        assert len(lines) <= 400, name
