"""Finds a model's configuration by name, without its weights: a folder, a file, a short name or a Hugging Face id.

The configurations of common models ship with the package, so that neither they nor a network are needed: sizes are
facts, published on the models' pages. What a configuration says of a model of text is checked here as well: whether it
reads tokens at all, and how many of them a row can have.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..errors import AssetError, ConfigError, UnknownNameError, first_line

_TABLE = Path(__file__).with_name("published_models.json")

_VARIANTS = ("-instruct", "-it", "-pt", "-chat", "-base")
"""Ends of names of models that have the sizes of the model without them."""


@cache
def published_models() -> dict[str, dict[str, Any]]:
    """The models of the table by short name ("llama-3.1-8b").

    Each has "owner" (of the Hugging Face id), "parameters" (their published number, without the head of a classifier)
    and "config" (fields of the configuration).
    """
    table: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text())
    return table


def find_configuration(name: str) -> PreTrainedConfig:
    """A model's configuration.

    Args:
        name: a local folder or config.json; a short name of the table, such as "qwen3-8b"; or a Hugging Face id. The
            ids of the table's models, and of their variants for chat, need no network.

    Raises:
        UnknownNameError: there is no such model.
        AssetError: a path that does not exist, or an id that cannot be read, as without a network.
        ConfigError: the configuration names no model that transformers knows.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _read(name, path.parent if path.is_file() else path)
    if name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise AssetError(f"There is no configuration at {path}. Give a folder with a config.json, or the file itself.")
    short = _short_name(name)
    if short in published_models():
        fields = dict(published_models()[short]["config"])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if "/" not in name:
        hint = "A folder with a config.json or a Hugging Face id works too."
        raise UnknownNameError.of("model", name, published_models(), hint)
    return _read(name, name)


def _short_name(name: str) -> str:
    """The name in the table that an id or a name would have."""
    owner, _, model = name.lower().rpartition("/")
    model = model.removeprefix("meta-").replace("-instruct-", "-")
    for candidate in (model, *(model.removesuffix(variant) for variant in _VARIANTS)):
        entry = published_models().get(candidate)
        if entry is not None and owner in ("", entry["owner"].lower()):
            return candidate
    return ""


def _read(name: str, place: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(place)
    except OSError as error:
        raise AssetError(
            f"The configuration of {name!r} could not be read: {first_line(error)} Check the id or path and the "
            f"network; without one, a local config.json works, or one of {', '.join(list(published_models())[:5])}, ..."
        ) from error
    except StrictDataclassError as error:
        raise unusable(name, error) from error
    except ArithmeticError as error:
        raise ConfigError(
            f"The configuration of {name!r} holds a number that makes no model: {first_line(error)}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"The configuration of {name!r} names no model that transformers knows: {first_line(error)}"
        ) from error


def unusable(name: str, error: StrictDataclassError) -> ConfigError:
    """The error for a configuration whose fields do not fit one another."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return ConfigError(f"The configuration of {name!r} cannot be used: {first_line(cause)}")


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
