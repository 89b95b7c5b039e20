"""Plan runs: many plans for each of many tasks, trained to their end, from which a value ensemble learns.

All runs of a task share its seed and batches, so that they differ by their plans alone. The first run has plain LoRA,
rank 8 on every target module, with which all others are compared. The others have plans of any cost: candidates that
spend the task's budget, candidates under lower limits, and kinds or depths of modules. At later decisions most runs
keep what they have, and some take a candidate again. What is seen and decided goes to a file for each stack of runs, so
that an interrupted training goes on where it was.

Beside those of fresh proxies a training reads plan runs of real fine-tunes from one file, which
`python -m benchmarks plan-runs` makes. Each of these had one decision, before the first step.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..agents.learned import policy as learned_policy
from ..agents.learned.networks import Plans
from ..agents.learned.policy_file import SCHEMA
from ..agents.observation import MODULE_FEATURES, RUN_FEATURES, Observation, with_limit
from ..agents.policy import Decision, decided_plan, decision_to_keep, is_first
from ..agents.settings import DecisionSchedule
from ..common.arrays import Arrays
from ..common.files import atomic_path, from_json, parse_json, read_arrays
from ..common.workers import worker_pool
from ..env.proxy_task import ProxyTask, find_base
from ..env.stacked import StackedEpisodes
from ..errors import DataError, RunFolderError, first_line
from .fit_plan_value import PlanDataset

PLAN_RUNS = "plan_runs"
"""Folder, inside a training run's, of what its value ensemble learns from."""

RUNS = 15
"""Plans of each task."""

REFERENCE = 0
"""The run of each task that has plain LoRA."""

ROOM = 2.0
"""The runs may spend so much, as a share of what plain LoRA takes, or the task's budget if that is more. What is seen
is what would be seen under the task's budget."""

MOVES = 0.25
"""Share of the runs that move at a decision after the first."""

STRUCTURE = ("all", *learned_policy.KINDS, "depth", "mixture")
"""Kinds of plans that follow from the structure of the model; see `structure_plans`."""

CHOICES = (
    *learned_policy.FIXED_NAMES,
    "drawn",
    learned_policy.KEEP,
    learned_policy.ALL_LINEAR,
    "drawn for less",
    *STRUCTURE,
)
"""What a run takes at a decision: a fixed candidate, one that is drawn, the ranks in place, plain LoRA, one that is
drawn under a lower limit, or a plan that follows from the structure of the model."""

PLAN_CHOICES = (
    learned_policy.ALL_LINEAR,
    *learned_policy.FIXED_NAMES,
    "drawn",
    "drawn",
    "drawn for less",
    "drawn for less",
    *STRUCTURE,
)
"""What the runs of a task take at the first decision."""

LESS = (0.1, 0.9)
"""Lower limits are drawn between these, see `with_less`."""

_DESCRIBED = ("tasks", "names", "family", "weight")
"""Fields of `PlanRun` that are no arrays of its file."""


@dataclass(frozen=True, eq=False)
class PlanRun:
    """What one stack of runs was, decision by decision.

    Attributes:
        modules: float32 (decisions, runs, modules, features).
        scores: the actor's, centred, float32 (decisions, runs, modules).
        run: float32 (decisions, runs, features).
        ranks: after each decision, int64 (decisions, runs, modules); -1 for runs that had failed before.
        losses: held-out losses at the end in nats, NaN for runs that failed, float64 (runs,).
        initial: the same before training, float64 (runs,).
        choices: which of `CHOICES` each decision was, int8 (decisions, runs); of runs that had failed before, what they
            would have taken.
        tasks: of the stack, `RUNS` runs of each one after another, `REFERENCE` first.
        names: of the modules, (modules,).
        family: of models, what is held out together; by default that of the tasks' base.
        weight: how often they are learned from whenever others are learned from once.
    """

    modules: NDArray[np.float32]
    scores: NDArray[np.float32]
    run: NDArray[np.float32]
    ranks: NDArray[np.int64]
    losses: NDArray[np.float64]
    initial: NDArray[np.float64]
    choices: NDArray[np.int8] | None = None
    tasks: tuple[ProxyTask, ...] = ()
    names: tuple[str, ...] = ()
    family: str = ""
    weight: int = 1

    def __post_init__(self) -> None:
        if self.tasks and not self.family:
            object.__setattr__(self, "family", find_base(self.tasks[0].base).family)

    @property
    def gains(self) -> NDArray[np.float64]:
        """Minus the log of the loss, (runs,); a run that failed or ended worse than it began has gained nothing."""
        ends = np.fmin(self.losses, self.initial)
        return -np.log(np.maximum(ends, 1e-6))


@dataclass(frozen=True, eq=False)
class Stack:
    """One stack to be run.

    Attributes:
        number: of the stack.
        draw: with the seed it decides the candidates.
        tasks: on one base, of one batch shape.
        actor: its scores are one part of what candidates are made of.
        schedule: when ranks are decided.
        seed: of all stacks.
        device: where to train.
    """

    number: int
    draw: int
    tasks: tuple[ProxyTask, ...]
    actor: learned_policy.LearnedPolicy
    schedule: DecisionSchedule
    seed: int
    device: str


def run_plans(stack: Stack) -> PlanRun:
    """Run a stack of `RUNS` plans a task to its end."""
    generator = np.random.default_rng([stack.seed, stack.draw])
    first = stack.tasks[0]
    shape = first.batch_size, first.length
    episodes = _episodes(first.base, shape, stack.schedule, len(stack.tasks) * RUNS, stack.device)
    roomy = [replace(task, budget=max(task.budget, ROOM)) for task in stack.tasks]
    shares = [task.budget / room.budget for task, room in zip(stack.tasks, roomy, strict=True)]
    episodes.start_all([task for task in roomy for _ in range(RUNS)])
    initial = episodes.held_out_losses(range(0, len(stack.tasks) * RUNS, RUNS))
    noted: dict[str, list[NDArray[Any]]] = {"modules": [], "scores": [], "run": [], "ranks": [], "choices": []}

    def as_budgeted(seen: Sequence[Observation]) -> list[Observation]:
        return [with_limit(each, shares[slot // RUNS] * each.problem.limit) for slot, each in enumerate(seen)]

    def decide(roomy_seen: Sequence[Observation]) -> Sequence[Decision]:
        seen = as_budgeted(roomy_seen)
        actions = [stack.actor.act(observation) for observation in seen]
        noted["scores"].append(np.stack([each.scores - each.scores.mean() for each in actions]).astype(np.float32))
        pairs = enumerate(zip(seen, actions, strict=True))
        decisions, choices = zip(*(draw_decision(*pair, slot % RUNS, generator) for slot, pair in pairs), strict=True)
        noted["choices"].append(np.array([CHOICES.index(choice) for choice in choices], dtype=np.int8))
        return decisions

    def note(roomy_seen: Sequence[Observation], going: Sequence[int]) -> None:
        seen = as_budgeted(roomy_seen)
        noted["modules"].append(np.stack([observation.modules for observation in seen]))
        noted["run"].append(np.stack([observation.run for observation in seen]))
        ranks = np.full((len(seen), len(seen[0].modules)), -1)
        for slot in going:
            ranks[slot] = episodes.under_way[slot].ranks
        noted["ranks"].append(ranks)

    losses = episodes.run_to_the_end(decide, note)
    arrays: dict[str, Any] = {name: np.stack(parts) for name, parts in noted.items()}
    return PlanRun(
        **arrays,
        losses=np.array(losses),
        initial=np.repeat(list(initial.values()), RUNS),
        tasks=stack.tasks,
        names=episodes.under_way[0].observation.names,
    )


def draw_decision(
    observation: Observation, action: learned_policy.MeanAction, number: int, generator: np.random.Generator
) -> tuple[Decision, str]:
    """Another plan for each run of a task; later mostly the ranks as they are. And which of `CHOICES` it is.

    Args:
        observation: of the decision, under the task's budget.
        action: the actor's.
        number: of the run in its task, 0 to `RUNS` - 1.
        generator: draws.
    """
    candidates = learned_policy.candidate_actions(observation, action.scores, action.placement, 1, generator)
    less, place = generator.uniform(*LESS), generator.uniform()
    if not is_first(observation) and generator.uniform() > MOVES:
        return decision_to_keep(observation), learned_policy.KEEP
    choice = PLAN_CHOICES[number] if is_first(observation) else "drawn"
    if choice == learned_policy.ALL_LINEAR:
        return replace(decision_to_keep(observation), ranks=learned_policy.all_linear(observation.problem)), choice
    if choice in STRUCTURE:
        plans = [ranks for name, ranks in learned_policy.structure_plans(observation) if _kind_of(name) == choice]
        return replace(decision_to_keep(observation), ranks=plans[int(place * len(plans))]), choice
    chosen = CHOICES.index(choice) if choice in learned_policy.FIXED_NAMES else len(learned_policy.FIXED_NAMES)
    if choice == "drawn for less":
        observation = replace(observation, problem=learned_policy.with_less(observation.problem, less))
    one = candidates[chosen]
    if choice == learned_policy.UNIFORM:
        (one,) = learned_policy.with_uniform_plan([one], observation.problem)
    decision = one.decision(observation)
    ranks = decided_plan(observation.problem, decision).ranks
    return replace(decision, ranks=ranks, exact=True), choice  # exact: the run has more room than this


def _kind_of(name: str) -> str:
    """Which of `STRUCTURE` a plan of `structure_plans` is, by its name."""
    part = name.partition(" at ")[0]
    if "," in name or " in " in name:
        return "mixture"
    return "depth" if part in learned_policy.DEPTHS else part


@lru_cache(maxsize=1)
def _episodes(
    base: str, shape: tuple[int, int], schedule: DecisionSchedule, slots: int, device: str
) -> StackedEpisodes:
    """The stack of this process; `shape` is that of the batches, which a stack keeps."""
    return StackedEpisodes(base, schedule, slots, device=device)


def collect_plan_runs(
    stacks: Sequence[Stack], folder: Path, *, workers: int, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[PlanRun]:
    """Run what the folder does not hold yet, and yield all plan runs in order.

    Args:
        stacks: what to run; those on one base best follow one another.
        folder: of the plan runs' files.
        workers: processes.
        on_progress: called with (stacks done, stacks in all).

    Raises:
        RunFolderError: the folder holds a damaged file, or one of another version.
    """
    paths = {stack.number: _path(folder, stack.number) for stack in stacks}
    missing = [stack for stack in stacks if not paths[stack.number].exists()]
    done = len(stacks) - len(missing)
    if on_progress:
        on_progress(done, len(stacks))
    with worker_pool(workers) as pool:
        for stack, result in pool.spread(run_plans, missing, _name):
            write_plan_run(result, paths[stack.number])
            done += 1
            if on_progress:
                on_progress(done, len(stacks))
    for path in paths.values():
        yield read_plan_run(path)


def _name(stack: Stack) -> str:
    """What errors call the work of a stack."""
    return f"plan runs {stack.number} of {', '.join(task.id for task in stack.tasks)}"


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def write_plan_run(result: PlanRun, path: Path) -> None:
    """Write plan runs to a file, which is whole or absent."""
    arrays = {field.name: getattr(result, field.name) for field in fields(result) if field.name not in _DESCRIBED}
    metadata = {"schema": str(SCHEMA)}
    if result.choices is None:
        del arrays["choices"]
    if result.tasks:
        metadata["origin"] = json.dumps({"tasks": [asdict(task) for task in result.tasks], "names": result.names})
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def read_plan_run(path: Path) -> PlanRun:
    """The plan runs of one file.

    Raises:
        RunFolderError: it is damaged, or of another version.
    """
    try:
        arrays, metadata = read_arrays(path)
        if metadata.get("schema") != str(SCHEMA):
            raise RunFolderError(f"{path} was written by another version of rankpilot. Train in a new folder.")
        origin = parse_json(metadata.get("origin", "{}"))
        tasks = tuple(from_json(ProxyTask, task) for task in origin.get("tasks", ()))
        given: dict[str, Any] = {**arrays}
        runs = PlanRun(**given, tasks=tasks, names=tuple(origin.get("names", ())))
        _check(runs)
        return runs
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"The plan runs in {path} cannot be read ({first_line(error)}). Delete the file to make them again."
        ) from error


def _check(runs: PlanRun) -> None:
    """Refuse plan runs whose parts do not fit one another; ValueError."""
    decisions, count, modules = runs.ranks.shape
    shapes = {
        "modules": (decisions, count, modules, runs.modules.shape[-1]),
        "scores": (decisions, count, modules),
        "run": (decisions, count, runs.run.shape[-1]),
        "losses": (count,),
        "initial": (count,),
        **({} if runs.choices is None else {"choices": (decisions, count)}),
    }
    for name, shape in shapes.items():
        if getattr(runs, name).shape != shape:
            raise ValueError(f"{name} has shape {getattr(runs, name).shape}, not {shape}")
    if count % RUNS or not decisions * count * modules or runs.ranks.dtype != np.int64:
        raise ValueError(f"ranks of type {runs.ranks.dtype} are for {count} runs, not a multiple of {RUNS}")
    if runs.choices is not None and not ((runs.choices >= 0) & (runs.choices < len(CHOICES))).all():
        raise ValueError(f"a choice is none of {len(CHOICES)}")
    if runs.tasks and (len(runs.tasks) != count // RUNS or len(runs.names) != modules):
        raise ValueError(f"{len(runs.tasks)} tasks and {len(runs.names)} names are for {count} runs of {modules}")


def plan_dataset(plan_runs: Sequence[PlanRun]) -> PlanDataset:
    """All decisions of some plan runs, padded to one number of modules."""
    most_decisions, _, most = np.max([each.ranks.shape for each in plan_runs], axis=0).tolist()
    arrays: dict[str, list[NDArray[np.generic]]] = {name: [] for name in Plans.__dataclass_fields__}
    gains, references, groups, tasks, families, weights, number = [], [], [], [], [], [], 0
    known = sorted({each.family for each in plan_runs})
    for each in plan_runs:
        decisions, runs, modules = each.ranks.shape
        rows = decisions * runs
        padding = (0, most - modules)
        arrays["modules"].append(np.pad(each.modules.reshape(rows, modules, -1), ((0, 0), padding, (0, 0))))
        arrays["scores"].append(np.pad(each.scores.reshape(rows, modules), ((0, 0), padding)))
        arrays["run"].append(each.run.reshape(rows, -1))
        arrays["mask"].append(np.pad(np.ones((rows, modules), dtype=np.float32), ((0, 0), padding)))
        arrays["ranks"].append(np.pad(each.ranks.reshape(rows, 1, modules), ((0, 0), (0, 0), padding)))
        gains.append(np.tile(each.gains, decisions))
        references.append(np.tile(np.repeat(each.gains[REFERENCE::RUNS], RUNS), decisions))
        numbers_of_tasks = np.tile(number + np.arange(runs) // RUNS, decisions)
        tasks.append(numbers_of_tasks)
        groups.append(numbers_of_tasks * most_decisions + np.repeat(np.arange(decisions), runs))
        families.append(np.full(rows, known.index(each.family)))
        weights.append(np.full(rows, each.weight))
        number += runs // RUNS
    whole = {name: np.concatenate(parts) for name, parts in arrays.items()}
    under_way = whole["ranks"].min(axis=(1, 2)) >= 0
    plans = Plans(**{name: torch.from_numpy(values[under_way]) for name, values in whole.items()})
    numbers = [torch.from_numpy(np.concatenate(parts)[under_way]) for parts in (groups, tasks, families, weights)]
    outcomes = [torch.from_numpy(np.concatenate(parts)[under_way]).float() for parts in (gains, references)]
    return PlanDataset(plans, *outcomes, *numbers)


LEAST_FALL = 0.01
"""A fine-tune in which some plan takes a smaller share off the loss is not learned from."""

WEIGHT = 5
"""How often a real fine-tune is learned from whenever a proxy task is once. Planted changes, which most proxies have,
ask for plans that no text asks for; at the same weight networks believed in them on real fine-tunes too."""


@dataclass(frozen=True, eq=False)
class RealPlanRun:
    """`RUNS` plans of one real fine-tune.

    Attributes:
        task: names model, data, size and seed.
        family: model and data; seeds differ. Models whose names begin alike, up to a hyphen, are held out together.
        names: of the modules, (modules,).
        modules: what was seen of them, float32 (modules, features).
        run: what was seen of the run, float32 (features,).
        ranks: int64 (RUNS, modules), plain LoRA first.
        losses: held-out losses at the end in nats, NaN for runs that failed, float64 (RUNS,).
        train_losses: the loss of each step's batch, which all plans share, float32 (RUNS, steps).
        initial: the held-out loss before training.
        choices: how each plan was chosen, see `plan_runs.CHOICES`, int8 (RUNS,).
    """

    task: str
    family: str
    names: tuple[str, ...]
    modules: NDArray[np.float32]
    run: NDArray[np.float32]
    ranks: NDArray[np.int64]
    losses: NDArray[np.float64]
    train_losses: NDArray[np.float32]
    initial: float
    choices: NDArray[np.int8]

    @property
    def learned(self) -> bool:
        """Whether plain LoRA, and each plan that came to an end, took at least `LEAST_FALL` off the held-out loss.

        On other fine-tunes luck decides more than plans do: which of them leaves a plateau of the loss in time.
        """
        most = (1 - LEAST_FALL) * self.initial
        return bool(self.losses[REFERENCE] <= most and not (self.losses > most).any())

    def seen_by(self, actor: learned_policy.LearnedPolicy) -> PlanRun:
        """The same as the value networks of a policy learn from it: with the scores of its actor."""
        scores = actor.scores_of(self.modules, self.run)
        return PlanRun(
            modules=np.tile(self.modules, (1, RUNS, 1, 1)),
            scores=np.tile((scores - scores.mean()).astype(np.float32), (1, RUNS, 1)),
            run=np.tile(self.run, (1, RUNS, 1)),
            ranks=self.ranks[None],
            losses=self.losses,
            initial=np.full(RUNS, self.initial),
            choices=self.choices[None],
            names=self.names,
            family=self.family.partition("-")[0],
            weight=WEIGHT,
        )


REAL_ARRAYS = ("modules", "run", "ranks", "losses", "train_losses", "choices")
"""Fields of `RealPlanRun` that are arrays of its file, `NUMBER.FIELD`; the others are JSON in the file's metadata."""


def more_plan_runs(path: str | Path | None) -> list[RealPlanRun]:
    """The plan runs of the file that a training also learns from, where all plans `learned`; none without a file."""
    runs = read_real_plan_runs(Path(path)) if path else []
    return [run for run in runs if run.learned]


def read_real_plan_runs(path: Path) -> list[RealPlanRun]:
    """The plan runs of a file.

    Raises:
        RunFolderError: it is damaged, or of another version.
    """
    try:
        arrays, metadata = read_arrays(path)
        if metadata.get("schema") != str(SCHEMA):
            raise RunFolderError(f"{path} was written by another version of rankpilot. Make it again.")
        return [_one(arrays, number, texts) for number, texts in enumerate(parse_json(metadata["origin"]))]
    except (DataError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"The plan runs in {path} cannot be read: {first_line(error)}") from error


def _one(arrays: Arrays, number: int, texts: dict[str, Any]) -> RealPlanRun:
    """The fine-tune of a number; ValueError if its arrays do not go together."""
    mine: dict[str, Any] = {name: arrays[f"{number}.{name}"] for name in REAL_ARRAYS}
    names, count = tuple(texts["names"]), len(texts["names"])
    shapes = {
        "modules": (count, len(MODULE_FEATURES)),
        "run": (len(RUN_FEATURES),),
        "ranks": (RUNS, count),
        "losses": (RUNS,),
        "choices": (RUNS,),
    }
    wrong = [name for name, shape in shapes.items() if mine[name].shape != shape]
    if wrong or mine["train_losses"].shape[:-1] != (RUNS,):
        raise ValueError(f"{texts['task']} has other shapes than it should: {', '.join(wrong) or 'train_losses'}.")
    choices = mine["choices"]
    if mine["ranks"].min(initial=0) < 0 or not ((choices >= 0) & (choices < len(CHOICES))).all():
        raise ValueError(f"{texts['task']} has ranks below 0, or choices that do not exist.")
    mine["ranks"] = mine["ranks"].astype(np.int64)
    return RealPlanRun(**texts | {"names": names}, **mine)
