"""Report on generation between steps: whether training and a vLLM engine fit one card, and what would."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..common.text import format_bytes
from ..cost.forecast.outlook import Outlook
from ..cost.forecast.what_else import largest_share, longest_rows


def rollouts_text(outlook: Outlook) -> str:
    """Tell what a vLLM engine beside the training takes, and which settings fit; empty without one."""
    engine, card, needs = outlook.given.loaded.engine, outlook.card, outlook.engine_needs
    if engine is None or needs is None:
        return ""
    share, length = format_bytes(engine.share * card.memory_bytes), engine.length or outlook.memory.shape.length
    asleep = "asleep during training" if engine.sleeps else "beside the training"
    total, weights = format_bytes(needs.total, up=True), format_bytes(needs.weights)
    rest = f"{format_bytes(needs.prefill)} for a prefill, {format_bytes(needs.cache)} for a sequence"
    told = [f"vLLM holds {share}, {engine.share:g} of the card, {asleep}."]
    told.append(f"It needs {total}: {weights} of weights, {rest} of {length:,} tokens.")
    lowest, highest = needs.total / card.memory_bytes, largest_share(outlook, engine)
    if highest < lowest:
        told.append("No vllm_gpu_memory_utilization fits both at this batch.")
    else:
        told.append(f"vllm_gpu_memory_utilization fits from {lowest + 0.005:.2f} to {highest - 0.005:.2f}.")
    if longest := longest_rows(outlook, engine, needs):
        told.append(f"The longest prompt and answer that fit have {longest:,} tokens.")
    return " ".join(told)


def engine_figures(outlook: Outlook) -> dict[str, Any] | None:
    """Return the least bytes of a vLLM engine, and its largest share of the card, as JSON values; None without one."""
    engine, needs = outlook.given.loaded.engine, outlook.engine_needs
    if engine is None or needs is None:
        return None
    return asdict(needs) | {"lacks": max(outlook.engine_lacks, 0.0), "largest_share": largest_share(outlook, engine)}
