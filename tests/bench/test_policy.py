"""The page on the shipped policy: made-up rows with known gains, and the rows that ship."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.evaluation.config import EvaluateConfig
from rankpilot.agents.evaluation.evaluate import ROWS
from rankpilot.agents.evaluation.results import Row, append_rows
from rankpilot.agents.learned.policy_file import policy_folder, read_card
from rankpilot.bench.policy import run as module
from rankpilot.bench.policy.page import UNIFORM, against, figures_of, groups, oracle_share, page
from rankpilot.bench.policy.rows import PACKED, PolicyRows, pack, unpack
from rankpilot.bench.policy.run import Options, benchmark
from rankpilot.errors import ConfigError
from rich.console import Console

ROOT = Path(__file__).parents[2]
CARD = read_card(policy_folder("default"))


def row(policy: str, task: int, gain: float, **changes: Any) -> Row:
    """A run whose log loss is lower than uniform's by a gain."""
    values: dict[str, Any] = {
        "policy": policy,
        "task": f"task {task}",
        "seed": 1,
        "kind": "planted",
        "base": "llama-4x32",
        "family": "llama",
        "depth": 4,
        "budget": 0.25,
        "cost_kind": "parameters",
        "place": "low",
        "initial_loss": 3.0,
        "uniform_loss": 1.0,
        "best_loss": 0.5,
        "loss": math.exp(-gain),
        "improvement": gain,
        "failed": False,
    }
    return Row(**values | changes)


ROWS_MADE = (
    *(row("default", task, 0.10) for task in range(4)),
    *(row("signal-mean", task, 0.04) for task in range(4)),
    *(row("oracle", task, 0.20) for task in range(4)),
    *(row("default", 8 + each, -0.02, cost_kind="bytes", depth=8, family="gpt2") for each in range(2)),
)
HIDDEN = (
    *(row("default", task, 0.1) for task in range(3)),
    *(row("default without signals", task, 0.02) for task in range(3)),
)


@pytest.fixture
def made() -> PolicyRows:
    return PolicyRows(CARD, {"test": ROWS_MADE, "validation": HIDDEN})


def test_gains_are_those_of_pairs() -> None:
    found = against(ROWS_MADE, "default", UNIFORM)
    assert found is not None
    assert (found.runs, found.wins, found.ties, found.losses, found.worse) == (6, 4, 0, 2, 2)
    assert found.gain.value == pytest.approx((4 * 0.1 - 2 * 0.02) / 6)
    other = against(ROWS_MADE, "default", "signal-mean")
    assert other is not None
    assert other.runs == 4
    assert (other.gain.value, other.gain.low) == pytest.approx((0.06, 0.06))
    assert other.better.value == 1
    assert against(ROWS_MADE[:1], "default", UNIFORM) is None, "one task has no interval"


def test_a_run_that_failed_counts_as_untrained() -> None:
    failed = dataclasses.replace(ROWS_MADE[0], loss=None, failed=True)
    found = against([failed, *ROWS_MADE[1:]], "default", UNIFORM)
    assert found is not None
    assert found.gain.value == pytest.approx((3 * 0.1 - 0.04 - math.log(3)) / 6)


def test_the_share_of_the_oracle() -> None:
    found = oracle_share(ROWS_MADE, "default")
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert oracle_share(ROWS_MADE[:4], "default") is None


def test_groups_by_question() -> None:
    found = {name: len(part) for name, part in groups([r for r in ROWS_MADE if r.policy == "default"]).items()}
    assert found == {
        "planted, bytes": 2,
        "planted, parameters": 4,
        "planted, mean rank 1 and 2": 4,
        "8 layers, of which it knows real fine-tunes alone": 2,
        "GPT-2, of which it knows real fine-tunes alone": 2,
    }


def test_the_page_says_what_the_rows_say(made: PolicyRows) -> None:
    text = page(made)
    assert f"weights {CARD['sha256'][:12]}" in text
    assert "| uniform | 6 | +0.060 (" in text
    assert "| signal-mean | 4 | +0.060 (+0.060 to +0.060) | 100% (100% to 100%) | 4 / 0 / 0 | 0 |" in text
    assert (
        "| 8 layers, of which it knows real fine-tunes alone | 2 | -0.020 (-0.020 to -0.020) | 0% (0% to 0%) |" in text
    )
    assert "the policy gains 50% (" in text
    assert "| without signals | 3 | +0.080 (" in text
    assert "oracle |" not in text
    figures = figures_of(made)
    assert figures["signal-mean.gain"] == pytest.approx(0.06)
    assert figures["oracle_share"] == pytest.approx(0.5)


def test_rows_come_back_as_they_were(made: PolicyRows, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    assert pack(made, path) == path.stat().st_size
    again = unpack(path)
    assert again.rows == made.rows
    assert again.card == made.card
    assert page(again) == page(made)


def test_the_page_in_the_docs_is_what_the_stored_rows_say() -> None:
    """And they are of the policy that ships."""
    measured = unpack(PACKED)
    assert (ROOT / "docs" / "policy.md").read_text() == page(measured)
    assert measured.card["sha256"] == CARD["sha256"]


@pytest.mark.parametrize(
    ("rival", "words"),
    [
        (UNIFORM, "is better than uniform rank in {} in the mean ({})"),
        ("signal-mean", "and than the rule `signal-mean` in {} ({})"),
    ],
)
def test_the_readme_tells_these_figures(rival: str, words: str) -> None:
    found = against(unpack(PACKED).rows["test"], "default", rival)
    assert found is not None
    share, low, high = (f"{100 * each:.0f}" for each in (found.better.value, found.better.low, found.better.high))
    gain, least, most = (f"{100 * each:.1f}" for each in (found.gain.value, found.gain.low, found.gain.high))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert words.format(f"{share} % ({low} to {high}), by {gain} %", f"{least} to {most}") in readme
    assert f"On {found.runs} proxy fine-tunes that it never saw" in readme


@pytest.mark.parametrize("content", [None, b"no rows"])
def test_other_files(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="no packed file of a policy's rows"):
        benchmark(Options(rows=path), Console())


def test_rows_without_the_test_split(tmp_path: Path) -> None:
    pack(PolicyRows(CARD, {"validation": HIDDEN}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="no rows of the test split"):
        unpack(tmp_path / "rows.parquet")


def test_both_splits_are_measured_packed_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EvaluateConfig] = []

    def evaluated(config: EvaluateConfig, folder: Path, *, resume: bool) -> None:
        asked.append(config)
        assert resume
        append_rows(folder / ROWS, ROWS_MADE if config.split == "test" else HIDDEN)

    monkeypatch.setattr(module, "evaluate", evaluated)
    options = Options(output=tmp_path, pack=tmp_path / "rows.parquet", page=tmp_path / "policy.md", quick=True)
    for split in ("test", "validation"):
        (tmp_path / split).mkdir()
    figures = benchmark(options, Console(quiet=True))
    assert [config.split for config in asked] == ["test", "validation"]
    assert {config.tasks for config in asked} == {6}
    assert {"default", "actor:default", "constant:default", "top-down-mlp", "oracle"} <= set(asked[0].names)
    text = (tmp_path / "policy.md").read_text()
    again = benchmark(Options(rows=tmp_path / "rows.parquet"), Console(quiet=True))
    assert again == figures
    assert page(unpack(tmp_path / "rows.parquet")) == text


def test_reading_and_packing_exclude_one_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        benchmark(Options(rows=tmp_path / "a", pack=tmp_path / "b"), Console())
