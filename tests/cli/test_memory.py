"""`rankpilot memory`: figures that a real step confirms, and one clear line for every mistake."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rankpilot.cli import main as cli
from rankpilot.common.files import read_json
from rankpilot.cost.savers.prices import ACTIVATIONS
from rankpilot.report.here import default_task
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    ViTConfig,
    XLNetConfig,
    XLNetModel,
)

from ..cases import first_cases
from ..data.small_models import save, write_rows
from .mistakes import failure, usage_error

SMALL = "--batch-size 4 --max-length 16"
Memory = Callable[[str], tuple[str, Any, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Path:
    """A folder with tiny saved models, most of them with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("bert", "roberta", "t5"):
        save(name, folder / name)
    LlamaForCausalLM(llama_config).save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).save_pretrained(
        folder / "gpt2"
    )
    XLNetModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)).save_pretrained(
        folder / "xlnet"
    )
    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def memory(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """What the command prints of a model with these options, its figures, and the folder; the same run only once."""

    @cache
    def run(words: str) -> tuple[str, Any, Path]:
        output = tmp_path_factory.mktemp("run") / "memory"
        with redirect_stdout(io.StringIO()) as shown:
            options = f"{SMALL} --details --output {output}"
            assert cli.run(shlex.split(f"memory {words.format(models=models)} {options}")) == 0
        return " ".join(shown.getvalue().split()), read_json(output / "memory.json"), output

    return run


@pytest.mark.parametrize(("name", "task"), first_cases(1, [("bert", "classification"), ("gpt2", "causal-lm")]))
def test_a_step_is_predicted_and_measured(memory: Memory, name: str, task: str) -> None:
    printed, figures, folder = memory(f"{{models}}/{name} --measure")
    assert figures["task"] == task
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)
    if sys.platform == "linux":
        assert figures["measured"]["process_bytes"] > figures["measured"]["peak_bytes"]
    assert (folder / "memory.png").is_file()
    for words in ("a few small steps", "tensors saved for backward", "half the batch (2 x 16)", "Measured step: "):
        assert words in printed
    layers = [sum(value for kind, value in row.items() if kind != "layer") for row in figures["layers"]]
    assert sum(layers) + figures["margin_bytes"] == pytest.approx(figures["peak_bytes"])
    peaks = {choice["label"]: choice["step_bytes"] for choice in figures["choices"]}
    ranks = {rank: peaks[f"all layers at rank {rank} with no checkpointing"] for rank in (1, 8, 16)}
    assert ranks[1] < ranks[8] == figures["peak_bytes"] < ranks[16]
    assert peaks["half the length (4 x 8)"] < 0.7 * figures["peak_bytes"]
    assert peaks["all layers at rank 8 with checkpointing"] < figures["peak_bytes"]
    assert peaks["the top 1 layers at rank 8 with no checkpointing"] < figures["peak_bytes"]


def test_activations_run_again_inside_a_budget(memory: Memory) -> None:
    """As in a run, which lets them before whole layers run again."""
    printed, figures, _ = memory("{models}/bert --budget 80%")
    *_, before, last = figures["exact_savers"]
    assert last["name"] == ACTIVATIONS
    assert figures["peak_bytes"] == last["step_bytes"] < before["step_bytes"]
    assert figures["limit_bytes"] < before["step_bytes"]
    assert "so all choices use selective checkpointing" in printed


def test_settings_of_the_trainer_are_followed(memory: Memory) -> None:
    _, plain, _ = memory("{models}/bert --measure")
    printed, figures, _ = memory("{models}/bert --measure --trainer optim=sgd label_smoothing_factor=0.1")
    assert "layers, optim=sgd, label_smoothing_factor=0.1" in printed
    assert figures["kinds"]["optimizer"] == 0 < plain["kinds"]["optimizer"]
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)


@pytest.mark.parametrize("optimizer", first_cases(1, ["adamw8bit", "adafactor"]))
def test_optimizers(memory: Memory, optimizer: str) -> None:
    _, figures, _ = memory(f"{{models}}/llama --target-modules 'q_proj, v_proj' --optimizer {optimizer}")
    assert 0 < figures["kinds"]["optimizer"] <= 2 * figures["kinds"]["weights"]
    assert set(figures["choices"][0]["ranks"]) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"
    }


def test_accumulated_gradients_are_there_during_the_next_batch(memory: Memory) -> None:
    _, one, _ = memory("{models}/bert --measure")
    printed, two, _ = memory("{models}/bert --measure --accumulation 2")
    assert "gradients accumulated" in printed
    assert two["measured"]["peak_bytes"] > one["measured"]["peak_bytes"]
    assert two["measured"]["peak_bytes"] == pytest.approx(two["peak_bytes"], rel=0.005)


def test_data_makes_the_batch(memory: Memory, tmp_path: Path) -> None:
    # Shorter rows are padded: with a mask the model runs other operations than without.
    lines = [f"{'good ' * (5 if number % 20 else 7)},{number % 3}" for number in range(40)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    printed, figures, _ = memory(f"{{models}}/bert {tmp_path / 'reviews.csv'} --no-exact-savers")
    assert (figures["rows"], figures["length"]) == (4, 7)
    assert "classification" in printed
    assert "4 x 7 tokens" in printed
    peaks = {choice["label"]: choice["step_bytes"] for choice in figures["choices"]}
    assert peaks["half the batch (2 x 7)"] < 0.9 * figures["peak_bytes"]
    assert peaks["half the length (4 x 4)"] < 0.9 * figures["peak_bytes"]


@pytest.mark.long
@pytest.mark.parametrize("task", first_cases(1, ["seq2seq", "classification", "regression", "token-classification"]))
def test_every_task_of_an_encoder_decoder(memory: Memory, task: str) -> None:
    _, figures, _ = memory(f"{{models}}/t5 --task {task} --measure")
    assert figures["task"] == task
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)


@pytest.mark.long
def test_a_classifier_that_reads_its_end_token(memory: Memory, tmp_path: Path) -> None:
    rows = [{"text": "good film " * (1 + row % 9), "label": row % 2} for row in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    _, figures, _ = memory(f"{{models}}/t5 {data}")
    assert (figures["rows"], figures["length"]) == (4, 16)


@pytest.mark.parametrize(("quantization", "least"), first_cases(1, [("nf4", 0.13), ("int8", 0.25)]))
def test_a_quantised_model(memory: Memory, models: Path, quantization: str, least: float) -> None:
    pytest.importorskip("bitsandbytes")
    plain = sum(each.nbytes for each in LlamaForCausalLM.from_pretrained(models / "llama").parameters())
    printed, figures, _ = memory(f"{{models}}/llama --no-exact-savers --quantization {quantization} --measure")
    assert f"frozen model in {quantization}" in printed
    assert f"The {quantization} model is trained after prepare_model_for_kbit_training" in printed
    assert least * plain < figures["frozen_bytes"] < 0.6 * plain
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)


def test_a_model_without_checkpointing(memory: Memory, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, figures, _ = memory("{models}/xlnet --no-exact-savers")
    assert "does not support gradient checkpointing" in printed
    assert len(figures["notes"]) == 1
    assert not [choice for choice in figures["choices"] if choice["checkpointed"]]
    line = failure(f"memory {models}/xlnet {SMALL} --gradient-checkpointing True", capsys)
    assert "does not support gradient checkpointing" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("./nowhere", "Model folder "),
        ("{models}/vit --budget 70%", "(ViTConfig) does not read tokens"),
        ("{models}/bert --max-length 513", "max_length is 513, but the model has only 512 positions"),
        ("{models}/roberta --max-length 66", "has only 65 positions"),  # the first ones are those of padding
        ("{models}/bert --output {models}/bert/config.json", "config.json is a file. Pass a folder"),
        ("{models}/bert --budget '1KiB step'", "is too small for any adapter. The smallest that works is"),
        ("{models}/bert --budget 1%", "% as a share ("),
        ("{models}/llama --target-modules 'q_porj, k_porj'", "Unknown target module 'q_porj'. Did you mean: 'q_proj'"),
        ("{models}/bert --rank 100000", "rank must be at most 64"),
        ("{models}/bert --trainer labl_smoothing_factor=1", "Did you mean: 'label_smoothing_factor'"),
        ("{models}/bert --trainer max_steps=1", "max_steps is set by --max-steps"),
    ],
)
def test_mistakes(models: Path, capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    assert told in failure(f"memory {SMALL} {words.format(models=models)}", capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--device T4 --trainer packing=true", "--trainer requires --config"),
        ("--device T4 --labels 5", "labels cannot be combined with --device"),
        ("--batch-size 100000000000", "at most 16,777,216 tokens; got 100000000000 x 64"),
        ("--seed -1", "seed must be a whole number from 0 to 2**32 - 1; got -1"),
        ("--budget lots", "Cannot read the budget"),
        ("--batch-size -1 --max-length -4", "at least 2, or 0 for the default; got -1, 0 and -4"),
        ("--no-prepare-kbit", "prepare_kbit requires a quantised model: set quantization"),
    ],
)
def test_options_out_of_range(capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    assert told in usage_error(f"memory m {words}", capsys)


@pytest.mark.parametrize(
    ("config", "architecture", "task"),
    [
        (LlamaConfig, "LlamaForCausalLM", "causal-lm"),
        (LlamaConfig, "LlamaModel", "causal-lm"),
        (LlamaConfig, "LlamaForSequenceClassification", "classification"),
        (GPT2Config, None, "causal-lm"),
        (BertConfig, "BertForMaskedLM", "classification"),
        (BertConfig, "BertLMHeadModel", "causal-lm"),
        (T5Config, None, "classification"),
        (T5Config, "T5ForConditionalGeneration", "seq2seq"),
        (BertConfig, "BertForTokenClassification", "token-classification"),
    ],
)
def test_tasks_follow_the_architecture(config: Any, architecture: str | None, task: str) -> None:
    assert default_task(config(architectures=architecture and [architecture])) == task


@pytest.mark.assets
def test_a_packaged_model_here_and_on_a_card(memory: Memory) -> None:
    printed, *_ = memory("all-minilm-l6-v2 --device-memory 24GiB")
    assert "fits" in printed
    _, figures, _ = memory("all-minilm-l6-v2 --no-exact-savers")
    assert figures["blocks"] == 7, "six layers, and what lies above them"
    assert "bert.encoder.layer.5" in {row["layer"] for row in figures["layers"]}
    assert len(figures["choices"][0]["ranks"]) == 37
    assert figures["kinds"]["saved"] > 0.5 * figures["peak_bytes"]
