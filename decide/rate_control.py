"""Learning-rate control during a run: correct the rate at a few moments, and undo damage.

A single run can reveal if its learning rate is right. The key signal is the *alignment*: the cosine between the last
optimizer step and the next descent direction (hypergradient descent moves the rate along it: Baydin et al., 2018, arXiv
1703.04782). If the rate is too low, each step continues in the direction of the last one; if it is too high, each step
partly reverses the last one. The alignment is averaged over some steps and read together with the loss, and the control
answers with one of a few `CHANGES` of the rate. Adapters are small, so a copy from before any damage is kept: `UNDO`
restores it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..common.arrays import FloatArray

SHARES = (0.02, 0.04, 0.07, 0.11, 0.17, 0.25, 0.35, 0.5)
"""Moments of control, as shares of the run's steps. Later changes risk more than they gain."""

LEAST_WINDOW = 5
"""Minimum optimizer steps between two decisions."""

SHORTEST = 60
"""Shorter runs are not controlled: their first decisions would have too little data."""

CHANGES = (0.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, -2.0)
"""Change of log2 of the rate by each action. The last action also restores the saved copy."""

KEEP, UNDO = 0, len(CHANGES) - 1
"""The no-op action, and the action to restore the copy."""

HALVED, DOUBLED = CHANGES.index(-1.0), CHANGES.index(1.0)
"""The actions to halve and to double the rate."""

PATIENCE = 3
"""Consecutive rollbacks for non-finite values before the copy is considered useless."""

SCALES = {
    "alignment": 4.0, "alignment over the first": 1.0, "spread of the alignment": 4.0, "evidence": 0.25, "loss": 2.0,
    "change of loss": 4.0, "above the best": 4.0, "noise": 4.0, "moved": 1 / 3, "time": 1.0, "steps": 0.25,
    "schedule": 1.0, "warm-up": 1.0, "undone": 1.0,
}  # fmt: skip
"""Factor that brings each feature of a control to about 1; `FineTuneEnv` says what each one measures."""

FEATURES = tuple(SCALES)
"""Observation of a control: scaled features, each from -`MOST_FEATURE` to `MOST_FEATURE`."""

MOST_FEATURE = 3.0

LEAST_RAISE = 0.25
"""Minimum raise of log2 of the rate, beyond the remaining warm-up; smaller raises are dropped."""

FIRST = 2
"""Steps averaged for the initial loss: by the second one the model has hardly changed."""

FIRST_ALIGNMENTS, LEAST_FIRST = 5, 0.02
"""Number of first alignments averaged as the reference for later ones, and its lower bound."""


def decision_steps(total_steps: int) -> tuple[int, ...]:
    """Return the optimizer steps before which a run is controlled; none for a short run."""
    if total_steps < SHORTEST:
        return ()
    found: list[int] = []
    for share in SHARES:
        found.append(max(round(share * total_steps), (found[-1] if found else 0) + LEAST_WINDOW))
    return tuple(found)


@dataclass
class RunRecord:
    """History of a run.

    Attributes:
        total_steps: total steps of the run.
        losses: losses of the steps since the last decision.
        alignments: alignments of the same steps.
        moved: log2 of the rate relative to its initial value.
        changed: True once an action has moved the rate.
        step: optimizer steps done.
    """

    total_steps: int
    losses: list[float] = field(default_factory=list)
    alignments: list[float] = field(default_factory=list)
    moved: float = 0.0
    changed: bool = False
    step: int = 0
    _first: list[float] = field(default_factory=list)
    _first_alignments: list[float] = field(default_factory=list)
    _means: list[float] = field(default_factory=list)
    _undone: bool = False
    _schedule: float = 0.0
    _now: float = 0.0

    def add(self, loss: float, alignment: float) -> None:
        """Record a finished step.

        Args:
            loss: loss of its batch, before the step.
            alignment: alignment of the previous step with this step's gradient; NaN if there is none.
        """
        self.step += 1
        loss = max(float(np.nan_to_num(loss, nan=1e6, posinf=1e6)), 1e-6)  # keeps its logarithm finite
        self._first = [*self._first, loss][:FIRST]
        self.losses.append(loss)
        if math.isfinite(alignment):
            self.alignments.append(alignment)
            self._first_alignments = [*self._first_alignments, alignment][:FIRST_ALIGNMENTS]

    def observe(self, schedule: float) -> FloatArray:
        """Return the current `FEATURES`, float64 (len(FEATURES),).

        Args:
            schedule: the schedule's current rate, as a share of its peak.
        """
        losses, aligned = np.log(self.losses), np.array(self.alignments or [0.0])
        mean, first = float(losses.mean()), math.log(np.mean(self._first))
        error, means = float(aligned.std()) / math.sqrt(len(aligned)) + 1e-3, [first, *self._means]
        values = (
            aligned.mean(),
            aligned.mean() / max(float(np.mean(self._first_alignments or [0.0])), LEAST_FIRST),
            aligned.std(),
            aligned.mean() / error if len(aligned) > 1 else 0.0,  # no error estimate from a single one
            mean - first,
            mean - means[-1],
            mean - min(means),
            losses.std(),
            self.moved,
            self.step / self.total_steps,
            math.log2(max(self.step, 1) / 5),
            schedule,
            float(schedule > self._schedule),
            float(self._undone),
        )
        self._now = schedule
        scaled = np.array(values) * list(SCALES.values())
        return np.asarray(np.clip(scaled, -MOST_FEATURE, MOST_FEATURE))

    @property
    def loss_error(self) -> float:
        """Standard error of the mean log loss since the last decision; 0 without steps."""
        return float(np.std(np.log(self.losses)) / math.sqrt(len(self.losses))) if self.losses else 0.0

    def take(self, action: int, *, undone: bool = False) -> None:
        """Record an action and start a new window; `UNDO` goes back, other actions only if the run was `undone`."""
        self.moved += CHANGES[action]
        self.changed |= action != KEEP
        back = undone or action == UNDO
        self._undone |= back
        if not back:
            self._means.append(math.log(np.mean(self.losses)))
        self._schedule, self.losses, self.alignments = self._now, [], []


class RateControl(Protocol):
    """Protocol for choosing an action for each run."""

    def act(self, observations: FloatArray) -> Sequence[int]:
        """Return one action per run.

        Args:
            observations: (runs, len(FEATURES)).
        """


@dataclass(frozen=True)
class AlignmentRule:
    """Raise the rate while steps keep their direction, and lower it when they reverse it.

    Rule-of-thumb rates are ignored: alignments are reliable even on models where such rules fail.

    Attributes:
        raise_above: minimum mean alignment for a raise, as a share of that of the first steps. The share is about a
            tenth at the best rate, a half at half of it, and nearly 1 below a third of it.
        raise_evidence: minimum mean alignment for a raise, in standard errors above 0.
        surely_above: after the warm-up, raise by the least amount from this share on, if the evidence is
            strong: half of the best rate may look like this.
        surely_evidence: minimum evidence for such a raise, in standard errors above 0.
        least_alignment: minimum mean alignment, a cosine, for a raise.
        lower_evidence: minimum evidence for lowering, in standard errors below 0. A rate too high costs more than one
            too low.
        lower_product: minimum of that evidence times the share for lowering.
        gains: log2 change of the rate per unit of the share, for raises and cuts. A raise is at most twofold, a cut at
            most to a quarter.
        back_below: undo if the mean alignment is surely below this share of that of the first steps, early in the run
            and before any cut. Steps at a rate four times too high are worth less than repeating them.
        back_product: minimum of its standard errors times the share for such an undo: right rates reach 0.65 by
            chance, rates four times too high 0.74 and more.
        back_until: share of the run considered early.
        undo_threshold: undo if log(loss / initial loss) exceeds this and the alignment is negative.
        undo_noise: increase of that threshold per standard deviation of the log loss.
        first_raise: optimizer steps before the first raise: early steps agree at any rate.
        warm: minimum share of its peak for a raise while the schedule is warming up. Above it, nothing is raised if
            the rest of the warm-up adds about as much as wanted.
    """

    raise_above: float = 0.25
    raise_evidence: float = 2.0
    surely_above: float = 0.12
    surely_evidence: float = 3.0
    least_alignment: float = 0.02
    lower_evidence: float = 1.5
    lower_product: float = 0.4
    gains: tuple[float, float] = (1.2, 2.0)
    back_below: float = -0.2
    back_product: float = 0.7
    back_until: float = 0.16
    undo_threshold: float = 0.05
    undo_noise: float = 1.5
    first_raise: int = 9
    warm: float = 0.7

    def act(self, observations: FloatArray) -> Sequence[int]:
        """Return one action per run for observations (runs, len(FEATURES))."""
        unscaled = observations / list(SCALES.values())
        return [self._one(dict(zip(FEATURES, row, strict=True))) for row in unscaled.tolist()]

    def _one(self, seen: dict[str, float]) -> int:
        """Return the action for one run, whose features are in their own units."""
        alignment, share, evidence = seen["alignment"], seen["alignment over the first"], seen["evidence"]
        warming_up, schedule = bool(seen["warm-up"]), seen["schedule"]
        reverses = evidence < -self.lower_evidence

        early = seen["time"] <= self.back_until and seen["moved"] >= 0
        wasted = early and reverses and share < self.back_below and evidence * share > self.back_product
        damaged = alignment < 0 and seen["loss"] > self.undo_threshold + self.undo_noise * seen["noise"]
        if damaged or wasted:
            return UNDO
        if reverses and evidence * share > self.lower_product:
            return _nearest(float(np.clip(self.gains[1] * share, -2.0, -0.5)))

        wanted = 0.0  # of log2 of the rate
        if alignment >= self.least_alignment:
            if share > self.raise_above:
                wanted = self.gains[0] * share if evidence > self.raise_evidence else 0.0
            elif share > self.surely_above and evidence > self.surely_evidence and not warming_up:
                wanted = LEAST_RAISE
        if 5 * 2 ** seen["steps"] < self.first_raise or (warming_up and schedule < self.warm):
            return KEEP
        by_warm_up = -math.log2(schedule) if warming_up else 0.0
        return _nearest(min(max(wanted, 0.5), 1.0)) if wanted - by_warm_up >= LEAST_RAISE else KEEP


def _nearest(wanted: float) -> int:
    """Action closest to a wanted change of log2 of the rate, excluding `UNDO`."""
    return min(range(1, UNDO), key=lambda action: abs(CHANGES[action] - wanted))


LEAST_WARM_UP = 12
"""Shorter warm-ups count as this many optimizer steps, and so do the steps from the end of one to the first look."""

FIRST_LOOK, END = 1.25, 2.0
"""A race is looked at and ends after these multiples of the warm-up's steps."""

LOOKS = 8
"""Looks per warm-up."""

MOST_TIME = 0.4
"""Steps of all further lanes together, as a share of the run's steps."""

SURELY_BEHIND, SURELY_BETTER = 3.0, 2.0
"""Standard errors: a lane this far behind leaves, and one this far ahead of the start replaces it."""


@dataclass(frozen=True)
class RaceLength:
    """Optimizer steps of a race.

    Attributes:
        warm_up: steps in which the rate rises; their losses are not judged.
        first: steps before the first look.
        last: steps after which the race ends.
    """

    warm_up: int
    first: int
    last: int

    @classmethod
    def of(cls, warm_up: int, total_steps: int, lanes: int) -> RaceLength:
        """Return the length of a race.

        Args:
            warm_up: optimizer steps in which the schedule's rate rises.
            total_steps: optimizer steps of the run.
            lanes: number of lanes.
        """
        warm_up = max(warm_up, LEAST_WARM_UP)
        last = max(min(math.ceil(END * warm_up), int(MOST_TIME * total_steps / max(lanes - 1, 1))), 1)
        first = max(math.ceil(FIRST_LOOK * warm_up), warm_up + LEAST_WARM_UP)
        return cls(warm_up, min(first, last), last)

    def looks(self, step: int) -> bool:
        """Return True if the lanes are judged after this number of steps."""
        every = max(self.warm_up // LOOKS, 1)
        return step >= self.last or (step >= self.first and (step - self.first) % every == 0)


def time_for_one_more(further: int, steps: int, total_steps: int) -> bool:
    """Return True if there is time for one more lane to repeat all steps so far.

    Args:
        further: steps of all further lanes so far.
        steps: optimizer steps so far.
        total_steps: optimizer steps of the run.
    """
    return further + steps + 1 <= MOST_TIME * total_steps


def staying(losses: FloatArray, start: int, length: RaceLength, *, decays: bool = True) -> list[int]:
    """Return the lanes that stay in a race, by index in ascending order; one if it ends.

    A lane leaves if another one is surely ahead, unless it has a lower rate and its distance shrinks.

    Args:
        losses: losses of all steps so far, (lanes, steps), the lanes in ascending order of their rates; NaN and
            infinity are losses without bound.
        start: index of the lane to continue with if nothing is sure.
        length: the length of the race.
        decays: False if the schedule stays at its peak. The run then continues one lane below the leader.
    """
    steps = losses.shape[1]
    begin = max(min(steps - LEAST_WARM_UP, (length.warm_up + steps) // 2), 0)
    seen = np.log(np.clip(np.nan_to_num(losses[:, begin:], nan=1e6, posinf=1e6), 1e-6, 1e6))
    best = int(seen.mean(axis=1).argmin())

    def leaves(lane: int) -> bool:
        if not decays and lane == best - 1:
            return False
        behind = seen[lane] - seen[best]
        half = len(behind) // 2
        catches_up = lane < best and behind[half:].mean() < behind[: half or 1].mean()
        return bool(behind.mean() > SURELY_BEHIND * _error(behind)) and not catches_up

    stay = [lane for lane in range(len(seen)) if lane == best or not leaves(lane)]
    if steps < length.last or len(stay) == 1:
        return stay
    ahead = seen[start] - seen[best]
    leader = start if start in stay and ahead.mean() <= SURELY_BETTER * _error(ahead) else best
    return [leader if decays else stay[max(stay.index(leader) - 1, 0)]]


def _error(differences: FloatArray) -> float:
    """Return the standard error of a mean of differences."""
    return float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
