"""A plain PyTorch loop under a policy, and runs that would train nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from rankpilot import RankPilot, TrainingRun
from rankpilot.common.errors import BudgetError, ConfigError, NoGradientError, UnknownNameError, UnsupportedError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.callback import attach
from rankpilot.finetune.options import PilotOptions
from rankpilot.finetune.step.run import PROBE_RATE
from rankpilot.finetune.watches import PATIENCE
from rankpilot.lora.targets import find_target_modules
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from transformers import Adafactor, LlamaConfig, Trainer, default_data_collator

from .tiny_runs import adapted, arguments, counting

STEPS, LENGTH = 8, 16
SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
STRIDES = torch.tensor([[stride * i % 64 for i in range(LENGTH)] for stride in range(1, 41)])


class Loop:
    """A loop of the user's own, over tuples of tensors, with a loss of its own."""

    def __init__(self, config: LlamaConfig, log: Path, *, accumulation: int = 1, budget: str = "80%") -> None:
        self.model = adapted(config).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.loader: DataLoader[Any] = DataLoader(TensorDataset(STRIDES), batch_size=4)
        self.run = TrainingRun.of_loader(
            self.model,
            self.optimizer,
            self.loader,
            loss=self.loss,
            total_steps=STEPS,
            accumulation=accumulation,
        )
        self.pilot = RankPilot("signal-mean", budget, log=log, schedule=SCHEDULE, measure_every=1, exact_savers=False)
        self.losses: list[float] = []

    def loss(self, batch: tuple[torch.Tensor]) -> torch.Tensor:
        (tokens,) = batch
        logits = self.model(input_ids=tokens).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)

    def batches(self) -> Iterator[tuple[torch.Tensor]]:
        while True:
            yield from self.loader

    def train(self, steps: range = range(STEPS)) -> None:
        batches = self.batches()
        for _ in range(steps.start * self.run.accumulation):
            next(batches)
        for _ in steps:
            self.step(*(next(batches) for _ in range(self.run.accumulation)))

    def step(self, *micro: tuple[torch.Tensor], scale: float = 1.0, **decide: bool) -> None:
        """One step, in which the loss may be scaled."""
        self.pilot.before_step(*micro)
        total = 0.0
        for batch in micro:
            loss = self.loss(batch) * scale / self.run.accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.pilot.before_optimizer_step(total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pilot.after_step(**decide)
        self.losses.append(total)

    @property
    def batch(self) -> tuple[torch.Tensor]:
        """The first batch."""
        return next(iter(self.loader))  # type: ignore[no-any-return]

    @property
    def ranks(self) -> dict[str, int]:
        return {target.name: target.rank for target in find_target_modules(self.model)}


@pytest.fixture
def loop(llama_config: LlamaConfig, tmp_path: Path) -> Loop:
    """A loop that has begun."""
    loop = Loop(llama_config, tmp_path / "log")
    loop.pilot.begin(loop.run)
    return loop


def test_what_takes_part_keeps_its_state_under_keys_of_its_own(loop: Loop) -> None:
    parts = loop.pilot._piloted.participants
    keys = [key for part in parts for key in part.state()]
    assert sorted(keys) == ["checkpointed", "elastic", "guard", "initial", "losses", "own_rate", "parts"]
    assert len(loop.pilot.state_dict()) == len(keys) + 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_three_calls_a_step(llama_config: LlamaConfig, tmp_path: Path, accumulation: int) -> None:
    loop = Loop(llama_config, tmp_path / "log", accumulation=accumulation)
    loop.pilot.begin(loop.run, name="mine")
    batch = loop.batch
    before = float(loop.loss(batch).detach())
    loop.train()
    loop.pilot.finish()
    assert float(loop.loss(batch).detach()) < before
    assert [step for step, _ in loop.pilot.predictions] == [0, 4]
    assert [step for step, _ in loop.pilot.peaks] == list(range(1, STEPS + 1))
    assert max(peak for _, peak in loop.pilot.peaks) <= loop.pilot.limit
    for _, predicted, measured in loop.pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)
    table = DecisionLog(tmp_path / "log").to_pandas()
    assert set(table["run"].tolist()) == {"mine"}
    assert table["loss"].iloc[-1] == pytest.approx(sum(loop.losses[:4]) / 4)
    loop.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_given_ranks_leave_the_schedule_as_it_is(loop: Loop, tmp_path: Path) -> None:
    loop.train(range(2))
    given = {name: 4 if rank else 0 for name, rank in loop.ranks.items()}
    loop.pilot.take(given)
    assert loop.ranks == given
    loop.train(range(2, STEPS))
    assert [step for step, _ in loop.pilot.predictions] == [0, 2, 4]
    table = DecisionLog(tmp_path / "log").to_pandas()
    losses = dict(zip(table["step"].tolist(), table["loss"].tolist(), strict=True))
    assert losses[2] == pytest.approx(sum(loop.losses[:2]) / 2)
    assert losses[4] == pytest.approx(sum(loop.losses[2:4]) / 2), "an interval begins with the given ranks"


def test_given_ranks_stand_for_a_decision_that_was_put_off(loop: Loop) -> None:
    loop.train(range(3))
    loop.step(loop.batch, decide=False)
    assert [step for step, _ in loop.pilot.predictions] == [0], "it is due, and put off"
    given = {name: 4 if rank else 0 for name, rank in loop.ranks.items()}
    loop.pilot.take(given)
    loop.train(range(4, STEPS))
    assert [step for step, _ in loop.pilot.predictions] == [0, 4]
    assert loop.ranks == given


def test_a_loss_that_does_not_reach_the_adapters(loop: Loop) -> None:
    loop.pilot.before_step(loop.batch)
    with pytest.raises(NoGradientError, match=r"No adapter received a gradient in step 1: .*train nothing"):
        loop.pilot.before_optimizer_step(1.0)


def test_a_loop_takes_a_step_again_that_ran_out_of_memory(loop: Loop) -> None:
    loop.train(range(2))
    before = {name: parameter.detach().clone() for name, parameter in loop.model.named_parameters()}
    loop.pilot.before_step(loop.batch)
    loop.loss(loop.batch).backward()  # type: ignore[no-untyped-call]
    for attempt in range(3):
        error = torch.OutOfMemoryError(f"attempt {attempt}")
        if attempt < 2:
            loop.pilot.out_of_memory(error)
            assert all(parameter.grad is None for parameter in loop.model.parameters())
            assert any(parameter.shape != before[name].shape for name, parameter in loop.model.named_parameters())
        else:
            with pytest.raises(torch.OutOfMemoryError, match="attempt 2"):
                loop.pilot.out_of_memory(error)
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(parameter, before[name])
    loop.train(range(2, 4))


def test_a_second_adapter_that_trains_outside_a_budget_of_parameters_is_told(
    llama_config: LlamaConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(llama_config, tmp_path / "log", budget="3k params")
    loop.pilot.begin(loop.run)
    assert "is trained too" not in caplog.text
    loop.pilot.finish()
    loop.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    loop.model.base_model.set_adapter(["default", "second"])
    loop.pilot.begin(loop.run)
    size = sum(p.numel() for name, p in loop.model.named_parameters() if ".second" in name)
    assert (
        f"Adapter 'second' is trained too: {size} parameters with fixed ranks, not counted by the budget" in caplog.text
    )


def test_calls_may_be_made_again_in_a_step(loop: Loop) -> None:
    """As where a step that ran out of memory is taken again, or a scaler of losses leaves a step out."""
    loop.pilot.before_step(loop.batch)
    loop.loss(loop.batch).backward()  # type: ignore[no-untyped-call]
    loop.pilot.before_optimizer_step(1.0)  # and then neither a step of the optimizer nor `after_step`
    loop.train(range(3))


def test_gradients_that_stay_zero(loop: Loop) -> None:
    """Only so many steps in a row are an error."""
    for step in range(2 * PATIENCE):
        loop.step(loop.batch, scale=float(step % PATIENCE == PATIENCE - 1))
    assert len(loop.pilot.peaks) == 2 * PATIENCE
    for _ in range(PATIENCE - 1):
        loop.step(loop.batch, scale=0.0)
    with pytest.raises(NoGradientError, match="gradients of all adapters are zero"):
        loop.step(loop.batch, scale=0.0)


def test_a_run_unlike_those_that_a_policy_learned_from_is_told_once(llama_config: LlamaConfig) -> None:
    told: list[str] = []
    loader = DataLoader(counting(), batch_size=4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    config = LlamaConfig(**{**llama_config.to_dict(), "num_hidden_layers": 4})
    for steps in (100, 5_000):
        model = adapted(config)
        pilot = RankPilot("default", "80%", tell=told.append, exact_savers=False)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=steps))
    unlike = [line for line in told if "less reliable here" in line]
    assert unlike == ["Expectations come from other runs and are less reliable here: steps 5,000 (not 50 to 800)."]


@pytest.fixture(scope="module")
def trainer(llama_config: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(adapted(llama_config), arguments(tmp_path_factory.mktemp("run")), train_dataset=counting())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": 3}, "policy must be 'default', a policy folder.*got 3"),
        ({"policy": 3}, "got 3"),
        ({"schedule": "early"}, "schedule must be a rankpilot.DecisionSchedule or None; got 'early'"),
        ({"measure_every": 0}, "measure_every must be a number of steps.* at least 1; got 0"),
        ({"measure_every": 2.5}, "at least 1; got 2.5"),
        ({"fresh": "no"}, "fresh must be True or False; got 'no'"),
        ({"gradient_checkpointing": "some"}, "gradient_checkpointing must be \"auto\", True or False; got 'some'"),
        ({"exact_savers": 1}, "exact_savers must be True or False; got 1"),
        ({"bounds": ["q_proj"]}, r"bounds must be a dictionary.*got \['q_proj'\]"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": "1"}, "seed must be a whole number from 0 to"),
        ({"seed": True}, "seed must be a whole number from 0 to"),
        ({"goal": "speed"}, "goal must be one of quality, time, bytes; got 'speed'"),
        ({"goal": "time"}, "signal-mean predicts no losses, so goal='time' requires policy='default'"),
        ({"goal": "time", "tolerance": 2}, "must be a number from 0 to 1"),
        ({"tolerance": 0.02}, "tolerance applies only to goal='time' or goal='bytes'"),
        ({"goal": "bytes", "budget": "3k params"}, "requires a budget in bytes"),
        ({"budget": 80}, 'Did you mean "80%"'),
        ({"budget": "80"}, 'Did you mean "80%"'),
        ({"budget": None}, "Cannot read the budget None"),
        ({"time": "75%"}, 'The option time was removed: goal="time" takes the fastest plan'),
        ({"bugdet": "80%"}, r"Unknown option 'bugdet'\. Did you mean: 'budget'"),
    ],
)
def test_arguments_that_cannot_be(trainer: Trainer, options: dict[str, Any], message: str) -> None:
    error = {"budget": BudgetError, "bugdet": UnknownNameError}.get(next(iter(options)), ConfigError)
    for given in (RankPilot, partial(attach, trainer)):
        with pytest.raises(error, match=message):
            given(**{"policy": "signal-mean"} | options)


def test_options_are_given_whole_alone_or_by_name() -> None:
    shared = PilotOptions(budget="80%", fresh=True)
    assert RankPilot("signal-mean", shared).options is not None
    assert RankPilot("signal-mean", shared, seed=3).options == PilotOptions(budget="80%", fresh=True, seed=3)
    assert RankPilot("signal-mean", "70%").options == RankPilot("signal-mean", budget="70%").options
    assert RankPilot("signal-mean").options == PilotOptions()


# What would train nothing -------------------------------------------------------------------------------------------


def given(loop: Loop, parameters: list[Any] | None = None, change: Callable[[torch.Tensor], Any] | None = None) -> None:
    """The run has an optimizer of other parameters, or its loss is something else."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2) if parameters else loop.optimizer
    loss = (lambda batch: change(loop.loss(batch))) if change else loop.loss
    loop.run = TrainingRun.of_loader(loop.model, optimizer, loop.loader, loss=loss, total_steps=STEPS)


def first_of(loop: Loop) -> Any:
    return find_target_modules(loop.model)[0]


NOT_HELD = r"\d+ of 14 adapters are not in the optimizer and would not be trained"


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (lambda loop: given(loop, [nn.Parameter(torch.ones(2))]), ConfigError, NOT_HELD),
        (lambda loop: given(loop, [first_of(loop).weight_a]), ConfigError, NOT_HELD),
        (
            lambda loop: given(loop, change=lambda value: {"loss": value}),
            UnsupportedError,
            "The loss function returned dict. It must return",
        ),
        (
            lambda loop: given(loop, change=lambda value: float(value.detach())),
            UnsupportedError,
            "The loss function returned float. It must return",
        ),
        (lambda loop: loop.model.merge_adapter(), UnsupportedError, r"is merged into the frozen weight.*unmerge_adap"),
        (
            lambda loop: first_of(loop).weight_a.requires_grad_(False),
            UnsupportedError,
            r"q_proj' is frozen \(requires_grad is False\)",
        ),
        (
            lambda loop: loop.model.requires_grad_(False),
            UnsupportedError,
            r"is frozen \(requires_grad is False\).*is_trainable=True",
        ),
        (
            lambda loop: first_of(loop).layer.lora_A.to("meta"),
            UnsupportedError,
            r"on several devices \(cpu, meta\).*Load the model on one device",
        ),
    ],
    ids=["none held", "some held", "loss dict", "loss float", "merged", "one frozen", "all frozen", "devices"],
)
def test_what_would_train_nothing_is_refused(
    llama_config: LlamaConfig, tmp_path: Path, prepare: Callable[[Loop], object], error: type[Exception], words: str
) -> None:
    loop = Loop(llama_config, tmp_path / "log")
    prepare(loop)
    trains = [parameter.requires_grad for parameter in loop.model.parameters()]
    with pytest.raises(error, match=words):
        loop.pilot.begin(loop.run)
    assert [parameter.requires_grad for parameter in loop.model.parameters()] == trains, "what is frozen stays so"


def test_an_optimizer_that_finds_its_own_rate(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop = Loop(llama_config, tmp_path / "log")
    optimizer = Adafactor([p for p in loop.model.parameters() if p.requires_grad])
    assert optimizer.param_groups[0]["lr"] is None
    loop.run = TrainingRun.of_loader(loop.model, optimizer, loop.loader, loss=loop.loss, total_steps=STEPS)
    assert loop.run.learning_rate == PROBE_RATE
    loop.optimizer = optimizer
    loop.pilot.begin(loop.run)
    loop.train(range(2))


class _Buckets:
    """Batches of four rows, which tells no size."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from (list(range(start, start + 4)) for start in range(0, len(STRIDES), 4))


def test_a_batch_sampler_that_tells_no_size(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop, sampler = Loop(llama_config, tmp_path / "log"), _Buckets()
    loader: DataLoader[Any] = DataLoader(TensorDataset(STRIDES), batch_sampler=sampler)  # type: ignore[arg-type]
    options: dict[str, Any] = {"loss": loop.loss, "total_steps": STEPS}
    with pytest.raises(ConfigError, match=r"\(_Buckets\) has no `batch_size`"):
        TrainingRun.of_loader(loop.model, loop.optimizer, loader, **options)
    sampler.batch_size = 4  # type: ignore[attr-defined]
    loop.run, loop.loader = TrainingRun.of_loader(loop.model, loop.optimizer, loader, **options), loader
    assert loop.run.rows == 4
    loop.pilot.begin(loop.run)
    loop.train(range(2))
    assert [step for step, _ in loop.pilot.peaks] == [1, 2]
