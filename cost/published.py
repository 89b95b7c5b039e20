"""What is published of models, by name: their configurations.

A model's configuration is found without its weights: in a folder or a file, by a short name or a Hugging Face id. The
configurations of common models ship with the package, so that neither they nor a network are needed: sizes are facts,
published on the models' pages. What a configuration says of a model of text is checked here as well: whether it reads
tokens at all, and how many of them a row can have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import StrictDataclassError

from ..common.files import expanded, read_object
from ..errors import AssetError, ConfigError, first_line, shown
from .known_models import check_known, published_models, short_name
from .step_config import Quantization

if TYPE_CHECKING:  # which loads torch: names are refused before that
    from transformers import PreTrainedConfig, PreTrainedModel


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
    check_known(name)
    path, short = expanded(name), short_name(name)
    if not path.exists() and short:
        from transformers import AutoConfig

        fields = dict(published_models()[short]["config"])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return _read(name, path if path.exists() else name)


@cache
def try_hub_once() -> None:
    """Ask the hub once whether it answers; if not, what is cached serves, and the rest fails at once.

    Its client would try again for half a minute for each file.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the library that speaks HTTP, which differs between versions
        constants.HF_HUB_OFFLINE = True


def read_configuration(place: str | Path) -> PreTrainedConfig:
    """What transformers makes of a folder, a config.json or an id.

    Raises:
        DataError, ConfigError: a file here is too large or no JSON, or has a number with which no answer would come.
        Exception: whatever transformers raises.
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
            f"The configuration of {name!r} could not be read: {first_line(error)} Check the id or path and the "
            f"network; without one, a local config.json works, or one of {', '.join(list(published_models())[:5])}, ..."
        ) from error
    except (*UNUSABLE, ValueError) as error:
        raise unusable(name, error) from error


UNUSABLE = (
    *(StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, RecursionError),
    ImportError,
)
"""What reading a configuration ends with where its fields make no model, besides ValueError."""


def unusable(name: str, error: Exception) -> ConfigError:
    """The error for a configuration that makes no model, or only with code that comes with it."""
    if isinstance(error, ConfigError):
        return error
    if needs_code(error):
        return ConfigError(
            f"The model {name!r} needs Python code that comes with it (`auto_map`), and rankpilot never runs such "
            "code. Take a model whose class is part of transformers."
        )
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    told = said_of(cause if isinstance(cause, Exception) else error)
    return ConfigError(f"The configuration of {name!r} cannot be used: {told}")


def said_of(error: Exception) -> str:
    """What an error says of a configuration, by the configuration's own names."""
    said = first_line(error)
    return "pad_token_id is not below vocab_size." if said.startswith("Padding_idx") else said


def needs_code(error: Exception) -> bool:
    """Whether transformers has refused to run what a model brings."""
    return "trust_remote_code" in str(error)


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("num_hidden_layers", "max_position_embeddings", "state_size", "d_kv", "d_ff"),
)
"""Sizes that are at least 1 where a model of text has them."""

_A_SIZE = re.compile(r"(n|d|num)_.+|.+_(size|dim|heads|layers|experts|rank|embeddings|kernel|labels|step)")
"""What configurations call numbers of which something is made: all sizes, and more."""


def _most(name: str) -> int:
    """The largest size that is taken, far above that of any model: with more, no answer would come."""
    return 2**9 if "layer" in name else 2**20 if "label" in name else 2**24


def _check_numbers(fields: Mapping[str, Any], model: str) -> None:
    """Raise ConfigError for a size beyond what is taken, in a configuration or in a part of it.

    A part that is no model of text may have -1 for none.
    """
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            _check_numbers(value, model)
        elif type(value) is int and _A_SIZE.fullmatch(name) and not -1 <= value <= _most(name):
            raise _wrong_size(model, name, value)


def _wrong_size(model: str, name: str, value: object) -> ConfigError:
    whole = f"a whole number from {int(name in _SIZES)} to {_most(name):,}"
    return ConfigError(f"The configuration of {model!r} has {name}={shown(value)}. Give {whole}.")


def check_sizes(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a size that no model has, and for architectures that are no names."""
    model = config.name_or_path or config.model_type
    named = config.architectures
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ConfigError(
            f"The configuration of {model!r} has architectures={shown(named)}. "
            "Give a list of names, as in ['LlamaForCausalLM']."
        )
    try:
        text: Any = config.get_text_config()
        fields = vars(text)
    except (ValueError, TypeError) as error:  # it has several, or something else in the place of one
        raise ConfigError(f"The configuration of {model!r} has no one model of text: {first_line(error)}") from error
    for name, value in fields.items():
        if type(value) is int and _A_SIZE.fullmatch(name) and not 0 <= value <= _most(name):
            raise _wrong_size(model, name, value)
    for name in _SIZES:
        try:
            size = getattr(text, name, None)
        except RuntimeError:  # layers have sizes of their own (Gemma 4)
            continue
        of_class = isinstance(getattr(type(text), name, None), property)  # XLNet has -1 positions, which is any number
        if isinstance(size, str | float) or (isinstance(size, int) and not of_class and not 1 <= size <= _most(name)):
            raise _wrong_size(model, name, size)


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


def check_experts(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a mixture that sends a token to more experts than it has, or to none."""
    text: Any = config.get_text_config()
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(text, name, None), int)), 0)
    chosen = getattr(text, "num_experts_per_tok", None)
    if experts > 1 and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise ConfigError(
            f"The configuration of {config.model_type!r} sends each token to num_experts_per_tok={chosen} of its "
            f"{experts} experts. Give 1 to {experts}."
        )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of experts that a router chooses from."""


def stored_method(config: PreTrainedConfig, quantization: Quantization) -> str:
    """How a checkpoint stores its weights in fewer bits, such as "mxfp4"; empty if it does not.

    Raises:
        ConfigError: it does, and other bits are asked for.
    """
    stored: Any = getattr(config, "quantization_config", None) or {}
    given: Any = stored.get("quant_method", "") if isinstance(stored, dict) else stored.quant_method
    method = getattr(given, "value", given)
    if not isinstance(method, str):
        raise ConfigError(f"quant_method of the configuration is a name, as in 'gptq'; got {shown(method)}.")
    if method not in ("", "bitsandbytes") and quantization != "none":
        raise ConfigError(
            f"The weights of this {config.model_type!r} are stored in {method}, which transformers does not turn into "
            f"{quantization}. Leave --quantization out, or take a checkpoint in bf16."
        )
    return method


def _main_input(config: PreTrainedConfig) -> str:
    """The name of the main input of the model's own class, or of its base where the configuration names no class."""
    import transformers

    kinds = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    kinds.append(transformers.AutoModel._model_mapping.get(type(config), None))
    names: list[Any] = [getattr(kind, "main_input_name", None) for kind in kinds]
    return str(next(filter(None, names), _TOKENS[0]))


def positions_of(config: Any) -> int | None:
    """The positions that a configuration names; None if it names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def most_positions(model: PreTrainedModel) -> int | None:
    """The most tokens of a row for which the model has positions; None where its class or configuration sets no limit.

    Args:
        model: without adapters, or inside them.
    """
    most = positions_of(model.config) or 0
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token's number.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most if most > 0 else None
