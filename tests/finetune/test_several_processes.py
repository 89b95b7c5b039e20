"""Several processes under DistributedDataParallel train as one would: same ranks, same losses, same files."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.savers import streamed_base
from rankpilot.decide.log import DecisionLog
from rankpilot.finetune.callback import RankPilotCallback, attach
from rankpilot.finetune.checkpoint import last_checkpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import TrainerCallback

from ..cases import first_cases
from .ddp_run import DECISIONS, SCHEDULE, Setting, Watch, train
from .several import in_processes, loaded_once
from .trainer_kinds import dpo, rollouts, sft

Outcome = dict[str, Any]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"arguments": {"gradient_accumulation_steps": 2}, "rows": 16},
    "static graph": {"arguments": {"ddp_static_graph": True, "ddp_find_unused_parameters": False}},
    "no unused parameters": {"arguments": {"ddp_find_unused_parameters": False}},
    "bucket views": {"handler": {"gradient_as_bucket_view": True}},
    "accumulation into bucket views": {
        "arguments": {"gradient_accumulation_steps": 2},
        "rows": 16,
        "handler": {"gradient_as_bucket_view": True},
    },
    "checkpointing": {
        "arguments": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    },
    "head": {"lora": {"modules_to_save": ["lm_head"]}},
}
FOUR_PROCESSES = ("plain", "static graph", "accumulation")


@pytest.fixture(scope="module", autouse=True)
def _loaded_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    loaded_once(lambda: train(Setting(tmp_path_factory.mktemp("first"), 2)))


@pytest.fixture(scope="module")
def saved(_loaded_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, list[Outcome]]:
    """A run of two processes with checkpoints, which tests copy, and what each of them made of it."""
    setting = Setting(tmp_path_factory.mktemp("saved") / "run", 10, arguments=SAVING)
    return setting, in_processes(2, train, setting)


def both(setting: Setting, count: int = 2) -> tuple[Outcome, list[Outcome]]:
    """What one process makes of a setting, and what each of several makes of it."""
    (one,) = in_processes(1, train, replace(setting, folder=setting.folder / "one"))
    return one, in_processes(count, train, replace(setting, folder=setting.folder / "several"))


def check_equal_copies(several: list[Outcome], steps: int) -> None:
    for outcome in several:
        assert outcome["digests"].keys() == set(range(1, steps + 1))
        assert outcome["digests"] == several[0]["digests"]
        assert outcome["predictions"] == several[0]["predictions"]
        assert outcome["peaks"] == several[0]["peaks"]


def largest_difference(a: Outcome, b: Outcome) -> float:
    assert a["weights"].keys() == b["weights"].keys()
    assert all(a["weights"][name].shape == value.shape for name, value in b["weights"].items())
    return max(float(np.abs(a["weights"][name] - value).max(initial=0)) for name, value in b["weights"].items())


@pytest.mark.parametrize(
    ("name", "count"),
    first_cases(
        1,
        [
            ("accumulation", 2),
            *((name, 2) for name in KINDS if name != "accumulation"),
            *((name, 4) for name in FOUR_PROCESSES),
        ],
    ),
)
def test_weights_and_losses_are_those_of_one_process(name: str, count: int, tmp_path: Path) -> None:
    one, several = both(Setting(tmp_path, 10, dtype=torch.float64, **KINDS[name]), count)
    check_equal_copies(several, 10)
    assert len(one["predictions"]) == DECISIONS
    assert several[0]["ranks"] == one["ranks"]
    assert largest_difference(several[0], one) < 1e-12
    assert several[0]["losses"].keys() == set(range(1, 11))
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", first_cases(1, list(KINDS)))
def test_peaks_are_predicted_with_buckets(name: str, tmp_path: Path) -> None:
    """Each step is measured; those of several processes keep the budget, as those of one do."""
    settings = {"policy": "signal-mean", "budget": "80%", "steps": 10, "callback": {"measure_every": 1}}
    one, several = both(Setting(tmp_path, **KINDS[name], **settings))
    check_equal_copies(several, 10)
    for outcome in (one, several[0]):
        assert len(outcome["peaks"]) == 10
        assert max(peak for _, peak in outcome["peaks"]) <= outcome["limit"]
        assert outcome["checks"]
        for _, predicted, measured in outcome["checks"]:
            assert 0.985 * predicted < measured <= predicted
    # Buckets are one more copy of the gradients, which a share of what plain LoRA takes pays for as well.
    assert several[0]["limit"] != one["limit"]


@pytest.mark.long
def test_texts_of_different_lengths_under_a_budget_of_bytes(tmp_path: Path) -> None:
    """Each process has other lengths: all plan for the longest of all."""
    setting = Setting(tmp_path, 8, lengths=True, policy="signal-mean", budget="90%", callback={"measure_every": 1})
    several = in_processes(2, train, setting)
    check_equal_copies(several, 8)
    assert max(peak for _, peak in several[0]["peaks"]) <= several[0]["limit"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("policy", "options"),
    first_cases(
        1, [("default", {"goal": "bytes"}), ("signal-mean", {"gradient_checkpointing": "auto", "time": "110%"})]
    ),
    ids=["fewest bytes", "layers that run again, and time"],
)
def test_choices_of_the_first_process_are_those_of_all(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"measure_every": 1}
    several = in_processes(2, train, Setting(tmp_path, 6, policy=policy, budget="70%", callback=options))
    check_equal_copies(several, 6)
    assert max(peak for _, peak in several[0]["peaks"]) <= several[0]["limit"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
def test_compiled_models(tmp_path: Path) -> None:
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    twice = {"schedule": replace(SCHEDULE, fractions=(0.0, 0.5))}
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(1))  # loads the compiler, before the forks
    few = {"target_modules": ["v_proj", "down_proj"]}
    one, several = both(Setting(tmp_path, 4, dtype=torch.float64, arguments=arguments, callback=twice, lora=few))
    check_equal_copies(several, 4)
    assert len(one["predictions"]) == 2
    assert several[0]["graphs"] > 1
    assert largest_difference(several[0], one) < 1e-12


def test_one_process_writes(saved: tuple[Setting, list[Outcome]]) -> None:
    folder = saved[0].folder
    log = DecisionLog(folder / "decisions").to_pandas()
    assert sorted(set(log["step"].tolist())) == sorted({0, 2, 4, 6, 8})
    assert len(log) == len(set(zip(log["step"].tolist(), log["module"].tolist(), strict=True)))
    names = {path.name for path in (folder / "checkpoint-10").iterdir()}
    assert {"rankpilot.json", "rankpilot.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names


# Going on -------------------------------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 5}


@pytest.mark.parametrize(("before", "after"), first_cases(1, [(2, 1), (1, 2), (2, 2), (2, 4)]))
def test_a_run_goes_on_with_any_number_of_processes(
    before: int, after: int, saved: tuple[Setting, list[Outcome]], tmp_path: Path
) -> None:
    """With as many as before bit for bit; with others within what the order of sums makes of fp32."""
    setting = replace(saved[0], folder=tmp_path / "run")
    if before == 2:
        whole = saved[1][0]
        shutil.copytree(saved[0].folder, tmp_path / "run")
    else:
        (whole,) = in_processes(before, train, setting)
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    log = DecisionLog(tmp_path / "run" / "decisions").to_pandas()
    again = in_processes(after, train, replace(setting, resume=True))
    for outcome in again:
        assert outcome["digests"] == again[0]["digests"]
        assert outcome["digests"].keys() == set(range(6, 11))
        assert outcome["ranks"] == whole["ranks"]
        assert outcome["predictions"] == whole["predictions"]
    if before == after:
        assert again[0]["digests"].items() <= whole["digests"].items()
        assert DecisionLog(tmp_path / "run" / "decisions").to_pandas().equals(log)
    else:
        assert largest_difference(again[0], whole) < 1e-6


def test_a_checkpoint_without_the_random_numbers_of_a_process_is_passed_over(
    saved: tuple[Setting, list[Outcome]], tmp_path: Path
) -> None:
    shutil.copytree(saved[0].folder, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-10"
    (tmp_path / "run" / "checkpoint-10" / "rng_state_1.pth").unlink()
    told: list[str] = []
    assert last_checkpoint(tmp_path / "run", tell=told.append) == tmp_path / "run" / "checkpoint-5"
    assert told == ["skipping checkpoint-10: rng_state_1.pth is missing"]


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    arguments = SAVING | {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    first, second = in_processes(2, train, Setting(tmp_path / "run", 10, arguments=arguments))
    assert first["ranks"] == second["ranks"]
    assert largest_difference(first, second) == 0


def with_streamed_base(folder: Path) -> list[Outcome]:
    """A run with its base on the device, one that streams, and its second half."""
    arguments = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    streams = Setting(folder / "streams", 4, arguments=arguments, callback={"stream": 3})
    whole = train(replace(streams, folder=folder / "whole", callback={"stream": "off"}))
    return [whole, train(streams), train(replace(streams, resume=str(folder / "streams" / "checkpoint-2")))]


def test_a_streamed_base_under_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_base, "LEAST_BYTES", 1)
    both_found = in_processes(2, with_streamed_base, tmp_path)
    for whole, streams, resumed in both_found:
        assert largest_difference(streams, whole) == largest_difference(resumed, whole) == 0
        assert any("exp_avg" in name for name in whole["weights"])
        assert [streams[name] for name in streams if name != "weights"] == [
            whole[name] for name in whole if name != "weights"
        ]
        assert streams["evaluations"].keys() == {2, 4}
        assert resumed["digests"].items() <= whole["digests"].items()
    assert both_found[0][1]["digests"] == both_found[1][1]["digests"]


class Dies(TrainerCallback):  # type: ignore[misc]
    """The second process is killed in the middle of step 8, once."""

    def __init__(self, pilot: RankPilotCallback) -> None: ...

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def restarted(setting: Setting) -> Outcome:
    """What the first process of `torchrun --max-restarts 1` returns in the end."""
    # Or processes that start again find the addresses of those that have died (torch 2.13).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Not forks of this process: the agent that starts them again has threads.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    settings = LaunchConfig(
        1, 1, nproc_per_node=2, max_restarts=1, start_method="forkserver", rdzv_backend="c10d", monitor_interval=0.1
    )
    results: dict[int, Outcome] = elastic_launch(settings, from_last_checkpoint)(setting)
    return results[0]


def from_last_checkpoint(setting: Setting) -> Outcome:
    checkpoint = last_checkpoint(setting.folder)
    return train(replace(setting, resume=str(checkpoint) if checkpoint else None))


@pytest.mark.long
def test_a_killed_process_is_started_again_and_nothing_changes(tmp_path: Path) -> None:
    whole, *_ = in_processes(2, train, Setting(tmp_path / "whole", 15, arguments=SAVING))
    killed = Setting(tmp_path / "killed", 15, arguments=SAVING, callbacks=(Dies,))
    (again,) = in_processes(1, restarted, killed)
    assert again["digests"].keys() == set(range(6, 16)), "it goes on from the checkpoint of step 5"
    assert again["digests"].items() <= whole["digests"].items()
    logs = [DecisionLog(tmp_path / name / "decisions").to_pandas() for name in ("whole", "killed")]
    assert logs[0].drop(columns="run").equals(logs[1].drop(columns="run"))


def launched(count: int, setting: Setting) -> list[Outcome]:
    """What processes return that torchrun starts, each with CUDA of its own."""
    settings = LaunchConfig(1, 1, nproc_per_node=count, start_method="spawn", rdzv_backend="c10d", max_restarts=0)
    results: dict[int, Outcome] = elastic_launch(settings, train)(setting)
    return [results[rank] for rank in range(count)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_train_as_one(tmp_path: Path) -> None:
    on_cards = {"use_cpu": False, "ddp_backend": "nccl"}
    one, *several = [
        outcome
        for count in (1, 2)
        for outcome in launched(count, Setting(tmp_path / str(count), 10, arguments=on_cards))
    ]
    check_equal_copies(several, 10)
    assert len(set(one["digests"].values())) == 10
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)


# Other Trainers -------------------------------------------------------------------------------------------------------


def other_trainer(kind: str, folder: Path, steps: int) -> Outcome:
    """One of TRL's Trainers, as each of the processes trains it."""
    torch.set_num_threads(1)
    count = int(os.environ["WORLD_SIZE"])
    build = {"sft": sft, "dpo": dpo}[kind]
    options: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": 4 // count}
    options |= {"learning_rate": 1e-3, "bf16": False}
    trainer = build(folder / str(count), ddp_backend="gloo" if count > 1 else None, **options)
    pilot = attach(trainer, "signal-mean", budget="6k params", schedule=SCHEDULE)
    watch = Watch(pilot)
    trainer.add_callback(watch)
    trainer.train()
    weights = {name: p.detach().clone().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
    facts = {"predictions": pilot.predictions, "peaks": pilot.peaks}
    return {"losses": watch.losses, "digests": watch.digests, "weights": weights, **facts}


@pytest.mark.parametrize("kind", first_cases(1, ["sft", "dpo"]))
def test_trainers_of_trl(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    (one,) = in_processes(1, other_trainer, kind, tmp_path, 6)
    several = in_processes(2, other_trainer, kind, tmp_path, 6)
    check_equal_copies(several, 6)
    assert len(set(one["digests"].values())) == 6
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert largest_difference(several[0], one) < 1e-5


def with_rollouts(folder: Path, attaches: bool) -> Outcome:
    """TRL's GRPOTrainer, as each of the processes trains it."""
    torch.set_num_threads(1)
    trainer = rollouts("GRPO", folder, ddp_backend="gloo", gradient_checkpointing=False, max_steps=3)
    pilot = attach(trainer, budget="85%", measure_every=1) if attaches else None
    trainer.train()
    weights = {name: p.detach().clone().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"weights": weights, "within": bool(pilot and max(peak for _, peak in pilot.peaks) <= pilot.limit)}


def test_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget holds in both processes, and the adapters are those of a run without rankpilot."""
    pytest.importorskip("trl")
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    plain, *_ = in_processes(2, with_rollouts, tmp_path, False)
    first, second = in_processes(2, with_rollouts, tmp_path, True)
    assert first["within"]
    assert second["within"]
    assert largest_difference(first, second) == largest_difference(first, plain) == 0
