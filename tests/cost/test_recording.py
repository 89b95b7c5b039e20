"""Which modules' gradients flow where, by hand on graphs of a few operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rankpilot.cost.record.recorder import _SAVED_FOR, flow_from, saved_by
from torch.nn.functional import conv1d


def rand(*shape: int, trains: bool = False) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=trains)


class Graph:
    """A graph with leaves of three modules (bits 1, 2, 4)."""

    def __init__(self) -> None:
        self.leaves = [rand(4, 4, trains=True) for _ in range(3)]
        self._numbers = {id(leaf): 1 << index for index, leaf in enumerate(self.leaves)}

    def flow(self, loss: torch.Tensor) -> dict[Any, int]:
        return flow_from(loss, lambda leaf: self._numbers[id(leaf)])

    def saved(self, loss: torch.Tensor) -> dict[int, int]:
        """The modules for which each storage is saved; hooks leave the tensors as they are."""
        flow = self.flow(loss)
        result: dict[int, int] = {}
        for node in flow:
            for tensor, modules in saved_by(node, flow):
                result[tensor.data_ptr()] = result.get(tensor.data_ptr(), 0) | modules
        return result


def under_hooks() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.data, lambda tensor: tensor)


@pytest.fixture
def graph() -> Graph:
    return Graph()


def test_a_deep_graph_needs_no_deep_stack(graph):
    hidden = graph.leaves[0]
    for _ in range(20_000):
        hidden = hidden + 1
    assert set(graph.flow(hidden.sum()).values()) == {1}


def test_the_input_of_an_adapter_is_held_for_its_a_and_a_frozen_weight_for_what_is_upstream(graph):
    upstream, lora_a, lora_b = graph.leaves
    weight = rand(4, 4)
    with under_hooks():
        hidden = upstream + 0
        low = hidden @ lora_a
        loss = (hidden @ weight + low @ lora_b).sum()
    saved = graph.saved(loss)
    assert saved[weight.data_ptr()] == 0b001
    assert saved[hidden.data_ptr()] == 0b010
    assert saved[lora_a.data_ptr()] == 0b001
    assert saved[low.data_ptr()] == 0b100
    assert saved[lora_b.data_ptr()] == 0b011


def test_an_operation_that_is_not_in_the_table_saves_for_all_its_inputs(graph):
    a, b, _ = graph.leaves
    assert "WhereBackward0" not in _SAVED_FOR
    with under_hooks():
        loss = torch.where(a > 0, a, b).sum()
    assert set(graph.saved(loss).values()) == {0b011}


OPERATIONS = {
    "MmBackward0": (torch.mm, [(3, 4), (4, 5)]),
    "BmmBackward0": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "MvBackward0": (torch.mv, [(3, 4), (4,)]),
    "AddmmBackward0": (torch.addmm, [(3, 5), (3, 4), (4, 5)]),
    "BaddbmmBackward0": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "MulBackward0": (torch.mul, [(3, 4), (3, 4)]),
    "DivBackward0": (torch.div, [(3, 4), (3, 4)]),
}


def test_every_operation_of_the_table_is_checked_against_torch():
    assert OPERATIONS.keys() | {"LinearBackward0"} == _SAVED_FOR.keys()  # torch makes that one on other devices only


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_table_says_what_torch_saves(name):
    """With one input that trains, torch leaves out exactly the factors that the table ties to other inputs."""
    operation, shapes = OPERATIONS[name]
    for trained in range(len(shapes)):
        inputs = [rand(*shape, trains=index == trained) for index, shape in enumerate(shapes)]
        node = operation(*inputs).grad_fn
        assert node.name() == name
        for saved, number in _SAVED_FOR[name].items():
            value = getattr(node, f"_saved_{saved}")
            assert (value is not None) == (number == trained), (saved, trained)
        everything = operation(*[tensor.detach().requires_grad_() for tensor in inputs]).grad_fn
        assert all(getattr(everything, f"_saved_{saved}") is not None for saved in _SAVED_FOR[name])
        assert len(everything.next_functions) > max(_SAVED_FOR[name].values())


def test_convolutions_save_both_factors_whatever_trains():
    """Therefore they must not be in the table."""
    node = conv1d(rand(2, 4, 6, trains=True), rand(4, 4, 3)).grad_fn
    assert node._saved_input is not None
    assert node._saved_weight is not None
    assert node.name() not in _SAVED_FOR
