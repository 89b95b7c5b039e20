"""Predictions of fine-tunes whose rows hold pictures, beside what others measured on GPUs."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers as t
from rankpilot.cost.cards import find_device_spec
from rankpilot.cost.cost import moment_costs
from rankpilot.cost.forecast.card_use import card_use
from rankpilot.cost.forecast.configured_step import REDUCE_BUCKET_BYTES, ConfiguredStep, LoadedAs, Shards
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from torch.nn import functional

FILE = Path(__file__).with_name("published_peaks") / "pictures.csv"
MIB = 2**20

_ROTARY = {"mrope_section": [16, 24, 24], "type": "mrope"}
_QWEN2 = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
_QWEN2 |= {"num_key_value_heads": 4, "vocab_size": 152064, "rope_scaling": _ROTARY}  # type: ignore[dict-item]
_QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3 |= {"vocab_size": 151936, "max_position_embeddings": 262144}
_ROTARY3 = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}


def configurations() -> dict[str, Any]:
    """The models' configurations; sizes are those of their pages."""
    deep = {"out_hidden_size": 2560, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    return {
        "qwen3-vl-8b": t.Qwen3VLConfig(
            text_config=_QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "rope_scaling": _ROTARY3},
            vision_config={"out_hidden_size": 4096, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
            | {"deepstack_visual_indexes": [8, 16, 24]},
        ),
        "qwen3-vl-4b": t.Qwen3VLConfig(
            text_config=_QWEN3
            | {"hidden_size": 2560, "intermediate_size": 9728, "rope_scaling": _ROTARY3, "tie_word_embeddings": True},
            vision_config=deep | {"deepstack_visual_indexes": [5, 11, 17]},
            tie_word_embeddings=True,
        ),
        "qwen2-vl-7b": t.Qwen2VLConfig(
            text_config=_QWEN2,
            vision_config={"hidden_size": 3584},
        ),
        "qwen2.5-vl-7b": t.Qwen2_5_VLConfig(
            text_config=_QWEN2,
            vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        ),
        "smolvlm2-2.2b": t.SmolVLMConfig(
            image_token_id=49190,
            scale_factor=3,
            text_config={"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
            | {"num_attention_heads": 32, "vocab_size": 49280, "max_position_embeddings": 8192, "pad_token_id": 2},
            vision_config={"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304}
            | {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
        ),
    }


PARAMETERS = {
    "qwen3-vl-8b": 8.77e9,
    "qwen3-vl-4b": 4.44e9,
    "qwen2-vl-7b": 8.29e9,
    "qwen2.5-vl-7b": 8.29e9,
    "smolvlm2-2.2b": 2.25e9,
}
"""As published."""


@dataclass(frozen=True)
class PictureRow:
    """One published run: a row per batch, bf16, AdamW.

    Attributes:
        model: a key of `configurations`.
        gpus: cards; one under ZeRO-3 gathers nothing.
        length: tokens of the row.
        images: pictures in the row.
        meter: what counted: "allocated" bytes, "nvidia-smi", or "untold".
        measured: MiB.
        settings: further columns of the file.
    """

    model: str
    gpus: int
    length: int
    images: int
    meter: str
    measured: float
    settings: dict[str, str]

    @property
    def name(self) -> str:
        """Model, length, pictures and cards, for people."""
        on = f" on {self.gpus} GPUs" if self.gpus > 1 else ""
        return f"{self.model} 1 x {self.length}, {self.images} of {self.settings['image']}{on}"


def picture_rows() -> list[PictureRow]:
    """All published runs."""
    with FILE.open() as file:
        return [
            PictureRow(
                model=row["model"],
                gpus=int(row["gpus"]),
                length=int(row["length"]),
                images=int(row["images"]),
                meter=row["meter"],
                measured=float(row["measured_mib"]),
                settings=row,
            )
            for row in csv.DictReader(file)
        ]


def predicted_mib(row: PictureRow) -> float:
    """What torch's allocator gives out if that was measured; else what is in use: its reserve, and a context."""
    step, rank = picture_step(row), int(row.settings["rank"])
    ranks, shape = np.full(len(step.targets), rank), BatchShape(1, row.length)
    if row.meter == "allocated":
        return float((moment_costs(step.memory.cost(shape), ranks).max() + step.model.frozen_bytes) / MIB)
    use = card_use(step.memory, ranks, step.model.frozen, find_device_spec(row.settings["card"]), shape=shape)
    return (use.reserved_bytes + use.context_bytes) / MIB


def picture_step(row: PictureRow) -> ConfiguredStep:
    """The training step of a run, on one card."""
    asked, config = row.settings, configurations()[row.model]
    config._attn_implementation = asked["attention"]
    alone = row.gpus == 1 and asked["sharding"] == "zero3"
    settings = StepConfig(
        batch_size=1,
        max_length=row.length,
        target_modules=asked["targets"],
        gradient_checkpointing=asked["checkpointing"] != "no",
        optimizer=asked["optimizer"],  # type: ignore[arg-type]
        exact_savers=False,
        bf16=not alone,  # no autocast, and adapters of a model that zero.Init built stay in fp32
    )
    dropout = float(asked["dropout"])
    loaded = LoadedAs(
        dtype=torch.bfloat16,
        image=asked["image"],
        images=row.images,
        reentrant=asked["checkpointing"] == "reentrant",
        keeps_output=alone,
        adapter={"lora_dropout": dropout} if dropout else {},
    )
    with patch("torch.nn.functional.linear", linear_of_zero3) if alone else nullcontext():
        step = from_config(config, settings, loaded)
    return on_one_card(step) if alone else Shards(row.gpus, asked["sharding"]).of(step)  # type: ignore[arg-type]


def on_one_card(step: ConfiguredStep) -> ConfiguredStep:
    """The step under DeepSpeed's ZeRO-3 with one card, by its defaults.

    It keeps one bucket; and beside AdamW's state another copy of each adapter, and of its gradient (deepspeed 0.19.8,
    `runtime/zero/stage3.py`).
    """
    states = step.memory.states
    states = replace(states, optimizer=states.optimizer + 2 * states.weights, scratch=0 * states.scratch)
    slopes = step.memory._slope.copy()
    slopes[[*step.memory.recording.gradients]] = 0
    memory = replace(step.memory, states=states, _slope=slopes)
    return replace(step, memory=memory, model=replace(step.model, frozen=(*step.model.frozen, REDUCE_BUCKET_BYTES)))


class _Linear(torch.autograd.Function):
    """A product that always keeps its input, as ZeRO-3's does (deepspeed 0.19.8, `runtime/zero/linear.py`)."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        tensor, weight, bias = given
        ctx.save_for_backward(tensor, weight)
        return _PLAIN(tensor, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (tensor, weight) = gradients, ctx.saved_tensors
        own = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        of_weight = rows.t().matmul(tensor.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return own, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


_PLAIN = functional.linear


def linear_of_zero3(tensor: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """Replaces torch's."""
    return _Linear.apply(tensor, weight, bias)  # type: ignore[no-untyped-call]
