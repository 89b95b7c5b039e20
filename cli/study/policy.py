"""`rankpilot study policy`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..progress import console, progress_bar
from .output import PAGE, check_page_output

if TYPE_CHECKING:
    from ...allocation.policy import Policy


@dataclass(frozen=True)
class PolicyOptions:
    """Write a page about a policy over a suite: one HTML file that a browser opens from disk, without a network.

    FOLDER is that of rankpilot evaluate POLICY --logs. The page says how much the policy gains over uniform rank, how
    often it leaves uniform rank, what drives it, whether runs gain where its value networks promise it, on which tasks,
    and what the worst tenth of the runs has in common. Every figure has a 95 % interval over tasks; one
    that holds 0 decides nothing. With runs of static:LOGS and shuffled:LOGS in the same folder it also says what later
    decisions and the choice of layers are worth. docs/study.md tells how to read it.

    Attributes:
        folder: of the evaluation.
        policy: the policy's folder, or what rows call it. Where there is no such folder, what drives it is left out.
        output: the file of the page, study.html in the folder by default; with --json, that of the data.
        json: give the data of the page as JSON instead, on standard output or in --output.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    policy: str = "default"
    output: Path | None = None
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    """Write the page, or its data."""
    options = tyro.cli(PolicyOptions, args=arguments, prog="rankpilot study policy")
    check_page_output(options.output, json=options.json)
    from ...common.files import write_json
    from ...study.policy.suite_page import suite_data, write_suite_page
    from ...study.policy.suite_study import study_suite

    name, policy = _given(options.policy)
    if options.json and options.output is None:
        data = suite_data(study_suite(options.folder, name, policy))
        console.out(json.dumps(data, indent=2, allow_nan=False), highlight=False)
        return
    with progress_bar(f"reading the runs of {name}") as report:
        study = study_suite(options.folder, name, policy, report)
    with progress_bar("explaining the worst runs") as report:
        data = suite_data(study, report)
    path = options.output or options.folder / PAGE
    if options.json:
        write_json(path, data)
    else:
        write_suite_page(data, path)
    for sentence in [*data["sentences"]["verdict"], f"{'Data of the page' if options.json else 'Page'}: {path}"]:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _given(given: str) -> tuple[str, Policy | None]:
    """What rows call a policy, and the policy if its folder is there; one that explored has networks of its base."""
    from ...agents.learned.policy_file import load_policy, policy_folder

    base, exploring, temperature = given.partition(" exploring at ")
    if not policy_folder(base).is_dir():
        return given, None
    policy = load_policy(base)
    return f"{policy.name}{exploring}{temperature}", policy
