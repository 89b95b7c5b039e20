"""Compares policies on the same tasks, seeds and batches, many runs at a time, as `rankpilot policy evaluate` does.

The work is cut into chunks of runs that share a base and a batch shape; worker processes take them one after another
and run each chunk in the slots of one `StackedEpisodes`. What a run gives does not depend on what runs beside it, so
the rows are the same for any number of workers and in whatever order they come.

One competitor knows more than an observation tells. The oracle knows what was planted in a task; it is no policy to
use, and tells what one could reach.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ..agents.policy_file import load_policy, policy_schedule, read_card
from ..common.files import CONFIG, as_json, as_plain, from_json, open_run, read_object, write_json
from ..common.workers import count_workers, worker_pool
from ..decide.chooser import DEFAULT
from ..decide.log import DecisionLog, DecisionRecord
from ..decide.observation import Observation
from ..decide.policy import Decision, Policy
from ..decide.rules import RULES, FixedPlan
from ..decide.settings import DecisionSchedule
from ..env.bases import weights_file
from ..env.episode import EpisodeLog
from ..env.proxy_finetune import check_texts, oracle_plan
from ..env.proxy_task import ProxyTask, Reference, evenly, find_tasks
from ..env.stacked import StackedEpisodes
from ..errors import ConfigError, RunFolderError, UnknownNameError
from ..plan.problem import AllocationProblem
from .config import EvaluateConfig
from .results import Group, Key, Row, append_rows, groups_of, read_rows, row_of, write_rows


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
    """The plan that captures most of what was planted, as `env/proxy_finetune.py` finds it.

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


SLOTS = 16
"""Runs at a time in one process."""

SEED_STEP = 7_000_000
"""Between the seeds of a task's repetitions; the suites' own seeds lie from 1 to 3 million."""

Competitor = Policy | TaskRule


@dataclass(frozen=True, eq=False)
class Job:
    """One row to be found, or one reference.

    Attributes:
        competitor: who runs; None for the reference's uniform run.
        origin: the suite's task.
        task: the repetition of it that is run.
    """

    competitor: Competitor | None
    origin: ProxyTask
    task: ProxyTask

    @property
    def key(self) -> Key:
        """That of its row."""
        return self.competitor.name if self.competitor else "", self.origin.id, self.task.seed


def repetition(task: ProxyTask, number: int) -> ProxyTask:
    """The same task with another teacher, data and adapters; number 0 is the task itself."""
    return replace(task, seed=task.seed + SEED_STEP * number, reference=None) if number else task


def compare(
    competitors: Sequence[Competitor],
    tasks: Sequence[ProxyTask],
    schedule: DecisionSchedule,
    *,
    workers: int,
    seeds: int = 1,
    file: Path | None = None,
    logs: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Run every competitor on every task.

    Args:
        competitors: policies and task rules, with different names.
        tasks: the same ones for each.
        schedule: when ranks are decided.
        workers: processes; with one, all happens in this process.
        seeds: repetitions of each task, at least 1.
        file: rows go there as soon as they are found; those that it holds already are not run again, unless a log is
            wanted that is not there.
        logs: the decisions of each run go to a log in this folder, see `log_folder`; those of task rules do not.
        on_progress: called with (runs done, runs in all).

    Returns:
        Rows by competitor, task and repetition, in the order given. A rule that does not apply to a task has none.

    Raises:
        ConfigError: two competitors have one name, or seeds or workers are below 1.
    """
    _check(competitors, seeds, workers)
    known = {row.key: row for row in read_rows(file)} if file else {}
    pairs = [(task, repetition(task, number)) for task in tasks for number in range(seeds)]
    jobs = [Job(competitor, *pair) for competitor in competitors for pair in pairs]
    missing = [job for job in jobs if job.key not in known or (logs is not None and _lacks_log(job, logs))]
    references = {key[1:]: row.reference for key, row in known.items()}
    unmeasured = [Job(None, *pair) for pair in dict.fromkeys((job.origin, job.task) for job in missing)]
    unmeasured = [job for job in unmeasured if job.key[1:] not in references]
    total, done = len(unmeasured) + len(missing), 0
    with worker_pool(workers) as pool:
        for chunk, results in pool.spread(partial(_measure, schedule), _chunks(unmeasured, workers), _name):
            references |= {job.key[1:]: result for job, result in zip(chunk, results, strict=True)}
            done += len(chunk)
            if on_progress:
                on_progress(done, total)
        missing = [_with_reference(job, references) for job in missing]
        run = partial(_run, schedule, logs is not None)
        for chunk, (rows, records) in pool.spread(run, _chunks(missing, workers), _name):
            known |= {row.key: row for row in rows}
            if logs:
                _write_logs(logs, records)
            if file:
                append_rows(file, rows)
            done += len(chunk)
            if on_progress:
                on_progress(done, total)
    return [known[job.key] for job in jobs if job.key in known]


def _check(competitors: Sequence[Competitor], seeds: int, workers: int) -> None:
    names = [competitor.name for competitor in competitors]
    if len(set(names)) < len(names) or min(seeds, workers) < 1:
        raise ConfigError(
            f"Competitors have different names, and seeds and workers are at least 1; got {', '.join(names)}, {seeds} "
            f"and {workers}."
        )


def _write_logs(folder: Path, records: Mapping[Key, Sequence[DecisionRecord]]) -> None:
    """Write down the decisions of runs, in place of what earlier ones of the same keys have left."""
    for key, decisions in records.items():
        log = DecisionLog(log_folder(folder, key))
        log.truncate(0)
        for record in decisions:
            log.append(record)


def _name(chunk: Sequence[Job]) -> str:
    """What errors call the work of a chunk."""
    names = dict.fromkeys(job.competitor.name if job.competitor else "uniform" for job in chunk)
    return f"{', '.join(names)} on {', '.join(dict.fromkeys(job.task.id for job in chunk))}"


def _with_reference(job: Job, references: Mapping[tuple[str, int], Reference]) -> Job:
    """The job on a task that knows its reference."""
    return replace(job, task=replace(job.task, reference=references[job.key[1:]]))


def _chunks(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs that can share a stack, each task's side by side; `SLOTS` at most."""
    size = min(SLOTS, -(-len(jobs) // workers))
    chunks: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: (*job.task.stack, job.task.seed)):
        if not chunks or chunks[-1][0].task.stack != job.task.stack or len(chunks[-1]) == size:
            chunks.append([])
        chunks[-1].append(job)
    return chunks


@lru_cache(maxsize=1)
def _episodes(stack: tuple[str, int, int], schedule: DecisionSchedule) -> StackedEpisodes:
    """The stack of this process."""
    return StackedEpisodes(stack[0], schedule, SLOTS)


def _measure(schedule: DecisionSchedule, jobs: list[Job]) -> list[Reference]:
    """The references of some tasks, `SLOTS` at most, with the loss of the rule `uniform` here and now.

    What a suite's card tells of uniform rank was rounded, and measured on another machine: beside it competitors would
    differ by more than they do from one another. The best known loss is the card's; that of a repetition is estimated.
    """
    episodes = _episodes(jobs[0].task.stack, schedule)
    episodes.start_all([job.task for job in jobs])
    before = episodes.held_out_losses(range(len(jobs))).values()
    after = episodes.run_to_the_end(lambda seen: [RULES["uniform"].decide(observation) for observation in seen])
    found = [
        Reference(initial, loss if np.isfinite(loss) else initial) for initial, loss in zip(before, after, strict=True)
    ]
    return [_with_best(reference, job) for reference, job in zip(found, jobs, strict=True)]


def _with_best(reference: Reference, job: Job) -> Reference:
    """A reference with the best loss that is known, or one in proportion to what uniform gained."""
    origin = job.origin.reference
    if origin is None or origin.best is None:
        return reference
    estimate = reference.uniform - reference.gain * origin.headroom / origin.gain
    return replace(reference, best=origin.best if job.task.seed == job.origin.seed else estimate)


def log_folder(logs: Path, key: Key) -> Path:
    """The folder of a run's decision log: POLICY/TASK-SEED, in names that every file system takes."""
    policy, task = (re.sub(r"[^\w.=-]+", "-", name) for name in (key[0], f"{key[1]}-{key[2]}"))
    return logs / (policy if policy.strip(".") else f"-{policy}") / task  # a policy may be called ".."


def _lacks_log(job: Job, logs: Path) -> bool:
    return not isinstance(job.competitor, TaskRule) and not len(DecisionLog(log_folder(logs, job.key)))


def _run(
    schedule: DecisionSchedule, logged: bool, jobs: list[Job]
) -> tuple[list[Row], dict[Key, list[DecisionRecord]]]:
    """The rows of some jobs, and their decisions, which this process may be too far away to write in place."""
    episodes = _episodes(jobs[0].task.stack, schedule)
    records: dict[Key, list[DecisionRecord]] = {}
    run: list[tuple[Job, Policy, EpisodeLog | None]] = []
    for job in jobs:
        policy: Competitor | None = job.competitor
        log: EpisodeLog | None = None
        if isinstance(policy, TaskRule):
            policy = policy.policy_for(job.task, episodes.problem(job.task))
        elif policy and logged:
            write = records.setdefault(job.key, []).append
            log = EpisodeLog(write, policy, f"{job.origin.id} seed {job.task.seed}")
        if policy:
            run.append((job, policy, log))
    attempts = [(job.task, policy) for job, policy, _ in run]
    losses = run_attempts(episodes, attempts, SLOTS, [log for *_, log in run])
    rows = []
    for (job, *_), loss in zip(run, losses, strict=True):
        assert job.task.reference is not None
        rows.append(row_of(job.key[0], job.origin, job.task, job.task.reference, loss))
    return rows, records


def run_attempts(
    episodes: StackedEpisodes,
    attempts: Sequence[tuple[ProxyTask, Policy]],
    slots: int,
    logs: Sequence[EpisodeLog | None] | None = None,
) -> list[float]:
    """Run policies on tasks; each result is as if it had run alone.

    Args:
        episodes: of the base of all tasks.
        attempts: tasks, of one batch shape and each with its reference, and who decides.
        slots: how many run at once.
        logs: of each attempt, where its decisions are written down, if anywhere.

    Returns:
        Held-out losses in nats, NaN for a run that failed.
    """
    losses: list[float] = []
    for start in range(0, len(attempts), slots):
        batch = attempts[start : start + slots]
        given = enumerate(logs[start : start + slots] if logs else ())
        episodes.start_all([task for task, _ in batch], {slot: log for slot, log in given if log})
        losses += episodes.run_to_the_end(partial(_decide, [policy for _, policy in batch]))
    return losses


def _decide(policies: Sequence[Policy], seen: Sequence[Observation]) -> list[Decision]:
    return [policy.decide(observation) for policy, observation in zip(policies, seen, strict=True)]


ROWS, SUMMARY, POLICIES, LOGS = "rows.jsonl", "summary.json", "policies.json", "logs"

_FIXED = ("suite", "split", "bases", "tasks", "task_steps")
"""Settings that stay the same when a comparison goes on."""

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
        AssetError: a text or the weights of a proxy base are not at hand.
    """
    tasks = evaluation_tasks(config)
    schedule = _common_schedule(config.names, folder if resume else None)
    competitors = {name: find_competitor(name) for name in config.names}
    check_texts(tasks)
    for base in sorted({task.base for task in tasks}):
        weights_file(base)
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
        PolicyFileError: a folder that cannot be used.
    """
    if name == ORACLE.name:
        return ORACLE
    if name not in (*RULES, DEFAULT) and Path(name).name == name and not Path(name).exists():
        raise UnknownNameError.of(
            "rule", name, [*RULES, ORACLE.name, DEFAULT], "A trained policy is given by its folder."
        )
    return load_policy(name)


def _folder(name: str) -> Path | None:
    """The folder of a trained policy among the competitors; None for a rule."""
    if name in (ORACLE.name, DEFAULT):
        return None
    return Path(name) if Path(name).is_dir() else None


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
    """Note which weights the policies have, and refuse others of the same name: rows would mix.

    Args:
        folder: of the comparison.
        names: what each competitor is called in rows, and how it was given.
    """
    weights = {name: read_card(path)["sha256"] for name, given in names.items() if (path := _folder(given))}
    notes = folder / POLICIES
    known = read_object(notes) if notes.exists() else {}
    for name, digest in weights.items():
        if known.get(name, digest) != digest:
            raise RunFolderError(
                f"{folder} holds results of another policy named {name!r} ({known[name]}). Use another --output."
            )
    write_json(notes, known | weights)
