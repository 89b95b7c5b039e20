"""Which modules' gradients flow where, by hand on graphs of a few operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.recording import _SAVED_FOR, adapted_modules, flow_from, kept_on_context, saved_by
from torch.nn.functional import conv1d, linear

ALWAYS = 8


def rand(*shape: int, trains: bool = False) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=trains)


class Graph:
    """A graph with leaves of three modules (bits 1, 2, 4); other leaves that train belong to no module."""

    def __init__(self) -> None:
        self.leaves = [rand(4, 4, trains=True) for _ in range(3)]
        self._numbers = {id(leaf): 1 << index for index, leaf in enumerate(self.leaves)}
        self._kept: list[Any] = []

    def flow(self, loss: torch.Tensor) -> dict[Any, int]:
        return flow_from(loss, lambda leaf: self._numbers.get(id(leaf), ALWAYS))

    def saved(self, loss: torch.Tensor) -> dict[int, int]:
        """The modules for which each storage is saved; hooks leave the tensors as they are."""
        flow = self.flow(loss)
        result: dict[int, int] = {}
        for node in flow:
            on_context = ((tensor, flow[node]) for tensor in kept_on_context(node))
            for tensor, modules in (*saved_by(node, flow), *on_context):
                address = tensor.data_ptr()
                result[address] = result.get(address, 0) | modules
        return result


def under_hooks() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.data, lambda tensor: tensor)


@pytest.fixture
def graph() -> Graph:
    return Graph()


def test_a_node_depends_on_the_leaves_below_it(graph):
    a, b, c = graph.leaves
    first = a @ b
    second = first + c
    flow = graph.flow(second.sum())
    assert flow[first.grad_fn] == 0b011
    assert flow[second.grad_fn] == 0b111


def test_frozen_factors_carry_no_gradient(graph):
    a, _, _ = graph.leaves
    frozen = rand(4, 4)
    hidden = (a * 2) @ frozen
    flow = graph.flow((hidden @ frozen.mT).sum())
    assert set(flow.values()) == {0b001}


def test_leaves_that_belong_to_no_module_always_train(graph):
    a, _, _ = graph.leaves
    head = rand(4, 4, trains=True)
    product = a @ head
    assert graph.flow(product.sum())[product.grad_fn] == ALWAYS | 1


def test_a_residual_stream_collects_what_it_passes(graph):
    a, b, c = graph.leaves
    stream = rand(4, 4)
    nodes = []
    for leaf in (a, b, c):
        stream = stream + torch.tanh(stream @ leaf)
        nodes.append(stream.grad_fn)
    flow = graph.flow(stream.sum())
    assert [flow[node] for node in nodes] == [0b001, 0b011, 0b111]


def test_a_deep_graph_needs_no_deep_stack(graph):
    hidden = graph.leaves[0]
    for _ in range(20_000):
        hidden = hidden + 1
    assert set(graph.flow(hidden.sum()).values()) == {1}


def test_a_loss_without_graph_has_no_flow(graph):
    assert graph.flow(torch.zeros(())) == {}


def test_each_factor_is_saved_for_the_gradient_of_the_other(graph):
    a, b, c = graph.leaves
    with under_hooks():
        left, right = a + 0, b + 0
        loss = ((left @ right) * 1).sum() + c.sum()
    saved = graph.saved(loss)
    assert saved[left.data_ptr()] == 0b010
    assert saved[right.data_ptr()] == 0b001


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


def test_a_quotient_saves_its_numerator_for_its_denominator(graph):
    a, b, _ = graph.leaves
    with under_hooks():
        above, below = a + 0, b + 9
        loss = (above / below).sum()
    saved = graph.saved(loss)
    assert saved[above.data_ptr()] == 0b010
    assert saved[below.data_ptr()] == 0b011


def test_an_operation_that_is_not_in_the_table_saves_for_all_its_inputs(graph):
    a, b, _ = graph.leaves
    assert "WhereBackward0" not in _SAVED_FOR
    with under_hooks():
        loss = torch.where(a > 0, a, b).sum()
    assert set(graph.saved(loss).values()) == {0b011}


class Kept(torch.autograd.Function):
    """Saves one tensor through autograd, and others on its context."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: dict[str, Any]) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.table = table
        return hidden * 3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * 3, None


def test_tensors_on_the_context_of_a_function_are_saved_too(graph):
    a, b, _ = graph.leaves
    table = {"codes": [rand(4), rand(4)], "number": 7}
    with under_hooks():
        hidden = a + 0
        loss = (Kept.apply(hidden, table) + b).sum()
    saved = graph.saved(loss)
    assert saved == dict.fromkeys([hidden.data_ptr(), *(t.data_ptr() for t in table["codes"])], 0b001)


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


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4)])
def test_linear_layers_are_made_of_operations_of_the_table(shape):
    hidden, weight = rand(*shape, trains=True), rand(5, 4, trains=True)
    names = {node.name() for node in flow_from(linear(hidden, weight, rand(5)), lambda leaf: 1)}
    assert names & {"AddmmBackward0", "MmBackward0", "LinearBackward0"}
    assert names <= {*_SAVED_FOR, "ViewBackward0", "UnsafeViewBackward0", "TBackward0", "AddBackward0"} | {
        "torch::autograd::AccumulateGrad"
    }


def test_a_plan_as_a_set_of_modules() -> None:
    assert adapted_modules(np.array([0, 3, 0, 1])) == 0b11010
    assert adapted_modules(np.array([False, True])) == 0b110
    assert adapted_modules(np.zeros(2, dtype=np.int64)) == 0b100, "what always trains is in every set"
