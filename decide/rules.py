"""Policies that nobody trains: rules, and plans that somebody gives.

| rule | its plan | reads signals |
|---|---|---|
| uniform | one rank on as many top layers as can have rank 8 (rank 1 under a budget of parameters) | no |
| top-half | one rank on the top half of the layers | no |
| top-down | one rank on as many top layers as can have rank 16, and on some modules of the next one | no |
| random | random scores, the rank floor of top-down | no |
| gradient-norm | the modules of top-down, ranks by one signal | yes |
| signal-mean | the modules of top-down, ranks by the mean of three signals | yes |

Rules that read signals make a new plan at every decision. So does top-down, but from the same scores. The others keep
the plan of the first decision. A new rule is a policy (`decide/policy.py`) and an entry of `_RULES`.

Plans that somebody gives have a rank for each module: a mapping, or a file that a person reads and edits (`PlanFile`).
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

from ..common.arrays import FloatArray, IntArray
from ..common.files import MOST_YAML_BYTES, parse_yaml, read_text
from ..common.text import cost_text, format_bytes
from ..cost.cost import plan_cost, unit_cost
from ..errors import BudgetError, ConfigError, DataError, UnknownNameError, first_line, shown
from ..lora.spec import DEFAULT_RANKS
from ..plan.plan import Plan, uniform_ranks
from ..plan.problem import AllocationProblem
from .observation import Observation, mean_feature
from .policy import Decision, Policy, decided_plan, decision_from_plan, decision_from_scores, decision_to_keep, is_first
from .settings import ONCE, DecisionSchedule

logger = logging.getLogger(__name__)

FILE_SUFFIXES = (".yaml", ".yml")
"""By these a plan file is told from the folder of a policy and the name of a rule."""

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
        ranks: of each module, by its full name.
    """

    reads_signals: ClassVar[bool] = False
    name: str
    ranks: Mapping[str, int] = field(hash=False)

    def decide(self, observation: Observation) -> Decision:
        """The plan at first, and no change after it; what it leaves of the budget is left.

        Raises:
            UnknownNameError: the plan names a module that is not there.
            ConfigError: it leaves one out.
        """
        if not is_first(observation):
            return decision_to_keep(observation)
        for name in self.ranks:
            if name not in observation.names:
                raise UnknownNameError.of("target module", name, observation.names)
        missing = [name for name in observation.names if name not in self.ranks]
        if missing:
            raise ConfigError(
                f"The plan {self.name} gives no rank for {len(missing)} of {len(observation.names)} modules, "
                f"{missing[0]!r} among them. Give each target module a rank; 0 is no adapter."
            )
        ranks = np.array([self.ranks[name] for name in observation.names], dtype=np.int64)
        return Decision(ranks, np.zeros(len(ranks)), exact=True)


def given_ranks(observation: Observation, ranks: Mapping[str, int], name: str = "given") -> tuple[Decision, Plan]:
    """The decision for given ranks, and the plan that it leads to.

    Args:
        observation: of the run; how far a module may move at this decision plays no part.
        ranks: of all target modules, by full name.
        name: what errors call the plan.

    Returns:
        The decision, whose ranks are those given, and the plan, which may be lower where they are above the budget.

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
        raise ConfigError(
            f"{observation.names[module]!r} cannot have rank {decision.ranks[module]}. Allowed: "
            f"{', '.join(map(str, allowed))}."
        )
    return decision, decided_plan(problem, decision)


@dataclass(frozen=True)
class AsConfigured:
    """Leaves all ranks as the LoraConfig has them, also those that are on no ladder."""

    reads_signals: ClassVar[bool] = False
    schedule: ClassVar[DecisionSchedule] = ONCE
    name: ClassVar[str] = "as-configured"

    def decide(self, observation: Observation) -> Decision:
        """No change."""
        return decision_to_keep(observation)


@dataclass(frozen=True)
class PlanFile:
    """A plan in a file, as a policy: it is read anew at every decision, so a person may edit it in between.

    Attributes:
        path: of the file; `plan_text` writes one.

    Raises:
        ConfigError: the file is missing, or holds no plan.
    """

    reads_signals: ClassVar[bool] = False
    path: Path

    def __post_init__(self) -> None:
        read_plan(self.path)

    @property
    def name(self) -> str:
        """The file's name, in logs and tables."""
        return self.path.name

    @property
    def schedule(self) -> DecisionSchedule:
        """When the file is read: its `read_at`, or once. A module may then move from any rank to any other."""
        try:
            read_at = tuple(_document(self.path).get("read_at", (0.0,)))
            return DecisionSchedule(fractions=read_at, max_step=len(DEFAULT_RANKS))
        except (ConfigError, TypeError) as error:
            raise ConfigError(
                f"read_at in {self.path} is a list of rising shares of the run, from 0 to below 1: {first_line(error)}"
            ) from error

    def decide(self, observation: Observation) -> Decision:
        """Exactly the ranks that the file holds now; a later file that cannot be used changes nothing, with a warning.

        Raises:
            UnknownNameError, ConfigError: at the first decision, the file holds no plan for these modules.
            BudgetError: there, its plan is above the budget or the limit of time.
        """
        try:
            return self._exactly(observation)
        except (UnknownNameError, ConfigError, BudgetError) as error:
            if is_first(observation):
                raise
            logger.warning("The plan in %s cannot be used, so the ranks stay as they are: %s", self.path, error)
            return decision_to_keep(observation)

    def _exactly(self, observation: Observation) -> Decision:
        decision, _ = given_ranks(observation, read_plan(self.path), str(self.path))
        problem = observation.problem
        cost, unit = unit_cost(problem.cost, decision.ranks), problem.cost.unit
        if cost > problem.limit:
            excess = cost - problem.limit
            over = format_bytes(excess, up=True) if unit == "bytes" else cost_text(excess, unit)
            raise BudgetError(
                f"The plan in {self.path} is predicted to take {cost_text(cost, unit)}, {over} above the budget of "
                f"{cost_text(problem.limit, unit)}. Lower some ranks, or raise the budget."
            )
        if not problem.fits(decision.ranks):
            times = plan_cost(problem.cost, decision.ranks) / problem.limit
            raise BudgetError(
                f"A step under the plan in {self.path} takes {times:.3g} times as long as the time allows. Lower some "
                "ranks, or allow more time."
            )
        if not np.array_equal(decided_plan(problem, decision).ranks, decision.ranks):
            raise ConfigError(
                f"The plan in {self.path} moves a module by more than {problem.max_step} rungs at one decision. Leave "
                "`schedule` out, or give it a larger max_step."
            )
        return decision


def read_plan(path: Path) -> dict[str, int]:
    """The rank of each module, by full name, in a file of YAML or JSON.

    Its `modules`, or the whole of it, maps names to ranks. Names that begin alike may be grouped: under
    `model.layers.0`, `self_attn.q_proj: 8` is module "model.layers.0.self_attn.q_proj".

    Raises:
        ConfigError: the file is missing or too large, is no YAML, or holds no ranks.
    """
    content = _document(path)
    modules = content.get("modules", content)
    ranks = dict(_flat(modules)) if isinstance(modules, Mapping) else {}
    if not ranks:
        raise ConfigError(f"{path} holds no ranks. Under `modules`, give each target module its rank, as NAME: RANK.")
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 0:
            raise ConfigError(f"The rank of {shown(name)} in {path} is {shown(rank)}; it is a whole number from 0 on.")
    return ranks


def plan_text(ranks: Mapping[str, int], cost: float, limit: float, unit: str, name: str = "plan.yaml") -> str:
    """A plan as the text of a file that a person edits and `read_plan` reads, with a line for each layer.

    Args:
        ranks: of each target module, by full name.
        cost: what the plan is predicted to take.
        limit: the budget, in the same unit.
        unit: "bytes" or "parameters".
        name: of the file.
    """
    modules: dict[str, Any] = {}
    for module, rank in ranks.items():
        if in_layer := re.match(r"(.*?\b\d+)\.(.+)", module):
            modules.setdefault(in_layer[1], {})[in_layer[2]] = rank
        else:
            modules[module] = rank
    header = _HEADER.format(
        cost=cost_text(cost, unit), limit=cost_text(limit, unit), ranks=", ".join(map(str, DEFAULT_RANKS)), name=name
    )
    body = {"read_at": [0], "modules": modules}
    text: str = yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=10**6, allow_unicode=True)
    return header + text


def _document(path: Path) -> Mapping[Any, Any]:
    """The mapping that a file holds."""
    try:
        content = parse_yaml(read_text(path, MOST_YAML_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no plan {path}. `rankpilot plan ... --output {path}` writes one.") from error
    except (OSError, DataError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {first_line(error)}.") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} {'is empty' if content is None else 'holds no mapping'}. A plan has `modules`.")
    return content


def _flat(modules: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each module's full name with what stands for its rank, out of a mapping with groups in it."""
    for name, value in modules.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{full}.")
        else:
            yield full, value


MEAN_SIGNALS = ("sensitivity", "snr", "relative_change")
"""The signals whose mean the rule signal-mean takes as scores."""


@dataclass(frozen=True)
class TopDown:
    """Equal ranks on as many top layers as can have the rank floor, and on some modules of the next layer down.

    Attributes:
        name: the name in logs and tables.
    """

    reads_signals: ClassVar[bool] = False
    name: str = "top-down"

    def decide(self, observation: Observation) -> Decision:
        """Equal scores, and the usual rank floor."""
        return decision_from_scores(observation, np.zeros(len(observation.modules)))


@dataclass(frozen=True)
class SignalRule:
    """Adapts the modules of top-down, and gives more rank to those with larger signals.

    Under a budget of parameters the rank floor is 1, so that all modules are adapted that the budget allows.

    Attributes:
        name: the name in logs and tables.
        gain: by what the mean is multiplied to give the score; the default was the best on training tasks.
        signals: features whose mean is taken; each is the log of a signal minus its mean over the modules.
    """

    name: str = "signal-mean"
    gain: float = 0.5
    signals: tuple[str, ...] = MEAN_SIGNALS

    def decide(self, observation: Observation) -> Decision:
        """Scores are the mean of the signals, times the gain."""
        return decision_from_scores(observation, self.gain * mean_feature(observation, self.signals))


def signal_mean(observation: Observation) -> FloatArray:
    """The mean of the three signals of signal-mean, each as a log minus its mean, (modules,)."""
    return mean_feature(observation, MEAN_SIGNALS)


@dataclass(frozen=True)
class FixedPlan:
    """One plan for the whole run, made at the first decision without signals.

    Attributes:
        name: the name in logs and tables.
        ranks: makes the plan, int64 (modules,). Ranks between two rungs are rounded down, and what is then left is
            spent.
    """

    reads_signals: ClassVar[bool] = False
    name: str
    ranks: Callable[[AllocationProblem], IntArray]

    def decide(self, observation: Observation) -> Decision:
        """The plan at the first decision, and no change at later ones."""
        if not is_first(observation):
            return decision_to_keep(observation)
        return decision_from_plan(self.ranks(observation.problem))


@dataclass(frozen=True)
class Window:
    """The largest rank that fits on neighbouring layers, the window, while no other layer is adapted.

    Attributes:
        start: where the window begins, as a share of the layers from the bottom up, 0 to 1. It is rounded to layers.
        end: where it ends, likewise; a window has at least one layer.
    """

    start: float
    end: float = 1.0

    def __call__(self, problem: AllocationProblem) -> IntArray:
        """Any whole ranks, int64 (modules,); where not even rank 1 fits on the window, those of `uniform_ranks`.

        Args:
            problem: the plans that are possible; current ranks play no part.
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
    """Normal scores with standard deviation 1 at the first decision; the plan is kept at later ones.

    The draw depends only on the observation, rounded to two decimals, so that a decision can be reproduced.

    Attributes:
        name: the name in logs and tables.
        draw: number of the draw; each gives other scores.
    """

    name: str = "random"
    draw: int = 0

    def decide(self, observation: Observation) -> Decision:
        """A random plan at first, and no change after it."""
        if not is_first(observation):
            return decision_to_keep(observation)
        seen = np.concatenate([observation.run, observation.modules.ravel()]).round(2) + np.float32(0)  # no -0
        digest = hashlib.sha256(seen.tobytes()).digest()
        generator = np.random.default_rng([self.draw, *digest])
        return decision_from_scores(observation, generator.normal(size=len(observation.modules)))


__all__ = [
    "MEAN_SIGNALS",
    "RULES",
    "FixedPlan",
    "RandomScores",
    "SignalRule",
    "TopDown",
    "Window",
    "find_rule",
    "signal_mean",
]

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
    """The rule of that name; UnknownNameError, which tells `others` as well, if there is none."""
    if name not in RULES:
        hint = "Other policies: 'default', which chooses a plan, a folder, or a plan's .yaml file."
        if name.endswith(("%", "iB", "MB", "GB")):
            hint = f'It reads as a budget: pass budget="{name}", after the policy.'
        raise UnknownNameError.of("rule", name, (*others, *RULES), hint)
    return RULES[name]
