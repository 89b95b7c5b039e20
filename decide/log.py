"""The decision log: observations, decisions and resulting plans, in standard file formats.

A log is a folder with one line of JSON per decision (decisions.jsonl), and the arrays of each decision alongside it
(decision-000000.safetensors and so on).

A decision's arrays are written first, to a temporary name that is then renamed, and its line last. After a crash, the
log therefore holds only complete decisions, plus at worst a partial last line, ignored on reading.

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
from ..common.errors import ConfigError, DataError, RunFolderError, first_line, shown
from ..common.files import MOST_LINES_BYTES, append_json_line, atomic_path, read_arrays, read_text, write_text
from ..cost.cost import check_cost, cost_from_state, cost_state
from ..cost.savers.prices import Saved
from ..cost.step_time import PlanSeconds
from ..lora.spec import RankLadder
from .choice import Choice, read_choice
from .observation import FEATURE_PREFIX, MODULE_FEATURES, RUN_FEATURES, RUN_PREFIX, Observation
from .plan.plan import Plan
from .plan.problem import AllocationProblem
from .policy import Decision, Policy, decision_line, keeps

if TYPE_CHECKING:
    from .applier import PlanApplier

logger = logging.getLogger(__name__)

SCHEMA = 7
"""Version of the files. Versions up to 4 are from rankpilot 0.2, in Parquet."""

LINES, ARRAYS = "decisions.jsonl", "decision-*.safetensors"
"""File names of a log; its folder may contain other files."""

CONTROL = "control.jsonl"
"""Log of learning-rate control, in the same folder: one line per action."""

POLICY = "policy"
"""Subfolder with a copy of the trained policy, if any: its weights and its card."""

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
"""Fields of a line, by type. Everything else is derived from them."""

_OF_RUN = (
    "run", "policy", "policy_sha256", "step", "seed", "loss", "measured_cost", "predicted_cost", "correction",
)  # fmt: skip
"""Attributes of a record stored in its line under the same name."""

_WANTED = ("rank_floor", "depth_bias", "change")
"""Attributes of a decision stored in its line under the same name."""

_CHOICE, _TIME = "choice.", "time."
"""Prefix of the arrays of a choice."""

_PLANS = ("rank_before", "rank_wanted", "rank_clipped", "rank_after")
_RANKS = (*_PLANS, "max_ranks", "blocks")


@dataclass(frozen=True, eq=False)
class DecisionRecord:
    """One decision of a run; L modules.

    Attributes:
        run: name of the run.
        policy: name of the policy or rule.
        policy_sha256: hash of the policy's weights; None for a rule, or for a policy not loaded from a folder.
        number: index of the decision in its run, from 0.
        step: optimizer steps done before it.
        seed: seed of the run.
        loss: mean training loss since the previous decision; None before the first step.
        measured_cost: cost measured since the previous decision, in the unit of the problem; None if not measured.
        observation: observation of the policy; its problem holds the current ranks.
        decision: output of the policy, with all intermediate values.
        rank_clipped: wanted ranks on the ladder and within the bounds, before the budget, int64 (L,). Includes ranks
            changed by a person.
        rank_after: ranks of the plan, int64 (L,).
        predicted_cost: predicted cost of the plan, in the unit of the problem.
        pinned: mask of modules that keep their rank regardless of the decision, bool (L,); None for none.
        correction: True if the guard or a person changed the ranks instead of the policy.
        schedule: fields of the run's `DecisionSchedule`, by name.
        notes: reason a module did not get the wanted rank, by name; other modules are omitted.
        saved: at a run's first decision, the cost of a step without exact savers and with them; else empty.
        rates: peak learning rate for plain LoRA, and under the plan; None if unknown.

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
        """Build the record of a decision just applied, in a fine-tune or an episode.

        Args:
            applier: applier of the decision.
            observation: input of the decision.
            decision: the wanted ranks.
            plan: the applied plan.
            policy: policy behind the decision.
            number: index of the decision in its run, from 0.
            step: optimizer steps done before it.
            run: name of the run.
            loss: mean training loss since the previous decision.
            measured_cost: peak bytes since the previous decision, or None.
            notes: notes by module name, in addition to those of the applier, whose modules are pinned.
            correction: True if the guard or a person changed the ranks instead of the policy.
            saved: savings from exact savers.
            rates: peak learning rate for plain LoRA, and under the plan.
        """
        pinned = np.isin(observation.names, list(applier.notes))
        sha256 = getattr(policy, "sha256", None)  # learned policies only
        return cls(
            run=run, policy=policy.name, policy_sha256=sha256, number=number, step=step, seed=applier.seed, loss=loss,
            measured_cost=measured_cost, observation=observation, decision=decision, rank_clipped=plan.clipped,
            rank_after=plan.ranks, predicted_cost=plan.cost, pinned=pinned if pinned.any() else None,
            correction=correction, schedule=asdict(applier.clock.schedule),
            notes={**(notes or {}), **applier.notes}, saved=saved, rates=rates,
        )  # fmt: skip

    def __post_init__(self) -> None:
        size = len(self.modules)
        if size == 0 or self.number < 0 or self.step < 0 or len(set(self.modules)) < size:
            raise DataError(
                f"A decision needs distinct module names, and a number and a step of at least 0; got {size} "
                f"modules, decision {self.number}, step {self.step}."
            )
        for name, values in (self._plans() | {"score": self.decision.scores}).items():
            if np.shape(values) != (size,):
                raise DataError(f"`{name}` of decision {self.number} has shape {np.shape(values)}, not {(size,)}.")

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the modules, in the order of all arrays."""
        return self.observation.names

    @cached_property
    def problem(self) -> AllocationProblem:
        """The plans allowed at the decision, with the pinned modules.

        `project` on it reproduces the logged ranks, except for those changed by a person.
        """
        return replace(self.observation.problem, pinned=self.pinned)

    @property
    def choice(self) -> Choice | None:
        """Choice behind the decision; None if the policy predicts nothing about plans."""
        return self.decision.choice

    @property
    def measures(self) -> bool:
        """True if the earlier ranks served only for measuring: rank 1 everywhere, before the first step."""
        return self.step == 0 and bool((self.rank_before == 1).all())

    @property
    def rank_before(self) -> IntArray:
        """Ranks before the decision, int64 (L,)."""
        return self.observation.problem.ranks

    @property
    def rank_wanted(self) -> IntArray:
        """Ranks wanted by the policy, int64 (L,)."""
        return self.decision.ranks

    @property
    def kept(self) -> bool:
        """True if the policy wanted to keep the current ranks."""
        return keeps(self.observation, self.decision)

    def _plans(self) -> dict[str, IntArray]:
        return {name: getattr(self, name) for name in _PLANS}

    def plan(self) -> dict[str, int]:
        """Rank of each module after the decision, by full name."""
        return dict(zip(self.modules, self.rank_after.tolist(), strict=True))

    def line(self) -> str:
        """One-line summary, such as "step 28: 9 modules moved, 12.1 of 12.3 GiB, mean rank 9.4"."""
        limit, unit = self.problem.limit, self.problem.cost.unit
        return decision_line(self.step, self.rank_before, self.rank_after, self.predicted_cost, limit, unit)

    def facts(self) -> dict[str, Any]:
        """Decision-level values by name: texts and numbers."""
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
        """Module-level values by name, (L,) each; features are prefixed with "feature."."""
        problem = self.problem
        features = dict(zip(MODULE_FEATURES, self.observation.modules.T, strict=True))
        return {
            "module_index": range(len(self.modules)),
            "module": self.modules,
            "block": problem.blocks,
            "pinned": problem.is_pinned,
            **self._plans(),
            "score": self.decision.scores,
            "changed_by_projection": self.rank_clipped != self.rank_after,
            "note": [self.notes.get(name) for name in self.modules],
            **{FEATURE_PREFIX + name: values for name, values in features.items()},
        }


class DecisionLog:
    """Writer and reader of one decision log.

    Args:
        folder: folder of the files; created by `make_folder` or the first `append`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder: Path = Path(folder)

    def __len__(self) -> int:
        """Number of logged decisions.

        Raises:
            RunFolderError: the log is from rankpilot 0.2, or has an invalid line.
        """
        return len(self._lines())

    def make_folder(self) -> None:
        """Create the folder now, to fail early.

        Raises:
            RunFolderError: it cannot be created.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"Cannot write the decision log to {self.folder}: {first_line(error)}. Pass another folder as "
                "`log`, or make that one writable."
            ) from error

    def put_aside(self) -> Path | None:
        """Move the log of an earlier run to a sibling folder, to make room for a new run.

        Returns:
            That folder, `decisions-1` or the next free number; None if nothing is logged.

        Raises:
            RunFolderError: it cannot be created.
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
        """Append one decision atomically.

        Raises:
            RunFolderError: the decision is already logged; a resumed run calls `truncate` first.
        """
        number, path = record.number, self._arrays(record.number)
        if path.exists():
            raise RunFolderError(f"Decision {number} is already in {self.folder}. Call `truncate` when resuming.")
        from safetensors.numpy import save  # late: not needed by a Trainer

        arrays = {name: np.ascontiguousarray(array) for name, array in _arrays_of(record).items()}
        described = {_METADATA: json.dumps([MODULE_FEATURES, RUN_FEATURES])}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            stream.write(save(arrays, described))
            stream.flush()
            os.fsync(stream.fileno())
        append_json_line(self.folder / LINES, _line_of(record))

    def read(self) -> list[DecisionRecord]:
        """Read all decisions in order.

        Raises:
            RunFolderError: there is no log, it is from rankpilot 0.2, or one of its files is damaged.
        """
        lines = self._lines()
        if not lines:
            raise RunFolderError(f"No decision log in {self.folder}: {LINES} has no decisions.")
        return [self._record(line) for line in lines]

    def logged(self, number: int) -> DecisionRecord:
        """Read one decision by its number, from 0.

        Raises:
            RunFolderError: there is no such decision, the log is from rankpilot 0.2, or one of its files is damaged.
        """
        lines = self._lines()
        for line in lines:
            if line["decision"] == number:
                return self._record(line)
        raise RunFolderError(f"No decision {number} in {self.folder}, which has {len(lines)} decisions.")

    def to_pandas(self) -> Any:
        """Return the log as a pandas DataFrame with one row per module and decision.

        Columns are those of `DecisionRecord.facts` and `DecisionRecord.columns`, and the features of the run, prefixed
        with
        "run.".

        Raises:
            ConfigError: pandas is not installed.
            RunFolderError: there is no log, it is from rankpilot 0.2, or one of its files is damaged.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("Reading a decision log as a table requires pandas: pip install pandas.") from error
        columns: dict[str, list[Any]] = {}
        for record in self.read():
            run = zip(RUN_FEATURES, record.observation.run.tolist(), strict=True)
            constant = record.facts() | {RUN_PREFIX + name: value for name, value in run}
            repeated = {name: [value] * len(record.modules) for name, value in constant.items()}
            for name, values in (repeated | record.columns()).items():
                columns.setdefault(name, []).extend(values)
        return pandas.DataFrame(columns)

    def truncate(self, keep: int) -> int:
        """Drop the decisions after a checkpoint: a run resumed from it takes them again.

        Args:
            keep: number of decisions taken before the checkpoint.

        Returns:
            Number of decisions dropped.
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
        """Lines of all decisions, in order."""
        path = self.folder / LINES
        if not path.is_file():
            if any(self.folder.glob("part-*.parquet")):
                raise RunFolderError(
                    f"{self.folder} is a decision log of rankpilot 0.2 (Parquet), which this version cannot read. "
                    "Study it with that version, or repeat the run."
                )
            return []
        try:
            text = read_text(path, MOST_LINES_BYTES)
        except (DataError, OSError) as error:
            raise RunFolderError(f"Cannot read the decision log {path}: {error}") from error
        lines = []
        for place, row in enumerate(text.splitlines(), 1):
            try:
                line = json.loads(row)
            except (ValueError, RecursionError):
                logger.warning("Line %d of %s is incomplete, probably after a crash, and was skipped.", place, path)
                continue
            _check_line(line, f"Line {place} of {path}")
            lines.append(line)
        return sorted(lines, key=lambda line: int(line["decision"]))

    def _record(self, line: Mapping[str, Any]) -> DecisionRecord:
        path = self._arrays(line["decision"])
        try:
            arrays, described = read_arrays(path)
            if described.get(_METADATA) != json.dumps([MODULE_FEATURES, RUN_FEATURES]):
                raise ValueError("its policy used other features than this version's")
            return _record_of(line, arrays)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise RunFolderError(f"{path} is missing, corrupt or of another decision: {first_line(error)}") from error


def _line_of(record: DecisionRecord) -> dict[str, Any]:
    """Non-array fields of a decision, as JSON values."""
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
    """Arrays of a decision, by name."""
    problem, observation, found = record.problem, record.observation, record.choice
    arrays: dict[str, Any] = {
        "features": observation.modules,
        "run_features": observation.run,
        "score": record.decision.scores,
        **record._plans(),
        "pinned": record.pinned,
        "max_ranks": problem.max_ranks,
        "blocks": problem.blocks,
        "low": problem.low,
        "high": problem.high,
    }
    arrays |= {f"cost.{name}": value for name, value in cost_state(problem.cost).items()}
    if problem.time:
        arrays |= {f"{_TIME}{name}": np.asarray(value) for name, value in vars(problem.time).items()}
    computed = {} if found is None else {each.name: getattr(found, each.name) for each in fields(found)}
    arrays |= {f"{_CHOICE}{name}": value for name, value in computed.items()}
    arrays |= {name: np.asarray(arrays[name], dtype=np.int64) for name in _RANKS}
    if found is not None:
        arrays[f"{_CHOICE}plans"] = found.plans.astype(np.uint16)  # represents all ranks exactly
    return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}


def _check_line(line: Any, where: str) -> None:
    """Raise an error if a line does not belong to a decision log of this schema."""
    version = line.get("schema") if isinstance(line, dict) else None
    if version != SCHEMA:
        raise RunFolderError(
            f"{where} is not a decision of log schema {SCHEMA}, but of {shown(version)}. Read it with the "
            "version of rankpilot that wrote it."
        )
    for kinds, names in _TYPES.items():
        for name in names:
            if name not in line or type(line[name]) not in kinds or not is_moderate(line[name]):
                value = shown(line[name]) if name in line else "missing"
                raise RunFolderError(f"{where} is corrupt: {name} is {value}.")


def _record_of(line: Mapping[str, Any], arrays: Arrays) -> DecisionRecord:
    """Build a decision from its line and arrays.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, OverflowError: they do not form one decision.
    """
    names = tuple(line["ranks"])
    size = len(names)
    for name in _RANKS:
        if arrays[name].shape != (size,) or arrays[name].dtype != np.int64 or arrays[name].min() < 0:
            raise ValueError(f"{name} is not a whole number of at least 0 for each of {size} modules")
    for name, shape in (("features", (size, len(MODULE_FEATURES))), ("run_features", (len(RUN_FEATURES),))):
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            raise ValueError(f"{name} has shape {arrays[name].shape} and type {arrays[name].dtype}")
    cost = cost_from_state({**line["cost"], **_part(arrays, "cost.")})
    check_cost(cost, size)
    seconds = _part(arrays, _TIME)
    problem = AllocationProblem(
        ranks=arrays["rank_before"], max_ranks=arrays["max_ranks"], blocks=arrays["blocks"], cost=cost,
        limit=float(line["limit"]), ladder=RankLadder(tuple(line["ladder"])), max_step=line["max_step"],
        low=arrays.get("low"), high=arrays.get("high"), hysteresis=float(line["hysteresis"]),
        time=PlanSeconds.from_state(seconds, size) if seconds else None,
    )  # fmt: skip
    choice = read_choice(line["choice"], _part(arrays, _CHOICE), size)
    decision = Decision(
        ranks=arrays["rank_wanted"], scores=arrays["score"], exact=line["exact"], choice=choice,
        **{name: line[name] for name in _WANTED},
    )  # fmt: skip
    saved = tuple(Saved.of_state(each) for each in line.get("saved", []))  # older logs have neither these nor rates
    return DecisionRecord(
        number=line["decision"], decision=decision, saved=saved, rates=_rates_of(line.get("rates")),
        observation=Observation(arrays["features"], arrays["run_features"], problem, names),
        rank_clipped=arrays["rank_clipped"], rank_after=arrays["rank_after"], pinned=arrays.get("pinned"),
        **{name: line[name] for name in (*_OF_RUN, "schedule", "notes")},
    )  # fmt: skip


def _rates_of(given: Any) -> tuple[float, float] | None:
    """Rates of a line; raises TypeError or ValueError if invalid."""
    if given is None:
        return None
    plain, of_plan = map(finite, given)
    return plain, of_plan


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
