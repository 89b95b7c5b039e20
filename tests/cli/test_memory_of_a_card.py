"""`rankpilot memory --device`: what fits a card, for a model that is not here."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import peft
import pytest
from rankpilot.cli import main as cli
from rankpilot.common.files import read_json
from rankpilot.cost.forecast import memory_of as memory_of_module
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.lora.targets import find_target_modules
from rankpilot.report.memory import configuration_text
from transformers import AlbertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, WhisperConfig

from .mistakes import failure, usage_error

BATCH = ["--batch-size", "8", "--max-length", "1024"]


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, and no weights."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=3, **sizes, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    return folder


def test_a_verdict_comes_first_and_all_figures_are_written(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory", str(configuration), "--device", "rtx 4090", *BATCH, "--output", str(tmp_path / "card")]
    assert cli.run([*arguments, "--details"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "parameters on RTX 4090, 8 x 1024 tokens, rank 8 on 21 modules of 3 layers" in printed
    assert re.match(r"Fits: 0\.\d of 23\.5 GiB \(8 x 1,024 tokens, rank 8\)\. llama, ", printed)
    assert printed.index("Fits with") < printed.index("Layers to checkpoint")
    assert "may not fit leave less than 8% of the card" in printed
    assert "all layers at rank 8 with no checkpointing" in printed
    figures = read_json(tmp_path / "card/memory.json")
    assert figures["fits"]
    assert figures["memory_bytes"] < 24 * 2**30
    assert (tmp_path / "card/memory.png").stat().st_size > 10_000
    assert cli.run([*arguments, "--rank", "32", "--quantization", "nf4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "GiB (8 x 1,024 tokens, rank 32, nf4)." in printed
    assert "For comparison, plain LoRA at rank 8 on all modules takes" in printed


def test_a_short_answer_that_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    NARROW_KEYS.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["memory", "model", "--device", "rtx 4090", "--batch-size", "2", "--max-length", "32"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) <= 16
    assert "to spare" in " ".join(lines)
    assert not any("Memory of each choice" in line or "Layers to checkpoint" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_target_modules_that_are_not_there_are_told_each_time(
    configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--target-modules", "q_proj, v_proj, query"]
    for _ in range(2):  # the second answer comes from a file
        assert cli.run(["memory", str(configuration), "--device", "rtx 4090", *BATCH, *names]) == 0
        assert "rank 8 on 6 modules of 3 layers (no module is named query)," in " ".join(
            capsys.readouterr().out.split()
        )


def test_every_figure_is_described(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text().partition("| field | meaning |")[2]
    rows = [row.split("|")[1:3] for row in page.partition("\n\n")[0].splitlines()[2:]]
    described = {name for field, _ in rows for name in re.findall(r"`(\w+)`", field)}
    texts = {field.strip(" `"): set(re.findall(r"`(\w+)`", text)) for field, text in rows}
    NARROW_KEYS.save_pretrained(tmp_path)
    arguments = ["memory", str(tmp_path), "--device", "T4", "--batch-size", "2", "--max-length", "32", "--json"]
    assert cli.run(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == described
    assert figures["schema"] == 1
    assert {"torch", "transformers"} <= set(figures["libraries"])
    for name in ("choices", "grid", "exact_savers", "moments"):
        assert set(figures[name][0]) <= texts[name], name


@pytest.mark.parametrize(("wanted", "count"), [("True", 3), ("False", 0)])
def test_checkpointing_that_is_set_is_that_of_every_choice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, wanted: str, count: int
) -> None:
    NARROW_KEYS.save_pretrained(tmp_path)
    options = ["--device", "T4", "--batch-size", "2", "--max-length", "32", "--gradient-checkpointing", wanted]
    assert cli.run(["memory", str(tmp_path), *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {choice["checkpointed"] for choice in figures["choices"]} == {count}
    assert {cell["checkpointed"] for cell in figures["grid"]} <= {count, None}
    built = memory_of(NARROW_KEYS, "T4", gradient_checkpointing=wanted == "True", batch_size=2, max_length=32)
    assert f"gradient_checkpointing={wanted}" in configuration_text(built)


def test_names_of_models_and_cards_are_refused_before_torch_is_loaded() -> None:
    of_card = ["memory lama-3 --device T4", "memory qwen3-8b --device T44"]
    given = [*of_card, "finetune lama-3 x", "plan lama-3 x"]
    run = f"print([run(each.split()) for each in {given}], 'torch' in sys.modules)"
    code = f"import sys\nfrom rankpilot.cli.main import run\n{run}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[1, 1, 1, 1] False"
    assert done.stderr.count("error: Unknown model 'lama-3'. ") == 3


def test_several_gpus_are_named_in_the_first_line(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory", str(configuration), "--device", "rtx 4090", *BATCH, "--output", str(tmp_path / "card")]
    assert cli.run([*arguments, "--gpus", "4", "--sharding", "fsdp2"]) == 0
    first = " ".join(capsys.readouterr().out.split())
    assert "parameters on 4 x RTX 4090 under fsdp2, all figures per GPU, 8 x 1024 tokens" in first
    figures = read_json(tmp_path / "card/memory.json")
    assert (figures["gpus"], figures["sharding"]) == (4, "fsdp2")


def test_nothing_fits_and_the_status_says_so(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device-memory", "720MiB", *BATCH, "--batch-size", "32", "--json", "--output", str(tmp_path / "card")]
    assert cli.run(["memory", str(configuration), *options]) == 3
    figures = json.loads(capsys.readouterr().out)
    assert not figures["fits"]
    assert figures["verdict"].startswith("Does not fit: ")
    assert "The largest batch that fits with adapters on all layers is " in figures["verdict"]
    assert figures == read_json(tmp_path / "card/memory.json")


def test_the_best_choice_as_a_configuration(
    configuration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device-memory", "24GiB", *BATCH, "--rank", "16", "--python", "--output", str(tmp_path / "card")]
    assert cli.run(["memory", str(configuration), *options]) == 0
    text = capsys.readouterr().out
    names: dict[str, object] = {}
    exec(text, names)
    lora, arguments = names["lora"], names["arguments"]
    assert isinstance(lora, peft.LoraConfig)
    assert (lora.r, lora.target_modules) == (16, "all-linear")
    assert isinstance(arguments, dict)
    assert arguments["per_device_train_batch_size"] == 8
    assert not arguments["gradient_checkpointing"]


NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1}
NARROW_KEYS = LlamaConfig(vocab_size=64, num_hidden_layers=3, **NARROW, architectures=["LlamaForCausalLM"])


@pytest.fixture(scope="module")
def narrow_keys() -> Outlook:
    return memory_of(NARROW_KEYS, "24GiB", rank=32, batch_size=2, max_length=32)


@pytest.mark.parametrize("fits_whole", [True, False], ids=["all layers", "top layers"])
def test_the_configuration_builds_the_ranks_that_were_priced(narrow_keys: Outlook, fits_whole: bool) -> None:
    """Keys and values of grouped queries are narrower than the rank, and PEFT would build the rank for all."""
    shown = copy.copy(narrow_keys)
    if not fits_whole:
        shown.as_asked, shown.instead = (
            None,
            next(choice for choice in shown.by_depth() if choice.layers < shown.blocks),
        )
    best = shown.as_asked or shown.instead
    names: dict[str, object] = {}
    exec(configuration_text(shown), names)
    lora = names["lora"]
    assert isinstance(lora, peft.LoraConfig)
    built = {
        each.name: each.rank for each in find_target_modules(peft.get_peft_model(LlamaForCausalLM(NARROW_KEYS), lora))
    }
    priced = {each.name: rank for each, rank in zip(shown.step.targets, best.ranks.tolist(), strict=True) if rank}
    assert built == priced
    assert set(built.values()) == {16, 32}


def test_a_model_without_checkpointing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_of_module, "memory_of", cache(memory_of))  # both commands show the same
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "embedding_size": 16}
    AlbertConfig(vocab_size=64, num_hidden_layers=2, **sizes).save_pretrained(tmp_path / "albert")
    options = ["--device", "T4", "--max-length", "32", "--output", str(tmp_path / "card")]
    assert cli.run(["memory", str(tmp_path / "albert"), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "AlbertForSequenceClassification does not support gradient checkpointing." in printed
    assert "with no checkpointing" in printed
    assert cli.run(["memory", str(tmp_path / "albert"), *options, "--python"]) == 0
    assert "gradient_checkpointing=False" in capsys.readouterr().out


def test_models_that_take_no_such_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=64).save_pretrained(tmp_path / "gpt2")
    line = failure(f"memory {tmp_path / 'gpt2'} --device T4 --max-length 100", capsys)
    assert "max_length is 100, but the model has only 64 positions. Lower --max-length." in line
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path / "whisper")
    line = failure(f"memory {tmp_path / 'whisper'} --device T4", capsys)
    assert f"{str(tmp_path / 'whisper')!r} (WhisperConfig) does not read tokens but input_features" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--device T4 --device-memory 16GiB", "Pass either device ('T4') or device_memory ('16GiB')"),
        ("--device T4 --rank 0", "rank must be at least 1"),
        ("--device T4 --json --python", "--json and --python cannot be combined"),
    ],
)
def test_contradictions_are_refused_as_options(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in usage_error(f"memory m {options}", capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{model} --device 'RTX 9999'", "RTX 4090"),
        ("{model} --device-memory 24", "needs a unit; got '24'. Did you mean '24GiB'?"),
        ("{model} --device 24G", "Did you mean '24GiB'?"),
        ("{model} --device-memory 400MiB", "cannot hold even the CUDA context"),
        ("{model} --device-memory=-24GiB", "Cannot read the device memory '-24GiB'"),
        ("{model} --device-memory 24GiB --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("{model} --device T4 --gpus 0", "gpus must be a whole number from 1"),
        ("qwen9-8b --device T4", "qwen3-8b"),
    ],
)
def test_what_is_not_known_is_one_line(
    configuration: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in failure(f"memory {options.format(model=configuration)}", capsys)


def test_a_folder_that_is_broken_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LlamaForCausalLM(NARROW_KEYS).save_pretrained("whole")
    config = read_json(Path("whole/config.json"))
    wrong = {"pad_token_id": config["vocab_size"], "architectures": [5], "intermediate_size": 8, "vocab_size": 10**400}
    for name, value in wrong.items():
        shutil.copytree("whole", name)
        Path(name, "config.json").write_text(json.dumps({**config, name: value}))
    Path("pipe").mkdir()
    os.mkfifo("pipe/config.json")
    Path("deep.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 3000 + "]" * 3000 + "}\n")
    Path("trl.yaml").write_text("base_model: whole\nadapter: lora\nlora_modules_to_save: [1, 2]\n")
    told = {
        "pad_token_id --device T4": "pad_token_id is not below vocab_size",
        "architectures --device T4": "has architectures=[5]. It must be a list of names",
        "vocab_size --device T4": "It must be a whole number from 1 to",
        "pipe --device T4": "The configuration of 'pipe' is not usable",
        "whole --device T4 --lengths deep.jsonl:text": "line 2 is not JSON: It is nested too deeply",
        "--config trl.yaml --device T4": "lora_modules_to_save",
    }
    for command, words in told.items():
        assert words in failure(f"memory {command}", capsys), command


MODELS = ("llama-3.1-8b", "qwen3-8b", "mistral-7b-v0.3", "smollm2-135m", "gpt-oss-20b")
SETTINGS = (
    "--device-memory 24GiB",
    "--device-memory 24GiB --rank 64 --batch-size 4 --max-length 2048",
    "--device-memory 16GiB --quantization nf4 --batch-size 1",
    "--device-memory 8GiB --quantization nf4 --max-length 4096",
    "--device-memory 80GiB --batch-size 16 --max-length 4096",
    "--device-memory 20GiB --gradient-checkpointing True --batch-size 8 --max-length 2048",
    "--device-memory 24GiB --rank 16 --no-exact-savers --batch-size 4 --max-length 2048",
    "--device-memory 12GiB --quantization nf4 --batch-size 2 --max-length 2048",
)


def test_the_status_and_the_first_line_answer_the_run_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """Not that of fewer layers, rows or ranks, which would fit."""
    wrong, words = [], set()
    for model, options in itertools.product(MODELS, SETTINGS):
        asked = ["memory", model, *options.split()]
        status = cli.run(asked)
        first = capsys.readouterr().out.splitlines()[0]
        assert cli.run([*asked, "--json"]) == status
        told = json.loads(capsys.readouterr().out)
        whole = [each for each in told["choices"] if (each["layers"], each["rank"]) == (told["blocks"], told["rank"])]
        near = {each["verdict"] for each in whole if each["spare_bytes"] >= 0}
        word = "Fits" if "fits" in near else "May not fit" if "may not fit" in near else "Does not fit"
        streams = word == "Does not fit" and first.startswith("Fits with ")
        if not (first.startswith(f"{word}: ") or streams) or (status == 0) != (word != "Does not fit" or streams):
            wrong.append((model, options, first, status, near))
        if streams:
            assert "streamed from main memory" in told["verdict"]
        assert told["fits"] == (status == 0)
        words.add("streams" if streams else word)
    assert not wrong
    assert words >= {"Fits", "Does not fit", "streams"}
