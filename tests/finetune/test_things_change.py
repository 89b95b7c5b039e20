"""Equal means equal, also while things change: each saver in runs in which something happens in the middle."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from .changing_runs import CHANGES, SAVERS, Outcome, plain, train

FAMILIES = {
    "tiled loss": ("llama", "gpt2"),
    "input copies": ("llama", "bert"),
    "routed rows": ("qwen3-moe",),
    "selective": ("llama", "gpt2"),
    "whole layers": ("llama", "bert"),
}
EXACT = {"input copies", "selective", "whole layers"}
"""Those that promise the same bits; kernels round otherwise beside padding, and where two parts of a loss are added."""

TOLERANCE = 2e-5
"""Of numbers of some steps, as a share of the largest."""

ROUTED_TOLERANCE = 2e-4
"""The same where products are summed in another order, through all layers and steps."""

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def plain_run(family: str, dtype: torch.dtype, change: str) -> Outcome:
    return train(family, dtype, CHANGES[change], plain, resumed=False)


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float, what: str) -> None:
    if tolerance:
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max()) + 1e-7, what
    else:
        assert torch.equal(one, other), what


TOUCHING_STATE = ("a layer trains", "a second adapter", "weights are written")
"""What changes in runs that are gone on with from a checkpoint."""
CASES = [
    pytest.param(saver, families[place % len(families)], change, id=f"{saver}-{change}")
    for saver, families in FAMILIES.items()
    for place, change in enumerate(CHANGES)
]


@pytest.mark.parametrize(("saver", "family", "change"), CASES)
def test_a_run_equals_the_plain_one(saver: str, family: str, change: str) -> None:
    resumed = change in TOUCHING_STATE
    dtype = torch.bfloat16 if saver == "input copies" else torch.float32
    expected = plain_run(family, dtype, change)
    found = train(family, dtype, CHANGES[change], SAVERS[saver], resumed=resumed)
    tolerance = 0.0 if saver in EXACT else ROUTED_TOLERANCE if saver == "routed rows" else TOLERANCE
    for step, (one, other) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert_same(one, other, tolerance, f"loss {step}")
    for step, (one, other) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert one.keys() == other.keys(), f"step {step}"
        for name in one:
            assert_same(one[name], other[name], tolerance, f"gradient of {name} in step {step}")
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in found.weights.items():
        assert_same(weight, expected.weights[name], tolerance, name)
