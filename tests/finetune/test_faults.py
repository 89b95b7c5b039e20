"""What goes wrong under a Trainer: no memory, requests to end, runs that are over, other settings, arguments."""

from __future__ import annotations

import logging
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.settings import ONCE, DecisionSchedule
from rankpilot.errors import BudgetError, ConfigError, DataError, RunFolderError, UnsupportedError
from rankpilot.finetune.callback import RankPilotCallback, StopOnSigterm, attach
from rankpilot.finetune.checkpoint import STATE
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..cases import first_cases

STEPS, LENGTH = 12, 12
SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
ROWS = Dataset.from_list(
    [{"input_ids": ids, "labels": ids} for ids in ([i * j % 64 for i in range(LENGTH)] for j in range(96))]
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(TrainerCallback):
    """Losses and ranks after each step; calls a function of the step at the end of each."""

    def __init__(self, at_step: Callable[[int], None]) -> None:
        self.at_step = at_step
        self.losses: list[float] = []
        self.ranks: list[dict[str, int]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.ranks.append(adapter_ranks(find_target_modules(objects["model"])))
        self.at_step(state.global_step)


class Run:
    """A Trainer on a tiny Llama, each as a new process would make it."""

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        *,
        budget: Any = "80%",
        pilot: dict[str, Any] | None = None,
        trainer: type[Trainer] = Trainer,
        at_step: Callable[[int], None] = lambda step: None,
        data: Dataset = ROWS,
        **options: Any,
    ) -> None:
        set_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        self.folder, self.model = folder, get_peft_model(LlamaForCausalLM(config), lora)
        settings = {"policy": "signal-mean", "schedule": SCHEDULE, "measure_every": 3} | (pilot or {})
        self.recorder = Recorder(at_step)
        arguments = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        } | options
        self.trainer = trainer(
            model=self.model,
            args=TrainingArguments(str(folder), **arguments),
            train_dataset=data,
            callbacks=[self.recorder],
        )
        self.pilot = attach(self.trainer, budget=budget, **settings)

    def train(self, resume: int | None = None) -> Run:
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(self.checkpoint(resume)))
        return self

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def adapter(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name}

    def log(self) -> Any:
        return DecisionLog(self.folder / "decisions").to_pandas()


Launch = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, llama_config: LlamaConfig) -> Launch:
    return lambda name="run", **options: Run(tmp_path / name, llama_config, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """An uninterrupted run, which several tests look at."""
    return Run(tmp_path_factory.mktemp("whole") / "run", llama_config).train()


@pytest.fixture
def ended(make: Launch, whole: Run, tmp_path: Path) -> Launch:
    """Makes Trainers in a copy of the folder of the uninterrupted run."""
    shutil.copytree(whole.folder, tmp_path / "run")
    return make


def assert_same_adapter(run: Run, other: Run) -> None:
    there = other.adapter()
    for name, value in run.adapter().items():
        assert torch.equal(value, there[name]), name


# Out of memory ------------------------------------------------------------------------------------------------------


def failing(fails: Callable[[int], bool]) -> type[Trainer]:
    """A Trainer whose loss runs out of memory at the calls that `fails` names, after some work was done."""

    class OutOfMemory(Trainer):  # type: ignore[misc]
        calls = 0

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            result = super().compute_loss(model, inputs, *rest, **options)
            if self.is_training_for_real:
                self.calls += 1
                if fails(self.calls):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result

        is_training_for_real = False

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            self.is_training_for_real = "training_step" in vars(self)  # the callback follows the real steps
            return super().training_step(*arguments, **options)

    return OutOfMemory


@pytest.mark.parametrize(
    ("times", "accumulation"),
    first_cases(1, [(2, 3), (1, 1), (1, 3), (2, 1)]),
)
def test_a_step_without_memory_is_taken_again_on_a_smaller_plan(
    make: Launch, accumulation: int, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """After the plan of the failing step has shrunk, all goes on as in a run that had that plan from the start."""
    failing_step = 3
    first = accumulation * (failing_step - 1) + max(accumulation - 1, 1)  # the second of three batches
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 6, "save_strategy": "no"}
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = make(trainer=failing(lambda call: call - first in range(times)), **options).train()
    quiet = make("quiet", **options).train()
    assert run.recorder.ranks[:2] == quiet.recorder.ranks[:2]
    assert run.recorder.losses[:2] == quiet.recorder.losses[:2]
    assert sum(run.recorder.ranks[2].values()) < sum(quiet.recorder.ranks[2].values())
    lines = [record.message for record in caplog.records if "ran out of memory" in record.message]
    assert len(lines) == times
    assert all("Step 3 ran out of memory. The plan shrinks to" in line for line in lines)
    corrections = [note for note in run.log()["note"] if note == "shrunk: out of memory"]
    assert corrections
    steps = [step for step, _ in run.pilot.predictions]
    assert steps[: 1 + times] == [0, *[2] * times]
    costs = [cost for _, cost in run.pilot.predictions]
    assert costs[: 1 + times] == sorted(costs[: 1 + times], reverse=True)
    assert run.pilot.limit < quiet.pilot.limit

    def shrink(step: int) -> None:
        if step == failing_step - 1:
            other.pilot.pilot._guard._step = step
            for _ in range(times):
                other.pilot.pilot.out_of_memory()

    other = make("between", at_step=shrink, **options)
    other.train()
    assert run.recorder.ranks[2:] == other.recorder.ranks[2:]
    # With accumulation the Trainer counts the loss of a first batch that ran under the larger plan.
    close = pytest.approx(other.recorder.losses[2], abs=1e-2 if accumulation > 1 else 0.0)
    assert run.recorder.losses[2] == close
    assert run.recorder.losses[3:] == other.recorder.losses[3:]
    assert_same_adapter(run, other)


# Asked to end -------------------------------------------------------------------------------------------------------


def sigterm_at(step: int) -> Callable[[int], None]:
    return lambda at: signal.raise_signal(signal.SIGTERM) if at == step else None


class Ends(TrainerCallback):
    """Counts the runs that it saw end."""

    count = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.count += 1


def test_sigterm_saves_a_checkpoint_and_ends_the_process(
    make: Launch, whole: Run, caplog: pytest.LogCaptureFixture
) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    cut, ends = make(at_step=sigterm_at(6)), Ends()
    cut.trainer.add_callback(ends)
    with pytest.raises(SystemExit) as caught:
        cut.train()
    assert caught.value.code == 143
    assert "Ended by SIGTERM after step 6, with a checkpoint" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert ends.count == 1, "trackers have ended"
    assert rankpilot.last_checkpoint(cut.folder) == cut.checkpoint(6)
    resumed = make().train(resume=6)
    assert resumed.recorder.losses == whole.recorder.losses[6:]
    assert_same_adapter(resumed, whole)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_user_stays_in_charge(make: Launch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        run = make(at_step=sigterm_at(2), max_steps=4, budget="3k params").train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert run.trainer.state.global_step == 4


def test_no_handler_is_left_behind(make: Launch) -> None:
    def breaks(step: int) -> None:
        if step == 2:
            run.trainer.compute_loss = None

    run = make(at_step=breaks, budget="3k params")
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        run.train()
    assert run.trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    rankpilot.allocate(make("other").trainer, budget="3k params", policy="signal-mean", schedule=SCHEDULE)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_handler_is_left_behind_by_an_error_between_steps(make: Launch) -> None:
    def breaks(step: int) -> None:
        if step == 2:
            raise OSError("the disk of the data is gone")

    run = make(at_step=breaks, budget="3k params")
    with pytest.raises(OSError, match="is gone"):
        run.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not [one for one in run.trainer.callback_handler.callbacks if isinstance(one, StopOnSigterm)]


@pytest.fixture(scope="module", params=first_cases(1, [2, 1]))
def accumulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig
) -> tuple[dict[str, Any], Run]:
    """Options of a run with so many micro-batches, and that run, uninterrupted."""
    options = {"gradient_accumulation_steps": request.param, "budget": "3k params", "save_steps": STEPS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests
    run = Run(tmp_path_factory.mktemp("accumulated") / "run", llama_config, **options).train()
    torch.set_num_threads(threads)
    return options, run


class Asks(TrainerCallback):
    """Has the Trainer's just-in-time checkpoint asked for at one event of a step, as its timer would after SIGTERM."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        jit = next(c for c in self.handler.callbacks if type(c).__name__ == "JITCheckpointCallback")
        inner = getattr(jit, self.event)

        def asked(args: Any, state: Any, control: Any, **objects: Any) -> Any:
            if state.global_step == self.step:
                jit.jit_manager.is_checkpoint_requested = True
            return inner(args, state, control, **objects)

        setattr(jit, self.event, asked)

    handler: Any = None


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    first_cases(
        2, [("on_step_begin", 5, 5), ("on_step_end", 6, 6), ("on_pre_optimizer_step", 5, 5), ("on_step_end", 5, 5)]
    ),
)
def test_the_just_in_time_checkpoint_of_the_trainer_resumes(
    make: Launch, accumulated: tuple[dict[str, Any], Run], event: str, step: int, saved: int
) -> None:
    """A decision falls after step 6; the checkpoint of that step holds it."""
    options, whole = accumulated
    cut = make(enable_jit_checkpoint=True, **options)
    in_charge, handlers = signal.getsignal(signal.SIGTERM), set[Any]()
    asks = Asks(event, step)
    asks.handler = cut.trainer.callback_handler
    cut.trainer.add_callback(asks)
    cut.recorder.at_step = lambda _: handlers.add(signal.getsignal(signal.SIGTERM))
    cut.train()
    assert handlers == {in_charge}
    assert len(cut.recorder.losses) < STEPS
    assert (cut.checkpoint(saved) / STATE).is_file()
    resumed = make(**options).train(resume=saved)
    assert resumed.recorder.ranks == whole.recorder.ranks[saved:]
    assert resumed.recorder.losses == whole.recorder.losses[saved:]
    assert_same_adapter(resumed, whole)
    assert resumed.log().drop(columns="run").equals(whole.log().drop(columns="run"))


def test_a_checkpoint_is_complete_before_older_ones_are_deleted(
    make: Launch, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at that moment must not leave a run without any checkpoint."""
    from transformers import trainer as trainer_module

    complete = []
    right = trainer_module.rotate_checkpoints

    def rotate(output_dir: str, **options: Any) -> None:
        step = run.trainer.state.global_step
        complete.append((run.checkpoint(step) / STATE).is_file())
        right(output_dir=output_dir, **options)

    monkeypatch.setattr(trainer_module, "rotate_checkpoints", rotate)
    run = make(save_total_limit=1)
    run.train()
    assert complete == [True] * 3
    assert_same_adapter(run, whole)


# Resuming -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_another_folder_resumes(make: Launch, whole: Run, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(whole.checkpoint(8), tmp_path / "kept" / "checkpoint-8"))
    resumed = make("elsewhere")
    resumed.trainer.train(resume_from_checkpoint=elsewhere)
    assert resumed.recorder.losses == whole.recorder.losses[8:]
    assert_same_adapter(resumed, whole)


def test_the_last_checkpoint_in_the_folder_of_a_run(make: Launch, whole: Run) -> None:
    run = make().train()
    assert run.recorder.losses == whole.recorder.losses
    assert any(target.rank != 8 for target in find_target_modules(run.model))
    shutil.rmtree(run.checkpoint(12))
    resumed = make()
    resumed.trainer.train(resume_from_checkpoint=True)
    assert resumed.recorder.losses == whole.recorder.losses[8:]
    assert_same_adapter(resumed, whole)


def test_a_trainer_without_the_callback_resumes_as_ever(make: Launch) -> None:
    """Torn checkpoints are its own business, even where other Trainers have the callback."""
    for resume in (False, True):
        run = make(max_steps=4)
        run.trainer.remove_callback(run.pilot)
        if resume:
            (run.checkpoint(4) / "trainer_state.json").unlink()
            with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
                run.trainer.train(resume_from_checkpoint=True)
        else:
            run.train()


@pytest.mark.parametrize("resume", [True, 4])
def test_a_checkpoint_without_the_callback_can_be_kept(make: Launch, llama_config: LlamaConfig, resume: Any) -> None:
    plain = make(max_steps=4)
    plain.trainer.remove_callback(plain.pilot)
    plain.train()
    told = rf"from_pretrained\(base, '{plain.checkpoint(4)}', is_trainable=True\)`, and call `train\(\)` without"
    refused = make(max_steps=6)
    with pytest.raises(RunFolderError, match=told):
        refused.trainer.train(resume_from_checkpoint=True if resume is True else refused.checkpoint(resume))
    set_seed(0)
    model = PeftModel.from_pretrained(LlamaForCausalLM(llama_config), plain.checkpoint(4), is_trainable=True)
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.0, "use_cpu": True, "report_to": []}
    trainer = Trainer(model, TrainingArguments(str(plain.folder / "next"), **settings), train_dataset=ROWS)
    rankpilot.attach(trainer, "signal-mean", budget="40k params", schedule=ONCE)
    trainer.train()
    assert any(target.rank != 8 for target in find_target_modules(model))

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of.eval()(input_ids=torch.arange(16).view(2, 8)).logits  # type: ignore[no-any-return]

    torch.testing.assert_close(logits(model), logits(plain.model))
    with model.disable_adapter():
        assert not torch.allclose(logits(model), logits(plain.model))


@pytest.mark.parametrize(
    "file", first_cases(2, ["rankpilot.safetensors", "adapter_model.safetensors", "trainer_state.json"])
)
def test_the_last_whole_checkpoint_is_resumed(
    ended: Launch, whole: Run, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut = ended()
    (cut.checkpoint(12) / file).write_bytes((cut.checkpoint(12) / file).read_bytes()[:-9])
    assert rankpilot.last_checkpoint(cut.folder) == cut.checkpoint(8)
    with pytest.raises(RunFolderError, match=rf"{file} is torn\. The last whole checkpoint is .*checkpoint-8: pass"):
        cut.train(resume=12)
    cut.trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-12 is passed over: {file} is torn" in caplog.text
    assert cut.recorder.losses == whole.recorder.losses[8:]
    assert_same_adapter(cut, whole)
    shutil.rmtree(cut.checkpoint(4))
    for step in (8, 12):
        (cut.checkpoint(step) / file).unlink()
    with pytest.raises(RunFolderError, match=r"No checkpoint can be resumed\. There is no whole"):
        cut.trainer.train(resume_from_checkpoint=True)
    assert rankpilot.last_checkpoint(cut.folder) is None
    assert rankpilot.last_checkpoint(tmp_path / "nowhere") is None


def test_a_model_saved_alone_is_no_torn_checkpoint(make: Launch) -> None:
    run = make(max_steps=4, save_only_model=True, budget="3k params").train()
    assert not (run.checkpoint(4) / "optimizer.pt").exists()
    assert rankpilot.last_checkpoint(str(run.folder)) == run.checkpoint(4)


@pytest.mark.parametrize("schedule", first_cases(1, ["linear", "constant"]))
def test_a_run_that_is_over_trains_no_step_when_it_resumes(ended: Launch, whole: Run, schedule: str) -> None:
    name, options = ("run" if schedule == "linear" else "other"), {"lr_scheduler_type": schedule}
    run = whole if schedule == "linear" else ended(name, **options).train()
    again = ended(name, **options).train(resume=STEPS)
    assert again.trainer.state.global_step == STEPS
    assert again.recorder.losses == []
    assert {path.name for path in again.folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 8, 12)}
    assert_same_adapter(again, run)
    assert again.log().equals(run.log())
    assert again.pilot.peaks == run.pilot.peaks
    again.trainer.args.max_steps = STEPS + 2
    again.trainer.train(resume_from_checkpoint=str(again.checkpoint(STEPS)))
    assert again.trainer.state.global_step == STEPS + 2, "the Trainer takes batches again"


def test_another_budget_counts_at_once(ended: Launch, whole: Run, caplog: pytest.LogCaptureFixture) -> None:
    before = whole.pilot.limit
    for budget, limit in ((int(0.9 * before), int(0.9 * before)), ("65%", before * 65 / 80)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="rankpilot"):
            resumed = ended(budget=budget).train(resume=8)
        assert resumed.pilot.limit == pytest.approx(limit, rel=1e-6)
        assert resumed.pilot.pilot.figures()["budget_bytes"] == resumed.pilot.limit
        assert sum(resumed.recorder.ranks[0].values()) < sum(whole.recorder.ranks[8].values())
        assert all(peak <= resumed.pilot.limit for step, peak in resumed.pilot.peaks if step > 8)
        assert any(f"the budget is {resumed.pilot.pilot.budget} now, and was 80%" in r.message for r in caplog.records)
        last = resumed.log().iloc[2 * len(resumed.recorder.ranks[0]) :]
        assert set(last["step"].tolist()) == {8}
        assert set(last["limit"].tolist()) == {resumed.pilot.limit}
        assert set(last["note"].dropna()) == {"shrunk: another budget or time"}
    # A second kill before the next checkpoint: the change is logged once, not twice.
    assert len(DecisionLog(resumed.folder / "decisions")) == 3


def test_a_larger_budget_is_spent_at_the_next_decision(ended: Launch, whole: Run) -> None:
    resumed = ended(budget="95%").train(resume=4)
    assert resumed.pilot.limit == pytest.approx(whole.pilot.limit * 95 / 80, rel=1e-6)
    assert sum(resumed.recorder.ranks[-1].values()) > sum(whole.recorder.ranks[-1].values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "top-down"}, "policy: 'signal-mean' there, 'top-down' now"),
        ({"schedule": DecisionSchedule(probe_steps=3, fractions=(0.0, 0.6))}, "schedule: "),
        ({"bounds": {"q_proj": 4}}, "bounds: {} there, {'q_proj': 4} now"),
    ],
)
def test_other_settings_than_the_budget_are_refused(ended: Launch, changes: dict[str, Any], words: str) -> None:
    resumed = ended(pilot=changes)
    with pytest.raises(RunFolderError) as caught:
        resumed.train(resume=4)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resumed.recorder.losses == []


@pytest.mark.parametrize(
    ("budget", "other"),
    first_cases(1, [("80%", "3k params"), ("3k params", "350KB"), ("3k params", "auto")]),
)
def test_a_budget_of_another_unit_is_refused(ended: Launch, budget: str, other: str) -> None:
    name = "run" if budget == "80%" else "other"
    if name == "other":
        ended(name, max_steps=4, budget=budget).train()
    with pytest.raises(BudgetError, match=r"the cost of a plan counts|The budget or the time was changed"):
        ended(name, budget=other).train(resume=4)


def test_the_budget_may_become_auto(ended: Launch) -> None:
    assert ended(budget="auto").train(resume=4).pilot.limit > 1e8


def test_a_budget_that_fits_nothing_is_refused(ended: Launch) -> None:
    with pytest.raises(BudgetError, match=r"The budget or the time was changed\. .*The smallest that works is"):
        ended(budget="10KiB").train(resume=4)


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"policy": None}, ConfigError, "policy is 'default', the folder of a policy.*got None"),
        ({"policy": 3}, ConfigError, "got 3"),
        ({"schedule": "linear"}, ConfigError, "schedule is a rankpilot.DecisionSchedule or None; got 'linear'"),
        ({"bounds": [4, 8]}, ConfigError, r"bounds are a dictionary.*got \[4, 8\]"),
        ({"measure_every": 0}, ConfigError, "at least 1; got 0"),
        ({"measure_every": 2.5}, ConfigError, "at least 1; got 2.5"),
        ({"budget": 80}, BudgetError, 'Did you mean "80%"'),
        ({"budget": "80"}, BudgetError, 'Did you mean "80%"'),
        ({"budget": None}, BudgetError, "Cannot read the budget None"),
    ],
)
def test_arguments_are_checked_at_once(
    make: Launch, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    trainer = make().trainer
    trainer.pop_callback(RankPilotCallback)
    for given in (rankpilot.RankPilot, partial(rankpilot.attach, trainer)):
        with pytest.raises(error, match=words):
            given(**{"policy": "signal-mean"} | arguments)


def test_a_run_of_no_step(make: Launch) -> None:
    with pytest.raises(ConfigError, match="A run has at least one step; this one has 0"):
        make(max_steps=-1, num_train_epochs=0).train()


def test_an_empty_data_set_is_refused_before_training(make: Launch) -> None:
    with pytest.raises(DataError, match="The training set is empty"):
        make(data=ROWS.select([])).train()


def test_two_callbacks_for_one_trainer(make: Launch) -> None:
    run = make()
    with pytest.raises(UnsupportedError, match="Two RankPilotCallbacks"):
        rankpilot.attach(run.trainer, "signal-mean")


def test_a_callback_without_its_trainer_is_refused(make: Launch, tmp_path: Path) -> None:
    shown = re.escape('call `rankpilot.attach(trainer, "default", budget="80%")`')
    for arguments in ((), ("signal-mean",), ("signal-mean", "80%")):
        with pytest.raises(ConfigError, match=shown):
            RankPilotCallback(*arguments)
    run = make()
    other = Trainer(run.model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), train_dataset=ROWS)
    other.add_callback(run.pilot)
    before = run.adapter()
    with pytest.raises(ConfigError, match=shown):
        other.train()
    assert other.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in run.adapter().items())
