"""The methods train as they say: order of a step, real ranks, live storages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from rankpilot.agents.log import DecisionLog
from rankpilot.lora.optimizer_state import unwrap_optimizer
from rankpilot.lora.targets import find_target_modules

from benchmarks.models import LORA, Family, Learner, Size, random_loader, random_model
from benchmarks.overhead import AdaLora, RankPilot, every

FAMILIES = ("bert", "llama")


def live_bytes(method: Learner) -> int:
    """Weights, as many gradients, and the optimiser's tensors, counted from the parameters themselves."""
    total = 0
    for parameter in method.model.parameters():
        if parameter.requires_grad:
            held = [parameter, parameter, *unwrap_optimizer(method.optimizer).state[parameter].values()]
            total += sum(tensor.untyped_storage().nbytes() for tensor in held if tensor.dim())
    return total


def pilot(family: Family, size: Size, folder: Path, *, steps: int = 40, period: int = 10) -> RankPilot:
    loader = random_loader(family, size, seed=0)
    return RankPilot(random_model(family, size, 0), family, loader, steps, period, folder, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_and_batches_are_the_same_for_one_seed(family: Family, tiny: Size) -> None:
    before = torch.get_rng_state()
    first, second, other = (random_model(family, tiny, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    batches = list(random_loader(family, tiny, seed=1, batches=3))
    assert len(batches) == 3
    for batch, again in zip(batches, random_loader(family, tiny, seed=1, batches=3), strict=True):
        assert batch["input_ids"].shape == (tiny.rows, tiny.length)
        assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_step_trains_and_sends_events_in_the_order_of_the_trainer(tiny: Size) -> None:
    seen: list[tuple[str, int, bool]] = []

    class Listening(Learner):
        def note(self, name: str) -> None:
            seen.append((name, self.steps, self.parameters[0].grad is not None))

        def on_step_begin(self) -> None:
            self.note("begin")

        def on_pre_optimizer_step(self) -> None:
            self.note("gradients")
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.parameters]))
            assert norm <= 1.0001

        def on_optimizer_step(self) -> None:
            self.note("stepped")

        def on_step_end(self) -> None:
            self.note("end")

    method = Listening(random_model("bert", tiny, 0), LoraConfig(**LORA["bert"]))
    before = [p.detach().clone() for p in method.parameters]
    for batch in random_loader("bert", tiny, 0, batches=2):
        method.step(batch)
    assert all(not torch.equal(p, old) for p, old in zip(method.parameters, before, strict=True))
    once = [("begin", False), ("gradients", True), ("stepped", True), ("end", False)]
    counts = [0, 0, 0, 1, 1, 1, 1, 2]
    assert seen == [(name, steps, grad) for (name, grad), steps in zip(once * 2, counts, strict=True)]


def test_own_work_is_what_the_events_take(tiny: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.process_time", lambda: clock[0])

    class Slow(Learner):
        def on_step_begin(self) -> None:
            clock[0] += 1.0

        def on_step_end(self) -> None:
            clock[0] += 0.5 * self.steps

    method = Slow(random_model("bert", tiny, 0), LoraConfig(**LORA["bert"]))
    for batch in random_loader("bert", tiny, 0, batches=3):
        method.step(batch)
    assert method.own_seconds == [1.5, 2.0, 2.5]


def test_plain_lora_has_rank_eight_everywhere(tiny: Size) -> None:
    method = Learner(random_model("llama", tiny, 0), LoraConfig(**LORA["llama"]))
    assert {target.rank for target in find_target_modules(method.model)} == {8}
    assert len(find_target_modules(method.model)) == 14
    assert method.ranks() == ()
    assert method.buffer_bytes() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rankpilot_changes_real_ranks_in_the_budget_of_rank_eight(family: Family, tiny: Size, tmp_path: Path) -> None:
    method = pilot(family, tiny, tmp_path)
    plain = Learner(random_model(family, tiny, 0), LoraConfig(**LORA[family]))
    batches = list(random_loader(family, tiny, 0))
    history = [method.ranks()]
    for turn in range(35):
        method.step(batches[turn % len(batches)])
        history.append(method.ranks())
        rows = tuple(weight.shape[0] for name, weight in method.model.named_parameters() if ".lora_A." in name)
        assert rows == method.ranks()
        trained = sum(p.numel() for p in method.model.parameters() if p.requires_grad)
        assert trained <= sum(p.numel() for p in plain.parameters)
    changed = [step for step in range(1, 36) if history[step] != history[step - 1]]
    assert changed
    assert set(changed) <= {10, 20, 30}
    assert method.controller.decision == 4
    assert method.setup_seconds > 0
    assert len(DecisionLog(tmp_path / "decisions")) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_live_storages(family: Family, tiny: Size, tmp_path: Path) -> None:
    batches = list(random_loader(family, tiny, 0))
    plain = Learner(random_model(family, tiny, 0), LoraConfig(**LORA[family]))
    adalora = AdaLora(random_model(family, tiny, 0), family, 40, 10)
    method = pilot(family, tiny, tmp_path)
    for turn in range(15):
        for each in (plain, adalora, method):
            each.step(batches[turn % len(batches)])
    assert plain.held_bytes() == live_bytes(plain) == sum(4 * 4 * p.numel() for p in plain.parameters)

    adapters = [p for name, p in adalora.model.named_parameters() if "lora_" in name and p.requires_grad]
    assert adalora.buffer_bytes() == sum(3 * 4 * p.numel() for p in adapters)
    assert adalora.held_bytes() == live_bytes(adalora) + adalora.buffer_bytes()

    factors = [w for name, w in method.model.named_parameters() if ".lora_B." in name]
    assert method.buffer_bytes() == sum(4 * weight.numel() for weight in factors)
    assert method.held_bytes() == live_bytes(method) + method.buffer_bytes()
    assert plain.held_bytes() < method.held_bytes() < adalora.held_bytes()


def test_adalora_masks_components_at_each_period_and_keeps_their_storage(tiny: Size) -> None:
    method = AdaLora(random_model("llama", tiny, 0), "llama", 40, 10)
    batches = list(random_loader("llama", tiny, 0))
    history = [method.ranks()]
    before = [p.shape for p in method.parameters]
    for turn in range(35):
        method.step(batches[turn % len(batches)])
        history.append(method.ranks())
    assert history[9] == ()
    assert [step for step in range(1, 36) if history[step] != history[step - 1]] == [10, 20, 30]
    totals = [sum(history[step]) for step in (10, 20, 30)]
    assert 14 * 12 > totals[0] > totals[1] > totals[2] > 14 * 8 - 14
    assert [p.shape for p in method.parameters] == before


@pytest.mark.parametrize(("period", "total"), [(10, 76), (7, 100), (3, 31), (10, 10)])
def test_decisions_fall_on_every_period_exactly(period: int, total: int) -> None:
    assert every(period, total).steps(total) == tuple(range(0, total, period))
