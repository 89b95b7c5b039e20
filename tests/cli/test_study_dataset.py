"""`rankpilot dataset`, and `rankpilot train --from-trials`."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.training import fit_plan_value
from rankpilot.agents.training.fit_plan_value import FitConfig
from rankpilot.cli import main as cli
from rankpilot.study.dataset.read import SAMPLE, open_dataset

from ..study.dataset.conftest import write_training
from .mistakes import failure

REFIT = ["train", "--from-trials", str(SAMPLE), "--validation-tasks", "0", "--workers", "1"]


def test_a_data_set_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_training(tmp_path / "pilot"), tmp_path / "trials"
    command = ["dataset", str(folder), "--output", str(output)]
    assert cli.run(command) == 0
    assert f"88 decisions of 45 runs on 3 tasks are in {output}." in capsys.readouterr().out
    assert open_dataset(output).facts["sources"][0]["name"] == "pilot"
    assert "exists already" in failure(command, capsys)
    assert "gives no rows" in failure(["dataset", str(tmp_path), "--output", str(tmp_path / "no")], capsys)


def test_a_policy_from_the_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_plan_value, "FitConfig", partial(FitConfig, epochs=2))
    folder = tmp_path / "pilot"
    assert cli.run([*REFIT, "--output", str(folder)]) == 0
    assert f"The policy is in {folder}" in capsys.readouterr().out.replace("\n", "")
    assert load_policy(folder).name == "pilot"
    card = json.loads((folder / "card.json").read_text())
    assert card["plan_runs"]["runs"] == 90
    assert (card["training"]["seed"], card["training"]["validation_tasks"]) == (1, 0)
    assert not (folder / "plan_runs").exists(), "nothing was run"
    assert "exists already" in failure([*REFIT, "--output", str(folder)], capsys)
    assert cli.run([*REFIT, "--output", str(folder), "--resume"]) == 0
    assert "holds a finished policy already" in capsys.readouterr().out.replace("\n", "")
    weights = (folder / "policy.safetensors").read_bytes()
    again = tmp_path / "again"
    assert cli.run(["train", "--config", str(folder / "config.json"), "--output", str(again)]) == 0
    assert (again / "policy.safetensors").read_bytes() == weights


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "pilot")]
    assert "other settings: iterations" in failure([*REFIT, "--iterations", "3", *output], capsys)
    assert "Leave out --preset" in failure([*REFIT, "--preset", "quick", *output], capsys)
    assert "no data set of rankpilot" in failure(["train", "--from-trials", str(tmp_path), *output], capsys)
    torn = tmp_path / "torn"
    shutil.copytree(SAMPLE, torn)
    (torn / "trials-00001.parquet").unlink()
    assert "missing or damaged" in failure(["train", "--from-trials", str(torn), *output], capsys)
