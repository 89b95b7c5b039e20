"""Tiny models of texts and pictures, and batches as their processors make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

PICTURE, TEXT = 200, 7
"""Ids of a picture's tokens, and of words."""

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
_SIGHT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_QWEN = {"depth": 4, "num_heads": 4, "out_hidden_size": 64}
_IDS = {"image_token_id": PICTURE, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203}
_SQUARE = {"num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}


def _qwen2_5_vl() -> t.PreTrainedConfig:
    sight = _SIGHT | _QWEN | {"fullatt_block_indexes": [1], "window_size": 56}
    return t.Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": _ROTARY}, vision_config=sight, **_IDS)


def _qwen3_vl() -> t.PreTrainedConfig:
    sight = _SIGHT | _QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 16}
    rotary = _ROTARY | {"mrope_interleaved": True}
    return t.Qwen3VLConfig(text_config=_TEXT | {"rope_parameters": rotary}, vision_config=sight, **_IDS)


def _gemma3() -> t.PreTrainedConfig:
    text, sight = _TEXT | {"sliding_window": 32}, _SIGHT | _SQUARE
    ids = {"image_token_index": PICTURE, "boi_token_index": 202, "eoi_token_index": 203}
    return t.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4, **ids)


def _tiles(kind: Any) -> t.PreTrainedConfig:
    text = {"model_type": "llama", **_TEXT}
    config: t.PreTrainedConfig = kind(
        text_config=text, vision_config=_SIGHT | _SQUARE, image_token_id=PICTURE, scale_factor=2
    )
    return config


def _mllama() -> t.PreTrainedConfig:
    sight = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "image_size": 56,
    }
    sight |= {"attention_heads": 4, "max_num_tiles": 4, "patch_size": 14, "intermediate_layers_indices": [1, 2]}
    sight |= {"vision_output_dim": 192, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]}
    text = _TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    return t.MllamaConfig(text_config=text, vision_config=sight, image_token_index=PICTURE)


@dataclass(frozen=True)
class Sees:
    """A family of models of texts and pictures.

    Attributes:
        config: makes the configuration of a tiny model.
        processor: makes its image processor.
        nested: whether the processor takes a list of pictures per row.
        types: name of the tensor that marks the tokens of pictures; empty for none.
    """

    config: Callable[[], t.PreTrainedConfig]
    processor: Callable[[], Any]
    nested: bool = False
    types: str = ""

    def pixels(self, rows: int, size: tuple[int, int], images: int = 1) -> dict[str, torch.Tensor]:
        """The processor's output for `images` pictures of a width and height in each of `rows` rows."""
        picture = Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8))
        given: Any = [[picture] * images] * rows if self.nested else [picture] * (rows * images)
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in self.processor()(given, return_tensors="pt").items()
            if name not in ("num_crops", "num_tiles", "rows", "cols")
        }

    def tokens(self, pixels: dict[str, torch.Tensor]) -> int:
        """The tokens of all pictures together."""
        if "aspect_ratio_ids" in pixels:
            return int(pixels["aspect_ratio_ids"].numel())
        if (grid := pixels.get("image_grid_thw")) is not None:
            return int(grid.prod(-1).sum()) // 4
        return 4 * int(np.prod(pixels["pixel_values"].shape[:-3]))  # pictures or tiles of 4 x 4 patches

    def batch(self, rows: int, length: int, size: tuple[int, int], images: int = 1) -> dict[str, torch.Tensor]:
        """A batch with pictures of a width and height, each after a token of text."""
        pixels = self.pixels(rows, size, images)
        each = self.tokens(pixels) // (rows * images) + 1
        ids = torch.full((rows, length), TEXT)
        for number in range(images):
            ids[:, number * each + 1 : (number + 1) * each] = PICTURE
        types = {self.types: (ids == PICTURE).long()} if self.types else {}
        if (tiles := pixels.get("aspect_ratio_mask")) is not None:
            types["cross_attention_mask"] = tiles[:, None].expand(rows, length, *tiles.shape[1:]).clone()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **types, **pixels}


MOST_PIXELS = 120_000
"""The setting `max_pixels` of Qwen's processors."""

_FEW = {"min_pixels": 56 * 56, "max_pixels": MOST_PIXELS}
_SIZES = {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 56}}

FAMILIES = {
    "qwen2.5-vl": Sees(_qwen2_5_vl, lambda: Qwen2VLImageProcessorPil(**_FEW), types="mm_token_type_ids"),
    "qwen3-vl": Sees(
        _qwen3_vl,
        lambda: Qwen2VLImageProcessorPil(min_pixels=256 * 256, max_pixels=MOST_PIXELS, patch_size=16),
        types="mm_token_type_ids",
    ),
    "gemma3": Sees(_gemma3, lambda: Gemma3ImageProcessorPil(size={"height": 56, "width": 56}), types="token_type_ids"),
    "smolvlm": Sees(lambda: _tiles(t.SmolVLMConfig), lambda: SmolVLMImageProcessorPil(**_SIZES), nested=True),
    "mllama": Sees(_mllama, lambda: MllamaImageProcessorPil(size={"height": 56, "width": 56}), nested=True),
    "idefics3": Sees(lambda: _tiles(t.Idefics3Config), lambda: Idefics3ImageProcessorPil(**_SIZES), nested=True),
}
