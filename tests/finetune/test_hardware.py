"""What the hardware tells of a run: what it is, how free it was, and the energy that was taken."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rankpilot.common.devices import EnergyCounter
from rankpilot.common.errors import NonFiniteError
from rankpilot.common.files import read_json, read_json_lines, write_json
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.finetune import trainer as metrics_module
from rankpilot.finetune.trainer import RunMetrics, hardware_facts
from rankpilot.study.page import page_data
from rankpilot.study.run_data import read_run
from transformers import TrainerState, TrainingArguments

from ..study.conftest import run_folder as run_folder


def test_a_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = hardware_facts(torch.device("cpu"))
    assert f", {os.cpu_count()} cores" in facts["device"]
    assert len(facts["device"].split(",")[0]) > 2
    assert 0 < facts["free_bytes"] <= facts["total_bytes"] == psutil.virtual_memory().total
    assert 0 <= facts["busy"] <= 1
    monkeypatch.setattr(metrics_module, "_PROCESSORS", tmp_path / "nothing")
    name = hardware_facts(torch.device("cpu"))["device"].split(",")[0]
    assert name == (platform.processor() or platform.machine())


@pytest.mark.parametrize("told", [37, None])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, told: int | None) -> None:
    def utilization(device: torch.device) -> int:
        if told is None:
            raise ModuleNotFoundError("pynvml")
        return told

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    properties = SimpleNamespace(name="H100", total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(metrics_module, "free_bytes", lambda device: 60)
    expected = {"device": "H100", "busy": None if told is None else 0.37, "free_bytes": 60, "total_bytes": 80}
    assert hardware_facts(torch.device("cuda")) == expected


def metrics_of(path: Path, joules: list[float]) -> RunMetrics:
    """Metrics whose counter tells these values, one after another."""
    values = iter(joules)
    return RunMetrics(path, energy=EnergyCounter("made up", lambda: next(values)))


def test_energy_of_a_run_that_was_interrupted(tmp_path: Path) -> None:
    """What the device took between the two processes is not the run's."""
    path = tmp_path / "metrics.jsonl"
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(), None
    first = metrics_of(path, [100.0, 130.0, 150.0])
    given: Any = (arguments, state, control)
    first.on_train_begin(*given)
    state.global_step = 5
    first.on_log(*given, logs={"loss": 1.0})
    assert read_json_lines(path)[-1]["energy_joules"] == 30.0
    assert first.energy_joules == 50.0, "lost with the process: after the last line"
    second = metrics_of(path, [900.0, 907.0])
    second.on_train_begin(*given)
    assert second.energy_joules == 37.0
    assert RunMetrics(path).energy_joules is None


def test_a_gradient_that_is_not_finite_ends_a_run_but_in_float16(tmp_path: Path) -> None:
    """There the scaler leaves such steps out, and its factor falls."""
    arguments, metrics = TrainingArguments(str(tmp_path)), RunMetrics(tmp_path / "metrics.jsonl", PeakMeter(1))
    given: Any = (arguments, TrainerState(), None)
    logs = {"loss": 1.0, "grad_norm": float("inf")}
    with pytest.raises(NonFiniteError, match="The gradient norm is inf at step 0"):
        metrics.on_log(*given, logs=logs)
    arguments.fp16 = True
    metrics.on_log(*given, logs=logs)
    assert read_json_lines(metrics.path)[-1]["loss"] == 1.0


def test_the_page_says_what_was_measured(run_folder: Path) -> None:
    summary = read_json(run_folder / "summary.json")
    found = summary["runs"]["rankpilot"]
    for energy, line in (({}, "not measured: no energy counter"), ({"energy_joules": 1234.0}, "")):
        found |= {"hardware": {"device": "EPYC, 2 cores"}, **energy}
        write_json(run_folder / "summary.json", summary)
        (run,) = page_data([read_run(run_folder)], [None])["runs"]
        assert run["settings"].get("energy", "").startswith(line)
        rows = {row["label"]: row["cells"] for row in run["table"]["rows"]}
        assert rows.get("energy") == (["1.23 kJ", "–"] if energy else None)


@pytest.mark.parametrize("wrong", [{"device": 3}, {"free_bytes": -1}, {"busy": "all"}])
def test_hardware_of_strangers(run_folder: Path, wrong: dict[str, Any]) -> None:
    summary = read_json(run_folder / "summary.json")
    summary["runs"]["rankpilot"]["hardware"] = wrong
    write_json(run_folder / "summary.json", summary)
    assert any(part.startswith("results (") for part in read_run(run_folder).missing)
