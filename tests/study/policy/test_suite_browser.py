"""The page on a policy over a suite in a browser: by pointer and by keyboard, two widths, two themes, no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.study.policy.suite_page import suite_data, write_suite_page
from rankpilot.study.policy.suite_study import study_suite

from ..page.visits import DESKTOP, MARKS, PHONE, Visit
from ..page.visits import browser as browser
from ..page.visits import visit as visit

pytestmark = MARKS


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    return suite_data(study_suite(folder, "default", load_policy("default")))


@pytest.fixture
def page_file(data: dict[str, Any], tmp_path: Path) -> Path:
    write_suite_page(data, tmp_path / "suite.html")
    return tmp_path / "suite.html"


def test_every_view_by_pointer(data: dict[str, Any], page_file: Path, visit: Callable[..., Visit]) -> None:
    here = visit(page_file)
    assert here.text("h1") == "default on 4 tasks"
    assert here.text("#verdict .lead") == data["sentences"]["verdict"][0]
    cards = here.page.locator("main > section").evaluate_all("all => all.map((each) => each.id)")
    assert cards == ["verdict", "drivers", "promise", "kinds", "traits", "worst"]
    assert here.count("#drivers svg rect.bar") == len(data["drivers"])
    here.page.locator("#traits summary").click()
    assert here.page.locator("#traits tbody tr").count() == len(data["traits"])
    assert "decides nothing" in here.text("#traits table")
    here.page.locator(".opener").first.click()
    panel = here.text(".panel:not([hidden])")
    for part in (
        "Its first plan",
        "q_proj",
        "Votes of the networks",
        "What spoke for this plan",
        "rankpilot study logs/",
    ):
        assert part in panel, part
    assert here.page.locator(".panel table.plan tbody tr").count() == 4


def test_every_view_by_keyboard(page_file: Path, visit: Callable[..., Visit]) -> None:
    here, reached = visit(page_file), []
    for _ in range(30):
        here.press("Tab")
        reached.append(here.focused())
        if reached[-1] == "button.opener":
            break
    assert {"a.skip", "button.plain", "summary.", "button.opener"} <= set(reached)
    here.press("Enter")
    assert here.page.locator(".panel").first.is_visible()


@pytest.mark.parametrize(("width", "theme"), [(PHONE, "dark"), (DESKTOP, "light")])
def test_widths_and_themes(page_file: Path, visit: Callable[..., Visit], width: int, theme: str) -> None:
    here = visit(page_file, width, theme)
    here.page.locator(".opener").first.click()
    for summary in here.page.locator("summary").all():
        summary.click()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= width
    here.page.locator("#theme").click()
    assert here.page.evaluate("document.documentElement.dataset.theme") == ("light" if theme == "dark" else "dark")


def test_a_rule_without_votes(folder: Path, tmp_path: Path, visit: Callable[..., Visit]) -> None:
    write_suite_page(suite_data(study_suite(folder, "uniform")), tmp_path / "rule.html")
    here = visit(tmp_path / "rule.html")
    assert "weighs no plans" in here.text("#drivers")
    assert "Too few runs" in here.text("#promise")
    here.page.locator(".opener").first.click()
    assert "Its first plan" in here.text(".panel:not([hidden])")


def test_names_are_text(data: dict[str, Any], tmp_path: Path, visit: Callable[..., Visit]) -> None:
    hostile = "<img src=x onerror=window['harmed']=1>"
    worst = [run | {"task": hostile} for run in data["worst"]]
    write_suite_page(data | {"policy": hostile, "worst": worst}, tmp_path / "hostile.html")
    here = visit(tmp_path / "hostile.html")
    assert "<img" in here.text("h1")
    assert here.count("img") == 0
    assert here.page.evaluate("window.harmed === undefined")
