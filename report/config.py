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
        model: a name such as qwen3-8b, a Hugging Face id or a folder.
        rank: rank of every adapter.
        device: the card: "RTX 4090", "a100 80gb", "T4" ...
        device_memory: or a card with this memory: "24GiB".
        gpus: such cards, each with its own batch.
        sharding: what they share: nothing, optimizer state, or all.
        dtype: of the frozen model. (default: the card's)
        lora_dropout: dropout rate on an adapter's inputs.
        experts: storage of quantised models' fused experts.
        attention: its implementation. (default: as on this card)
        loss: all logits, in chunks (TRL), cut, or Liger's.
        reentrant: gradient checkpointing with use_reentrant=True.
        packed: rows of several texts, of any length.
        offload: saved activations in main memory.
        stream: frozen layers that stream from main memory.
        image: pictures in each row: 1024x768.
        images: such pictures in each row.
        max_pixels: max_pixels of the processor. (default: published)
        expandable_segments: enable this setting of torch's allocator.
        eval_batch_size: rows of an evaluation. (default: as in training)
        keep_logits: rows whose logits an evaluation keeps there.
        os: on Windows, memory spills without an error.

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
