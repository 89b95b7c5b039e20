"""What `rankpilot evaluate` does: competitors by name, the run's folder, rows and summary.

Competitors that know more than an observation tells: what was planted in a task, or how a logged run of it ended.

None of them is a policy to use; they tell what one could reach, and what its decisions were worth.

The final ranks of a logged run are taken from the start: did changes on the way matter, did the choice of modules?
Two runs of each task are compared with the logged one. `static` has its final ranks from the first step on: what is
lost there is what later decisions were worth. `shuffled` has the same ranks dealt anew among the modules of each kind,
under a budget of bytes among the adapted ones: what is lost there is what the choice between layers was worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..agents.learned.policy import exploring
from ..agents.learned.policy_file import load_policy, policy_folder, policy_schedule, read_card
from ..agents.log import DecisionLog
from ..agents.plan_file import GivenPlan, shuffled_plan
from ..agents.policy import Policy
from ..agents.rules import RULES, FixedPlan
from ..agents.schedule import DecisionSchedule
from ..common.files import as_plain, read_object, write_json
from ..common.run_folder import CONFIG, open_run
from ..common.settings import as_json, from_json
from ..common.workers import count_workers
from ..env.proxy_finetune import check_texts, oracle_plan
from ..env.proxy_task import ProxyTask
from ..env.suites import evenly, find_tasks
from ..errors import ConfigError, RunFolderError, UnknownNameError
from ..plan.problem import AllocationProblem
from .compare import Competitor, compare
from .config import EvaluateConfig
from .results import Group, groups_of, read_rows, write_rows

STATIC, SHUFFLED = "static", "shuffled"


@runtime_checkable
class TaskRule(Protocol):
    """A competitor that sees the task."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def policy_for(self, task: ProxyTask, problem: AllocationProblem) -> Policy | None:
        """Who decides in a run of a task; None if the rule does not apply to it.

        Args:
            task: with its reference.
            problem: the plans that its first decision allows.
        """


@dataclass(frozen=True)
class Oracle:
    """The plan that captures most of what was planted; see `env.tasks.oracle`.

    Attributes:
        name: what tables call it.
    """

    name: str = "oracle"

    def policy_for(self, task: ProxyTask, problem: AllocationProblem) -> Policy | None:
        """Its plan, on planted tasks."""
        if task.kind != "planted":
            return None
        ranks = oracle_plan(task, problem)
        return FixedPlan(self.name, lambda _: ranks)


@dataclass(frozen=True)
class Replayed:
    """Runs each task at the final ranks of a logged run.

    Attributes:
        logs: the decision logs of one policy's runs, as `rankpilot evaluate --logs` writes them: a folder for each run.
        how: `STATIC` or `SHUFFLED`.
    """

    logs: Path
    how: str = STATIC

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.logs.name} {self.how}"

    def policy_for(self, task: ProxyTask, problem: AllocationProblem) -> Policy | None:
        """The ranks that the logged run of the task ended with.

        A last plan that had the bytes of signal buffers may have to give up a rung.

        Raises:
            RunFolderError: there is no log of a run of this task and seed.
        """
        matches = sorted(self.logs.glob(f"*-{task.seed}"))
        logs = [log for log in map(DecisionLog, matches) if len(log)]
        if len(logs) != 1:
            raise RunFolderError(
                f"{self.logs} holds {len(logs)} logs of task {task.id} with seed {task.seed}, and one is needed. Run "
                "`rankpilot evaluate` with --logs on the same tasks and seeds first."
            )
        last = logs[0].read()[-1]
        ranks = shuffled_plan(last, task.seed) if self.how == SHUFFLED else last.plan()
        return GivenPlan(self.name, ranks) if any(ranks.values()) else None


ROWS, SUMMARY, POLICIES, LOGS = "rows.jsonl", "summary.json", "policies.json", "logs"

_FIXED = ("suite", "split", "bases", "tasks", "task_steps")
"""Settings that stay the same when a comparison goes on."""

EXPLORE = "explore-"
"""Before a temperature, a colon and the folder of a policy: it draws its plans."""

ORACLE = Oracle()


def evaluate(
    config: EvaluateConfig,
    folder: Path,
    *,
    resume: bool = False,
    logs: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Compare policies, and write rows and summary into a folder.

    Args:
        config: who and on what.
        folder: of the comparison.
        resume: go on with what is there; further policies and seeds may join, the tasks stay the same.
        logs: write down the decisions of each run, in `LOGS` in the folder; runs without a log are run again.
        on_progress: called with (runs done, runs in all).

    Returns:
        The results: on all tasks first, then by kind and unit.

    Raises:
        UnknownNameError, PolicyFileError, ConfigError: a competitor or task that cannot be.
        RunFolderError: the folder holds something else.
        AssetError: a text is not at hand.
    """
    tasks = evaluation_tasks(config)
    schedule = _common_schedule(config.names, folder if resume else None)
    competitors = {name: find_competitor(name) for name in config.names}
    check_texts(tasks)
    settings = {name: getattr(config, name) for name in _FIXED} | {"schedule": asdict(schedule)}
    with open_run(folder, as_plain(settings), resume=resume):
        check_weights(folder, {competitors[name].name: name for name in config.names})
        rows = compare(
            list(competitors.values()),
            tasks,
            schedule,
            workers=count_workers(config.workers),
            seeds=config.seeds,
            file=folder / ROWS,
            logs=folder / LOGS if logs else None,
            on_progress=on_progress,
        )
        keys = {row.key for row in rows}
        write_rows(folder / ROWS, [*rows, *(row for row in read_rows(folder / ROWS) if row.key not in keys)])
        groups = groups_of(rows, competitors[config.against].name)
        summary = as_json(EvaluateConfig, config) | {"groups": [asdict(group) for group in groups]}
        write_json(folder / SUMMARY, summary)
    return groups


def evaluation_tasks(config: EvaluateConfig) -> tuple[ProxyTask, ...]:
    """The tasks on which policies are compared.

    Raises:
        UnknownNameError: no such suite or base.
        ConfigError: fewer than two tasks.
    """
    overrides = None if config.task_steps is None else {"steps": config.task_steps}
    tasks = find_tasks(config.suite, config.split, config.bases or None, overrides)
    if len(tasks) < 2:
        raise ConfigError(f"Intervals need at least 2 tasks; {config.suite} has {len(tasks)} on {config.bases}.")
    return tasks if config.tasks is None else evenly(tasks, config.tasks)


def find_competitor(name: str) -> Competitor:
    """A competitor by its name on the command line.

    Raises:
        UnknownNameError: no such rule or folder.
        PolicyFileError, RunFolderError: a folder that cannot be used.
    """
    before, colon, folder = name.rpartition(":")
    if colon and before.startswith(EXPLORE):
        return exploring(load_policy(folder), before.removeprefix(EXPLORE))
    if colon and before in (STATIC, SHUFFLED):
        if not Path(folder).is_dir():
            raise RunFolderError(
                f"There is no folder {folder} of decision logs. Pass OUTPUT/logs/POLICY of an evaluation."
            )
        return Replayed(Path(folder), before)
    if name == ORACLE.name:
        return ORACLE
    if name not in RULES and Path(name).name == name and not policy_folder(name).exists():
        raise UnknownNameError.of("rule", name, [*RULES, ORACLE.name], "A trained policy is given by its folder.")
    return load_policy(name)


def _folder(name: str) -> Path | None:
    """The folder of a trained policy among the competitors; None for a rule."""
    before, _, folder = name.rpartition(":")
    if name == ORACLE.name or before in (STATIC, SHUFFLED):
        return None
    path = policy_folder(folder)
    return path if path.is_dir() else None


def _common_schedule(names: Sequence[str], folder: Path | None) -> DecisionSchedule:
    """When ranks are decided: as the trained policies learned it, or as in the folder of the comparison gone on with.

    Raises:
        ConfigError: they learned different ones.
    """
    schedules = {policy_schedule(policy) for name in names if (policy := _folder(name))}
    if len(schedules) > 1:
        raise ConfigError("These policies were trained with different schedules, so no run is fair to all of them.")
    if schedules:
        return schedules.pop()
    if folder is not None and (folder / CONFIG).is_file():
        return from_json(DecisionSchedule, read_object(folder / CONFIG).get("schedule"))
    return DecisionSchedule()


def check_weights(folder: Path, names: dict[str, str]) -> None:
    """Note which weights the policies have, and where logs are, and refuse others of the same name: rows would mix.

    Args:
        folder: of the comparison.
        names: what each competitor is called in rows, and how it was given.
    """
    weights = {}
    for name, given in names.items():
        how, _, logs = given.partition(":")
        if how in (STATIC, SHUFFLED):
            weights[name] = str(Path(logs).resolve())
        elif path := _folder(given):
            weights[name] = read_card(path)["sha256"]
    notes = folder / POLICIES
    known = read_object(notes) if notes.exists() else {}
    for name, digest in weights.items():
        if known.get(name, digest) != digest:
            raise RunFolderError(
                f"{folder} holds results of another policy named {name!r} ({known[name]}). Use another --output."
            )
    write_json(notes, known | weights)
