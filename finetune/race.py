"""Race learning rates at the beginning of a run, and continue with the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from ..common.arrays import FloatArray
from ..common.checks import counted, finite
from ..common.errors import ConfigError
from ..common.text import format_bytes
from ..cost.batch_shape import Batch, map_tensors, tensors_of
from ..decide.rate_control import RaceLength, staying, time_for_one_more
from ..lora.targets import TargetModule
from .plan_rate import PlanRate
from .step.journal import Journal
from .step.lanes import Lanes, copy_bytes
from .step.put_back import random_states
from .step.run import Participant, TrainingRun

T = TypeVar("T")

LEAD_IN = 0.05
"""Warm-up of a race under a schedule without one, as a share of the run's steps."""

KEEPS = 1e-6
"""Relative fall of the schedule's rate up to which it counts as constant."""

SHOWN = 60
"""Points of a lane's curve in the log."""


_WITHOUT_TURNS = (
    "A race of learning rates trains each batch once for each of them, but this loop trains it once. Run each "
    "optimizer step, from the forward pass to `optimizer.zero_grad()`, inside `for inputs in pilot.lanes(batch):`."
)


def middle(factors: Sequence[float]) -> float:
    """Return the factor of the run itself: the middle one, or the lower of two."""
    return sorted(factors)[(len(factors) - 1) // 2]


class RateRace(Participant):
    """Races learning rates at the beginning of a run.

    Args:
        run: the run about to begin.
        targets: its adapters.
        rate: multiplies the learning rate.
        factors: factors of the lanes on the plain rate; see `middle` for that of the run itself.
        room: bytes of main memory for further lanes.
        seed: seed of new rows, if ranks change meanwhile.
        journal: gets the reports.

    Attributes:
        lanes: the lanes; None before and after the race.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        rate: PlanRate,
        factors: Sequence[float],
        room: float,
        seed: int,
        journal: Journal,
    ) -> None:
        self._run, self._targets, self._rate, self._journal, self._seed = run, targets, rate, journal, seed
        start, one, weights = middle(factors), copy_bytes(run, targets), copy_bytes(run, targets, steps=False)
        count = 1 + min(len(factors) - 1, int(room // max(one, 1)))
        nearest = sorted(factors, key=lambda factor: (abs(math.log(factor / start)), factor))[:count]
        self._factors: dict[int, float] = dict(enumerate(sorted(nearest)))  # by lane, ascending
        self._start = sorted(nearest).index(start)
        self._asked, self._held = len(factors), (count - 1) * one
        self._spare = room - self._held - weights  # for batches kept to be repeated
        self._calls = self._spare >= 0
        self._held += self._calls * weights
        self._losses: dict[int, list[torch.Tensor | float]] = {lane: [] for lane in self._factors}
        self._warm_up: int | None = None
        self._share = self._peak = 0.0
        self._turns_taken = False
        self._further = 0  # steps of lanes beside the run itself
        self._called: int | None = None  # a lane that has not begun
        self._past: list[tuple[Any, Callable[[], None]]] = []  # data and random state of each step
        self.lanes: Lanes | None = None

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Set the lanes off, or continue those of a resumed run."""
        own = state and state.get("race")
        if state is not None and not own:
            return
        rate, steps = self._rate, self._run.total_steps
        if own and "over" in own:
            rate.move(finite(own["over"]))
            return
        if own:
            self._factors = {int(lane): finite(factor) for lane, factor in own["factors"].items()}
        if len(self._factors) < 2:
            self._turn(self._start)
            self._journal.note("Learning rates do not race: there is no main memory for a second copy.")
            return
        rate.lead_in, rate.watched = max(round(LEAD_IN * steps), 1), True
        live = counted(own["live"]) if own else self._start
        self.lanes = Lanes(self._run, self._targets, tuple(self._factors), live, self._turn)
        self._turn(live)
        if own:
            self._resume(self.lanes, own)
            return
        if self._calls:
            self.lanes.keep_start()
        rates = ", ".join(map(self._told, self._factors))
        fewer = f" There is no main memory for all {self._asked}." if self._asked > len(self._factors) else ""
        most = RaceLength.of(steps, steps, len(self._factors)).last * (len(self._factors) - 1) / steps
        self._journal.note(
            f"{len(self._factors)} learning rates race on the same batches: {rates}.{fewer} The race adds at most "
            f"{most:.0%} to the run's time, and takes {format_bytes(self._held)} of main memory beside the batches."
        )

    def _turn(self, lane: int) -> None:
        self._rate.move(self._factors[lane])

    # A step -----------------------------------------------------------------------------------------------------------

    def others(self, data: T, scaler: Any) -> Iterator[T]:
        """Yield the data of a step for each lane other than the run itself; see `Lanes.others`.

        A lane that has just been called first gets those of all earlier steps.
        """
        lanes, now = self.lanes, random_states()
        assert lanes is not None, "the race is on"
        self._turns_taken, lanes.scaler = True, scaler
        for lane in lanes.others():
            if lane == self._called:
                if lanes.start is None:
                    continue  # ranks have changed, so it cannot repeat the steps
                yield from self._earlier(lanes, lane)
                now()
            yield data
        if lanes.start is None:
            self._past.clear()
            return
        self._past[self._rate.step :] = [(map_tensors(data, lambda tensor: tensor.to("cpu")), now)]
        self._spare -= sum(tensor.nbytes for tensor in tensors_of(data))
        if self._spare < 0 and self._called is None:
            lanes.start = None

    def _earlier(self, lanes: Lanes, lane: int) -> Iterator[Any]:
        """Yield the data of earlier steps, each with its random state and the schedule's rate."""
        step, device = self._rate.step, self._run.device
        lanes.begin_again()
        self._losses[lane] = []
        try:
            self._rate.repeats = True
            for earlier, (data, restart) in enumerate(self._past):
                self._rate.step = earlier
                restart()
                yield map_tensors(data, lambda tensor: tensor.to(device))
        finally:
            self._rate.repeats, self._rate.step = False, step

    @property
    def beside(self) -> bool:
        """True during the turn of a lane other than the run itself."""
        return self.lanes is not None and self.lanes.turn != self.lanes.live

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Tell the rate which step begins."""
        self._rate.step = step

    def ranks_changed(self) -> None:
        """Give all lanes the new ranks."""
        if self.lanes:
            self.lanes.ranks_changed(self._rate.step, self._seed)

    def before_optimizer_step(self, step: int, loss: torch.Tensor | float) -> None:
        """Take the mean loss of a lane's step."""
        if self.lanes:
            mean = loss.detach().float().mean() if isinstance(loss, torch.Tensor) else float(loss)
            self._losses[self.lanes.turn].append(mean)
            self._further += self.beside

    def after_step(self, step: int) -> None:
        """Drop lanes that are behind, at a few moments after the warm-up."""
        lanes = self.lanes
        if lanes is None:
            return
        if not self._turns_taken:
            raise ConfigError(_WITHOUT_TURNS)
        lanes.step_over()
        self._turns_taken, self._peak = False, max(self._peak, self._rate.share)
        if self._warm_up is None:
            self._warm_up = self._warm_up_before(step)
        length = RaceLength.of(self._warm_up or step, self._run.total_steps, len(self._factors))
        if self._called is not None:  # it has repeated the steps, and there is no time for more
            self._called, length = None, replace(length, first=step, last=step)
            if lanes.start is None:
                self._go_on([lanes.live], step)
                return
        if not length.looks(step):
            return
        numbers = lanes.numbers
        start = numbers.index(self._kept(numbers))
        kept = staying(self._read(numbers), start, length, decays=self._decays)
        self._go_on([numbers[at] for at in kept], step)

    def _kept(self, numbers: Sequence[int]) -> int:
        """Return the lane to continue with if nothing is sure: the one of the start, or the nearest one left."""
        return min(numbers, key=lambda lane: (abs(lane - self._start), lane))

    @property
    def _decays(self) -> bool:
        """True if the schedule's rate has fallen since the warm-up."""
        return self._rate.share < (1 - KEEPS) * self._peak

    def _warm_up_before(self, step: int) -> int | None:
        """Return the number of steps of the warm-up; None if it is not over."""
        share, before, self._share = self._rate.share, self._share, self._rate.share
        if self._rate.lead_in:
            return self._rate.lead_in if step >= self._rate.lead_in else None
        return step - 1 if step > 1 and share <= before else None

    def _read(self, lanes: Sequence[int]) -> FloatArray:
        """Return the losses of lanes so far, averaged over processes, float64 (lanes, steps)."""
        self._losses = {lane: [float(loss) for loss in losses] for lane, losses in self._losses.items()}
        own = [[float(loss) for loss in self._losses[lane]] for lane in lanes]
        return np.asarray(np.mean(self._run.replicas.processes.of_each(own), axis=0), dtype=np.float64)

    def undo_broken(self, step: int) -> bool:
        """Drop the live lane after a step with a non-finite result; False if there is no other one."""
        lanes = self.lanes
        if lanes is None or len(lanes.numbers) < 2:
            return False
        self._go_on([lane for lane in lanes.numbers if lane != lanes.live], step)
        return True

    def _go_on(self, kept: Sequence[int], step: int) -> None:
        """Drop all other lanes; the kept one nearest to the start becomes the run, and the last one ends the race."""
        lanes = self.lanes
        assert lanes is not None, "the race is on"
        numbers, stays = lanes.numbers, self._kept(kept)
        dropped = [lane for lane in numbers if lane not in kept]
        before = lanes.live
        if stays != before:
            lanes.go_on_with(stays)
        for lane in dropped:
            if lane not in (before, lanes.live):
                lanes.leave(lane)

        if dropped and len(kept) > 1:
            behind = " and ".join(map(self._told, dropped))
            self._journal.note(f"step {step}: the learning rate {behind} is behind and leaves the race.")
        elif dropped and stays == min(self._factors) and self._may_call(step):
            self._call(stays - 1, self._factors[stays] / 2, step)
        elif dropped and stays == max(self._factors) and self._may_call(step):
            self._call(stays + 1, self._factors[stays] * 2, step)
        elif dropped:
            self._finish(stays, step)

    def _may_call(self, step: int) -> bool:
        """True if one more lane can repeat all steps within `MOST_TIME`; all processes ask at once."""
        whole = self.lanes is not None and self.lanes.start is not None and len(self._past) == step
        timely = self._decays and time_for_one_more(self._further, step, self._run.total_steps)
        return bool(self._run.replicas.processes.least(float(whole and timely))[0])

    def _call(self, lane: int, factor: float, step: int) -> None:
        """Let a lane join whose rate lies beyond the lowest or highest one, which leads."""
        assert self.lanes is not None, "the race is on"
        end, leader = ("lowest", lane + 1) if lane < min(self._factors) else ("highest", lane - 1)
        self._called, self._factors[lane] = lane, factor
        self.lanes.call(lane)
        joins = f"so {self._told(lane)} joins, and repeats {step} steps"
        self._journal.note(f"step {step}: {self._told(leader)}, the {end} learning rate, leads; {joins}.")

    def _finish(self, winner: int, step: int) -> None:
        """End the race: report the winner, and log the curves of all lanes."""
        end = {min(self._factors): "lowest", max(self._factors): "highest"}.get(winner)
        wider = f" It is the {end} of the race, so a better one may lie beyond it." if end else ""
        self._journal.note(f"step {step}: the race is over. The run continues at {self._told(winner)}.{wider}")
        change = math.log2(self._factors[winner] / self._factors[self._start])
        curves = {self._told(lane): self._curve(lane) for lane in sorted(self._losses)}
        row = {"step": step, "change": change, "undone": False, "rate": self._rate.rate, "race": curves}
        self._journal.log_control(row)
        self.end()

    def _told(self, lane: int) -> str:
        return f"{self._rate.rate / self._rate.moved * self._factors[lane]:.2g}"

    def _curve(self, lane: int) -> list[tuple[int, float]]:
        """Return steps, and the means of a lane's finite losses up to them since the one before; at most `SHOWN`."""
        losses = [(step, loss) for step, loss in enumerate(map(float, self._losses[lane]), 1) if math.isfinite(loss)]
        parts = np.array_split(np.array(losses).reshape(-1, 2), min(SHOWN, max(len(losses), 1)))
        return [(int(part[-1, 0]), round(float(part[:, 1].mean()), 4)) for part in parts if len(part)]

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all lanes and their losses; the result alone once it is over, or if lanes cannot be saved."""
        lanes = self.lanes.state() if self.lanes and self._called is None else None
        if self.lanes is None or lanes is None:
            return {"race": {"over": self._rate.moved}}
        own = {
            "live": self.lanes.live,
            "lanes": lanes,
            "losses": {str(lane): [float(loss) for loss in losses] for lane, losses in self._losses.items()},
            "factors": {str(lane): factor for lane, factor in self._factors.items()},
            "further": self._further,
            "warm_up": self._warm_up,
            "share": self._share,
            "peak": self._peak,
            "lead_in": self._rate.lead_in,
        }
        return {"race": own}

    def _resume(self, lanes: Lanes, own: Mapping[str, Any]) -> None:
        lanes.load(own["lanes"])
        self._losses = {int(lane): list(map(float, losses)) for lane, losses in own["losses"].items()}
        self._warm_up = None if own["warm_up"] is None else counted(own["warm_up"], 1)
        self._share, self._peak = finite(own["share"]), finite(own["peak"])
        self._rate.lead_in, self._further = counted(own["lead_in"]), counted(own["further"])

    def end(self) -> None:
        """Drop all lanes but the run itself."""
        self.lanes, self._rate.watched = None, False
        self._past.clear()
        self._rate.past.clear()
