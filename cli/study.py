"""`rankpilot study`, and the page written by `finetune` at the end of a run."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm import tqdm

from ..common.errors import ConfigError, RunFolderError
from ..common.files import write_json
from .progress import console, tell

if TYPE_CHECKING:
    from ..study.page import Explanations
    from ..study.run_data import RunData

PAGE = "study.html"
"""File name of the page in the folder of a run."""

Depth = Literal["auto", "all", "plans", "none"]


@dataclass(frozen=True)
class StudyOptions:
    """Write a page about one or more runs: a single HTML file, viewable in a browser offline.

    It starts with the results, then shows ranks, losses, memory and time over the steps, every decision with its
    reasons, and how to load the adapter; several runs are shown side by side. RUN is the folder of rankpilot finetune,
    the output folder of a Trainer with rankpilot.attach, or the folder of a decision log (decisions). Runs still in
    progress are supported: missing data is left out. docs/study.md explains
    how to read the page.

    Attributes:
        runs: the folders of the runs.
        output: the file of the page, study.html in the run's folder by default; with --json, that of the data.
        json: write the data of the page as JSON instead, to standard output or to --output.
        open: open the page in a browser.
        explain: level of detail for each decision: plans, the expectation for each plan and the reasons; all, also the
            changes that would have led to another decision; none. By default all for up to 12 decisions, plans for up
            to 200.
        policy: the folder of the run's policy, if neither the decision log nor rankpilot has a copy.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = ()
    output: Path | None = None
    json: bool = False
    open: bool = False
    explain: Depth = "auto"
    policy: Path | None = None


def main(arguments: Sequence[str]) -> None:
    """Write the page, or its data."""
    options = tyro.cli(StudyOptions, args=arguments, prog="rankpilot study")
    _check(options)
    if options.json:
        _, data = _read(options.runs, options.explain, options.policy)
        if options.output is None:
            console.out(json.dumps(data, indent=2, allow_nan=False), highlight=False)
        else:
            write_json(options.output, data)
            tell(f"Page data: {options.output}")
        return
    path = write_study(options.runs, options.output, options.explain, options.policy)
    if options.open:
        webbrowser.open(path.resolve().as_uri())


def write_study(
    folders: Sequence[Path], output: Path | None = None, explain: Depth = "auto", policy: Path | None = None
) -> Path:
    """Write the page of some runs and print the results; return the path of the page.

    Args:
        folders: folders of the runs, at least one.
        output: the file of the page, study.html in the run's folder by default.
        explain: see `StudyOptions`.
        policy: see `StudyOptions`.
    """
    from ..report.memory import saver_table
    from ..study.page import write_page
    from ..study.verdict import summary_table

    runs, data = _read(folders, explain, policy)
    path = output or folders[0] / PAGE
    write_page(data, path)
    if finished := [run for run in runs if run.results]:
        console.print(summary_table(*finished))
    for run, shown in zip(runs, data["runs"], strict=True):
        for kind, style in (("warnings", "bold red"), ("caveats", "yellow")):
            for sentence in shown[kind]:
                console.print(sentence, style=style, markup=False, highlight=False)
        if run.saved:
            console.print(saver_table(run.saved))
        tell(*shown["results"], *(f"Not shown on the page: {part}." for part in shown["left_out"]))
        if run.adapter:
            tell(f"Adapter (the page shows how to load, merge and export it): {run.adapter}")
    tell(f"Page: {path}")
    return path


def _check(options: StudyOptions) -> None:
    """Reject invalid options before anything is read."""
    if not options.runs:
        raise ConfigError("No run given. Pass one or more run folders: rankpilot study RUN...")
    for folder in options.runs:
        if not folder.is_dir():
            advice = "The arguments of `rankpilot study` are run folders; to replay a run, use `rankpilot replay`."
            raise RunFolderError(f"Folder {str(folder)!r} does not exist. {advice}")
    output = options.output
    if output is None and len(options.runs) > 1 and not options.json:
        raise ConfigError(f"{len(options.runs)} runs have no common folder for the page. Pass --output FILE.")
    if options.json and options.open:
        raise ConfigError("--open opens the page, which --json does not write. Pass only one of them.")
    if output is None or not output.exists():
        return
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder. Pass a file name, such as {output / PAGE}.")
    start = b"{" if options.json else b"<!DOCTYPE html>"  # so that no other file of the user is overwritten
    with output.open("rb") as stream:
        if stream.read(len(start)) != start:
            kind = "JSON file" if options.json else "study page"
            raise ConfigError(f"--output {output} already exists and is not a {kind}. Choose another name.")


def _read(folders: Sequence[Path], explain: Depth, policy: Path | None) -> tuple[list[RunData], dict[str, Any]]:
    """Read the runs, and the data of their page."""
    from ..study.page import page_data
    from ..study.run_data import read_run

    runs = [read_run(folder) for folder in folders]
    return runs, page_data(runs, [_explanations(run, explain, policy) for run in runs])


def _explanations(run: RunData, depth: Depth, given: Path | None) -> Explanations | None:
    """Explain each decision of a run, see docs/study.md."""
    from ..study.run_data import log_of

    log = log_of(run.folder)
    if log is None or not run.decisions:
        return None
    if depth == "auto":
        depth = "all" if len(log) <= 12 else "plans" if len(log) <= 200 else "none"
    if depth == "none":
        return None
    from ..agents.policy_file import load_policy, policy_of
    from ..study.why import explanations

    policy = policy_of(log) if given is None else load_policy(given)
    # To standard error, since standard output may hold the data; nothing if it is not a terminal.
    with tqdm(desc="explaining decisions", total=len(log), disable=None, leave=False) as bar:
        return explanations(log, policy, what_ifs=depth == "all", on_progress=lambda *_: bar.update())
