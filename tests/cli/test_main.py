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
from unittest.mock import Mock

import pytest
import transformers
from rankpilot.agents.training import Train
from rankpilot.cli import finetune, train
from rankpilot.cli import main as cli
from rankpilot.common.files import as_json, open_run, write_json
from rankpilot.finetune.options import FinetuneConfig

from .mistakes import OLD_TYRO, failure, usage_error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options with which commands would have run."""
    options: list[Any] = []
    monkeypatch.setattr(train, "train_command", options.append)
    monkeypatch.setattr(finetune, "finetune_command", options.append)
    return options


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, without a network."""
    from rankpilot.data import models, workload

    for owner, name in (
        (models.AutoTokenizer, "from_pretrained"),
        (transformers.AutoConfig, "from_pretrained"),
        (workload, "load_dataset"),
    ):
        monkeypatch.setattr(owner, name, Mock(side_effect=ConnectionError("no network\nmore lines")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_unknown_model(capsys: pytest.CaptureFixture[str], offline: Path) -> None:
    assert "Unknown model 'bert-tinny'" in failure("finetune bert-tinny sst2", capsys)
    assert "needs none" in failure("finetune qwen3-8b sst2", capsys)
    assert "Model folder " in failure("finetune ./nowhere sst2", capsys)
    line = failure("finetune all-minilm-l6-v3 sst2", capsys)
    assert "Unknown model 'all-minilm-l6-v3'. Did you mean: 'all-minilm-l6-v2'" in line
    assert not list(offline.iterdir()), "a mistake leaves no folder behind"


def test_unknown_data(capsys: pytest.CaptureFixture[str], offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.data import workload

    monkeypatch.setattr(workload, "load_tokenizer", lambda model: None)
    name = next(iter(workload.DATASETS))
    line = failure(f"finetune a/m {name}x", capsys)
    assert f"Unknown data set '{name}x'. Did you mean: '{name}'" in line
    assert "no network" in line
    (offline / "data.xls").write_text("")
    assert "its suffix must be one of" in failure("finetune a/m data.xls", capsys)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("finetun", "Unknown command 'finetun'. Did you mean: 'finetune'"),
        ("policy trian", "Unknown command 'policy trian'. Did you mean: 'policy train'"),
        ("train", "Unknown command 'train'. Did you mean: 'policy train'"),
        ("allocate m d", "Unknown command 'allocate'. Allowed: 'plan'"),
        ("[bold]x", "'[bold]x'"),  # rich takes [words] for markup, and a message may well hold some
        ("x[/]", "'x[/]'"),
        ("assets no-such-thing", "Unknown"),
        ("finetune --config", "--config"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], seen: list[Any], command: str, words: str) -> None:
    assert words in failure(command, capsys)
    assert not seen


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(
            (f"finetune m d --budget={bad}", f"Cannot read the budget '{bad}'")
            for bad in ("lots", "-3GiB", "0", "1.5e")
        ),
        *(
            (f"finetune m d --stream {bad}", f'stream is "auto", "off" or a number of layers, at least 1; got {shown}')
            for bad, shown in (("-3", "-3"), ("0", "0"), ("some", "'some'"), ("2.5", "'2.5'"))
        ),
        ("finetune m d --steps 0", "steps and eval_every must be between 1 and"),
        ("finetune m d --train-rows 0", "at least 1, or None for all rows; got 0"),
        ("finetune m d --held-out-rows -3", "None for all rows; got None and -3"),
        ("finetune m d --seed 100000000000", "seed must be a whole number from 0 to 2**32 - 1"),
        ("policy train --episodes 12", "multiple of 8"),
        ("policy train --rounds 0", "rounds must be a whole number of at least 1"),
    ],
)
def test_options_out_of_range(capsys: pytest.CaptureFixture[str], seen: list[Any], command: str, words: str) -> None:
    assert words in usage_error(command, capsys)
    assert not seen


def test_unknown_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for policy, words in {
        "signal-man": "Unknown rule 'signal-man'. Did you mean: 'signal-mean'",
        "agnet": "Unknown rule 'agnet'. Did you mean: 'agent'",
        "runs/none": "Policy folder runs/none does not exist",
        str(tmp_path / "empty"): "card.json is missing",
    }.items():
        assert words in failure(f"finetune a/m d --policy {policy} --output {tmp_path / 'run'}", capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "already exists. Pass --resume" in failure(f"policy train --output {tmp_path}", capsys)
    assert "is not a run of rankpilot" in failure(f"policy train --output {tmp_path} --resume", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


TAUGHT = {
    "policy evaluate": ("bootstrap over tasks", "below 0 is better"),
    "export": ("--output", "--rank", "{padded,merged,rank-pattern}", "vLLM", "axolotl"),
    "memory": ("nothing else is downloaded", "common options", "further options"),
    "finetune": ("plan options", "limit that no training step", "--per-device-train-batch-size INT, --batch-size INT"),
}
"""What the help of commands says, among other things."""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    try:
        status: Any = cli.run([*command.split(), "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    taught = () if OLD_TYRO and command in ("memory", "finetune") else TAUGHT.get(command, ())
    for words in (f"rankpilot {command}", *taught):
        assert words in shown


def test_help_and_mistakes_load_no_learning_library() -> None:
    """So that they take a few tenths of a second."""
    helps = [["--help"], ["--version"], *([*name.split(), "--help"] for name in cli.COMMANDS)]
    mistakes = [
        "trian",
        "policy train --rounds 0",
        "policy evaluate",
        "export",
    ]
    mistakes += ["finetune m d --budget lots", "memory m --device T4 --optimizer adam"]
    code = f"""
import contextlib, io, sys, rankpilot.__main__
from rankpilot.cli.main import run
for arguments in {[*helps, *map(str.split, mistakes)]!r}:
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
    assert cli.run(["policy", "--help"]) == 0
    assert cli.run(["policy"]) == 2
    assert capsys.readouterr().out.count("rankpilot finetune") == 4
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.2.0"


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m rankpilot policy evaluate --help | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout[:5], done.stderr) == ("usage", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NotADirectoryError(20, "Not a directory", "runs/x"), "error: Not a directory (runs/x). Check the path"),
        (OSError(28, "No space left on device"), "error: No space left on device. Check the path"),
        (ConnectionError("no network\nmore"), "error: no network. Check"),
        (OSError(), "error: OSError. Check"),
        (MemoryError(), "error: Out of memory: "),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "error: Out of memory: CUDA out of"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    monkeypatch.setattr(train, "train_command", Mock(side_effect=error))
    assert failure(["policy", "train"], capsys).startswith(line)


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
            shown = failure(["policy", "train"], capsys)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert shown.startswith("error: Cannot write a file: ")
            assert shown.endswith("the free disk space.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def assert_same(kind: type, seen: list[Any], *expected: Any) -> None:
    """The settings that were seen are these; commands add options of their own."""
    assert [as_json(kind, each) for each in seen] == [as_json(kind, each) for each in expected]


def test_flags_of_a_training(seen: list[Any]) -> None:
    assert cli.run(["policy", "train", "--rounds", "7", "--output", "x"]) == 0
    assert seen == [Train(rounds=7, output=Path("x"))]


def test_settings_of_a_fine_tune_from_its_file(seen: list[Any], tmp_path: Path) -> None:
    config = FinetuneConfig("model", "data", policy="top-down", budget="350MB", compare_uniform=True, train_rows=7)
    path = tmp_path / "config.json"
    write_json(path, as_json(FinetuneConfig, config))
    assert cli.run(["finetune", "--config", str(path)]) == 0
    assert cli.run(["finetune", "--config", str(path), "--budget", "50%", "--train-rows", "9"]) == 0
    assert cli.run(["finetune", "other", "data", "--config", str(path), "--no-compare-uniform"]) == 0
    less = dataclasses.replace(config, budget="50%", train_rows=9)
    other = dataclasses.replace(config, model="other", compare_uniform=False)
    assert_same(FinetuneConfig, seen, config, less, other)


def test_layers_that_stream(seen: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nstream: off\nparts: off\n")  # booleans to YAML
    for words in (["m", "d", "--stream", "20"], ["m", "d", "--stream", "off"], ["--config", str(path)]):
        assert cli.run(["finetune", *words]) == 0
    assert [each.pilot_options().stream for each in seen] == [20, "off", "off"]
    assert seen[-1].parts == "off"


def test_settings_have_the_names_of_the_trainer_too(seen: list[Any], tmp_path: Path) -> None:
    config = FinetuneConfig("m", "d", batch_size=3, accumulation=2, steps=7, eval_every=5, best=True, epochs=2.0)
    short = "--batch-size 3 --accumulation 2 --steps 7 --eval-every 5 --best --epochs 2"
    long = "--per-device-train-batch-size 3 --gradient_accumulation_steps 2 --max-steps 7 --eval-steps 5"
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nper_device_train_batch_size: 3\ngradient_accumulation_steps: 2\nmax_steps: 7\n")
    for given in (short, f"{long} --load-best-model-at-end --num-train-epochs 2"):
        assert cli.run(["finetune", "m", "d", *given.split()]) == 0
    assert cli.run(["finetune", "--config", str(path), *["--eval-steps", "5", "--best", "--epochs", "2"]]) == 0
    assert_same(FinetuneConfig, seen, config, config, config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read the config file"),
        ("{", "Cannot read the config file"),
        ("[1]", "must be a mapping of setting names to values; got"),
        ('{"grup": 3}', "grup"),
        ('{"seed": "many"}', "Invalid config file"),
        ('{"output": 3}', "output must be a path"),
    ],
)
def test_a_bad_config_file(
    capsys: pytest.CaptureFixture[str], seen: list[Any], tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert message in failure(["finetune", "--config", str(path)], capsys)
    assert not seen


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted_run(options: Any) -> None:
        with open_run(tmp_path / "run", {}, resume=False):
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_command", interrupted_run)
    assert cli.run(["policy", "train"]) == 130
    assert capsys.readouterr().err == "Interrupted. Run the same command with --resume to continue.\n"
    monkeypatch.setattr(train, "train_command", Mock(side_effect=KeyboardInterrupt))
    assert cli.run(["policy", "train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n", "there is no run yet"


def test_other_errors_of_libraries_are_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_command", Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.run(["policy", "train"])


def test_train_agent_script() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_agent.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--warm-rounds" in done.stdout


def test_a_training_draws_its_curve_and_tells_where_the_policy_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rankpilot.train_agent as script
    from rankpilot.agents.policy_file import GroupNetwork, NetworkConfig, save_policy
    from rankpilot.decide.groups import STEERING

    def train_nothing(options: Train, tell: Any) -> Path:
        tell("round 1 of 1: over_rule -0.2")
        save_policy(options.output, GroupNetwork(NetworkConfig(width=4)), STEERING, {})
        rows = [{"round": 0, "validation": 0.3}]
        rows += [{"round": 1, "over_rule": -0.2, "over_rule_p10": -1.0, "over_rule_p90": 0.4, "validation": -0.1}]
        (options.output / script.PROGRESS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return options.output

    monkeypatch.setattr(script, "train", train_nothing)
    assert cli.run(["policy", "train", "--output", str(tmp_path / "pilot")]) == 0
    assert (tmp_path / "pilot" / "learning_curve.png").stat().st_size > 1000
    printed = " ".join(capsys.readouterr().out.split())
    assert "round 1 of 1" in printed
    assert "The agent of round 1 is kept: its losses on validation tasks are 0.1 % below the rule's" in printed
    assert "--policy" in printed


def test_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rankpilot.env import evaluate
    from rankpilot.env.tasks import FineTuneTask

    sizes: dict[str, Any] = {"base": "bert-4x32", "steps": 25, "length": 16, "eval_rows": 16}
    planted = FineTuneTask("planted", 1, corpus="documentation", **sizes)
    tasks = {FineTuneTask("text", 2, **sizes): "moving", planted: "plain"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluation_tasks", lambda *args, **kwargs: tasks)
        command = f"policy evaluate left-alone union --oracle --tasks 1 --output {tmp_path / 'rows'}"
        assert cli.run(command.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows" / "rows.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in rows} == {"left-alone", "union", "oracle"}
    assert len(rows) == 5
    printed = capsys.readouterr().out
    assert re.search(r"oracle +│ +│ +[+-]\d+\.\d │", printed), "of the regime with its task"
    assert not re.search(r"\d to [+-]", printed), "a single task gives no interval"
    assert "Unknown rule 'unoin'" in failure(f"policy evaluate unoin --output {tmp_path / 'other'}", capsys)
