"""Record training steps: track modules, storages and autograd's graph through a forward and a backward pass.

A gradient with two paths, such as into a layer and around it, waits for both. A plan whose graph has only one of them
frees it after that one. The recorder therefore also tracks the nodes that hold each gradient.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_iter

from ...common.errors import UnsupportedError
from ...lora.routed_rows import parts_of
from ...lora.targets import TargetModule
from ..batch_shape import Batch
from ..cost import ModuleSet
from ..recording import NEVER, Phases, Recording, Segment
from ..training_step import CHECKPOINT, LossFunction, model_loss, requires_grad_hook, segments_marked
from .live_storages import LiveStorages

_FOREIGN_HOOKS = (
    "The training step saves tensors through custom hooks, such as those of torch.utils.checkpoint "
    "in its loss or the model's own code, or of torch.autograd.graph.save_on_cpu, so its memory "
    "cannot be measured. Remove them (gradient_checkpointing=True is supported), or pass a budget in "
    "parameters ('300k params')."
)

AGREE: ContextVar[Callable[[Callable[[], Recording]], Recording] | None] = ContextVar("AGREE", default=None)
"""Replaces a recording by that of the first of several processes that run a model together. Recordings differ slightly
with threads that free what they send, but all processes must take the same decisions. None elsewhere.
"""


@dataclass(frozen=True)
class _Packed:
    """Placeholder that the saved-tensor hooks put into the graph for a tensor."""

    serial: int | None
    tensor: torch.Tensor | None


@dataclass
class _Stretch:
    """A stretch of the forward pass in which one module runs, excluding modules inside it.

    Attributes:
        time: start time.
        sequence: autograd's sequence number at that time; nodes of the stretch have at least this number.
        name_index: index of the module's name.
        target_index: index of the innermost running target module, -1 for none.
        depth: number of nested running modules.
    """

    time: int
    sequence: int
    name_index: int
    target_index: int
    depth: int


class Recorder:
    """Records training steps of one PEFT model.

    Args:
        model: the model.
        targets: its target modules.
        loss: the loss of a batch; by default the one returned by the model.
        outside: trained parameters outside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[TargetModule],
        loss: LossFunction | None = None,
        outside: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model = model
        self.loss: LossFunction = loss or model_loss(model)
        named = dict(model.named_modules())
        self.names: tuple[str, ...] = tuple(named)
        self.parameters: list[nn.Parameter] = [*model.parameters(), *outside]
        self.checkpointing: list[nn.Module] = [module for module in named.values() if CHECKPOINT in vars(module)]
        self.name_index: dict[int, int] = {id(module): index for index, module in enumerate(named.values())}
        self.target_index: dict[int, int] = {
            id(part): index for index, target in enumerate(targets) for part in parts_of(target.layer)
        }
        self.target_of_parameter: dict[int, int] = {
            id(p): i for i, target in enumerate(targets) for p in target.parameters.values()
        }
        self.every_plan: int = 1 << len(targets)  # the bit for everything that trains under any plan
        self.always_trains = {i: t.layer for i, t in enumerate(targets) if _requires_grad_always(t.layer)}

    def step(self, batch: Batch, *, like: Recording | None = None) -> Recording:
        """Record a forward and a backward pass, and clear the gradients; `freed_if_unsaved` equals `freed`.

        Args:
            batch: input of the loss.
            like: a recording of the same operations; only sizes and times are then recorded, which is faster.

        Raises:
            UnsupportedError: the model returns no loss.
            ValueError: the forward pass runs another number of operations than `like`.
        """
        return _Run(self, batch, bool(like)).record(save=True, like=like)

    def forward(self, batch: Batch) -> Recording:
        """Record a forward pass without saved tensors.

        Raises:
            UnsupportedError: the model returns no loss.
        """
        return _Run(self, batch, sizes_alone=True).record(save=False)

    def lifetimes(self, recording: Recording, batch: Batch) -> Recording:
        """Fill in `freed_if_unsaved` with a forward pass of the same batch without saved tensors.

        Raises:
            UnsupportedError: that pass ran other operations.
        """
        unsaved = self.forward(batch)
        count = len(unsaved.created)
        if not np.array_equal(unsaved.created, recording.created[recording.created <= recording.forward_end]):
            raise UnsupportedError(
                f"{type(self.model).__name__} runs different operations each time on the same batch, so its "
                "memory cannot be predicted. Disable randomness in its structure (layer drop, routing noise)."
            )
        freed = np.concatenate([unsaved.freed, recording.freed[count:]])
        for serial, time in recording.on_context_until.items():  # the context holds these in both passes
            freed[serial] = min(freed[serial], time)
        needed = dict(recording.needed)
        saved_in_segments = {serial for segment in recording.segments for serial in segment.saved}
        for serial in np.flatnonzero(freed < recording.freed).tolist():
            if serial in needed or serial in saved_in_segments:
                continue
            if recording.target_index[serial] >= 0:
                # It is on a graph that does not reach the loss, such as that of DoRA's detached norm.
                needed[serial] = 1 << int(recording.target_index[serial])
            else:
                freed[serial] = recording.freed[serial]
        return replace(recording, freed_if_unsaved=freed, needed=needed)


class _Run:
    """The state of one recording while the model runs."""

    def __init__(self, recorder: Recorder, batch: Batch, sizes_alone: bool = False) -> None:
        self._recorder, self._batch, self._sizes_alone = recorder, batch, sizes_alone
        self._mode = LiveStorages(self._note_created, self._note_freed)
        # One entry per storage.
        self._created: list[int] = []
        self._sizes: list[int] = []
        self._freed: list[int] = []
        self._stretch_of: list[_Stretch] = []
        self._segment_index: list[int] = []
        self._uses_saved: list[bool] = []
        self._needed: dict[int, ModuleSet] = {}
        self._needed_later: dict[int, Phases] = {}
        self._on_context_until: dict[int, int] = {}
        # The forward pass and the current position in it; the backward pass revisits the stretch of each node.
        self._stretch = _Stretch(0, 0, 0, -1, 0)
        self._stretches, self._sequences = [self._stretch], [0]  # sequence numbers of the stretches
        self._callers: list[_Stretch] = []
        self._segments: list[Segment] = []
        self._segment = -1
        self._leaves: list[torch.Tensor] = []  # outputs and gradients that leaves would keep alive
        # The backward pass.
        self._flow: dict[int, ModuleSet] | None = None  # modules of each node, by sequence number
        self._saving: set[int] = set()  # sequence numbers of nodes that saved a tensor through the hooks
        self._added_at: dict[int, int] = {}
        self._node_modules: ModuleSet = 0
        self._node_uses_saved = False

    def record(self, *, save: bool, like: Recording | None = None) -> Recording:
        """Run the step; without `save`, autograd saves nothing and only the forward pass runs; see `Recorder.step`."""
        torch.clear_autocast_cache()  # it may hold factors of other ranks
        with self._mode, self._watching(), segments_marked(self._recorder.checkpointing, self._run_segment):
            with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, save=save), _unpack):
                loss = self._recorder.loss(self._batch)
            torch.clear_autocast_cache()  # training leaves autocast here, but the caller's context may last longer
            forward_end = self._mode.now
            if like and forward_end != like.forward_end and not AGREE.get():  # which all processes must reach
                raise ValueError("the forward pass runs other operations")
            gradients = self._backward(loss) if save else {}
        freed = np.array(self._freed, dtype=np.int64)
        for parameter in self._recorder.parameters:
            parameter.grad = None
        recording = Recording(
            sizes=np.array(self._sizes, dtype=np.int64),
            created=np.array(self._created, dtype=np.int64),
            freed=freed,
            freed_if_unsaved=freed,
            name_index=np.array([stretch.name_index for stretch in self._stretch_of], dtype=np.int64),
            target_index=np.array([stretch.target_index for stretch in self._stretch_of], dtype=np.int64),
            segment_index=np.array(self._segment_index, dtype=np.int64),
            needed=self._needed,
            needed_later=self._needed_later,
            on_context_until=self._on_context_until,
            uses_saved=np.array(self._uses_saved, dtype=np.bool_),
            gradients=gradients,
            added_at=self._added_at,
            names=self._recorder.names,
            forward_end=forward_end,
            segments=tuple(self._segments),
        )
        agree = AGREE.get()
        return agree(lambda: recording) if agree else recording

    # Storages -----------------------------------------------------------------------------------------------------

    def _note_created(self, serial: int, size: int) -> None:
        self._created.append(self._mode.now)
        self._sizes.append(size)
        self._freed.append(NEVER)
        if self._flow is not None:
            self._follow_backward(self._flow)
            self._needed[serial] = self._node_modules
        self._uses_saved.append(self._node_uses_saved)
        self._stretch_of.append(self._stretch)
        self._segment_index.append(self._segment)

    def _note_freed(self, serial: int) -> None:
        self._freed[serial] = self._mode.now

    # The forward pass ---------------------------------------------------------------------------------------------

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Track the running module."""
        handles = [layer.register_forward_hook(self._as_leaf) for layer in self._recorder.always_trains.values()]
        if not self._sizes_alone:
            handles.append(register_module_forward_pre_hook(self._enter))
            handles.append(register_module_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._leaves.clear()

    def _as_leaf(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        """Hold a module's output and gradient as a leaf would, since an unadapted module's output is a leaf."""
        leaf: torch.Tensor = _Leaf.apply(output, self._leaves)  # type: ignore[no-untyped-call]
        return leaf

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self._callers.append(self._stretch)
        name_index = self._recorder.name_index.get(id(module), self._stretch.name_index)
        target_index = self._recorder.target_index.get(id(module), self._stretch.target_index)
        self._begin_stretch(_Stretch(self._mode.now, _sequence(), name_index, target_index, len(self._callers)))

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._begin_stretch(replace(self._callers.pop(), time=self._mode.now, sequence=_sequence()))

    def _begin_stretch(self, stretch: _Stretch) -> None:
        self._stretch = stretch
        self._stretches.append(stretch)
        self._sequences.append(stretch.sequence)

    def _run_segment(
        self, reentrant: bool, layer: nn.Module | None, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Run a checkpointed segment without checkpointing, and record it under the name of its layer."""
        inputs = self._serials((arguments, function.keywords if isinstance(function, partial) else None))
        start, sequence, self._segment = self._mode.now, _sequence(), len(self._segments)
        name = self._recorder.names[self._recorder.name_index.get(id(layer), self._stretch.name_index)]
        output = function(*arguments)
        self._segment = -1
        sequences, outputs = (sequence, _sequence()), self._serials(output)
        self._segments.append(Segment(start, self._mode.now, inputs, outputs, sequences, reentrant, name))
        return output

    def _serials(self, values: Any) -> tuple[int, ...]:
        serials = [self._mode.serial(value) for value in tree_iter(values) if isinstance(value, torch.Tensor)]
        return tuple(dict.fromkeys(serial for serial in serials if serial is not None))

    def _pack(self, tensor: torch.Tensor, *, save: bool) -> _Packed:
        # A node that saved its own output with its grad_fn would keep itself alive forever.
        tensor = tensor.data
        return _Packed(self._mode.serial(tensor), tensor if save else None)

    # The backward pass --------------------------------------------------------------------------------------------

    def _backward(self, loss: torch.Tensor) -> dict[int, int]:
        """Run the backward pass and return `Recording.gradients`."""
        holders = None
        if not self._sizes_alone:
            flow = flow_from(loss, self._trains)
            self._find_saved(flow)
            holders = GradientHolders(flow, self._mode.serial, lambda: self._mode.now)
            self._flow = {node._sequence_nr(): modules for node, modules in flow.items()}
            del flow  # it would keep the graph alive
        trains = [parameter for parameter in self._recorder.parameters if parameter.requires_grad]
        added = self._note_added
        handles = [each.register_post_accumulate_grad_hook(added) for each in trains]  # type: ignore[no-untyped-call]
        with torch.autocast("cpu" if loss.is_meta else loss.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
        for handle in handles:
            handle.remove()
        if holders:
            self._needed_later = holders.needed_later(self._created, self._freed, self._needed)
        gradients = {}
        for parameter in self._recorder.parameters:
            if parameter.grad is not None:
                serial = self._mode.serial(parameter.grad)
                if serial is not None:
                    gradients[serial] = self._recorder.target_of_parameter.get(id(parameter), -1)
        return gradients

    def _note_added(self, parameter: torch.Tensor) -> None:
        serial = None if parameter.grad is None else self._mode.serial(parameter.grad)
        if serial is not None:
            self._added_at[serial] = self._mode.now

    def _trains(self, leaf: torch.Tensor) -> ModuleSet:
        target = self._recorder.target_of_parameter.get(id(leaf))
        return self._recorder.every_plan if target is None or target in self._recorder.always_trains else 1 << target

    def _find_saved(self, flow: dict[Any, ModuleSet]) -> None:
        """Record the storages saved by the nodes, and the modules they are saved for."""
        for node in flow:
            sequence = node._sequence_nr()
            segment = self._segment_of(sequence)
            for packed, modules in saved_by(node, flow):
                if isinstance(packed, torch.Tensor) and packed.dim() == 0 and self._mode.serial(packed) is None:
                    continue  # a Python number, saved without hooks
                if not isinstance(packed, _Packed):
                    raise UnsupportedError(_FOREIGN_HOOKS)
                self._saving.add(sequence)
                if packed.serial is not None:
                    saved = self._needed if segment < 0 else self._segments[segment].saved
                    saved[packed.serial] = saved.get(packed.serial, 0) | modules
            for tensor in kept_on_context(node):
                serial = self._mode.serial(tensor)
                if serial is None:
                    continue
                until = max(self._on_context_until.get(serial, 0), self._parent_left_at(sequence))
                self._on_context_until[serial] = until
                # Non-reentrant checkpointing frees only tensors visible to the hooks.
                held = segment < 0 or not self._segments[segment].reentrant
                saved = self._needed if held else self._segments[segment].saved
                saved[serial] = saved.get(serial, 0) | flow[node]

    def _follow_backward(self, flow: dict[int, ModuleSet]) -> None:
        """Switch stretch, segment and modules to the running node; nodes that sum gradients have no effect."""
        node = torch._C._current_autograd_node()
        sequence = None if node is None else node._sequence_nr()
        if sequence not in flow or node.name().endswith("AccumulateGrad"):
            return
        self._node_modules = flow[sequence]
        self._node_uses_saved = sequence in self._saving
        index = bisect_right(self._sequences, sequence) - 1
        self._stretch = self._stretches[max(index, 0)]
        self._segment = self._segment_of(sequence)

    def _parent_left_at(self, sequence: int) -> int:
        """Return the return time of a node's parent module; until then its local variables hold the result."""
        index = bisect_right(self._sequences, sequence)
        outside = self._stretches[index - 1].depth - 2
        return next((stretch.time for stretch in self._stretches[index:] if stretch.depth <= outside), NEVER)

    def _segment_of(self, sequence: int) -> int:
        """Return the checkpointed segment of a node, -1 for none."""
        index = bisect_right(self._segments, sequence, key=lambda segment: segment.sequences[0]) - 1
        return index if index >= 0 and sequence < self._segments[index].sequences[1] else -1


class _Leaf(torch.autograd.Function):
    """The identity; like a leaf of the graph, it keeps its tensor and gradient alive after the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
        ctx.leaves = leaves
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.leaves += [*ctx.saved_tensors, gradients[0]]
        return gradients[0], None


def _requires_grad_always(layer: nn.Module) -> bool:
    """True if `enable_input_require_grads` makes a module's output require gradients even without an adapter."""
    return any(map(requires_grad_hook, layer._forward_hooks.values()))


def _unpack(saved: _Packed) -> torch.Tensor:
    if saved.tensor is None:  # a loss that calls torch.autograd.grad
        raise UnsupportedError("The loss computes gradients itself, so the memory of a step cannot be recorded.")
    return saved.tensor


def _sequence() -> int:
    return int(torch._C._autograd._get_sequence_nr())


class GradientHolders:
    """Watches the nodes of a graph during its backward pass.

    Keeps no references to nodes, which would keep their contexts alive.

    Args:
        flow: the modules of each node; see `flow_from`.
        serial: returns the serial number of a tensor's storage, None if created outside the step.
        now: returns the time.
    """

    def __init__(
        self, flow: dict[Any, ModuleSet], serial: Callable[[torch.Tensor], int | None], now: Callable[[], int]
    ) -> None:
        self._serial, self._now = serial, now
        numbers = {node: number for number, node in enumerate(flow)}
        self._modules = list(flow.values())
        self._next = [[numbers[to] for to, _ in node.next_functions if to in numbers] for node in flow]
        self._ways_in = Counter(number for following in self._next for number in following)
        self._order: list[int] = []  # of the nodes that ran
        self._starts: list[int] = []  # of these, in the same order
        self._incoming: dict[int, set[int]] = {}
        self._handles = [node.register_prehook(partial(self._enter, number)) for node, number in numbers.items()]

    def _enter(self, number: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        serials = (self._serial(gradient) for gradient in gradients if gradient is not None)
        self._incoming[number] = {serial for serial in serials if serial is not None}
        self._order.append(number)
        self._starts.append(self._now())

    def needed_later(
        self, created: Sequence[int], freed: Sequence[int], needed: dict[int, ModuleSet]
    ) -> dict[int, Phases]:
        """Stop watching, and return `Recording.needed_later`; `needed` is `Recording.needed`."""
        for handle in self._handles:
            handle.remove()
        held = self._held(created, freed)
        found = {serial: _shrinking(held[serial], freed[serial], needed.get(serial, 0)) for serial in held}
        return {serial: phases for serial, phases in found.items() if phases}

    def _held(self, created: Sequence[int], freed: Sequence[int]) -> dict[int, list[tuple[int, ModuleSet]]]:
        """Return until when nodes hold each backward storage, and their modules, by serial number."""
        held: dict[int, list[tuple[int, ModuleSet]]] = {}
        start_of = dict(zip(self._order, self._starts, strict=True))
        ends = [*self._starts[1:], self._now()]
        for number, start, end in zip(self._order, self._starts, ends, strict=True):
            new = range(bisect_right(created, start), bisect_right(created, end))
            for serial in self._incoming[number].union(new):
                if freed[serial] <= end and serial not in held:  # this node alone holds it
                    continue
                holders = held.setdefault(serial, [])
                holders.append((end, self._modules[number]))
                for to in self._next[number]:
                    # The only gradient of a node arrives unchanged. Others may have been summed.
                    if serial not in self._incoming.get(to, ()) and self._ways_in[to] > 1:
                        holders.append((start_of.get(to, freed[serial]), self._modules[to]))
        return held


def _shrinking(holders: list[tuple[int, ModuleSet]], freed: int, needed: ModuleSet) -> Phases:
    """Return the times at which nodes release a storage, shrinking its modules; empty if something else holds it."""
    holders.sort()
    if holders[-1][0] < freed:
        return ()
    phases: list[tuple[int, ModuleSet]] = []
    rest = 0
    for (end, _), (later, modules) in reversed([*pairwise(holders)]):
        rest |= modules & needed
        if end < min(later, freed) and rest:
            phases.append((end, rest))
    kept = []
    for end, rest in reversed(phases):
        if rest != needed:
            kept.append((end, rest))
            needed = rest
    return tuple(kept)


_SAVED_FOR: dict[str, dict[str, int]] = {
    "MmBackward0": {"self": 1, "mat2": 0},
    "BmmBackward0": {"self": 1, "mat2": 0},
    "MvBackward0": {"self": 1, "vec": 0},
    "AddmmBackward0": {"mat1": 2, "mat2": 1},
    "BaddbmmBackward0": {"batch1": 2, "batch2": 1},
    "MulBackward0": {"self": 1, "other": 0},
    "DivBackward0": {"self": 1},
    "LinearBackward0": {"input": 1, "weight": 0},
}
"""Operations that save a tensor for the gradient of one input: maps the name of the saved tensor to the index of that
input (tools/autograd/derivatives.yaml of PyTorch). Any other operation counts as saving for all its inputs, which can
only overestimate.
"""


def flow_from(loss: torch.Tensor, trains: Callable[[torch.Tensor], ModuleSet]) -> dict[Any, ModuleSet]:
    """Map each node in the graph of `loss` to the modules of which at least one must be adapted for it to exist.

    `trains` returns the modules of a leaf of the graph.
    """
    flow: dict[Any, ModuleSet] = {}
    stack = [loss.grad_fn] if loss.grad_fn is not None else []
    while stack:
        node = stack[-1]
        if node in flow:
            stack.pop()
            continue
        inputs = [source for source, _ in node.next_functions if source is not None]
        waiting = [source for source in inputs if source not in flow]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        modules = trains(node.variable) if hasattr(node, "variable") else 0
        for source in inputs:
            modules |= flow[source]
        flow[node] = modules
    return flow


def saved_by(node: Any, flow: dict[Any, ModuleSet]) -> Iterator[tuple[Any, ModuleSet]]:
    """Yield each value saved by a node, as packed by the saved-tensor hooks, and the modules it is saved for."""
    saved_for = _SAVED_FOR.get(node.name(), {})
    sources = node.next_functions
    for attribute in _saving_attributes(node.__class__):
        saved = getattr(node, attribute)
        number = saved_for.get(attribute.removeprefix("_raw_saved_"))
        modules = flow[node]
        if number is not None and number < len(sources):
            modules = flow.get(sources[number][0], 0)
        for entry in saved if isinstance(saved, tuple) else (saved,):
            if entry.data is not None:
                yield entry.data, modules


def kept_on_context(node: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors a Python function keeps on its context, invisible to hooks."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        yield from (value for value in tree_iter(vars(node)) if isinstance(value, torch.Tensor))


@cache
def _saving_attributes(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
