"""`rankpilot replay`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..common.errors import RunFolderError
from .progress import console


@dataclass(frozen=True)
class ReplayOptions:
    """Compare a run's decisions with those of another policy or rule: agreement decision by decision, module by module.

    Nothing is trained: each decision starts from the observation logged in the run. With the run's own policy, all
    decisions are equal, bit for bit. RUN is a folder accepted by rankpilot study.

    Attributes:
        run: the folder of the run.
        policy: "default", "agent", the folder of a trained policy, or a rule such as union; default: the run's own.
        json: print the agreement as JSON.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    policy: str | None = None
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    """Replay the decisions, and show the agreement."""
    options = tyro.cli(ReplayOptions, args=arguments, prog="rankpilot replay")
    from ..agents.policy_file import load_policy, policy_of
    from ..study.replay import replay
    from ..study.run_data import find_log

    log = find_log(options.run)
    policy = policy_of(log) if options.policy is None else load_policy(options.policy)
    if policy is None:
        raise RunFolderError(f"The policy used in {options.run} is not available. Pass one with --policy.")
    found = replay(log, policy)
    if options.json:
        console.out(json.dumps(found.to_json(), indent=2, allow_nan=False), highlight=False)
    else:
        console.print(found.table())
