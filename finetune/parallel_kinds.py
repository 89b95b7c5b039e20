"""Ways of spreading a run over devices and processes under which ranks cannot change: refused before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from ..errors import UnsupportedError

STATELESS_HOOKS = ("allreduce_hook", "bf16_compress_hook", "fp16_compress_hook")
"""Communication hooks of torch that know nothing of the shapes of gradients, and so go on with others."""

_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
"""Where they are; a Trainer does not load it."""

WAY_OUT = "Start one process for each device with torchrun, which trains under DistributedDataParallel."

_FSDP = "FSDP keeps parameters in flat buffers of a fixed size; FSDP2 cannot load checkpoints with other ranks"

_REASONS = {
    "DataParallel": "nn.DataParallel makes other copies of the adapters in each step",
    "DeepSpeedEngine": "DeepSpeed keeps parameters in flat buffers of a fixed size",
    "FullyShardedDataParallel": _FSDP,
    "FSDPModule": _FSDP,
}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse settings of a Trainer under which ranks cannot be changed.

    Raises:
        UnsupportedError: the run uses nn.DataParallel, DeepSpeed, FSDP, another kind of parallelism than that of data,
            or activation offloading.
    """
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"One process would train on {args.n_gpu} GPUs: {_REASONS['DataParallel']}. {WAY_OUT} Or set "
            "CUDA_VISIBLE_DEVICES to one."
        )
    if args.deepspeed_plugin:
        raise UnsupportedError(f"{_REASONS['DeepSpeedEngine']}, so ranks cannot change. {WAY_OUT}")
    if args.fsdp:
        raise UnsupportedError(f"{_FSDP}, so ranks cannot change. {WAY_OUT}")
    for name in ("tp_size", "cp_size", "sp_size", "dp_shard_size"):
        size = getattr(getattr(args, "parallelism_config", None), name, None) or 1
        if size > 1:
            raise UnsupportedError(
                f"parallelism_config has {name}={size}: ranks can be changed where each process has the whole model "
                f"and whole texts. {WAY_OUT}"
            )
    if getattr(args, "activation_offloading", False):
        raise UnsupportedError(
            "With activation_offloading=True the tensors of a step leave the device, so its memory cannot be measured "
            "before training. Leave it out, or use gradient checkpointing, which is measured."
        )


def check_wrappers(wrappers: Sequence[nn.Module]) -> None:
    """Refuse wrappers of a model under which ranks cannot be changed.

    Args:
        wrappers: the model as its loop calls it, what it wraps, and so on.

    Raises:
        UnsupportedError: it is wrapped by nn.DataParallel, DeepSpeed, FSDP or FSDP2, or by DistributedDataParallel with
            a group of its own, a communication hook with a state, or another thing that knows the shapes of gradients.
    """
    for module in wrappers:
        for kind in type(module).__mro__:
            if kind.__name__ in _REASONS:
                raise UnsupportedError(f"{_REASONS[kind.__name__]}, so ranks cannot change. {WAY_OUT}")
        if isinstance(module, DistributedDataParallel):
            _check_ddp(module)


def check_one_device(model: nn.Module) -> None:
    """Refuse a model whose trainable parameters are on several devices, of which one alone would be watched.

    Raises:
        UnsupportedError: they are, as `device_map="auto"` spreads them where there are several GPUs.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters() if parameter.requires_grad})
    if len(devices) > 1:
        raise UnsupportedError(
            f"What trains is on several devices ({', '.join(devices)}), and the budget would be that of one. Load the "
            f"model on one device, such as device_map={{'': 0}}. {WAY_OUT}"
        )


def _check_ddp(wrapper: DistributedDataParallel) -> None:
    name = "DistributedDataParallel"
    if wrapper.process_group is not dist.group.WORLD:
        raise UnsupportedError(f"{name} has a process_group of its own, and ranks change in all: leave it out.")
    if wrapper.mixed_precision is not None or wrapper._delay_all_reduce_params or wrapper._use_python_reducer:
        raise UnsupportedError(
            f"{name} was given mixed_precision, delay_all_reduce_named_params or the Python reducer, which keep the "
            "shapes of gradients: leave them out. Autocast does what mixed_precision does."
        )
    hooks = [hook for hook, _ in wrapper._comm_hooks]
    named = wrapper._get_ddp_logging_data().get("comm_hook", "")  # type: ignore[no-untyped-call]
    unknown = [hook.__qualname__ for hook in hooks if hook.__module__ != _HOOKS or hook.__name__ not in STATELESS_HOOKS]
    if named and not hooks:
        unknown.append(named)
    if unknown:
        raise UnsupportedError(
            f"The communication hook {unknown[0]} of {name} may keep the shapes of gradients, which change with ranks. "
            f"Leave it out, or use one of {', '.join(STATELESS_HOOKS)}."
        )
