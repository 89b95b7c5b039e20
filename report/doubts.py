"""Assumptions of an answer about a card that few or no runs have verified, and the possible errors.

Figures refer to the runs in benchmarks/published_peaks/runs.csv (`python -m benchmarks published`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..common.text import format_bytes
from ..cost.forecast.outlook import Outlook

Direction = Literal["more", "less", "either"]
"""Direction in which a run may differ: more than predicted, less, or unknown."""

LOGIT_BYTES = 12
"""Bytes per token and vocabulary entry with full logits: in 16 bits and in fp32, each with its gradient."""

SHORT = 512
"""Tokens up to which scores of eager attention are small."""


@dataclass(frozen=True)
class Doubt:
    """An assumption of an answer.

    Attributes:
        what: the assumption and the evidence.
        direction: direction in which a run may differ from the prediction.
    """

    what: str
    direction: Direction


def doubts(outlook: Outlook) -> list[Doubt]:
    """Return the assumptions of an answer."""
    return list(_doubts(outlook))


def doubts_text(outlook: Outlook) -> str:
    """Return the same in one line; empty if there are none."""
    parts, found = [], doubts(outlook)
    for direction, words in (("more", "higher"), ("less", "lower"), ("either", "higher or lower")):
        if of_it := [each.what for each in found if each.direction == direction]:
            parts.append(f"Actual use may be {words}: {'; '.join(of_it)}.")
    return " ".join(parts)


def _doubts(outlook: Outlook) -> Iterator[Doubt]:
    model, loaded, settings = outlook.step.model, outlook.step.loaded, outlook.settings
    shape, shards = outlook.memory.shape, outlook.shards
    if model.sees and not loaded.image:
        yield Doubt("rows are counted without pictures; pass their size (--image 1024x768)", "more")
    if loaded.image:
        yield Doubt("of 10 published runs with pictures 8 are within 10 %; two took 34 % more and 17 % less", "either")
    if loaded.loss in ("cut", "liger"):
        logits = float(LOGIT_BYTES * shape.rows * shape.length * model.words)
        more = f"up to {format_bytes(logits)} more" if logits else "additional memory"
        yield Doubt(f"if the kernel of the loss does not support this model, logits take {more}", "more")
    if settings.quantization != "none" and model.fused and loaded.experts != "transformers":
        yield Doubt("published runs with quantised experts took 3 to 32 % more than predicted, or less", "either")
    elif settings.quantization == "int8":
        yield Doubt("int8 outlier columns are not counted; published runs took 1 to 19 % more than predicted", "more")
    if model.has_xielu and loaded.fused_activations:
        yield Doubt("xIELU is counted as its CUDA kernel, a separate package (nickjbrowning/XIELU)", "more")
    if model.is_eager is False and loaded.implementation in ("flash", "flex") and model.kind.startswith("GptOss"):
        without = "without one its memory grows with the square of the tokens"
        yield Doubt(f"attention with sinks is counted as a fused kernel; {without}", "more")
    if loaded.offload:
        yield Doubt("activation offloading is modelled on TRL's; the one published run took 9 % more", "more")
    if model.keeps_state:
        scans = model.kind.startswith(("Mamba", "FalconMamba", "Jamba", "Zamba"))
        how = "scans are counted as mamba-ssm's kernel" if scans else "states are counted as in transformers' code"
        yield Doubt(f"{how}; one published run of a hybrid took 132 % more than predicted", "more")
    if model.own_code:
        custom = "the configuration refers to custom code (trust_remote_code)"
        yield Doubt(f"{custom}; transformers' own code is counted", "either")
    if shards.sharding == "fsdp2":
        yield Doubt("published runs on two A100s under FSDP had 9 to 39 % more in use than predicted", "more")
    elif shards.sharding == "zero3":
        kept = "DeepSpeed keeps inputs of all linear layers, in fp32 before adapters"
        yield Doubt(f"{kept}: without checkpointing a step took up to 30 % more", "more")
    elif shards.sharding == "zero2":
        yield Doubt("DeepSpeed runs without autocast: unless layers are checkpointed, a tenth less on CPUs", "less")
    if shards.sharding == "fsdp2" and settings.quantization != "none" and settings.prepare_kbit:
        yield Doubt("TRL does not prepare a quantised model that FSDP shards; if so, pass --no-prepare-kbit", "less")
    if shards.sharding == "fsdp2" and settings.quantization == "nf4":
        whole = outlook.given.model.frozen_bytes - outlook.given.model.outside
        more = f"up to {format_bytes(whole * (1 - 1 / shards.gpus))} more on each GPU"
        yield Doubt(f"without bnb_4bit_quant_storage=torch.bfloat16, FSDP2 shards no 4-bit weights: {more}", "more")
    if loaded.attention == "math":
        yield Doubt("no runs on cards without fused attention have been published", "either")


def of_loading(outlook: Outlook) -> Iterator[str]:
    """Suggest other ways to load and run the model, if they use much less memory."""
    step, settings = outlook.step, outlook.settings
    loaded, how = step.loaded, settings.quantization
    if how != "none" and step.model.fused and loaded.experts == "transformers":
        whole, fewer = 2.0 * step.model.fused, step.model.fused * (0.52 if how == "nf4" else 1.0)
        less = f"{format_bytes(fewer)} in {how} with axolotl's quantize_moe_experts (--experts axolotl)"
        cast = f"casts them to fp32, {format_bytes(2 * whole)}; rankpilot's preparation does not"
        told = f"transformers does not quantise fused experts: they take {format_bytes(whole)}, or {less}."
        yield f"{told} PEFT's prepare_model_for_kbit_training {cast}."
    elif how != "none" and step.model.fused:
        yield "Loading may need more memory than training: tensors are in 16 bits until they are quantised."
    if how == "int8" and not loaded.reentrant and settings.gradient_checkpointing is not False:
        why = "(bitsandbytes stores them where checkpointing cannot see them)"
        kept = f"In int8, checkpointed layers still keep the inputs of their matrix products {why}."
        yield f"{kept} use_reentrant=True (--reentrant) avoids this."
    if step.model.is_eager and outlook.memory.shape.length > SHORT:
        flash = "With --attention flash (if a kernel supports this model's sinks) they take no memory."
        yield f"Attention is eager: scores grow with the square of {outlook.memory.shape.length:,} tokens. {flash}"
