"""What a page shows, as plain JSON, and the page as one file."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rankpilot.common.files import read_json, write_json
from rankpilot.study import page
from rankpilot.study.page import (
    ASSETS,
    MOST_PLANS,
    MOST_POINTS,
    SCRIPTS,
    STYLES,
    Modules,
    curve,
    numbers,
    page_data,
    plain,
    shown_explanation,
    study_html,
    write_page,
)  # fmt: skip
from rankpilot.study.run_data import read_run, run_names

from .conftest import MIB, MODULES, PLANS, STEPS, explanation, plans, write_decisions


def test_a_run_as_it_is_shown(run_folder: Path) -> None:
    data = page_data([read_run(run_folder)], [None])
    json.dumps(data, allow_nan=False)
    (run,) = data["runs"]
    assert (run["name"], run["subject"], run["unit"], run["steps"]) == ("demo", "MiniLM on sst2", "bytes", 200)
    assert run["results"] == [
        "From a single run each, rankpilot's held-out loss is 4.9% lower than that of uniform ranks, "
        "ranks 4 to 16 on 17 of 36 modules."
    ]
    assert run["settings"]["budget"] == "100MiB"
    assert [module["name"] for module in run["modules"]] == list(MODULES)
    names = {"name": MODULES[30], "label": "layer 5 query", "layer": "layer 5", "type": "query"}
    assert run["modules"][30] == names | {"block": 5, "count": 1}
    assert [decision["step"] for decision in run["decisions"]] == list(STEPS)
    assert [decision["after"] for decision in run["decisions"]] == plans().tolist()
    assert run["table"]["columns"] == ["rankpilot", "uniform"]
    assert run["budgets"]["y"] == [100 * MIB] * 4
    assert run["predicted"]["y"] == [(90 + 2 * decision) * MIB for decision in range(4)]
    assert len(run["losses"]["uniform"]["held_out"]["x"]) == 10
    assert set(run["peaks"]) == {"rankpilot", "uniform"}
    assert run["energy_joules"] is None
    assert "energy" not in run["settings"], "nobody knows what the run was measured on"
    assert run["step_seconds"] == {}
    assert not data["by_type"]


def test_what_single_modules_say(run_folder: Path) -> None:
    (run,) = page_data([read_run(run_folder)], [[explanation(1)]])["runs"]
    first, second = run["decisions"][:2]
    assert second["before"] == first["after"]
    assert second["moved"] == 1
    assert second["changed"] == 3
    assert second["asked"][:3] == [rank + 1 for rank in second["after"][:3]]
    (feature, distance), *_ = second["reasons"][30]
    assert run["features"][feature] == "sensitivity"
    assert distance > 3
    assert first["explanation"] is None
    assert second["explanation"]["verdict"] == "Verdict on decision 1."


def test_energy_and_time_where_they_were_measured(run_folder: Path) -> None:
    summary = read_json(run_folder / "summary.json")
    summary["runs"]["rankpilot"] |= {
        "energy_joules": 1234.5,
        "energy_source": "1 GPU, measured by NVML",
        "hardware": {"device": "a GPU", "free_bytes": 3 * 2**30, "total_bytes": 4 * 2**30, "busy": 0.25},
    }
    write_json(run_folder / "summary.json", summary)
    path = run_folder / "metrics-rankpilot.jsonl"
    path.write_text('{"step": 5, "loss": 1.0, "step_s": [0.3, 0.1, 0.2]}\n{"step": 6, "step_s": []}\n')
    (run,) = page_data([read_run(run_folder)], [None])["runs"]
    assert run["energy_joules"] == 1234.5
    assert run["settings"]["device"] == "a GPU; 3 GiB of 4 GiB free at the start, 25% busy"
    assert run["settings"]["energy"] == "1 GPU, measured by NVML"
    assert run["step_seconds"] == {"rankpilot": {"x": [5], "y": [0.2], "each": 1}}


def test_decisions_about_different_modules() -> None:
    blocks = SimpleNamespace(blocks=np.array([0, 1]))
    log: Any = [
        SimpleNamespace(modules=["b", "c"], problem=blocks),
        SimpleNamespace(modules=["a", "b"], problem=blocks),
    ]
    modules = Modules.of(log, by_type=False)
    assert [module["name"] for module in modules.shown] == ["b", "c", "a"]
    assert modules.means([2, 4], modules.slots[0]) == [2, 4, None]
    assert modules.means([2, 4], modules.slots[1]) == [4, None, 2]


def test_a_long_log_is_shown_by_type(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_CHARACTERS", 36 * 4 * page.ROW_CHARACTERS - 1)
    data = page_data([read_run(run_folder)], [[explanation(0)]])
    (run,) = data["runs"]
    assert data["by_type"]
    assert [(module["type"], module["count"]) for module in run["modules"]][:2] == [("query", 6), ("key", 6)]
    query = plans()[-1][0::6]
    assert run["decisions"][-1]["after"][0] == round(float(query.mean()), 2)
    assert "reasons" not in run["decisions"][0]
    assert run["decisions"][1]["line"].startswith("step 36: 1 module changed")


def test_the_size_of_a_row_is_as_stated(run_folder: Path) -> None:
    (run,) = page_data([read_run(run_folder)], [None])["runs"]
    text = json.dumps(run["decisions"], separators=(",", ":"))
    assert 0.4 * page.ROW_CHARACTERS < len(text) / (36 * 4) < 1.2 * page.ROW_CHARACTERS


def test_names_of_runs(run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "again" / "demo"
    write_decisions(other / "decisions")
    runs = [read_run(run_folder), read_run(other)]
    assert run_names(runs[:1]) == ["demo"]
    assert run_names(runs) == [f"{tmp_path.name}/demo", "again/demo"]
    assert run_names([runs[0], runs[0]]) == ["demo (1)", "demo (2)"]


def test_experts_are_of_one_type() -> None:
    names = [f"layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in (0, 1, 2)]
    log: Any = [SimpleNamespace(modules=names, problem=SimpleNamespace(blocks=np.array([0, 0, 0, 1, 1, 1])))]
    modules = Modules.of(log, by_type=True)
    assert [(module["name"], module["count"]) for module in modules.shown] == [("up_proj", 6)]
    assert modules.means([1, 2, 3, 4, 5, 6], modules.slots[0]) == [3.5]


def test_curves() -> None:
    assert curve([]) is None
    assert curve([("x", 1), (2, None), (1, True)]) is None
    assert curve([(2, 1.0), (1, float("nan")), (2, 3.0)]) == {"x": [1, 2], "y": [None, 3], "each": 1}
    points = [(step, float(step % 2)) for step in range(2 * MOST_POINTS + 3)]
    thin = curve(points, np.max)
    assert thin["each"] == 3
    assert len(thin["x"]) <= MOST_POINTS
    assert set(thin["y"]) == {1}
    assert curve([(step, float("inf")) for step in range(MOST_POINTS + 1)])["y"][0] is None


def test_numbers_are_short() -> None:
    assert numbers([1.0, 0.12345, float("inf")]) == [1, 0.12, None]
    assert numbers([123456.789], None) == [123457]
    assert plain({"a": (np.float32(0.5), True, None, float("nan"), "x")}) == {"a": [0.5, True, None, None, "x"]}


def test_explanations_keep_what_a_reader_looks_at() -> None:
    kept = shown_explanation(explanation(0))
    json.dumps(kept, allow_nan=False)
    assert kept["plans_in_all"] == PLANS
    assert [plan["name"] for plan in kept["plans"]] == [f"plan {index}" for index in (*range(MOST_PLANS), PLANS - 1)]
    assert [plan["taken"] for plan in kept["plans"]] == [False, True] + [False] * (MOST_PLANS - 1)
    assert not any("ranks" in plan for plan in kept["plans"])
    assert shown_explanation(explanation(0) | {"taken": PLANS - 2})["plans"][-2]["taken"]
    assert shown_explanation(None) is None
    assert shown_explanation({"decision": 3, "plans": None, "verdict": "v"}) == {"verdict": "v"}


# The page as one file ------------------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)>{{script}} \\1"


def test_it_is_small_and_fetches_nothing() -> None:
    page = study_html({})
    assert len(page.encode()) < 300_000
    assert "default-src 'none'" in page
    fetching = r"\bsrc\s*=|<link|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon"
    assert not re.search(fetching, page)
    assert not re.search(r"""href\s*=\s*["'](?!#)""", page)


def test_data_come_back_and_cannot_end_the_script() -> None:
    page = study_html({"runs": [{"name": HOSTILE, "é": "ß"}]})
    (packed,) = re.findall(r'id="data">([^<]*)</script>', page)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == {"runs": [{"name": HOSTILE, "é": "ß"}]}
    assert "onerror" not in page
    assert page.count("{{") == 0
    assert page.count("</script>") == 2


def test_text_enters_the_page_as_text_alone() -> None:
    code = "".join((ASSETS / name).read_text() for name in SCRIPTS if not name.startswith("uplot"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", code)


def test_equal_data_give_equal_bytes_with_every_asset(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page({"runs": []}, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    present = {str(path.relative_to(ASSETS)) for path in ASSETS.rglob("*") if path.is_file()}
    assert present == {*STYLES, *SCRIPTS, "page.html", "uplot/LICENSE"}
