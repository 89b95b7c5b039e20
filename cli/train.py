"""`rankpilot policy train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from ..common.files import as_json, open_run, read_json_lines
from ..errors import UnknownNameError
from ..training.config import PRESETS, TrainConfig
from .options import on_cluster, peek, read_config_file, with_file_settings
from .progress import console, progress_bar, stage_bar


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a policy on proxy fine-tunes, and save it as a folder (safetensors and JSON).

    The policy moves LoRA rank between modules inside a hard budget. An untrained policy does what the rule signal-mean
    does. Training has up to two parts. A warm start teaches the network what modules are worth, on tasks where that
    is known. PPO then trains how to use this estimate and the signals: each iteration runs short fine-tunes of small
    pretrained transformers, several episodes of each fresh task, beside one run under signal-mean; from time to time
    the policy is measured on validation tasks, and the best one is kept. In the end the policy is compared on
    validation tasks with signal-mean, top-down and uniform ranks. These tasks chose the policy; for a comparison on
    others, see rankpilot policy evaluate --split test.

    Attributes:
        output: folder of the run; the policy is written there.
        preset: sets all options that are not given. On two cores quick takes about 5 minutes; default
            has ten times as many rounds and a warm start, full 25 times.
        config: a JSON or YAML file of settings, such as the config.json of an earlier run. It overrides the preset, and
            options on the command line override both.
        resume: continue an interrupted run in the same folder; a finished run is left as it is.
        cluster: train on a Ray cluster: "local" starts one on this machine, "auto" joins the one that runs here, and
            HOST:PORT the one with that address. The policy is the same (docs/cluster.md).
    """

    output: Path = Path("runs/policy")
    preset: Literal["quick", "default", "full"] = "quick"
    config: Path | None = None
    resume: bool = False
    cluster: str | None = None


def main(arguments: Sequence[str]) -> None:
    """Run the command; options on the command line go before those of --config FILE, and both before the preset."""
    path = peek(arguments, "--config")
    values = read_config_file(path)
    preset = peek(arguments, "--preset") or values.get("preset", "quick")
    if preset not in PRESETS:
        raise UnknownNameError.of("preset", str(preset), PRESETS)
    base = Train(**vars(PRESETS[preset]) | {"preset": preset})
    default = with_file_settings(base, values | {"preset": preset}, path)
    train_command(tyro.cli(Train, args=arguments, default=default, prog="rankpilot policy train"))


def train_command(options: Train) -> None:
    """Train, validate, and write the policy with its learning curve."""
    from ..agents.policy_file import load_policy, read_card
    from ..training.train import is_finished

    folder = options.output
    if is_finished(folder) and options.resume:
        load_policy(folder)  # whole
        with open_run(folder, as_json(TrainConfig, options), resume=True):
            pass  # with these settings
        console.print(f"{folder} holds a finished policy already.", markup=False, soft_wrap=True)
        _print_validation(read_card(folder).get("validation", {}))
        return
    with on_cluster(options.cluster, options.device):
        results = _train(options)
    _print_validation(results)
    line = f"The policy is in {folder}. Use it: rankpilot finetune MODEL DATA --policy {folder}"
    console.print(line, markup=False, soft_wrap=True)


def _train(options: Train) -> dict[str, dict[str, float]]:
    """Train, and write the policy; returns what its validation found."""
    from ..common.drawing import save_figure
    from ..study.pictures import learning_curve, learning_sentence
    from ..training.train import PROGRESS, finish, train

    folder = options.output
    with stage_bar("training on proxy fine-tunes (rounds)", "starting") as report:
        policy = train(options, folder, resume=options.resume, on_stage=lambda s: report(s.done, s.total, s.name))
    results = _validate(options, policy) if options.validation_tasks else {}
    rows = read_json_lines(folder / PROGRESS)
    save_figure(learning_curve(rows), folder / "learning_curve.png")
    finish(folder, policy, options, results)
    console.print(f"{learning_sentence(rows)}.", highlight=False)
    return results


def _validate(options: Train, policy: Any) -> dict[str, dict[str, float]]:
    """Compare the trained policy with rules on validation tasks."""
    from ..decide.rules import find_rule
    from ..env.proxy_task import evenly, find_tasks
    from ..training.compare import compare
    from ..training.results import summarise

    policies = [replace(policy, name="learned"), find_rule("signal-mean"), find_rule("top-down")]
    tasks = find_tasks(options.suites, "validation", options.bases or None, options.task_overrides)
    tasks = evenly(tasks, options.validation_tasks)
    with progress_bar("comparing with the rules on validation tasks") as report:
        rows = compare(policies, tasks, options.schedule, workers=options.worker_count, on_progress=report)
    return summarise(rows)


def _print_validation(results: dict[str, dict[str, float]]) -> None:
    if not results:
        return
    table = Table(
        title="Held-out improvement over uniform LoRA in the same bytes (share of what the best known plan gains), on "
        "validation tasks, which also chose the policy"
    )
    for column in ("policy", "tasks", "mean", "95 % interval", "wins", "losses"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in results.items():
        interval = f"{row['low']:+.1%} to {row['high']:+.1%}" if row["tasks"] > 1 else "one task tells none"
        cells = (f"{row['tasks']:.0f}", f"{row['improvement']:+.1%}", interval)
        table.add_row(name, *cells, f"{row['wins']:.0f}", f"{row['losses']:.0f}")
    console.print(table)
