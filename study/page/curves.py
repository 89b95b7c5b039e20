"""Curves as a page gets them: rising steps, few points, no value that JSON cannot write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ...common.arrays import FloatArray
from ..run.checks import is_number

MOST_POINTS = 1500
"""More than a wide screen has room for; longer curves are thinned to this."""


def curve(points: Iterable[tuple[Any, Any]], of_each: Callable[[FloatArray], Any] = np.mean) -> dict[str, Any] | None:
    """A curve as plain JSON; None without a point.

    Args:
        points: (step, value), in any order; of a step that comes twice, as after a resumption, the later value counts.
        of_each: what stands for the points that a thinned curve draws as one.

    Returns:
        "x", steps rising, "y", values or null where one is not finite, and "each", the points that one stands for.
    """
    known = {float(step): float(value) for step, value in points if is_number(step) and is_number(value)}
    if not known:
        return None
    table = np.array(sorted(known.items()))
    each = math.ceil(len(table) / MOST_POINTS)
    if each == 1:
        return {"x": numbers(table[:, 0]), "y": numbers(table[:, 1], None), "each": 1}
    parts = [table[start : start + each] for start in range(0, len(table), each)]
    values = [of_each(part[np.isfinite(part[:, 1]), 1]) if np.isfinite(part[:, 1]).any() else np.nan for part in parts]
    return {"x": numbers([part[-1, 0] for part in parts]), "y": numbers(values, None), "each": each}


def numbers(values: Sequence[float] | FloatArray, digits: int | None = 2) -> list[float | int | None]:
    """Values as short JSON: whole ones as integers, others rounded, and null for what is not finite.

    Args:
        values: any shape (n,).
        digits: behind the point; None for six significant ones.
    """
    return [_short(value, digits) for value in np.asarray(values, dtype=np.float64).tolist()]


def plain(value: Any) -> Any:
    """A value of lists, dicts and scalars as JSON can write it: null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | float | np.number):
        return _short(float(value), None)
    return value if value is None else str(value)


def _short(value: float, digits: int | None) -> float | int | None:
    if not math.isfinite(value):
        return None
    if value.is_integer():
        return int(value)
    return float(f"{value:.6g}") if digits is None else round(value, digits)
