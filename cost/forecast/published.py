"""Find the published configurations of models by name.

A configuration is found without the weights: in a folder or file, by a short name or by a Hugging Face id. Those of
common models ship with the package, so they need no network: sizes are facts, published on the models' pages. This
module also checks the configurations of text models: the model must read tokens, and rows must fit its positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import StrictDataclassError

from ...common.errors import AssetError, ConfigError, first_line, shown
from ...common.files import expanded, read_object
from ..step_config import Quantization
from .known_models import check_known, published_models, short_name

if TYPE_CHECKING:  # imports torch; names are refused earlier
    from transformers import PreTrainedConfig, PreTrainedModel


def find_configuration(name: str) -> PreTrainedConfig:
    """Return a model's configuration.

    Args:
        name: a local folder or config.json; a short name of the table, such as "qwen3-8b"; or a Hugging Face id. Ids in
            the table, and those of their chat variants, need no network.

    Raises:
        UnknownNameError: there is no such model.
        AssetError: the path does not exist, or the id cannot be read, as without a network.
        ConfigError: the configuration names no model known to transformers.
    """
    check_known(name)
    path, short = expanded(name), short_name(name)
    if not path.exists() and short:
        from transformers import AutoConfig

        fields = dict(published_models()[short]["config"])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return _read(name, path if path.exists() else name)


@cache
def try_hub_once() -> None:
    """Probe the hub once; if it does not answer, use cached files and let other requests fail at once.

    Otherwise its client retries for half a minute per file.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # errors of the HTTP library, which differ between versions
        constants.HF_HUB_OFFLINE = True


def read_configuration(place: str | Path) -> PreTrainedConfig:
    """Return the transformers configuration of a folder, a config.json or an id.

    Raises:
        DataError, ConfigError: a local file is too large or not JSON, or contains a number too large to process.
        Exception: any error of transformers.
    """
    from transformers import AutoConfig

    path = Path(place)
    if (file := path / "config.json" if path.is_dir() else path).is_file():
        _check_numbers(read_object(file), str(place))
    return AutoConfig.from_pretrained(place, trust_remote_code=False)


def _read(name: str, place: str | Path) -> PreTrainedConfig:
    if not Path(place).exists():
        try_hub_once()
    try:
        return read_configuration(place)
    except OSError as error:
        raise AssetError(
            f"Cannot read the configuration of {name!r}: {first_line(error)} Check the id or path and the "
            "network. Offline, pass a local config.json, or one of "
            f"{', '.join(list(published_models())[:5])}, ..."
        ) from error
    except (*UNUSABLE, ValueError) as error:
        raise unusable(name, error) from error


UNUSABLE = (
    *(StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, RecursionError),
    ImportError,
)
"""Errors raised for a configuration whose fields do not form a model, in addition to ValueError."""


def unusable(name: str, error: Exception) -> ConfigError:
    """Return the error for a configuration that forms no model, or needs its own code."""
    if isinstance(error, ConfigError):
        return error
    if needs_code(error):
        return ConfigError(
            f"Model {name!r} requires its own Python code (`auto_map`), which rankpilot never runs. Use a "
            "model that is part of transformers."
        )
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    told = said_of(cause if isinstance(cause, Exception) else error)
    return ConfigError(f"The configuration of {name!r} is not usable: {told}")


def said_of(error: Exception) -> str:
    """Rephrase an error about a configuration in terms of its own field names."""
    said = first_line(error)
    return "pad_token_id is not below vocab_size." if said.startswith("Padding_idx") else said


def needs_code(error: Exception) -> bool:
    """True if transformers refused to run code shipped with the model."""
    return "trust_remote_code" in str(error)


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("num_hidden_layers", "max_position_embeddings", "state_size", "d_kv", "d_ff"),
)
"""Sizes that must be at least 1 if a text model defines them."""

_A_SIZE = re.compile(r"(n|d|num)_.+|.+_(size|dim|heads|layers|experts|rank|embeddings|kernel|labels|step)")
"""Names of counts in configurations: all sizes, and more."""


def _most(name: str) -> int:
    """Return the largest accepted size, well above that of any model; anything larger would never finish."""
    return 2**9 if "layer" in name else 2**20 if "label" in name else 2**24


def _check_numbers(fields: Mapping[str, Any], model: str) -> None:
    """Raise ConfigError for an excessive size in a configuration or a nested part of it.

    A part that is not a text model may use -1 for none.
    """
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            _check_numbers(value, model)
        elif type(value) is int and _A_SIZE.fullmatch(name) and not -1 <= value <= _most(name):
            raise _wrong_size(model, name, value)


def _wrong_size(model: str, name: str, value: object) -> ConfigError:
    whole = f"a whole number from {int(name in _SIZES)} to {_most(name):,}"
    return ConfigError(f"The configuration of {model!r} has {name}={shown(value)}. It must be {whole}.")


def check_sizes(config: PreTrainedConfig) -> None:
    """Raise ConfigError for impossible sizes and for architectures that are not names."""
    model = config.name_or_path or config.model_type
    named = config.architectures
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ConfigError(
            f"The configuration of {model!r} has architectures={shown(named)}. It must be a list of names, "
            "such as ['LlamaForCausalLM']."
        )
    try:
        text: Any = config.get_text_config()
        fields = vars(text)
    except (ValueError, TypeError) as error:  # it has several text parts, or an invalid one
        raise ConfigError(
            f"The configuration of {model!r} does not contain a single text model: {first_line(error)}"
        ) from error
    for name, value in fields.items():
        if type(value) is int and _A_SIZE.fullmatch(name) and not 0 <= value <= _most(name):
            raise _wrong_size(model, name, value)
    for name in _SIZES:
        try:
            size = getattr(text, name, None)
        except RuntimeError:  # layers have sizes of their own (Gemma 4)
            continue
        of_class = isinstance(getattr(type(text), name, None), property)  # XLNet has -1 positions, meaning any number
        if isinstance(size, str | float) or (isinstance(size, int) and not of_class and not 1 <= size <= _most(name)):
            raise _wrong_size(model, name, size)


_TOKENS = ("input_ids", "inputs")
"""Main inputs of models that read tokens, in transformers; the second is Perceiver's, of any modality."""


def check_reads_tokens(config: PreTrainedConfig, name: str = "") -> None:
    """Raise ConfigError for a model that reads images or audio but no tokens.

    Args:
        config: configuration of the model.
        name: name of the model in the error; by default the place its configuration was read from.
    """
    name = name or config.name_or_path
    main = _main_input(config)
    if main in _TOKENS and hasattr(config.get_text_config(), "vocab_size"):
        return
    what = f"The model {name!r} ({type(config).__name__})" if name else f"The model ({type(config).__name__})"
    raise ConfigError(
        f"{what} does not read tokens{'' if main in _TOKENS else f' but {main}'}: rankpilot supports text models only."
    )


def check_experts(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a mixture that routes a token to no expert, or to more than it has."""
    text: Any = config.get_text_config()
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(text, name, None), int)), 0)
    chosen = getattr(text, "num_experts_per_tok", None)
    if experts > 1 and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise ConfigError(
            f"The configuration of {config.model_type!r} routes each token to num_experts_per_tok={chosen} of "
            f"its {experts} experts. It must be 1 to {experts}."
        )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Configuration fields for the number of experts a router chooses from."""


def stored_method(config: PreTrainedConfig, quantization: Quantization) -> str:
    """Return the checkpoint's own quantisation method, such as "mxfp4"; empty if it has none.

    Raises:
        ConfigError: it has one, and another quantisation is requested.
    """
    stored: Any = getattr(config, "quantization_config", None) or {}
    given: Any = stored.get("quant_method", "") if isinstance(stored, dict) else stored.quant_method
    method = getattr(given, "value", given)
    if not isinstance(method, str):
        raise ConfigError(f"quant_method of the configuration must be a name, such as 'gptq'; got {shown(method)}.")
    if method not in ("", "bitsandbytes") and quantization != "none":
        raise ConfigError(
            f"The weights of this {config.model_type!r} are stored in {method}, which transformers cannot "
            f"convert to {quantization}. Drop --quantization, or use a bf16 checkpoint."
        )
    return method


def _main_input(config: PreTrainedConfig) -> str:
    """Return the main input of the model's own class, or of its base class if the configuration names none."""
    import transformers

    kinds = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    kinds.append(transformers.AutoModel._model_mapping.get(type(config), None))
    names: list[Any] = [getattr(kind, "main_input_name", None) for kind in kinds]
    return str(next(filter(None, names), _TOKENS[0]))


def positions_of(config: Any) -> int | None:
    """Return the positions in a configuration; None if it has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def most_positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens per row that the model has positions for; None if there is no limit.

    Args:
        model: the model, with or without adapters around it.
    """
    most = positions_of(model.config) or 0
    for name, module in model.named_modules():
        # RoBERTa-style models start counting positions after the padding token's index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most if most > 0 else None
