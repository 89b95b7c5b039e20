"""Whether a fine-tune that is killed goes on as if nothing had happened: real SIGKILLs at random moments."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from ..allocation.log import DecisionLog
from ..allocation.schedule import DecisionSchedule
from ..common.files import read_json, read_json_lines
from ..common.tables import make_table
from ..finetune import experiment
from ..finetune.callback import RankPilotCallback
from ..finetune.checkpoint import last_checkpoint
from ..finetune.config import PILOT, UNIFORM, FinetuneConfig
from .harness import Figures, machine_facts, with_progress

STEPS, SAVE_EVERY, LENGTH, WORDS = 30, 5, 16, 60
BUDGET, RUNS = "80%", (PILOT, UNIFORM)
POLL_S, PATIENCE_S = 0.002, 120.0
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Options:
    """Kill fine-tunes at random moments, resume them, and compare them with runs that nobody killed.

    Each run is a process of its own that trains a tiny Llama on a CPU under a policy, and gets a SIGKILL. Four kinds of
    run take turns: the callback under a Trainer whose learning rate falls linearly, the same with a constant learning
    rate, `rankpilot finetune` that is killed in the uniform run beside it, and `rankpilot finetune` that is killed
    between its last checkpoint and its result. Each is resumed and trains to its end. Counted are the adapters that are
    not those of the uninterrupted run, bit for bit, and the rows of curves and decisions that are doubled or missing.

    Attributes:
        kills: how many processes are killed.
        quick: four kills, one of each kind.
        seed: of the moments.
        json: also write the figures to this file, as flat JSON.
    """

    kills: int = 20
    quick: bool = False
    seed: int = 0
    json: Path | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    Attributes:
        name: in the table.
        train: starts or resumes the run in a folder, given the folder of the model and of the data.
        phases: the kill falls between the moments at which the two files of one of these pairs appear.
        adapters: the files that are compared.
        curves: files of rows by step.
    """

    name: str
    train: Callable[[Path, Path], None]
    phases: Sequence[tuple[str, str]]
    adapters: Sequence[str]
    curves: Sequence[str] = ()


def train_linear(folder: Path, inputs: Path) -> None:
    """The callback under a Trainer with linear decay."""
    _train(folder, inputs, "linear")


def train_constant(folder: Path, inputs: Path) -> None:
    """The callback under a Trainer with a constant learning rate."""
    _train(folder, inputs, "constant")


def _train(folder: Path, inputs: Path, scheduler: str) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(inputs / "model"), lora)
    rows = [[(place * stride) % WORDS for place in range(LENGTH)] for stride in range(1, 97)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        lr_scheduler_type=scheduler,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    schedule = DecisionSchedule(probe_steps=4)
    pilot = RankPilotCallback("signal-mean", BUDGET, schedule=schedule, measure_every=4)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.add_callback(pilot)
    pilot.connect(trainer)
    checkpoint = last_checkpoint(folder, tell=lambda _: None)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.save_pretrained(folder / "adapter")


def finetune_and_compare(folder: Path, inputs: Path) -> None:
    """`rankpilot finetune --compare-uniform`, without the process that loads the adapter again."""
    torch.set_num_threads(1)
    config = FinetuneConfig(
        str(inputs / "model"),
        str(inputs / "text.txt"),
        policy="signal-mean",
        budget="800 params",  # rank 1 on all modules takes more, so the uniform run leaves some out
        compare_uniform=True,
        steps=STEPS,
        eval_every=SAVE_EVERY,
        batch_size=4,
        max_length=LENGTH,
        held_out_rows=16,
    )
    with mock.patch.object(experiment, "check_reload", return_value={"identical": True, "max_abs_difference": 0.0}):
        experiment.finetune(config, folder, resume=folder.exists())


_FINETUNE_ADAPTERS = [f"{run}/{ADAPTER}" for run in RUNS]
_CURVES = [f"metrics-{run}.jsonl" for run in RUNS]
_PHASES = [(f"{run}/checkpoint-{STEPS}/trainer_state.json", f"result-{run}.json") for run in RUNS]
_FIRST_DECISION = "decisions/decisions.jsonl"

KINDS = (
    Kind("linear decay", train_linear, [(_FIRST_DECISION, ADAPTER)], [ADAPTER]),
    Kind("constant learning rate", train_constant, [(_FIRST_DECISION, ADAPTER)], [ADAPTER]),
    Kind(
        "in the uniform run",
        finetune_and_compare,
        [(f"result-{RUNS[0]}.json", f"result-{RUNS[1]}.json")],
        _FINETUNE_ADAPTERS,
        _CURVES,
    ),
    Kind("after the last checkpoint", finetune_and_compare, _PHASES, _FINETUNE_ADAPTERS, _CURVES),
)


@dataclass
class Tally:
    """What became of the killed runs of one kind.

    Attributes:
        kills: how many were killed.
        resumed: how many of them had a checkpoint to go on from.
        changed: adapters that are not as in the uninterrupted run.
        rows: rows that are doubled or missing.
        failed: runs that did not end when they were resumed.
    """

    kills: int = 0
    resumed: int = 0
    changed: int = 0
    rows: int = 0
    failed: int = 0


@dataclass
class Whole:
    """An uninterrupted run, and how long its phases took, in seconds by phase."""

    folder: Path
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)


def benchmark(options: Options, console: Console) -> Figures:
    """Kill, resume and compare; prints a table and returns the figures."""
    moments = random.Random(options.seed)
    count = len(KINDS) if options.quick else options.kills
    tallies = {kind.name: Tally() for kind in KINDS}
    with TemporaryDirectory() as scratch:
        inputs = Path(scratch)
        write_inputs(inputs)
        wholes: dict[Callable[[Path, Path], None], Whole] = {}
        for number in with_progress(range(count), "kills"):
            kind = KINDS[number % len(KINDS)]
            if kind.train not in wholes:
                wholes[kind.train] = run_whole(kind, inputs)
            kill_one(kind, wholes[kind.train], inputs, moments, tallies[kind.name])
    rows = [(name, *map(str, vars(tally).values())) for name, tally in tallies.items()]
    console.print(make_table("", ("killed", *vars(Tally())), rows))
    figures: Figures = {**machine_facts(torch.device("cpu"))}
    for name, tally in tallies.items():
        figures |= {f"{name.replace(' ', '_')}.{key}": value for key, value in vars(tally).items()}
    return figures


def write_inputs(folder: Path) -> None:
    """A tiny Llama with its tokenizer, and a text."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    names = ("[PAD]", "[UNK]", "[EOS]", *(f"w{index}" for index in range(WORDS)))
    words = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    ).save_pretrained(folder / "model")
    lines = [" ".join(f"w{(line + 3 * place) % WORDS}" for place in range(2 * LENGTH)) for line in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))


def run_whole(kind: Kind, inputs: Path) -> Whole:
    """Run to the end, and time the phases of all kinds that train so."""
    whole = Whole(inputs / kind.train.__name__ / "run")
    phases = [phase for other in KINDS if other.train is kind.train for phase in other.phases]
    began: dict[str, float] = {}
    process = start(kind, whole.folder, inputs)
    while process.is_alive():
        for name in {name for phase in phases for name in phase} - began.keys():
            if (whole.folder / name).exists():
                began[name] = time.monotonic()
        time.sleep(POLL_S)
    process.join()
    assert process.exitcode == 0, f"the uninterrupted run failed: {kind.name}"
    ended = time.monotonic()
    whole.seconds = {phase: began.get(phase[1], ended) - began[phase[0]] for phase in phases}
    return whole


def kill_one(kind: Kind, whole: Whole, inputs: Path, moments: random.Random, tally: Tally) -> None:
    """Kill one run at a random moment of its phase, resume it, and compare it with the uninterrupted one."""
    folder = inputs / "killed" / "run"
    while True:
        shutil.rmtree(folder.parent, ignore_errors=True)
        first, last = phase = moments.choice(kind.phases)
        delay = moments.uniform(0, whole.seconds[phase])
        process = start(kind, folder, inputs)
        deadline = time.monotonic() + PATIENCE_S
        while process.is_alive() and not (folder / first).exists() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        time.sleep(delay)
        too_late = (folder / last).exists() or not process.is_alive()
        process.kill()
        process.join()
        if not too_late:
            break
    tally.kills += 1
    tally.resumed += any(folder.rglob("checkpoint-*/trainer_state.json"))
    process = start(kind, folder, inputs)
    process.join()
    if process.exitcode != 0:
        tally.failed += 1
        return
    tally.changed += sum((whole.folder / name).read_bytes() != (folder / name).read_bytes() for name in kind.adapters)
    tally.rows += wrong_rows(kind, whole.folder, folder)


def start(kind: Kind, folder: Path, inputs: Path) -> BaseProcess:
    """A process that trains; it starts as a fork of one that has loaded the libraries."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_train_in_process, args=(kind.train, folder, inputs))
    process.start()
    return process


def _train_in_process(train: Callable[[Path, Path], None], folder: Path, inputs: Path) -> None:
    """Train in a process that may be killed: without the semaphores of progress bars, which a kill would leak."""
    tqdm.set_lock(threading.RLock())
    train(folder, inputs)


def wrong_rows(kind: Kind, whole: Path, folder: Path) -> int:
    """How many rows of decisions and curves are there too often or too seldom."""
    there, here = (DecisionLog(path / "decisions").to_pandas() for path in (whole, folder))
    wrong = 0 if here.equals(there) else max(abs(len(here) - len(there)), 1)
    for name in kind.curves:
        wrong += _difference(*(_steps_of(read_json_lines(path / name)) for path in (whole, folder)))
    if not kind.curves:
        histories = [read_json(path / f"checkpoint-{STEPS}" / "trainer_state.json") for path in (whole, folder)]
        wrong += _difference(*(_steps_of(history["log_history"]) for history in histories))
    return wrong


def _difference(there: Counter[tuple[object, str]], here: Counter[tuple[object, str]]) -> int:
    return ((there - here) + (here - there)).total()


def _steps_of(rows: Sequence[dict[str, object]]) -> Counter[tuple[object, str]]:
    """How often there is a value for each step and kind of value."""
    kinds = ("loss", "eval_loss", "peak_bytes")
    return Counter((row["step"], key) for row in rows for key in kinds if key in row)
