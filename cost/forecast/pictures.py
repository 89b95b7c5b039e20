"""The pictures in a row of a batch: their tokens and tensors, from their pixels, as the models' processors make them.

Qwen's processors scale a picture to whole squares of merged patches, between `min_pixels` and `max_pixels`. Those of
Idefics3 and SmolVLM scale its longest edge to four tiles, and add the whole picture as one more tile. Gemma 3's scales
every picture to one size, and that of Llama 3.2 Vision fills up to four tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...common.checks import is_count
from ...common.errors import ConfigError, UnsupportedError, shown

MOST_PIXELS, MOST_PICTURES = 2**28, 2**10

MOST_RATIO = 200
"""Largest ratio of a picture's sides that Qwen's processors accept."""

TILES = 4
"""Tiles along the longest edge of a picture, in the published processors of Idefics3 and SmolVLM."""

FLOAT_BYTES, INT_BYTES = 4, 8

LENGTH = -1


@dataclass(frozen=True)
class PictureTensor:
    """A tensor with the pictures of a row, or about them.

    Attributes:
        shape: its shape, with `LENGTH` for the tokens of a row; rows are concatenated along the first axis.
        values: its contents, repeated along the other axes: pixels of one colour, or whole numbers.
    """

    shape: tuple[int, ...]
    values: float | tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of a row, or per token if it has an entry for each; whole numbers take 8, pixels 4."""
        return abs(math.prod(self.shape)) * (FLOAT_BYTES if isinstance(self.values, float) else INT_BYTES)


@dataclass(frozen=True)
class RowPictures:
    """The pictures of a row.

    Attributes:
        images: their number, at least 1.
        tokens: tokens of the language model, with one of text before each picture.
        tensors: their tensors by name, as arguments of the model.
        types: name of a tensor with a 1 for each token of a picture and else 0; empty for none.
        alike: whether a step runs the same operators for any number of rows, rather than a loop over them.
        pixels: pixels of a picture after scaling, if `max_pixels` decides them; else None.
    """

    images: int
    tokens: int
    tensors: Mapping[str, PictureTensor]
    types: str = ""
    alike: bool = True
    pixels: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of a row."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def picture_sides(image: str) -> tuple[int, int]:
    """Return the width and height in pixels of "1024x768".

    Raises:
        ConfigError: the text is not of this form, or a side is 0, or they exceed `MOST_PIXELS`.
    """
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", image) if isinstance(image, str) else None
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= sides[0] * sides[1] <= MOST_PIXELS:
        most = f"with at most {MOST_PIXELS:,} pixels"
        raise ConfigError(f"image must be WIDTHxHEIGHT in pixels, such as '1024x768', {most}; got {shown(image)}.")
    return sides


def row_pictures(config: Any, image: str, images: int = 1, max_pixels: int = 0) -> RowPictures:
    """Return the pictures of a row, all of one size.

    Args:
        config: a transformers configuration.
        image: width and height of a picture in pixels, such as "1024x768".
        images: number of pictures per row.
        max_pixels: the processor's setting of this name, in pixels; 0 for the published one.

    Raises:
        ConfigError: a value is out of range, or the model has no such setting.
        UnsupportedError: the rule for the model's pictures is unknown here.
    """
    width, height = picture_sides(image)
    if not is_count(images) or images > MOST_PICTURES:
        raise ConfigError(f"images must be a whole number from 1 to {MOST_PICTURES:,}; got {shown(images)}.")
    kind = config.model_type
    if kind not in _RULES:
        known = ", ".join(_RULES)
        raise UnsupportedError(f"Pictures of {kind!r} cannot be priced, only those of {known}. Drop image.")
    if max_pixels and kind not in PIXELS:
        raise ConfigError(f"max_pixels is a setting of {', '.join(PIXELS)}, not of {kind!r}. Drop it.")
    return _RULES[kind](config, width, height, images, max_pixels)


PIXELS = {
    "qwen2_vl": (56 * 56, 3584 * 3584),
    "qwen2_5_vl": (56 * 56, 3584 * 3584),
    "qwen3_vl": (256 * 256, 4096 * 4096),
    "qwen3_vl_moe": (256 * 256, 4096 * 4096),
}
"""Least and most pixels of a picture after scaling, in the published processors."""


def _of_patches(config: Any, width: int, height: int, images: int, max_pixels: int) -> RowPictures:
    """Qwen: a picture's patches, of which `spatial_merge_size` squared make one token."""
    sight, (least, most) = config.vision_config, PIXELS[config.model_type]
    merged, depth = sight.spatial_merge_size, sight.temporal_patch_size
    unit = sight.patch_size * merged
    if max_pixels and (not is_count(max_pixels) or not unit * unit <= max_pixels <= MOST_PIXELS):
        allowed = f"0 for the processor's own, or from {unit * unit:,} to {MOST_PIXELS:,}"
        raise ConfigError(f"max_pixels must be {allowed}; got {shown(max_pixels)}.")
    if max(width, height) > MOST_RATIO * min(width, height):
        most_said = f"the longer side may be at most {MOST_RATIO} times the shorter"
        raise ConfigError(f"image is {width}x{height}, but {most_said} for {config.model_type!r}.")
    high, wide = scaled_sides(height, width, unit, min(least, max_pixels or least), max_pixels or most)
    rows, columns = high // sight.patch_size, wide // sight.patch_size
    values = sight.in_channels * depth * sight.patch_size**2
    return RowPictures(
        images=images,
        tokens=images * (rows * columns // merged**2 + 1),
        tensors={
            "pixel_values": PictureTensor((images * rows * columns, values), 0.5),
            "image_grid_thw": PictureTensor((images, 3), (1, rows, columns)),
        },
        types="mm_token_type_ids",
        alike=False,
        pixels=high * wide,
    )


def scaled_sides(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Return height and width as multiples of `unit` with `least` to `most` pixels, in about the same proportion."""
    high, wide = (round(side / unit) * unit for side in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return high, wide


def _of_one_size(config: Any, width: int, height: int, images: int, max_pixels: int) -> RowPictures:
    """Gemma 3: every picture takes the same pixels and tokens."""
    side = config.vision_config.image_size
    pixels = PictureTensor((images, config.vision_config.num_channels, side, side), 0.5)
    tokens, types = images * (config.mm_tokens_per_image + 1), "token_type_ids"
    return RowPictures(images, tokens, {"pixel_values": pixels}, types, alike=images == 1)


def _of_tiles(config: Any, width: int, height: int, images: int, max_pixels: int) -> RowPictures:
    """Idefics3 and SmolVLM: tiles of the size that the tower reads."""
    sight, side = config.vision_config, config.vision_config.image_size
    tiles = tiles_of(width, height, side)
    each = (side // sight.patch_size) ** 2 // config.scale_factor**2
    return RowPictures(
        images=images,
        tokens=images * (tiles * each + 1),
        tensors={
            "pixel_values": PictureTensor((1, images * tiles, sight.num_channels, side, side), 0.5),
            "pixel_attention_mask": PictureTensor((1, images * tiles, side, side), (1,)),
        },
        alike=False,
    )


def _of_canvas(config: Any, width: int, height: int, images: int, max_pixels: int) -> RowPictures:
    """Llama 3.2 Vision: as many tiles for each picture, which the text reads in layers of cross-attention."""
    sight = config.vision_config
    pixels = (1, images, sight.max_num_tiles, sight.num_channels, sight.image_size, sight.image_size)
    return RowPictures(
        images=images,
        tokens=2 * images,
        tensors={
            "pixel_values": PictureTensor(pixels, 0.5),
            "aspect_ratio_ids": PictureTensor((1, images), (1,)),
            "aspect_ratio_mask": PictureTensor((1, images, sight.max_num_tiles), (1,)),
            "cross_attention_mask": PictureTensor((1, LENGTH, images, sight.max_num_tiles), (1,)),
        },
    )


def tiles_of(width: int, height: int, side: int) -> int:
    """Return the tiles of `side` x `side` pixels that a picture takes, including one for the whole picture."""
    longest, ratio = TILES * side, width / height
    shorter = max(int(longest / ratio if ratio >= 1 else longest * ratio), 1)
    shorter += shorter % 2
    again = longest / shorter  # the processor divides by the ratio of the scaled sides, which is a bit off
    return TILES * math.ceil(int(longest / again) / side) + 1


_RULES: dict[str, Callable[[Any, int, int, int, int], RowPictures]] = {
    **dict.fromkeys(PIXELS, _of_patches),
    "gemma3": _of_one_size,
    "idefics3": _of_tiles,
    "mllama": _of_canvas,
    "smolvlm": _of_tiles,
}
"""Rules by transformers' `model_type`."""


def check_holds(tokens: int, length: int) -> None:
    """Raise ConfigError unless rows of this length hold the `tokens` of their pictures."""
    if tokens > length:
        raise ConfigError(
            f"The pictures of a row take {tokens:,} tokens, and max_length is {length:,}. Raise max_length (with room "
            "for the text), or lower image, images or max_pixels."
        )
