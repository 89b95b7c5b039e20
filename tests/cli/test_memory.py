"""`rankpilot memory`: figures that a real step confirms, and one clear line for every mistake."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rankpilot.cli import main as cli
from rankpilot.common.files import read_json
from rankpilot.study.memory_here import default_task
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    XLNetConfig,
    XLNetModel,
)

from ..cases import first_cases
from ..data.small_models import save, write_rows
from .mistakes import failure, usage_error

SMALL = ["--batch-size", "4", "--max-length", "16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, bert_config: BertConfig, llama_config: LlamaConfig) -> Path:
    """A folder with tiny saved models."""
    folder = tmp_path_factory.mktemp("models")
    roberta = RobertaConfig(**bert_config.to_dict() | {"model_type": "roberta", "pad_token_id": 1})
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5 = T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)
    every = {
        "bert": BertModel(bert_config),
        "llama": LlamaForCausalLM(llama_config),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        "roberta": RobertaModel(roberta),
        "t5": T5ForConditionalGeneration(t5),
        "xlnet": XLNetModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)),
    }
    for name, model in every.items():
        model.save_pretrained(folder / name)
    return folder


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], output: Path) -> tuple[str, Any]:
    """What a run prints, and its figures."""
    capsys.readouterr()
    assert cli.run(["memory", *arguments, "--output", str(output)]) == 0
    return " ".join(capsys.readouterr().out.split()), read_json(output / "memory.json")


@pytest.fixture(scope="module")
def measured(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Any, Path]]:
    """What the measured step of a model prints, its figures, and the folder; of each model it is taken once."""

    @cache
    def take(name: str) -> tuple[str, Any, Path]:
        output = tmp_path_factory.mktemp(name) / "memory"
        with redirect_stdout(io.StringIO()) as shown:
            assert cli.run(["memory", str(models / name), *SMALL, "--measure", "--output", str(output)]) == 0
        return " ".join(shown.getvalue().split()), read_json(output / "memory.json"), output

    return take


@pytest.mark.parametrize(("name", "task"), first_cases(1, [("bert", "classification"), ("gpt2", "causal-lm")]))
def test_a_step_is_predicted_and_measured(
    measured: Callable[[str], tuple[str, Any, Path]], name: str, task: str
) -> None:
    printed, figures, folder = measured(name)
    assert figures["task"] == task
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)
    if sys.platform == "linux":
        assert figures["measured"]["process_bytes"] > figures["measured"]["peak_bytes"]
    assert (folder / "memory.png").is_file()
    for words in ("calibrating", "tensors saved for backward", "half the batch (2 x 16)", "A real step"):
        assert words in printed
    layers = [sum(value for kind, value in row.items() if kind != "layer") for row in figures["layers"]]
    assert sum(layers) + figures["margin_bytes"] == pytest.approx(figures["peak_bytes"])
    peaks = {choice["label"]: choice["step_bytes"] for choice in figures["choices"]}
    ranks = {rank: peaks[f"all layers at rank {rank} with no checkpointing"] for rank in (1, 8, 16)}
    assert ranks[1] < ranks[8] == figures["peak_bytes"] < ranks[16]
    assert peaks["half the length (4 x 8)"] < 0.7 * figures["peak_bytes"]
    assert peaks["all layers at rank 8 with checkpointing"] < figures["peak_bytes"]
    assert peaks["the top 1 layers at rank 8 with no checkpointing"] < figures["peak_bytes"]


def test_settings_are_followed(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpointing", "--rank", "4", "--optimizer", "sgd", "--bf16", "--measure", "--budget", "90%"]
    model = [str(models / "llama"), "--task", "classification"]
    printed, figures = run([*model, *SMALL, *options], capsys, tmp_path / "memory")
    assert figures["task"] == "classification"
    assert figures["kinds"]["optimizer"] == 0
    assert figures["kinds"]["inputs"] > 0
    assert figures["margin_bytes"] > 0
    assert figures["measured"]["peak_bytes"] <= figures["peak_bytes"]
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.03)
    choices = {choice["label"]: choice for choice in figures["choices"]}
    assert choices["all layers at rank 4 with no checkpointing"]["step_bytes"] > figures["peak_bytes"]
    assert figures["limit_bytes"] == pytest.approx(0.9 * figures["reference_bytes"])
    assert figures["reference_bytes"] == choices["all layers at rank 8 with checkpointing"]["step_bytes"]
    for rule in ("uniform", "top-down"):
        assert choices[f"{rule} inside 90%"]["step_bytes"] <= figures["limit_bytes"]
        assert choices[f"{rule} inside 90%"]["verdict"] == "fits"
    assert "uniform inside 90%" in printed


def test_settings_of_the_trainer_are_followed(
    models: Path,
    measured: Callable[[str], tuple[str, Any, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, plain, _ = measured("bert")
    options = [str(models / "bert"), *SMALL, "--measure"]
    printed, figures = run([*options, "--trainer", "optim=sgd", "label_smoothing_factor=0.1"], capsys, tmp_path / "sgd")
    assert "layers, optim=sgd, label_smoothing_factor=0.1" in printed
    assert figures["kinds"]["optimizer"] == 0 < plain["kinds"]["optimizer"]
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)


@pytest.mark.parametrize("optimizer", first_cases(1, ["adamw8bit", "adafactor"]))
def test_optimizers(models: Path, optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--target-modules", "q_proj, v_proj", "--optimizer", optimizer]
    _, figures = run([str(models / "llama"), *SMALL, *only], capsys, tmp_path / "memory")
    assert 0 < figures["kinds"]["optimizer"] <= 2 * figures["kinds"]["weights"]
    assert set(figures["choices"][0]["ranks"]) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"
    }


def test_accumulated_gradients_are_there_during_the_next_batch(
    models: Path,
    measured: Callable[[str], tuple[str, Any, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, one, _ = measured("bert")
    printed, two = run([str(models / "bert"), *SMALL, "--measure", "--accumulation", "2"], capsys, tmp_path / "two")
    assert "gradients accumulated" in printed
    assert two["measured"]["peak_bytes"] > one["measured"]["peak_bytes"]
    assert two["measured"]["peak_bytes"] == pytest.approx(two["peak_bytes"], rel=0.005)


def test_data_makes_the_batch(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(models / "bert")
    # Shorter rows are padded: with a mask the model runs other operations than without.
    lines = [f"{'good ' * (5 if number % 20 else 7)},{number % 3}" for number in range(40)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    arguments = [str(models / "bert"), str(tmp_path / "reviews.csv"), *SMALL]
    printed, figures = run(arguments, capsys, tmp_path / "memory")
    assert (figures["rows"], figures["length"]) == (4, 7)
    assert "classification" in printed
    assert "4 x 7 tokens" in printed
    peaks = {choice["label"]: choice["step_bytes"] for choice in figures["choices"]}
    assert peaks["half the batch (2 x 7)"] < 0.9 * figures["peak_bytes"]
    assert peaks["half the length (4 x 4)"] < 0.9 * figures["peak_bytes"]


@pytest.mark.parametrize("task", first_cases(1, ["seq2seq", "classification", "regression", "token-classification"]))
def test_every_task_of_an_encoder_decoder(
    models: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, figures = run([str(models / "t5"), *SMALL, "--task", task, "--measure"], capsys, tmp_path / "memory")
    assert figures["task"] == task
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)


def test_a_classifier_that_reads_its_end_token(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("t5", models / "t5-words")
    rows = [{"text": "good film " * (1 + row % 9), "label": row % 2} for row in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    _, figures = run([str(models / "t5-words"), data, *SMALL], capsys, tmp_path / "memory")
    assert (figures["rows"], figures["length"]) == (4, 16)


@pytest.mark.parametrize(("quantization", "least"), first_cases(1, [("nf4", 0.13), ("int8", 0.25)]))
def test_a_quantised_model(quantization: str, least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save("llama", tmp_path / "llama")
    plain = sum(each.nbytes for each in LlamaForCausalLM.from_pretrained(folder).parameters())
    options = ["--quantization", quantization, "--measure"]
    printed, figures = run([folder, *SMALL, *options], capsys, tmp_path / "memory")
    assert f"frozen model in {quantization}" in printed
    assert least * plain < figures["frozen_bytes"] < 0.6 * plain
    assert figures["measured"]["peak_bytes"] == pytest.approx(figures["peak_bytes"], rel=0.005)


def test_a_model_without_checkpointing(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, figures = run([str(models / "xlnet"), *SMALL], capsys, tmp_path / "memory")
    assert "does not support gradient checkpointing" in printed
    assert len(figures["notes"]) == 1
    assert not [choice for choice in figures["choices"] if choice["recomputed"]]
    line = failure(["memory", str(models / "xlnet"), *SMALL, "--checkpointing"], capsys)
    assert "does not support gradient checkpointing" in line


def test_mistakes(models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "There is no model folder" in failure(["memory", "./nowhere"], capsys)
    vision = models / "vit"
    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64).save_pretrained(vision)
    assert "(ViTConfig) reads no tokens" in failure(["memory", str(vision), "--budget", "70%"], capsys)
    assert "has 32 positions, and max_length is 33" in failure(
        ["memory", str(models / "bert"), "--max-length", "33"], capsys
    )
    # RoBERTa's first positions are those of padding.
    assert "has 30 positions" in failure(["memory", str(models / "roberta"), "--max-length", "31"], capsys)
    line = failure(["memory", str(models / "bert"), *SMALL, "--output", str(models / "bert" / "config.json")], capsys)
    assert "config.json is a file. Pass the name of a folder" in line
    line = failure(["memory", str(models / "bert"), *SMALL, "--budget", "1KiB"], capsys)
    assert "fits no adapter at all. The smallest that works is" in line
    assert "a share of" in failure(["memory", str(models / "bert"), *SMALL, "--budget", "1%"], capsys)
    line = failure(["memory", str(models / "llama"), *SMALL, "--target-modules", "q_proj, k_porj"], capsys)
    assert "Unknown target module 'k_porj'. Did you mean: 'k_proj'" in line
    assert "No module has a rank above 32" in failure(
        ["memory", str(models / "bert"), *SMALL, "--rank", "100000"], capsys
    )
    line = failure(["memory", str(models / "bert"), *SMALL, "--trainer", "labl_smoothing_factor=1"], capsys)
    assert "Did you mean: 'label_smoothing_factor'" in line
    line = failure(["memory", str(models / "bert"), *SMALL, "--trainer", "max_steps=1"], capsys)
    assert "max_steps is decided by --steps" in line
    line = usage_error(["memory", "m", "--device", "T4", "--trainer", "packing=true"], capsys)
    assert "trainer: not with a card" in line
    huge = ["memory", "m", "--batch-size", "100000000000"]
    assert "at most 16,777,216 tokens; got 100000000000 x 64" in usage_error(huge, capsys)
    assert "seed is a whole number from 0 to 2**32 - 1; got -1" in usage_error(["memory", "m", "--seed", "-1"], capsys)
    assert "Cannot read the budget" in usage_error(["memory", "m", "--budget", "lots"], capsys)
    assert "at least 1" in usage_error(["memory", "m", "--batch-size", "0"], capsys)
    assert "at least 2; got" in usage_error(["memory", "m", "--max-length", "-4"], capsys)
    assert not list(tmp_path.iterdir())


def test_unknown_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    from rankpilot.data import models as loading

    def offline(name: str) -> None:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", offline)
    monkeypatch.chdir(tmp_path)
    line = failure(["memory", "all-minilm-l6-v3"], capsys)
    assert "Unknown model 'all-minilm-l6-v3'. Did you mean: 'all-minilm-l6-v2'" in line


def test_tasks_follow_the_architecture() -> None:
    assert default_task(LlamaConfig(architectures=["LlamaForCausalLM"])) == "causal-lm"
    assert default_task(LlamaConfig(architectures=["LlamaModel"])) == "causal-lm"
    assert default_task(LlamaConfig(architectures=["LlamaForSequenceClassification"])) == "classification"
    assert default_task(GPT2Config()) == "causal-lm"
    assert default_task(BertConfig(architectures=["BertForMaskedLM"])) == "classification"
    assert default_task(BertConfig(architectures=["BertLMHeadModel"])) == "causal-lm"
    assert default_task(T5Config()) == "classification"
    assert default_task(T5Config(architectures=["T5ForConditionalGeneration"])) == "seq2seq"
    assert default_task(BertConfig(architectures=["BertForTokenClassification"])) == "token-classification"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(["memory", "--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "rankpilot memory" in out
    assert "hardly on the rank" in out


@pytest.mark.assets
def test_the_packaged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, figures = run(["all-minilm-l6-v2", *SMALL], capsys, tmp_path / "memory")
    assert figures["blocks"] == 7, "six layers, and what lies above them"
    assert "bert.encoder.layer.5" in {row["layer"] for row in figures["layers"]}
    assert len(figures["choices"][0]["ranks"]) == 37
    assert figures["kinds"]["saved"] > 0.5 * figures["peak_bytes"]
