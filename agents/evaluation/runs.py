"""Compare policies on the same tasks, seeds and batches, many runs at a time.

The work is cut into chunks of runs that share a base and a batch shape; worker processes take them one after another
and run each chunk in the slots of one `StackedEpisodes`. What a run gives does not depend on what runs beside it, so
the rows are the same for any number of workers and in whatever order they come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...allocation.log import LINES, DecisionLog
from ...allocation.observation import Observation
from ...allocation.policy import Decision, Policy
from ...allocation.schedule import DecisionSchedule
from ...common.files import atomic_path
from ...common.statistics import mean_and_interval
from ...common.workers import worker_pool
from ...env.episodes.episode_log import EpisodeLog
from ...env.episodes.rollout import Rollout, rollout
from ...env.episodes.stacked import StackedEpisodes
from ...env.tasks.finetune import Reference
from ...env.tasks.proxy_task import ProxyTask
from ...errors import ConfigError
from ..rules import RULES
from .hindsight import Attempt, TaskRule
from .results import Key, Row, append_rows, read_rows, row_of

SLOTS = 16
"""Runs at a time in one process."""

SEED_STEP = 7_000_000
"""Between the seeds of a task's repetitions; the suites' own seeds lie from 1 to 3 million."""

Competitor = Policy | TaskRule

LogFiles = dict[str, dict[str, bytes]]
"""Contents of decision logs: by folder, below that of all logs, and name of the file."""


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

    @property
    def runs(self) -> int:
        """How many runs it takes, at most."""
        return self.competitor.attempts if isinstance(self.competitor, TaskRule) else 1


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
    names = [competitor.name for competitor in competitors]
    if len(set(names)) < len(names) or min(seeds, workers) < 1:
        raise ConfigError(
            f"Competitors have different names, and seeds and workers are at least 1; got {', '.join(names)}, {seeds} "
            f"and {workers}."
        )
    known = {row.key: row for row in read_rows(file)} if file else {}
    pairs = [(task, repetition(task, number)) for task in tasks for number in range(seeds)]
    jobs = [Job(competitor, *pair) for competitor in competitors for pair in pairs]
    missing = [job for job in jobs if job.key not in known or (logs is not None and _lacks_log(job, logs))]
    references = {key[1:]: row.reference for key, row in known.items()}
    unmeasured = [Job(None, *pair) for pair in dict.fromkeys((job.origin, job.task) for job in missing)]
    unmeasured = [job for job in unmeasured if job.key[1:] not in references]
    total, done = sum(job.runs for job in (*unmeasured, *missing)), 0
    with worker_pool(workers) as pool:
        for chunk, results in pool.spread(partial(_measure, schedule), _chunks(unmeasured, workers), _name):
            references |= {job.key[1:]: result for job, result in zip(chunk, results, strict=True)}
            done += _report(chunk, done, total, on_progress)
        missing = [_with_reference(job, references) for job in missing]
        run = partial(_run, schedule, logs is not None)
        for chunk, (rows, files) in pool.spread(run, _chunks(missing, workers), _name):
            known |= {row.key: row for row in rows}
            if logs:
                _write_logs(logs, files)
            if file:
                append_rows(file, rows)
            done += _report(chunk, done, total, on_progress)
    return [known[job.key] for job in jobs if job.key in known]


def _name(chunk: Sequence[Job]) -> str:
    """What errors call the work of a chunk."""
    names = dict.fromkeys(job.competitor.name if job.competitor else "uniform" for job in chunk)
    return f"{', '.join(names)} on {', '.join(dict.fromkeys(job.task.id for job in chunk))}"


def _report(chunk: Iterable[Job], done: int, total: int, on_progress: Callable[[int, int], None] | None) -> int:
    """Tell how far it is; returns the runs of a chunk."""
    runs = sum(job.runs for job in chunk)
    if on_progress:
        on_progress(done + runs, total)
    return runs


def _with_reference(job: Job, references: Mapping[tuple[str, int], Reference]) -> Job:
    """The job on a task that knows its reference."""
    return replace(job, task=replace(job.task, reference=references[job.key[1:]]))


def _chunks(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs that can share a stack, each task's side by side; `SLOTS` runs at most, unless one job alone has more."""
    size = min(SLOTS, -(-sum(job.runs for job in jobs) // workers))
    chunks: list[list[Job]] = []
    stack, runs = None, 0
    for job in sorted(jobs, key=lambda job: (*job.task.stack, job.task.seed)):
        if job.task.stack != stack or runs + job.runs > size:
            chunks.append([])
            stack, runs = job.task.stack, 0
        chunks[-1].append(job)
        runs += job.runs
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
    run = Rollout(_episodes(jobs[0].task.stack, schedule), [job.task for job in jobs])
    before = run.losses()
    rollout(run, partial(_decide, [RULES["uniform"]] * len(jobs)))
    found = [
        Reference(initial, loss if np.isfinite(loss) else initial)
        for initial, loss in zip(before, run.losses(), strict=True)
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


def _run(schedule: DecisionSchedule, logged: bool, jobs: list[Job]) -> tuple[list[Row], LogFiles]:
    """The rows of some jobs, and their decision logs, which this process may be too far away to write in place."""
    if not logged:
        return _rows(schedule, None, jobs), {}
    with TemporaryDirectory(prefix="rankpilot-") as name:
        place = Path(name)
        rows = _rows(schedule, place, jobs)
        files: LogFiles = {}
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            files.setdefault(path.parent.relative_to(place).as_posix(), {})[path.name] = path.read_bytes()
        return rows, files


def _write_logs(logs: Path, files: LogFiles) -> None:
    """Write decision logs in place of those that may be there; the lines come last, as in any log."""
    for folder, contents in files.items():
        DecisionLog(logs / folder).truncate(0)
        for name in sorted(contents, key=lambda name: name == LINES):
            with atomic_path(logs / folder / name) as temporary:
                temporary.write_bytes(contents[name])


def _rows(schedule: DecisionSchedule, logs: Path | None, jobs: list[Job]) -> list[Row]:
    """The rows of some jobs; of several attempts the best counts."""
    episodes = _episodes(jobs[0].task.stack, schedule)
    attempts: list[Sequence[Attempt]] = []
    episode_logs: list[EpisodeLog | None] = []
    for job in jobs:
        assert job.competitor is not None
        if isinstance(job.competitor, TaskRule):
            attempts.append(job.competitor.prepare(job.task, episodes.problem(job.task)))
            episode_logs += [None] * len(attempts[-1])
        else:
            attempts.append([(job.task, job.competitor)])
            episode_logs.append(_log_of(job, job.competitor, logs))
    flat = [attempt for of_job in attempts for attempt in of_job]
    losses = iter(run_attempts(episodes, flat, SLOTS, episode_logs))
    rows = []
    for job, of_job in zip(jobs, attempts, strict=True):
        reached = np.array([next(losses) for _ in of_job])
        if len(reached):
            assert job.task.reference is not None
            loss = float(np.nanmin(reached)) if np.isfinite(reached).any() else float("nan")
            rows.append(row_of(job.key[0], job.origin, job.task, job.task.reference, loss))
    return rows


def _log_of(job: Job, policy: Policy, logs: Path | None) -> EpisodeLog | None:
    """Where the decisions of a job are written down, if anywhere."""
    if logs is None:
        return None
    return EpisodeLog(DecisionLog(log_folder(logs, job.key)), policy, f"{job.origin.id} seed {job.task.seed}")


def summarise(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By policy: mean improvement over uniform in shares of the headroom, its interval, wins and losses."""
    improvements: dict[str, list[float]] = {}
    for row in rows:
        improvements.setdefault(row.policy, []).append(row.improvement)
    summary = {}
    for name, values in improvements.items():
        mean, low, high = mean_and_interval(values)
        summary[name] = {
            "tasks": len(values),
            "improvement": mean,
            "low": low,
            "high": high,
            "wins": int(sum(value > 0 for value in values)),
            "losses": int(sum(value < 0 for value in values)),
        }
    return summary


def run_attempts(
    episodes: StackedEpisodes,
    attempts: Sequence[Attempt],
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
        run = Rollout(episodes, [task for task, _ in batch], {slot: log for slot, log in given if log})
        rollout(run, partial(_decide, [policy for _, policy in batch]))
        losses += run.losses()
    return losses


def _decide(policies: Sequence[Policy], seen: Sequence[Observation]) -> list[Decision]:
    return [policy.decide(observation) for policy, observation in zip(policies, seen, strict=True)]


def first_observations(episodes: StackedEpisodes, tasks: Sequence[ProxyTask], slots: int) -> list[Observation]:
    """What a policy sees at the first decision of each task.

    Args:
        episodes: of the base of all tasks.
        tasks: of one batch shape.
        slots: how many are probed at once.
    """
    observations = []
    for batch in _batches(tasks, slots):
        episodes.start(batch)
        observations += [episodes.observe(slot) for slot in batch]
    return observations


def _batches(tasks: Sequence[ProxyTask], slots: int) -> Iterator[dict[int, ProxyTask]]:
    """Tasks by slot, so many at a time."""
    for start in range(0, len(tasks), slots):
        yield dict(enumerate(tasks[start : start + slots]))
