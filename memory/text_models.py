"""What a model of text reads: whether it reads tokens at all, and how many of them a row can have."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError

_TOKENS = ("input_ids", "inputs")
"""The main input of models that read tokens, as transformers calls it; the second is Perceiver's, of any kind."""


def check_reads_tokens(config: PreTrainedConfig, name: str = "") -> None:
    """Raise ConfigError for a model that reads pictures or sound, and no tokens.

    Args:
        config: of the model.
        name: of the model, for the error; by default the place from which the configuration was read.
    """
    name = name or config.name_or_path
    main = _main_input(config)
    if main in _TOKENS and hasattr(config.get_text_config(), "vocab_size"):
        return
    what = f"The model {name!r} ({type(config).__name__})" if name else f"The model ({type(config).__name__})"
    raise ConfigError(
        f"{what} reads no tokens{'' if main in _TOKENS else f' but {main}'}: rankpilot plans and trains models of text."
    )


def _main_input(config: PreTrainedConfig) -> str:
    """The name of the main input of the model's own class, or of its base where the configuration names no class."""
    kinds = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    kinds.append(AutoModel._model_mapping.get(type(config), None))
    names: list[Any] = [getattr(kind, "main_input_name", None) for kind in kinds]
    return str(next(filter(None, names), _TOKENS[0]))


def most_positions(model: PreTrainedModel) -> int | None:
    """The most tokens of a row for which the model has positions; None where its class or configuration sets no limit.

    Args:
        model: without adapters, or inside them.
    """
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token's number.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most if most > 0 else None


def check_length(length: int, model: PreTrainedModel) -> None:
    """Raise ConfigError for rows that are longer than the model has positions."""
    most = most_positions(model)
    if most is not None and length > most:
        raise ConfigError(f"The model has {most} positions, and max_length is {length}. Lower --max-length.")
