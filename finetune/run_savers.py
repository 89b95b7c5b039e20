"""What saves memory in the steps of one run: switched on before it begins, and off when it ends."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from ..cost.savers.checkpointed_layers import LayerCheckpointing, all_running_again, could_checkpoint
from ..cost.savers.exact import SAVERS, ExactSavers, is_compiled
from ..cost.savers.prices import CACHE, TILES
from .options import PilotOptions
from .step.journal import Journal
from .step.run import TrainingRun
from .streaming import RunStreaming


class RunSavers:
    """The savers of one run.

    Args:
        run: the run.
        options: its options.
        journal: gets a line for each saver that has no effect, or whose effect is not told elsewhere.

    Attributes:
        exact: the exact savers; None before `begin`, or if there are none.
        checkpointing: chooses the checkpointed layers; None if the run may not choose.
        streaming: streams the base.
    """

    def __init__(self, run: TrainingRun, options: PilotOptions, journal: Journal) -> None:
        self._run, self._options, self._journal = run, options, journal
        self.exact: ExactSavers | None = None
        self.checkpointing: LayerCheckpointing | None = None
        self.streaming: RunStreaming = RunStreaming(run, options)
        self._undo = ExitStack()

    def begin(self, *, counts_bytes: bool, names: Collection[str] = tuple(SAVERS), streamed: int | None = None) -> None:
        """Make steps run as the options say.

        Args:
            counts_bytes: True if the budget counts bytes, so layers may be checkpointed.
            names: names of the exact savers to enable.
            streamed: number of layers to stream, if a resumed run did.
        """
        run, options = self._run, self._options
        self._undo.callback(self.streaming.end)
        self.streaming.begin(streamed)
        if options.gradient_checkpointing is True:
            self._undo.callback(all_running_again(run.model))
        if options.exact_savers:
            # Generated answers are written with a cache, and read from logits. Without a cache, transformers
            # mistakes positions for those of packed texts. A sharded head is whole only in its own passes.
            left_out = {CACHE: run.generates or run.tells_positions, TILES: run.generates or run.replicas.sharded}
            kept = [name for name in names if not left_out.get(name)]
            self.exact = ExactSavers(run.model, kept, compiled=is_compiled(run.wrapped))
            self._undo.callback(self.exact.put_back)
        if options.chooses_layers and counts_bytes and could_checkpoint(run.model):
            self.checkpointing = LayerCheckpointing(run.model, whole=options.goal == "bytes")
            self._undo.callback(self.checkpointing.put_back)

    def end(self) -> None:
        """Restore the original step; a second call does nothing."""
        self._undo.close()

    def state(self) -> dict[str, Any]:
        """Return the arguments of `begin` for a resumed run, as JSON values."""
        return {"savers": list(self.exact.names) if self.exact else [], "streamed": self.streaming.count}
