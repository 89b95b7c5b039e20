"""Tiny random models with tokenizers of whole words, saved as a user's local folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = ("good", "fine", "great", "bad", "poor", "dull", "film", "plot", "the", "a", "was", "very")
SPECIAL = ("[PAD]", "[UNK]", "[EOS]", "<|im_start|>", "<|im_end|>", "user", "assistant", "###", "tool")
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TOOL_CHATML = (
    "{% for tool in tools or [] %}<|im_start|> tool {{ tool.function.name }} <|im_end|> {% endfor %}"
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    " tool {{ call.function.name }} {{ call.function.arguments.values() | join(' ') }}{% endfor %} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
"""ChatML that shows tools and calls of them."""
VARIABLE_CHATML = (
    "{% if mood is defined %}{{ mood }} {% endif %}{% if scene is defined %}{{ scene.place }} {% endif %}" + TOOL_CHATML
)
"""ChatML that shows two variables of its own."""
PAD, UNKNOWN, END = range(3)

_SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 64, "pad_token_id": PAD}
_T5 = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}


def tokenizer(*, chat: bool = False) -> hf.PreTrainedTokenizerFast:
    """A tokenizer that knows the words above, and adds nothing to a text."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML if chat else None
    return made


def build(name: str) -> hf.PreTrainedModel:
    """A model by name; the same weights at every call."""
    torch.manual_seed(0)
    t5 = hf.T5Config(**_T5, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)
    distilbert = hf.DistilBertConfig(vocab_size=64, dim=64, hidden_dim=64, n_layers=2, n_heads=2, pad_token_id=PAD)
    makers: dict[str, Any] = {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZES, num_labels=3)),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_SIZES | {"max_position_embeddings": 66})),
        "distilbert": lambda: hf.DistilBertModel(distilbert),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, max_position_embeddings=64, eos_token_id=END)),
        "t5": lambda: hf.T5ForConditionalGeneration(t5),
    }
    model: hf.PreTrainedModel = makers[name]()
    return model


def save(name: str, folder: Path, *, chat: bool = False) -> str:
    """Save a model and its tokenizer; returns the folder's path."""
    build(name).save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write a JSON file with one row in each line; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
