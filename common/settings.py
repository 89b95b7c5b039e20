"""Settings as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .files import as_plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def as_json(kind: type[DataclassInstance], settings: DataclassInstance) -> dict[str, Any]:
    """Settings as JSON values.

    Args:
        kind: the dataclass whose fields count.
        settings: of that class or of a subclass, whose further fields are left out.
    """
    values = asdict(settings)
    return {name: as_plain(values[name]) for name in kind.__dataclass_fields__}
