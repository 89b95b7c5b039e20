"""Pictures in the rows of a batch: their tokens, and the bytes of steps on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from rankpilot.common.errors import ConfigError, UnsupportedError
from rankpilot.cost.batch_shape import follows_rows, reshaped, shape_of
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.forecast.configured_step import LoadedAs
from rankpilot.cost.forecast.from_config import base_on_meta, from_config
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.pictures import LENGTH, picture_sides, row_pictures
from rankpilot.cost.forecast.pictures_that_fit import CLOSE, MOST, largest_max_pixels
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from rankpilot.lora.peft_config import fresh_adapters

from .measured import adamw_run
from .pictures import FAMILIES, MOST_PIXELS

SIZES = {"1": ((112, 168), 1), "2": ((168, 56), 2), "3": ((400, 300), 1)}
"""Width and height of pictures, and their number per row."""

BOTH = r".*(q_proj|k_proj|v_proj|qkv|down_proj|fc1|linear_fc1)"
"""Modules of the language model and of the tower."""


def max_pixels(name: str) -> int:
    return MOST_PIXELS if name.startswith("qwen") else 0


@pytest.mark.parametrize("size", [(112, 168), (168, 56), (400, 300), (17, 900), (333, 334)])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_tensors_of_pictures_are_those_of_the_processor(name: str, size: tuple[int, int]) -> None:
    family = FAMILIES[name]
    found = row_pictures(family.config(), f"{size[0]}x{size[1]}", 2, max_pixels(name))
    real = family.pixels(1, size, images=2)
    tensors = {name: tensor for name, tensor in found.tensors.items() if LENGTH not in tensor.shape}
    assert {name: each.shape for name, each in tensors.items()} == {n: tuple(each.shape) for n, each in real.items()}
    assert found.tokens == family.tokens(real) + 2
    assert sum(tensor.bytes for tensor in tensors.values()) == sum(tensor.nbytes for tensor in real.values())
    if "image_grid_thw" in real:
        assert [found.tensors["image_grid_thw"].values] * 2 == [*map(tuple, real["image_grid_thw"].tolist())]


def test_published_models_have_their_published_tokens() -> None:
    tiles = {"image_size": 512, "patch_size": 16}
    configs = {
        "qwen2.5-vl": (t.Qwen2_5_VLConfig(), "1036x1288", 1702),
        "gemma3": (t.Gemma3Config(mm_tokens_per_image=256), "10x2000", 256),
        "smolvlm": (t.SmolVLMConfig(vision_config=tiles, scale_factor=4), "2048x1024", 9 * 64),
    }
    for config, image, tokens in configs.values():
        assert row_pictures(config, image).tokens == tokens + 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets", ["all-linear", BOTH])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name not in ("qwen2.5-vl", "smolvlm"))) for name in FAMILIES],
)
def test_a_step_with_pictures_takes_what_is_predicted(name: str, targets: str, size: str) -> None:
    family, (sides, images) = FAMILIES[name], SIZES[size]
    rows, length = 2, 400
    base = base_on_meta(family.config(), "AutoModelForImageTextToText", torch.float32)
    options = {"target_modules": targets, "r": 8, "lora_alpha": 16}
    model = fresh_adapters(base, name, "CAUSAL_LM", new_head=False, **options).train()
    run = adamw_run(model, family.batch(rows, length, sides, images), fused=True)
    step = StepConfig(
        batch_size=rows, max_length=length, exact_savers=False, target_modules=targets, gradient_checkpointing=False
    )
    image = f"{sides[0]}x{sides[1]}"
    loaded = LoadedAs(device="cpu", dtype=torch.float32, image=image, images=images, max_pixels=max_pixels(name))
    found = from_config(family.config(), step, loaded)
    assert [target.name for target in found.targets] == [target.name for target in run.targets]
    cost, top = found.memory.cost(), np.arange(len(run.targets)) == len(run.targets) - 1
    for ranks in (np.full(len(run.targets), 8), np.where(top, 8, 0)):
        assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks), rel=0.005)


@pytest.mark.parametrize("name", ["qwen2.5-vl", pytest.param("gemma3", marks=pytest.mark.long)])
def test_a_checkpointed_step_with_padded_pictures_is_predicted_from_few_layers(name: str) -> None:
    """The layers of the tower have no segments without adapters, and those of the language model repeat."""
    config = FAMILIES[name].config()
    config.text_config.num_hidden_layers = 8
    config.text_config.layer_types = [config.text_config.layer_types[0]] * 8
    step = StepConfig(batch_size=2, max_length=200, exact_savers=False, gradient_checkpointing=True)
    loaded = LoadedAs(dtype="bf16", image="112x168", padded=True, max_pixels=max_pixels(name))
    memory = from_config(config, step, loaded).memory
    assert len(memory.segments) == 8
    assert all("layers" in segment.name for segment in memory.segments)


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_change_with_rows_or_not_at_all(name: str) -> None:
    batch = FAMILIES[name].batch(2, 200, (112, 168))
    assert shape_of(batch) == BatchShape(2, 200)
    assert follows_rows(batch) is (not name.startswith("qwen"))
    more = reshaped(batch, BatchShape(3, 300))
    assert more["input_ids"].shape == (3, 300)
    pixels = batch["pixel_values"].shape
    assert more["pixel_values"].shape == (pixels if name.startswith("qwen") else (3, *pixels[1:]))


def test_a_card_holds_the_tower_and_the_pictures() -> None:
    config = FAMILIES["qwen2.5-vl"].config()
    settings = {"batch_size": 2, "max_length": 200, "image": "112x168", "max_pixels": MOST_PIXELS}
    outlook, plain = (memory_of(config, "24GiB", **given) for given in (settings, {"batch_size": 2, "max_length": 200}))
    model = outlook.step.model
    base = base_on_meta(config, "AutoModelForImageTextToText")
    assert model.parameters == sum(parameter.numel() for parameter in base.parameters())
    assert model.picture_tokens == 25
    assert outlook.room.taken - plain.room.taken == 2 * model.picture_bytes > 0
    assert {cell.shape for cell in outlook.grid} == {BatchShape(2, 200)}, "rows loop over pictures"
    assert plain.step.model.sees
    assert model.continues


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gemma3", {"image": "12"}, ConfigError, "image must be WIDTHxHEIGHT.*got '12'"),
        ("gemma3", {"image": "0x5"}, ConfigError, "image must be WIDTHxHEIGHT"),
        ("gemma3", {"image": "5x5", "images": 0}, ConfigError, "images must be a whole number from 1.*got 0"),
        ("gemma3", {"image": "5x5", "max_pixels": 9}, ConfigError, "max_pixels is a setting of qwen2_vl"),
        ("gemma3", {"images": 2}, ConfigError, "need image, such as"),
        ("qwen2.5-vl", {"image": "5x5", "max_pixels": 9}, ConfigError, "max_pixels must be 0.*or from 784"),
        ("qwen2.5-vl", {"image": "5x5000"}, ConfigError, "at most 200 times the shorter"),
        ("qwen2.5-vl", {"image": "900x900"}, ConfigError, "take 1,025 tokens, and max_length is 64.*Raise max_length"),
    ],
)
def test_pictures_that_cannot_be_are_refused(name: str, changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        memory_of(FAMILIES[name].config(), "24GiB", batch_size=2, max_length=64, **changes)


def test_pictures_without_a_rule_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="only those of qwen2_vl"):
        row_pictures(t.LlavaConfig(), "5x5")
    assert picture_sides("1024x768") == (1024, 768)


@dataclass
class _Linear:
    """Stands for an outlook whose step takes bytes in proportion to its tokens, beside a model of 10 GB."""

    length: int
    tokens: int
    bytes_per_token: float
    images: int = 1
    positions: int | None = None

    def __post_init__(self) -> None:
        model = SimpleNamespace(
            picture_tokens=self.images * (self.tokens + 1), pixels=784 * self.tokens, positions=self.positions
        )
        self.step = SimpleNamespace(model=model, loaded=SimpleNamespace(images=self.images, image="1024x768"))
        self.settings = SimpleNamespace(max_length=self.length, gradient_checkpointing="auto")
        self.blocks, self.rank, self.checkpointable, self.slack = 1, 8, (), 0.0

    @property
    def spare(self) -> float:
        return 14e9 - self.bytes_per_token * self.length

    def choice(self, *_: Any) -> Any:
        return SimpleNamespace(use=SimpleNamespace(spare_bytes=self.spare, device=SimpleNamespace(memory_bytes=24e9)))

    def ask(self, image: str, max_pixels: int, max_length: int) -> _Linear:
        width, height = picture_sides(image)
        assert width * height >= max_pixels
        assert width / height == pytest.approx(4 / 3, rel=0.05)
        return replace(self, length=max_length, tokens=max_pixels // 784)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("per_token", [1e6, 3e6, 1e7])
def test_the_largest_max_pixels_fits_and_hardly_more_does(per_token: float, images: int) -> None:
    first = _Linear(1000 + images * 501, 500, per_token, images)
    found = largest_max_pixels(first, first.ask)
    best = min((14e9 / per_token - 1000) / images - 1, MOST // 784)
    if best < 1:
        assert found is None
    else:
        assert found is not None
        assert CLOSE * best - 1 <= found / 784 <= best
    at_the_end = replace(first, bytes_per_token=1.0, positions=4000)
    assert largest_max_pixels(at_the_end, at_the_end.ask) <= 784 * 3000 // images
