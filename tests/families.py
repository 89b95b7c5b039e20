"""The matrix of model families and LoRA forms: one row each, and every feature runs through all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

# Sizes that most configurations call by the same names.
_TEXT = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,  # so that logits are of the size of one, and a tolerance means something
}
_CAUSAL = _TEXT | {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}


def _llama(**options: Any) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_CAUSAL | options))


def _tied_llama() -> hf.PreTrainedModel:
    return _llama(tie_word_embeddings=True)


def _mixtral() -> hf.PreTrainedModel:
    # The fast experts take no double precision.
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_CAUSAL, **experts))


def _bert() -> hf.PreTrainedModel:
    return hf.BertForSequenceClassification(hf.BertConfig(**_TEXT, num_labels=3))


def _distilbert() -> hf.PreTrainedModel:
    sizes = {"dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
    config = hf.DistilBertConfig(vocab_size=48, max_position_embeddings=16, num_labels=3, **sizes)
    return hf.DistilBertForSequenceClassification(config)


def _gpt2() -> hf.PreTrainedModel:
    sizes = {"n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=48, bos_token_id=None, eos_token_id=None, **sizes))


def _t5() -> hf.PreTrainedModel:
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=48, decoder_start_token_id=0, **sizes))


def _vit() -> hf.PreTrainedModel:
    sizes = {k: v for k, v in _TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def _tokens(rows: int = 4, length: int = 6) -> torch.Tensor:
    return torch.randint(1, 48, (rows, length), generator=torch.Generator().manual_seed(0))


def _language() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "labels": _tokens()}


def _classes() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(4, 6, dtype=torch.long), "labels": torch.arange(4) % 3}


def _images() -> dict[str, torch.Tensor]:
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(4) % 3}


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        name: shown in the test's id.
        build: makes the bare model; seeded by `base`.
        batch: makes the model's keyword arguments.
        modules: how many modules PEFT adapts.
        options: of LoraConfig, over r = 4 and lora_alpha = 8.
        start: rank before any change.
    """

    name: str
    build: Callable[[], hf.PreTrainedModel]
    batch: Callable[[], dict[str, torch.Tensor]]
    modules: int
    options: dict[str, Any] = field(default_factory=dict)
    start: int = 4

    def base(self) -> hf.PreTrainedModel:
        """The model without adapters: the same weights at every call."""
        torch.manual_seed(0)
        return self.build()

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        """A model with adapters that hold values, as after some training; the same weights at every call."""
        config = LoraConfig(**{"r": self.start, "lora_alpha": 2 * self.start} | self.options | options)
        model = get_peft_model(self.base(), config).to(dtype)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.data.copy_(0.1 * noise)
            elif "lora_magnitude_vector" in name:
                parameter.data.mul_(1 + 0.1 * noise)
        return model

    def inputs(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The batch, its images in the model's precision."""
        dtype = next(model.parameters()).dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.batch().items()}

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Logits of the batch in evaluation mode."""
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(**self.inputs(model)).logits
        return logits

    def train(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
        """Real steps on the batch; their losses."""
        model.train()
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(**self.inputs(model)).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses


_BERT = {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["bert.pooler.dense"]}
_CLASSIFIER = {"modules_to_save": ["classifier"]}
_CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
_CONV1D_AND_WTE = _CONV1D | {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"]}
_DISTILBERT = {
    "target_modules": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "modules_to_save": ["pre_classifier", "classifier"],
}
_EMBED = {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}
_LINEAR = {"target_modules": "all-linear"}
_T5 = {"target_modules": ["q", "v", "o", "wi", "embed_tokens"]}
_VIT = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value", "dense"]}

FAMILIES = (
    Family("llama", _llama, _language, 14, _LINEAR),
    Family("llama-rslora", _llama, _language, 14, _LINEAR | {"use_rslora": True}),
    Family("llama-dora", _llama, _language, 14, _LINEAR | {"use_dora": True}),
    Family("llama-head-saved", _llama, _language, 14, _LINEAR | {"modules_to_save": ["lm_head"]}),
    Family("llama-tied-embedding", _tied_llama, _language, 5, _EMBED),
    Family("llama-tied-embedding-dora", _tied_llama, _language, 5, _EMBED | {"use_dora": True}),
    Family("bert", _bert, _classes, 12, _BERT | _CLASSIFIER | {"lora_dropout": 0.1}),
    Family("bert-dora-dropout", _bert, _classes, 12, _BERT | _CLASSIFIER | {"lora_dropout": 0.1, "use_dora": True}),
    Family("bert-lora-bias", _bert, _classes, 12, _BERT | _CLASSIFIER | {"lora_bias": True}),
    Family("bert-all-biases", _bert, _classes, 12, _BERT | _CLASSIFIER | {"bias": "all"}),
    Family("distilbert", _distilbert, _classes, 12, _DISTILBERT),
    Family("gpt2", _gpt2, _language, 9, _CONV1D_AND_WTE),
    Family("gpt2-rslora", _gpt2, _language, 9, _CONV1D_AND_WTE | {"use_rslora": True}),
    Family("gpt2-dora", _gpt2, _language, 9, _CONV1D_AND_WTE | {"use_dora": True}),
    Family("gpt2-lora-bias", _gpt2, _language, 8, _CONV1D | {"lora_bias": True}),
    Family("gpt2-biases", _gpt2, _language, 9, _CONV1D_AND_WTE | {"bias": "lora_only"}),
    Family("t5", _t5, _language, 24, _T5),
    Family("vit", _vit, _images, 12, _VIT | _CLASSIFIER),
    Family("mixtral", _mixtral, _language, 8, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
)
