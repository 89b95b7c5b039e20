"""The canary: two short stacks of episodes, whose last bits tell how a machine rounds."""

from __future__ import annotations

from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch

from ...agents.rules import RULES
from ...allocation.schedule import DecisionSchedule
from ..tasks.proxy_task import ProxyTask
from .rollout import Rollout, rollout
from .stacked import StackedEpisodes

BASES = ("llama-4x32", "bert-4x32")
"""The proxies of the two stacks."""

SIZES: dict[str, Any] = {"corpus": "documentation", "budget": 0.5, "steps": 12, "length": 16, "eval_rows": 16}


def canary() -> str:
    """Run the two stacks under a rule; takes about a second.

    Returns:
        A digest of all losses and of the last observations, and the versions that may explain another one. It is equal
        on machines that train policies to the same bits.
    """
    digest = sha256()
    for base in BASES:
        tasks = [ProxyTask("planted", seed, base, **SIZES) for seed in (1, 2)]
        run = Rollout(StackedEpisodes(base, DecisionSchedule(probe_steps=2), len(tasks)), tasks)
        rollout(run, lambda seen: [RULES["signal-mean"].decide(observation) for observation in seen])
        digest.update(repr(run.losses()).encode())
        for observation in run.seen:
            digest.update(observation.modules.tobytes())
    return f"{digest.hexdigest()[:12]} with torch {torch.__version__} and rankpilot {version('rankpilot')}"
