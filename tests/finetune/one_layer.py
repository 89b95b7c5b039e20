"""A Llama of one layer, for tests to which its depth does not matter."""

from __future__ import annotations

from copy import deepcopy

import pytest
from transformers import LlamaConfig


@pytest.fixture(scope="module")
def llama_config(llama_config: LlamaConfig) -> LlamaConfig:
    """One layer is enough here."""
    config = deepcopy(llama_config)
    config.num_hidden_layers = 1
    return config
