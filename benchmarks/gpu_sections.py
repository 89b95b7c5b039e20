"""The sections of `benchmarks gpu-evidence`: each is a function that returns rows of predicted beside measured.

Models have random weights and the published configurations of two small models, so nothing is downloaded.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rankpilot
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rankpilot.common.arrays import IntArray
from rankpilot.common.errors import UnknownNameError, first_line
from rankpilot.common.files import write_json
from rankpilot.cost.batch_shape import Batch, shape_of
from rankpilot.cost.cards import UNKNOWN_CONTEXT_BYTES, DeviceSpec, card_rates, find_device_spec
from rankpilot.cost.forecast.card_use import card_use
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.forecast.known_models import published_models
from rankpilot.cost.record.model_states import frozen_bytes
from rankpilot.cost.record.work import count_work
from rankpilot.cost.savers.exact import SAVERS, ExactSavers
from rankpilot.cost.savers.prices import ACTIVATIONS, CACHE
from rankpilot.cost.savers.streamed_base import StreamedBase, streamable_layers
from rankpilot.cost.step_config import StepConfig
from rankpilot.cost.training_step import new_optimizer, switch_checkpointing
from rankpilot.finetune.step.plan_keeper import GOOD_STEPS
from rankpilot.finetune.step.replicas import digest_of
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from .elastic import ON_CUDA, OTHER, ROOM, TAKEN, other_process
from .models import Learner, Size, random_loader
from .published import total_mib
from .step_time import TimedModel, TimedPlan

ROOT = Path(__file__).parents[1]
MODELS = ("llama-3.2-1b", "qwen2.5-0.5b")
MIB = 2**20

TINY = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
"""What a dry run changes of the configurations."""

STEPS = {
    "4 x 512": StepConfig(batch_size=4, max_length=512, gradient_checkpointing=False, exact_savers=False),
    "2 x 2048, all layers again": StepConfig(
        batch_size=2, max_length=2048, gradient_checkpointing=True, exact_savers=False
    ),
    "8 x 256, q and v, savers": StepConfig(
        batch_size=8, max_length=256, target_modules="q_proj,v_proj", gradient_checkpointing=False
    ),
    "4 x 512, fp32 under autocast, savers": StepConfig(
        batch_size=4, max_length=512, bf16=True, gradient_checkpointing=False
    ),
}
"""Four training steps of each model; its weights are in bf16 unless the step says otherwise."""

Row = dict[str, Any]
"""what, predicted, measured and unit; `exact` where another figure than the predicted one is a failure."""


def row(what: str, predicted: Any, measured: Any, unit: str = "", *, exact: bool = False) -> Row:
    """A figure that was predicted, and what was measured."""
    return {"what": what, "predicted": predicted, "measured": measured, "unit": unit, "exact": exact}


@dataclass(frozen=True)
class Machine:
    """Where a section runs.

    Attributes:
        dry: on the CPU, with tiny models.
    """

    dry: bool

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return torch.device("cpu" if self.dry else "cuda")

    def config(self, name: str) -> Any:
        """The configuration of a model of the planner's table."""
        fields = published_models()[name]["config"] | (TINY if self.dry else {}) | {"use_cache": False}
        return AutoConfig.for_model(**fields)

    def base(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The model with random weights, the same ones at each call."""
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(self.config(name), dtype=dtype)

    def size(self, rows: int, length: int, name: str = MODELS[1]) -> Size:
        """Of batches; a dry run has two short rows."""
        vocabulary = self.config(name).vocab_size
        return Size(rows=2, length=32, vocabulary=vocabulary) if self.dry else Size(4, 64, vocabulary, rows, length)

    def batch(self, rows: int, length: int, name: str = MODELS[1]) -> Batch:
        """Random tokens without padding."""
        batch = next(iter(random_loader("llama", self.size(rows, length, name), 0, batches=1)))
        return {key: values.to(self.device) for key, values in batch.items()}

    def card(self) -> DeviceSpec:
        """This card as the planner's table has it, or by its memory alone."""
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
        try:
            return replace(find_device_spec(name), memory_bytes=memory)
        except UnknownNameError:
            return DeviceSpec(name, memory, UNKNOWN_CONTEXT_BYTES, torch.cuda.get_device_capability())


def _in_process(command: list[str], minutes: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60 * minutes)


def gpu_tests(machine: Machine) -> list[Row]:
    """The tests marked `gpu`; without CUDA they are skipped."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = _in_process([*command, *map(str, files)], minutes=9)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = {case.get("name"): next((outcomes[e.tag] for e in case if e.tag in outcomes), "passed") for case in cases}
    hoped = "skipped" if machine.dry else "passed"
    return [row(str(name), hoped, outcome, exact=outcome == "failed") for name, outcome in found.items()]


def _peak(machine: Machine, name: str, title: str, step: StepConfig) -> list[Row]:
    """One step, from its configuration alone and as it runs."""
    dtype = torch.float32 if step.bf16 else torch.bfloat16
    if machine.dry:
        step = replace(step, batch_size=2, max_length=32)
    loaded = LoadedAs(device=machine.device.type, dtype=dtype)  # type: ignore[arg-type]
    predicted = from_config(machine.config(name), step, loaded)
    base = machine.base(name, dtype)
    if step.gradient_checkpointing is True:
        switch_checkpointing(base, True)
    names = step.target_modules if step.target_modules == "all-linear" else step.target_modules.split(",")
    learner = Learner(base, LoraConfig(r=8, lora_alpha=16, target_modules=names), autocast=step.bf16)
    if step.optimizer != "adamw":
        learner.optimizer = new_optimizer(step.optimizer, learner.model)
    if step.exact_savers:
        ExactSavers(learner.model, [saver for saver in SAVERS if saver != CACHE])
    batch = machine.batch(step.batch_size, step.max_length, name)
    learner.step(batch)  # the optimizer's state is there from now on
    return _beside(machine, f"{name}, {title}", predicted, learner, batch)


def _beside(machine: Machine, what: str, predicted: ConfiguredStep, learner: Learner, batch: Batch) -> list[Row]:
    shape = shape_of(batch)
    if machine.dry:
        measured = (learner.measured_step(batch) + frozen_bytes(learner.model)) / MIB
        return [row(f"{what}: live", total_mib(predicted, shape, 8), measured, "MiB")]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    learner.step(batch)
    torch.cuda.synchronize()
    loaded, ranks = predicted.model.frozen, np.full(len(predicted.targets), 8)
    use = card_use(predicted.memory, ranks, loaded, machine.card(), shape=shape)
    allocated, reserved = torch.cuda.max_memory_allocated() / MIB, torch.cuda.max_memory_reserved() / MIB
    return [
        row(f"{what}: allocated", use.allocated_bytes / MIB, allocated, "MiB"),
        row(f"{what}: reserved", use.reserved_bytes / MIB, reserved, "MiB"),
    ]


def peaks(machine: Machine) -> list[Row]:
    """The peaks of eight steps."""
    rows = []
    for name in MODELS:
        for title, step in STEPS.items():
            rows += _peak(machine, name, title, step)
            gc.collect()
    return rows


def step_times(machine: Machine) -> list[Row]:
    """Six plans as shares of plain LoRA: by the card's published rates, by those measured, and measured."""
    size = machine.size(8, 512)
    case = TimedModel("llama", size, machine.base(MODELS[1]), 0, checkpoint=True)
    plain: TimedPlan = (np.full(len(case.targets), 8), ())
    plans = {"plain LoRA": plain} | _six_plans(case)
    seconds = case.seconds(list(plans.values()), 3 if machine.dry else 9)
    measured = np.array([np.median(times) for times in seconds.values()])
    rates = None if machine.dry else machine.card().rates
    counted = None
    if rates:
        work = count_work(case.learner.model, case.targets, case.step.loss, case.batch)
        counted = work.time(card_rates(rates, "bf16"))
    rows = [row("plain LoRA, by measured rates", case.time.seconds(*plain), measured[0], "s")]
    for number, (name, plan) in enumerate(plans.items()):
        share = measured[number] / measured[0]
        if number:
            rows.append(row(f"{name}, by measured rates", case.time.seconds(*plan) / case.time.seconds(*plain), share))
        if counted:
            told = counted.seconds(*plan), counted.seconds(*plain)
            rows.append(
                row(f"{name}, by rates", told[0] / (told[1] if number else 1), share if number else measured[0])
            )
    return rows


def _six_plans(case: TimedModel) -> dict[str, TimedPlan]:
    blocks = np.array([target.block for target in case.targets])
    ends = np.array([target.name.rpartition(".")[2] for target in case.targets])
    count = int(blocks.max()) + 1

    def of(chosen: Any, rank: int = 8) -> IntArray:
        return np.where(chosen, np.minimum(rank, case.most), 0)

    everything = blocks >= 0
    return {
        "rank 64": (of(everything, 64), ()),
        "top half": (of(blocks >= count // 2), ()),
        "top quarter": (of(blocks >= 3 * count // 4), ()),
        "q and v": (of(np.isin(ends, ["q_proj", "v_proj"])), ()),
        "MLPs": (of(np.isin(ends, ["gate_proj", "up_proj", "down_proj"])), ()),
        "all layers again": (of(everything), case.layers),
    }


AT = 3
"""The step that runs out of memory, from 0."""


class ShortOfMemory(Trainer):  # type: ignore[misc]
    """May take 97 % of the peak so far in one step; without CUDA, fails once in it."""

    errors, most = 0, 0

    def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
        """The Trainer's step, with less memory in step `AT`."""
        try:
            if self.state.global_step != AT:
                return self._taken(*given, **options)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                share = 0.97 * self.most / torch.cuda.mem_get_info()[1]
                torch.cuda.set_per_process_memory_fraction(share)
            elif not self.errors:
                raise torch.OutOfMemoryError("a dry run pretends that it is out of memory")
            return self._taken(*given, **options)
        except torch.OutOfMemoryError:
            self.errors += 1
            raise
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(1.0)

    def _taken(self, *given: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*given, **options)
        if torch.cuda.is_available() and self.state.global_step != AT:
            self.most = max(self.most, torch.cuda.max_memory_allocated())
        return loss


def _trained(machine: Machine, kind: type[Trainer], steps: int, **options: Any) -> tuple[Trainer, Any]:
    """A Trainer that has made so many steps, and its callback."""
    size = machine.size(8, 512)
    rows = random_loader("llama", size, 0).dataset
    model = get_peft_model(machine.base(MODELS[1]), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        settings |= {"use_cpu": machine.dry, "max_steps": steps, "per_device_train_batch_size": size.rows}
        trainer = kind(model, TrainingArguments(folder, **settings), train_dataset=rows)
        callback = rankpilot.attach(trainer, **options)
        trainer.train()
    return trainer, callback


def streamed_base(machine: Machine) -> list[Row]:
    """A base in main memory: equal losses, two layers on the card, and copies that hide behind the computation."""
    batch, found = machine.batch(2, 2048), {}
    for name in ("resident", "streamed"):
        torch.manual_seed(0)
        model = get_peft_model(machine.base(MODELS[1]), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        layers = [*streamable_layers(model).values()] if name == "streamed" else []
        streaming = StreamedBase(model, layers, machine.device)
        losses, start = [], 0.0
        for step in range(6):
            if step == 2:
                _synchronize(machine)
                start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            losses.append(float(loss.detach()))
            for parameter in model.parameters():
                parameter.grad = None
        _synchronize(machine)
        seconds = time.perf_counter() - start
        peak = 0 if machine.dry else torch.cuda.max_memory_allocated()
        found[name] = losses, seconds, peak, streaming.away_bytes
        del model, streaming
        gc.collect()
        if not machine.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    (whole, seconds, peak, _), (losses, longer, lower, away) = found["resident"], found["streamed"]
    return [
        row("losses equal the resident base's", True, losses == whole, exact=True),
        row("bytes saved on the card", None if machine.dry else away, peak - lower, "bytes"),
        row("seconds, as a share of the resident base's", None, longer / seconds),
    ]


def _synchronize(machine: Machine) -> None:
    if not machine.dry:
        torch.cuda.synchronize()


def out_of_memory(machine: Machine) -> list[Row]:
    """A step that runs out of memory is taken again, and the run goes on to its end."""
    trainer, callback = _trained(machine, ShortOfMemory, AT + 4, budget="110%", measure_every=1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = callback.pilot.figures()
    return [
        row("a step ran out of memory", True, trainer.errors > 0, exact=True),
        row("steps", AT + 4, trainer.state.global_step, exact=True),
        row("finite losses", AT + 4, sum(map(math.isfinite, losses)), exact=True),
        row("errors", None, trainer.errors),
        row("layers that run again at the end", None, int(found.get("checkpointed_layers", 0))),
    ]


def elastic_budget(machine: Machine) -> list[Row]:
    """Another process takes 30 % of the room in mid-run and gives it back; a step never takes more than is left."""
    model = get_peft_model(machine.base(MODELS[1]), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer, loader = new_optimizer("adamw", model), random_loader("llama", machine.size(8, 512), 0)
    run = rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=100)
    pilot = rankpilot.RankPilot(budget="100%", measure_every=1, tell=lambda line: None)
    pilot.begin(run)
    room, batch = int(ROOM * pilot.predictions[0][1]), machine.batch(8, 512)
    shares, sizes = [], []
    with other_process(OTHER if machine.dry else ON_CUDA) as other:
        taken = 0
        pilot.set_budget(lambda: room - taken)
        for steps, share in ((3, 0.0), (3, TAKEN), (GOOD_STEPS + 1, 0.0)):
            taken = int(share * room)
            other.take(taken)
            for _ in range(steps):
                pilot.before_step(batch)
                loss = model(**batch).loss
                loss.backward()
                pilot.before_optimizer_step(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                pilot.after_step()
                shares.append(pilot.peaks[-1][1] / pilot.limit)
            assert pilot.applier is not None
            sizes.append((int(pilot.figures().get("checkpointed_layers", 0)), int(pilot.applier.ranks.sum())))
    pilot.finish()
    return [
        row("steps above the budget", 0, sum(share > 1 for share in shares), exact=True),
        row("layers again and ranks, back as before", str(sizes[0]), str(sizes[2]), exact=True),
        row("layers again and ranks, with less", None, str(sizes[1])),
        row("largest share of the budget taken", None, max(shares)),
    ]


def paged_optimizer(machine: Machine) -> list[Row]:
    """A step under a paged optimizer, and steps after its ranks have changed."""
    step = replace(STEPS["4 x 512"], optimizer="paged_adamw8bit")
    rows = _peak(machine, MODELS[1], "4 x 512, paged 8-bit AdamW", step)
    learner = Learner(machine.base(MODELS[1]), LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"))
    learner.optimizer, batch, losses = new_optimizer(step.optimizer, learner.model), machine.batch(4, 512), []
    for rank in (64, 16, 32):
        set_ranks(learner.targets, {target.name: rank for target in learner.targets}, learner.optimizer)
        for _ in range(2):
            learner.step(batch)
            losses.append(float(learner.model(**batch).loss.detach()))
    rows.append(row("finite losses over two changes of rank", 6, sum(map(math.isfinite, losses)), exact=True))
    return [*rows, row("the loss falls", True, losses[-1] < losses[0], exact=True)]


def quantised_reload(machine: Machine) -> list[Row]:
    """An adapter of several ranks, trained on nf4 weights, gives the same logits when plain PEFT loads it again."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    batch = machine.batch(2, 256)
    with TemporaryDirectory() as folder:
        machine.base(MODELS[1]).save_pretrained(f"{folder}/base")

        def loaded() -> Any:
            base = AutoModelForCausalLM.from_pretrained(
                f"{folder}/base", quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}
            )
            return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)

        learner = Learner(loaded(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        set_ranks(learner.targets, {t.name: (4, 8, 16)[i % 3] for i, t in enumerate(learner.targets)}, None)
        learner.optimizer = new_optimizer("adamw", learner.model)
        for _ in range(3):
            learner.step(batch)
        learner.model.save_pretrained(f"{folder}/adapter")
        again = PeftModel.from_pretrained(loaded(), f"{folder}/adapter")
        with torch.no_grad():
            first, second = (model.eval()(**batch).logits for model in (learner.model, again))
    step = StepConfig(batch_size=2, max_length=256, quantization="nf4", gradient_checkpointing=False)
    predicted = from_config(machine.config(MODELS[1]), step).model.frozen_bytes / MIB
    return [
        row("largest difference of logits", 0.0, float((first - second).abs().max()), exact=True),
        row(
            "frozen model, prepared for k-bit training (measured: without)", predicted, frozen_bytes(again) / MIB, "MiB"
        ),
    ]


def exact_savers(machine: Machine) -> list[Row]:
    """Losses and gradients with each saver more, against those without; and without, twice."""
    learner = Learner(machine.base(MODELS[1]), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for number, target in enumerate(learner.targets):
        torch.nn.init.normal_(target.weight_b, std=0.02, generator=torch.Generator(machine.device).manual_seed(number))
    batch, every, rows = machine.batch(4, 512), (*SAVERS, ACTIVATIONS), []

    def gradients() -> list[torch.Tensor]:
        with nullcontext() if machine.dry else sdpa_kernel(SDPBackend.MATH):
            loss = learner.model(**batch).loss
            loss.backward()
        found = [loss.detach().clone(), *(p.grad.clone() for p in learner.parameters if p.grad is not None)]
        learner.optimizer.zero_grad(set_to_none=True)
        return found

    def difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
        pairs = zip(one, two, strict=True)
        return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)

    plain = gradients()
    rows.append(row("the same step twice", 0.0, difference(plain, gradients())))
    for count in range(1, len(every) + 1):
        savers = ExactSavers(learner.model, every[:count])
        rows.append(row(f"+ {every[count - 1]}", 0.0, difference(plain, gradients())))
        savers.put_back()
    return rows


def nccl(machine: Machine) -> list[Row]:
    """A run in two processes, one a card: both have the same ranks and adapters at the end."""
    with TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "benchmarks.gpu_sections", folder]
        done = _in_process(command, minutes=1.8)
        if done.returncode:
            raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-500:]}")
        first, second = (json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json")))
    return [
        row(f"{key}, the same in both", first[key], second[key], exact=True) for key in ("digest", "ranks", "steps")
    ]


def one_process(machine: Machine, folder: Path) -> None:
    """One of the processes of `nccl`."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    trainer, _ = _trained(machine, Trainer, 8, budget="60%")
    targets = find_target_modules(trainer.model)
    found = {"digest": digest_of(targets), "ranks": sum(t.rank for t in targets), "steps": trainer.state.global_step}
    write_json(folder / f"{os.environ['RANK']}.json", found)


@dataclass(frozen=True)
class Section:
    """A part of the evidence.

    Attributes:
        run: makes its rows.
        minutes: that it may take.
        needs: "", "CUDA", "bitsandbytes" (and CUDA) or "two cards".
    """

    run: Callable[[Machine], list[Row]]
    minutes: float
    needs: str = ""

    @property
    def title(self) -> str:
        """What it shows, in a sentence."""
        return re.sub(r"\s+", " ", self.run.__doc__ or "")


SECTIONS = {
    "gpu tests": Section(gpu_tests, 10),
    "peaks": Section(peaks, 6),
    "step times": Section(step_times, 5),
    "out of memory": Section(out_of_memory, 4),
    "elastic budget": Section(elastic_budget, 4),
    "exact savers": Section(exact_savers, 3),
    "streamed base": Section(streamed_base, 3),
    "paged optimizer": Section(paged_optimizer, 3, "bitsandbytes"),
    "quantised reload": Section(quantised_reload, 3, "bitsandbytes"),
    "nccl": Section(nccl, 2, "two cards"),
}
"""In the order in which they run; together they may take 43 minutes."""


def perform(section: Section, path: Path, *, dry: bool) -> None:
    """Run a section in this process, and write its rows, and what went wrong, to a file."""
    try:
        found = {"rows": section.run(Machine(dry)), "error": ""}
    except Exception as error:
        traceback.print_exc()
        found = {"rows": [], "error": f"{type(error).__name__}: {first_line(error)}"}
    write_json(path, found)


if __name__ == "__main__":
    one_process(Machine(dry=False), Path(sys.argv[1]))
