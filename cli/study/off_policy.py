"""`rankpilot study off-policy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...errors import ConfigError
from ..progress import console


@dataclass(frozen=True)
class OffPolicyOptions:
    """Estimate what other policies would have gained, from the runs of one that explored; nothing is trained.

    FOLDER is that of rankpilot evaluate explore-T:POLICY --logs. Estimates are how much lower the log loss would be
    than under uniform rank, with 95 % intervals over tasks. Each is about the first plan alone: later decisions are
    those of the policy that was logged. Where the logged policy seldom took what another would take, estimates that
    weigh the logged runs are no number but the words "not enough overlap"; a higher temperature T helps. The direct
    method trusts the votes of the value networks, and always gives one.

    Attributes:
        folder: of the evaluation.
        behaviour: the name of the policy that was logged, as its rows have it.
        policies: those to estimate: folders, or rules.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    behaviour: str
    policies: tuple[str, ...] = ("default", "signal-mean", "top-down", "top-down-mlp")


def main(arguments: Sequence[str]) -> None:
    """Estimate, and show a table."""
    options = tyro.cli(OffPolicyOptions, args=arguments, prog="rankpilot study off-policy")
    if not options.policies:
        raise ConfigError("There is no policy to estimate. Pass --policies NAME..., folders or rules, or leave it out.")
    from ...agents.learned.policy_file import load_policy
    from ...study.off_policy.compare import compare_targets, comparison_table
    from ...study.off_policy.from_logs import logged_suite

    suite = logged_suite(options.folder, options.behaviour)
    found = {name: suite.target(load_policy(name)) for name in options.policies}
    targets = [target for target in found.values() if target is not None]
    if targets:
        console.print(comparison_table(compare_targets(suite.choices, targets, one_observation=False)))
    for name, target in found.items():
        if target is None:
            console.print(
                f"{name} takes plans that {options.behaviour} could not draw: no estimate.",
                markup=False,
                soft_wrap=True,
            )
    console.print(
        f"{len(suite.decisions)} first decisions of {options.behaviour}; mean gain as logged "
        f"{suite.choices.outcomes.mean():+.3f}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
