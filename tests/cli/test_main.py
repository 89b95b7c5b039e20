"""The command line: one clear line for every mistake, and settings from files and flags."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.cli import assets, finetune, train
from rankpilot.cli import main as cli
from rankpilot.common.files import as_json, open_run, write_json
from rankpilot.finetune.options import FinetuneConfig
from rankpilot.training.config import PRESETS, TrainConfig

from .mistakes import failure, usage_error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options with which commands would have run."""
    options: list[Any] = []
    monkeypatch.setattr(train, "train_command", options.append)
    monkeypatch.setattr(finetune, "finetune_command", options.append)
    return options


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unknown command 'trian'. Did you mean: 'train'" in failure(["trian"], capsys)


def test_unknown_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.data import models

    def offline(name: str) -> None:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", offline)
    monkeypatch.chdir(tmp_path)
    line = failure(["finetune", "bert-tinny", "sst2", "--output", str(tmp_path / "run")], capsys)
    assert "Unknown model 'bert-tinny'" in line
    missing = failure(["finetune", "./nowhere", "sst2", "--output", str(tmp_path / "run")], capsys)
    assert "There is no model folder" in missing
    assert not (tmp_path / "run").exists(), "a mistake leaves no folder behind"


def test_unknown_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.data import workload
    from rankpilot.data import workload as splits

    monkeypatch.setattr(workload, "load_tokenizer", lambda model: None)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nmore lines")

    monkeypatch.setattr(splits, "load_dataset", offline)
    monkeypatch.chdir(tmp_path)
    name = next(iter(splits.DATASETS))
    line = failure(["finetune", "m", f"{name}x", "--output", str(tmp_path / "run")], capsys)
    assert f"Unknown data set '{name}x'. Did you mean: '{name}'" in line
    assert "no network" in line
    (tmp_path / "data.xls").write_text("")
    assert "its suffix is not one of" in failure(["finetune", "m", "data.xls"], capsys)


@pytest.mark.parametrize("option", [["--preset", "nope"], ["--preset=nope"]])
def test_an_unknown_preset(capsys: pytest.CaptureFixture[str], seen: list[Any], option: list[str]) -> None:
    assert "Unknown preset 'nope'. Allowed: 'quick', 'default', 'full'" in failure(["train", *option], capsys)
    assert not seen


@pytest.mark.parametrize("budget", ["lots", "-3GiB", "0", "1.5e"])
def test_bad_budget(capsys: pytest.CaptureFixture[str], seen: list[Any], budget: str) -> None:
    assert f"Cannot read the budget '{budget}'" in usage_error(["finetune", "m", "d", f"--budget={budget}"], capsys)
    assert not seen


def test_bad_numbers(capsys: pytest.CaptureFixture[str], seen: list[Any]) -> None:
    assert "at least 1" in usage_error(["finetune", "m", "d", "--steps", "0"], capsys)
    assert "at least 1, or None for all rows; got 0" in usage_error(["finetune", "m", "d", "--train-rows", "0"], capsys)
    assert "None for all rows; got None and -3" in usage_error(["finetune", "m", "d", "--held-out-rows", "-3"], capsys)
    assert "seed is a whole number from 0 to 2**32 - 1" in usage_error(
        ["finetune", "m", "d", "--seed", "100000000000"], capsys
    )
    assert "episodes_per_task at least 2" in usage_error(["train", "--episodes-per-task", "1"], capsys)
    assert "fractions rise" in usage_error(["train", "--schedule.fractions", "0.5"], capsys)
    assert not seen


def test_unknown_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "run")]
    assert "Unknown rule 'signal-man'. Did you mean: 'signal-mean'" in failure(
        ["finetune", "m", "d", "--policy", "signal-man", *output], capsys
    )
    assert "There is no policy folder" in failure(["finetune", "m", "d", "--policy", "runs/none", *output], capsys)
    (tmp_path / "empty").mkdir()
    line = failure(["finetune", "m", "d", "--policy", str(tmp_path / "empty"), *output], capsys)
    assert "card.json is missing" in line
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = failure(["train", "--output", str(tmp_path)], capsys)
    assert "exists already. Pass --resume" in line
    line = failure(["train", "--output", str(tmp_path), "--resume"], capsys)
    assert "is no run of rankpilot's" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_brackets_in_messages_survive(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes [words] for markup, and a message may well hold some."""
    assert "'[bold]x'" in failure(["[bold]x"], capsys)
    assert "'x[/]'" in failure(["x[/]"], capsys)


def test_unknown_asset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unknown" in failure(["assets", "no-such-thing"], capsys)


@pytest.mark.parametrize("arguments", [[name] for name in cli.COMMANDS])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    try:
        status: Any = cli.run([*arguments, "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert f"rankpilot {arguments[0]}" in capsys.readouterr().out


def test_help_and_mistakes_load_no_learning_library() -> None:
    """So that they take a few tenths of a second."""
    helps = [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]
    mistakes = [
        ["trian"],
        ["train", "--preset", "nope"],
        ["train", "--episodes-per-task", "1"],
        ["evaluate"],
    ]
    mistakes += [["finetune", "m", "d", "--budget", "lots"], ["memory", "m", "--optimizer", "adam"], ["export"]]
    code = f"""
import contextlib, io, sys, rankpilot.__main__
from rankpilot.cli.main import run
for arguments in {[*helps, *mistakes]!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        run(arguments)
heavy = ("torch", "transformers", "peft", "gymnasium", "stable_baselines3", "datasets", "matplotlib", "pyarrow")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    assert cli.run([]) == 2
    assert capsys.readouterr().out.count("rankpilot finetune") == 2
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.2.0"


def test_unknown_preset(capsys: pytest.CaptureFixture[str], seen: list[Any]) -> None:
    for given in (["--preset", "nope"], ["--preset=nope"]):
        assert "Unknown preset 'nope'. Allowed: 'quick', 'default', 'full'" in failure(["train", *given], capsys)
    assert not seen


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m rankpilot evaluate --help | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout[:5], done.stderr) == ("usage", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NotADirectoryError(20, "Not a directory", "runs/x"), "error: Not a directory (runs/x). Check that the path"),
        (OSError(28, "No space left on device"), "error: No space left on device. Check that the path"),
        (ConnectionError("no network\nmore"), "error: no network. Check"),
        (OSError(), "error: OSError. Check"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: OSError, line: str
) -> None:
    def refuse(options: Any) -> None:
        raise error

    monkeypatch.setattr(train, "train_command", refuse)
    assert failure(["train"], capsys).startswith(line)


def test_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The errors of safetensors and torch are no OSErrors; a limit on the size of files provokes them."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    large = {"weight": torch.ones(50_000)}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        words = Tokenizer(WordLevel({str(number): number for number in range(5000)}))
        writers = (
            lambda: save_file(large, tmp_path / "a"),
            lambda: torch.save(large, tmp_path / "b"),
            lambda: words.save(str(tmp_path / "c")),
        )
        for write in writers:
            monkeypatch.setattr(train, "train_command", lambda options, write=write: write())
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            shown = failure(["train"], capsys)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert shown.startswith("error: A file could not be written: ")
            assert shown.endswith("that the disk has room.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_sigterm_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "train_command", lambda options: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(["train"]) == 143
    assert capsys.readouterr().err == "Terminated.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_presets_and_flags(seen: list[Any]) -> None:
    assert cli.run(["train"]) == 0
    assert cli.run(["train", "--preset", "default", "--episodes-per-task", "5"]) == 0
    assert cli.run(["train", "--preset=default"]) == 0
    quick, changed, default = seen
    assert as_json(TrainConfig, quick) == as_json(TrainConfig, PRESETS["quick"])
    assert as_json(TrainConfig, default) == as_json(TrainConfig, PRESETS["default"])
    assert as_json(TrainConfig, changed) == as_json(
        TrainConfig, dataclasses.replace(PRESETS["default"], episodes_per_task=5)
    )


def test_settings_of_a_training_run_from_its_file(seen: list[Any], tmp_path: Path) -> None:
    config = TrainConfig(
        iterations=3,
        episodes_per_task=4,
        suites=("planted",),
        schedule=DecisionSchedule(probe_steps=5, fractions=(0.0, 0.3)),
        network=NetworkConfig(width=9),
        seed=11,
    )
    path = tmp_path / "config.json"
    write_json(path, as_json(TrainConfig, config))
    assert cli.run(["train", "--config", str(path)]) == 0
    assert (
        cli.run(
            ["train", f"--config={path}", "--episodes-per-task", "6", "--schedule.probe-steps", "8", "--output", "x"]
        )
        == 0
    )
    assert as_json(TrainConfig, seen[0]) == as_json(TrainConfig, config)
    assert seen[0].schedule == config.schedule
    assert seen[1].output == Path("x")
    schedule = dataclasses.replace(config.schedule, probe_steps=8)
    assert as_json(TrainConfig, seen[1]) == as_json(
        TrainConfig, dataclasses.replace(config, episodes_per_task=6, schedule=schedule)
    )


def test_settings_of_a_fine_tune_from_its_file(seen: list[Any], tmp_path: Path) -> None:
    config = FinetuneConfig("model", "data", policy="top-down", budget="350MB", compare_uniform=True, train_rows=7)
    path = tmp_path / "config.json"
    write_json(path, as_json(FinetuneConfig, config))
    assert cli.run(["finetune", "--config", str(path)]) == 0
    assert cli.run(["finetune", "--config", str(path), "--budget", "50%", "--train-rows", "9"]) == 0
    assert cli.run(["finetune", "other", "data", "--config", str(path), "--no-compare-uniform"]) == 0
    assert as_json(FinetuneConfig, seen[0]) == as_json(FinetuneConfig, config)
    assert as_json(FinetuneConfig, seen[1]) == as_json(
        FinetuneConfig, dataclasses.replace(config, budget="50%", train_rows=9)
    )
    assert as_json(FinetuneConfig, seen[2]) == as_json(
        FinetuneConfig, dataclasses.replace(config, model="other", compare_uniform=False)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read the config file"),
        ("{", "Cannot read the config file"),
        ("[1]", "holds no settings by name"),
        ('{"grup": 3}', "grup"),
        ('{"schedule": {"probes": 3}}', "probes"),
        ('{"schedule": 3}', "schedule"),
        ('{"episodes_per_task": 1}', "episodes_per_task at least 2"),
        ('{"episodes_per_task": "many"}', "does not fit: episodes_per_task is a whole number; got 'many'"),
        ('{"preset": "nope"}', "Unknown preset 'nope'"),
        ('{"output": 3}', "output is a path"),
    ],
)
def test_a_bad_config_file(
    capsys: pytest.CaptureFixture[str], seen: list[Any], tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert message in failure(["train", "--config", str(path)], capsys)
    assert not seen


def test_a_config_option_without_a_file(capsys: pytest.CaptureFixture[str], seen: list[Any]) -> None:
    assert "--config" in failure(["train", "--config"], capsys)
    assert not seen


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupt(options: Any) -> None:
        raise KeyboardInterrupt

    def interrupted_run(options: Any) -> None:
        with open_run(tmp_path / "run", {}, resume=False):
            interrupt(options)

    monkeypatch.setattr(train, "train_command", interrupted_run)
    assert cli.run(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted. The same command with --resume continues from here.\n"
    monkeypatch.setattr(train, "train_command", interrupt)
    assert cli.run(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n", "there is no run yet"
    monkeypatch.setattr(assets, "main", interrupt)
    assert cli.run(["assets"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")])
def test_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def allocate(options: Any) -> None:
        raise error

    monkeypatch.setattr(train, "train_command", allocate)
    assert "Too little memory: " in failure(["train"], capsys)


def test_other_errors_of_libraries_are_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train, "train_command", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.run(["train"])


def test_train_agent_script() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_agent.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--iterations" in done.stdout
    assert "rankpilot train" in done.stdout


def test_a_tiny_training_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rankpilot.agents.learned.policy_file import load_policy

    small = [
        "--iterations",
        "2",
        "--stacks",
        "1",
        "--tasks-per-stack",
        "1",
        "--episodes-per-task",
        "2",
        "--workers",
        "1",
    ]
    tasks = ["--task-steps", "8", "--suites", "planted", "--warm-tasks", "1", "--validation-tasks", "1"]
    command = ["train", *small, *tasks, "--validate-every", "1", "--schedule.probe-steps", "2"]
    folder = tmp_path / "pilot"
    assert cli.run([*command, "--output", str(folder)]) == 0
    assert load_policy(folder).name == "pilot"
    assert (folder / "learning_curve.png").stat().st_size > 1000
    assert json.loads((folder / "config.json").read_text())["episodes_per_task"] == 2
    card = json.loads((folder / "card.json").read_text())
    assert (card["episodes"], set(card["validation"])) == (4, {"learned", "signal-mean", "top-down"})
    assert "warm_after" in card["start"]
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"Return of an episode, .*: [+-]\d+\.\d% in the first round, [+-]\d+\.\d% in the last, of 2\.", printed
    )
    assert "top-down" in printed
    assert "exists already" in failure([*command, "--output", str(folder)], capsys)
    assert cli.run([*command, "--output", str(folder), "--resume"]) == 0
    assert "holds a finished policy already" in capsys.readouterr().out.replace("\n", "")
    resumed = [*command, "--output", str(folder), "--resume"]
    assert "other settings (seed: 0 there, 7 now)" in failure([*resumed, "--seed", "7"], capsys)
    weights = folder / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "policy.safetensors" in failure(resumed, capsys)
