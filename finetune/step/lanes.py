"""Lanes of a run: copies of its adapters and optimizer that take turns on one frozen model.

Each batch runs once for each lane, one lane after another, so activations and gradients exist for one lane at a time.
What a lane trains is parked in main memory while another has its turn: on a GPU, lanes take no bytes of the device. All
lanes draw the same random numbers, so each is the run that it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...cost.record.model_states import trained_outside
from ...lora.optimizer_state import OptimizerSnapshot, state_bytes_of
from ...lora.resize import set_ranks, update_peft_records, write_in_place
from ...lora.targets import TargetModule, other_trainable
from .put_back import random_states
from .run import TrainingRun


def copy_bytes(run: TrainingRun, targets: Sequence[TargetModule], *, steps: bool = True) -> int:
    """Return the bytes of one more lane at the current ranks: trained weights and, once it `steps`, optimizer state."""
    trained = _trained(run, targets)
    return sum(each.nbytes + (state_bytes_of(run.optimizer, each.detach()) if steps else 0) for each in trained)


def _trained(run: TrainingRun, targets: Sequence[TargetModule]) -> list[nn.Parameter]:
    """Return all that a run trains, once each."""
    adapters = [parameter for target in targets for parameter in target.parameters.values()]
    others = *other_trainable(run.model, targets), *trained_outside(run.model, run.optimizer)
    return list(dict.fromkeys((*adapters, *others)))


@dataclass(eq=False)
class Parked:
    """What one lane trains, while another has its turn.

    Attributes:
        values: its weights, in main memory, in the order of the run's parameters.
        state: the optimizer's state of these.
        running: running statistics of normalisation layers.
        scaler: the state of the loss scaler; empty without one.
    """

    values: list[torch.Tensor]
    state: OptimizerSnapshot
    running: list[torch.Tensor]
    scaler: Mapping[str, Any]


class Lanes:
    """The lanes of one run.

    Args:
        run: the run; each lane starts from its current adapters and optimizer.
        targets: its adapters.
        numbers: the lanes, in ascending order.
        live: the lane of the run itself, whose turn is the last in each step.
        chosen: called with the number of each lane that gets its turn.

    Attributes:
        live: as above.
        turn: the lane whose weights are in the model.
        scaler: the loop's loss scaler; None without one.
        start: the initial state of all lanes, for one that joins later; None if it is not kept.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: Sequence[TargetModule],
        numbers: Sequence[int],
        live: int,
        chosen: Callable[[int], None],
    ) -> None:
        self._run, self._targets, self._chosen = run, targets, chosen
        self.live, self.turn = live, live
        self.scaler: Any = None
        norms = (each for each in run.model.modules() if isinstance(each, nn.modules.batchnorm._NormBase))
        self._running = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._trained = _trained(run, targets)  # the same objects at any rank
        self._parked = {lane: self._copy() for lane in numbers if lane != live}
        self._done: set[int] = set()  # lanes whose turn in this step is over
        self.start: Parked | None = None

    @property
    def numbers(self) -> list[int]:
        """The lanes still there, in ascending order."""
        return sorted([*self._parked, self.turn])

    # Turns ------------------------------------------------------------------------------------------------------------

    def others(self) -> Iterator[int]:
        """Yield the number of each lane but the live one, with its weights in the model and the same random state.

        A step that failed may be repeated: lanes whose turn was over are left out, until `step_over`.
        """
        restart = random_states()
        for lane in [lane for lane in self.numbers if lane not in (self.live, *self._done)]:
            try:
                self._put_in(lane)
                yield lane
                self._done.add(lane)
            finally:
                self._put_in(self.live)
            restart()

    def step_over(self) -> None:
        """End a step."""
        self._done.clear()

    @contextmanager
    def live_one(self) -> Iterator[None]:
        """Put the live lane into the model meanwhile, such as to change ranks."""
        turn = self.turn
        self._put_in(self.live)
        try:
            yield
        finally:
            self._put_in(turn)

    def keep_start(self) -> None:
        """Keep the current state for a lane that joins later."""
        self.start = self._copy()

    def call(self, lane: int) -> None:
        """Add a lane, to which `begin_again` gives the initial state in its first turn."""
        self._parked[lane] = self._copy()

    def begin_again(self) -> None:
        """Give the initial state to the lane whose turn it is."""
        assert self.start is not None, "the start is kept"
        start, self.start = self.start, None
        self._restore(start)
        self.keep_start()

    def leave(self, lane: int) -> None:
        """Drop a lane that is not live."""
        del self._parked[lane]

    def go_on_with(self, lane: int) -> None:
        """Make another lane live, and drop the current one."""
        before, self.live = self.live, lane
        self._put_in(lane)
        self._parked.pop(before, None)

    def _put_in(self, lane: int) -> None:
        if lane == self.turn:
            return
        self._parked[self.turn], self.turn = self._park(), lane
        self._restore(self._parked.pop(lane))
        self._chosen(lane)

    def _copy(self) -> Parked:
        """Return a copy of the current state."""
        values = [parameter.detach().to("cpu", copy=True) for parameter in self._trained]
        return self._parked_with(values, OptimizerSnapshot(self._run.optimizer, self._trained, steps=True))

    def _park(self) -> Parked:
        """Move the current state to main memory; on a CPU, its tensors are already there and are not copied."""
        values = [parameter.data.to("cpu") for parameter in self._trained]
        return self._parked_with(values, OptimizerSnapshot(self._run.optimizer, self._trained))

    def _parked_with(self, values: list[torch.Tensor], state: OptimizerSnapshot) -> Parked:
        scaler = dict(self.scaler.state_dict()) if self.scaler else {}
        return Parked(values, state, [buffer.clone() for buffer in self._running], scaler)

    @torch.no_grad()
    def _restore(self, parked: Parked) -> None:
        parked.state.put_back()
        for parameter, value in zip(self._trained, parked.values, strict=True):
            if parameter.shape != value.shape:
                write_in_place(parameter, value.to(parameter.device))
                continue
            parameter.grad = None
            if parameter.device == value.device:
                parameter.data = value  # autograd's hooks stay, such as those of DDP
            else:  # captured graphs may know the address
                parameter.copy_(value)
        torch.clear_autocast_cache()
        for buffer, value in zip(self._running, parked.running, strict=True):
            buffer.copy_(value)
        if self.scaler and parked.scaler:
            self.scaler.load_state_dict(parked.scaler)

    # Ranks and checkpoints --------------------------------------------------------------------------------------------

    def ranks_changed(self, step: int, seed: int) -> None:
        """Give all lanes the ranks of the live one, each by its own directions.

        Args:
            step: optimizer steps done.
            seed: seed of new rows; see `set_ranks`.
        """
        self.start = None  # steps at other ranks cannot be repeated
        ranks = {target.name: target.rank for target in self._targets}
        for lane in list(self._parked):
            before = self._park()
            self._restore(self._parked[lane])
            self._record_ranks()
            set_ranks(self._targets, ranks, self._run.optimizer, seed=seed, step=step)
            self._parked[lane] = self._park()
            self._restore(before)
            self._record_ranks()

    def _record_ranks(self) -> None:
        for target in self._targets:
            update_peft_records(target, target.rank)

    def state(self) -> dict[str, Any] | None:
        """Return the parked lanes for `load`, as tensors and JSON values; None if the optimizer's state is not."""
        lanes: dict[str, Any] = {}
        for lane, parked in self._parked.items():
            if (state := parked.state.state_dict()) is None:
                return None
            values, running = ({str(i): each for i, each in enumerate(own)} for own in (parked.values, parked.running))
            lanes[str(lane)] = {"values": values, "running": running, "state": state, "scaler": dict(parked.scaler)}
        return lanes

    def load(self, lanes: Mapping[str, Any]) -> None:
        """Replace the parked lanes by those of `state`, at the same ranks.

        Raises:
            LookupError, TypeError, ValueError: they belong to other modules or ranks.
        """
        numbers = sorted(map(int, lanes))
        if not set(numbers) <= set(self._parked):
            raise ValueError(f"lanes {numbers}")
        for lane in [lane for lane in self._parked if lane not in numbers]:
            self.leave(lane)
        for lane, parked in self._parked.items():
            saved = lanes[str(lane)]
            values = [saved["values"][str(index)] for index in range(len(parked.values))]
            if any(value.shape != now.shape for value, now in zip(values, parked.values, strict=True)):
                raise ValueError(f"a lane {lane} of other ranks")
            parked.values = values
            parked.running = [saved["running"][str(index)] for index in range(len(parked.running))]
            parked.state.load_state_dict(saved["state"])
            parked.scaler = saved["scaler"]
