"""Small configurations of many families."""

from __future__ import annotations

from typing import Any

import transformers as t

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_T5: dict[str, Any] = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}

CONFIGURATIONS: dict[str, t.PreTrainedConfig] = {
    "llama": t.LlamaConfig(**_GROUPED),
    "mistral-window": t.MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": t.Qwen2Config(**_GROUPED),
    "qwen3": t.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": t.Gemma2Config(**_GROUPED, head_dim=16),
    "gemma3": t.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=8),
    "phi3": t.Phi3Config(**_GROUPED, pad_token_id=0),
    "falcon": t.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "bloom": t.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4),
    "neox": t.GPTNeoXConfig(**_TEXT),
    "gpt2": t.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4),
    "bert": t.BertConfig(**_TEXT),
    "roberta": t.RobertaConfig(**_TEXT, pad_token_id=1),
    "distilbert": t.DistilBertConfig(vocab_size=256, dim=64, hidden_dim=96, n_layers=2, n_heads=4),
    "modernbert": t.ModernBertConfig(**_TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2),
    "t5": t.T5Config(**_T5, decoder_start_token_id=0),
    "flan-t5": t.T5Config(**_T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
