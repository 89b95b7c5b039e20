"""What goes wrong under a Trainer: no memory, requests to end, runs that are over, other settings, arguments."""

from __future__ import annotations

import logging
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from peft import PeftModel
from rankpilot.common.errors import BudgetError, ConfigError, DataError, RunFolderError, UnsupportedError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import ONCE, DecisionSchedule
from rankpilot.finetune.callback import RankPilotCallback
from rankpilot.finetune.checkpoint import STATE, load_state
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, Trainer, TrainerCallback

from ..cases import first_cases
from .tiny_runs import Run, arguments, counting, logits, messages_of, new_base

STEPS = 12
SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
USUAL: dict[str, Any] = {"schedule": SCHEDULE, "measure_every": 3, "max_steps": STEPS, "save_steps": 4}

pytestmark = pytest.mark.usefixtures("one_thread")

Launch = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, llama_config: LlamaConfig) -> Launch:
    return lambda name="run", **options: Run(tmp_path / name, llama_config, **USUAL | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """An uninterrupted run, which several tests look at."""
    return Run(tmp_path_factory.mktemp("whole") / "run", llama_config, **USUAL).train()


@pytest.fixture
def ended(make: Launch, whole: Run, tmp_path: Path) -> Launch:
    """Makes Trainers in a copy of the folder of the uninterrupted run."""
    shutil.copytree(whole.folder, tmp_path / "run")
    return make


# Asked to end -------------------------------------------------------------------------------------------------------


ACCUMULATED = USUAL | {"gradient_accumulation_steps": 2, "budget": "3k params", "save_steps": STEPS}


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """A run with micro-batches, uninterrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests
    run = Run(tmp_path_factory.mktemp("accumulated") / "run", llama_config, **ACCUMULATED).train()
    torch.set_num_threads(threads)
    return run


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
    make: Launch, accumulated: Run, event: str, step: int, saved: int
) -> None:
    """A decision falls after step 6; the checkpoint of that step holds it."""
    cut, whole = make(enable_jit_checkpoint=True, **ACCUMULATED), accumulated
    in_charge, handlers = signal.getsignal(signal.SIGTERM), set[Any]()
    asks = Asks(event, step)
    asks.handler = cut.trainer.callback_handler
    cut.trainer.add_callback(asks)
    cut.recorder.at_step = lambda _: handlers.add(signal.getsignal(signal.SIGTERM))
    cut.train()
    assert handlers == {in_charge}
    assert len(cut.recorder.losses) < STEPS
    assert (cut.checkpoint(saved) / STATE).is_file()
    resumed = make(**ACCUMULATED).train(resume=saved)
    assert resumed.recorder.ranks == whole.recorder.ranks[saved:]
    assert resumed.recorder.losses == whole.recorder.losses[saved:]
    resumed.assert_same_adapter(whole)
    assert resumed.log.drop(columns="run").equals(whole.log.drop(columns="run"))


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
    run.assert_same_adapter(whole)


# Resuming -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_another_folder_resumes(make: Launch, whole: Run, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(whole.checkpoint(8), tmp_path / "kept" / "checkpoint-8"))
    resumed = make("elsewhere")
    resumed.trainer.train(resume_from_checkpoint=elsewhere)
    assert resumed.recorder.losses == whole.recorder.losses[8:]
    resumed.assert_same_adapter(whole)


@pytest.mark.parametrize("step", [8, 4])
def test_from_the_last_checkpoint_of_a_folder_all_is_as_if_nothing_had_happened(
    ended: Launch, whole: Run, step: int
) -> None:
    """The second decision falls between the two."""
    resumed = ended()
    for later in range(step + 4, STEPS + 1, 4):
        shutil.rmtree(resumed.checkpoint(later))
    resumed.train(resume=True)
    assert any(target.rank != 8 for target in find_target_modules(resumed.model))
    assert resumed.recorder.losses == whole.recorder.losses[step:]
    assert resumed.recorder.ranks == whole.recorder.ranks[step:]
    resumed.assert_same_adapter(whole)
    assert resumed.log.equals(whole.log)
    assert resumed.pilot.predictions == whole.pilot.predictions
    assert resumed.pilot.peaks == whole.pilot.peaks


def test_a_trainer_without_the_callback_resumes_as_ever(make: Launch) -> None:
    """Torn checkpoints are its own business, even where other Trainers have the callback."""
    run = make(budget=None, max_steps=4).train()
    (run.checkpoint(4) / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        make(budget=None, max_steps=4).train(resume=True)


@pytest.mark.parametrize("resume", [True, 4])
def test_a_checkpoint_without_the_callback_can_be_kept(make: Launch, llama_config: LlamaConfig, resume: Any) -> None:
    plain = make(budget=None, max_steps=4).train()
    told = (
        rf"from_pretrained\(base, '{plain.checkpoint(4)}', is_trainable=True\)` and call `train\(\)` "
        r"without"
    )
    with pytest.raises(RunFolderError, match=told):
        make(max_steps=6).train(resume)
    model = PeftModel.from_pretrained(new_base(llama_config), plain.checkpoint(4), is_trainable=True)
    settings = arguments(plain.folder / "next", max_steps=2, learning_rate=0.0)
    trainer = Trainer(model, settings, train_dataset=counting())
    rankpilot.attach(trainer, "signal-mean", budget="40k params", schedule=ONCE)
    trainer.train()
    assert any(target.rank != 8 for target in find_target_modules(model))
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
    with pytest.raises(
        RunFolderError, match=rf"{file} is corrupt\. The last complete checkpoint is .*checkpoint-8; pass"
    ):
        cut.train(resume=12)
    cut.train(resume=True)
    assert f"skipping checkpoint-12: {file} is corrupt" in caplog.text
    assert cut.recorder.losses == whole.recorder.losses[8:]
    cut.assert_same_adapter(whole)
    shutil.rmtree(cut.checkpoint(4))
    for step in (8, 12):
        (cut.checkpoint(step) / file).unlink()
    with pytest.raises(RunFolderError, match=r"No checkpoint to resume from\. No complete checkpoint"):
        cut.train(resume=True)
    assert rankpilot.last_checkpoint(cut.folder) is None
    assert rankpilot.last_checkpoint(tmp_path / "nowhere") is None


def flip(path: Path) -> None:
    """Change a bit of a number near the end of a file: of one of those that JSON writes with another first digit."""
    content = bytearray(path.read_bytes())
    digits = (at for at in range(1, len(content)) if content[at - 1] == ord(" ") and content[at] in b"23456789")
    place = max(digits) if path.suffix == ".json" else len(content) - 8
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["rankpilot.safetensors", "rankpilot.json"])
def test_a_checkpoint_with_another_bit_is_passed_over(
    ended: Launch, whole: Run, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut = ended()
    flip(cut.checkpoint(12) / file)
    with pytest.raises(RunFolderError, match=r"is corrupt\. The last complete checkpoint is .*checkpoint-8; pass"):
        cut.train(resume=12)
    with pytest.raises(RunFolderError, match="its contents have changed"):
        load_state(cut.checkpoint(12))
    cut.train(resume=True)
    assert "skipping checkpoint-12: rankpilot.safetensors is corrupt" in caplog.text
    cut.assert_same_adapter(whole)


def test_files_that_a_resumed_run_goes_on_without_are_told(ended: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    cut, missing = ended(), list[str]()
    cut.train(resume=8)
    told = capsys.readouterr().out
    assert "after step 8 with the plan of step " in told
    assert "continuing without" not in told
    for name in ("rng_state", "optimizer", "scheduler"):
        next(cut.checkpoint(8).glob(f"{name}*")).unlink()
        missing.append(name)
        cut.train(resume=8)
        assert f"checkpoint-8 has no {', '.join(missing)}; continuing without" in capsys.readouterr().out


@pytest.mark.parametrize("most", [3_000, 7_000, 30_000])
def test_files_of_a_checkpoint_that_cannot_be_written(ended: Launch, most: int) -> None:
    """The state of rankpilot, the adapter and the optimizer's state are too large."""

    def limit(step: int) -> None:
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))

    cut = ended(at_step=limit)
    shutil.rmtree(cut.checkpoint(12))
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunFolderError, match=r"Cannot write .*checkpoint-12.*free disk space\."):
            cut.train(resume=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert rankpilot.last_checkpoint(cut.folder) == cut.checkpoint(8)


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
    again.assert_same_adapter(run)
    assert again.log.equals(run.log)
    assert again.pilot.peaks == run.pilot.peaks
    again.trainer.args.max_steps = STEPS + 2
    again.trainer.train(resume_from_checkpoint=str(again.checkpoint(STEPS)))
    assert again.trainer.state.global_step == STEPS + 2, "the Trainer takes batches again"


def test_another_budget_counts_at_once(ended: Launch, whole: Run, caplog: pytest.LogCaptureFixture) -> None:
    before = whole.pilot.limit
    for budget, limit in ((f"{int(0.9 * before)} bytes step", int(0.9 * before)), ("65%", before * 65 / 80)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="rankpilot"):
            resumed = ended(budget=budget).train(resume=8)
        assert resumed.pilot.limit == pytest.approx(limit, rel=1e-6)
        assert resumed.pilot.pilot.figures()["budget_bytes"] == resumed.pilot.limit
        assert sum(resumed.recorder.ranks[0].values()) < sum(whole.recorder.ranks[8].values())
        assert all(peak <= resumed.pilot.limit for step, peak in resumed.pilot.peaks if step > 8)
        assert messages_of(caplog, f"the budget is now {resumed.pilot.pilot.budget}, previously 80%")
        last = resumed.log.iloc[2 * len(resumed.recorder.ranks[0]) :]
        assert set(last["step"].tolist()) == {8}
        assert set(last["limit"].tolist()) == {resumed.pilot.limit}
        assert set(last["note"].dropna()) == {"shrunk: another budget"}
    # A second kill before the next checkpoint: the change is logged once, not twice.
    assert len(DecisionLog(resumed.folder / "decisions")) == 3


def test_a_larger_budget_is_spent_at_the_next_decision(ended: Launch, whole: Run) -> None:
    resumed = ended(budget="95%").train(resume=4)
    assert resumed.pilot.limit == pytest.approx(whole.pilot.limit * 95 / 80, rel=1e-6)
    assert sum(resumed.recorder.ranks[-1].values()) > sum(whole.recorder.ranks[-1].values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "top-down"}, "policy: 'signal-mean' then, 'top-down' now"),
        ({"schedule": DecisionSchedule(probe_steps=3, fractions=(0.0, 0.6))}, "schedule: "),
        ({"bounds": {"q_proj": 4}}, "bounds: {} then, {'q_proj': 4} now"),
    ],
)
def test_other_settings_than_the_budget_are_refused(ended: Launch, changes: dict[str, Any], words: str) -> None:
    resumed = ended(**changes)
    with pytest.raises(RunFolderError) as caught:
        resumed.train(resume=4)
    assert words in str(caught.value)
    assert "only the budget may change" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert resumed.recorder.losses == []


@pytest.mark.parametrize(
    ("budget", "other"),
    first_cases(1, [("80%", "3k params"), ("3k params", "350KB step"), ("3k params", "auto")]),
)
def test_a_budget_of_another_unit_is_refused(ended: Launch, budget: str, other: str) -> None:
    name = "run" if budget == "80%" else "other"
    if name == "other":
        ended(name, max_steps=4, budget=budget).train()
    with pytest.raises(BudgetError, match=r"plan costs are counted in|The budget has changed"):
        ended(name, budget=other).train(resume=4)


def test_the_budget_may_become_auto(ended: Launch) -> None:
    assert ended(budget="auto").train(resume=4).pilot.limit > 1e8


def test_a_budget_that_fits_nothing_is_refused(ended: Launch) -> None:
    with pytest.raises(BudgetError, match=r"The budget has changed\. .*The smallest that works is"):
        ended(budget="10KiB step").train(resume=4)


# Arguments ----------------------------------------------------------------------------------------------------------


def test_a_run_of_no_step(make: Launch) -> None:
    with pytest.raises(ConfigError, match="A run needs at least one step; got 0"):
        make(max_steps=-1, num_train_epochs=0).train()


def test_an_empty_data_set_is_refused_before_training(make: Launch) -> None:
    with pytest.raises(DataError, match="The training set is empty"):
        make(data=[]).train()


def test_two_callbacks_for_one_trainer(make: Launch) -> None:
    run = make()
    with pytest.raises(UnsupportedError, match="already has a RankPilotCallback"):
        rankpilot.attach(run.trainer, "signal-mean")


def test_a_callback_without_its_trainer_is_refused(make: Launch, tmp_path: Path) -> None:
    shown = re.escape('call `rankpilot.attach(trainer, budget="80%")`')
    for given in ((), ("signal-mean",), ("signal-mean", "80%")):
        with pytest.raises(ConfigError, match=shown):
            RankPilotCallback(*given)
    run = make()
    other = Trainer(run.model, arguments(tmp_path), train_dataset=counting())
    other.add_callback(run.pilot)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(ConfigError, match=shown):
        other.train()
    assert other.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
