"""The decision log: what a policy saw, wanted and got, in files that any tool opens.

A log is a folder with a line of JSON for each decision (decisions.jsonl), and beside it the arrays of each
(decision-000000.safetensors and so on).

A decision's arrays are written first, under another name that is then changed, and its line last. So a crash leaves
whole decisions only, and at worst half of a last line, which is not read.

Example:
    >>> table = rankpilot.DecisionLog("run/decisions").to_pandas()  # doctest: +SKIP
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import Arrays, BoolArray, IntArray
from ..common.checks import finite, is_moderate
from ..common.files import MOST_LINES_BYTES, append_json_line, atomic_path, read_arrays, read_text, write_text
from ..cost.cost import check_cost, cost_from_state, cost_state
from ..cost.saver_prices import Saved
from ..errors import ConfigError, DataError, RunFolderError, first_line, shown
from ..lora.spec import RankLadder
from ..plan.plan import Plan
from ..plan.problem import AllocationProblem
from .choice import Choice, read_choice
from .observation import FEATURE_PREFIX, MODULE_FEATURES, RUN_FEATURES, RUN_PREFIX, Observation
from .policy import Decision, Policy, decision_line, keeps

if TYPE_CHECKING:
    from .applier import PlanApplier

logger = logging.getLogger(__name__)

SCHEMA = 7
"""Version of the files. Those up to 4 were of rankpilot 0.2, in Parquet."""

LINES, ARRAYS = "decisions.jsonl", "decision-*.safetensors"
"""Names of the files of a log, which may lie in a folder with others."""

CONTROL = "control.jsonl"
"""The file beside them of a run whose learning rate was controlled: a line for each action."""

POLICY = "policy"
"""The folder beside them with a copy of the policy that decided, if one was trained: its weights and its card."""

_METADATA = "rankpilot.features"

_TYPES: dict[tuple[type, ...], tuple[str, ...]] = {
    (str,): ("run", "policy", "unit"),
    (str, NoneType): ("policy_sha256",),
    (int,): ("decision", "step", "seed", "change"),
    (int, NoneType): ("max_step",),
    (int, float): ("limit", "predicted_cost", "hysteresis", "rank_floor", "depth_bias"),
    (int, float, NoneType): ("loss", "measured_cost"),
    (bool,): ("exact", "correction"),
    (dict,): ("ranks", "notes", "schedule", "cost"),
    (dict, NoneType): ("choice",),
    (list,): ("ladder",),
}
"""What a line holds, by its type. What it tells beside that follows from it."""

_OF_RUN = (
    "run", "policy", "policy_sha256", "step", "seed", "loss", "measured_cost", "predicted_cost", "correction",
)  # fmt: skip
"""Attributes of a record that its line has under the same name."""

_WANTED = ("rank_floor", "depth_bias", "change")
"""Attributes of a decision that its line has under the same name."""

_CHOICE = "choice."
"""How the names of arrays of a choice begin."""

_RANKS = ("rank_before", "rank_wanted", "rank_clipped", "rank_after", "max_ranks", "blocks")


@dataclass(frozen=True, eq=False)
class DecisionRecord:
    """One decision of a run; L modules.

    Attributes:
        run: name of the run.
        policy: name of the policy or rule that decided.
        policy_sha256: of the policy's weights; None for a rule, or for a policy that was not loaded from a folder.
        number: of the decision in its run, from 0.
        step: optimizer steps done before it.
        seed: of the run.
        loss: mean training loss since the decision before this one; None before the first step.
        measured_cost: measured since the decision before this one, in the unit of the problem; None if nothing measures
            it.
        observation: what the policy saw; its problem has the ranks in place.
        decision: what the policy wanted, with all that it computed.
        rank_clipped: the wanted ranks on the ladder and within the bounds, before the budget, int64 (L,). Where a
            person changed a rank, it is the person's.
        rank_after: ranks of the plan, int64 (L,).
        predicted_cost: predicted cost of the plan, in the unit of the problem.
        pinned: which modules kept their rank whatever was wanted, bool (L,); None for none.
        correction: whether the guard or a person changed the ranks, and not the policy.
        schedule: fields of the run's `DecisionSchedule`, by name.
        notes: why a module did not get the rank that the policy wanted, by name; the others are left out.
        saved: at the first decision of a run, what a step takes without exact savers and with them; else empty.
        rates: the peak of the learning rate for plain LoRA, and under the plan; None where nothing tells it.

    Raises:
        DataError: arrays disagree on the number of modules, a name is used twice, or a number is out of range.
    """

    run: str
    policy: str
    policy_sha256: str | None
    number: int
    step: int
    seed: int
    loss: float | None
    measured_cost: float | None
    observation: Observation
    decision: Decision
    rank_clipped: IntArray
    rank_after: IntArray
    predicted_cost: float
    pinned: BoolArray | None = None
    correction: bool = False
    schedule: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    saved: tuple[Saved, ...] = ()
    rates: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        applier: PlanApplier[Any],
        observation: Observation,
        decision: Decision,
        plan: Plan,
        *,
        policy: Policy,
        number: int,
        step: int,
        run: str = "",
        loss: float | None = None,
        measured_cost: float | None = None,
        notes: Mapping[str, str] | None = None,
        correction: bool = False,
        saved: tuple[Saved, ...] = (),
        rates: tuple[float, float] | None = None,
    ) -> DecisionRecord:
        """The record of a decision that has just been applied, in a fine-tune or in an episode.

        Args:
            applier: has applied it.
            observation: what the decision was made from.
            decision: what was wanted.
            plan: what was applied.
            policy: made the decision.
            number: of the decision in its run, from 0.
            step: optimizer steps done before it.
            run: name of the run.
            loss: mean training loss since the decision before this one.
            measured_cost: bytes at the highest peak since the decision before this one, or None.
            notes: by module name, beside those of the applier, whose modules are pinned.
            correction: whether the guard or a person changed the ranks, and not the policy.
            saved: what exact savers bring.
            rates: the peak of the learning rate for plain LoRA, and under the plan.
        """
        pinned = np.isin(observation.names, list(applier.notes))
        return cls(
            run=run,
            policy=policy.name,
            policy_sha256=getattr(policy, "sha256", None),  # of learned policies alone
            number=number,
            step=step,
            seed=applier.seed,
            loss=loss,
            measured_cost=measured_cost,
            observation=observation,
            decision=decision,
            rank_clipped=plan.clipped,
            rank_after=plan.ranks,
            predicted_cost=plan.cost,
            pinned=pinned if pinned.any() else None,
            correction=correction,
            schedule=asdict(applier.schedule),
            notes={**(notes or {}), **applier.notes},
            saved=saved,
            rates=rates,
        )

    def __post_init__(self) -> None:
        size = len(self.modules)
        if size == 0 or self.number < 0 or self.step < 0 or len(set(self.modules)) < size:
            raise DataError(
                "A decision has modules of different names, and a number and a step from 0 on; "
                f"got {size} modules, decision {self.number}, step {self.step}."
            )
        given = {
            "rank_before": self.rank_before,
            "rank_wanted": self.rank_wanted,
            "rank_clipped": self.rank_clipped,
            "rank_after": self.rank_after,
            "score": self.decision.scores,
        }
        for name, values in given.items():
            if np.shape(values) != (size,):
                raise DataError(f"`{name}` of decision {self.number} has shape {np.shape(values)}, not {(size,)}.")

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the modules, in the order of all arrays."""
        return self.observation.names

    @cached_property
    def problem(self) -> AllocationProblem:
        """The plans that were possible, with the pinned modules.

        `project` on it gives the logged ranks once more, but for those that a person changed.
        """
        return replace(self.observation.problem, pinned=self.pinned)

    @property
    def choice(self) -> Choice | None:
        """What the decision was chosen from; None where the policy expects nothing of plans."""
        return self.decision.choice

    @property
    def measures(self) -> bool:
        """Whether the ranks before it were there to measure alone: rank 1 everywhere, before the first step."""
        return self.step == 0 and bool((self.rank_before == 1).all())

    @property
    def rank_before(self) -> IntArray:
        """Ranks before the decision, int64 (L,)."""
        return self.observation.problem.ranks

    @property
    def rank_wanted(self) -> IntArray:
        """Ranks that the policy wanted, int64 (L,)."""
        return self.decision.ranks

    @property
    def kept(self) -> bool:
        """Whether the policy wanted the ranks in place."""
        return keeps(self.observation, self.decision)

    def plan(self) -> dict[str, int]:
        """The rank of each module after the decision, by its full name."""
        return dict(zip(self.modules, self.rank_after.tolist(), strict=True))

    def line(self) -> str:
        """The decision in one line, such as "step 28: 9 modules moved, 12.1 of 12.3 GiB, mean rank 9.4"."""
        problem = self.problem
        cost, unit = self.predicted_cost, problem.cost.unit
        return decision_line(self.step, problem.ranks, self.rank_after, cost, problem.limit, unit)

    def facts(self) -> dict[str, Any]:
        """What is known of the decision as a whole, by name: texts and numbers."""
        problem, decision, found = self.problem, self.decision, self.choice
        return {
            "decision": self.number,
            **{name: getattr(self, name) for name in _OF_RUN},
            "limit": problem.limit,
            "unit": problem.cost.unit,
            "max_step": problem.max_step,
            "hysteresis": problem.hysteresis,
            **{name: getattr(decision, name) for name in _WANTED},
            "expected": found and float(found.expected[found.taken]),
            "spread": found and float(found.spread[found.taken]),
            "kept": self.kept,
            "filled": int(np.count_nonzero(self.rank_after > self.rank_clipped)),
        }

    def columns(self) -> dict[str, Any]:
        """What is known of each module, by name, (L,) each; features begin with "feature."."""
        problem = self.problem
        features = dict(zip(MODULE_FEATURES, self.observation.modules.T, strict=True))
        return {
            "module_index": range(len(self.modules)),
            "module": self.modules,
            "block": problem.blocks,
            "pinned": problem.is_pinned,
            "rank_before": self.rank_before,
            "rank_wanted": self.rank_wanted,
            "rank_clipped": self.rank_clipped,
            "rank_after": self.rank_after,
            "score": self.decision.scores,
            "changed_by_projection": self.rank_clipped != self.rank_after,
            "note": [self.notes.get(name) for name in self.modules],
            **{FEATURE_PREFIX + name: values for name, values in features.items()},
        }


class DecisionLog:
    """Writer and reader of one decision log.

    Args:
        folder: where the files are; made by `make_folder` or the first `append`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder: Path = Path(folder)

    def __len__(self) -> int:
        """How many decisions are logged.

        Raises:
            RunFolderError: the log is of rankpilot 0.2, or a line is none of a log.
        """
        return len(self._lines())

    def make_folder(self) -> None:
        """Make the folder now, and not after minutes of work.

        Raises:
            RunFolderError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"The decision log cannot be written to {self.folder}: {first_line(error)}. Pass another folder as "
                "`log`, or make that one writable."
            ) from error

    def put_aside(self) -> Path | None:
        """Move what an earlier run has logged into a folder beside this one, since another run begins.

        Returns:
            That folder, `decisions-1` or the next number that is free; None if nothing is logged.

        Raises:
            RunFolderError: it cannot be made.
        """
        if not (self.folder / LINES).is_file():
            return None
        numbered = (self.folder.with_name(f"{self.folder.name}-{number}") for number in count(1))
        aside = DecisionLog(next(folder for folder in numbered if not folder.exists()))
        aside.make_folder()
        for path in [path for name in (LINES, ARRAYS, CONTROL, POLICY) for path in self.folder.glob(name)]:
            shutil.move(path, aside.folder / path.name)
        return aside.folder

    def append(self, record: DecisionRecord) -> None:
        """Write one decision, whole or not at all.

        Raises:
            RunFolderError: that decision is logged already; a resumed run calls `truncate` first.
        """
        path = self._arrays(record.number)
        if path.exists():
            raise RunFolderError(f"Decision {record.number} is already in {self.folder}. Call `truncate` on resume.")
        from safetensors.numpy import save  # late: a Trainer does not load it

        arrays = {name: np.ascontiguousarray(array) for name, array in _arrays_of(record).items()}
        described = {_METADATA: json.dumps([MODULE_FEATURES, RUN_FEATURES])}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            stream.write(save(arrays, described))
            stream.flush()
            os.fsync(stream.fileno())
        append_json_line(self.folder / LINES, _line_of(record))

    def read(self) -> list[DecisionRecord]:
        """All decisions, in their order.

        Raises:
            RunFolderError: there is no log, it is of rankpilot 0.2, or a file of it is damaged.
        """
        lines = self._lines()
        if not lines:
            raise RunFolderError(f"No decision log in {self.folder}: there is no decision in {LINES}.")
        return [self._record(line) for line in lines]

    def logged(self, number: int) -> DecisionRecord:
        """One decision by its number, from 0 on.

        Raises:
            RunFolderError: there is no such decision, the log is of rankpilot 0.2, or a file of it is damaged.
        """
        lines = self._lines()
        found = [line for line in lines if line["decision"] == number]
        if not found:
            raise RunFolderError(f"No decision {number} in {self.folder}: it holds {len(lines)} decisions.")
        return self._record(found[0])

    def to_pandas(self) -> Any:
        """The log as a pandas DataFrame with a row for each module of each decision.

        Columns are those of `DecisionRecord.facts` and `DecisionRecord.columns`, and the features of the run, whose
        names begin with "run.".

        Raises:
            ConfigError: pandas is not installed.
            RunFolderError: there is no log, it is of rankpilot 0.2, or a file of it is damaged.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("A table of a decision log needs pandas: pip install pandas.") from error
        columns: dict[str, list[Any]] = {}
        for record in self.read():
            run = zip(RUN_FEATURES, record.observation.run.tolist(), strict=True)
            constant = record.facts() | {RUN_PREFIX + name: value for name, value in run}
            repeated = {name: [value] * len(record.modules) for name, value in constant.items()}
            for name, values in (repeated | record.columns()).items():
                columns.setdefault(name, []).extend(values)
        return pandas.DataFrame(columns)

    def truncate(self, keep: int) -> int:
        """Drop the decisions that followed a checkpoint: a run that resumes there takes them again.

        Args:
            keep: how many decisions had been taken at the checkpoint.

        Returns:
            How many decisions were dropped.
        """
        if not self.folder.is_dir():
            return 0
        lines = self._lines() if (self.folder / LINES).is_file() else []
        kept = [line for line in lines if line["decision"] < keep]
        if kept:
            write_text(self.folder / LINES, "".join(json.dumps(line) + "\n" for line in kept))
        else:
            (self.folder / LINES).unlink(missing_ok=True)
        needed = {self._arrays(line["decision"]).name for line in kept}
        for path in self.folder.glob(ARRAYS):
            if path.name not in needed:
                path.unlink()
        return len(lines) - len(kept)

    def _arrays(self, number: int) -> Path:
        return self.folder / f"decision-{number:06d}.safetensors"

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of all decisions, by their numbers."""
        path = self.folder / LINES
        if not path.is_file():
            if any(self.folder.glob("part-*.parquet")):
                raise RunFolderError(
                    f"{self.folder} is a decision log of rankpilot 0.2 (Parquet), which this version does not read. "
                    "Study it with that version, or make the run again."
                )
            return []
        try:
            text = read_text(path, MOST_LINES_BYTES)
        except (DataError, OSError) as error:
            raise RunFolderError(f"The decision log {path} cannot be read: {error}") from error
        lines = []
        for place, row in enumerate(text.splitlines(), 1):
            try:
                line = json.loads(row)
            except (ValueError, RecursionError):
                logger.warning(
                    "Line %d of %s is no whole line of JSON, as after a crash, and is left out.", place, path
                )
                continue
            _check_line(line, f"Line {place} of {path}")
            lines.append(line)
        return sorted(lines, key=lambda line: int(line["decision"]))

    def _record(self, line: Mapping[str, Any]) -> DecisionRecord:
        path = self._arrays(line["decision"])
        try:
            arrays, described = read_arrays(path)
            names = json.dumps([MODULE_FEATURES, RUN_FEATURES])
            if described.get(_METADATA) != names:
                raise ValueError("its policy saw other features than those of this version")
            return _record_of(line, arrays)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise RunFolderError(f"{path} is missing, damaged or of another decision: {first_line(error)}") from error


def _line_of(record: DecisionRecord) -> dict[str, Any]:
    """All of a decision that is no array, as JSON values."""
    problem, found = record.problem, record.choice
    return {
        "schema": SCHEMA,
        "sentence": record.line(),
        **record.facts(),
        "exact": record.decision.exact,
        "ranks": record.plan(),
        "notes": dict(record.notes),
        "schedule": dict(record.schedule),
        "ladder": list(problem.ladder.ranks),
        "saved": [asdict(each) for each in record.saved],
        "rates": record.rates and list(record.rates),
        "cost": {name: value for name, value in cost_state(problem.cost).items() if not isinstance(value, np.ndarray)},
        "choice": found and {name: value for name, value in asdict(found).items() if not isinstance(value, np.ndarray)},
    }


def _arrays_of(record: DecisionRecord) -> Arrays:
    """All arrays of a decision, by name."""
    problem, observation, found = record.problem, record.observation, record.choice
    arrays: dict[str, Any] = {
        "features": observation.modules,
        "run_features": observation.run,
        "score": record.decision.scores,
        "rank_before": record.rank_before,
        "rank_wanted": record.rank_wanted,
        "rank_clipped": record.rank_clipped,
        "rank_after": record.rank_after,
        "pinned": record.pinned,
        "max_ranks": problem.max_ranks,
        "blocks": problem.blocks,
        "low": problem.low,
        "high": problem.high,
    }
    arrays |= {f"cost.{name}": value for name, value in cost_state(problem.cost).items()}
    computed = {} if found is None else {each.name: getattr(found, each.name) for each in fields(found)}
    arrays |= {f"{_CHOICE}{name}": value for name, value in computed.items()}
    arrays |= {name: np.asarray(arrays[name], dtype=np.int64) for name in _RANKS}
    if found is not None:
        arrays[f"{_CHOICE}plans"] = found.plans.astype(np.uint16)  # which holds ranks exactly
    return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}


def _check_line(line: Any, where: str) -> None:
    """Refuse a line that is none of a decision log of this schema."""
    if not isinstance(line, dict) or line.get("schema") != SCHEMA:
        version = line.get("schema") if isinstance(line, dict) else None
        raise RunFolderError(
            f"{where} is no decision of log schema {SCHEMA}: its schema is {shown(version)}. Read it with the version "
            "of rankpilot that wrote it."
        )
    for kinds, names in _TYPES.items():
        for name in names:
            if name not in line or type(line[name]) not in kinds or not is_moderate(line[name]):
                value = shown(line[name]) if name in line else "missing"
                raise RunFolderError(f"{where} is damaged: {name} is {value}.")


def _record_of(line: Mapping[str, Any], arrays: Arrays) -> DecisionRecord:
    """The decision of a line and its arrays.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, OverflowError: they are not of one decision.
    """
    names = tuple(line["ranks"])
    size = len(names)
    for name in _RANKS:
        if arrays[name].shape != (size,) or arrays[name].dtype != np.int64 or arrays[name].min() < 0:
            raise ValueError(f"{name} holds no whole number from 0 on for each of {size} modules")
    for name, shape in (("features", (size, len(MODULE_FEATURES))), ("run_features", (len(RUN_FEATURES),))):
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            raise ValueError(f"{name} has shape {arrays[name].shape} and type {arrays[name].dtype}")
    cost = cost_from_state({**line["cost"], **_part(arrays, "cost.")})
    check_cost(cost, size)
    problem = AllocationProblem(
        ranks=arrays["rank_before"],
        max_ranks=arrays["max_ranks"],
        blocks=arrays["blocks"],
        cost=cost,
        limit=float(line["limit"]),
        ladder=RankLadder(tuple(line["ladder"])),
        max_step=line["max_step"],
        low=arrays.get("low"),
        high=arrays.get("high"),
        hysteresis=float(line["hysteresis"]),
    )
    decision = Decision(
        ranks=arrays["rank_wanted"],
        scores=arrays["score"],
        exact=line["exact"],
        choice=read_choice(line["choice"], _part(arrays, _CHOICE), size),
        **{name: line[name] for name in _WANTED},
    )
    return DecisionRecord(
        number=line["decision"],
        observation=Observation(arrays["features"], arrays["run_features"], problem, names),
        decision=decision,
        rank_clipped=arrays["rank_clipped"],
        rank_after=arrays["rank_after"],
        pinned=arrays.get("pinned"),
        saved=tuple(Saved.of_state(each) for each in line.get("saved", [])),  # earlier logs have none, nor rates
        rates=_rates_of(line.get("rates")),
        **{name: line[name] for name in (*_OF_RUN, "schedule", "notes")},
    )


def _rates_of(given: Any) -> tuple[float, float] | None:
    """The rates of a line; TypeError or ValueError if they are something else."""
    if given is None:
        return None
    plain, of_plan = map(finite, given)
    return plain, of_plan


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
