"""Contents of small tensors on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rankpilot.cost.record.device_on_meta import DeviceOnMeta, device_on_meta
from rankpilot.cost.record.known_contents import MOST, content_of, known_contents

GRID = torch.tensor([[1, 4, 6], [1, 2, 8]])


def _windows(grid: torch.Tensor) -> list[int]:
    ends = (grid[:, 1] * grid[:, 2]).repeat_interleave(2).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).diff().tolist()


def _in_place(grid: torch.Tensor) -> list[int]:
    places = torch.zeros(6, dtype=torch.long)
    view = places[1:4]
    view[grid[:, 0].bool().sum()] = 7
    places += 1
    return places.tolist()


def _by_masks(grid: torch.Tensor) -> list[int]:
    mask = grid > 3
    return [*grid[mask].tolist(), *mask.nonzero()[:, 1].tolist(), *torch.unique_consecutive(grid[:, 0]).tolist()]


def _of_numbers(grid: torch.Tensor) -> list[float]:
    made = torch.tensor([int(grid[0, 1]), 5, grid[1].max()])
    return [made.sum().item(), *torch.arange(grid.max()).float().mul(0.5).tolist()]


@pytest.mark.parametrize("compute", [_windows, _in_place, _by_masks, _of_numbers])
def test_what_a_model_reads_on_the_meta_device_is_what_it_reads_elsewhere(
    compute: Callable[[torch.Tensor], Any],
) -> None:
    with device_on_meta(DeviceOnMeta("cpu")), known_contents({"grid": GRID}) as batch:
        assert batch["grid"].is_meta
        found = compute(batch["grid"])
    assert found == compute(GRID)


def test_large_tensors_of_one_value_stay_known() -> None:
    pixels = torch.tensor(0.5).expand(4, 2, 3, MOST)
    with device_on_meta(DeviceOnMeta("cpu")), known_contents({"pixels": pixels}) as batch:
        flat = batch["pixels"].to(torch.bfloat16).view(8, 3, MOST)
        is_empty = (flat == 0.0).sum(dim=(-1, -2)) == 3 * MOST
        assert flat[~is_empty].shape == flat.shape
        assert is_empty.view(4, 2).sum(dim=1).tolist() == [0] * 4
        assert content_of(flat[~is_empty]).unique().tolist() == [0.5]


def test_what_depends_on_unknown_contents_is_unknown() -> None:
    with device_on_meta(DeviceOnMeta("cpu")), known_contents({"grid": GRID}) as batch:
        weights = torch.rand(3)
        for unknown in (weights, batch["grid"] * weights, torch.zeros(MOST + 1), torch.empty(3)):
            assert content_of(unknown) is None
        copied = batch["grid"].float()
        assert content_of(copied) is not None
        copied += weights
        assert content_of(copied) is None
    assert content_of(batch["grid"]) is None, "contents are known inside the context"


def test_a_masked_scatter_has_a_backward_pass_without_contents() -> None:
    with device_on_meta(DeviceOnMeta("cpu")), known_contents({"grid": GRID}) as batch:
        features = torch.rand(3, requires_grad=True)
        torch.rand(2, 3).masked_scatter(batch["grid"] > 3, features).sum().backward()
        assert features.grad is not None
        assert features.grad.shape == (3,)
