"""A transformers model from its configuration, on the default device, with the head that it is fine-tuned with."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from ...errors import ConfigError, first_line

PEFT_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
"""Classes of transformers that make a model with a head, and PEFT's `task_type` for it."""


_ENDINGS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def usual_class(config: PreTrainedConfig) -> str:
    """The class of transformers that makes a model with the head that its architecture is usually fine-tuned with."""
    kind = type(config)
    for architecture in config.architectures or ():
        for ending, name in _ENDINGS.items():
            if architecture.endswith(ending):
                return name
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "AutoModelForSeq2SeqLM"
    reads_one_way = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return "AutoModelForCausalLM" if reads_one_way else "AutoModelForSequenceClassification"


def hollow_base(config: PreTrainedConfig, auto_class: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration, which is changed as a Trainer and a loaded model change it.

    Args:
        config: the configuration.
        auto_class: a key of `PEFT_TYPES`.
        dtype: the precision of weights; by default that of the configuration.

    Raises:
        ConfigError: the class has no model of this kind.
    """
    config.use_cache = False
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    try:
        dtype = dtype or config.dtype or torch.float32
        base: PreTrainedModel = getattr(transformers, auto_class).from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"No {auto_class} can be made from this configuration of {config.model_type!r}: {first_line(error)}"
        ) from error
    if getattr(config, "scale_decoder_outputs", True) is False:
        # A T5 of version 1.1: its configuration says that the output layer is tied, and its weights say that it is not.
        base.lm_head.weight = nn.Parameter(torch.empty_like(base.lm_head.weight))
    return base
