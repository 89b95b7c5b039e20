"""rankpilot plans the memory and time of a LoRA fine-tune before its first step, and keeps it within a budget.

The names below are imported lazily, so `import rankpilot` loads no other library. `import rankpilot.env`, or the first
use of `ENV_ID`, registers the Gymnasium environment.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .common.errors import RankPilotError, naming_extras
from .common.quiet import silence_missing_kernels, silence_worker

if TYPE_CHECKING:
    from .agents.policy_file import load_policy
    from .cost.budget import Budget
    from .cost.forecast.memory_of import memory_of
    from .cost.savers.streamed_base import stream_base
    from .data.assets import fetch_asset
    from .data.packaged_data import load_packaged_dataset
    from .decide.log import DecisionLog
    from .decide.observation import Observation, module_feature
    from .decide.policy import Decision, decision_from_scores
    from .decide.settings import DecisionSchedule
    from .env import ENV_ID
    from .env.sb3 import StackVecEnv
    from .finetune.allocate import StaticPlan, allocate, static_plan
    from .finetune.callback import RankPilotCallback, attach
    from .finetune.checkpoint import last_checkpoint
    from .finetune.options import PilotOptions
    from .finetune.pilot import RankPilot
    from .finetune.step.run import TrainingRun
    from .lora.adapter_file import axolotl_yaml, export_padded, export_rank_pattern, rank_pattern_yaml
    from .lora.merged_file import export_merged

silence_missing_kernels()
silence_worker()

_LAZY = {
    "ENV_ID": ".env",
    "Budget": ".cost.budget",
    "Decision": ".decide.policy",
    "DecisionLog": ".decide.log",
    "DecisionSchedule": ".decide.settings",
    "Observation": ".decide.observation",
    "PilotOptions": ".finetune.options",
    "RankPilot": ".finetune.pilot",
    "RankPilotCallback": ".finetune.callback",
    "StackVecEnv": ".env.sb3",
    "StaticPlan": ".finetune.allocate",
    "TrainingRun": ".finetune.step.run",
    "allocate": ".finetune.allocate",
    "attach": ".finetune.callback",
    "axolotl_yaml": ".lora.adapter_file",
    "decision_from_scores": ".decide.policy",
    "export_merged": ".lora.merged_file",
    "export_padded": ".lora.adapter_file",
    "export_rank_pattern": ".lora.adapter_file",
    "fetch_asset": ".data.assets",
    "last_checkpoint": ".finetune.checkpoint",
    "load_packaged_dataset": ".data.packaged_data",
    "load_policy": ".agents.policy_file",
    "memory_of": ".cost.forecast.memory_of",
    "module_feature": ".decide.observation",
    "rank_pattern_yaml": ".lora.adapter_file",
    "static_plan": ".finetune.allocate",
    "stream_base": ".cost.savers.streamed_base",
}
"""Module of each public name."""

__all__ = [
    "ENV_ID",
    "Budget",
    "Decision",
    "DecisionLog",
    "DecisionSchedule",
    "Observation",
    "PilotOptions",
    "RankPilot",
    "RankPilotCallback",
    "RankPilotError",
    "StackVecEnv",
    "StaticPlan",
    "TrainingRun",
    "allocate",
    "attach",
    "axolotl_yaml",
    "decision_from_scores",
    "export_merged",
    "export_padded",
    "export_rank_pattern",
    "fetch_asset",
    "last_checkpoint",
    "load_packaged_dataset",
    "load_policy",
    "memory_of",
    "module_feature",
    "rank_pattern_yaml",
    "static_plan",
    "stream_base",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rankpilot' has no attribute {name!r}")
    with naming_extras():
        return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
