"""Budgets as people write them."""

from __future__ import annotations

import pytest
from rankpilot.errors import BudgetError
from rankpilot.memory.budget import Budget, format_bytes


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ("6GiB", "bytes", 6 * 2**30),
        ("6 gib", "bytes", 6 * 2**30),
        ("350MB", "bytes", 350e6),
        ("1.5 KiB", "bytes", 1536),
        ("2TB", "bytes", 2e12),
        ("17b", "bytes", 17),
        (12345, "bytes", 12345),
        ("12_345", "bytes", 12345),
        ("12,345", "bytes", 12345),
        (1, "bytes", 1),
        ("80%", "share", 0.8),
        ("12.5 %", "share", 0.125),
        (0.8, "share", 0.8),
        (1.0, "share", 1.0),
        (4.0, "share", 4.0),
        ("0.5", "share", 0.5),
        ("300k params", "parameters", 300e3),
        ("300 params", "parameters", 300),
        ("1.2M parameters", "parameters", 1.2e6),
        ("2b params", "parameters", 2e9),
        ("auto", "auto", 0.9),
        (" Auto ", "auto", 0.9),
        (Budget("share", 0.3), "share", 0.3),
    ],
)
def test_every_form_is_read(given, kind, value):
    budget = Budget.parse(given)
    assert budget.kind == kind
    assert budget.value == pytest.approx(value)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "lots",
        "6 GB RAM",
        "-1",
        -5,
        0,
        "0GB",
        "0%",
        "nan",
        float("nan"),
        float("inf"),
        "1.2.3",
        ".",
        True,
        "1e999",
        "GiB",
        "5 furlongs",
    ],
)
def test_what_cannot_be_read_is_refused_with_the_forms(given):
    with pytest.raises(BudgetError, match=r"Cannot read the budget .*'6GiB'"):
        Budget.parse(given)


@pytest.mark.parametrize("given", [5.0, 1e9, "6.5"])
def test_a_large_fraction_is_no_guessing_matter(given):
    with pytest.raises(BudgetError, match="neither a share nor a whole number"):
        Budget.parse(given)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3 MiB"), (5.5 * 2**40, "5632 GiB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


def test_what_is_printed_can_be_read_back():
    for count in (999, 123456, 7.3e8, 4.4e10):
        assert Budget.parse(format_bytes(count)).value == pytest.approx(count, rel=1e-3)
