"""The page in a browser: every view by pointer and by keyboard, two widths, two themes, and no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rankpilot.common.files import read_json, write_json
from rankpilot.study.page import page_data, write_page
from rankpilot.study.run_data import RunData, read_run

from .conftest import MODULES, explanation
from .conftest import run_folder as run_folder

playwright = pytest.importorskip("playwright.sync_api", reason='playwright is missing: pip install -e ".[test]"')
PHONE, DESKTOP = 360, 1200

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
"""Programs that show the page as Chromium does; RANKPILOT_BROWSER names another."""


def find_browser() -> str | None:
    """The path of a browser on this machine: the one named, one on the PATH, or one that playwright downloaded."""
    on_path = (shutil.which(name) for name in BROWSERS)
    caches = (Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright")
    downloaded = (str(path) for cache in caches for path in sorted(cache.glob("chromium-*/chrome-*/chrome")))
    return next(filter(None, (os.environ.get("RANKPILOT_BROWSER"), *on_path, *downloaded)), None)


BROWSER = find_browser()
pytestmark = [
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
        name = "(at => `${at.tagName.toLowerCase()}.${at.classList[0] || at.id}`)(document.activeElement)"
        return str(self.page.evaluate(name))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens a page with the network off; at the end nothing was asked for, and nothing went wrong."""
    visits: list[Visit] = []

    def opened(path: Path, width: int = DESKTOP, theme: str = "light") -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, offline=True, reduced_motion="reduce"
        )
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


Open = Callable[..., Visit]

HOSTILE = "encoder.layer.5.<img src=x onerror=window['harmed']=1>"


@pytest.fixture
def page_file(run_folder: Path, tmp_path: Path) -> Path:
    """One run, with an adapter and an explanation of each decision."""
    adapter = run_folder / "rankpilot" / "adapter"
    write_json(adapter / "adapter_config.json", {"task_type": "SEQ_CLS", "base_model_name_or_path": "some/model"})
    return written(tmp_path / "study.html", [read_run(run_folder)])


@pytest.fixture
def page_of_two(run_folder: Path, tmp_path: Path) -> Path:
    """Two runs: one of a longer training with other settings."""
    other = replace(read_run(run_folder), folder=tmp_path / "other", summary={"model": "MiniLM", "data": "imdb"})
    return written(tmp_path / "two.html", [read_run(run_folder), other])


def written(path: Path, runs: list[RunData]) -> Path:
    write_page(page_data(runs, [[explanation(decision) for decision in range(4)] for _ in runs]), path)
    return path


def test_every_view_by_pointer(page_file: Path, visit: Open) -> None:
    here = visit(page_file)
    assert (
        here.text("#verdict .lead")
        == "From a single run each, rankpilot's held-out loss is 4.9% lower than that of uniform ranks, "
        "ranks 4 to 16 on 17 of 36 modules."
    )
    assert here.text("h1") == "MiniLM on sst2"
    assert "energy" not in here.text("#verdict")
    assert here.count("#losses canvas") == 2
    assert here.count("#costs canvas") == 1
    here.page.locator("#ranks .heatmap").hover(position={"x": 200, "y": 60})
    assert "rank" in here.text("#ranks .tip")
    here.page.locator("#losses .chart").first.hover(position={"x": 200, "y": 150})
    assert here.text("#losses .where").startswith("at step ")
    here.page.locator(".opener").nth(1).click()
    panel = here.text(".panel:not([hidden])")
    for part in (
        "Verdict on decision 1.", "Fine-tunes differ.", "5 plans ranked lower are not shown", "▸ plan 1",
        "Effects on the expected loss", "With less memory it would have rank 4.", "Requested and actual ranks",
        "Ranks after the decision", "Modules",
    ):  # fmt: skip
        assert part in panel, part
    assert here.count(".panel:not([hidden]) .evidence svg") >= 2
    assert "few modules +1.0 %" in here.page.locator(".panel svg[role=img]").first.get_attribute("aria-label")
    here.page.locator(".panel .only input").uncheck()
    table = here.page.locator(".panel .scroll").last
    assert table.locator("tbody tr").count() == 36
    table.locator(".sorter", has_text="actual").click()
    table.locator(".sorter", has_text="actual").click()
    assert "layer 5 query" in table.locator("tbody tr").first.inner_text()
    assert here.count("[aria-sort=descending]") == 1
    assert "AutoPeftModelForSequenceClassification.from_pretrained" in here.text("#adapter pre")
    assert "Plain PEFT loads it" in here.text("#adapter")
    here.page.locator("#settings summary").click()
    assert "100MiB" in here.text("#settings table")


def test_every_view_by_keyboard(page_file: Path, visit: Open) -> None:
    here, reached = visit(page_file), []
    here.settle("#losses canvas", 2)
    for _ in range(30):
        here.press("Tab")
        reached.append(here.focused())
        outline = here.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] == "body.", reached[-1]
        if reached[-1] == "div.heatmap":
            first = here.text("#ranks [role=gridcell]")
            here.press("ArrowDown", "ArrowRight")
            assert here.text("#ranks [role=gridcell]") != first
            assert "layer 4" in here.text("#ranks .tip")
        if reached[-1] == "div.chart" and reached.count("div.chart") == 1:
            here.press("ArrowRight", "ArrowRight")
            assert here.text("#losses .where") == "at step 2"
        if reached[-1] == "summary.":
            break
    wanted = ["a.skip", "button.plain", "a.sections", "div.heatmap", "div.chart", "button.opener", "summary."]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == [name for name in wanted if name in reached]
    assert {"div.heatmap", "div.chart", "button.opener", "summary.", "div.scroll"} <= set(reached)
    here.page.locator(".opener").first.focus()
    here.press("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    assert here.page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert here.page.locator(".panel").nth(1).is_visible()
    here.press("End", "Home", "Enter", "Enter")
    assert here.page.locator(".panel").nth(0).is_hidden()
    here.page.locator("#ranks .heatmap").focus()
    here.press("End", "Enter")
    assert here.page.locator(".panel").nth(3).is_visible()
    assert here.focused() == "button.opener"


@pytest.mark.parametrize(("width", "theme"), [(PHONE, "dark"), (DESKTOP, "light")])
def test_widths_and_themes(page_of_two: Path, visit: Open, width: int, theme: str) -> None:
    here = visit(page_of_two, width, theme)
    here.page.locator(".opener").first.click()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= width
    paper = "getComputedStyle(document.querySelector('.card')).backgroundColor"
    colors = {"light": "rgb(255, 255, 255)", "dark": "rgb(25, 29, 35)"}
    assert here.page.evaluate(paper) == colors[theme]
    here.page.locator("#theme").click()
    assert here.page.evaluate(paper) == colors["light" if theme == "dark" else "dark"]
    tall = here.page.locator("#ranks canvas").first.bounding_box()
    assert tall["height"] > 100
    assert tall["width"] <= width


def test_curves_of_one_folder_are_told_apart(page_file: Path, page_of_two: Path, visit: Open) -> None:
    looks = "new Set(['rankpilot', 'uniform', 'all-linear'].map((name) => styleOf(0, name).%s)).size"
    assert visit(page_file).page.evaluate(looks % "color()") == 3
    assert visit(page_of_two).page.evaluate(looks % "dash") == 3


def test_runs_side_by_side(page_of_two: Path, visit: Open) -> None:
    here = visit(page_of_two)
    here.settle("#decisions .list", 2)
    boxes = here.page.locator("fieldset input")
    boxes.nth(0).uncheck()
    here.settle("#ranks .heatmap", 1)
    here.settle("#decisions .list", 1)
    boxes.nth(1).click()
    assert boxes.nth(1).is_checked(), "one run is always shown"
    boxes.nth(0).check()
    here.settle("#ranks .heatmap", 2)


def test_names_are_text(run_folder: Path, tmp_path: Path, visit: Open) -> None:
    summary = read_json(run_folder / "summary.json")
    write_json(run_folder / "summary.json", summary | {"data": "<b>bold</b><script>window.harmed=1</script>"})
    run = read_run(run_folder)
    names = tuple(HOSTILE if name == MODULES[30] else name for name in MODULES)
    hostile = [replace(record, observation=replace(record.observation, names=names)) for record in run.decisions]
    here = visit(written(tmp_path / "hostile.html", [replace(run, decisions=hostile)]))
    assert "<script>" in here.text("h1")
    here.page.locator(".opener").nth(1).click()
    table = here.page.locator(".panel:not([hidden]) tbody").last
    assert HOSTILE.removeprefix("encoder.layer.5.") in table.inner_text()
    assert here.count("img, main script") == 0
    assert here.page.evaluate("window.harmed === undefined")


def test_a_browser_without_decompression_is_told(page_file: Path, browser: Any) -> None:
    context = browser.new_context()
    context.add_init_script("delete window.DecompressionStream")
    here = context.new_page()
    here.goto(page_file.as_uri())
    here.get_by_text("this browser is too old").wait_for()
    context.close()
