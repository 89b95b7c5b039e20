"""Changes of rank under torch.compile: every new set of ranks is compiled anew, up to a limit that torch sets.

Measured on torch 2.13: a compiled model is one frame with the LoRA layers inlined, so a set of ranks takes one graph
however many modules it changes, and a set that comes back takes none. Where layers are compiled one by one, they share
the cache of their common code, and each of them takes one graph for each set. Once a cache holds `recompile_limit`
graphs, the code runs uncompiled for every further set, and torch writes no more than a line to its log.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch._dynamo
from torch import nn
from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def warn_of_recompiles(model: nn.Module, args: TrainingArguments, plans: int) -> None:
    """Warn if a compiled run plans more sets of ranks than torch keeps graphs for.

    Args:
        model: the Trainer's model, which the user may have compiled.
        args: the Trainer's arguments; `torch_compile` says whether the Trainer compiles the model.
        plans: the number of sets of ranks that the run may still have, the present one included.
    """
    limit: int = torch._dynamo.config.recompile_limit
    needed = plans * graphs_per_plan(model, args)
    if needed > limit:
        logger.warning(
            "This run is compiled and plans %d sets of ranks, which takes %d graphs; "
            "torch._dynamo.config.recompile_limit is %d, and what is beyond it runs uncompiled. Give the callback a "
            "schedule of fewer decisions, or raise the limit before training: a little above %d, as new lengths of "
            "batches and corrections of the peak take further graphs.",
            plans,
            needed,
            limit,
            needed,
        )


def graphs_per_plan(model: nn.Module, args: TrainingArguments) -> int:
    """Graphs that one set of ranks takes in the fullest cache: 0 if nothing is compiled, 1 if the whole model is."""
    regions: Counter[type[nn.Module]] = Counter()
    for module in model.modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            regions[type(module._orig_mod)] += 1
        elif module._compiled_call_impl is not None:
            regions[type(module)] += 1
    return max(regions.values(), default=int(args.torch_compile))
