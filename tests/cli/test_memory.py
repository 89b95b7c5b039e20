"""`rankpilot memory`: one clear line for every mistake, before any weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, ViTConfig

from ..data.small_models import save
from .mistakes import failure, usage_error


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Path:
    """A folder with the configurations of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("bert", "roberta"):
        save(name, folder / name)
    llama_config.architectures = ["LlamaForCausalLM"]
    llama_config.save_pretrained(folder / "llama")
    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(folder / "vit")
    return folder


@pytest.mark.parametrize("words", ["", "rows.jsonl", "--config train.yaml", "--python", "--gpus 2", "--rank 4"])
def test_without_a_card_it_points_to_dry_runs(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(f"memory llama {words}", capsys)
    for told in ("--device", "rankpilot finetune MODEL DATA --dry", "rankpilot run --dry -- "):
        assert told in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("./nowhere", "nowhere"),
        ("{models}/vit", "(ViTConfig) does not read tokens"),
        ("{models}/bert --max-length 513", "max_length is 513, but the model has only 512 positions"),
        ("{models}/roberta --max-length 66", "has only 65 positions"),  # the first ones are those of padding
        ("{models}/bert --output {models}/bert/config.json", "config.json is a file. Pass a folder"),
        ("{models}/llama --target-modules 'q_porj, k_porj'", "Unknown target module 'q_porj'. Did you mean: 'q_proj'"),
        ("{models}/bert --rank 100000", "rank must be at most 64"),
    ],
)
def test_mistakes(models: Path, capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    card = "--device T4 --batch-size 4 --max-length 16"
    assert told in failure(f"memory {card} {words.format(models=models)}", capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--trainer packing=true", "--trainer requires --config"),
        ("--batch-size 100000000000", "at most 16,777,216 tokens; got 100000000000 x 64"),
        ("--batch-size -1 --max-length -4", "at least 2, or 0 for the default; got -1, 0 and -4"),
        ("--no-prepare-kbit", "prepare_kbit requires a quantised model: set quantization"),
    ],
)
def test_options_out_of_range(capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    assert told in usage_error(f"memory m --device T4 {words}", capsys)
