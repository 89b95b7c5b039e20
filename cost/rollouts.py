"""Memory of generating answers between training steps (GRPO, RLOO): by a vLLM engine on the same card, or transformers.

The engine holds a copy of the weights and fills its share of the card with its cache of keys and values. Awake, it
holds that share during training, too. transformers fills a cache for all rows at once, without an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import ConfigError, shown
from .step_config import MOST_TOKENS

BATCHED_TOKENS = 4096
"""Tokens of a prefill of TRL's engine (`max_num_batched_tokens` in `trl/generation/vllm_generation.py`)."""

MOST_ANSWERS = 2**20

GRAPHS_BYTES = 600 * 2**20
"""Bytes of the engine's CUDA graphs and communication buffers beyond its share of the card; an assumption."""


@dataclass(frozen=True)
class Engine:
    """A vLLM engine on the card of the training.

    Attributes:
        share: its share of the card, `gpu_memory_utilization`, above 0 and at most 1.
        sleeps: whether it frees its memory during training.
        cards: cards that share its weights and cache, its tensor parallel size.
        length: most tokens of a sequence, its `max_model_len`; 0 for those of the training's rows.
        lends: whether the model being trained uses the engine's weights, as in Unsloth's `fast_inference`, instead of a
            second copy.

    Raises:
        ConfigError: a value is out of range.
    """

    share: float
    sleeps: bool = False
    cards: int = 1
    length: int = 0
    lends: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"vllm_gpu_memory_utilization must be above 0 and at most 1; got {shown(self.share)}.")
        if not (1 <= self.cards <= MOST_ANSWERS and 0 <= self.length <= MOST_TOKENS):
            told = f"1 to {MOST_ANSWERS:,} cards and 0 to {MOST_TOKENS:,} tokens"
            raise ConfigError(f"A vLLM engine has {told}; got {shown(self.cards)} and {shown(self.length)}.")


@dataclass(frozen=True)
class Rollouts:
    """Generation of answers.

    Attributes:
        rows: answers generated at once.
        engine: what generates them; None for transformers.
        length: most tokens of a prompt and its answer; 0 for those of the training's rows.

    Raises:
        ConfigError: there are no answers, or too many.
    """

    rows: int
    engine: Engine | None = None
    length: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MOST_ANSWERS:
            raise ConfigError(f"Answers generated at once must be 1 to {MOST_ANSWERS:,}; got {shown(self.rows)}.")

    def awake_bytes(self, card_bytes: float, frozen_bytes: float) -> float:
        """Return the bytes of the engine during training, beside the frozen model.

        Args:
            card_bytes: memory of the card.
            frozen_bytes: bytes of the frozen model, possibly held by the engine.
        """
        if self.engine is None:
            return 0.0
        held = 0.0 if self.engine.sleeps else self.engine.share * card_bytes
        return GRAPHS_BYTES + max(held - self.engine.lends * frozen_bytes, 0.0)

    def generation_bytes(self, card_bytes: float, frozen_bytes: float, length: int, cache_bytes: float) -> float:
        """Return the bytes of generation beside the model being trained, without `awake_bytes`.

        Args:
            card_bytes: memory of the card.
            frozen_bytes: bytes of the frozen model, which the engine may hold.
            length: tokens of a prompt and its answer.
            cache_bytes: bytes of a token's keys and values, see `cache_bytes_of`.
        """
        if self.engine is None:
            return self.rows * (self.length or length) * cache_bytes
        held = self.engine.share * card_bytes if self.engine.sleeps else 0.0
        return max(held - self.engine.lends * frozen_bytes, 0.0)


@dataclass(frozen=True)
class EngineNeeds:
    """Least bytes of an engine on each card.

    Attributes:
        weights: its weights.
        prefill: activations and logits while it profiles a batch of prompts.
        cache: keys and values of one sequence.
    """

    weights: float
    prefill: float
    cache: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.prefill + self.cache

    @classmethod
    def of(cls, config: Mapping[str, Any], weights: float, rollouts: Rollouts, length: int) -> EngineNeeds:
        """Return the needs of an engine.

        Args:
            config: fields of the model's configuration.
            weights: bytes of all weights in its precision.
            rollouts: the answers generated at once, by an engine.
            length: tokens of the training's rows.
        """
        assert rollouts.engine is not None, "an engine generates"
        text, most = text_fields(config), rollouts.engine.length or length
        width = _first(text, "hidden_size", "n_embd", "d_model")
        inner = _first(text, "intermediate_size", "n_inner") or 4 * width
        prefill = 2 * BATCHED_TOKENS * (3 * inner + 4 * width) + 8 * rollouts.rows * _first(text, "vocab_size")
        return cls(*(part / rollouts.engine.cards for part in (weights, prefill, cache_bytes_of(config) * most)))


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a configuration's language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config


def cache_bytes_of(config: Mapping[str, Any]) -> float:
    """Return the bytes of a token's keys and values in 16 bits; 0 if the configuration does not tell.

    Layers with a sliding window are counted like others, so long sequences take less.

    Args:
        config: fields of the model's configuration.
    """
    text = text_fields(config)
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    if text.get("kv_lora_rank"):  # latent attention keeps one vector (DeepSeek-V2, arXiv:2405.04434, section 2.1)
        return 2.0 * layers * (_first(text, "kv_lora_rank") + _first(text, "qk_rope_head_dim"))
    heads = _first(text, "num_attention_heads", "n_head", "num_heads")
    if isinstance(types := text.get("layer_types"), list):  # recurrent layers keep a state of fixed size
        layers = sum("attention" in kind and "linear" not in kind for kind in map(str, types))
    width = _first(text, "head_dim") or _first(text, "hidden_size", "n_embd", "d_model") // max(heads, 1)
    return 4.0 * layers * (_first(text, "num_key_value_heads") or heads) * width


def _first(fields: Mapping[str, Any], *names: str) -> int:
    """Return the first of some fields that holds a number; 0 if none does."""
    return next((value for name in names if isinstance(value := fields.get(name), int) and value), 0)
