"""What a run's folder tells, and what the page shows of it."""

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
import torch
from rankpilot.common.errors import RunFolderError
from rankpilot.common.files import read_json, read_json_lines, write_json
from rankpilot.cost.cost import ParameterCost
from rankpilot.finetune.callback import attach
from rankpilot.study.page import page_data
from rankpilot.study.run_data import read_run, standing_out
from rankpilot.study.verdict import summary_table
from rich.console import Console
from safetensors.numpy import save_file
from transformers import Trainer, TrainingArguments

from .conftest import MIB, plans, problem_of, write_decisions


def page_of(folder: Path) -> dict[str, Any]:
    """What the page shows of a run."""
    (run,) = page_data([read_run(folder)], [None])["runs"]
    return run


def edit_summary(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    summary = read_json(folder / "summary.json")
    change(summary)
    write_json(folder / "summary.json", summary)


def table_rows(run: dict[str, Any]) -> dict[str, list[str]]:
    """The comparison: label to cells, the best ones between stars."""
    rows = {"": run["table"]["columns"]} if run["table"]["rows"] else {}
    for row in run["table"]["rows"]:
        rows[row["label"]] = [f"*{cell}*" if at in row["best"] else cell for at, cell in enumerate(row["cells"])]
    return rows


def test_comparison_marks_the_best_values(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert page["adapter"] is None, "there is none in the folder"
    assert table_rows(page) == {
        "": ["rankpilot", "uniform"],
        "held-out loss": ["*0.3841*", "0.4041"],
        "held-out accuracy": ["*86.10%*", "85.20%"],
        "peak memory": ["*91 MiB*", "96 MiB"],
        "budget": ["100 MiB", "100 MiB"],
        "adapter parameters": ["120,000", "100,000"],
        "adapted modules": ["17", "17"],
        "median step": ["51.2 ms", "51.2 ms"],
        "training time": ["12.3 s", "12.3 s"],
    }


def test_the_better_run_is_marked_whichever_it_is(run_folder: Path) -> None:
    edit_summary(run_folder, lambda s: s["runs"]["uniform"].update(held_out_loss=0.2, held_out_accuracy=0.99))
    page = page_of(run_folder)
    assert table_rows(page)["held-out loss"] == ["0.3841", "*0.2000*"]
    assert table_rows(page)["held-out accuracy"] == ["86.10%", "*99.00%*"]
    assert page["warnings"] == [
        "From a single run each, rankpilot's held-out loss is 92.0% higher than that of uniform ranks, "
        "ranks 4 to 16 on 17 of 36 modules."
    ], "it is red"
    assert page["results"] == page["caveats"] == []


def test_a_run_in_parts_tells_what_its_predictions_are_of(run_folder: Path) -> None:
    """A part has as many rows as the budget holds, so measured steps take more than the plan does with one row."""
    edit_summary(run_folder, lambda summary: summary["runs"]["rankpilot"].update(parts=2.5, padding_saved=0.1))
    found = page_of(run_folder)
    for told in (found["predicted_of"], found["decisions"][2]["summary"]):
        assert "longest row alone" in told


def test_decisions_in_words_and_in_a_line_each(run_folder: Path) -> None:
    first, _, third, _ = page_of(run_folder)["decisions"]
    assert third["summary"] == (
        "1 up, 1 down, 34 unchanged; predicted cost 94 MiB of 100 MiB (measured before: 89 MiB). The "
        "budget changed the requested rank of 3 modules."
    )
    assert third["line"] == "step 68: 2 modules changed, 94 of 100 MiB, mean rank 2.3"
    assert first["summary"].startswith("18 of 36 modules adapted; "), "all were at rank 1 only to be measured"
    assert (first["measures"], third["measures"]) == (True, False)


def test_flags_and_constants_do_not_stand_out(run_folder: Path) -> None:
    pairs = standing_out(read_run(run_folder).decisions[0])
    (most, above), (other, below) = pairs[30][0], pairs[32][0]
    assert (most, other) == ("sensitivity", "snr")
    assert above > 5
    assert below < -5
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
    page = page_of(run_folder)
    assert table_rows(page) == {"": ["rankpilot"], "held-out loss": ["0.3841"]}
    assert any("no decision log" in line for line in page["left_out"])
    for part in ("decisions", "modules", "losses", "peaks", "settings", "sentences", "subject", "adapter", "results"):
        assert not page[part], part


def test_decisions_after_a_probe_start_from_the_ranks_in_place(run_folder: Path) -> None:
    lines = run_folder / "decisions" / "decisions.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[1:]))
    assert [decision["number"] for decision in page_of(run_folder)["decisions"]] == [1, 2, 3]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": {"uniform": {}}}'])
def test_a_run_without_a_summary_is_reported_from_the_rest(run_folder: Path, content: str | None) -> None:
    path = run_folder / "summary.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    page = page_of(run_folder)
    (line,) = page["left_out"]
    words = "results (the run has not finished: no summary.json)" if content is None else "is unreadable"
    assert words in line
    assert page["results"] == ["The latest held-out loss is 0.3840, at step 200."]
    assert not page["table"]["rows"]
    assert len(page["decisions"]) == 4
    assert set(page["sentences"]) == {"ranks", "losses", "costs"}


def test_a_folder_without_a_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        read_run(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"decisions/decisions\.jsonl or decisions\.jsonl.*summary\.json"):
        read_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_log_that_cannot_be_read_is_named_and_left_out(run_folder: Path) -> None:
    (run_folder / "decisions" / "decision-000001.safetensors").write_bytes(b"{")
    (run_folder / "config.json").write_text('{"model": ')
    page = page_of(run_folder)
    (line,) = page["left_out"]
    assert "decision-000001.safetensors is missing, corrupt" in line
    assert "\n" not in line
    assert page["losses"]
    assert not page["decisions"]


def test_a_decision_log_alone(run_folder: Path) -> None:
    folder = run_folder / "decisions"
    page = page_of(folder)
    assert page["left_out"] == ["losses (no checkpoint with a trainer_state.json)"]
    assert len(page["decisions"]) == 4
    assert page["peaks"], "the log has the peaks before its decisions"
    assert not page["losses"]
    assert page["settings"] == {"policy": "pilot", "seed": "3"}


@pytest.fixture
def trainer_folder(run_folder: Path, tmp_path: Path) -> Path:
    """The output folder of a Trainer: decisions, and checkpoints with what was logged up to them."""
    folder = tmp_path / "out"
    shutil.copytree(run_folder / "decisions", folder / "decisions")
    rows = read_json_lines(run_folder / "metrics-rankpilot.jsonl")
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model"}
    for step in (100, 200):
        history = [{key: row[key] for key in row if key != "peak_bytes"} for row in rows if row["step"] <= step]
        state = {"global_step": step, "log_history": history}
        write_json(folder / f"checkpoint-{step}" / "trainer_state.json", state)
        write_json(folder / f"checkpoint-{step}" / "adapter_config.json", config)
    return folder


def test_a_trainer_output_folder(trainer_folder: Path) -> None:
    page = page_of(trainer_folder)
    assert not page["left_out"]
    assert set(page["sentences"]) == {"ranks", "losses", "costs"}
    assert page["results"] == ["The latest held-out loss is 0.3840, at step 200."]
    checkpoint, adapter = trainer_folder / "checkpoint-200", page["adapter"]
    assert (adapter["folder"], adapter["base"]) == (str(checkpoint), "some/model")
    assert f"AutoPeftModelForCausalLM.from_pretrained('{checkpoint}')" in adapter["load"]
    assert f"rankpilot export {quote(str(checkpoint))} --output padded" in adapter["export"]
    for content in ('{"task_type": "CAUSAL_LM", "base_model_name_or_path": null}', '{"task_type": "SEQ'):
        (checkpoint / "adapter_config.json").write_text(content)
        adapter = page_of(trainer_folder)["adapter"]
        assert adapter["base"] == "the fine-tuned model"
        assert f"PeftModel.from_pretrained(base_model, '{checkpoint}')" in adapter["load"]


def test_a_torn_trainer_state_gives_way_to_the_one_before(trainer_folder: Path) -> None:
    (trainer_folder / "checkpoint-200" / "trainer_state.json").write_text('{"log_hist')
    page = page_of(trainer_folder)
    assert page["results"] == ["The latest held-out loss is 0.4293, at step 100."]
    (line,) = page["left_out"]
    assert "checkpoint-200" in line


def test_the_page_names_the_adapter_of_a_fine_tune(run_folder: Path) -> None:
    adapter = run_folder / "rankpilot" / "adapter"
    write_json(adapter / "adapter_config.json", {"task_type": "SEQ_CLS", "base_model_name_or_path": "some/model"})
    edit_summary(run_folder, lambda s: s.update(outputs=5))
    shown = page_of(run_folder)["adapter"]
    assert f"AutoPeftModelForSequenceClassification.from_pretrained('{adapter}', num_labels=5)" in shown["load"]
    assert "model.merge_and_unload()" in shown["load"]
    assert f"rankpilot export {quote(str(adapter))} --format rank-pattern" in shown["export"]


def test_the_outputs_of_a_head_that_was_saved_with_the_adapter(trainer_folder: Path) -> None:
    checkpoint = trainer_folder / "checkpoint-200"
    adapter = {"task_type": "SEQ_CLS", "base_model_name_or_path": "some/model", "modules_to_save": ["classifier"]}
    write_json(checkpoint / "adapter_config.json", adapter)
    assert f"from_pretrained('{checkpoint}')" in page_of(trainer_folder)["adapter"]["load"]
    shapes = {"lora_A.weight": (2, 8), "classifier.dense.weight": (2, 8), "classifier.out_proj.weight": (3, 2)}
    tensors = {f"base_model.model.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    assert f"from_pretrained('{checkpoint}', num_labels=3)" in page_of(trainer_folder)["adapter"]["load"]


def test_the_adapter_of_a_fine_tune_that_goes_on_is_that_of_its_last_checkpoint(run_folder: Path) -> None:
    for step in (5, 10):
        write_json(run_folder / "rankpilot" / f"checkpoint-{step}" / "adapter_config.json", {"task_type": "SEQ_CLS"})
    assert read_run(run_folder).adapter == run_folder / "rankpilot" / "checkpoint-10"


def test_a_budget_of_parameters_is_not_given_in_bytes(tmp_path: Path, run_folder: Path) -> None:
    shutil.rmtree(run_folder / "decisions")
    problem = problem_of(plans()[0])
    counted = replace(problem, cost=ParameterCost(np.full((1, 36), 1e3)), limit=300_000.0)
    write_decisions(run_folder / "decisions", lambda ranks: replace(counted, ranks=ranks), 1 / MIB * 3000)
    edit_summary(run_folder, lambda s: [run.update(budget_bytes=300_000) for run in s["runs"].values()])
    page = page_of(run_folder)
    assert table_rows(page)["budget"] == ["300,000 parameters"] * 2
    assert page["unit"] == "parameters"
    assert page["peaks"] == {}, "bytes are no parameters"
    assert page["sentences"]["costs"] == "Plans take at most 288,000 of 300,000 parameters"
    line = "step 0: 18 of 36 modules adapted, 270,000 of 300,000 parameters, mean rank 2.0"
    assert page["decisions"][0]["line"] == line


def test_summary_table(run_folder: Path) -> None:
    console = Console(width=80, record=True, force_terminal=True, file=StringIO())
    console.print(summary_table(read_run(run_folder)))
    text = console.export_text(styles=True)
    assert "\x1b[1m0.3841" in text
    assert "\x1b[1m0.4041" not in text
    assert "MiniLM on sst2" in text


def test_page_of_a_trainer_with_the_callback(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    """From what they themselves wrote."""
    rows = [{"input_ids": (row := torch.randint(0, 64, (8,))), "labels": row} for _ in range(16)]
    steps = {"max_steps": 8, "logging_steps": 2, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=2, **steps, **quiet)
    model = make_llama(task_type="CAUSAL_LM")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])
    callback = attach(trainer, "signal-mean", budget="90%")
    trainer.train()
    run = read_run(tmp_path / "out")
    assert not run.missing
    assert [step for step, _ in run.points("rankpilot", "loss")] == [2, 4, 6, 8]
    assert [step for step, _ in run.points("rankpilot", "eval_loss")] == [4, 8]
    assert {limit for _, limit in run.limits} == {callback.limit}
    assert run.peaks()["rankpilot"]
    assert run.steps == 8
    (page,) = page_data([run], [None])["runs"]
    assert page["adapter"]["folder"] == str(tmp_path / "out" / "checkpoint-8")
    assert len(page["decisions"]) == len(callback.predictions)
    assert set(page["sentences"]) == {"costs", "ranks", "losses"}
