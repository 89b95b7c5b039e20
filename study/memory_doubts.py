"""What an answer about a card rests on that nobody has held against runs, or only against few, and how it may be wrong.

Figures are of the runs in benchmarks/published_peaks/axolotl.csv (`python -m benchmarks published`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from ..common.text import format_bytes
from ..cost.outlook import Outlook

Direction = Literal["more", "less", "either"]
"""How a run may differ: it takes more than predicted, less, or nobody knows."""

LOGIT_BYTES = 12
"""Bytes of a token and a word where all logits are there: in 16 bits and in fp32, each with its gradient."""

SHORT = 512
"""Tokens up to which scores of eager attention take little."""


@dataclass(frozen=True)
class Doubt:
    """Something that an answer rests on.

    Attributes:
        what: it is, and what is known of it.
        direction: how a run may differ from what is predicted.
    """

    what: str
    direction: Direction


def doubts(outlook: Outlook) -> list[Doubt]:
    """What the answer rests on; nothing for a model that is here, whose own steps are recorded."""
    return list(_doubts(outlook)) if outlook.card else []


def doubts_text(outlook: Outlook) -> str:
    """The same in one line; empty if there is none."""
    words = {"more": "A run may take more", "less": "A run may take less", "either": "A run may take more or less"}
    found = doubts(outlook)
    parts = []
    for direction in get_args(Direction):
        if of_it := [each.what for each in found if each.direction == direction]:
            parts.append(f"{words[direction]}: {'; '.join(of_it)}.")
    return " ".join(parts)


def _doubts(outlook: Outlook) -> Iterator[Doubt]:
    model, loaded, settings = outlook.step.model, outlook.step.loaded, outlook.settings
    shape, shards = outlook.memory.shape, outlook.shards
    if loaded.loss == "cut":
        logits = float(LOGIT_BYTES * shape.rows * shape.length * model.words)
        more = f"up to {format_bytes(logits)} more" if logits else "bytes of their own"
        yield Doubt(f"where cut cross-entropy does not run for this model, logits take {more}", "more")
    if settings.quantization != "none" and model.fused and loaded.experts != "transformers":
        yield Doubt("published runs with quantised experts took 19 % less to 32 % more than predicted", "either")
    elif settings.quantization == "int8":
        yield Doubt(
            "columns of outliers in int8 are not counted; published runs took 1 to 19 % more than predicted", "more"
        )
    if model.has_xielu and loaded.fused_activations:
        yield Doubt("xIELU counts as its CUDA kernel, which is a package of its own (nickjbrowning/XIELU)", "more")
    if model.is_eager is False and loaded.implementation in ("flash", "flex") and model.kind.startswith("GptOss"):
        yield Doubt("attention with sinks counts as a kernel; without one it takes the square of the tokens", "more")
    if loaded.offload:
        yield Doubt("offloaded activations count by TRL's rule; the one published run took 9 % more", "more")
    if model.keeps_state:
        yield Doubt("layers that keep a state count as transformers' own code, not as mamba-ssm or fla", "either")
    if model.own_code:
        yield Doubt("the configuration names code of its own (trust_remote_code), and transformers' counts", "either")
    if shards.gpus > 1 and shards.sharding != "ddp":
        yield Doubt(f"{shards.sharding} counts by its rules of sharding", "either")
    if loaded.attention == "math":
        yield Doubt("no run on a card without fused attention is published", "either")


def of_loading(outlook: Outlook) -> Iterator[str]:
    """What another way to load and to run the model would take, where it takes much less."""
    step, settings = outlook.step, outlook.settings
    loaded, how = step.loaded, settings.quantization
    if how != "none" and step.model.fused and loaded.experts == "transformers":
        whole, fewer = 2.0 * step.model.fused, step.model.fused * (0.52 if how == "nf4" else 1.0)
        yield (
            f"transformers does not quantise fused experts: they take {format_bytes(whole)}. With axolotl's "
            f"quantize_moe_experts (--experts axolotl) they take {format_bytes(fewer)} in {how}. "
            "prepare_model_for_kbit_training of PEFT casts them to fp32, "
            f"{format_bytes(2 * whole)}; rankpilot's preparation does not."
        )
    elif how != "none" and step.model.fused:
        yield "Loading may take more than training: tensors are there in 16 bits until they are quantised."
    if how == "int8" and not loaded.reentrant and settings.gradient_checkpointing is not False:
        yield (
            "In int8 a checkpointed layer still holds the inputs of its products (bitsandbytes keeps them outside of "
            "what checkpointing sees). With use_reentrant=True (--reentrant) it does not."
        )
    if step.model.is_eager and outlook.memory.shape.length > SHORT:
        yield (
            f"Attention is eager: scores take the square of {outlook.memory.shape.length:,} tokens. "
            "With --attention flash (a kernel for this model's sinks, if it has any) they take none."
        )
