"""Budgets as people write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rankpilot.common.errors import BudgetError
from rankpilot.common.text import format_bytes
from rankpilot.cost import budget as budget_module
from rankpilot.cost.budget import Budget, Limit, beyond_device
from rankpilot.cost.cost import ByteCost, ParameterCost


def test_every_form_is_read():
    for given, kind, value in [
        ("24GiB", "total", 24 * 2**30),
        ("350MB", "total", 350e6),
        (12345, "total", 12345),
        ("12_345", "total", 12345),
        ("1024", "total", 1024),
        ("6GiB step", "bytes", 6 * 2**30),
        ("1.5 KiB step", "bytes", 1536),
        ("17b  Step", "bytes", 17),
        ("80%", "share", 0.8),
        ("12.5 %", "share", 0.125),
        (1.0, "share", 1.0),
        (4.0, "share", 4.0),
        ("0.5", "share", 0.5),
        ("300k params", "parameters", 300e3),
        ("1.2M parameters", "parameters", 1.2e6),
        ("2b params", "parameters", 2e9),
        ("auto", "auto", 0.9),
        (" Auto ", "auto", 0.9),
        (Budget("share", 0.3), "share", 0.3),
    ]:
        budget = Budget.parse(given)
        assert (budget.kind, budget.value) == (kind, pytest.approx(value)), given


def test_what_cannot_be_read_is_refused_with_the_forms():
    for given in (
        "",
        "lots",
        "6 GB RAM",
        -5,
        0,
        "0GB",
        "0%",
        "nan",
        float("inf"),
        "1.2.3",
        ".",
        True,
        "1e999",
        "GiB",
        "24,5GiB",
    ):
        with pytest.raises(BudgetError, match=r"Cannot read the budget .*'24GiB'"):
            Budget.parse(given)


@pytest.mark.parametrize("given", [5.0, 1e9, "6.5"])
def test_a_large_fraction_is_no_guessing_matter(given):
    with pytest.raises(BudgetError, match="neither a share nor a whole number"):
        Budget.parse(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [(1, "100%"), ("1", "100%"), (2, "2%"), ("80", "80%"), (400, "400%"), (401, "401MB"), (1023, "1023MB")],
)
def test_so_few_bytes_are_refused_with_what_was_meant(given, meant):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(given)
    message = str(caught.value)
    assert f"The budget {given!r} would be {int(given)} bytes" in message
    assert f'Did you mean "{meant}"' in message
    assert Budget.parse(meant).value > 0


CPU, PLAIN = torch.device("cpu"), np.array([8, 4])
PARAMETERS = ParameterCost(np.array([[100.0, 10.0]]))
BYTES = ByteCost(
    ("loss",), np.array([1000.0]), np.array([[400.0, 40.0]]), np.zeros((1, 0)), np.zeros((0, 2), dtype=bool)
)


@pytest.mark.parametrize(
    ("given", "cost", "limit"),
    [
        ("50%", PARAMETERS, Limit(420.0, "parameters")),  # rank 8, and 4 where that is the highest
        ("50%", BYTES, Limit(2180.0, "bytes")),
        ("300 params", PARAMETERS, Limit(300.0, "parameters")),
        ("2KiB step", BYTES, Limit(2048.0, "bytes")),
    ],
)
def test_the_limit_is_in_the_unit_of_the_cost(given, cost, limit):
    assert Budget.parse(given).resolve(cost, PLAIN, CPU) == limit


@pytest.mark.parametrize(
    ("given", "limit", "words"),
    [
        (
            "80%",
            Limit(8 * 2**20, "bytes"),
            "The budget is 8 MiB per step on top of the frozen model: 80% of the 10 MiB that the LoRA takes",
        ),
        (
            "24GiB",
            Limit(20 * 2**30, "bytes"),
            "The total budget is 24 GiB: 20 GiB per step, and 4 GiB for the frozen model",
        ),
        ("1MB step", Limit(1e6, "bytes"), "The budget is 1 MB (976.6 KiB) per step on top of the frozen model."),
        ("1.5GB", Limit(2**20, "bytes"), "The total budget is 1.5 GB (1.397 GiB): 1 MiB per step"),
        ("6GiB step", Limit(6 * 2**30, "bytes"), "The budget is 6 GiB per step on top of the frozen model."),
        (
            "auto",
            Limit(9 * 2**30, "bytes"),
            "The budget is 9 GiB per step on top of the frozen model, nine tenths of the free memory.",
        ),
        ("300k params", Limit(300e3, "parameters"), "The budget is 300,000 parameters in the adapter."),
    ],
)
def test_what_a_budget_allows_is_told(given, limit, words):
    assert Budget.parse(given).told(limit).startswith(words)
    assert Budget.parse(str(Budget.parse(given))) == Budget.parse(given)


def test_a_budget_of_more_than_the_device_has_is_told():
    for given, told in (("9999TiB", True), ("9999TiB step", True), ("1GiB", False), ("900%", False)):
        said = beyond_device(Budget("share", 9.0) if "%" in given else Budget.parse(given), CPU)
        assert said.startswith("The budget exceeds this machine's memory, ") is told


def test_a_share_is_one_of_what_the_reference_takes():
    kept = np.array([32, 4])
    half = Budget.parse("50%").resolve(PARAMETERS, kept, CPU)
    assert half.value == pytest.approx(0.5 * PARAMETERS.per_rank[0] @ kept)
    assert Budget.parse("300 params").resolve(PARAMETERS, kept, CPU).value == 300


def test_auto_is_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(budget_module, "free_bytes", lambda device: {CPU: 5000}[device])
    assert Budget.parse("auto").resolve(BYTES, PLAIN, CPU) == Limit(4500.0, "bytes")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu_leaves_a_margin():
    device = torch.device("cuda", torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info(device)
    limit = Budget.parse("auto").resolve(BYTES, PLAIN, device)
    assert 0 < limit.value <= 0.9 * (free + torch.cuda.memory_reserved(device))


@pytest.mark.parametrize(
    ("given", "cost", "advice"),
    [
        ("6GiB step", PARAMETERS, r"is 6,442,450,944 bytes, .* counted in parameters\. .*'300k params'"),
        ("auto", PARAMETERS, r"is auto, .* counted in parameters\. .*'300k params'"),
        ("300k params", BYTES, r"is 300,000 parameters, .* counted in bytes\. .*'6GiB step'"),
    ],
)
def test_a_budget_in_the_wrong_unit_is_refused(given, cost, advice):
    with pytest.raises(BudgetError, match=advice):
        Budget.parse(given).resolve(cost, PLAIN, CPU)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3 MiB"), (5.5 * 2**40, "5.5 TiB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


def test_what_is_printed_can_be_read_back():
    for count in (999, 123456, 7.3e8, 4.4e10):
        assert Budget.parse(format_bytes(count)).value == pytest.approx(count, rel=1e-3)
