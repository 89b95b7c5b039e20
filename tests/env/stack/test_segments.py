"""Segments: the cheapest cut of a batch, and products that leave zeros out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rankpilot.env.stack.adapters import OVERHEAD, AddDeltas, cut, make_segments

pytestmark = pytest.mark.usefixtures("one_thread")


def cost_of(segments: Sequence[tuple[int, int, int]], operations: float) -> float:
    return sum(OVERHEAD + operations * width * (end - start) for start, end, width in segments)


def cheapest(ranks: Sequence[int], operations: float) -> float:
    """By trying all cuts."""
    costs = []
    count = len(ranks)
    for edges in itertools.product((False, True), repeat=count - 1):
        bounds = [0, *(i + 1 for i, edge in enumerate(edges) if edge), count]
        widths = [-(-max(ranks[a:b]) // 16) * 16 for a, b in itertools.pairwise(bounds)]
        pieces = zip(bounds, bounds[1:], widths, strict=False)
        costs.append(cost_of([piece for piece in pieces if piece[2]], operations))
    return min(costs)


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1, 1.0])
def test_the_cut_is_the_cheapest(share: float) -> None:
    generator = np.random.default_rng(0)
    operations, sizes = OVERHEAD * share, set()
    for _ in range(40):
        ranks = (generator.integers(0, 50, 7) * (generator.random(7) < 0.6)).tolist()
        segments = cut(ranks, operations)
        assert cost_of(segments, operations) == pytest.approx(cheapest(ranks, operations))
        covered = {place: width for start, end, width in segments for place in range(start, end)}
        assert all(covered.get(place, 0) >= rank for place, rank in enumerate(ranks))
        assert all(width % 16 == 0 for width in covered.values())
        sizes.add(len(segments))
    assert len(sizes) > 1 or share == 0.01
    assert cut([0, 0], operations) == []


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(64, 32, 88), (128, 64, 64), (128, 256, 64), (2048, 32, 32)])
def test_products_leave_zeros_out_without_a_change_of_bits(tokens: int, d_in: int, d_out: int) -> None:
    """What all results rest on: on a machine where this fails, a run would depend on its neighbours."""
    generator = torch.Generator().manual_seed(0)
    ranks = [5, 0, 16, 24, 0, 1, 40]
    weights = (torch.zeros(7, 64, d_in), torch.zeros(7, 64, d_out))
    for (row, rank), side in itertools.product(enumerate(ranks), weights):
        side[row, :rank] = torch.randn(rank, side.shape[2], generator=generator)
    x, y, upper = (torch.randn(7, tokens, d, generator=generator) for d in (d_in, d_out, d_out))
    x.requires_grad_()
    scalings = torch.rand(7, 1, 1, generator=generator)
    results = []
    for own in (True, False):
        gradients = (torch.zeros_like(weights[0]), torch.zeros_like(weights[1]))
        segments = make_segments(range(7), ranks if own else [64] * 7, tokens, scalings, weights, gradients)
        x.grad = None
        output = AddDeltas.apply(y.clone(), x, segments, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
        output.backward(upper)
        results.append((output.detach(), x.grad, *gradients))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
