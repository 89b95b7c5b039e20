"""A proposed plan as a YAML file that a person reads and edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..allocation.problem import AllocationProblem
from ..allocation.unusual_features import unusual_features
from ..common.arrays import FloatArray, IntArray
from ..common.files import read_text
from ..common.plain_yaml import MOST_YAML_BYTES, parse_yaml
from ..common.units import cost_text, format_bytes
from ..errors import ConfigError, UnknownNameError, first_line, shown
from ..lora.signals import SIGNALS
from ..memory.cost import plan_cost, unit_cost, unit_costs

Document = Mapping[Any, Any]
"""What a review file holds."""

PROBLEMS_SHOWN = 5
"""Problems of one file that an error lists at most."""

_HEADER = """\
# The plan that rankpilot proposes. Change `rank` where you want another one; allowed are
#     {ranks}
# up to what a module can have. Then set `approved: true`; with `approved: false` the run ends. Nothing else is read.
#
# proposed, before: the rank that the policy proposes, and the one that the module has now
# score: the policy's; modules with high scores come first where the budget is short
# {unit}_per_rank: what each rank costs at the peak{first}
# reason: which of its signals are high or low, in standard deviations from the mean of all modules
"""


@dataclass(frozen=True, eq=False)
class Proposal:
    """A plan that a policy proposes.

    Attributes:
        number: of the decision in its run, from 0.
        step: optimiser steps done before it.
        policy: name of the policy.
        observation: what it decided on.
        scores: the policy's score of each module, (modules,).
        problem: the plans that are possible, with the pinned modules. A person is not bound by `max_step`.
        plan: what is proposed.
    """

    number: int
    step: int
    policy: str
    observation: Observation
    scores: FloatArray
    problem: AllocationProblem
    plan: Plan

    def text(self, ranks: IntArray | None = None) -> str:
        """The file: as proposed, or approved with these ranks, int64 (modules,)."""
        problem, unit = self.problem, self.problem.cost.unit
        shown = self.plan.ranks if ranks is None else ranks
        header = _HEADER.format(
            ranks=", ".join(map(str, problem.ladder.ranks)),
            unit=unit,
            first="; the first may cost more, for what is saved for backward" if unit == "bytes" else "",
        )
        content = {
            "decision": self.number,
            "step": self.step,
            "policy": self.policy,
            "predicted_cost": cost_text(unit_cost(problem.cost, shown), unit),
            "budget": cost_text(problem.limit, unit),
            "modules": self._modules(shown),
        }
        body = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=10**6, allow_unicode=True)
        return f"{header}\napproved:{'' if ranks is None else ' true'}\n{body}"

    def _modules(self, shown: IntArray) -> dict[str, dict[str, Any]]:
        cost, proposed = self.problem.cost, self.plan.ranks
        per_rank = cost.per_rank[int(np.argmax(unit_costs(cost, proposed)))]
        columns = zip(
            shown.tolist(),
            proposed.tolist(),
            self.problem.ranks.tolist(),
            self.scores.tolist(),
            per_rank.tolist(),
            unusual_features(SIGNALS, self.observation.modules[:, : len(SIGNALS)]),
            strict=True,
        )
        return {
            name: {
                "rank": rank,
                "proposed": proposal,
                "before": before,
                "score": float(f"{score:.4g}"),
                f"{cost.unit}_per_rank": round(each),
                "reason": _reason(unusual),
            }
            for name, (rank, proposal, before, score, each, unusual) in zip(self.names, columns, strict=True)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules."""
        return self.observation.names

    def is_in(self, document: Document) -> bool:
        """Whether a file holds this proposal, whatever a person has made of it."""
        modules = document.get("modules")
        if (document.get("decision"), document.get("step")) != (self.number, self.step) or not _is_map(modules):
            return False
        both = zip(self.plan.ranks.tolist(), self.problem.ranks.tolist(), strict=True)
        return all(
            _is_map(modules.get(name)) and (modules[name].get("proposed"), modules[name].get("before")) == pair
            for name, pair in zip(self.names, both, strict=True)
        )

    def ranks_in(self, document: Document) -> IntArray:
        """The ranks that a file gives the modules, int64 (modules,).

        Raises:
            ConfigError: the file is of another decision, a name is unknown or missing, a rank is not allowed, or the
                plan is above the budget.
        """
        at = (document.get("decision"), document.get("step"))
        if at != (self.number, self.step):
            raise ConfigError(
                f"It holds decision {shown(at[0])} of step {shown(at[1])}, but the run waits for decision "
                f"{self.number} of step {self.step}. Open the file anew."
            )
        modules = document.get("modules")
        if not _is_map(modules):
            raise ConfigError("It has no `modules`, a mapping from the name of each module to its `rank`.")
        problems = self._wrong_entries(modules)
        if problems:
            more = len(problems) - PROBLEMS_SHOWN
            raise ConfigError(
                " ".join(problems[:PROBLEMS_SHOWN] + [f"There are {more} more such problems."] * (more > 0))
            )
        ranks = np.array([modules[name]["rank"] for name in self.names], dtype=np.int64)
        if not ranks.any():
            raise ConfigError("No module has a rank above 0. Give one at least rank 1.")
        excess = unit_cost(self.problem.cost, ranks) - self.problem.limit
        if excess > 0:
            unit = self.problem.cost.unit
            over = format_bytes(excess, up=True) if unit == "bytes" else cost_text(excess, unit)
            raise ConfigError(
                f"Its plan takes {cost_text(self.problem.limit + excess, unit)}, which is {over} above the budget of "
                f"{cost_text(self.problem.limit, unit)}. Lower some ranks."
            )
        if not self.problem.fits(ranks):
            times = plan_cost(self.problem.cost, ranks) / self.problem.limit
            raise ConfigError(f"Its step takes {times:.3g} times as long as the time allows. Lower some ranks.")
        return ranks

    def _wrong_entries(self, modules: Document) -> list[str]:
        """A sentence for each name or rank that cannot be used."""
        unknown = [name for name in modules if name not in self.names]
        problems = [str(UnknownNameError.of("target module", str(name), self.names)) for name in unknown]
        for index, name in enumerate(self.names):
            if name not in modules:
                problems.append(f"Module {name!r} is missing. Keep its line; with rank 0 it has no adapter.")
                continue
            entry, allowed = modules[name], self._allowed(index)
            rank = entry.get("rank") if _is_map(entry) else None
            if type(rank) is not int or rank not in allowed:
                reason = ", since it holds NaN or infinity" if self.problem.is_pinned[index] else ""
                problems.append(
                    f"The rank of {name!r} is {shown(rank)}. Allowed: {', '.join(map(str, allowed))}{reason}."
                )
        return problems

    def _allowed(self, index: int) -> list[int]:
        """The ranks that one module may have."""
        problem = self.problem
        if problem.is_pinned[index]:
            return [int(self.plan.ranks[index])]
        return list(problem.ladder.ranks[int(problem.bottoms[index]) : int(problem.tops[index]) + 1])


def parse(text: str) -> Document:
    """Read the text of a review file.

    Raises:
        ConfigError: it is empty, no YAML, or no mapping.
    """
    try:
        document = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"It is no YAML{line}: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"It is no YAML: {first_line(error)}.") from error
    if not _is_map(document):
        raise ConfigError("It is empty or missing." if document is None else "It is no mapping with `modules`.")
    answer = document.get("approved")
    if answer is not None and not isinstance(answer, bool):
        raise ConfigError(f"`approved` is true or false; got {shown(answer)}.")
    return document


def is_review_file(path: Path) -> bool:
    """Whether a file may be replaced by a proposal: it holds one, or is empty or missing."""
    if not path.exists():
        return True
    try:
        text = read_text(path, MOST_YAML_BYTES)
        return not text.strip() or {"decision", "modules"} <= set(parse(text))
    except (ConfigError, ValueError, OSError):
        return False


def _is_map(value: object) -> TypeGuard[Document]:
    return isinstance(value, Mapping)


def _reason(unusual: list[tuple[str, float]]) -> str:
    words = [f"{'high' if distance > 0 else 'low'} {name} ({distance:+.1f})" for name, distance in unusual]
    return ", ".join(words) or "no signal is unusual"
