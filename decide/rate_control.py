"""Control of a run while it goes: its learning rate is corrected at a few moments, and damage is undone.

What a run alone can show is whether its rate suits it. The sign to look at is the *alignment*: the cosine between the
last step of the optimizer and the next descent direction (hypergradient descent moves the rate along it: Baydin et al.,
2018, arXiv 1703.04782). While the rate is too low, each step goes on where the last one went; at a rate that is too
high, it takes back a part of it. It is read over some steps, next to the loss, and a control answers with one of a
few `CHANGES` of the rate. Adapters are small, so a copy of them from before the damage is at hand: `UNDO` goes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..common.arrays import FloatArray

SHARES = (0.02, 0.04, 0.07, 0.11, 0.17, 0.25, 0.35, 0.5)
"""When a run is controlled, in shares of its steps. Later a change gains less than it risks."""

LEAST_WINDOW = 5
"""Optimizer steps between two decisions, at least."""

SHORTEST = 60
"""A shorter run is left alone: its first decisions would see too little."""

CHANGES = (0.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, -2.0)
"""What an action does to log2 of the rate. The last action also goes back to the copy that was kept."""

KEEP, UNDO = 0, len(CHANGES) - 1
"""The actions that leave all as it is, and that go back."""

HALVED, DOUBLED = CHANGES.index(-1.0), CHANGES.index(1.0)
"""Two actions between them."""

PATIENCE = 3
"""Times in a row that a run goes back because something is not finite; then its copy is no help."""

FEATURES = {
    "alignment": "mean over the window, times 4",
    "alignment over the first": "that mean over the mean of the first steps",
    "spread of the alignment": "its standard deviation over the window, times 4",
    "evidence": "mean alignment over its standard error, over 4",
    "loss": "log of the mean loss over that of the first steps, times 2",
    "change of loss": "log of the mean loss over that of the window before, times 4",
    "above the best": "log of the mean loss over that of the best window so far, times 4",
    "noise": "standard deviation of the log loss over the window, times 4",
    "moved": "log2 of the rate over the one at the start, over 3",
    "time": "share of the steps that are done",
    "steps": "log2 of the steps that are done over 5, over 4",
    "schedule": "the schedule's rate now, as a share of its peak",
    "warm-up": "1 while the schedule's rate rises",
    "undone": "1 if the last action went back",
}
"""What a control sees, each from -`MOST_FEATURE` to `MOST_FEATURE`."""

MOST_FEATURE = 3.0

LEAST_RAISE = 0.25
"""A smaller rise of log2 of the rate, beyond what a warm-up still adds, is none."""

FIRST = 2
"""Steps whose mean loss is that of the start: the second one has hardly changed the model."""

FIRST_ALIGNMENTS, LEAST_FIRST = 5, 0.02
"""Alignments whose mean the later ones are held against, and what it counts as at least."""


def decision_steps(total_steps: int) -> tuple[int, ...]:
    """The optimizer steps before which a run is controlled; none for a short one."""
    if total_steps < SHORTEST:
        return ()
    found: list[int] = []
    for share in SHARES:
        found.append(max(round(share * total_steps), (found[-1] if found else 0) + LEAST_WINDOW))
    return tuple(found)


@dataclass
class RunRecord:
    """What a run has shown so far.

    Attributes:
        total_steps: of the run.
        losses: of the steps since the last decision.
        alignments: of the same steps.
        moved: log2 of the rate over that at the start.
        changed: whether an action has ever moved it.
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
        """A step is done.

        Args:
            loss: of its batch, before the step.
            alignment: of the step before it with its gradient; NaN where there is none.
        """
        self.step += 1
        loss = max(float(np.nan_to_num(loss, nan=1e6, posinf=1e6)), 1e-6)  # its logarithm is finite
        self._first = [*self._first, loss][:FIRST]
        self.losses.append(loss)
        if math.isfinite(alignment):
            self.alignments.append(alignment)
            self._first_alignments = [*self._first_alignments, alignment][:FIRST_ALIGNMENTS]

    def observe(self, schedule: float) -> FloatArray:
        """`FEATURES` now, float64 (len(FEATURES),).

        Args:
            schedule: the schedule's rate now, as a share of its peak.
        """
        losses, aligned = np.log(self.losses), np.array(self.alignments or [0.0])
        mean, first = float(losses.mean()), math.log(np.mean(self._first))
        error = float(aligned.std()) / math.sqrt(len(aligned)) + 1e-3
        means = [first, *self._means]
        values = (
            4 * aligned.mean(),
            aligned.mean() / max(float(np.mean(self._first_alignments or [0.0])), LEAST_FIRST),
            4 * aligned.std(),
            aligned.mean() / error / 4 if len(aligned) > 1 else 0.0,  # a single one tells no error
            2 * (mean - first),
            4 * (mean - means[-1]),
            4 * (mean - min(means)),
            4 * losses.std(),
            self.moved / 3,
            self.step / self.total_steps,
            math.log2(max(self.step, 1) / 5) / 4,
            schedule,
            float(schedule > self._schedule),
            float(self._undone),
        )
        self._now = schedule
        return np.asarray(np.clip(np.array(values), -MOST_FEATURE, MOST_FEATURE))

    @property
    def loss_error(self) -> float:
        """The standard error of the mean log loss since the last decision; 0 where no step was."""
        return float(np.std(np.log(self.losses)) / math.sqrt(len(self.losses))) if self.losses else 0.0

    def take(self, action: int, *, undone: bool = False) -> None:
        """An action is taken, of which `UNDO` goes back, others only where the run was `undone`; a window begins."""
        self.moved += CHANGES[action]
        self.changed |= action != KEEP
        self._undone = undone or action == UNDO
        if not self._undone:
            self._means.append(math.log(np.mean(self.losses)))
        self._schedule, self.losses, self.alignments = self._now, [], []


class RateControl(Protocol):
    """Chooses an action for each run."""

    def act(self, observations: FloatArray) -> Sequence[int]:
        """One action a run.

        Args:
            observations: (runs, len(FEATURES)).
        """


@dataclass(frozen=True)
class AlignmentRule:
    """Raise the rate while steps go on where the last one went, and lower it where they take it back.

    What a rule of rates says plays no part: steps are right on models on which that rule is not.

    Attributes:
        raise_above: raise nothing while the mean alignment is below this share of that of the first steps. At the best
            rate it is about a tenth of that, at half of it a half, and below a third of it nearly as large.
        raise_evidence: raise nothing while it is less than so many of its standard errors above 0.
        surely_above: after the warm-up, raise by the least from this share on, where the mean alignment is more than
            `surely_evidence` of its standard errors above 0: half of the best rate may look so.
        surely_evidence: see there.
        least_alignment: raise nothing while the mean alignment, a cosine, is below this.
        lower_evidence: lower nothing while it is less than so many of its standard errors below 0. A rate that is too
            high costs more than one that is too low.
        lower_product: lower nothing while that number times the share is below this.
        gains: log2 of a rise and of a fall of the rate for each unit of that share. A rise is at most twofold, a fall
            to a quarter at most.
        back_below: undo where the mean alignment is surely below this share of that of the first steps, early in the
            run and as long as nothing was lowered. What steps at a rate that is four times too high have learned is
            worth less than the steps.
        back_product: undo nothing for that while its standard errors times the share are below this: right rates come
            to 0.65 by chance, and those that are four times too high to 0.74 and more.
        back_until: share of the run up to which that is early.
        undo_threshold: undo when log(loss / initial loss) exceeds this and the alignment is negative.
        undo_noise: by how much that threshold rises for each standard deviation of the log loss.
        first_raise: optimizer steps before which the rate is not raised: the first ones agree at any rate.
        warm: share of its peak below which a rate that the schedule still raises is not raised further. Above it
            nothing is raised where what the schedule itself still adds is about as much as is wanted.
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
        """See `RateControl`."""
        names = list(FEATURES)
        return [self._one(dict(zip(names, row, strict=True))) for row in observations.tolist()]

    def _one(self, seen: dict[str, float]) -> int:
        share, evidence = seen["alignment over the first"], 4 * seen["evidence"]
        risen = seen["loss"] / 2 > self.undo_threshold + self.undo_noise * seen["noise"] / 4
        early = seen["time"] <= self.back_until and seen["moved"] >= 0
        takes_back = share < self.back_below and evidence < -self.lower_evidence
        if (seen["alignment"] < 0 and risen) or (early and takes_back and evidence * share > self.back_product):
            return UNDO
        goes_on = seen["alignment"] / 4 >= self.least_alignment
        if goes_on and share > self.raise_above:
            return self._raised(seen, share) if evidence > self.raise_evidence else KEEP
        if goes_on and share > self.surely_above and evidence > self.surely_evidence and not seen["warm-up"]:
            return self._raised(seen, LEAST_RAISE / self.gains[0])
        surely = evidence < -self.lower_evidence and evidence * share > self.lower_product
        return _nearest(float(np.clip(self.gains[1] * share, -2.0, -0.5))) if surely else KEEP

    def _raised(self, seen: dict[str, float], share: float) -> int:
        """How far to raise the rate, if at all."""
        warming = seen["warm-up"] and seen["schedule"] < self.warm
        if warming or 5 * 2 ** (4 * seen["steps"]) < self.first_raise:
            return KEEP
        wanted = self.gains[0] * share
        beyond = wanted + (math.log2(seen["schedule"]) if seen["warm-up"] else 0.0)
        return _nearest(min(max(wanted, 0.5), 1.0)) if beyond >= LEAST_RAISE else KEEP


def _nearest(wanted: float) -> int:
    """The action that comes nearest to a change of log2 of the rate and goes not back."""
    return min(range(1, UNDO), key=lambda action: abs(CHANGES[action] - wanted))
