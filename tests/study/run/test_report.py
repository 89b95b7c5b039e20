"""The report of a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import pytest
from rankpilot.allocation.log import DecisionLog
from rankpilot.common.files import read_json, read_json_lines, write_json
from rankpilot.errors import RunFolderError
from rankpilot.memory.cost import ParameterCost
from rankpilot.study.run.comparison import summary_table
from rankpilot.study.run.decisions import standing_out
from rankpilot.study.run.report import write_report
from rankpilot.study.run.run_data import read_run
from rich.console import Console
from safetensors.numpy import save_file

from ..conftest import MIB, plans, problem_of, write_decisions


@pytest.fixture
def drawn() -> None:
    """For tests that look at the files of pictures."""


@pytest.fixture(autouse=True)
def _files_of_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made and not written, which takes a second for each report, unless a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("rankpilot.study.run.report.save_figure", lambda figure, path: path)


def edit_summary(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    summary = read_json(folder / "summary.json")
    change(summary)
    write_json(folder / "summary.json", summary)


def table_rows(report: str) -> dict[str, list[str]]:
    """The comparison: label to cells."""
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_comparison_marks_the_best_values(run_folder: Path) -> None:
    path = write_report(run_folder).path
    assert path == run_folder / "report.md"
    report = path.read_text()
    assert "gives identical outputs (largest difference 0)" in report
    assert "## The adapter" not in report, "there is none in the folder"
    assert table_rows(report) == {
        "": ["rankpilot", "uniform"],
        "held-out loss": ["**0.3841**", "0.4041"],
        "held-out accuracy": ["**86.10%**", "85.20%"],
        "peak memory": ["**91 MiB**", "96 MiB"],
        "budget": ["100 MiB", "100 MiB"],
        "adapter parameters": ["120,000", "100,000"],
        "adapted modules": ["17", "17"],
        "median step": ["51.2 ms", "51.2 ms"],
        "training time": ["12.3 s", "12.3 s"],
    }


def test_the_better_run_is_marked_whichever_it_is(run_folder: Path) -> None:
    edit_summary(run_folder, lambda s: s["runs"]["uniform"].update(held_out_loss=0.2, held_out_accuracy=0.99))
    report = write_report(run_folder).path.read_text()
    assert table_rows(report)["held-out loss"] == ["0.3841", "**0.2000**"]
    assert table_rows(report)["held-out accuracy"] == ["86.10%", "**99.00%**"]
    assert "rankpilot's held-out loss is 92.0% higher than that of uniform ranks." in report


@pytest.mark.usefixtures("drawn")
def test_pictures_are_made_and_linked_and_can_be_made_again(run_folder: Path) -> None:
    report = write_report(run_folder).path.read_text()
    for name in ("ranks", "loss", "memory"):
        assert f"(figures/{name}.png)" in report
        assert (run_folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "rankpilot's held-out loss is 4.9% lower than that of uniform ranks." in report
    assert '"budget": "100MiB"' in report
    assert "* seed: 3" in report
    pictures = {path: path.read_bytes() for path in (run_folder / "figures").iterdir()}
    assert write_report(run_folder).path.read_text() == report
    assert {path: path.read_bytes() for path in (run_folder / "figures").iterdir()} == pictures


def test_decisions_in_words_and_in_a_line_each(run_folder: Path) -> None:
    report = write_report(run_folder).path.read_text()
    lines = report.split("## Decisions")[1].splitlines()
    assert report.count("**Decision ") == 4
    second = next(i for i, line in enumerate(lines) if line.startswith("**Decision 2"))
    assert lines[second] == (
        "**Decision 2, step 68, loss 0.500.** 1 up, 1 down, 34 unchanged; predicted cost 94 MiB of 100 MiB "
        "(measured before it: 89 MiB). The budget changed what was asked for 3 modules."
    )
    query, value = sorted(lines[second + 2 : second + 4])
    assert query.startswith("- `layer 5 query`: rank 8 → 16 (sensitivity +")
    assert value.startswith("- `layer 5 value`: rank 4 → 2 (snr −")
    assert "shape" not in query + value
    first = next(line for line in lines if line.startswith("**Decision 0"))
    assert "step 0.**" in first
    told = lines[lines.index(first) + 2]  # of equal moves, the one with the most telling feature
    assert told.startswith("- `layer 5 query`: rank 1 → 4 (sensitivity +")
    assert "measured" not in first
    short = report.split("## Decisions")[1].split("```")[1].split("\n")[1:-1]
    assert len(short) == 4
    assert short[2] == "step 68: 2 modules moved, 94 of 100 MiB, mean rank 2.3"


def test_flags_and_constants_do_not_stand_out(run_folder: Path) -> None:
    pairs = standing_out(DecisionLog(run_folder / "decisions").logged(0))
    assert pairs[30][0][0] == "sensitivity"
    assert pairs[30][0][1] > 5
    assert pairs[32][0][0] == "snr"
    assert pairs[32][0][1] < -5
    assert not {name for row in pairs for name, _ in row} & {"wide", "shape"}
    assert all(abs(distance) >= 1 for row in pairs for _, distance in row)


def test_missing_parts_are_left_out(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "decisions")
    for name in ("config.json", "metrics-rankpilot.jsonl", "metrics-uniform.jsonl"):
        (run_folder / name).unlink()

    def only_loss(summary: dict[str, Any]) -> None:
        run = summary["runs"]["rankpilot"]
        summary.clear()
        summary["runs"] = {"rankpilot": {"held_out_loss": run["held_out_loss"], "held_out_accuracy": None}}

    edit_summary(run_folder, only_loss)
    report = write_report(run_folder).path.read_text()
    assert table_rows(report) == {"": ["rankpilot"], "held-out loss": ["0.3841"]}
    assert [line for line in report.splitlines() if line.startswith("#")] == [
        "# Fine-tune report",
        "## Result",
    ]
    assert not (run_folder / "figures").exists()


def test_a_causal_model_without_a_uniform_run(run_folder: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        del summary["runs"]["uniform"]
        summary["runs"]["rankpilot"]["held_out_accuracy"] = None

    edit_summary(run_folder, change)
    report = write_report(run_folder).path.read_text()
    assert "held-out accuracy" not in report
    assert "uniform" not in report
    assert table_rows(report)["held-out loss"] == ["0.3841"]


def test_a_failed_reload_is_shown(run_folder: Path) -> None:
    edit_summary(run_folder, lambda s: s.update(reload={"identical": False, "max_abs_difference": 0.25}))
    assert "**does not give identical outputs** (largest difference 0.25)" in write_report(run_folder).path.read_text()


def test_decisions_after_a_probe_start_from_the_ranks_in_place(run_folder: Path) -> None:
    lines = run_folder / "decisions" / "decisions.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[1:]))
    assert "**Decision 1" in write_report(run_folder).path.read_text()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": {}}', '{"runs": {"uniform": {}}}'])
def test_a_run_without_a_summary_is_reported_from_the_rest(run_folder: Path, content: str | None) -> None:
    path = run_folder / "summary.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    report = write_report(run_folder)
    (line,) = report.run.missing
    words = "the results, as the run has not finished (no summary.json)" if content is None else "is unreadable"
    assert words in line
    text = report.path.read_text()
    assert f"Left out of this report: {line}." in text
    assert "The latest held-out loss is 0.3840, at step 200." in text
    assert "## Result" not in text
    assert text.count("**Decision ") == 4
    for name in ("ranks", "loss", "memory"):
        assert f"(figures/{name}.png)" in text


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_without_a_run_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"decisions/decisions\.jsonl or decisions\.jsonl.*summary\.json"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_log_that_cannot_be_read_is_named_and_left_out(run_folder: Path) -> None:
    (run_folder / "decisions" / "decision-000001.safetensors").write_bytes(b"{")
    report = write_report(run_folder)
    (line,) = report.run.missing
    assert "decision-000001.safetensors is missing, damaged" in line
    text = report.path.read_text()
    assert line in text
    assert "**Decision" not in text
    assert "(figures/loss.png)" in text
    assert "(figures/ranks.png)" not in text


def test_a_decision_log_alone(run_folder: Path) -> None:
    folder = run_folder / "decisions"
    report = write_report(folder)
    assert report.path == folder / "report.md"
    assert report.run.missing == ("losses (no checkpoint with a trainer_state.json)",)
    text = report.path.read_text()
    assert text.count("**Decision ") == 4
    assert "(figures/ranks.png)" in text
    assert "(figures/memory.png)" in text, "the log has the peaks before its decisions"
    assert "(figures/loss.png)" not in text


@pytest.fixture
def trainer_folder(run_folder: Path, tmp_path: Path) -> Path:
    """The output folder of a Trainer: decisions, and checkpoints with what was logged up to them."""
    folder = tmp_path / "out"
    shutil.copytree(run_folder / "decisions", folder / "decisions")
    rows = read_json_lines(run_folder / "metrics-rankpilot.jsonl")
    for step in (100, 200):
        history = [{key: row[key] for key in row if key != "peak_bytes"} for row in rows if row["step"] <= step]
        state = {"global_step": step, "log_history": history}
        write_json(folder / f"checkpoint-{step}" / "trainer_state.json", state)
        config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model"}
        write_json(folder / f"checkpoint-{step}" / "adapter_config.json", config)
    return folder


def test_a_trainer_output_folder(trainer_folder: Path) -> None:
    report = write_report(trainer_folder)
    assert not report.run.missing
    text = report.path.read_text()
    for name in ("ranks", "loss", "memory"):
        assert f"(figures/{name}.png)" in text
    assert "The latest held-out loss is 0.3840, at step 200." in text
    checkpoint = trainer_folder / "checkpoint-200"
    assert f"The adapter is in `{checkpoint}`; its base model is `some/model`." in text
    assert f"AutoPeftModelForCausalLM.from_pretrained('{checkpoint}')" in text
    assert f"rankpilot export {quote(str(checkpoint))} --output padded" in text


def test_a_torn_trainer_state_gives_way_to_the_one_before(trainer_folder: Path) -> None:
    (trainer_folder / "checkpoint-200" / "trainer_state.json").write_text('{"log_hist')
    report = write_report(trainer_folder)
    assert "The latest held-out loss is 0.4293, at step 100." in report.path.read_text()
    (line,) = report.run.missing
    assert "checkpoint-200" in line


def test_the_report_names_the_adapter_of_a_fine_tune(run_folder: Path) -> None:
    adapter = run_folder / "rankpilot" / "adapter"
    write_json(adapter / "adapter_config.json", {"task_type": "SEQ_CLS", "base_model_name_or_path": "some/model"})
    edit_summary(run_folder, lambda s: s.update(outputs=5))
    text = write_report(run_folder).path.read_text()
    assert f"AutoPeftModelForSequenceClassification.from_pretrained('{adapter}', num_labels=5)" in text
    assert "model.merge_and_unload()" in text
    assert f"rankpilot export {quote(str(adapter))} --format rank-pattern" in text


def test_the_outputs_of_a_head_that_was_saved_with_the_adapter(trainer_folder: Path) -> None:
    checkpoint = trainer_folder / "checkpoint-200"
    adapter = {"task_type": "SEQ_CLS", "base_model_name_or_path": "some/model", "modules_to_save": ["classifier"]}
    write_json(checkpoint / "adapter_config.json", adapter)
    assert f"from_pretrained('{checkpoint}')" in write_report(trainer_folder).path.read_text()
    shapes = {"lora_A.weight": (2, 8), "classifier.dense.weight": (2, 8), "classifier.out_proj.weight": (3, 2)}
    tensors = {f"base_model.model.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    assert f"from_pretrained('{checkpoint}', num_labels=3)" in write_report(trainer_folder).path.read_text()


def test_the_adapter_of_a_fine_tune_that_goes_on_is_that_of_its_last_checkpoint(run_folder: Path) -> None:
    for step in (5, 10):
        write_json(run_folder / "rankpilot" / f"checkpoint-{step}" / "adapter_config.json", {"task_type": "SEQ_CLS"})
    assert read_run(run_folder).adapter == run_folder / "rankpilot" / "checkpoint-10"


def test_an_adapter_that_does_not_name_its_base_model(trainer_folder: Path) -> None:
    checkpoint = trainer_folder / "checkpoint-200"
    write_json(checkpoint / "adapter_config.json", {"task_type": "CAUSAL_LM", "base_model_name_or_path": None})
    text = write_report(trainer_folder).path.read_text()
    assert "its base model is the one that was fine-tuned. Plain PEFT loads it" in text
    assert f"PeftModel.from_pretrained(base_model, '{checkpoint}')" in text


def test_a_budget_of_parameters_is_not_given_in_bytes(tmp_path: Path, run_folder: Path) -> None:
    shutil.rmtree(run_folder / "decisions")
    problem = problem_of(plans()[0])
    counted = replace(problem, cost=ParameterCost(np.full((1, 36), 1e3)), limit=300_000.0)
    write_decisions(run_folder / "decisions", lambda ranks: replace(counted, ranks=ranks), 1 / MIB * 3000)
    edit_summary(run_folder, lambda s: [run.update(budget_bytes=300_000) for run in s["runs"].values()])
    text = write_report(run_folder).path.read_text()
    assert table_rows(text)["budget"] == ["300,000 parameters"] * 2
    assert "![Parameters of the adapter against the budget](figures/memory.png)" in text
    assert "step 0: 36 modules moved, 270,000 of 300,000 parameters, mean rank 2.0" in text


def test_summary_table(run_folder: Path) -> None:
    console = Console(width=80, record=True, force_terminal=True, file=StringIO())
    console.print(summary_table(read_run(run_folder)))
    text = console.export_text(styles=True)
    assert "\x1b[1m0.3841" in text
    assert "\x1b[1m0.4041" not in text
    assert "MiniLM on sst2" in text
