"""Blocks: the frozen model's hidden states, and runs that join the batch on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rankpilot.common.errors import UnsupportedError
from rankpilot.env.stack.trainer import Blocks
from rankpilot.lora.targets import find_target_modules
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "bert", "gpt2")
Make = Callable[[str], tuple[nn.Module, list[Any]]]


@pytest.fixture
def make(named_family: Callable[[str], Any]) -> Make:
    """A plain model and its target modules."""

    def model_of(name: str) -> tuple[nn.Module, list[Any]]:
        family = named_family(name)
        options = {"target_modules": ["c_attn", "c_proj", "c_fc"]} if name == "gpt2" else {}
        return family.base().double().eval(), find_target_modules(family.model(torch.float64, **options))

    return model_of


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_join_later_have_the_same_answers(make: Make, name: str) -> None:
    model, targets = make(name)
    blocks = Blocks(model, targets)
    first, second, third = torch.randint(1, 48, (3, 2, 8), generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        expected = model(input_ids=torch.cat([first, second, third])).logits
        early, late = blocks.frozen(first, [0])[0], blocks.frozen(torch.cat([second, third]), [1])[1]
        with blocks.joined({0: early, 1: late}) as tokens:
            logits = model(input_ids=tokens).logits
        with blocks.joined({1: late}) as tokens:
            last = model(input_ids=tokens).logits
        with pytest.raises(RuntimeError, match="inside"), blocks.joined({1: late}):
            raise RuntimeError("inside")
        again = model(input_ids=torch.cat([first, second, third])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, expected[len(logits) - len(last) :], rtol=1e-9, atol=1e-9)
    assert torch.equal(again, expected), "the model is as it was"


def test_a_model_without_a_list_of_blocks_is_refused(make: Make) -> None:
    _, targets = make("llama")
    with pytest.raises(UnsupportedError, match="one list of blocks"):
        Blocks(nn.Sequential(nn.Linear(2, 2)), targets)
