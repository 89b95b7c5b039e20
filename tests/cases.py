"""Parametrised tests of which `make test` runs some, and `make test-long` the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def first_cases(count: int, cases: Sequence[Any]) -> list[Any]:
    """Cases for `parametrize`: after the first `count`, which stand for all, they are left to `make test-long`.

    Args:
        count: at least 1.
        cases: values, or tuples of them.
    """
    others = [case if isinstance(case, tuple) else (case,) for case in cases[count:]]
    return [*cases[:count], *(pytest.param(*values, marks=pytest.mark.long) for values in others)]
