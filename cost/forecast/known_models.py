"""Models known by name, with their configurations.

Nothing here imports a library, so names are resolved or refused early.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from ...common.errors import AssetError, UnknownNameError
from ...common.files import expanded

_MODELS = Path(__file__).with_name("published_models.json")


_VARIANTS = ("-instruct", "-it", "-pt", "-chat", "-base", "-hf")
"""Name suffixes of models with the same sizes as the model without the suffix."""


_MIRRORS = ("nousresearch", "unsloth")
"""Owners that mirror others' models with the same sizes and names."""


@cache
def published_models() -> dict[str, dict[str, Any]]:
    """Return the models of the table by short name ("llama-3.1-8b").

    Each has "id" (an existing Hugging Face id), "parameters" (the published count, without a classification head) and
    "config" (fields of the configuration).
    """
    table: dict[str, dict[str, Any]] = json.loads(_MODELS.read_text())
    return table


def check_known(name: str) -> None:
    """Raise UnknownNameError or AssetError unless a model is a known name, a path or an id."""
    if expanded(name).exists():
        return
    if name.startswith((".", "/", "~")) or name.endswith(".json"):
        path = expanded(name)
        raise AssetError(f"No configuration found at {path}. Pass a folder with a config.json, or the file itself.")
    if "/" not in name and not short_name(name):
        hint = "A folder with a config.json or a Hugging Face id also works."
        raise UnknownNameError.of("model", name, published_models(), hint)


def short_name(name: str) -> str:
    """Return the short name in the table for an id or a name; empty if there is none."""
    if known := _ids().get(name.lower()):
        return known
    owner, _, model = name.lower().rpartition("/")
    model = model.removeprefix("meta-").replace("-instruct-", "-")
    for candidate in (model, *(model.removesuffix(variant) for variant in _VARIANTS)):
        entry = published_models().get(candidate)
        if entry is not None and owner in ("", entry["id"].partition("/")[0].lower(), *_MIRRORS):
            return candidate
    return ""


@cache
def _ids() -> dict[str, str]:
    return {entry["id"].lower(): name for name, entry in published_models().items()}
