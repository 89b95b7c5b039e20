"""rankpilot: a learned policy decides which modules of a model get LoRA rank, inside a hard budget of memory or time.

The names below are loaded when first used, so that `import rankpilot` loads no other library. The Gymnasium
environment is registered when `ENV_ID` is read, and at once if gymnasium is imported already.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .common.quiet import silence_worker
from .errors import RankPilotError

if TYPE_CHECKING:
    from .agents.learned.policy_file import load_policy
    from .allocation.log import DecisionLog
    from .allocation.schedule import DecisionSchedule
    from .env.registration import ENV_ID
    from .finetune.allocate import allocate, frontier
    from .finetune.callback import RankPilotCallback, attach
    from .finetune.checkpoint import last_checkpoint
    from .finetune.loop_checkpoint import load_checkpoint, save_checkpoint
    from .finetune.pilot import RankPilot
    from .finetune.run import TrainingRun
    from .memory.budget import Budget
    from .memory.outlook import memory_of

silence_worker()

_LAZY = {
    "ENV_ID": ".env.registration",
    "Budget": ".memory.budget",
    "DecisionLog": ".allocation.log",
    "DecisionSchedule": ".allocation.schedule",
    "RankPilot": ".finetune.pilot",
    "RankPilotCallback": ".finetune.callback",
    "TrainingRun": ".finetune.run",
    "allocate": ".finetune.allocate",
    "attach": ".finetune.callback",
    "frontier": ".finetune.allocate",
    "last_checkpoint": ".finetune.checkpoint",
    "load_checkpoint": ".finetune.loop_checkpoint",
    "load_policy": ".agents.learned.policy_file",
    "memory_of": ".memory.outlook",
    "save_checkpoint": ".finetune.loop_checkpoint",
}

__all__ = [
    "ENV_ID",
    "Budget",
    "DecisionLog",
    "DecisionSchedule",
    "RankPilot",
    "RankPilotCallback",
    "RankPilotError",
    "TrainingRun",
    "allocate",
    "attach",
    "frontier",
    "last_checkpoint",
    "load_checkpoint",
    "load_policy",
    "memory_of",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rankpilot' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


if "gymnasium" in sys.modules:
    import_module(".env.registration", __name__)
