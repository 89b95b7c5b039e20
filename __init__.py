"""rankpilot: a learned policy that moves LoRA rank between modules during a fine-tune, inside a hard memory budget.

The names below are loaded when first used; `import rankpilot` itself only registers the Gymnasium environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .env import ENV_ID
from .errors import RankPilotError
from .quiet import silence_worker

if TYPE_CHECKING:
    from .agents.callback import RankPilotCallback
    from .agents.policy_file import load_policy
    from .env.decision_log import DecisionLog
    from .env.schedule import DecisionSchedule
    from .lora.budget import Budget

silence_worker()

_LAZY = {
    "Budget": ".lora.budget",
    "DecisionLog": ".env.decision_log",
    "DecisionSchedule": ".env.schedule",
    "RankPilotCallback": ".agents.callback",
    "load_policy": ".agents.policy_file",
}

__all__ = [
    "ENV_ID",
    "Budget",
    "DecisionLog",
    "DecisionSchedule",
    "RankPilotCallback",
    "RankPilotError",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rankpilot' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
