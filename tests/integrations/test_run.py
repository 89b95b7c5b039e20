"""`rankpilot run`: how a command ends, what reaches it, and the launchers that people use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rankpilot.cli.main import run
from rankpilot.cli.run import Run
from rankpilot.integrations import launch
from rankpilot.integrations.flags import in_words
from rankpilot.integrations.order import Order
from transformers import LlamaForCausalLM

from ..cli.mistakes import failure, usage_error
from ..finetune.trainer_kinds import TEXTS, llama, word_tokenizer

LIBRARY = """
class Handler:
    callbacks = ()

class Accelerator:
    def unwrap_model(self, model):
        return model

class Trainer:
    callback_handler, accelerator, model = Handler(), Accelerator(), object()

    def __init__(self):
        pass

    def train(self):
        print("trained")
"""
"""Stands for transformers, which takes seconds to import: a Trainer without LoRA."""

IMPORT = "from transformers.trainer import Trainer; "
TRAIN = IMPORT + "Trainer().train(); "


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PYTHONPATH with a small `transformers`."""
    folder = tmp_path / "library"
    (folder / "transformers").mkdir(parents=True)
    (folder / "transformers" / "__init__.py").touch()
    (folder / "transformers" / "trainer.py").write_text(LIBRARY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder


def lines(error: str) -> list[str]:
    """What `rankpilot run` has told."""
    return [line.removeprefix("rankpilot run: ") for line in error.splitlines() if line.startswith("rankpilot run: ")]


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (TRAIN, 0, "Trainer trains as it is: its model has no PEFT adapter."),
        (TRAIN + "Trainer().train(); exit(5)", 5, "Trainer trains as it is"),
        (IMPORT + "Trainer()", 0, launch.UNTRAINED),
        (IMPORT, 3, launch.ESCAPED),
        ("print('no training')", 3, launch.ESCAPED),
        ("exit(5)", 5, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', " + repr(TRAIN) + "])",
            0,
            "Trainer trains as it is",
        ),
    ],
)
@pytest.mark.usefixtures("library")
def test_statuses(capfd: pytest.CaptureFixture[str], code: str, status: int, told: str) -> None:
    assert run(["run", "--", sys.executable, "-c", code]) == status
    found = lines(capfd.readouterr().err)
    assert all(line.startswith(told) for line in found)
    assert len(found) == (code.count(".train()") or bool(told))


def test_an_escaped_process_is_told(capfd: pytest.CaptureFixture[str], library: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(library)!r}); {TRAIN}"
    assert run(["run", "--", sys.executable, "-I", "-c", code]) == launch.NOTHING_ATTACHED
    out, error = capfd.readouterr()
    assert (out, lines(error)) == ("trained\n", [launch.ESCAPED])
    assert run(["run", "--", sys.executable, "-I", "-c", f"{code}exit(4)"]) == 4
    assert not lines(capfd.readouterr().err)


def test_a_dry_run_does_not_train(capfd: pytest.CaptureFixture[str], library: Path) -> None:
    assert run(["run", "--dry", "--", sys.executable, "-c", TRAIN]) == 0
    out, error = capfd.readouterr()
    assert not out
    assert len(lines(error)) == 1
    assert run(["run", "--dry", "--", sys.executable, "-c", "0"]) == launch.NOTHING_ATTACHED


def test_commands_that_do_not_start(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    python = f"python {script}"
    for words, status, told in (
        (["no-such-command"], 127, "error: Command not found: no-such-command"),
        ([str(script)], 126, f"error: {script} is not executable. For a script, put python before it: -- {python}"),
        ([str(tmp_path)], 126, f"error: Cannot run {tmp_path}: Permission denied."),
    ):
        assert run(["run", "--", *words]) == status
        assert lines(capfd.readouterr().err) == [told]


PROGRAM = """
import os, signal, sys, time
quiet = [name for name in os.environ if name in ("RANKPILOT_QUIET", "TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS")]
print("ready", sys.stdin.readline().strip(), sys.argv[1:], quiet, flush=True)
if sys.argv[2] == "handles":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("waits", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("kind", "sent", "status"),
    [("handles", signal.SIGTERM, 7), ("dies", signal.SIGTERM, 143), ("dies", signal.SIGINT, 130)],
)
def test_streams_arguments_and_signals_are_the_programs(tmp_path: Path, kind: str, sent: int, status: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sitecustomize.py").write_text("print('mine', flush=True)")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "rankpilot", "run", "--budget", "80%", "--", sys.executable, "-m", "program"]
    pipe, environment = subprocess.PIPE, {name: value for name, value in os.environ.items() if "QUIET" not in name}
    for name in ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS"):
        environment.pop(name, None)
    with subprocess.Popen(
        [*command, "--", kind, "--help"],
        env={**environment, "PYTHONPATH": path},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,  # no terminal
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),  # a shell's "&" ignores it
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("typed\n")
        process.stdin.flush()
        seen = [process.stdout.readline()]
        while not seen[-1].startswith("waits"):
            seen.append(process.stdout.readline())
            assert seen[-1], process.stderr
        assert seen[-2:] == [f"ready typed ['--', '{kind}', '--help'] []\n", "waits\n"]
        assert seen[:2] == ["mine\n", "mine\n"], "the hidden sitecustomize runs in the child, as in the parent"
        process.send_signal(sent)
        _, error = process.communicate(timeout=240)
    assert process.returncode == status
    assert not lines(error)


def test_mistakes_are_told_before_the_command_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Put it after two dashes" in failure("run python train.py", capsys)
    assert "Put it after two dashes" in failure("run --budget 80% --", capsys)
    assert "Unknown rule 'agnet'" in failure("run --policy agnet -- python train.py", capsys)
    assert "Cannot read the budget 'lots'" in usage_error("run --budget lots -- python train.py", capsys)
    assert "must have the form MODULE=RANK" in usage_error("run --bounds q -- python train.py", capsys)


def test_options_travel_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run().given == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").touch()
    given = Run(budget="60%", policy="plan.yaml", log=Path("log"), bounds=("q_proj=2",), parts="off", dry=True).given
    order = Order(str(tmp_path), given, dry=True)
    monkeypatch.setenv("RANKPILOT_RUN", order.text())
    again = Order.of_environment()
    assert json.loads(order.text()) == json.loads(again.text())
    assert given["policy"] == str(tmp_path / "plan.yaml")
    assert given["log"] == str(tmp_path / "log")
    assert "--bounds q_proj=2" in in_words(given)
    assert in_words({}) == "default options"


SCRIPT = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=None, eos_token_id=None))
model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
rows = [{"input_ids": ids, "labels": ids} for ids in ([i * j % 64 for i in range(12)] for j in range(40))]
settings = dict(max_steps=3, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, report_to=[])
trainer = Trainer(model, TrainingArguments(sys.argv[1], **settings, save_strategy="no"), train_dataset=rows)
trainer.train()
sys.stdout.write(f"done {trainer.state.global_step}\\n")  # at once: processes share it
"""

FAILURE = """
from rankpilot.finetune.run_rate import RunRate
from rankpilot.integrations.hook import PREPARED

def outcome(as_it_is):
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=None, eos_token_id=None))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    trainer = Trainer(model, TrainingArguments(sys.argv[1], **settings, learning_rate=0.01), train_dataset=rows)
    if as_it_is:
        vars(trainer)[PREPARED] = None
    trainer.train()
    return [parameter.double().sum().item() for parameter in model.parameters()]

def fail(*_, **__):
    raise RuntimeError("it broke")

RunRate.begin_control = fail  # the adapters have other ranks by now
sys.stdout.write(f"same {outcome(True) == outcome(False)}\\n")
"""
"""Continues the script: trains alone, then after a failure that DistributedDataParallel may have noticed."""


def trained(command: list[str], folder: Path, *options: str) -> list[str]:
    """The output and the lines of a command that trains under a budget."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "rankpilot", "run", "--budget", "60%", *options, "--", *command]
    done = subprocess.run(words, cwd=folder, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [done.stdout, *lines(done.stderr)]


def program(name: str) -> str:
    """The path of a program that is installed beside this Python; the test is skipped without it."""
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT + FAILURE)
    command = [program("torchrun"), "--standalone", "--nproc-per-node", "2", "train.py", "out"]
    out, *told = trained(command, tmp_path, "--policy", "signal-mean")
    assert out.count("done 3") == out.count("same True") == 2
    assert ["attached to Trainer" in line for line in told] == [True, True, False]
    assert told[2].endswith("RuntimeError: it broke")
    assert len(re.findall("60% of the", out)) == 2, "the first process of each run tells"


@pytest.mark.slow
@pytest.mark.long
def test_accelerate(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [program("accelerate"), "launch", "--cpu", "--num_processes", "1", "train.py", "out"]
    out, told = trained(command, tmp_path, "--policy", "signal-mean")
    assert "done 3" in out
    assert told.endswith("--budget 60% --policy signal-mean.")
    assert "modules adapted" in out


@pytest.mark.slow
def test_trl_sft(tmp_path: Path) -> None:
    command = [program("trl"), "sft"]
    llama(LlamaForCausalLM).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    command += ["--model_name_or_path", "model", "--dataset_name", "data", "--use_peft", "--output_dir", "out"]
    command += ["--lora_target_modules", "all-linear", "--max_steps", "3", "--report_to", "none", "--use_cpu"]
    command += ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--bf16", "false"]
    out, told = trained(command, tmp_path)
    assert "attached to SFTTrainer: LlamaForCausalLM, 14 modules with LoRA" in told
    assert "60% of the" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
