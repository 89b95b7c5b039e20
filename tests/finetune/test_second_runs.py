"""Runs after runs, and beside what users and other libraries do to the same model and Trainer."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import rankpilot
import torch
from accelerate import skip_first_batches
from peft import PeftModel
from rankpilot.common.errors import BudgetError, ConfigError, UnsupportedError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Trainer, TrainerCallback, default_data_collator

from .tiny_runs import PLAIN, Run, adapted, arguments, counting, logits, new_base, ranks_of, take_step

ROWS = counting()
ONCE = DecisionSchedule(probe_steps=3, fractions=(0.0,))
TWICE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))

NewModel = Callable[..., PeftModel]


@pytest.fixture
def new_model(llama_config: LlamaConfig) -> NewModel:
    return partial(adapted, llama_config)


def run_of(model: Any, loader: Any = None, *others: Any, **options: Any) -> TrainingRun:
    """A run of four steps on a loader, whose optimizer may have parameters beside the model's."""
    optimizer = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), *others], 1e-2)
    loader = loader or DataLoader(ROWS, 4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    return TrainingRun.of_loader(model, optimizer, loader, **{"total_steps": 4} | options)


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def test_a_second_trainer_trains_modules_that_the_first_run_dropped(new_model: NewModel, tmp_path: Path) -> None:
    model = new_model()
    for budget in ("500 params", "6k params"):
        trainer = Trainer(model, arguments(tmp_path / budget), train_dataset=ROWS, eval_dataset=ROWS[:8])
        rankpilot.attach(trainer, "signal-mean", budget=budget, schedule=ONCE)
        trainer.train()
        trainer.evaluate()
        if budget == "500 params":
            dropped = {target.name for target in find_target_modules(model) if target.rank == 0}
    adapted = [target for target in find_target_modules(model) if target.rank]
    assert dropped & {target.name for target in adapted}, "some came back"
    there = held(trainer.optimizer)
    assert all(id(weight) in there and weight.any() for t in adapted for weight in (t.weight_a, t.weight_b))


def test_a_loop_whose_optimizer_lacks_dropped_modules_is_refused(new_model: NewModel) -> None:
    model = new_model()

    def begin(budget: str, *others: torch.nn.Parameter) -> None:
        pilot = rankpilot.RankPilot("signal-mean", budget, schedule=ONCE)
        pilot.begin(run_of(model, None, *others))
        pilot.finish()

    begin("500 params")
    with pytest.raises(
        ConfigError, match=r"left some at rank 0, where parameters require no gradients: create the optimizer from `\[p"
    ):
        begin("6k params")
    begin("6k params", *(p for name, p in model.named_parameters() if not p.requires_grad and "lora_" in name))


def test_of_two_trainers_in_threads_the_second_is_refused(
    llama_config: LlamaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured steps change classes and functions of torch and transformers, which all threads share."""
    monkeypatch.setattr("rankpilot.finetune.piloted_run._UNDER_WAY", WeakKeyDictionary())  # of other tests
    found = list[BaseException | None]()

    def in_a_thread(_: int) -> None:
        with ThreadPoolExecutor() as pool:
            found.append(pool.submit(other.train).exception())

    other, alone = (Run(tmp_path / name, llama_config, schedule=ONCE) for name in ("other", "alone"))
    alone.train()
    beside = Run(tmp_path / "beside", llama_config, schedule=ONCE, at_step=in_a_thread).train()
    assert all(isinstance(error, UnsupportedError) and "Another thread" in str(error) for error in found)
    assert len(found) == 4
    assert other.trainer.state.global_step == 0
    beside.assert_same_adapter(alone)
    in_a_thread(0)
    assert found[-1] is None, "it may once the first is done"
    other.assert_same_adapter(alone)


@pytest.mark.long
@pytest.mark.parametrize("budget", ["60%", "1KiB step"])
def test_functions_set_on_a_trainer_run_and_stay(new_model: NewModel, tmp_path: Path, budget: str) -> None:
    trainer = Trainer(new_model(), arguments(tmp_path), train_dataset=ROWS, eval_dataset=ROWS[:8])
    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> Any:
        run = getattr(owner, name)

        def counted(*values: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return run(*values, **options)

        setattr(owner, name, counted)
        return counted

    ours = {name: count(trainer, name) for name in ("training_step", "log", "evaluate")}
    backward = count(trainer.accelerator, "backward")
    callback = rankpilot.attach(trainer, "signal-mean", budget=budget, schedule=ONCE, parts="off")
    if budget == "1KiB step":
        with pytest.raises(BudgetError):
            trainer.train()
    else:
        trainer.train()
        trainer.evaluate()
        probed = calls.pop("training_step") - 4
        assert probed > 0, "the step that is measured is the user's own"
        assert calls == {"backward": 4, "log": 6, "evaluate": 1}  # four losses, the end, and the evaluation
        assert len(callback.peaks) > 0
    assert all(getattr(trainer, name) is function for name, function in ours.items())
    assert trainer.accelerator.backward is backward


def test_a_function_set_while_training_outlives_the_run(new_model: NewModel, tmp_path: Path) -> None:
    """It may call ours, which no longer adds figures to what is logged."""
    logged: list[dict[str, float]] = []

    class Listens(TrainerCallback):
        def on_train_begin(self, *values: Any, **objects: Any) -> None:
            write = trainer.log
            trainer.log = lambda logs, *rest, **options: (logged.append(logs), write(logs, *rest, **options))

    trainer = Trainer(new_model(), arguments(tmp_path), train_dataset=ROWS, callbacks=[Listens()])
    rankpilot.attach(trainer, "signal-mean", "60%", schedule=ONCE)
    trainer.train()
    count = len(logged)
    assert count == 5
    trainer.log({"loss": 1.0})
    assert len(logged) == count + 1
    entry = trainer.state.log_history[-1]
    assert entry["loss"] == 1.0
    assert "plan_bytes" not in entry


def test_an_adapter_that_shares_its_configuration_keeps_it(
    new_model: NewModel, llama_config: LlamaConfig, tmp_path: Path
) -> None:
    """As the reference adapters that TRL adds for DPO."""
    model = new_model(init_lora_weights=False)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    before = logits(model)
    model.set_adapter("default")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
    rankpilot.attach(trainer, "signal-mean", budget="3k params", schedule=ONCE, fresh=True)
    trainer.train()
    assert {target.rank for target in find_target_modules(model)} != {8}
    model.save_pretrained(tmp_path / "saved")
    for name, folder in (("default", "saved"), ("ref", "saved/ref")):
        model.set_adapter(name)
        again = PeftModel.from_pretrained(new_base(llama_config), tmp_path / folder)
        assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again), before)


def test_weights_of_other_ranks_that_are_put_back_can_be_saved(llama_config: LlamaConfig, tmp_path: Path) -> None:
    best: dict[str, torch.Tensor] = {}

    def keep(step: int) -> None:
        if step == 1:
            best.update({name: value.clone() for name, value in run.model.state_dict().items()})

    options = {"budget": "40%", "schedule": TWICE, "learning_rate": 0.1}
    run = Run(tmp_path, llama_config, data=ROWS, at_step=keep, **options)
    run.train()
    ranks = ranks_of(run.model)
    run.model.load_state_dict(best, strict=False)
    assert ranks_of(run.model) != ranks, "they changed after it"
    run.model.save_pretrained(tmp_path / "best")
    assert torch.equal(logits(run.plain(tmp_path / "best")), logits(run.model))


def test_each_run_of_a_trainer_writes_its_log_into_its_folder(llama_config: LlamaConfig, tmp_path: Path) -> None:
    run = Run(tmp_path / "none", llama_config, data=ROWS, budget="3k params", schedule=ONCE)
    for name in ("one", "two"):
        run.trainer.args.output_dir = str(tmp_path / name)
        run.train()
        assert len(list((tmp_path / name / "decisions").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("policy", ["default", "signal-mean"])
def test_a_loop_wholly_under_autocast_stays_in_full_precision(new_model: NewModel, policy: str) -> None:
    plans = []
    for dtype in (torch.float32, torch.bfloat16):
        model = new_model()
        run = run_of(model)
        pilot = rankpilot.RankPilot(policy, "300 params" if policy == "default" else "900 params", schedule=ONCE)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            pilot.begin(run)
            model(**run.largest_batch()).loss.backward()
        pilot.finish()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        plans.append(ranks_of(model))
    assert len(plans[0]) == len(plans[1])
    assert sum(plans[1].values()) > 0


def test_parameters_beside_the_model_are_left_alone_and_count(new_model: NewModel) -> None:
    """Such as those of a head that the loss applies, which the same optimizer trains."""
    model, head = new_model(), torch.nn.Linear(64, 512)

    def loss(batch: Any) -> torch.Tensor:
        output = model(**batch)
        return output.loss + head(output.logits).square().mean()

    pilot = rankpilot.RankPilot("signal-mean", "100%", schedule=ONCE, measure_every=1, exact_savers=False)
    run = run_of(model, None, *head.parameters(), loss=loss)
    pilot.begin(run)
    assert head.weight.grad is None
    for first in (0, 4, 8):
        take_step(pilot, run.optimizer, default_data_collator(ROWS[first : first + 4]), loss)
    for _, predicted, measured in pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)
    assert pilot.checks
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit


class Loads(Trainer):
    """Makes its batches in its own way."""

    loader: Any = None

    def get_train_dataloader(self) -> Any:
        return self.loader


def test_data_sets_of_ready_batches(new_model: NewModel, tmp_path: Path) -> None:
    batches = [default_data_collator(ROWS[first : first + 4]) for first in range(0, len(ROWS), 4)]
    trainer = Loads(new_model(), arguments(tmp_path), train_dataset=ROWS)
    trainer.loader = DataLoader(batches, batch_size=None)
    callback = rankpilot.attach(trainer, "signal-mean", budget="60%", schedule=ONCE, **PLAIN)
    trainer.train()
    assert callback.peaks
    for _, predicted, measured in callback.pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)
    run = TrainingRun.of_loader(trainer.model, trainer.optimizer, trainer.loader, total_steps=1)
    assert run.largest_batch()["input_ids"].shape == (4, 12)


def test_loaders_that_tell_too_little_are_refused(new_model: NewModel, tmp_path: Path) -> None:
    trainer = Loads(new_model(), arguments(tmp_path), train_dataset=ROWS)
    trainer.loader = [default_data_collator(ROWS[:4])] * 4
    rankpilot.attach(trainer, "signal-mean", budget="60%", schedule=ONCE, exact_savers=False)
    with pytest.raises(ConfigError, match="which provides data set, batch size and collator; got list"):
        trainer.train()


def test_the_rest_of_a_loader_has_its_batch_size(new_model: NewModel) -> None:
    loader = DataLoader(ROWS, 4, collate_fn=default_data_collator)  # type: ignore[arg-type, var-annotated]
    assert run_of(new_model(), skip_first_batches(loader, 2)).rows == 4


@pytest.mark.parametrize("size", [{"total_steps": "3"}, {"total_steps": 1.5}, {"accumulation": 0}])
def test_sizes_of_a_run_are_whole_numbers(new_model: NewModel, size: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(size))} must be a whole number of at least 1; got"):
        run_of(new_model(), **size)


def test_the_log_of_an_earlier_run_in_the_same_folder_stays(
    llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(budget: str, *, resume: bool = False) -> None:
        Run(tmp_path, llama_config, data=ROWS, budget=budget, schedule=TWICE, save_steps=3).train(resume)

    def read(name: str) -> Any:
        return DecisionLog(tmp_path / name).to_pandas()

    run("2k params")
    first = read("decisions")
    (tmp_path / "decisions" / "notes.txt").touch()
    run("3k params")
    assert f"{tmp_path / 'decisions'} contained the decision log of an earlier run" in capsys.readouterr().out
    run("4k params")
    assert read("decisions-1").equals(first)
    assert DecisionLog(tmp_path / "decisions-1").logged(1).step > 0, "it is whole"
    assert read("decisions-2")["limit"][0] > first["limit"][0]
    last = read("decisions")
    shutil.rmtree(tmp_path / "checkpoint-4")
    run("4k params", resume=True)
    assert read("decisions").equals(last)
    assert sorted(path.name for path in tmp_path.glob("decisions*")) == ["decisions", "decisions-1", "decisions-2"]
    assert [path.name for path in (tmp_path / "decisions").glob("*.txt")] == ["notes.txt"]


class MovingAverage(TrainerCallback):
    """Averages the weights, from copies that it makes when training begins; counts the events that it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append("init")

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.heard.append("begin")
        self.average = [p.detach().clone() for p in objects["model"].parameters()]

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        for mean, parameter in zip(self.average, objects["model"].parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("form", ["given", "added"])
def test_callbacks_that_copy_weights_find_the_ranks_of_the_first_plan(
    new_model: NewModel, tmp_path: Path, form: str
) -> None:
    average = MovingAverage()
    given = [average] if form == "given" else []
    trainer = Trainer(new_model(), arguments(tmp_path), train_dataset=ROWS, callbacks=given)
    if form == "added":
        trainer.add_callback(average)
    before = list(trainer.callback_handler.callbacks)
    callback = rankpilot.attach(trainer, "signal-mean", budget="3k params", schedule=ONCE)
    assert [one for one in trainer.callback_handler.callbacks if one is not callback] == before, "in their order"
    trainer.train()
    assert any(target.rank != 8 for target in find_target_modules(trainer.model))
    assert average.heard == ["init"] * (form == "given") + ["begin", "end"]


@pytest.mark.parametrize("other", [None, Trainer, "model"])
def test_only_trainers_are_attached(new_model: NewModel, other: Any) -> None:
    with pytest.raises(ConfigError, match="attach takes an existing Trainer"):
        rankpilot.attach(new_model() if other == "model" else other)


class Counts(torch.nn.Module):
    """A layer that writes into its buffers, and puts new ones in their place."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, *values: Any, **options: Any) -> Any:
        self.seen += 1
        self.last = self.last + 1
        return self.inner(*values, **options)


class Masks:
    """A collator with random numbers of each kind; one generator it makes with the first batch, as transformers do."""

    def __init__(self) -> None:
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)
        self.older = np.random.RandomState(0)
        self.late: torch.Generator | None = None
        self.calls, self.sizes = 0, {"rows": list[int]()}

    def __call__(self, rows: list[Any]) -> Any:
        self.late = self.late or torch.Generator().manual_seed(7)
        self.calls += 1
        self.sizes["rows"].append(len(rows))
        of_torch = [torch.rand((), generator=generator).item() for generator in (self.torch, self.late)]
        self.drawn = (*of_torch, self.numpy.random(), self.older.random(), self.python.random())
        random.random()
        np.random.random()  # noqa: NPY002  (as collators of users do)
        return default_data_collator(rows)


class Wraps:
    """As the Trainer wraps a collator to leave columns out."""

    def __init__(self, data_collator: Any) -> None:
        self.data_collator = data_collator

    def __call__(self, rows: list[Any]) -> Any:
        return self.data_collator(rows)


@pytest.mark.long
@pytest.mark.parametrize("form", ["plain", "wrapped", "method", "partial", "batches"])
def test_buffers_and_random_numbers_of_users_are_as_before(new_model: NewModel, form: str) -> None:
    masks, expected = Masks(), Masks()
    expected(ROWS[:4])
    forms = {"wrapped": Wraps(masks), "method": Wraps(masks).__call__, "partial": partial(masks)}
    model = new_model()
    block = model.get_base_model().model
    block.norm = Counts(block.norm)
    rows: Any = [ROWS[first : first + 4] for first in range(0, 40, 4)] if form == "batches" else ROWS
    size = None if form == "batches" else 4
    loader: DataLoader[Any] = DataLoader(rows, size, collate_fn=forms.get(form, masks))
    states = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
    rankpilot.RankPilot("signal-mean", "60%", schedule=ONCE).begin(run_of(model, loader))
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states  # type: ignore[index]  # noqa: NPY002
    assert (float(block.norm.seen), float(block.norm.last)) == (0, 0)
    assert masks.late is None
    assert (masks.calls, masks.sizes) == (0, {"rows": []}), "what it counts too"
    masks(ROWS[:4])
    assert masks.drawn == expected.drawn


FILE = np.random.default_rng(0)


@pytest.mark.parametrize("of", ["closure", "file"])
def test_random_numbers_that_a_function_reaches_are_as_before(new_model: NewModel, of: str) -> None:
    inside = np.random.RandomState(0)

    def of_closure(rows: list[Any]) -> Any:
        inside.random()
        return default_data_collator(rows)

    def of_file(rows: list[Any]) -> Any:
        FILE.random()
        return default_data_collator(rows)

    generator, collate = (inside, of_closure) if of == "closure" else (FILE, of_file)
    loader: DataLoader[Any] = DataLoader(ROWS, 4, collate_fn=collate)
    before = repr(generator.__getstate__())
    rankpilot.RankPilot("signal-mean", "60%", schedule=ONCE).begin(run_of(new_model(), loader))
    assert repr(generator.__getstate__()) == before
