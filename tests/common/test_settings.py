"""Settings as JSON values and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import as_json, from_json


@dataclass(frozen=True)
class Inner:
    """Nested settings."""

    fractions: tuple[float, ...] = (0.0,)
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"depth is at least 1; got {self.depth}.")


@dataclass(frozen=True)
class Outer:
    """A field of every type that settings have."""

    name: str
    rate: float = 0.5
    count: int = 1
    on: bool = False
    limit: int | None = None
    kind: Literal["a", "b"] | None = "a"
    words: tuple[str, ...] = ()
    folder: Path = Path("x")
    inner: Inner = field(default_factory=Inner)
    speed: float | Literal["auto"] = "auto"


FULL = Outer("n", 2.0, 3, True, 4, "b", ("u", "v"), Path("y"), Inner((0.0, 0.5), 2))


def test_every_type_comes_back() -> None:
    values = as_json(Outer, FULL) | {"folder": "y"}
    assert from_json(Outer, values) == FULL
    assert from_json(Outer, values, complete=True) == FULL
    assert from_json(Outer, {"name": "n", "limit": None, "kind": None}) == Outer("n", kind=None)


def test_a_whole_number_is_a_number_but_no_other_way_round() -> None:
    rate = from_json(Outer, {"name": "n", "rate": 1}).rate
    assert (rate, type(rate)) == (1.0, float)
    with pytest.raises(ConfigError, match=r"count must be a whole number; got 1\.0"):
        from_json(Outer, {"name": "n", "count": 1.0})


def test_a_base_has_what_the_values_lack() -> None:
    assert from_json(Outer, {"count": 9}, base=FULL).words == FULL.words
    assert from_json(Outer, {"count": 9}, base=FULL).count == 9
    assert from_json(Outer, {"inner": {"depth": 5}}, base=FULL).inner == Inner(depth=5), "nested ones as a whole"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], r"settings must be a mapping of names to values; got \[1\]"),
        ({}, "missing 'name'; valid settings are name, rate, count"),
        ({"name": "n", "cuont": 1, "x": 2}, "unknown 'cuont', 'x'; valid settings are name, rate, count, on"),
        ({"name": 3}, "name must be text; got 3"),
        ({"name": "n", "rate": "fast"}, "rate must be a number; got 'fast'"),
        ({"name": "n", "count": True}, "count must be a whole number; got True"),
        ({"name": "n", "on": 1}, "on must be true or false; got 1"),
        ({"name": "n", "limit": "many"}, "limit must be a whole number; got 'many'"),
        ({"name": "n", "kind": "c"}, "kind must be one of 'a', 'b'; got 'c'"),
        ({"name": "n", "speed": "fast"}, "speed must be a number, or one of 'auto'; got 'fast'"),
        ({"name": "n", "words": "u"}, "words must be a list where each item is text; got 'u'"),
        ({"name": "n", "words": ["u", 1]}, "words must be text; got 1"),
        ({"name": "n", "folder": 1}, "folder must be a path; got 1"),
        ({"name": "n", "inner": {"deep": 3}}, "inner: unknown 'deep'; valid settings are fractions, depth"),
        ({"name": "n", "inner": {"fractions": [None]}}, "inner: fractions must be a number; got None"),
        ({"name": "n", "inner": {"depth": 0}}, "inner: depth is at least 1; got 0"),
    ],
)
def test_values_that_do_not_fit(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(Outer, values)


def test_complete_values_have_every_key() -> None:
    with pytest.raises(ConfigError, match="missing 'rate', 'count'"):
        from_json(Outer, {"name": "n"}, complete=True)
