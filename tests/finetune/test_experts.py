"""Fine-tunes with adapters on fused experts: a Trainer, resumed; TRL; two processes; ranks that change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot import RankPilot, TrainingRun, attach
from rankpilot.finetune.step.replicas import digest_of
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, set_seed

from .several import in_processes
from .tiny_runs import arguments, counting, ranks_of, take_step

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
LORA |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def new_base() -> Qwen3MoeForCausalLM:
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))


def new_model() -> PeftModel:
    return get_peft_model(new_base(), LoraConfig(**LORA))


def trained(folder: Path, resume: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(model=new_model(), args=arguments(folder, save_steps=2, **options), train_dataset=counting(96))
    attach(trainer, "signal-mean", "80%")
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = trained(tmp_path / "run")
    resumed = trained(tmp_path / "run", tmp_path / "run/checkpoint-2")
    assert ranks_of(resumed.model) == ranks_of(whole.model)
    assert all(rank for name, rank in ranks_of(whole.model).items() if "experts" in name)
    there = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, there[name]), name
    loaded = PeftModel.from_pretrained(new_base(), str(tmp_path / "run/checkpoint-4")).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits, atol=1e-6)


def test_losses_are_those_of_a_run_without_rankpilot(tmp_path: Path) -> None:
    """Plain LoRA's plan, on routed rows."""
    losses = []
    for own in (True, False):
        trainer = Trainer(model=new_model(), args=arguments(tmp_path / str(own)), train_dataset=counting(96))
        if own:
            attach(trainer, "uniform", "1 GiB", bounds={"q_proj": 4, "gate_up_proj": 4, "down_proj": 4})
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam's first steps are as large for small gradients


def test_ranks_change_between_steps() -> None:
    """The function stays where ranks grow, and the optimizer goes on."""
    model = new_model().train()
    targets = find_target_modules(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = {key: torch.tensor([row[key] for row in counting(8)]) for key in ("input_ids", "labels")}
    losses = []
    for step in range(6):
        if step in (2, 4):
            before = float(model(**batch).loss.detach())
            set_ranks(targets, {target.name: 6 if step == 2 else 5 for target in targets}, optimizer, step=step)
            assert float(model(**batch).loss.detach()) == pytest.approx(before, rel=1e-5 if step == 2 else 0.1)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def loop(processes: int) -> tuple[dict[str, int], str]:
    """A loop under DDP, with half of the rows in each of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = new_model().train()
    wrapped: Any = DistributedDataParallel(model) if processes > 1 else model
    rows = counting(32)
    rank = torch.distributed.get_rank() if processes > 1 else 0
    data = [{key: torch.tensor(row[key]) for key in row} for row in rows[rank::processes]]
    loader = DataLoader(data, batch_size=8 // processes)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pilot = RankPilot("top-down", "80%", gradient_checkpointing=False)
    pilot.begin(TrainingRun.of_loader(wrapped, optimizer, loader, total_steps=4))
    losses = [take_step(pilot, optimizer, batch, lambda given: wrapped(**given).loss) for batch in loader]
    pilot.finish()
    assert losses[-1] > 0
    return ranks_of(model), digest_of(find_target_modules(model))


def test_two_processes_have_the_same_adapters() -> None:
    first, second = in_processes(2, partial(loop, 2))
    assert first == second


def test_trl_trains_experts(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from .trainer_kinds import word_tokenizer

    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in counting(32)])
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False}
    trainer = trl.SFTTrainer(
        new_base(),
        args=trl.SFTConfig(str(tmp_path), max_length=12, save_strategy="no", disable_tqdm=True, **settings),
        train_dataset=data,
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    attach(trainer, "top-down", "100%")
    trainer.train()
    assert all(rank for name, rank in ranks_of(trainer.model).items() if "experts" in name)
    trainer.save_model(str(tmp_path / "adapter"))
    assert PeftModel.from_pretrained(new_base(), str(tmp_path / "adapter"))
