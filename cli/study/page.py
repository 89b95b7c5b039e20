"""`rankpilot study RUN...`: the page about runs."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tqdm import tqdm

from ...errors import ConfigError
from ..progress import console
from .output import PAGE, check_page_output

if TYPE_CHECKING:
    from ...study.page.data import Explanations
    from ...study.run.run_data import RunData


@dataclass(frozen=True)
class StudyOptions:
    """Write a page about one or several runs: one HTML file that a browser opens from disk, without a network.

    It says first what came out, then shows ranks, losses, memory and time over the steps, and every decision with its
    reasons; several runs stand side by side. RUN is the folder of rankpilot finetune, the output folder of a Trainer
    with RankPilotCallback, or the folder of a decision log (decisions). A run may go on meanwhile: what is not there
    yet is left out. docs/study.md says how to read the page.

    Attributes:
        runs: the folders of the runs.
        output: the file of the page, study.html in the run's folder by default; with --json, that of the data.
        json: give the data of the page as JSON instead, on standard output or in --output.
        png: also make pictures of ranks, losses and costs, as rankpilot report does, in the folder of each run.
        open: open the page in a browser.
        explain: how much to say of each decision: votes, what the networks voted and which features drove them; all,
            also what would have changed the decision and how sure each rank is, some seconds a decision; none. By
            default all for up to 12 decisions, votes for up to 200.
        policy: the folder of the policy that decided, if it is not the one that ships with rankpilot.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    output: Path | None = None
    json: bool = False
    png: bool = False
    open: bool = False
    explain: Literal["auto", "all", "votes", "none"] = "auto"
    policy: Path | None = None


def main(arguments: Sequence[str]) -> None:
    """Write the page, or its data."""
    options = tyro.cli(StudyOptions, args=arguments, prog="rankpilot study")
    _check(options)
    from ...study.page.data import page_data
    from ...study.page.html import write_page
    from ...study.run.report import write_figures
    from ...study.run.run_data import read_run

    runs = [read_run(folder) for folder in options.runs]
    data = page_data(runs, [_explanations(run, options) for run in runs])
    if options.png:
        for run in runs:
            write_figures(run)
    if options.json:
        _give_json(data, options.output)
        return
    path = options.output or options.runs[0] / PAGE
    write_page(data, path)
    for shown in data["runs"]:
        for part in shown["left_out"]:
            console.print(f"Left out of the page: {part}.", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Page: {path}", markup=False, highlight=False, soft_wrap=True)
    if options.open:
        webbrowser.open(path.resolve().as_uri())


def _check(options: StudyOptions) -> None:
    """Refuse options that cannot be followed, before anything is read."""
    if not options.runs:
        raise ConfigError("No run was given. Pass the folder of a run, or those of several: rankpilot study RUN...")
    if options.output is None and len(options.runs) > 1 and not options.json:
        raise ConfigError(f"{len(options.runs)} runs have no common folder for their page. Pass --output FILE.")
    check_page_output(options.output, json=options.json)
    if options.json and options.open:
        raise ConfigError("--open opens the page, and --json writes none. Pass one of them.")


def _explanations(run: RunData, options: StudyOptions) -> Explanations | None:
    """Why each decision of a run was taken, see docs/study.md."""
    from ...study.run.run_data import log_of

    log = log_of(run.folder)
    if log is None or not run.decisions:
        return None
    depth = options.explain
    if depth == "auto":
        depth = "all" if len(log) <= 12 else "votes" if len(log) <= 200 else "none"
    if depth == "none":
        return None
    from ...agents.learned.policy_file import load_policy
    from ...study.decision.explain import explanations

    policy = None if options.policy is None else load_policy(options.policy)
    # On standard error, since standard output may be the data; nothing where nobody looks.
    with tqdm(desc="explaining decisions", total=len(log), disable=None, leave=False) as bar:
        return explanations(log, policy, what_ifs=depth == "all", on_progress=lambda *_: bar.update())


def _give_json(data: dict[str, object], path: Path | None) -> None:
    from ...common.files import write_json

    if path is None:
        console.out(json.dumps(data, indent=2, allow_nan=False), highlight=False)
    else:
        write_json(path, data)
        console.print(f"Data of the page: {path}", markup=False, highlight=False, soft_wrap=True)
