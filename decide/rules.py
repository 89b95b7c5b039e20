"""Policies without training: rules and user-supplied plans.

| rule | its plan | reads signals |
|---|---|---|
| uniform | one rank on as many top layers as can have rank 8 (rank 1 under a budget of parameters) | no |
| top-half | one rank on the top half of the layers | no |
| top-down | one rank on as many top layers as can have rank 16, and on some modules of the next one | no |
| random | random scores, the rank floor of top-down | no |
| gradient-norm | the modules of top-down, ranks by one signal | yes |
| signal-mean | the modules of top-down, ranks by the mean of three signals | yes |

Rules with signals make a new plan at every decision. So does top-down, but from constant scores. The others keep the
plan of the first decision. To add a rule, write a policy (`decide/policy.py`) and an entry in `_RULES`.

User-supplied plans give a rank for each module: a mapping, or a file for people to read and edit (`PlanFile`).
"""

import hashlib
import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from ..common.arrays import IntArray
from ..common.errors import BudgetError, ConfigError, DataError, UnknownNameError, first_line, shown
from ..common.files import MOST_YAML_BYTES, parse_yaml, read_text
from ..common.text import cost_text, format_bytes
from ..cost.cost import plan_cost
from ..lora.spec import DEFAULT_RANKS
from .observation import Observation, mean_feature
from .plan.plan import Plan, uniform_ranks
from .plan.problem import AllocationProblem
from .policy import Decision, Policy, decided_plan, decision_from_plan, decision_from_scores, decision_to_keep, is_first
from .settings import ONCE, DecisionSchedule

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".yaml", ".yml")
"""Suffixes of plan files, to distinguish them from policy folders and rule names."""

_HEADER = """\
# A plan: the LoRA rank of each target module. It is predicted to take {cost}; the budget is {limit}.
# Edit the ranks, then pass this file as the policy: `rankpilot finetune --policy {name}`, or policy="{name}".
# Allowed ranks: {ranks}; 0 is no adapter.
# A run reads this file before its first step, and again at each share of the run that `read_at` names:
# read_at: [0, 0.25, 0.5] reads it a second and a third time after a quarter and a half of the steps.
"""


@dataclass(frozen=True)
class GivenPlan:
    """Takes given ranks at the first decision, and keeps them.

    Attributes:
        name: the name in logs and tables.
        ranks: ranks of the modules, by full name.
    """

    reads_signals: ClassVar[bool] = False
    name: str
    ranks: Mapping[str, int] = field(hash=False)

    def decide(self, observation: Observation) -> Decision:
        """Return the plan at the first decision, and no change later; any unused budget stays unused.

        Raises:
            UnknownNameError: the plan names an unknown module.
            ConfigError: it omits a module.
        """
        if not is_first(observation):
            return decision_to_keep(observation)
        for name in self.ranks:
            if name not in observation.names:
                raise UnknownNameError.of("target module", name, observation.names)
        if missing := [name for name in observation.names if name not in self.ranks]:
            raise ConfigError(
                f"The plan {self.name} has no rank for {len(missing)} of {len(observation.names)} modules, "
                f"including {missing[0]!r}. Set a rank for each target module; 0 means no adapter."
            )
        ranks = np.array([self.ranks[name] for name in observation.names], dtype=np.int64)
        return Decision(ranks, np.zeros(len(ranks)), exact=True)


def given_ranks(observation: Observation, ranks: Mapping[str, int], name: str = "given") -> tuple[Decision, Plan]:
    """Return the decision for given ranks, and the resulting plan.

    Args:
        observation: observation of the run; limits on moves per decision are ignored.
        ranks: ranks of all target modules, by full name.
        name: name of the plan in errors.

    Returns:
        The decision, with exactly the given ranks, and the plan, lowered if the ranks exceed the budget.

    Raises:
        UnknownNameError, ConfigError: a module is unknown or missing, or cannot have its rank.
    """
    first = replace(observation, problem=observation.problem.fresh())
    problem, decision = first.problem, GivenPlan(name, ranks).decide(first)
    rungs = problem.ladder.rung(decision.ranks)
    off = problem.ladder.array[rungs] != decision.ranks
    wrong = np.flatnonzero(off | (rungs < problem.bottoms) | (rungs > problem.tops))
    if len(wrong):
        module = int(wrong[0])
        allowed = problem.ladder.ranks[int(problem.bottoms[module]) : int(problem.tops[module]) + 1]
        has = f"{observation.names[module]!r} cannot have rank {decision.ranks[module]}"
        raise ConfigError(f"{has}. Allowed: {', '.join(map(str, allowed))}.")
    return decision, decided_plan(problem, decision)


@dataclass(frozen=True)
class AsConfigured:
    """Keeps all ranks of the LoraConfig, including ranks off the ladder, as long as they fit."""

    reads_signals: ClassVar[bool] = False
    schedule: ClassVar[DecisionSchedule] = ONCE
    name: ClassVar[str] = "as-configured"

    def decide(self, observation: Observation) -> Decision:
        """Return no change."""
        return decision_to_keep(observation)


@dataclass(frozen=True)
class PlanFile:
    """A plan file as a policy: it is read again at every decision, so it may be edited during the run.

    Attributes:
        path: path of the file; `plan_text` writes one.

    Raises:
        ConfigError: the file is missing, or holds no plan.
    """

    reads_signals: ClassVar[bool] = False
    path: Path

    def __post_init__(self) -> None:
        read_plan(self.path)

    @property
    def name(self) -> str:
        """The file's name, for logs and tables."""
        return self.path.name

    @property
    def schedule(self) -> DecisionSchedule:
        """Times to read the file: its `read_at`, or once. Modules may then move from any rank to any other."""
        try:
            read_at = tuple(_document(self.path).get("read_at", (0.0,)))
            return DecisionSchedule(fractions=read_at, max_step=len(DEFAULT_RANKS))
        except (ConfigError, TypeError) as error:
            raise ConfigError(
                f"read_at in {self.path} must be an ascending list of shares of the run, from 0 to below 1: "
                f"{first_line(error)}"
            ) from error

    def decide(self, observation: Observation) -> Decision:
        """Return exactly the current ranks of the file; an invalid later version changes nothing, with a warning.

        Raises:
            UnknownNameError, ConfigError: at the first decision, the file holds no plan for these modules.
            BudgetError: at the first decision, its plan exceeds the budget.
        """
        try:
            return self._exactly(observation)
        except (UnknownNameError, ConfigError, BudgetError) as error:
            if is_first(observation):
                raise
            logger.warning("Cannot use the plan in %s, so the ranks are kept: %s", self.path, error)
            return decision_to_keep(observation)

    def _exactly(self, observation: Observation) -> Decision:
        decision, _ = given_ranks(observation, read_plan(self.path), str(self.path))
        problem = observation.problem
        cost, unit = plan_cost(problem.cost, decision.ranks), problem.cost.unit
        if cost > problem.limit:
            excess = cost - problem.limit
            over = format_bytes(excess, up=True) if unit == "bytes" else cost_text(excess, unit)
            raise BudgetError(
                f"The plan in {self.path} is predicted to take {cost_text(cost, unit)}, {over} above the budget of "
                f"{cost_text(problem.limit, unit)}. Lower some ranks, or raise the budget."
            )
        if not np.array_equal(decided_plan(problem, decision).ranks, decision.ranks):
            raise ConfigError(
                f"The plan in {self.path} changes a module by more than {problem.max_step} rungs in one decision. "
                "Drop `schedule`, or raise its max_step."
            )
        return decision


def read_plan(path: Path) -> dict[str, int]:
    """Read the rank of each module, by full name, from a YAML or JSON file.

    Its `modules`, or the whole file, maps names to ranks. Names with a common prefix may be grouped: under
    `model.layers.0`, `self_attn.q_proj: 8` is module "model.layers.0.self_attn.q_proj".

    Raises:
        ConfigError: the file is missing or too large, is not YAML, or holds no ranks.
    """
    content = _document(path)
    modules = content.get("modules", content)
    ranks = dict(_flat(modules)) if isinstance(modules, Mapping) else {}
    if not ranks:
        raise ConfigError(
            f"{path} contains no ranks. Under `modules`, set the rank of each target module as NAME: RANK."
        )
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 0:
            what = f"rank of {shown(name)} in {path}"
            raise ConfigError(f"The {what} must be a whole number of at least 0; got {shown(rank)}.")
    return ranks


def plan_text(ranks: Mapping[str, int], cost: float, limit: float, unit: str, name: str = "plan.yaml") -> str:
    """Format a plan as an editable text file for `read_plan`, one line per layer.

    Args:
        ranks: ranks of the target modules, by full name.
        cost: predicted cost of the plan.
        limit: the budget, in the same unit.
        unit: "bytes" or "parameters".
        name: name of the file.
    """
    modules: dict[str, Any] = {}
    for module, rank in ranks.items():
        if in_layer := re.match(r"(.*?\b\d+)\.(.+)", module):
            modules.setdefault(in_layer[1], {})[in_layer[2]] = rank
        else:
            modules[module] = rank
    allowed = ", ".join(map(str, DEFAULT_RANKS))
    header = _HEADER.format(cost=cost_text(cost, unit), limit=cost_text(limit, unit), ranks=allowed, name=name)
    body = {"read_at": [0], "modules": modules}
    text: str = yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=10**6, allow_unicode=True)
    return header + text


def _document(path: Path) -> Mapping[Any, Any]:
    """Read a mapping from a file."""
    try:
        content = parse_yaml(read_text(path, MOST_YAML_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"Plan {path} does not exist. `rankpilot plan ... --output {path}` writes one.") from error
    except (OSError, DataError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path} as YAML: {first_line(error)}.") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} {'is empty' if content is None else 'is not a mapping'}. A plan needs `modules`.")
    return content


def _flat(modules: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each module's full name and its rank entry from a mapping with nested groups."""
    for name, value in modules.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{full}.")
        else:
            yield full, value


MEAN_SIGNALS = ("sensitivity", "snr", "relative_change")
"""Signals averaged as the scores of the signal-mean rule."""


@dataclass(frozen=True)
class TopDown:
    """Equal ranks on as many top layers as can have the rank floor, and on some modules of the next layer down.

    Attributes:
        name: the name in logs and tables.
    """

    reads_signals: ClassVar[bool] = False
    name: str = "top-down"

    def decide(self, observation: Observation) -> Decision:
        """Return equal scores, with the usual rank floor."""
        return decision_from_scores(observation, np.zeros(len(observation.modules)))


@dataclass(frozen=True)
class SignalRule:
    """Adapts the modules of top-down, with more rank for modules with larger signals.

    Under a budget of parameters the rank floor is 1, to adapt as many modules as the budget allows.

    Attributes:
        name: the name in logs and tables.
        gain: factor from the mean to the score; the default was the best on training tasks.
        signals: features to average; each is the log of a signal minus its mean over the modules.
    """

    name: str = "signal-mean"
    gain: float = 0.5
    signals: tuple[str, ...] = MEAN_SIGNALS

    def decide(self, observation: Observation) -> Decision:
        """Return scores equal to the mean of the signals, times the gain."""
        return decision_from_scores(observation, self.gain * mean_feature(observation, self.signals))


@dataclass(frozen=True)
class FixedPlan:
    """One plan for the whole run, made at the first decision without signals.

    Attributes:
        name: the name in logs and tables.
        ranks: makes the plan, int64 (modules,). Ranks between two rungs are rounded down, and the remaining budget is
            spent.
    """

    reads_signals: ClassVar[bool] = False
    name: str
    ranks: Callable[[AllocationProblem], IntArray]

    def decide(self, observation: Observation) -> Decision:
        """Return the plan at the first decision, and no change at later ones."""
        if not is_first(observation):
            return decision_to_keep(observation)
        return decision_from_plan(self.ranks(observation.problem))


@dataclass(frozen=True)
class Window:
    """The largest rank that fits on a window of consecutive layers, with no other layer adapted.

    Attributes:
        start: start of the window, as a share of the layers from the bottom up, 0 to 1. It is rounded to layers.
        end: end of the window, likewise; a window has at least one layer.
    """

    start: float
    end: float = 1.0

    def __call__(self, problem: AllocationProblem) -> IntArray:
        """Return integer ranks, int64 (modules,); those of `uniform_ranks` if not even rank 1 fits on the window.

        Args:
            problem: the allowed plans; current ranks are ignored.
        """
        layers = np.unique(problem.blocks)
        first = min(round(self.start * len(layers)), len(layers) - 1)
        chosen = np.isin(problem.blocks, layers[first : max(round(self.end * len(layers)), first + 1)])

        def on_window(rank: int) -> IntArray:
            return np.where(chosen, problem.uniform(rank), problem.uniform(0))

        ranks = range(1, problem.ladder.ranks[-1] + 1)
        rank = bisect_left(ranks, True, key=lambda r: not problem.fits(on_window(r)))
        return on_window(rank) if rank else uniform_ranks(problem)


@dataclass(frozen=True)
class RandomScores:
    """Standard normal scores at the first decision; the plan is kept at later ones.

    For reproducibility, the draw depends only on the observation, rounded to two decimals.

    Attributes:
        name: the name in logs and tables.
        draw: index of the draw; each gives different scores.
    """

    name: str = "random"
    draw: int = 0

    def decide(self, observation: Observation) -> Decision:
        """Return a random plan at the first decision, and no change later."""
        if not is_first(observation):
            return decision_to_keep(observation)
        seen = np.concatenate([observation.run, observation.modules.ravel()]).round(2) + np.float32(0)  # no -0
        generator = np.random.default_rng([self.draw, *hashlib.sha256(seen.tobytes()).digest()])
        return decision_from_scores(observation, generator.normal(size=len(observation.modules)))


_RULES: tuple[Policy, ...] = (
    TopDown(),
    SignalRule(),
    FixedPlan("uniform", uniform_ranks),
    FixedPlan("top-half", Window(1 / 2)),
    RandomScores(),
    SignalRule("gradient-norm", signals=("gradient_norm",)),
)
RULES: dict[str, Policy] = {rule.name: rule for rule in _RULES}


def find_rule(name: str, others: Sequence[str] = ()) -> Policy:
    """Return the rule of that name; for an unknown one, raise UnknownNameError, listing `others` as well."""
    if name not in RULES:
        hint = "Other policies: 'default' (chooses a plan), a policy folder, or a plan's .yaml file."
        if name.endswith(("%", "iB", "MB", "GB")):
            hint = f'It looks like a budget: pass budget="{name}", after the policy.'
        raise UnknownNameError.of("rule", name, (*others, *RULES), hint)
    return RULES[name]
