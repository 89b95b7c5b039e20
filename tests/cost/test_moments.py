"""Moments of a run: predicted beside measured peaks of a Trainer's steps, evaluations and merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rankpilot.cost.moments import (
    Evaluation,
    Files,
    Peaks,
    between_steps,
    first_step_bytes,
    forward_bytes,
    moments_of_run,
)
from rankpilot.cost.record.live_storages import LivePeak
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.cost.recording import BatchShape
from rankpilot.finetune.before_training import run_memory
from rankpilot.finetune.trainer_step import run_of_trainer
from rankpilot.lora.targets import find_target_modules
from transformers import Trainer, TrainingArguments, default_data_collator

from .measured import allocated_peak

WORDS, LENGTH, ROWS, EVALUATED, BATCHES = 2000, 48, 4, 8, 3
LAYERED = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": WORDS, "hidden_size": 64}
DECODER = LAYERED | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=WORDS, bos_token_id=1, eos_token_id=1)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**LAYERED, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, vocab_size=WORDS, decoder_start_token_id=0
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**LAYERED, intermediate_size=96)
    ),
}


class Rehearsal:
    """A Trainer on random rows, its byte model, and its measured moments."""

    def __init__(self, family: str, folder: Path, *, bf16: bool, metrics: bool) -> None:
        labels = family == "bert"
        kind = "SEQ_CLS" if labels else "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type=kind)
        self.model: Any = get_peft_model(FAMILIES[family](), config)
        tokens = torch.randint(5, WORDS, (EVALUATED * BATCHES, LENGTH))
        found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        rows = Dataset.from_dict(
            {name: each.tolist() for name, each in found.items()}
            | {"labels": (torch.arange(len(tokens)) % 2 if labels else tokens).tolist()}
        )
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=ROWS, per_device_eval_batch_size=EVALUATED, max_steps=1,
            bf16=bf16, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        counts: Any = (lambda found: {"rows": len(found.predictions)}) if metrics else None
        self.trainer = Trainer(self.model, arguments, default_data_collator, rows, rows, compute_metrics=counts)
        self.run = run_of_trainer(self.trainer)
        self.targets, self.batch = find_target_modules(self.model), self.run.largest_batch()
        self.ranks = np.array([target.rank for target in self.targets])
        self.model.train()
        self.memory = run_memory(self.run, self.targets, self.batch)
        self.evaluation = Evaluation(BatchShape(EVALUATED, LENGTH), BATCHES * metrics, 0.0 if labels else 4.0 * WORDS)

    def step(self) -> None:
        self.run.loss(self.batch).backward()
        self.run.optimizer.step()
        self.run.optimizer.zero_grad(set_to_none=True)

    def risen(self, work: Callable[[], Any]) -> float:
        """The peak during some work above what is there before it."""
        live = LivePeak()
        with live:
            work()
        return float(live.peak)

    def evaluated(self) -> float:
        meter = PeakMeter()
        meter.begin(self.model, self.run.optimizer)
        self.trainer.evaluate()
        peak = meter.end_other()
        assert peak
        return peak


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "t5", *(pytest.param(n, marks=pytest.mark.long) for n in ("qwen3", "gemma", "opt"))]
)
@pytest.mark.parametrize("bf16", [False, True])
def test_moments_are_those_of_a_trainer(family: str, bf16: bool, tmp_path: Path) -> None:
    run = Rehearsal(family, tmp_path, bf16=bf16, metrics=False)
    states = run.memory.states
    weights = float(states.weights @ run.ranks)
    assert first_step_bytes(run.memory, run.ranks) == pytest.approx(weights + run.risen(run.step), rel=0.002)
    held = between_steps(run.memory, run.ranks)
    assert run.memory.peak(run.ranks) == pytest.approx(held + run.risen(run.step), rel=0.002)
    assert run.evaluation.bytes(run.memory, run.ranks) == pytest.approx(run.evaluated(), rel=0.002)
    step = run.memory.peak(run.ranks)
    peaks = Peaks(step, step, run.evaluation.bytes(run.memory, run.ranks), held)
    moments = moments_of_run(run.targets, run.ranks, 0, peaks)
    found = {moment.name: moment.device_bytes for moment in moments}
    assert found["checkpoint"] == pytest.approx(held + run.risen(lambda: run.trainer.save_model()), rel=0.002)
    assert found["merge"] == pytest.approx(held + run.risen(run.model.merge_and_unload), rel=0.002)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.long) for n in ("qwen3", "gemma", "opt", "t5"))]
)
def test_files_pass_through_main_memory(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card, whose tensors are copied to main memory before they are written."""
    run = Rehearsal(family, tmp_path, bf16=False, metrics=False)
    run.trainer.train()
    kept = safetensors.torch._to_ndarray
    monkeypatch.setattr(safetensors.torch, "_to_ndarray", lambda tensor: kept(tensor.clone()))
    frozen = sum(each.nbytes for each in run.model.parameters() if not each.requires_grad)
    main = Files.of(run.memory, run.ranks, frozen).main
    assert main["checkpoint"] == pytest.approx(run.risen(lambda: run.trainer.save_model()), rel=0.002)
    run.trainer._save_optimizer_and_scheduler(str(tmp_path))
    with torch.profiler.profile(profile_memory=True) as profile:
        state = torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True)
    assert state["state"]
    assert main["resume"] == pytest.approx(allocated_peak(profile), rel=0.02)
    merged = run.model.merge_and_unload()
    assert main["merge"] == pytest.approx(run.risen(lambda: merged.save_pretrained(tmp_path / "merged")), rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_kept_for_a_metric_count_twice(bf16: bool, tmp_path: Path) -> None:
    run = Rehearsal("llama", tmp_path, bf16=bf16, metrics=True)
    run.step()
    assert run.evaluation.bytes(run.memory, run.ranks) == pytest.approx(run.evaluated(), rel=0.002)


def test_dropout_is_counted_in_evaluation(tmp_path: Path) -> None:
    run = Rehearsal("bert", tmp_path, bf16=False, metrics=False)
    run.step()
    predicted, measured = run.evaluation.bytes(run.memory, run.ranks), run.evaluated()
    assert measured < predicted < 2 * measured
    assert forward_bytes(run.memory, run.ranks, run.evaluation.shape) < predicted
