"""YAML with plain values alone."""

from __future__ import annotations

import pytest
import yaml
from rankpilot.common.files import parse_yaml


def test_what_people_write() -> None:
    text = "model: m\nsteps: 5\nrate: 1.0e-4\nlist: [1, two, null]\nnested:\n  deep: {a: true}\n"
    assert parse_yaml(text) == {
        "model": "m",
        "steps": 5,
        "rate": 1e-4,
        "list": [1, "two", None],
        "nested": {"deep": {"a": True}},
    }
    assert parse_yaml('{"json": [1, 2.5, "x"]}') == {"json": [1, 2.5, "x"]}
    assert parse_yaml("") is None


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x", "a: &x {b: 1}\nc:\n  <<: *x", "&a [*a]"])
def test_references_are_refused_with_their_place(text: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError, match=r"references .* are not read") as caught:
        parse_yaml(text)
    assert caught.value.problem_mark is not None


@pytest.mark.parametrize("text", ["!!python/name:os.system", "!!python/object/new:os.system [ls]", "!x y"])
def test_tags_that_ask_for_objects(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 5000, "!!int ''", "a: 2001-99-99", "{[1]: 2}", "!!bool x", "1" * 5000, "\x00"])
def test_faults_of_the_library_are_its_own_errors(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
