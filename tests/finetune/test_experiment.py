"""The fine-tune command on a tiny local model and local files: both tasks, comparison, kill and resume, bad input."""

from __future__ import annotations

import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from rankpilot.common.errors import (
    AssetError,
    BudgetError,
    DataError,
    NonFiniteError,
    RunFolderError,
    UnknownNameError,
    UnsupportedError,
)
from rankpilot.common.files import read_json, read_json_lines
from rankpilot.data.workload import load_workload
from rankpilot.decide.log import DecisionLog
from rankpilot.finetune import experiment as module
from rankpilot.finetune import trainer as trainer_module
from rankpilot.finetune.experiment import dry_run, finetune
from rankpilot.finetune.options import FinetuneConfig
from rankpilot.finetune.step.replicas import digest_of
from rankpilot.lora.targets import find_target_modules
from rankpilot.study.page import page_data
from rankpilot.study.run_data import read_run
from rankpilot.study.verdict import verdict
from transformers import BertConfig, BertForSequenceClassification, set_seed
from transformers.trainer_jit_checkpoint import CheckpointManager

from ..cases import first_cases
from ..data.small_models import WORDS, save, tokenizer, write_rows
from ..warm_python import WarmPython
from .reloading import reloaded
from .several import in_processes


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with its tokenizer, as a user's local folder."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=24, pad_token_id=0, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two hundred invented reviews with labels by name."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(200):
        good, others = index % 2 == 0, [*generator.choice(WORDS[6:], 3)]
        judged = generator.choice(WORDS[:3] if good else WORDS[3:6])
        rows.append({"text": " ".join([*others, judged]), "label": "positive" if good else "negative"})
    return write_rows(tmp_path_factory.mktemp("data") / "reviews.jsonl", rows)


@pytest.fixture(scope="module")
def make_config(bert_folder: Path, reviews: str) -> Callable[..., FinetuneConfig]:
    def make(**changes: Any) -> FinetuneConfig:
        base = FinetuneConfig(
            model=str(bert_folder),
            data=reviews,
            steps=12,
            batch_size=4,
            eval_every=4,
            max_length=8,
            learning_rate=5e-3,
            budget="90%",
            policy="signal-mean",  # decides four times
            exact_savers=False,
        )
        return replace(base, **changes)

    return make


class Recorded(trainer_module.Trainer):  # type: ignore[misc]
    """Remembers each Trainer that trains."""

    trainers: ClassVar[list[Any]] = []

    def train(self, *arguments: Any, **options: Any) -> Any:
        self.trainers.append(self)
        return super().train(*arguments, **options)


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """The Trainers that train inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "Trainer", Recorded)
        patch.setattr(Recorded, "trainers", [])
        yield Recorded.trainers


BOTH: dict[str, Any] = {"compare_uniform": True, "compare_all_linear": True, "exact_savers": True}
BOTH["trainer"] = ("save_total_limit=10",)
"""Settings of `comparison`."""


@dataclass
class Comparison:
    """A run beside a uniform one and plain LoRA, all of which have ended, and of which all checkpoints are kept."""

    folder: Path
    phases: list[str]
    trainers: list[Any]
    reloads: list[dict[str, Any]]


@pytest.fixture(scope="module")
def comparison(
    make_config: Callable[..., FinetuneConfig], tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython
) -> Comparison:
    folder, phases = tmp_path_factory.mktemp("runs") / "compared", list[str]()
    with recorded() as trainers, reloaded(warm_python) as reloads:
        finetune(make_config(**BOTH), folder, on_phase=phases.append)
    return Comparison(folder, phases, trainers, reloads)


@pytest.fixture(scope="module")
def compared(comparison: Comparison) -> Path:
    """The folder of the comparison; tests that change it take a copy."""
    return comparison.folder


def test_a_run_writes_what_it_promises(comparison: Comparison) -> None:
    folder = comparison.folder
    summary = read_json(folder / "summary.json")
    assert comparison.reloads == [{"identical": True, "max_abs_difference": 0.0}]
    assert (summary["outputs"], summary["held_out_rows"]) == (2, 20)
    assert 0.5 <= summary["largest_class"] < 0.8
    for name, run in summary["runs"].items():
        assert run["peak_bytes"] > 0
        assert name == "all-linear" or run["peak_bytes"] <= run["budget_bytes"]
        assert np.isfinite(run["held_out_loss"])
        assert 0 <= run["held_out_accuracy"] <= 1
    assert summary["runs"]["rankpilot"]["budget_bytes"] == summary["runs"]["uniform"]["budget_bytes"]
    live = {rank for rank in summary["runs"]["uniform"]["ranks"].values() if rank}
    assert live <= {8, 12}, "what a rung leaves of the budget is spent"
    assert len(DecisionLog(folder / "decisions")) == 4
    assert read_json(folder / "config.json")["steps"] == 12
    assert [type(trainer.optimizer.optimizer) for trainer in comparison.trainers] == [torch.optim.AdamW] * 3
    assert [trainer.state.global_step for trainer in comparison.trainers] == [12] * 3


def test_a_dry_run_tells_the_plan_of_the_run(make_config: Callable[..., FinetuneConfig], compared: Path) -> None:
    lines = list[str]()
    before = {path: path.stat().st_mtime_ns for path in compared.parent.rglob("*")}
    dry_run(make_config(**BOTH), lambda _: None, lines.append)
    assert {path: path.stat().st_mtime_ns for path in compared.parent.rglob("*")} == before
    (first, *_) = DecisionLog(compared / "decisions").read()
    told = re.search(r"(\d+) of (\d+) modules adapted, ([\d.]+) of ([\d.]+) KiB", lines[0])
    ranks = list(first.plan().values())
    assert told
    assert told.groups()[:2] == (str(np.count_nonzero(ranks)), str(len(ranks)))
    assert float(told[3]) == pytest.approx(first.predicted_cost / 2**10, abs=0.06)
    assert float(told[4]) == pytest.approx(first.problem.limit / 2**10, abs=0.6)
    assert len(lines) <= 10
    share = re.search(r"about (\d+)% of the time of the LoRA as configured", lines[-1])
    assert share
    assert 10 < float(share[1]) < 200


@pytest.mark.parametrize(
    ("changes", "reached"),
    first_cases(
        1,
        [
            (
                {"accumulation": 2, "optimizer": "adamw8bit"},
                lambda trainer: (
                    trainer.optimizer.optimizer.args.optim_bits == 8 and trainer.state.epoch == pytest.approx(8 / 45)
                ),
            ),
            ({}, lambda trainer: type(trainer.optimizer.optimizer) is torch.optim.AdamW),
            ({"bf16": True}, lambda trainer: trainer.accelerator.mixed_precision == "bf16"),
            ({"gradient_checkpointing": True}, lambda trainer: trainer.model.is_gradient_checkpointing),
            ({"optimizer": "sgd"}, lambda trainer: type(trainer.optimizer.optimizer) is torch.optim.SGD),
            ({"optimizer": "adafactor"}, lambda trainer: type(trainer.optimizer.optimizer).__name__ == "Adafactor"),
        ],
    ),
    ids=["accumulation-adamw8bit", "default", "bf16", "checkpointing", "sgd", "adafactor"],
)
def test_every_setting_of_a_step_reaches_the_trainer_and_keeps_to_the_budget(
    make_config: Callable[..., FinetuneConfig],
    tmp_path: Path,
    changes: dict[str, Any],
    reached: Callable[[Any], bool],
) -> None:
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    with recorded() as trainers:
        summary = finetune(make_config(compare_uniform=True, steps=4, **changes), tmp_path / "run")
    assert [reached(trainer) for trainer in trainers] == [True, True]
    assert [trainer.state.global_step for trainer in trainers] == [4, 4]
    for run in summary["runs"].values():
        assert 0 < run["peak_bytes"] <= run["budget_bytes"]
        assert np.isfinite(run["held_out_loss"])


def test_beside_plain_lora_as_people_run_it(
    make_config: Callable[..., FinetuneConfig], comparison: Comparison, tmp_path: Path
) -> None:
    """No budget holds it back, and no callback of ours changes what the Trainer and PEFT do."""
    runs = read_json(comparison.folder / "summary.json")["runs"]
    plain, ours = runs["all-linear"], runs["rankpilot"]
    assert "fine-tuning with rank 8 on all modules, without a budget" in comparison.phases
    assert set(plain["ranks"].values()) == {8}
    assert plain["budget_bytes"] is None
    assert plain["peak_bytes"] > ours["budget_bytes"] >= ours["peak_bytes"]
    phases = list[str]()
    config, workload = trainer_module.read_workload(make_config(**BOTH), phases.append)
    trainer = trainer_module.new_trainer(config, workload, trainer_module.new_model(config, workload), tmp_path, [])
    set_seed(config.seed)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == plain["held_out_loss"]
    (page,) = page_data([read_run(comparison.folder)], [None])["runs"]
    assert page["table"]["columns"] == ["rankpilot", "uniform", "all-linear"]
    assert re.search("(than|as) that of rank 8 on all modules, with", " ".join(page["results"]))


def test_both_runs_let_layers_run_again_where_the_budget_needs_it(
    make_config: Callable[..., FinetuneConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = finetune(make_config(compare_uniform=True, budget="75%", steps=4), tmp_path / "run")
    runs = summary["runs"]
    assert runs["rankpilot"]["budget_bytes"] == runs["uniform"]["budget_bytes"]
    for name, run in runs.items():
        assert run["peak_bytes"] <= run["budget_bytes"], name
        assert run["adapter_parameters"] > 0, name
    assert "1 of 2 layers use gradient checkpointing" in capsys.readouterr().out


def one_of_several(config: FinetuneConfig, folder: Path, resume: bool) -> tuple[Any, list[str], list[str]]:
    """What a process makes of a fine-tune, what it tells, and the adapters with which its runs end."""
    told: list[str] = []
    with recorded() as trainers:
        summary = finetune(config, folder, resume=resume, on_phase=told.append)
    return summary, told, [digest_of(find_target_modules(trainer.model)) for trainer in trainers]


def test_several_processes_make_one_fine_tune(make_config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    config = make_config(steps=6, eval_every=3, compare_uniform=True, batch_size=2)
    first, second = in_processes(2, one_of_several, config, tmp_path / "run", False)
    assert first[0] == second[0] == read_json(tmp_path / "run/summary.json")
    assert (len(first[1]), second[1]) == (3, []), "loading, and two runs"
    assert first[2] == second[2]
    assert len(set(first[2])) == 2
    for name, run in first[0]["runs"].items():
        assert run["peak_bytes"] <= run["budget_bytes"]
        rows = read_json_lines(tmp_path / f"run/metrics-{name}.jsonl")
        assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    for name in ("summary.json", "result-rankpilot.json"):
        (tmp_path / "run" / name).unlink()
    again = in_processes(2, one_of_several, config, tmp_path / "run", True)
    assert again[0][0] == again[1][0]
    assert again[0][2] == again[1][2] == first[2][:1], "from its last checkpoint; the other one has ended"


def test_what_is_refused_before_anything_is_written(
    make_config: Callable[..., FinetuneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimiser that is not installed."""
    monkeypatch.setattr("rankpilot.cost.training_step.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'bitsandbytes: pip install -e "\.\[quant\]"\.'):
        finetune(make_config(optimizer="adamw8bit"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[str], object]) -> None:
    """Do something at the end of a step of each run, which is told by its folder's name."""
    on_step_end = module.RunMetrics.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == step:
            act(Path(args.output_dir).name)
        on_step_end(self, args, state, control, **objects)

    monkeypatch.setattr(module.RunMetrics, "on_step_end", interrupted)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    make_config: Callable[..., FinetuneConfig], compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = make_config(exact_savers=True), read_json(compared / "summary.json")

    def killed(folder: str) -> None:
        raise KeyboardInterrupt

    interrupt(monkeypatch, 7, killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "killed")
    monkeypatch.undo()
    # A checkpoint cut off while being written is passed over.
    torn = tmp_path / "killed" / "rankpilot" / "checkpoint-8"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    with pytest.raises(RunFolderError, match="--resume"):
        finetune(config, tmp_path / "killed")
    resumed = finetune(config, tmp_path / "killed", resume=True)
    for key in ("held_out_loss", "held_out_accuracy", "ranks", "peak_bytes"):
        assert resumed["runs"]["rankpilot"][key] == whole["runs"]["rankpilot"][key], key
    metrics = [(folder / "metrics-rankpilot.jsonl").read_text() for folder in (compared, tmp_path / "killed")]
    # Logged training losses are means since the last log, which the Trainer starts anew on resume: evaluations are not.
    losses = [re.findall(r'"step": (\d+), "eval_loss": ([\d.]+)', text) for text in metrics]
    assert losses[0] == losses[1]
    assert losses[0]


def test_a_finished_run_is_not_repeated(make_config: Callable[..., FinetuneConfig], compared: Path) -> None:
    config = make_config(**BOTH)
    first = read_json(compared / "summary.json")
    phases: list[str] = []
    assert finetune(config, compared, resume=True, on_phase=phases.append) == first
    with pytest.raises(RunFolderError, match="other settings"):
        finetune(replace(config, steps=5), compared, resume=True)


def rows_of(folder: Path, name: str) -> Counter[tuple[int, str]]:
    """How often there is a value for each step and kind of value in a run's metrics."""
    rows = read_json_lines(folder / f"metrics-{name}.jsonl")
    return Counter((row["step"], key) for row in rows for key in ("loss", "eval_loss", "peak_bytes") if key in row)


@pytest.fixture(scope="module")
def over(
    make_config: Callable[..., FinetuneConfig], compared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The comparison, killed after the last checkpoints and before the results of two runs, and gone on with."""
    folder = tmp_path_factory.mktemp("runs") / "over"
    shutil.copytree(compared, folder)
    for name in ("rankpilot", "uniform"):
        (folder / f"result-{name}.json").unlink()
    return folder, finetune(make_config(**BOTH), folder, resume=True)


def test_a_run_that_is_over_trains_no_step_and_doubles_no_row(
    compared: Path, over: tuple[Path, dict[str, Any]]
) -> None:
    """It was killed after its last checkpoint and before its result; times are those of the whole run."""
    (folder, again), first = over, read_json(compared / "summary.json")
    decisions = [DecisionLog(path / "decisions").to_pandas() for path in (compared, folder)]
    assert decisions[0].equals(decisions[1])
    for name in ("rankpilot", "uniform"):
        for key in ("held_out_loss", "peak_bytes", "ranks"):
            assert again["runs"][name][key] == first["runs"][name][key], (name, key)
        assert set(rows_of(folder, name).values()) == {1}
        assert rows_of(folder, name) == rows_of(compared, name)
        assert not (folder / name / "checkpoint-13").exists()
        adapter = "adapter/adapter_model.safetensors"
        assert (folder / name / adapter).read_bytes() == (compared / name / adapter).read_bytes()
        before, after = first["runs"][name], again["runs"][name]
        times = [row["train_s"] for row in read_json_lines(folder / f"metrics-{name}.jsonl") if "train_s" in row]
        assert after["train_s"] > 0.8 * times[-1]
        assert after["median_step_s"] == pytest.approx(before["median_step_s"], rel=0.5)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "file",
    first_cases(
        1,
        ["rankpilot.safetensors", "optimizer.pt", "rankpilot.json", "adapter_model.safetensors", "trainer_state.json"],
    ),
)
def test_a_torn_checkpoint_is_passed_over(
    make_config: Callable[..., FinetuneConfig], compared: Path, tmp_path: Path, file: str
) -> None:
    folder, lines = tmp_path / "run", list[str]()
    shutil.copytree(compared, folder)
    (folder / "result-rankpilot.json").write_text("{")  # torn as well, so the run goes on
    cut_in_half(folder / "rankpilot" / "checkpoint-12" / file)
    config = make_config(**BOTH)
    again = finetune(config, folder, resume=True, on_phase=lines.append)
    assert f"skipping checkpoint-12: {file} is corrupt" in lines
    first = read_json(compared / "summary.json")
    for key in ("held_out_loss", "ranks"):
        assert again["runs"]["rankpilot"][key] == first["runs"]["rankpilot"][key]
    assert rows_of(folder, "rankpilot").keys() >= rows_of(compared, "rankpilot").keys()


def test_a_torn_file_of_the_decision_log_does_not_stop_a_run_that_is_over(
    make_config: Callable[..., FinetuneConfig], over: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Nor does a page need it, or a run that was not gone on with after its end."""
    folder = tmp_path / "run"
    shutil.copytree(over[0], folder)
    cut_in_half(folder / "decisions" / "decision-000002.safetensors")
    assert finetune(make_config(**BOTH), folder, resume=True)["steps"] == 12
    assert len(page_data([read_run(folder)], [None])["runs"][0]["left_out"]) == 1


@pytest.mark.parametrize("name", first_cases(1, ["rankpilot", "uniform"]))
def test_a_just_in_time_checkpoint_ends_a_run_before_its_end(
    make_config: Callable[..., FinetuneConfig],
    compared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Step 6 is no step at which a checkpoint is due; it falls into the run under the policy, or into the other."""
    config, folder = make_config(**BOTH | {"trainer": ("enable_jit_checkpoint=true",)}), tmp_path / "run"
    monkeypatch.setattr(CheckpointManager, "_sigterm_handler", lambda self, *_: self._enable_checkpoint())
    before = signal.getsignal(signal.SIGTERM)
    interrupt(monkeypatch, 6, lambda run: signal.raise_signal(signal.SIGTERM) if run == name else None)
    with pytest.raises(RunFolderError, match=f"Run {name} stopped at step 7 of 12"):
        finetune(config, folder)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == before
    assert (folder / name / "checkpoint-6" / "trainer_state.json").is_file()
    phases: list[str] = []
    resumed = finetune(config, folder, resume=True, on_phase=phases.append)
    assert not any("skipping" in phase for phase in phases)
    whole = read_json(compared / "summary.json")
    for run in ("rankpilot", "uniform"):
        for key in ("held_out_loss", "ranks"):
            assert resumed["runs"][run][key] == whole["runs"][run][key], (run, key)
        assert set(rows_of(folder, run).values()) == {1}


def test_language_modelling_from_a_text_file(tmp_path: Path, reloads: list[dict[str, Any]]) -> None:
    generator = np.random.default_rng(0)
    text, model = tmp_path / "text.txt", save("llama", tmp_path / "model")
    text.write_text("\n".join(" ".join(generator.choice(WORDS, 12)) for _ in range(60)))
    config = FinetuneConfig(model, str(text), steps=2, batch_size=2, eval_every=2, max_length=16)
    summary = finetune(config, tmp_path / "run")
    assert reloads == [{"identical": True, "max_abs_difference": 0.0}]
    assert summary["runs"]["rankpilot"]["held_out_accuracy"] is None


def test_a_race_finds_the_rate_of_both_runs(make_config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    race = {"learning_rate": "race", "policy": "default", "budget": "100%", "compare_uniform": True}
    with recorded() as trainers:
        finetune(make_config(steps=60, eval_every=60, **race), tmp_path / "run")
    found = read_run(tmp_path / "run").race
    assert found is not None
    assert len(found.curves) == 3
    assert found.step <= 12
    assert trainers[1].args.learning_rate == pytest.approx(found.rate, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"text_column": "texts"}, UnknownNameError, "'text'"),
        ({"budget": "1kB step"}, BudgetError, "smallest that works"),
        ({"target_modules": "nothing_like_it"}, UnknownNameError, "nothing_like_it"),
        ({"model": "/no/such/folder"}, AssetError, "/no/such/folder"),
        ({"policy": "signal"}, UnknownNameError, "signal-mean"),
        ({"data": "{tmp}/empty.jsonl"}, DataError, "empty.jsonl is empty"),
        ({"data": "{tmp}/one.jsonl"}, DataError, "at least 2 rows"),
        ({"data": "{tmp}/same.jsonl"}, DataError, "single class"),
        ({"data": "{tmp}/data.xyz"}, DataError, "suffix"),
    ],
)
def test_bad_input_is_one_clear_error(
    make_config: Callable[..., FinetuneConfig], tmp_path: Path, changes: dict[str, str], error: type, words: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text('{"text": "a film", "label": "good"}\n')
    (tmp_path / "same.jsonl").write_text('{"text": "a film", "label": "good"}\n' * 30)
    (tmp_path / "data.xyz").write_text("1")
    changes = {key: value.format(tmp=tmp_path) for key, value in changes.items()}
    with pytest.raises(error, match=re.escape(words)):
        finetune(make_config(**changes), tmp_path / "run")


def test_a_split_without_labels_is_passed_over(bert_folder: Path, tmp_path: Path) -> None:
    """Contests keep the labels of the test split secret; the data set then says -1."""
    splits = {"train": [0, 1] * 8, "test": [-1] * 4, "validation": [0, 1] * 3}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    parts = {
        name: Dataset.from_dict({"text": [f"film {i}" for i in range(len(labels))], "label": labels}, features=features)
        for name, labels in splits.items()
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "data"))
    workload = load_workload(str(bert_folder), str(tmp_path / "data"), max_length=8)
    assert (len(workload.train), len(workload.held_out)) == (16, 6)


@pytest.mark.parametrize("policy", ["signal-mean", "uniform"])
def test_a_run_that_diverges_says_so(make_config: Callable[..., FinetuneConfig], tmp_path: Path, policy: str) -> None:
    """In the probe, or where there is none in training, of which a page is made."""
    with pytest.raises(NonFiniteError, match=r"learning.rate"):
        finetune(make_config(learning_rate=1e30, steps=40, policy=policy), tmp_path / "run")
    assert not (tmp_path / "run" / "rankpilot" / "adapter").exists()
    if policy == "uniform":
        assert verdict(read_run(tmp_path / "run")).warnings[0].startswith("The run diverged: losses, gradients or")
