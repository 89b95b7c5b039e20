"""The shipped policy, and what is left of it when something is taken away."""

from __future__ import annotations

from ....agents.evaluation.ablation import FEATURE_GROUPS
from .first_plan import FirstPlan
from .pilot import Piloted
from .policies import WITHOUT
from .replay import Replay

OURS = Piloted("ours", "default", "the shipped policy, all its decisions", quick=True)
RECOMPUTED = Piloted(
    "ours-recompute", "default", "the shipped policy, as few layers run again as its plans need", recompute=True
)
FIRST = FirstPlan("ours-first-plan", "default", "the shipped policy's first plan, kept", "ours", quick=True)
SAVES_TIME = FirstPlan(
    "ours-saves-time",
    "default",
    "the broad plan of least time that surely loses at most 1 %",
    "saving",
    goal="time",
)
SAVES_BYTES = FirstPlan(
    "ours-saves-bytes",
    "default",
    "the broad plan of fewest bytes that surely loses at most 1 %",
    "saving",
    goal="bytes",
)
REPLAY = Replay("ours-replay", OURS, "the ranks with which the shipped policy ended, static from the start")
SHUFFLED = Replay("ours-shuffled", OURS, "the same ranks, dealt anew among modules of a kind", shuffled=True)
BLIND = tuple(
    FirstPlan(f"ours-no-{group}", f"default{WITHOUT}{group}", f"the first plan without seeing {group}", "ours")
    for group in FEATURE_GROUPS
)
"""The policy's first plan without each group of features."""
