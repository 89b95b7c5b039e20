"""Model replicas trained by several processes, under torch's DistributedDataParallel.

Other ways of distributing a run, under which ranks cannot change, are rejected before training.

DDP inspects the parameters once, when it wraps the model: which of them train, and the sizes of their gradients. So its
reducer is rebuilt after each change of ranks. Work done by the first process alone, such as the probe, bypasses DDP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments

from ...common.errors import BudgetError, ProcessError, UnsupportedError
from ...common.processes import Processes
from ...cost.budget import Budget
from ...cost.recording import BatchShape
from ...lora.targets import PLAN_FIRST, TargetModule, wrappers_of

STATELESS_HOOKS = ("allreduce_hook", "bf16_compress_hook", "fp16_compress_hook")
"""Communication hooks of torch that do not depend on the shapes of gradients, and so still work after a change."""

_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
"""Module of these hooks; a Trainer does not load it."""

WAY_OUT = "Start one process per device with torchrun, to train under DistributedDataParallel."

_REASONS = {
    "DataParallel": f"nn.DataParallel copies adapters anew in each step, so ranks cannot change. {WAY_OUT}",
    "DeepSpeedEngine": f"DeepSpeed keeps parameters in flat buffers of fixed size, so ranks cannot change. {WAY_OUT} "
    f"{PLAN_FIRST}",
    "FullyShardedDataParallel": f"FSDP shards the adapters, so ranks cannot change. {WAY_OUT} Your own loop can shard "
    f"the frozen base alone (docs/compatibility.md). {PLAN_FIRST}",
}


class Replicas:
    """Replicas of one model, one in each process. With a single process, all methods do nothing.

    Args:
        wrapper: the DDP around the model of this process; None without DDP.
        processes: the processes that hold the replicas.

    Attributes:
        wrapper: as above, as `processes`.
        processes: as above.
        sharded: True if each process holds a shard of the frozen model (FSDP2), so that all must run it together.
    """

    processes: Processes
    wrapper: DistributedDataParallel | None

    def __init__(self, wrapper: DistributedDataParallel | None = None, processes: Processes | None = None) -> None:
        self.wrapper, self.processes = wrapper, processes or Processes()
        self._had_rebuilt = False
        self.sharded: bool = wrapper is not None and any(isinstance(p, DTensor) for p in wrapper.module.parameters())

    @classmethod
    def of(cls, model: nn.Module) -> Replicas:
        """Return the replicas of a model as called by its loop, with all its wrappers.

        Raises:
            UnsupportedError: ranks cannot change inside one of them; see `check_wrappers`.
        """
        wrappers = wrappers_of(model)
        check_wrappers(wrappers)
        wrapper = next((one for one in wrappers if isinstance(one, DistributedDataParallel)), None)
        return cls(wrapper, Processes.of_this_run() if wrapper is not None else None)

    def check(self) -> None:
        """Raise UnsupportedError if there are other processes, and no wrapper to reduce their gradients."""
        if self.wrapper is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UnsupportedError(
                f"{dist.get_world_size()} processes are running, but the model is not wrapped in "
                "DistributedDataParallel, so each would train alone. Pass the wrapped model to TrainingRun; a "
                "Trainer on a CPU wraps it with use_cpu=True. FSDP2 around whole adapters needs this too, since "
                "it does not reduce gradients of ignored parameters (docs/compatibility.md)."
            )

    def inside(self, model: nn.Module) -> nn.Module:
        """Return the model inside DDP; the model itself without DDP."""
        return model if self.wrapper is None else self.wrapper.module

    # Memory -----------------------------------------------------------------------------------------------------------

    @property
    def gradients_stay(self) -> bool:
        """True if gradients are views of DDP's buckets, which are always allocated."""
        return self.wrapper is not None and bool(self.wrapper.gradient_as_bucket_view)

    def bucket_copies(self, *, several: bool) -> float:
        """Return the number of further copies of all gradients in DDP: in buckets, and in messages of a rounding hook.

        Args:
            several: True if a step takes several passes. Gradients are then separate from their buckets until the last
                one.
        """
        if self.wrapper is None:
            return 0.0
        return (0.0 if self.gradients_stay and not several else 1.0) + (0.5 if self.wrapper._comm_hooks else 0.0)

    @property
    def all_passes_alike(self) -> bool:
        """True if DDP assumes identical passes (`static_graph`), with gradients reduced in each of them."""
        return self.wrapper is not None and bool(self.wrapper.static_graph)

    @property
    def message_bytes(self) -> int:
        """Bytes of DDP's message with the model's buffers before a forward pass.

        A separate thread releases it, so it may outlive the beginning of the pass, or all of it.
        """
        if self.wrapper is None or not self.wrapper.broadcast_buffers:
            return 0
        return sum(int(buffer.nbytes) for buffer in self.wrapper.module.buffers())

    def begin_measuring(self) -> int:
        """Return the bytes of DDP's buckets, excluding gradients inside them, at the start of a measured step."""
        if self.wrapper is None:
            return 0
        self._had_rebuilt = self.wrapper._has_rebuilt_buckets
        inside = [p for p in self.wrapper.module.parameters() if self.gradients_stay and p.grad is not None]
        return trained_bytes(self.wrapper) - sum(int(parameter.nbytes) for parameter in inside)

    @property
    def on_this_device(self) -> int:
        """Number of processes that share this process's device: all of a host unless it is an accelerator."""
        shared = self.wrapper is not None and self.wrapper.device_type == "cpu"
        return self.processes.on_this_machine if shared else 1

    # Agreement of all processes ---------------------------------------------------------------------------------------

    def largest_shape(self, shapes: Iterable[BatchShape]) -> BatchShape:
        """Return the largest number of rows and the largest length of these shapes, in any process."""
        shape = BatchShape(0, 0)
        for each in shapes:
            shape = shape.joined(each)
        return BatchShape(*map(int, self.processes.most(shape.rows, shape.length)))

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Reduce gradients across processes only in the last part of a step."""
        return nullcontext() if last or self.wrapper is None else self.wrapper.no_sync()

    def together(self, *numbers: float) -> list[float]:
        """Return the maximum of each number over the processes of a sharded model; otherwise the numbers unchanged."""
        return self.processes.most(*numbers) if self.sharded else list(numbers)

    def highest(self, peak: int) -> int:
        """Return the highest peak of all processes, in bytes, given this one's peak of the step."""
        wrapper = self.wrapper
        if wrapper is None:
            return peak
        if wrapper._has_rebuilt_buckets and not self._had_rebuilt and wrapper.device_type != "cuda":
            # DDP has reordered its buckets. The meter saw the new ones, but not the release of the old ones.
            peak -= trained_bytes(wrapper)
        return int(self.processes.most(peak)[0])

    def check_again(self, step: int, limit: Budget) -> None:
        """Raise BudgetError if other processes are in the middle of a step that this one would repeat.

        Args:
            step: its number, from 1.
            limit: the new limit on the cost of a plan.
        """
        if self.wrapper is not None:
            raise BudgetError(
                f"Step {step} ran out of memory in process {self.processes.rank} of {self.processes.count}, and "
                f"the others cannot repeat it. Resume from the last checkpoint with budget='{limit}'."
            )

    # Changes of ranks -------------------------------------------------------------------------------------------------

    def changed(self, targets: Sequence[TargetModule], step: int) -> None:
        """Notify DDP of new ranks, and compare the replicas.

        Args:
            targets: the target modules of the model.
            step: the number of optimizer steps done.

        Raises:
            ProcessError: see `compare`.
        """
        if self.wrapper is not None:
            rebuild_reducer(self.wrapper)
        self.compare(targets, step)

    def compare(self, targets: Sequence[TargetModule], step: int) -> None:
        """Compare ranks and adapters of all processes, bit for bit.

        Raises:
            ProcessError: they differ; raised in all processes.
        """
        if self.wrapper is None:
            return
        digests = self.processes.of_each(digest_of(targets))
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise ProcessError(
                f"After step {step} the adapters of process {', '.join(map(str, different[:8]))} differ from "
                "those of process 0, so gradients are no longer averaged correctly. Do not use this adapter. "
                "Resume from an earlier checkpoint, on devices of one kind; if it happens again, please report "
                "it."
            )

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let this process run the model alone, without communication by DDP or gathering by accelerate."""
        wrapper = self.wrapper
        if wrapper is None:
            yield
            return
        states = [one for one in (PartialState._shared_state, AcceleratorState._shared_state) if one]
        before = [dict(state) for state in states]
        copies = wrapper.find_unused_parameters or wrapper.static_graph

        def forward(*inputs: Any, **options: Any) -> Any:
            outputs = wrapper.module(*inputs, **options)
            return tree_map_only(torch.Tensor, _copied, outputs) if copies else outputs

        wrapper.forward = forward  # type: ignore[method-assign]
        for state in states:
            state.update(distributed_type=DistributedType.NO, num_processes=1)
        try:
            yield
        finally:
            del wrapper.forward
            for state, values in zip(states, before, strict=True):
                state.update(values)


def _copied(output: torch.Tensor) -> torch.Tensor:
    """Clone an output, as DDP does to find parameters without gradients; the copy takes memory."""
    return output.clone() if output.grad_fn is not None else output


def trained_bytes(model: nn.Module) -> int:
    """Return the bytes of all trained parameters, equal to those of their gradients."""
    return sum(int(parameter.nbytes) for parameter in model.parameters() if parameter.requires_grad)


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Make DDP inspect the parameters again, as after unpickling: which train, and their sizes."""
    hooks = list(wrapper._comm_hooks)
    wrapper.__setstate__(wrapper.__getstate__())  # type: ignore[no-untyped-call]
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        # Its first backward pass reduces gradients only at the end, for which it must be the first one again.
        wrapper._static_graph_delay_allreduce_enqueued = False
    for hook, state in hooks:
        dist._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]


@torch.no_grad()
def digest_of(targets: Sequence[TargetModule]) -> str:
    """Return a checksum of the ranks and the adapters of target modules."""
    digest = hashlib.sha256()
    for target in targets:
        digest.update(f"{target.name} {target.rank};".encode())
        for weight in (target.weight_a, target.weight_b):
            digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_arguments(args: TrainingArguments) -> None:
    """Reject Trainer settings under which ranks cannot be changed.

    Raises:
        UnsupportedError: the run uses nn.DataParallel, DeepSpeed, FSDP, parallelism other than data parallelism, or
            activation offloading.
    """
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"One process would train on {args.n_gpu} GPUs: {_REASONS['DataParallel']} Alternatively, set "
            "CUDA_VISIBLE_DEVICES to one GPU."
        )
    if args.deepspeed_plugin:
        raise UnsupportedError(_REASONS["DeepSpeedEngine"])
    if args.fsdp:
        raise UnsupportedError(_REASONS["FullyShardedDataParallel"])
    for name in ("tp_size", "cp_size", "sp_size", "dp_shard_size"):
        size = getattr(getattr(args, "parallelism_config", None), name, None) or 1
        if size > 1:
            raise UnsupportedError(
                f"parallelism_config has {name}={size}, but ranks can change only if each process has the whole "
                f"model and whole texts. {WAY_OUT} {PLAN_FIRST}"
            )
    if getattr(args, "activation_offloading", False):
        raise UnsupportedError(
            "With activation_offloading=True the tensors of a step leave the device, so its memory cannot be "
            "measured before training. Set it to False: rankpilot checkpoints layers, and streams the base."
        )


def check_wrappers(wrappers: Sequence[nn.Module]) -> None:
    """Reject wrappers of a model under which ranks cannot be changed.

    Args:
        wrappers: the model as called by its loop, then each wrapped module in turn.

    Raises:
        UnsupportedError: it is wrapped by nn.DataParallel, DeepSpeed, FSDP or FSDP2, or by DistributedDataParallel with
            its own process group, a stateful communication hook, or anything else tied to the shapes of gradients.
    """
    for module in wrappers:
        for kind in type(module).__mro__:
            if kind.__name__ in _REASONS:
                raise UnsupportedError(_REASONS[kind.__name__])
        if isinstance(module, DistributedDataParallel):
            _check_ddp(module)


def check_one_device(model: nn.Module) -> None:
    """Reject a model with trainable parameters on several devices, since only one would be watched.

    Raises:
        UnsupportedError: there are several, as with `device_map="auto"` on several GPUs.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters() if parameter.requires_grad})
    if len(devices) > 1:
        raise UnsupportedError(
            f"Trainable parameters are on several devices ({', '.join(devices)}), but the budget applies to "
            f"one. Load the model on one device, such as device_map={{'': 0}}. {WAY_OUT}"
        )


def _check_ddp(wrapper: DistributedDataParallel) -> None:
    name = "DistributedDataParallel"
    if wrapper.process_group is not dist.group.WORLD:
        raise UnsupportedError(
            f"{name} has its own process_group, but ranks change in all processes. Drop process_group."
        )
    if wrapper.mixed_precision is not None or wrapper._delay_all_reduce_params or wrapper._use_python_reducer:
        raise UnsupportedError(
            f"{name} uses mixed_precision, delay_all_reduce_named_params or the Python reducer, which fix the "
            "shapes of gradients. Drop them; autocast replaces mixed_precision."
        )
    hooks = [hook for hook, _ in wrapper._comm_hooks]
    named = wrapper._get_ddp_logging_data().get("comm_hook", "")  # type: ignore[no-untyped-call]
    unknown = [hook.__qualname__ for hook in hooks if hook.__module__ != _HOOKS or hook.__name__ not in STATELESS_HOOKS]
    if named and not hooks:
        unknown.append(named)
    if unknown:
        raise UnsupportedError(
            f"Communication hook {unknown[0]} of {name} may fix the shapes of gradients, which change with "
            f"ranks. Drop it, or use one of {', '.join(STATELESS_HOOKS)}."
        )
