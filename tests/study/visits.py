"""A page in a browser, for tests: opened with the network off, by pointer and by keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason='playwright is missing: pip install -e ".[test]"')
PHONE, DESKTOP = 360, 1200

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
"""Programs that show the page as Chromium does; RANKPILOT_BROWSER names another."""


def find_browser() -> str | None:
    """The path of a browser on this machine: the one named, one on the PATH, or one that playwright downloaded."""
    named = os.environ.get("RANKPILOT_BROWSER")
    if named:
        return named
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    caches = (Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright")
    downloaded = (path for cache in caches for path in sorted(cache.glob("chromium-*/chrome-*/chrome")))
    return found or next(map(str, downloaded), None)


BROWSER = find_browser()
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None,
        reason="no browser for the study page: apt-get install chromium, or .venv/bin/playwright install chromium, or "
        "name one in RANKPILOT_BROWSER",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@dataclass
class Visit:
    """A page that is open, what it asked a network for, and what it complained of."""

    page: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def settle(self, selector: str, count: int) -> None:
        """Wait until there are so many: pictures are drawn when their width is known."""
        playwright.expect(self.page.locator(selector)).to_have_count(count)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def focused(self) -> str:
        """The element in focus: its role or tag, and its first class or id."""
        return str(
            self.page.evaluate(
                "(at => `${at.tagName.toLowerCase()}.${at.classList[0] || at.id}`)(document.activeElement)"
            )
        )


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens a page with the network off; at the end nothing was asked for, and nothing went wrong."""
    visits: list[Visit] = []

    def opened(path: Path, width: int = DESKTOP, theme: str = "light", before: str = "") -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, offline=True, reduced_motion="reduce"
        )
        if before:
            context.add_init_script(before)
        here = Visit(context.new_page())
        visits.append(here)
        here.page.route(
            "**/*", lambda route: route.continue_() if route.request.is_navigation_request() else route.abort()
        )
        here.page.on("request", lambda request: here.asked.append(request.url))
        here.page.on("console", lambda message: here.complaints.append(message.text))
        here.page.on("pageerror", lambda error: here.complaints.append(str(error)))
        here.page.goto(path.as_uri())
        here.page.wait_for_selector("[data-ready]", timeout=20_000)
        return here

    yield opened
    for each in visits:
        assert each.complaints == []
        assert each.asked == [each.page.url.partition("#")[0]]
        each.page.context.close()
