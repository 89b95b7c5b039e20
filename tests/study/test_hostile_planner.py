"""`rankpilot memory`, `study` and `replay` on hostile input: one line each, and no answer to nonsense."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rankpilot import memory_of
from rankpilot.cli import main as cli
from rankpilot.common.errors import RankPilotError
from transformers import LlamaConfig

from .conftest import write_decisions

HUGE, DEEP = 10**400, "[" * 3000 + "]" * 3000
BATCH = ["--batch-size", "2", "--max-length", "32"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).to_dict()

Made = Callable[[Path], list[str]]
"""Makes the files of a case in a folder; returns the command."""

TRAINERS = {
    "axolotl": {"base_model": "MODEL", "adapter": "lora", "sequence_len": "32", "lora_target_linear": "true"},
    "trl": {"model_name_or_path": "MODEL", "use_peft": "true", "max_length": "32", "packing": "false"},
    "llama-factory": {"model_name_or_path": "MODEL", "do_train": "true", "cutoff_len": "32", "bf16": "true"},
}
NUMBERS = {
    "axolotl": ["lora_r", "micro_batch_size", "sequence_len", "gradient_accumulation_steps"],
    "trl": ["lora_r", "per_device_train_batch_size", "max_length", "gradient_accumulation_steps"],
    "llama-factory": ["lora_rank", "per_device_train_batch_size", "cutoff_len"],
}
SWITCHES = {
    "axolotl": ["load_in_4bit", "gradient_checkpointing", "sample_packing", "bf16", "fp16", "activation_offloading"],
    "trl": ["use_peft", "gradient_checkpointing", "packing", "padding_free", "bf16", "use_bnb_nested_quant"],
    "llama-factory": ["pure_bf16", "neat_packing", "use_unsloth", "use_reentrant_gc", "disable_gradient_checkpointing"],
}
NO_NUMBER = ["0", "-1", ".nan", ".inf", "true", "2.9", str(HUGE), "eight", "[8]", "{a: 8}", "''", "2001-01-01", "0o17"]
NO_SWITCH = ["7", "-1", ".nan", "2.9", "[false]", "{a: false}", "flase", "2001-01-01"]
NO_NAME = ["5", "[a]", "{a: 1}", "true", ".nan", str(HUGE), "2001-01-01"]
NO_NAMES = ["5", "true", "{a: 1}", "[1]", "[[a]]", "['']", "[null]"]

KEYS = [
    *((program, key, value) for program, keys in NUMBERS.items() for key, value in product(keys, NO_NUMBER)),
    *((program, key, value) for program, keys in SWITCHES.items() for key, value in product(keys, NO_SWITCH)),
    *product(TRAINERS, ["lora_dropout"], ["-0.1", "1.0", ".nan", ".inf", "true", "x", "[0.1]", str(HUGE)]),
    *product(["axolotl", "trl"], ["attn_implementation"], NO_NAME),
    *product(["llama-factory"], ["flash_attn", "finetuning_type", "stage", "optim"], NO_NAME),
    *product(["trl"], ["dtype", "optim", "loss_type", "model_name_or_path"], [*NO_NAME, "bflot16"]),
    *product(["axolotl"], ["optimizer", "adapter", "rl"], [*NO_NAME, "adamww"]),
    *product(["axolotl"], ["base_model"], [*NO_NAME, "''", "' '", '"a\\0b"', "a" * 5000, "~nobody/x", '"a\\nb"']),
    *product(["axolotl"], ["lora_modules_to_save", "lora_target_parameters"], [*NO_NAMES, "'(['"]),
    *product(["axolotl"], ["fsdp"], ["5", ".nan", "[1]", "{a: 1}"]),
    *product(["axolotl"], ["fsdp_config", "deepspeed"], ["5", ".nan", "[1]"]),
    *product(["axolotl"], ["gradient_checkpointing_kwargs"], ["x", "5", "[1]", "{use_reentrant: banana}"]),
]
FORMS = {
    "empty": "", "null": "null", "a number": "5", "a list": "[1]", "zeros": "\0" * 1000, "deep": f"KEYSx: {DEEP}",
    "deep block": "".join(f"{' ' * depth}a:\n" for depth in range(3000)), "references": "KEYSx: &a [1]\ny: *a",
    "a key twice": "KEYSadapter: qlora", "a key twice inside": "KEYSfsdp_config: {a: 1, a: 2}",
    "tabs": "KEYSx:\n\ty: 1", "a key of a number": "KEYS5: x", "a key of null": "KEYSnull: x",
    "a key of a list": "KEYS[1, 2]: x", "a key of a date": "KEYS2001-01-01: x",
    "an object": "KEYSx: !!python/object/apply:os.system [ls]",
    "no date": "KEYSx: 2001-13-45", "two documents": "KEYS---\na: 1", "unclosed": "KEYSx: [", "control": "KEYSx: \x01",
    "5000 digits": "KEYSx: " + "9" * 5000, "lists": "base_model: []\nadapter: []", "nothing known": "a: 1",
}  # fmt: skip
SIZE_VALUES = [0, -1, 2.5, "64", math.nan, math.inf, HUGE, 2**40, True, [64], {}]
FIELDS = [
    *product([*SIZES, "num_key_value_heads"], SIZE_VALUES),
    *product(["max_position_embeddings"], SIZE_VALUES[:-1]),
    *product(["architectures"], [5, "LlamaForCausalLM", [5], [None], {"a": 1}, ["ViTModel"]]),
    *product(["model_type"], ["banana", 5, ["llama"], "", "vit", {}, "timm_wrapper", "musicgen"]),
    *product(["text_config"], ["x", 5, [], {"text_config": {}}]),
    *product(["quantization_config"], ["x", 5, [1], {"quant_method": 5}]),
    *product(["rope_parameters"], ["x", 5, [1], {"rope_type": "banana"}, {"rope_type": "yarn", "factor": "x"}]),
    *product(["hidden_act"], ["banana", 5, ["silu"], {}]),
    *product(["pad_token_id"], [64, "x", HUGE]),
    *product(["num_labels"], [HUGE, 2**40]),
    *product(["id2label"], ["x", 5]),
    ("dtype", []),
]
JSON_TEXTS = ["", "null", "5", "[1]", "{}", "\0" * 100, DEEP, '{"text_config": ' * 3000 + "{}" + "}" * 3000, "9" * 5000]
CARDS = [
    *("", " ", "RTX", "24", "24G", "-24GiB", "0GiB", "nanGiB", "infGiB", "1e3GiB", "9" * 400 + "GiB", "24,5GiB"),
    *("1.2.3GiB", "24PiB", "٢٤GiB", "😀", "x" * 9999, "400MiB", "[bold]", "\x1b[31m", "999999999TiB", "1,2,3GiB"),
]  # fmt: skip
MODELS = ["", " ", "/", "..", "~nobody/x", "a\0b", "a" * 9999, "a/" + "b" * 9999, "😀", "[/]", "/dev/null", "/dev/zero"]
OPTIONS = [
    *product(["--rank"], ["0", "-1", "nan", "2.9", str(HUGE), "true", "", "100000"]),
    *product(["--batch-size", "--max-length"], ["-1", "nan", "2.9", str(HUGE), "9" * 5000, "true", ""]),
    *product(["--gpus", "--accumulation"], ["-1", "nan", "2.9", str(HUGE), "9" * 5000, ""]),
    *product(["--lora-dropout"], ["-0.1", "1", "nan", "inf", "1e400", "x"]),
    *product(["--target-modules"], [",", "nope", "([", "(a+)+b", "a" * 99999, "*", ".*"]),
    *product(["--target-parameters"], ["nope", "(["]),
    *product(["--quantization", "--dtype", "--sharding", "--optimizer", "--attention", "--loss"], ["banana", ""]),
    *product(["--output"], ["/dev/null", "a\0b", "/" + "a" * 5000]),
    *product(["--lengths"], ["", "none.txt", "/dev/zero", "a\0b", "a" * 9999, ":", ":text", "nowhere:text"]),
    *product(["--config"], ["", "none.yaml", "/dev/null", "/dev/zero", "/", "a" * 9999, "~nobody/x"]),
]
LENGTHS = [
    *("", " \n", "a b", "3 -5", "3.5", "nan", "inf 3", str(HUGE), "0", "[[3], [4]]", '[{"a": 3}]'),
    *('{"len": 3}\n{"len": [4]}', "[]", DEEP, "[3, 5", "]3[", "\0" * 9, "٣", "0x10", "1e3", "1_000", "3;5", "a,3"),
]  # fmt: skip


def trainer(program: str, *, form: str = "KEYS", **changed: str) -> Made:
    def make(folder: Path) -> list[str]:
        (folder / "config.json").write_text(json.dumps(LLAMA))
        keys = {key: str(folder) if text == "MODEL" else text for key, text in TRAINERS[program].items()} | changed
        path = folder / "train.yaml"
        path.write_text(form.replace("KEYS", "".join(f"{key}: {text}\n" for key, text in keys.items())))
        return ["memory", "--config", str(path), "--device", "T4"]

    return make


def configuration(text: str) -> Made:
    def make(folder: Path) -> list[str]:
        (folder / "config.json").write_text(text)
        return ["memory", str(folder), "--device", "RTX 4090", *BATCH]

    return make


def option(name: str, value: str) -> Made:
    card = [] if name == "--device" else ["--device-memory", "24GiB"]
    return lambda folder: ["memory", "smollm2-135m", *card, *BATCH, name, value]


def lengths(text: str) -> Made:
    def make(folder: Path) -> list[str]:
        (folder / "lengths.txt").write_text(text)
        return option("--lengths", str(folder / "lengths.txt"))(folder)

    return make


def log(name: str, value: object, command: str) -> Made:
    def make(folder: Path) -> list[str]:
        write_decisions(folder / "decisions")
        path = folder / "decisions" / "decisions.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | {name: value}), *others, ""]))
        return [command, str(folder)]

    return make


def place(name: str, make_file: Callable[[Path], object], *words: str) -> Made:
    def make(folder: Path) -> list[str]:
        make_file(folder / name)
        return ["memory", *(word.format(folder) for word in words), "--device", "T4"]

    return make


def cases() -> Iterator[tuple[str, Made]]:
    for program, key, value in KEYS:
        yield f"{program} {key} {value:.12}", trainer(program, **{key: value})
    for name, form in FORMS.items():
        yield f"file: {name}", trainer("axolotl", form=form)
    for name, value in FIELDS:
        yield f"{name} {str(value)[:12]}", configuration(json.dumps(LLAMA | {name: value}))
    for text in JSON_TEXTS:
        yield f"config.json {text[:20]!a}", configuration(text)
    for name, value in [*product(["--device"], CARDS), *OPTIONS]:
        yield f"{name} {value[:12]!a}", option(name, value)
    for model in MODELS:
        yield f"model {model[:12]!a}", lambda folder, model=model: ["memory", model, "--device", "T4"]
    for text in LENGTHS:
        yield f"lengths {text[:12]!a}", lengths(text)
    for name in (
        "step",
        "seed",
        "max_step",
        "loss",
        "limit",
        "predicted_cost",
        "measured_cost",
        "rank_floor",
        "change",
    ):
        yield f"log {name}", log(name, HUGE, "replay")
    yield "log ladder", log("ladder", [0, HUGE], "replay")
    yield "a pipe for a trainer's file", place("train.yaml", os.mkfifo, "--config", "{}/train.yaml")
    yield "a pipe for a configuration", place("config.json", os.mkfifo, "{}")
    yield "a pipe for lengths", place("l", os.mkfifo, "smollm2-135m", "--lengths", "{}/l")
    yield "a circle of links", place("config.json", lambda path: path.symlink_to(path), "{}")
    yield "a folder for a file", place("train.yaml", Path.mkdir, "--config", "{}/train.yaml")
    yield "a huge configuration", place("config.json", sparse, "{}")
    yield "a huge trainer's file", place("train.yaml", sparse, "--config", "{}/train.yaml")


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**33)


def some(every: int, named: list[tuple[str, Any]]) -> list[Any]:
    """One in so many cases, and the others for `make test-long`."""
    marks = [() if number % every == 0 else pytest.mark.long for number in range(len(named))]
    return [pytest.param(case, id=name, marks=mark) for (name, case), mark in zip(named, marks, strict=True)]


@pytest.mark.parametrize("make", some(17, [*cases()]))
def test_it_gets_one_line(make: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.run(make(tmp_path))
    except SystemExit as end:  # an option that cannot be read, which is told in a frame
        status = end.code
    error = capsys.readouterr().err
    assert status in (1, 2), "nonsense is not answered"
    assert status == 2 or error.count("error: ") == 1
    assert len(error) < 2500


ODD = [None, 2.9, "8", math.nan, math.inf, HUGE, -1, [8], {}, b"8", 8j, False]
NO_WORD = [5, [], {}, "banana", "", math.nan, HUGE]
ARGUMENTS = [
    *product(["rank", "batch_size", "max_length", "accumulation", "gpus"], ODD),
    *product(["quantization", "optimizer", "experts", "loss", "sharding", "attention", "dtype"], NO_WORD),
    *product(["padded", "bf16", "reentrant", "packed", "gradient_checkpointing", "exact_savers"], ["no", 5, None, []]),
    *product(["lora_dropout"], [math.nan, -1, 1.0, "0.1", True, HUGE]),
    *product(["target_modules", "target_parameters"], [None, 5, ["q_proj"], {}]),
    *product(["adapter"], [5, "x", [], None, {"banana": 1}, {5: 1}, {"task_type": "x"}, {"bias": "x"}, {"r": -1}]),
    *product(["model"], [None, 5, b"qwen3-8b", [], {}, "", math.nan]),
    *product(["card"], [None, 5, b"T4", ["T4"], 24.0]),
]


@pytest.mark.parametrize("given", some(17, [(f"{name} {str(value)[:12]}", {name: value}) for name, value in ARGUMENTS]))
def test_the_library_takes_no_nonsense(given: dict[str, Any]) -> None:
    settings = {"model": "smollm2-135m", "card": "24GiB", "batch_size": 2, "max_length": 32} | given
    with pytest.raises(RankPilotError) as error:
        memory_of(settings.pop("model"), settings.pop("card"), **settings)
    assert 0 < len(str(error.value)) < 2500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "form",
    ["\ufeffKEYS", "KEYSx: &a 1", "KEYSlora_r: 010", "KEYSgradient_checkpointing_kwargs: {use_reentrant: 'false'}"],
    ids=["a byte order mark", "an anchor", "octal", "text for a switch"],
)
def test_odd_files_that_say_what_they_mean_are_answered(form: str, tmp_path: Path) -> None:
    assert cli.run(trainer("axolotl", form=form)(tmp_path)) == 0
