"""Sizes at three small shapes tell the size at any shape."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.growth import Growth
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.tile_size import LossTiles

WHOLE, SHAPES = BatchShape(8, 64), (BatchShape(2, 16), BatchShape(2, 8), BatchShape(3, 8))
SIZES: dict[str, Callable[[int, int], int]] = {
    "constant": lambda rows, length: 512,
    "tokens": lambda rows, length: 4 * rows * length,
    "next tokens": lambda rows, length: 256 * rows * (length - 1),
    "next tokens of one row": lambda rows, length: 8 * (length - 1),
    "distances": lambda rows, length: 24 * (2 * length - 1),
    "padded by one token": lambda rows, length: 8 * rows * (length + 1),
    "pairs": lambda rows, length: 4 * rows * length**2,
    "pairs and tokens": lambda rows, length: 4 * rows * length * (length + 5),
}


def up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def growth(sizes: Callable[[int, int], int], shapes: Any = SHAPES, *, scratch: bool = False) -> Any:
    created = np.zeros(1)
    recordings: Any = [
        SimpleNamespace(
            sizes=np.array([sizes(shape.rows, shape.length)]), created=created, freed=created + (not scratch)
        )
        for shape in shapes
    ]
    return Growth.of(WHOLE, shapes, recordings, LossTiles(WHOLE))


@pytest.mark.parametrize("name", SIZES)
def test_a_size_at_another_shape(name: str) -> None:
    shapes = BatchShape(8, 64), BatchShape(1, 16), BatchShape(4, 300), BatchShape(2, 16)
    for shape, length in product(shapes, (16, 15)):
        sizes, half = SIZES[name], -(-length // 2)
        found = growth(sizes, (BatchShape(2, length), BatchShape(2, half), BatchShape(3, half)))
        expected = pytest.approx(sizes(shape.rows, shape.length))
        assert sizes(2, length) * found.factor(shape)[0] == expected, (shape, length)


ROUNDED: dict[str, Callable[[int, int], int]] = {
    "sums of logarithms": lambda rows, length: 12 * rows * up(length, 32),
    "a mask": lambda rows, length: 2 * rows * length * up(length, 16),
    "scratch": lambda rows, length: 4 * rows * up(length, 64) * 3,
    "scratch, rounded in part": lambda rows, length: 4 * rows * (65 * up(length, 128) + 128 * length),
    "scratch that is not rounded": lambda rows, length: 6 * rows * length,
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("whole", [BatchShape(4, 2080), BatchShape(4, 2052)], ids=str)
def test_lengths_that_a_kernel_rounds(name: str, whole: BatchShape) -> None:
    if name == "a mask" and whole.length % 16 == 0:
        pytest.skip("its rows are aligned, so that none is seen to be rounded")
    sizes, generator = ROUNDED[name], np.random.default_rng(0)
    half = whole.length // 2
    shapes = BatchShape(2, whole.length), BatchShape(2, half), BatchShape(3, half)
    found = growth(sizes, shapes, scratch=name.startswith("scratch"))
    for rows, length in generator.integers(1, [9, 9000], (200, 2)).tolist():
        assert round(sizes(2, whole.length) * found.factor(BatchShape(rows, length))[0]) == sizes(rows, length)


def test_sizes_that_follow_the_data() -> None:
    assert growth(lambda rows, length: int(4 * length * rows**1.5)) is None
    unknown = Growth.unknown(BatchShape(4, 16), 3)
    assert unknown.factor(BatchShape(4, 16)).tolist() == [1, 1, 1]
    for shape in (BatchShape(2, 16), BatchShape(4, 8)):
        with pytest.raises(UnsupportedError, match="depend on its data"):
            unknown.factor(shape)


def test_one_length_does_not_tell_another() -> None:
    found = growth(SIZES["constant"], (BatchShape(2, 3), BatchShape(2, 3), BatchShape(3, 3)))
    with pytest.raises(UnsupportedError, match="a single length does not show"):
        found.factor(BatchShape(2, 8))
