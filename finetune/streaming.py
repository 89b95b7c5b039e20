"""The streamed base of a run: when weights go to main memory, and how many layers stay on the device."""

from __future__ import annotations

from dataclasses import replace

from ..common.arrays import IntArray
from ..common.errors import BudgetError, ConfigError, UnsupportedError
from ..common.text import format_bytes
from ..cost.budget import Budget
from ..cost.record.calibration import PlanCosts
from ..cost.savers.streamed_base import StreamedBase, streamable_layers, streaming_of, unstreamable
from .options import PilotOptions
from .step.run import TrainingRun

DEVICES: frozenset[str] = frozenset({"cuda"})
"""Types of devices with memory of their own; elsewhere streaming frees nothing, so "auto" leaves it off."""


class RunStreaming:
    """Streams the base of one run as its options and its budget ask.

    Args:
        run: the run.
        options: its options; see `PilotOptions.stream`.
    """

    def __init__(self, run: TrainingRun, options: PilotOptions) -> None:
        self._run, self._asked = run, options.stream
        self._own: StreamedBase | None = None

    @property
    def now(self) -> StreamedBase | None:
        """The streaming of the run's model; None without one."""
        return streaming_of(self._run.model)

    @property
    def count(self) -> int:
        """Number of streamed layers."""
        return len(self.now.layers) if self.now else 0

    def begin(self, count: int | None = None) -> None:
        """Stream what was asked for, or as many layers as an earlier part of the run did.

        Raises:
            ConfigError: the model streams, and the options forbid it; or it has fewer layers than are to be streamed.
            UnsupportedError: it cannot be streamed.
        """
        asked = self._asked if count is None else count
        if self.now:
            if asked == "off":
                raise ConfigError('The base of this model streams (`stream_base`), and stream="off" was given.')
            if isinstance(asked, int):
                self.now.keep(self._checked(asked, self.count))
        elif isinstance(asked, int) and asked:
            self._start(asked)

    def instead_of(self, error: BudgetError, budget: Budget) -> bool:
        """Stream all layers where the budget cannot hold the whole base; False if that is not possible.

        Args:
            error: why no plan fits.
            budget: the budget of the run.
        """
        movable = self._asked == "auto" and budget.kind == "total" and self._run.device.type in DEVICES
        if not movable or self.now or unstreamable(self._run.model):
            return False
        try:
            self._start(len(streamable_layers(self._run.model)))
        except UnsupportedError as short:
            raise BudgetError(f"{error} {short}") from error
        return True

    def settle(self, costs: PlanCosts, budget: Budget, plain: IntArray, *, checkpoints: bool) -> PlanCosts:
        """Keep as many layers on the device as the budget holds next to a step of plain LoRA.

        Args:
            costs: the costs of plans with all layers streamed, and the limit that they leave.
            budget: the budget of the run.
            plain: the ranks of plain LoRA, int64 (modules,).
            checkpoints: True if layers may be checkpointed, as all are in the costs; plain LoRA's step has none.

        Returns:
            The costs with the limit that the kept layers leave.
        """
        streaming, memory = self.now, costs.memory
        if streaming is None or memory is None or self._asked != "auto" or budget.kind != "total":
            return costs
        wanted = (memory.with_checkpointed(()) if checkpoints else memory).peak(plain, costs.alone)
        layer, away = max(each.bytes for each in streaming.layers), streaming.away_bytes
        kept = min(max(int((costs.limit.value - wanted) // layer), 0), self.count)
        if self.count - kept <= 2:  # two are on the device anyway
            kept = self.count
        streaming.keep(self.count - kept)
        taken = away - streaming.away_bytes
        return replace(costs, limit=replace(costs.limit, value=costs.limit.value - taken))

    def told(self) -> str:
        """Describe what streams, for people; empty if nothing does."""
        if not (streaming := self.now) or not streaming.layers:
            return ""
        size = format_bytes(streaming.main_memory_bytes)
        return (
            f"The frozen weights of {self.count} layers stream from main memory ({size} there): the same losses, and "
            f"{format_bytes(streaming.away_bytes)} fewer on the device."
        )

    def end(self) -> None:
        """End the streaming that the run began; one that it found goes on."""
        if self._own:
            self._own.put_back()
            self._own = None

    def _start(self, count: int) -> None:
        layers = [*streamable_layers(self._run.model).values()]
        self._checked(count, len(layers))
        chosen = [layers[index * len(layers) // count] for index in range(count)]
        self._own = StreamedBase(self._run.model, chosen, self._run.device)

    @staticmethod
    def _checked(count: int, layers: int) -> int:
        if count > layers:
            raise ConfigError(f"stream={count}: this model has {layers} layers to stream.")
        return count
