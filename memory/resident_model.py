"""What lies on a device whatever the plan: the frozen model, contexts, and what libraries take."""

from __future__ import annotations

import torch
from torch import nn

from .breakdown import frozen_bytes
from .device_table import HOPPER_WORKSPACE_BYTES

MOST_WORKSPACE_BYTES = 2 * HOPPER_WORKSPACE_BYTES
"""What cuBLAS takes through torch's allocator at most: a workspace for each of two threads (on Hopper; less before)."""


def resident_bytes(model: nn.Module) -> int:
    """Bytes on the model's device beside those that plans are priced with.

    They are those of the frozen model; on CUDA also all that is used outside torch's allocator, by contexts and other
    processes, and workspaces of cuBLAS.
    """
    frozen, device = frozen_bytes(model), next(model.parameters()).device
    if device.type != "cuda":
        return frozen
    free, total = torch.cuda.mem_get_info(device)
    return frozen + total - free - torch.cuda.memory_reserved(device) + MOST_WORKSPACE_BYTES
