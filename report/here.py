"""Memory of a loaded model for `rankpilot memory`, with the data and Trainer of `rankpilot finetune`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, default_data_collator, set_seed
from transformers.models.auto import modeling_auto

from ..common.arrays import IntArray
from ..common.errors import UnsupportedError
from ..cost.batch_shape import Batch, reshaped
from ..cost.budget import Budget, Limit, beyond_device
from ..cost.cost import ParameterCost
from ..cost.forecast.configured_step import ConfiguredStep, LoadedModel
from ..cost.forecast.outlook import MeasuredStep, Outlook
from ..cost.forecast.published import check_reads_tokens
from ..cost.model import MemoryModel
from ..cost.record.calibration import beside_model, limited_cost
from ..cost.record.measured_time import product_sizes
from ..cost.record.model_states import frozen_sizes, state_bytes
from ..cost.record.peak_meter import PeakMeter, resident_peak, restart_resident_peak
from ..cost.recording import BatchShape
from ..cost.savers.checkpointed_layers import could_checkpoint
from ..cost.savers.exact import SAVERS, ExactSavers
from ..cost.savers.prices import Priced
from ..cost.step_config import StepConfig
from ..cost.training_step import switch_checkpointing
from ..data.models import load_config, with_sizes
from ..data.task import Task
from ..data.workload import Texts, Workload
from ..decide.plan.plan import check_budget, least_cost, top_down, uniform_ranks
from ..decide.plan.problem import AllocationProblem
from ..finetune.before_training import run_memory
from ..finetune.options import FinetuneConfig
from ..finetune.step.run import TrainingRun
from ..finetune.trainer import check_possible, new_model, new_trainer, read_workload
from ..finetune.trainer_step import run_of_trainer
from ..lora.resize import set_ranks
from ..lora.spec import check_rank, highest_ranks, plain_ranks
from ..lora.targets import TargetModule, find_target_modules
from .config import MemoryConfig

Tell = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class StepSetup:
    """One training step, ready to run.

    Attributes:
        config: the requested settings.
        task: the task of the model's head.
        model: the model with adapters of the requested rank, in training mode, on its device.
        targets: its target modules.
        run: the fine-tune this step belongs to.
        batch: the largest training batch.
    """

    config: MemoryConfig
    task: Task
    model: PeftModel
    targets: list[TargetModule]
    run: TrainingRun
    batch: Batch

    def measure_memory(self, tell: Tell, how: str = "", batch: Batch | None = None) -> MemoryModel:
        """Return the byte model of this step in its current state, without signal buffers.

        Args:
            tell: called with a short progress message.
            how: description of the step for the message.
            batch: a batch to use in place of the largest one.
        """
        tell(f"measuring a few small steps {how}".rstrip())
        return run_memory(self.run, self.targets, self.batch if batch is None else batch)


def memory_here(config: MemoryConfig, tell: Tell) -> Outlook:
    """Return the memory of a training step of a loaded model, and of other choices.

    `tell` is called with short progress messages.

    Raises:
        RankPilotError: see `set_up`; also if checkpointing is requested and the model does not support it.
        BudgetError: no plan fits the budget.
    """
    setup = set_up(config, tell)
    config = setup.config
    priced, limit = _priced(setup, tell)
    asked = priced.memory
    rules = _rules(setup, asked, limit)  # first, since it may raise that no plan fits
    if config.measure:
        tell("measuring real steps")
    measured = measure_step(setup) if config.measure else None
    batches = list(_other_batches(setup, asked, tell))
    recorded, notes = asked, []
    if config.gradient_checkpointing is not True:
        try:
            switch_checkpointing(setup.model.get_base_model(), True)
            recorded = setup.measure_memory(tell, "with gradient checkpointing")
        except UnsupportedError as error:
            notes.append(f"No figure for gradient checkpointing: {error}")
    model = LoadedModel(
        kind=type(setup.model.get_base_model()).__name__,
        targets=tuple(setup.targets),
        parameters=sum(each.numel() for each in setup.model.parameters() if not each.requires_grad),
        frozen=tuple(frozen_sizes(setup.model)),
        products=product_sizes(setup.model),
        precision=str(next(setup.model.parameters()).dtype).removeprefix("torch."),
    )
    step = ConfiguredStep(recorded, model, saved=priced.saved)
    facts = {"model": config.model, "task": setup.task, "device": setup.run.device.type}
    outlook = Outlook(step, config.rank, config, asked=asked, limit=limit, measured=measured, facts=facts)
    if config.budget:
        notes.append(beyond_device(Budget.parse(config.budget), setup.run.device))
    outlook.notes += filter(None, notes)
    ranks = np.minimum(config.rank, highest_ranks(setup.targets))
    for label, shape, memory in batches:
        outlook.add("batch", label, memory, shape, ranks)
    for name, plan in rules.items():
        outlook.add("rule", f"{name} within {config.budget}", asked, asked.shape, plan)
    return outlook


def _other_batches(setup: StepSetup, memory: MemoryModel, tell: Tell) -> Iterator[tuple[str, BatchShape, MemoryModel]]:
    """Yield half the rows, and half the tokens. Data-dependent operations need a new calibration."""
    shape = memory.shape
    fewer = BatchShape(max(1, shape.rows // 2), shape.length)
    shorter = BatchShape(shape.rows, -(-shape.length // 2))
    for name, half in (("half the batch", fewer), ("half the length", shorter)):
        if half != shape:
            predicted = memory.predicts(half)
            known = memory if predicted else setup.measure_memory(tell, f"of {name}", reshaped(setup.batch, half))
            yield f"{name} ({half})", half, known


def _priced(setup: StepSetup, tell: Tell) -> tuple[Priced, Limit | None]:
    """Return the step with the exact savers of a run within the budget, and the budget's limit."""
    config, targets, plain = setup.config, setup.targets, plain_ranks(setup.targets)
    checkpointed = ", with gradient checkpointing" if config.gradient_checkpointing is True else ""
    tell(f"measuring a few small steps, without and with each exact saver{checkpointed}")
    measured = partial(setup.measure_memory, lambda _: None)
    savers = ExactSavers(setup.model, tuple(SAVERS) if config.exact_savers else ())
    priced = savers.price(measured, plain)
    if config.budget is None:
        return priced, None
    _, limit = limited_cost(beside_model(Budget.parse(config.budget), setup.model), targets, priced.plain, plain)
    chooses = config.gradient_checkpointing == "auto" and could_checkpoint(setup.model)
    if config.exact_savers and chooses and limit.unit == "bytes":
        priced = savers.within(limit.value, priced, measured, plain, partial(least_cost, targets, None, None))
    return priced, limit


def _rules(setup: StepSetup, memory: MemoryModel, limit: Limit | None) -> dict[str, IntArray]:
    """Return the plans of the placement rules within the budget by name; BudgetError if no plan fits."""
    if limit is None:
        return {}
    cost = memory.cost() if limit.unit == "bytes" else ParameterCost.of(setup.targets)
    problem = AllocationProblem.of(setup.targets, cost, limit.value)
    share = Budget.parse(setup.config.budget or "").share
    check_budget(problem, [target.name for target in setup.targets], share)
    return {"uniform": uniform_ranks(problem), "top-down": top_down(problem)}


def set_up(config: MemoryConfig, tell: Tell) -> StepSetup:
    """Load the configured model and data, and create the Trainer to fine-tune it.

    `tell` is called with short progress messages.

    Raises:
        UnknownNameError, AssetError, DataError: there is no such model or data, or the data cannot be used.
        ConfigError: the rows are longer than the model's positions, or no module can be adapted.
        UnknownNameError, ConfigError: a setting of the Trainer is unknown, or an option decides it.
        UnsupportedError: the adapter, the optimizer or gradient checkpointing cannot be handled, or a library is
            missing.
    """
    tune = fine_tune_of(config)
    if config.data is not None:
        tune, workload = read_workload(tune, tell)
        config = with_sizes(config, config.model, workload.task)
    else:
        check_possible(tune)
        tell(f"loading {config.model}")
        architecture = load_config(config.model)
        task = config.task or default_task(architecture)
        config, tune = with_sizes(config, config.model, task), with_sizes(tune, config.model, task)
        workload = _random_workload(config, architecture, task)
    model = new_model(tune, workload)
    with TemporaryDirectory() as folder:
        trainer = new_trainer(tune, workload, model, Path(folder), [])
        targets = find_target_modules(model)
        check_rank(config.rank, targets)
        set_ranks(targets, {target.name: min(config.rank, target.max_rank) for target in targets}, seed=config.seed)
        set_seed(config.seed)
        run = run_of_trainer(trainer)
    model.train()
    return StepSetup(config, workload.task, model, targets, run, run.largest_batch())


def measure_step(setup: StepSetup) -> MeasuredStep:
    """Train one step to create optimizer state, then measure further steps. The adapters change."""
    _step(setup)
    state = state_bytes(setup.model, setup.run.optimizer, gradients=False)
    if setup.run.device.type == "cuda":
        torch.cuda.empty_cache()
    meter = PeakMeter()
    meter.begin(setup.model, setup.run.optimizer)
    _step(setup)
    reserved = torch.cuda.max_memory_reserved(setup.run.device) if setup.run.device.type == "cuda" else None
    peak = meter.end(1)
    assert peak is not None, "the step was measured"
    if reserved is not None:
        return MeasuredStep(peak, reserved_bytes=reserved)
    before = restart_resident_peak()
    if before is None:
        return MeasuredStep(peak)
    _step(setup)
    highest = resident_peak()
    return MeasuredStep(peak, highest - before + state, highest)


def _step(setup: StepSetup) -> None:
    for _ in range(setup.config.accumulation):
        (setup.run.loss(setup.batch) / setup.config.accumulation).backward()  # type: ignore[no-untyped-call]
    setup.run.optimizer.step()
    setup.run.optimizer.zero_grad(set_to_none=True)


def fine_tune_of(config: MemoryConfig) -> FinetuneConfig:
    """Return the settings of the fine-tune this step belongs to."""
    names = (*(field.name for field in fields(StepConfig)), "task", "text_column", "label_column", "seed", "trainer")
    shared = {name: getattr(config, name) for name in names}
    return FinetuneConfig(config.model, config.data or "", learning_rate=1e-3, **shared)  # the rate costs no memory


def default_task(config: Any) -> Task:
    """Return the usual fine-tuning task for a model with this configuration.

    The name of its head decides. Without one, models that only read from left to right generate.
    """
    kind = type(config)
    heads: dict[str, Task] = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm"}
    heads |= {"ForSequenceClassification": "classification", "ForTokenClassification": "token-classification"}
    if kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        heads["ForConditionalGeneration"] = "seq2seq"
    for architecture in config.architectures or ():
        for head, task in heads.items():
            if architecture.endswith(head):
                return task
    fills_gaps = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    return "causal-lm" if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and not fills_gaps else "classification"


def _random_workload(config: MemoryConfig, architecture: Any, task: Task) -> Workload:
    """Return a batch of full rows of random tokens."""
    labels = tuple(f"class {number}" for number in range(1 if task == "regression" else config.labels))
    columns = _random_columns(config, architecture, task)
    rows = Dataset.from_dict({name: values.tolist() for name, values in columns.items()})
    if task != "causal-lm":
        return Workload(task, None, rows, rows, _collate, labels)
    # SFTTrainer insists on a tokenizer, although it has no use here.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")), pad_token="")
    return Workload(task, tokenizer, rows, rows, _collate, (), Texts(rows, rows, is_chat=False))


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = default_data_collator(rows)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def _random_columns(config: MemoryConfig, architecture: Any, task: Task) -> dict[str, torch.Tensor]:
    """Return rows of ordinary token ids, excluding padding and end tokens, and their labels."""
    check_reads_tokens(architecture, config.model)
    text = architecture.get_text_config()
    names = ("pad", "bos", "eos", "sep", "cls", "decoder_start")
    ids = [np.atleast_1d(getattr(text, f"{name}_token_id", None) or 0) for name in names]
    special = {int(token) for token in np.concatenate(ids)}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.max_length)
    tokens = ordinary[torch.randint(len(ordinary), shape, generator=generator)]
    if architecture.is_encoder_decoder and task != "seq2seq" and text.eos_token_id is not None:
        tokens[:, 0] = text.eos_token_id  # such classifiers look for one; shorter rows keep the first token
    classes, numbers = torch.arange(config.batch_size) % config.labels, torch.linspace(0, 1, config.batch_size)
    labels = {"classification": classes, "regression": numbers, "token-classification": tokens % config.labels}
    return {"input_ids": tokens, "labels": labels.get(task, tokens)}
