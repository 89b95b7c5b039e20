"""What saves memory in the steps of one run: switched on before it begins, and off when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cost.batch_shape import tensors_of
from ..cost.savers.checkpointed_layers import LayerCheckpointing, all_running_again, could_checkpoint
from ..cost.savers.exact import SAVERS, ExactSavers, is_compiled
from ..cost.savers.prices import CACHE, TILES
from ..lora.targets import unwrap
from .options import PilotOptions
from .step.journal import Journal
from .step.known_losses import foreign_code
from .step.put_back import torch_random_states
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
        needs_cache, reason = _against_checkpointing(run)
        if reason and options.gradient_checkpointing is True:
            self._journal.note(f"gradient_checkpointing=True changes the loss: {reason}.")
        elif reason and options.chooses_layers:
            self._journal.note(f"No layer is checkpointed: {reason}.")
        if options.gradient_checkpointing is True:
            self._undo.callback(all_running_again(run.model))
        if options.exact_savers:
            # Generated answers are written with a cache, and read from logits. Without a cache, transformers
            # mistakes positions for those of packed texts. A sharded head is whole only in its own passes.
            needs_cache = needs_cache or run.generates or run.tells_positions
            left_out = {CACHE: needs_cache, TILES: run.generates or run.replicas.sharded}
            kept = [name for name in names if not left_out.get(name)]
            self.exact = ExactSavers(run.model, kept, compiled=is_compiled(run.wrapped))
            self._undo.callback(self.exact.put_back)
        if options.chooses_layers and counts_bytes and not reason and could_checkpoint(run.model):
            self.checkpointing = LayerCheckpointing(run.model, whole=options.goal == "bytes")
            self._undo.callback(self.checkpointing.put_back)

    def end(self) -> None:
        """Restore the original step; a second call does nothing."""
        self._undo.close()

    def state(self) -> dict[str, Any]:
        """Return the arguments of `begin` for a resumed run, as JSON values."""
        return {"savers": list(self.exact.names) if self.exact else [], "streamed": self.streaming.count}


def _against_checkpointing(run: TrainingRun) -> tuple[bool, str]:
    """Look at a forward pass of a few rows for what gradient checkpointing would change.

    Returns:
        True if the loss needs the key-value cache, which checkpointed layers do not fill. It may ask for one, pass one,
        or see packed texts for lack of one: transformers tells them apart by positions without a mask and a cache.
        Second, why no layer may be checkpointed, for people: the cache, or code of others whose results do not repeat.
    """
    base, model = unwrap(run.model).get_base_model(), run.model
    fills = any(getattr(vars(module).get("config"), "use_cache", False) is True for module in model.modules())
    foreign = foreign_code(model)
    if run.generates or not (run.foreign() or foreign or (fills and run.tells_positions)):
        return False, ""
    cached, odd, states = list[bool](), list[str](), dict[nn.Module, Callable[[], None]]()

    def called(module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        asked = given.get("use_cache")
        gets = any(given.get(name) is not None for name in ("cache", "past_key_values"))
        packed = given.get("position_ids") is not None and given.get("attention_mask") is None
        cached.append(bool(asked or gets or (packed and fills and asked is None)))

    def begins(layer: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        states[layer] = torch_random_states()

    def ends(layer: nn.Module, inputs: Any, given: dict[str, Any], output: Any) -> None:
        now = torch_random_states()
        states[layer]()  # as torch's checkpointing does
        pairs = zip(tensors_of(output), tensors_of(layer.forward(*inputs, **given)), strict=True)
        if not all(torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True) for one, other in pairs):
            odd.append(type(layer).__name__)
        now()

    def look() -> tuple[list[bool], list[str]]:
        with torch.no_grad(), suppress(Exception):  # an error of the loss is told when it is measured
            run.loss(next(run.small_batches(1, min(run.rows, 2), 0)))
        return cached, odd

    with ExitStack() as undo:
        undo.callback(base.register_forward_pre_hook(called, with_kwargs=True).remove)
        for layer in model.modules() if foreign else ():
            if isinstance(layer, GradientCheckpointingLayer):
                undo.callback(layer.register_forward_pre_hook(begins, with_kwargs=True).remove)
                undo.callback(layer.register_forward_hook(ends, with_kwargs=True, prepend=True).remove)
        cached, odd = run.measured(look)
    if any(cached):
        return True, "the loss depends on the key-value cache. With use_cache=False packed texts do not see each other"
    return False, f"{odd[0]} gives another result when it runs again" if odd else ""
