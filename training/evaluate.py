"""What `rankpilot evaluate` does: competitors by name, the run's folder, rows and summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..agents.learned.policy import exploring
from ..agents.learned.policy_file import load_policy, policy_folder, policy_schedule, read_card
from ..agents.rules import RULES
from ..agents.schedule import DecisionSchedule
from ..common.files import as_plain, read_object, write_json
from ..common.run_folder import CONFIG, open_run
from ..common.settings import as_json, from_json
from ..common.workers import count_workers
from ..env.proxy_finetune import check_texts
from ..env.proxy_task import ProxyTask
from ..env.suites import evenly, find_tasks
from ..errors import ConfigError, RunFolderError, UnknownNameError
from .compare import SHUFFLED, STATIC, Competitor, Oracle, Replayed, compare
from .config import EvaluateConfig
from .results import Group, groups_of, read_rows, write_rows

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
