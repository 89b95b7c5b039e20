"""Layers run again where the policy's networks expect that to lower the loss, and else not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.agents.learned.networks import PlanValueConfig, PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.errors import BudgetError
from rankpilot.finetune.callback import RankPilotCallback, attach
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from rankpilot.plan.problem import Bounds
from rankpilot.study.replay import redecide
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ..cases import first_cases

LAYERS = 6
ROWS = [{"input_ids": ids, "labels": ids} for ids in ([i * j % 64 for i in range(32)] for j in range(1, 41))]


class LikesDepth(PlanValueEnsemble):
    """Networks that expect so many votes more of a plan on all modules than of one on none."""

    worth = 0.0

    def forward(self, plans: Any) -> torch.Tensor:
        share = (plans.ranks > 0).float().mean(-1)
        return (self.worth * share).expand(2, *share.shape)


def run(
    folder: Path, worth: float, budget: str, *, recompute: bool = True, bounds: Bounds | None = None
) -> tuple[RankPilotCallback, dict[str, int]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    ensemble = LikesDepth(PlanValueConfig(count=2, width=1, unit="log loss")).eval()
    ensemble.worth = worth
    policy = LearnedPolicy("likes depth", RankNetwork(NetworkConfig(width=8)).eval(), ensemble)
    schedule = DecisionSchedule(probe_steps=3, fractions=(0.0,))
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"}
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=ROWS)
    callback = attach(trainer, policy, budget, recompute=recompute, schedule=schedule, bounds=bounds, measure_every=1)
    trainer.train()
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    return callback, adapter_ranks(find_target_modules(model))


@pytest.mark.parametrize(("worth", "pays"), first_cases(2, [(30.0, True), (0.5, False), (0.0, False)]))
def test_layers_run_again_where_that_is_expected_to_pay(
    tmp_path: Path, worth: float, pays: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        callback, ranks = run(tmp_path / "run", worth, "50%")
    (layers,) = [row.message for row in caplog.records if row.message.startswith("step 0: ")]
    assert (f"0 of {LAYERS} layers run again" in layers) is not pays
    assert ("No layer runs again before memory asks for it" in caplog.text) is not pays
    assert (0 not in ranks.values()) is pays
    logged = DecisionLog(tmp_path / "run" / "decisions").logged(0)
    assert redecide(logged, callback.pilot.policy).differences == (), "it is logged as it was priced"
    assert [*ranks.values()] == logged.rank_after.tolist()


def test_without_recomputation_the_plan_is_that_of_a_run_that_cannot(tmp_path: Path) -> None:
    """But for the loss, which runs in tiles where layers may run again."""
    _, may = run(tmp_path / "may", 0.0, "70%")
    _, cannot = run(tmp_path / "cannot", 0.0, "70%", recompute=False)
    assert [rank > 0 for rank in may.values()] == [rank > 0 for rank in cannot.values()]


def test_where_nothing_fits_without_layers_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bounds ask for adapters in all layers, though the networks expect nothing of them."""
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        _, ranks = run(tmp_path / "run", 0.0, "45%", bounds={"q_proj": (1, 8)})
    (line,) = [row.message for row in caplog.records if row.message.startswith("step 0: ")]
    assert f"0 of {LAYERS} layers run again" not in line
    assert all(rank > 0 for name, rank in ranks.items() if name.endswith("q_proj"))
    with pytest.raises(BudgetError, match="fits no"):
        run(tmp_path / "cannot", 0.0, "45%", recompute=False, bounds={"q_proj": (1, 8)})
