"""Records training steps: follows modules, storages and autograd's graph through one forward and backward pass."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_iter

from ..errors import UnsupportedError
from ..lora.targets import TargetModule
from .autograd_flow import Modules, flow_from, saved_by
from .live_storages import LiveStorages
from .recording import NEVER, Batch, Recording, Segment


@dataclass(frozen=True)
class _Saved:
    """What the hooks leave in the graph in place of a saved tensor."""

    serial: int | None
    tensor: torch.Tensor | None


@dataclass
class _Mark:
    """A stretch of the forward pass inside one module.

    Attributes:
        time: when it begins.
        sequence: autograd's counter then; nodes of the stretch have this number or a higher one.
        place: index into the names.
        owner: target module, or -1.
        depth: how many modules are under way.
    """

    time: int
    sequence: int
    place: int
    owner: int
    depth: int


class Recorder:
    """Records training steps of one model.

    Args:
        model: the PEFT model.
        targets: its target modules.
    """

    def __init__(self, model: nn.Module, targets: Sequence[TargetModule]) -> None:
        self.model = model
        named = dict(model.named_modules())
        self.names = tuple(named)
        self.place = {id(module): index for index, module in enumerate(named.values())}
        self.target = {id(target.layer): index for index, target in enumerate(targets)}
        self.target_of = {id(p): index for index, target in enumerate(targets) for p in target.parameters.values()}
        self.always = 1 << len(targets)
        self.opened = {index: target.layer for index, target in enumerate(targets) if _is_opened(target.layer)}

    def step(self, batch: Batch) -> Recording:
        """A forward and a backward pass, `alone` as `deaths`; gradients are cleared afterwards.

        Raises:
            UnsupportedError: the model returns no loss.
        """
        return _Run(self, batch).record(hold=True)

    def lifetimes(self, recording: Recording, batch: Batch) -> Recording:
        """The same with `alone` filled in, from a forward pass of the same batch in which nothing is held for backward.

        Raises:
            UnsupportedError: that pass ran other operations.
        """
        free = _Run(self, batch).record(hold=False)
        count = len(free.births)
        if not np.array_equal(free.births, recording.births[recording.births <= recording.forward_end]):
            raise UnsupportedError(
                f"{type(self.model).__name__} runs other operations each time on the same batch, so its memory cannot "
                "be predicted. Switch off what is random in its structure (layer drop, routing noise)."
            )
        alone = np.concatenate([free.deaths, recording.deaths[count:]])
        for serial, left in recording.on_context.items():  # held in both passes, by nothing else than that context
            alone[serial] = min(alone[serial], left)
        needed = dict(recording.needed)
        for serial in np.flatnonzero(alone < recording.deaths).tolist():
            if serial not in needed and serial not in recording.inside and recording.owners[serial] >= 0:
                # On a graph that the loss does not need, such as that of DoRA's detached norm.
                needed[serial] = 1 << int(recording.owners[serial])
            elif serial not in needed and serial not in recording.inside:
                alone[serial] = recording.deaths[serial]
        return replace(recording, alone=alone, needed=needed)


class _Run:
    """One recording in the making."""

    def __init__(self, recorder: Recorder, batch: Batch) -> None:
        self._recorder, self._batch = recorder, batch
        self._mode = LiveStorages(self._born, self._freed)
        self._births: list[int] = []
        self._sizes: list[int] = []
        self._deaths: list[int] = []
        self._marks: list[_Mark] = [_Mark(0, 0, 0, -1, 0)]
        self._outer: list[_Mark] = []
        self._here = self._marks[0]
        self._marked: list[_Mark] = []
        self._parts: list[int] = []
        self._segments: list[Segment] = []
        self._segment = -1
        self._flow: dict[int, Modules] | None = None  # by sequence number, in the backward pass
        self._gate: Modules = 0
        self._needed: dict[int, Modules] = {}
        self._inside: dict[int, Modules] = {}
        self._saving: set[int] = set()  # sequence numbers of nodes that saved something
        self._on_context: dict[int, int] = {}
        self._unpacks: list[bool] = []
        self._unpacking = False
        self._kept: list[torch.Tensor] = []

    def record(self, *, hold: bool) -> Recording:
        """Run the step; without `hold` only its forward pass."""
        torch.clear_autocast_cache()  # of other ranks
        with self._mode, self._watching(), _segments_marked(self._recorder.model, self._run_segment):
            with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, hold=hold), _unpack):
                loss = self._recorder.model(**self._batch).loss
            if loss is None:
                raise UnsupportedError("The model returned no loss, so no step can be measured. Give it labels.")
            torch.clear_autocast_cache()  # as at the end of the forward pass, if the context of the caller goes on
            forward_end = self._mode.now
            gradients: dict[int, int] = {}
            if hold:
                gradients = self._backward(loss)
        deaths = np.array(self._deaths, dtype=np.int64)
        for parameter in self._recorder.model.parameters():
            parameter.grad = None
        return Recording(
            sizes=np.array(self._sizes, dtype=np.int64),
            births=np.array(self._births, dtype=np.int64),
            deaths=deaths,
            alone=deaths,
            places=np.array([mark.place for mark in self._marked], dtype=np.int64),
            owners=np.array([mark.owner for mark in self._marked], dtype=np.int64),
            parts=np.array(self._parts, dtype=np.int64),
            needed=self._needed,
            inside=self._inside,
            on_context=self._on_context,
            unpacks=np.array(self._unpacks, dtype=np.bool_),
            gradients=gradients,
            names=self._recorder.names,
            forward_end=forward_end,
            segments=tuple(self._segments),
        )

    # Storages -----------------------------------------------------------------------------------------------------

    def _born(self, serial: int, size: int) -> None:
        self._births.append(self._mode.now)
        self._sizes.append(size)
        self._deaths.append(NEVER)
        if self._flow is not None:
            self._follow_backward(self._flow)
            self._needed[serial] = self._gate
        self._unpacks.append(self._unpacking)
        self._marked.append(self._here)
        self._parts.append(self._segment)

    def _freed(self, serial: int) -> None:
        self._deaths[serial] = self._mode.now

    # The forward pass ---------------------------------------------------------------------------------------------

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Follow which module runs."""
        enter = register_module_forward_pre_hook(self._enter)
        leave = register_module_forward_hook(self._leave, always_call=True)
        opened = [layer.register_forward_hook(self._as_leaf) for layer in self._recorder.opened.values()]
        try:
            yield
        finally:
            for handle in (enter, leave, *opened):
                handle.remove()
            self._kept.clear()

    def _as_leaf(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        """Where the module is not adapted its output is a leaf."""
        kept: torch.Tensor = _Leaf.apply(output, self._kept)  # type: ignore[no-untyped-call]
        return kept

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self._outer.append(self._here)
        place = self._recorder.place.get(id(module), self._here.place)
        owner = self._recorder.target.get(id(module), self._here.owner)
        self._go(_Mark(self._mode.now, _sequence(), place, owner, len(self._outer)))

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._go(replace(self._outer.pop(), time=self._mode.now, sequence=_sequence()))

    def _go(self, mark: _Mark) -> None:
        self._here = mark
        self._marks.append(mark)

    def _run_segment(self, reentrant: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        """In place of a checkpoint: runs the segment as it is."""
        inputs = self._serials((arguments, function.keywords if isinstance(function, partial) else None))
        start, sequence, self._segment = self._mode.now, _sequence(), len(self._segments)
        output = function(*arguments)
        self._segment = -1
        sequences = sequence, _sequence()
        self._segments.append(Segment(start, self._mode.now, inputs, self._serials(output), sequences, reentrant))
        return output

    def _serials(self, values: Any) -> tuple[int, ...]:
        serials = [self._mode.serial(value) for value in tree_iter(values) if isinstance(value, torch.Tensor)]
        return tuple(dict.fromkeys(serial for serial in serials if serial is not None))

    def _pack(self, tensor: torch.Tensor, *, hold: bool) -> _Saved:
        # A graph that saves the output of its own operation, grad_fn and all, would never be freed.
        tensor = tensor.data
        return _Saved(self._mode.serial(tensor), tensor if hold else None)

    # The backward pass --------------------------------------------------------------------------------------------

    def _backward(self, loss: torch.Tensor) -> dict[int, int]:
        """Run it; returns which storages are gradients, as in `Recording`."""
        flow = flow_from(loss, self._trains)
        self._find_saved(flow)
        self._flow = {node._sequence_nr(): modules for node, modules in flow.items()}
        del flow  # it keeps the graph
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = {}
        for parameter in self._recorder.model.parameters():
            if parameter.grad is not None:
                serial = self._mode.serial(parameter.grad)
                if serial is not None:
                    gradients[serial] = self._recorder.target_of.get(id(parameter), -1)
        return gradients

    def _trains(self, leaf: torch.Tensor) -> Modules:
        owner = self._recorder.target_of.get(id(leaf))
        return self._recorder.always if owner is None or owner in self._recorder.opened else 1 << owner

    def _find_saved(self, flow: dict[Any, Modules]) -> None:
        for node in flow:
            for kept, modules in saved_by(node, flow):
                sequence = node._sequence_nr()
                if isinstance(kept, _Saved):  # numbers are saved out of sight of the hooks
                    self._saving.add(sequence)
                serial = kept.serial if isinstance(kept, _Saved) else self._mode.serial(kept)
                if serial is None:
                    continue
                segment = self._segment_of(sequence)
                on_context = not isinstance(kept, _Saved)
                if on_context:
                    self._on_context[serial] = max(self._on_context.get(serial, 0), self._left_after(sequence))
                # A checkpoint that is not reentrant frees what the hooks saw, and no more.
                if segment < 0 or (on_context and not self._segments[segment].reentrant):
                    self._needed[serial] = self._needed.get(serial, 0) | modules
                elif segment == self._parts[serial]:
                    self._inside[serial] = self._inside.get(serial, 0) | modules

    def _follow_backward(self, flow: dict[int, Modules]) -> None:
        """Find the place, segment and gate of the node that runs now; nodes that sum gradients belong to the last."""
        node = torch._C._current_autograd_node()
        sequence = None if node is None else node._sequence_nr()
        if sequence not in flow or node.name().endswith("AccumulateGrad"):
            return
        self._gate = flow[sequence]
        self._unpacking = sequence in self._saving
        at = bisect_right(self._marks, sequence, key=lambda mark: mark.sequence) - 1
        self._here = self._marks[max(at, 0)]
        self._segment = self._segment_of(sequence)

    def _left_after(self, sequence: int) -> int:
        """The time at which the caller of a node's module was left: until then its variables hold what it passed on."""
        at = bisect_right(self._marks, sequence, key=lambda mark: mark.sequence)
        outside = self._marks[at - 1].depth - 2
        return next((mark.time for mark in self._marks[at:] if mark.depth <= outside), NEVER)

    def _segment_of(self, sequence: int) -> int:
        """The checkpointed segment to which a node belongs, -1 for none."""
        at = bisect_right(self._segments, sequence, key=lambda segment: segment.sequences[0]) - 1
        return at if at >= 0 and sequence < self._segments[at].sequences[1] else -1


class _Leaf(torch.autograd.Function):
    """The identity, which keeps a tensor and its gradient as the graph keeps a leaf."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        """The tensor."""
        ctx.kept = kept
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient."""
        ctx.kept += [*ctx.saved_tensors, gradients[0]]
        return gradients[0], None


def _is_opened(layer: nn.Module) -> bool:
    """Whether gradients flow from a module's output on even if it is not adapted: `enable_input_require_grads`."""
    return any("require_grad" in getattr(hook, "__name__", "") for hook in layer._forward_hooks.values())


def _unpack(saved: _Saved) -> torch.Tensor:
    assert saved.tensor is not None, "the pass was recorded without holding tensors"
    return saved.tensor


def _sequence() -> int:
    return int(torch._C._autograd._get_sequence_nr())


@contextmanager
def _segments_marked(model: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Let `run` take the place of transformers' checkpointing function on every module that has one."""
    name = "_gradient_checkpointing_func"
    changed = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]
    try:
        for module, function in changed:
            # transformers binds the arguments of torch.utils.checkpoint.checkpoint, whose own default is reentrant
            reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
            setattr(module, name, partial(run, reentrant))
        yield
    finally:
        for module, function in changed:
            setattr(module, name, function)
