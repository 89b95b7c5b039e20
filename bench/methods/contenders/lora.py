"""Plain LoRA at given ranks, also as rsLoRA: how all static plans are trained."""

from __future__ import annotations

from typing import Any

from ..loop import Driver
from ..ranks import plan_ranks
from ..work import Work, adapted_model, by_name
from .modules import module_names


def plain_lora(work: Work, **options: Any) -> Driver:
    """PEFT's LoRA at the ranks of the argument `plan`; `options` are further ones of LoraConfig."""
    ranks = plan_ranks(work.get("plan"))
    plan = by_name(ranks, module_names(work.task))
    return Driver(adapted_model(work.task, work.get("seed"), plan, **options), ranks)


def rslora(work: Work) -> Driver:
    """The same with a scaling of alpha / sqrt(rank) (Kalajdzievski, 2023, arXiv 2312.03732)."""
    return plain_lora(work, use_rslora=True)
