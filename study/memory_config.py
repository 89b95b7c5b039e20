"""Settings of `rankpilot memory`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from ..cost.budget import Budget
from ..cost.configured_step import Sharding
from ..cost.step_config import ExpertBits, StepConfig, check_dropout, check_seed
from ..data.task import Task
from ..errors import ConfigError, shown

MOST_LABELS = 1_000_000
"""Classes, at most."""

AttentionKind = Literal["eager", "sdpa", "flash", "flex", "math"]

_OF_CARD = (
    *("gpus", "sharding", "dtype", "lora_dropout", "experts", "attention", "loss", "reentrant"),
    *("packed", "offload", "expandable_segments"),
)

_OF_DATA = ("labels", "text_column", "label_column", "seed")
"""Settings that a card's answer, of full rows and the model's own head, does not read."""


@dataclass(frozen=True)
class MemoryConfig(StepConfig):
    """The training step that `rankpilot memory` looks at: a model with an adapter, on a batch.

    Attributes:
        model: a packaged model (rankpilot assets lists them), a Hugging Face id or a local folder.
        data: a packaged data set, a Hugging Face id, a local file or folder; its longest rows make the batch. Without
            data, the batch holds random token ids, and all its rows have the full length.
        rank: rank of the adapter on every target module.
        task: classification, regression, token-classification, seq2seq or causal-lm; without it, the columns of the
            data decide, or else the model's architecture.
        labels: number of classes or tags, for a classification without data.
        budget: also show which plans the rules make inside this budget, and what fits it: "24GiB" for all that the
            device holds, "6GiB step", "80%" of what plain LoRA takes (rank 8 on all modules), "300k params" or "auto"
            (90 % of what is free on the device).
        measure: also run real steps, and show measured beside predicted bytes.
        text_column: name of the column with the text, or with the tokens.
        label_column: name of the column with the class, the number, the tags or the target text.
        seed: seed of random token ids and fresh adapters.
        trainer: further settings of the Trainer, as NAME=VALUE, as for `rankpilot finetune`: packing=true
            assistant_only_loss=true label_smoothing_factor=0.1.
        device: predict for this card, from the model's configuration alone: "RTX 4090", "a100 80gb", "T4" ... Nothing
            is downloaded but a configuration that rankpilot does not know. MODEL is then a short name ("qwen3-8b"), a
            Hugging Face id, a folder or a config.json.
        device_memory: the same for a card of which you tell the memory: "24GiB".
        gpus: so many such cards train together, each with a batch of its own; all figures are per GPU.
        sharding: what they share: ddp, nothing; zero2, the optimizer's state; fsdp2 and zero3, the frozen model and
            what trains.
        dtype: precision of the frozen model on that card: bf16, fp16 or fp32; by default bf16 where the card has it.
            With bf16, steps compute under bf16 autocast.
        lora_dropout: the share of an adapter's inputs that is dropped at random; its masks and products take bytes.
        experts: how a quantised model keeps fused experts: as transformers does, in 16 bits; as axolotl's
            quantize_moe_experts; or as Unsloth.
        attention: how attention is computed on the card: eager, sdpa, flash (2 or 3), flex, or math, which is what
            sdpa is on most AMD cards.
        loss: model, with all logits; chunked, as TRL's SFTTrainer; cut, as cut cross-entropy.
        reentrant: gradient checkpointing with use_reentrant=True.
        packed: a row holds several texts, and may be longer than the model has positions.
        offload: saved activations go to main memory (activation_offloading of TRL and axolotl).
        expandable_segments: torch's allocator is set to them, so that it keeps hardly more than tensors take.
        os: of the machine with the card; on Windows memory spills into main memory without an error.

    Raises:
        ConfigError: a value is out of range, or options contradict each other.
        BudgetError: the budget cannot be read.
    """

    model: str
    data: str | None = None
    rank: int = 8
    task: Task | None = None
    labels: int = 2
    budget: str | None = None
    measure: bool = False
    text_column: str = "text"
    label_column: str = "label"
    seed: int = 0
    trainer: tuple[str, ...] = ()
    device: str | None = None
    device_memory: str | None = None
    gpus: int = 1
    sharding: Sharding = "ddp"
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    lora_dropout: float = 0.0
    experts: ExpertBits = "transformers"
    attention: AttentionKind | None = None
    loss: Literal["model", "chunked", "cut"] = "model"
    reentrant: bool = False
    packed: bool = False
    offload: bool = False
    expandable_segments: bool = False
    os: Literal["linux", "windows"] = "linux"

    @property
    def of_card(self) -> dict[str, Any]:
        """The settings that are of a card and are no setting of the step, as `memory_of` takes them."""
        return {name: getattr(self, name) for name in _OF_CARD}

    @property
    def card(self) -> str | None:
        """The card that is asked about; None to look at the model where it is."""
        return self.device or self.device_memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            Budget.parse(self.budget)
        check_dropout(self.lora_dropout)
        if self.experts != "transformers" and self.quantization == "none":
            raise ConfigError(f"experts={self.experts!r} is of a quantised model: give --quantization with it.")
        if self.rank < 1 or not 2 <= self.labels <= MOST_LABELS:
            given = f"got {shown(self.rank)} and {shown(self.labels)}"
            raise ConfigError(f"rank is at least 1 and labels 2 to {MOST_LABELS:,}; {given}.")
        check_seed(self.seed)
        self._check_card()

    def _check_card(self) -> None:
        if "" in (self.device, self.device_memory):
            raise ConfigError("device is a card ('RTX 4090'), and device_memory the memory of one ('24GiB'); got ''.")
        if self.device and self.device_memory:
            raise ConfigError(
                f"Give either the card ({shown(self.device)}) or its memory ({shown(self.device_memory)}): "
                "one tells the other."
            )
        if not self.card:
            defaults = {each.name: each.default for each in fields(self)}
            given = [name for name in (*_OF_CARD, "os") if getattr(self, name) != defaults[name]]
            if given:
                raise ConfigError(f"{given[0]} is of a card: give --device or --device-memory with it.")
            return
        wrong = [name for name in ("data", "task", "budget", "measure", "trainer") if getattr(self, name)]
        wrong += [
            each.name for each in fields(self) if each.name in _OF_DATA and getattr(self, each.name) != each.default
        ]
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)}: not with a card that is only asked about. Its batches are full rows of "
                "--max-length tokens."
            )
