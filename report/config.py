"""Settings of `rankpilot memory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.errors import ConfigError, shown
from ..cost.forecast.configured_step import Sharding
from ..cost.step_config import ExpertBits, StepConfig, check_dropout

AttentionKind = Literal["eager", "sdpa", "flash", "flex", "math"]

OF_CARD = (
    "gpus", "sharding", "dtype", "lora_dropout", "experts", "attention", "loss", "reentrant", "packed", "offload",
    "expandable_segments", "stream", "eval_batch_size", "keep_logits", "image", "images",
    "max_pixels",
)  # fmt: skip
"""Settings of the card rather than the step, as arguments of `memory_of`."""


@dataclass(frozen=True)
class MemoryConfig(StepConfig):
    """The training step of `rankpilot memory`: a model with an adapter, on a batch, on a card.

    Attributes:
        model: a packaged model (listed by rankpilot assets), a Hugging Face id or a local folder.
        rank: rank of the adapter on every target module.
        device: predict for this card, from the model's configuration alone: "RTX 4090", "a100 80gb", "T4" ... Downloads
            nothing but a configuration unknown to rankpilot. MODEL is then a short name ("qwen3-8b"), a Hugging Face
            id, a folder or a config.json.
        device_memory: the same for a card given by its memory: "24GiB".
        gpus: number of such cards that train together, each with its own batch; all figures are per GPU.
        sharding: state shared by the GPUs: ddp, nothing; zero2, the optimizer state; fsdp2 and zero3, the frozen model
            and all trained parameters.
        dtype: precision of the frozen model on that card: bf16, fp16 or fp32; by default bf16 if the card supports it.
            With bf16, steps run under bf16 autocast.
        lora_dropout: dropout rate on an adapter's inputs; its masks and products use memory.
        experts: storage of fused experts in a quantised model: as in transformers, in 16 bits; as in axolotl's
            quantize_moe_experts; or as in Unsloth.
        attention: attention implementation on the card: eager, sdpa, flash (2 or 3), flex, or math, which sdpa uses on
            most AMD cards.
        loss: model, with all logits; chunked, as in TRL's SFTTrainer; cut, as in cut cross-entropy; liger, as Liger's
            kernel does, which computes all logits in evaluation.
        reentrant: gradient checkpointing with use_reentrant=True.
        packed: a row holds several texts, and may exceed the model's positions.
        offload: offload saved activations to main memory (activation_offloading of TRL and axolotl).
        stream: number of layers whose frozen weights stream from main memory, or all (axolotl's layer_offloading).
        image: width and height in pixels of the pictures in each row, "1024x768"; for models that read pictures. Their
            tokens are part of --max-length.
        images: number of such pictures in each row.
        max_pixels: the image processor's setting of this name (Qwen2-VL, Qwen2.5-VL, Qwen3-VL); 0 for its published
            value.
        expandable_segments: enable this setting of torch's allocator, which then reserves little more than tensors use.
        eval_batch_size: rows of an evaluation batch (per_device_eval_batch_size); 0 for those of a training batch, none
            for a run without evaluation.
        keep_logits: rows of an evaluation whose logits stay on the card for compute_metrics: all of them, or those of
            eval_accumulation_steps batches.
        os: operating system of the machine with the card; on Windows memory spills into main memory without an error.

    Raises:
        ConfigError: a value is out of range, or options contradict each other.
    """

    model: str
    rank: int = 8
    device: str | None = None
    device_memory: str | None = None
    gpus: int = 1
    sharding: Sharding = "ddp"
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    lora_dropout: float = 0.0
    experts: ExpertBits = "transformers"
    attention: AttentionKind | None = None
    loss: Literal["model", "chunked", "cut", "liger"] = "model"
    reentrant: bool = False
    packed: bool = False
    offload: bool = False
    expandable_segments: bool = False
    stream: int | Literal["all"] = 0
    eval_batch_size: int | Literal["none"] = 0
    keep_logits: int = 0
    image: str = ""
    images: int = 1
    max_pixels: int = 0
    os: Literal["linux", "windows"] = "linux"

    @property
    def card(self) -> str:
        """The card in question."""
        return self.device or self.device_memory or ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in (self.device, self.device_memory):
            raise ConfigError("device must be a card ('RTX 4090') and device_memory a size ('24GiB'); got ''.")
        if self.device and self.device_memory:
            both = f"device ({shown(self.device)}) or device_memory ({shown(self.device_memory)})"
            raise ConfigError(f"Pass either {both}, not both.")
        check_dropout(self.lora_dropout)
        if self.experts != "transformers" and self.quantization == "none":
            raise ConfigError(f"experts={self.experts!r} requires a quantised model: add --quantization.")
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1; got {shown(self.rank)}.")
