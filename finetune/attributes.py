"""Puts back what steps that are measured write into objects of a user's, such as a Trainer and a collator."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONG = 10_000
"""Lists that are longer hold data, not records of steps."""


@contextmanager
def put_back(*owners: object) -> Iterator[None]:
    """Put back what is written into the attributes of objects, and into the lists and dictionaries that they hold."""
    every = [own for owner in owners if isinstance(own := getattr(owner, "__dict__", None), dict)]
    before = [(attributes, dict(attributes)) for attributes in every]
    containers: dict[int, tuple[Any, Any]] = {}
    for attributes in every:
        for value in attributes.values():
            _note(value, containers)
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)
        for container, content in containers.values():
            container.clear()
            container.extend(content) if isinstance(container, list | deque) else container.update(content)


def _note(value: Any, containers: dict[int, tuple[Any, Any]]) -> None:
    """Note the content of a container and of those inside it."""
    if not isinstance(value, dict | list | deque | set) or len(value) > LONG or id(value) in containers:
        return
    containers[id(value)] = value, value.copy()
    for item in value.values() if isinstance(value, dict) else value:
        _note(item, containers)
