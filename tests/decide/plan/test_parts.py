"""The parts of a step: the least seconds of all splits within the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from rankpilot.common.errors import BudgetError
from rankpilot.decide.plan.parts import Part, longest_that_fits, plan_parts

from benchmarks.harness import padding_share

LAYERS = (0, 1, 3)


def bytes_of(rows: np.ndarray, lengths: np.ndarray, layers: int) -> np.ndarray:
    """Bytes that rise with the tokens, fewer for each checkpointed layer, and some that are always there."""
    return 50 + rows * lengths * (8 - 2 * layers) + rows * lengths**2 / 20


def seconds_of(rows: np.ndarray, lengths: np.ndarray, layers: int) -> np.ndarray:
    """Launches or work, whichever is longer, and a third more where all layers run twice."""
    return np.maximum(30.0, rows * lengths * (1 + lengths / 40)) * (1 + layers / 9)


def splits(rows: list[int]) -> Iterator[list[list[int]]]:
    """All ways to split some rows into parts."""
    if not rows:
        yield []
        return
    first, *rest = rows
    for others in splits(rest):
        yield [[first], *others]
        for place, part in enumerate(others):
            yield [*others[:place], [first, *part], *others[place + 1 :]]


def least_seconds(lengths: np.ndarray, room: float, count: int | None = None) -> float:
    """Of all splits, into so many parts if a count is given, and all layers of each part, one by one."""

    def of_part(part: list[int]) -> float:
        shape = np.array([len(part)]), np.array([max(lengths[part])])
        fitting = [k for k in LAYERS if bytes_of(*shape, k)[0] <= room]
        return min((float(seconds_of(*shape, k)[0]) for k in fitting), default=np.inf)

    every = splits(list(range(len(lengths))))
    return min(sum(map(of_part, split)) for split in every if count in (None, len(split)))


def taken(parts: tuple[Part, ...]) -> float:
    return sum(float(seconds_of(np.array([len(p.rows)]), np.array([p.length]), p.layers)[0]) for p in parts)


@pytest.mark.parametrize("seed", range(12))
def test_no_split_of_any_rows_takes_less(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 30, size=generator.integers(1, 8))
    alone = float(bytes_of(np.ones(1), lengths.max()[None], LAYERS[-1])[0])
    room = alone * generator.uniform(1, 4)
    parts = plan_parts(lengths, room, LAYERS, bytes_of, seconds_of)
    assert sorted(row for part in parts for row in part.rows) == list(range(len(lengths)))
    for part in parts:
        assert part.length == max(lengths[list(part.rows)])
        assert bytes_of(np.array([len(part.rows)]), np.array([part.length]), part.layers)[0] <= room
    assert taken(parts) == pytest.approx(least_seconds(lengths, room))
    assert all(one.length >= other.length for one, other in pairwise(parts))
    for count in range(len(parts), len(lengths) + 1):
        given = plan_parts(lengths, room, LAYERS, bytes_of, seconds_of, count=count)
        assert len(given) == count
        assert taken(given) == pytest.approx(least_seconds(lengths, room, count))


def test_less_room_takes_smaller_parts_before_it_takes_a_row_away() -> None:
    lengths = np.array([4, 30, 5, 6])
    alone = float(bytes_of(np.ones(1), np.array([30]), 3)[0])
    parts = plan_parts(lengths, alone, LAYERS, bytes_of, seconds_of)
    assert parts[0] == Part((1,), 30, 3)
    with pytest.raises(BudgetError, match=r"Row 1 .* 30 tokens .* fits has 29"):
        plan_parts(lengths, alone - 1, LAYERS, bytes_of, seconds_of)


def test_the_longest_row_that_fits_is_the_last_one_that_does() -> None:
    room = float(bytes_of(np.ones(1), np.array([17]), 3)[0])
    assert longest_that_fits(100, room, 3, bytes_of) == 17
    assert longest_that_fits(100, 10.0, 3, bytes_of) == 0


def test_the_padding_that_parts_leave_out_is_a_share_of_all_of_it() -> None:
    lengths = np.array([10, 2])
    assert padding_share(lengths, [Part((0, 1), 10, 0)]) == 0.0
    assert padding_share(lengths, [Part((0,), 10, 0), Part((1,), 2, 0)]) == 1.0
    assert padding_share(np.array([3, 3]), [Part((0, 1), 3, 0)]) == 0.0
