"""DDP's reducer follows changes of ranks; copies that differ are an error; what cannot work is refused."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import rankpilot
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from peft import PeftModel
from rankpilot.common.errors import NonFiniteError, UnsupportedError
from rankpilot.cost import budget as budget_module
from rankpilot.cost.record.calibration import LOOP_BYTES
from rankpilot.cost.record.live_storages import LivePeak
from rankpilot.cost.savers import streamed_base
from rankpilot.decide.rules import AsConfigured
from rankpilot.finetune import before_training, probing
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.piloted_run import PilotedRun
from rankpilot.finetune.step import known_losses
from rankpilot.finetune.step import replicas as replicas_module
from rankpilot.finetune.step.journal import PlanChange
from rankpilot.finetune.step.replicas import Replicas, digest_of, rebuild_reducer, trained_bytes
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as Ddp
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, DistributedSampler

from ..cases import first_cases
from .ddp_run import DECISIONS, ROWS, SCHEDULE, Round, Setting, budget_of, collate, make_model, states_of, texts
from .several import ProcessFailed, in_processes, loaded_once
from .tiny_runs import is_measured, load_loop, save_loop, take_step

STEPS, CUT = 10, 5
SETTING = Setting(None, dtype=torch.float64)  # type: ignore[arg-type]
Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> None:
    loaded_once(lambda: loop(None, steps=1))


# Loops ----------------------------------------------------------------------------------------------------------------


def loop(
    wrap: Wrap | None,
    *,
    policy: Any = None,
    budget: str | None = None,
    steps: int = STEPS,
    checkpoint: Path | None = None,
    first: int = 0,
    accelerate: bool = False,
    lengths: tuple[int, ...] = (),
    parts: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A plain loop in each process, or one with accelerate; returns what is to be compared.

    With a checkpoint, it is saved after step `CUT`; a loop whose first step is later goes on from it. With lengths,
    rows have them in turn, and the second process has one row in each other step.
    """
    torch.set_num_threads(1)
    count, model, data = int(os.environ.get("WORLD_SIZE", "1")), make_model(SETTING), texts(lengths=False)
    if lengths:
        data = data.map(
            lambda row, at: {name: row[name][: lengths[at % len(lengths)]] for name in row}, with_indices=True
        )
    optimizer: Any = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    loader: Any
    if accelerate:
        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])
        prepared = model, optimizer, DataLoader(data, ROWS // count, collate_fn=collate)
        wrapped, optimizer, loader = accelerator.prepare(*prepared)
    else:
        if wrap is not None and not dist.is_initialized():
            dist.init_process_group("gloo")
        wrapped = wrap(model) if wrap else model
        sampler = DistributedSampler(data, count, int(os.environ.get("RANK", "0")), shuffle=False)
        loader = DataLoader(data, ROWS // count, sampler=sampler, collate_fn=collate)
    told: list[str] = []
    pilot = RankPilot(policy or Round(), budget or budget_of(model), schedule=SCHEDULE, tell=told.append, **options)
    run = TrainingRun.of_loader(wrapped, optimizer, loader, total_steps=steps, in_parts=parts)
    passes = count_passes(model)
    if first:
        assert checkpoint is not None
        assert load_loop(pilot, run, checkpoint) == first
    else:
        pilot.begin(run)
    digests, losses = [], []
    for number, batch in zip(range(steps), loader, strict=False):
        if number < first:
            continue
        if lengths and number % 2 and os.environ["RANK"] == "1":
            batch = {name: tensor[:1] for name, tensor in batch.items()}
        losses.append(take_step(pilot, optimizer, batch, lambda batch: wrapped(**batch).loss))
        digests.append(digest_of(find_target_modules(model)))
        if checkpoint and number + 1 == CUT:
            save_loop(pilot, run, checkpoint)
    pilot.finish()
    weights = [p.detach().clone().numpy() for p in model.parameters() if p.requires_grad]
    found = {"digests": digests, "weights": weights, "told": len(told), "decisions": len(pilot.predictions)}
    found |= {"states": states_of(optimizer)}
    found |= {"checks": pilot.checks, "passes": len(passes), "peaks": pilot.peaks, "limit": pilot.limit}
    return found | {"losses": losses, "ranks": [target.rank for target in find_target_modules(model)]}


def count_passes(model: PeftModel) -> list[int]:
    """A one for each pass of a step that is none of a test."""
    passes: list[int] = []
    known_losses._OURS |= {__name__.partition(".")[0]}  # of a hook that only looks on
    model.register_forward_pre_hook(lambda *_: None if is_measured() else passes.append(1))
    return passes


def accelerated() -> dict[str, Any]:
    return loop(None, accelerate=True, learning_rate="auto")


def ddp(model: nn.Module) -> nn.Module:
    return Ddp(model)


def close(a: Any, b: Any, most: float = 1e-12) -> None:
    assert [value.shape for value in a] == [value.shape for value in b]
    assert max(abs(x - y).max(initial=0) for x, y in zip(a, b, strict=True)) < most


def test_a_plain_loop_trains_as_in_one_process() -> None:
    (one,) = in_processes(1, loop, None)
    first, second = in_processes(2, loop, ddp)
    assert first["digests"] == second["digests"]
    assert (first["told"], second["told"]) == (DECISIONS + 4, 0), (
        "one process tells; two lines are of what is measured, one of the budget, and one of the rate"
    )
    assert first["decisions"] == second["decisions"] == DECISIONS
    close(first["weights"], one["weights"])


def in_parts(model: Any, *, frozen_alone: bool = True) -> nn.Module:
    """The model with its base sharded by FSDP2, layer by layer, and the adapters whole."""
    adapters = {p for p in model.parameters() if p.requires_grad} if frozen_alone else None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.get_base_model().model.layers, model):
        fully_shard(part, mesh=mesh, ignored_params=adapters)
    return model


def ddp_of_parts(model: nn.Module) -> nn.Module:
    """DDP joins the gradients of the adapters, and leaves alone what FSDP2 has sharded."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    Ddp._set_params_and_buffers_to_ignore_for_model(in_parts(model), [*frozen, *buffers])
    return Ddp(model)


def test_a_base_in_parts_trains_as_in_one_process_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    (one,) = in_processes(1, loop, None)
    whole, _ = in_processes(2, partial(loop, checkpoint=tmp_path / "checkpoint"), ddp_of_parts)
    assert whole["ranks"] == one["ranks"]
    close(whole["weights"], one["weights"])
    resumed, other = in_processes(2, partial(loop, checkpoint=tmp_path / "checkpoint", first=CUT), ddp_of_parts)
    assert resumed["digests"] == other["digests"] == whole["digests"][CUT:]
    assert resumed["losses"] == whole["losses"][CUT:]


def test_peaks_of_a_base_in_parts_are_predicted() -> None:
    whole = {"exact_savers": False, "gradient_checkpointing": False}
    options = {"policy": "top-down", "budget": "75%", "measure_every": 1, "steps": 5} | whole
    first, second = in_processes(2, partial(loop, **options), ddp_of_parts)
    assert first["ranks"] == second["ranks"]
    assert first["checks"] == second["checks"]
    assert len(first["checks"]) >= 2
    assert all(abs((measured + LOOP_BYTES) / predicted - 1) <= 0.01 for _, predicted, measured in first["checks"])


MIXED = (16, 2, 4, 2, 2, 2, 3, 2)
"""Of rows, in turn: those of the first process go into two parts, and those of the second into one."""


def whole_and_in_parts(wrap: Wrap) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same steps as a whole, and within half of their bytes."""
    options: dict[str, Any] = {"policy": AsConfigured(), "lengths": MIXED, "steps": 4, "measure_every": 1}
    whole = loop(wrap, **options, budget="100%")
    gc.collect()  # cycles of the whole steps would be freed, or not, while those in parts are measured
    return whole, loop(wrap, **options, budget="50%", parts=True)


@pytest.mark.parametrize(
    ("wrap", "passes"), first_cases(1, [(ddp_of_parts, (2, 2)), (ddp, (2, 1))]), ids=["base in parts", "whole base"]
)
def test_processes_train_in_parts_as_they_do_in_whole_steps(wrap: Wrap, passes: tuple[int, int]) -> None:
    """Where they run a base together, they take as many passes: two, of one row twice where there is no other."""
    found = in_processes(2, whole_and_in_parts, wrap)
    for (whole, parts), count in zip(found, passes, strict=True):
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6)  # transformers has them in fp32
        close(parts["weights"], whole["weights"], 1e-6)
        assert parts["passes"] == count * whole["passes"] == 4 * count
        assert parts["checks"] == found[0][1]["checks"]
        assert max(peak for _, peak in parts["peaks"]) <= parts["limit"] < max(peak for _, peak in whole["peaks"])


def test_a_loop_with_accelerate_trains_as_in_one_process() -> None:
    (one,) = in_processes(1, accelerated)
    first, second = in_processes(2, accelerated)
    close(first["weights"], one["weights"])
    close(first["weights"], second["weights"])


def from_checkpoint(folder: Path, first: int) -> dict[str, Any]:
    options = {"policy": "signal-mean", "budget": "40%", "measure_every": 1, "log": folder / "log"}
    return loop(ddp, checkpoint=folder / "checkpoint", first=first, **options)


def test_a_loop_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    whole = in_processes(2, from_checkpoint, tmp_path, 0)
    assert 0 in whole[0]["ranks"]
    again = in_processes(2, from_checkpoint, tmp_path, CUT)
    for process, before in zip(again, whole, strict=True):
        assert len(process["losses"]) == STEPS - CUT
        assert process["losses"] == before["losses"][CUT:]
        assert process["digests"] == whole[0]["digests"][CUT:]
    assert again[0]["losses"] != again[1]["losses"], "each process has a part of the data"


# A streamed base ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_base, "LEAST_BYTES", 1)


def streamed_before(model: PeftModel) -> nn.Module:
    rankpilot.stream_base(model, "cpu")
    return Ddp(model)


def with_streamed_base() -> list[dict[str, Any]]:
    """The same steps with the base on the device, with three layers that stream, and with all, before DDP wraps it."""
    options: dict[str, Any] = {"policy": "signal-mean", "budget": "60%", "steps": 4, "exact_savers": False}
    return [
        loop(wrap, **options, stream=stream) for wrap, stream in ((ddp, "off"), (ddp, 3), (streamed_before, "auto"))
    ]


@pytest.mark.usefixtures("_small_weights")
def test_a_streamed_base_trains_as_one_on_the_device() -> None:
    for whole, *others in in_processes(2, with_streamed_base):
        for streams in others:
            for name in ("losses", "digests", "ranks", "checks", "peaks", "limit"):
                assert streams[name] == whole[name]
            np.testing.assert_equal(streams["weights"], whole["weights"])
            np.testing.assert_equal(streams["states"], whole["states"])


def wrapped_on_a_card() -> list[bool]:
    """The meta device stands for a card: DDP refuses parameters of several kinds of devices."""
    dist.init_process_group("gloo")
    model = make_model(SETTING)
    streaming = rankpilot.stream_base(model, "meta")
    wrapped = Ddp(model, init_sync=False)
    streaming.put_back()
    return [wrapped.device_type == "meta", hasattr(model, "_ddp_params_and_buffers_to_ignore")]


@pytest.mark.usefixtures("_small_weights")
def test_ddp_wraps_a_model_whose_base_is_in_main_memory() -> None:
    assert in_processes(1, wrapped_on_a_card) == [[True, False]]


def other_base(model: PeftModel) -> nn.Module:
    """The second process has another base: DDP would send it that of the first, but leaves streamed weights alone."""
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.add_(1.0)
    return streamed_before(model)


def short_memory(model: nn.Module) -> nn.Module:
    free = 200_000 if dist.get_rank() == 0 else 150_000  # three layers are about 90 kB
    psutil.virtual_memory = lambda: SimpleNamespace(available=free)
    return Ddp(model)


@pytest.mark.usefixtures("_small_weights")
@pytest.mark.parametrize(
    ("wrap", "stream", "kind", "reason"),
    [
        (other_base, "auto", "ProcessError", "frozen weights that stream differ between processes"),
        (short_memory, 3, "UnsupportedError", r"in main memory for each of 2 processes, and .* available\. Free main"),
        (ddp_of_parts, 3, "UnsupportedError", r"^The base cannot be streamed: its weights are sharded\.$"),
    ],
    ids=["other base", "short memory", "FSDP2"],
)
def test_bases_that_cannot_stream_end_all_processes(wrap: Wrap, stream: Any, kind: str, reason: str) -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, partial(loop, wrap, steps=1, stream=stream), patience_s=30)
    assert caught.value.kinds == {0: kind, 1: kind}
    assert all(re.search(reason, text) for text in caught.value.texts.values())


# Copies that differ ---------------------------------------------------------------------------------------------------


def without_rebuilding() -> None:
    replicas_module.rebuild_reducer = lambda wrapper: None
    loop(ddp)


def test_without_a_new_reducer_the_copies_differ_and_that_is_an_error() -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, without_rebuilding)
    assert caught.value.kinds == {0: "ProcessError", 1: "ProcessError"}
    assert "the adapters of process 1 differ from those of process 0" in caught.value.texts[0]


def drifts_after_the_last_decision() -> None:
    step = torch.optim.AdamW.step
    taken: list[int] = []

    def drifting(optimizer: Any, *arguments: Any) -> Any:
        result = step(optimizer, *arguments)
        taken.append(1)
        if len(taken) == STEPS and dist.get_rank() == 1:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].add_(1e-9)
        return result

    torch.optim.AdamW.step = drifting
    loop(ddp)


def test_copies_that_differ_at_the_end_are_an_error() -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, drifts_after_the_last_decision)
    assert caught.value.kinds == {0: "ProcessError", 1: "ProcessError"}
    assert f"After step {STEPS} " in caught.value.texts[1]


# Errors of the first --------------------------------------------------------------------------------------------------


class Failing:
    name = "failing"

    def decide(self, observation: Any) -> Any:
        raise ZeroDivisionError("the policy divides by zero")


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        (
            {"budget": "2000 bytes step"},
            "BudgetError",
            "The budget of 2 kB (1.953 KiB) per step is too small for any adapter",
        ),
        ({"policy": Failing()}, "ZeroDivisionError", "the policy divides by zero"),
    ],
    ids=["budget", "policy"],
)
def test_an_error_of_the_first_process_is_one_of_all(options: dict[str, Any], kind: str, text: str) -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, looped, options, patience_s=30)
    assert caught.value.kinds == {0: kind, 1: kind}
    assert caught.value.texts[0] == caught.value.texts[1]
    assert text in caught.value.texts[0]


def looped(options: dict[str, Any]) -> None:
    loop(ddp, **options)


# The reducer ----------------------------------------------------------------------------------------------------------


def step_of(wrapped: nn.Module) -> None:
    batch = collate([texts(lengths=False)[dist.get_rank()]])
    wrapped(**batch).loss.backward()


def grown(model: PeftModel, rank: int) -> None:
    targets = find_target_modules(model)
    set_ranks(targets, {target.name: rank for target in targets})


def buckets() -> list[tuple[int, int]]:
    """Bytes that the second of two new reducers holds, and those that are counted."""
    dist.init_process_group("gloo")
    found = []
    model = make_model(SETTING)
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        wrapped = Ddp(model, **options)
        grown(model, 3)
        with LivePeak() as live:
            rebuild_reducer(wrapped)
            rebuild_reducer(wrapped)
            gc.collect()
        found.append((live.bytes, trained_bytes(wrapped)))
    return found


def test_buckets_take_one_copy_of_the_gradients() -> None:
    for held, counted in in_processes(2, buckets)[0]:
        assert counted <= held <= 1.02 * counted, "and the first has let go of its own"


def hooks() -> list[bool]:
    """Whether gradients are rounded to half precision before and after a change of ranks."""
    dist.init_process_group("gloo")
    model = make_model(SETTING)
    wrapped = Ddp(model)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    Replicas.of(wrapped)
    rounded = []
    for rank in (2, 5):
        grown(model, rank)
        rebuild_reducer(wrapped)
        step_of(wrapped)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        rounded.append(all(bool((gradient.half() == gradient).all()) for gradient in gradients))
        assert {gradient.shape[0] for gradient in gradients} | {gradient.shape[1] for gradient in gradients} >= {rank}
        model.zero_grad()
    return rounded


def test_a_communication_hook_stays() -> None:
    assert in_processes(2, hooks) == [[True, True]] * 2


# What is refused ------------------------------------------------------------------------------------------------------


def own_group(model: nn.Module) -> nn.Module:
    return Ddp(model, process_group=dist.new_group())


def power_sgd(model: nn.Module) -> nn.Module:
    wrapped = Ddp(model)
    wrapped.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
    return wrapped


def built_in_hook(model: nn.Module) -> nn.Module:
    wrapped = Ddp(model)
    wrapped._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return wrapped


def unwrapped(model: nn.Module) -> nn.Module:
    return model


def adapters_in_parts(model: nn.Module) -> nn.Module:
    return in_parts(model, frozen_alone=False)


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (own_group, "its own process_group"),
        (power_sgd, "Communication hook powerSGD_hook.*use one of allreduce_hook"),
        (built_in_hook, "Communication hook .*FP16_COMPRESS"),
        (
            unwrapped,
            ("2 processes are running, but the model is not wrapped in DistributedDataParallel, so.*use_cpu=True"),
        ),
        (in_parts, "not wrapped in DistributedDataParallel.*FSDP2 around whole adapters needs this too"),
        (adapters_in_parts, r"factors are sharded \(DTensor\).*ignored_params.*rankpilot plan .*plan.json"),
    ],
)
def test_what_cannot_follow_is_refused(wrap: Wrap, reason: str) -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, loop, wrap)
    assert caught.value.kinds == {0: "UnsupportedError", 1: "UnsupportedError"}
    assert re.search(reason, caught.value.texts[1])


@pytest.mark.parametrize("name", ["DataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"])
def test_other_wrappers_are_refused(name: str, make_llama: Callable[..., PeftModel]) -> None:
    model = make_llama()
    wrapper = type(name, (nn.Module,), {})()
    wrapper.module = model
    with pytest.raises(UnsupportedError, match=r"so ranks cannot change\. Start one process per device with torchrun"):
        Replicas.of(wrapper)


def test_memory_that_runs_out_in_one_process_ends_the_run() -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, runs_out)
    assert caught.value.kinds == {0: "BudgetError", 1: "BudgetError"}
    assert "Step 3 ran out of memory in process 1 of 2" in caught.value.texts[1]
    assert "Resume from the last checkpoint with budget='" in caught.value.texts[1]


def runs_out() -> None:
    begun: list[RankPilot] = []
    before = RankPilot.before_step

    def before_step(pilot: RankPilot, *batches: Any) -> None:
        before(pilot, *batches)
        begun.append(pilot)
        if len(begun) == 3:
            pilot.out_of_memory()

    RankPilot.before_step = before_step  # type: ignore[method-assign]
    loop(ddp)


def test_alone_nothing_happens(make_llama: Callable[..., PeftModel]) -> None:
    model = make_llama()
    alone = Replicas.of(model)
    alone.check()
    assert alone.inside(model) is model
    assert (alone.bucket_copies(several=True), alone.message_bytes, alone.begin_measuring()) == (0, 0, 0)
    assert (alone.gradients_stay, alone.highest(5), alone.on_this_device) == (False, 5, 1)
    with alone.apart():
        alone.changed(find_target_modules(model), 0)


def profiled() -> list[int]:
    """Numbers that each all-reduce of a run of `STEPS` steps sends."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        loop(ddp)
    return [event.input_shapes[0][0] for event in recorded.events() if event.name == "gloo:all_reduce"]


@pytest.mark.long
def test_on_the_wire_are_the_gradients_of_the_adapters() -> None:
    """In each step, the parameters of the plan and two numbers, which tell the shape of the largest batch."""
    sizes = in_processes(2, profiled)[0]
    model = make_model(SETTING)
    parameters = int(budget_of(model).split()[0])
    assert [size for size in sizes if size > 2] == [parameters] * STEPS
    assert sizes.count(2) == STEPS
    assert sizes.count(1) <= DECISIONS, "the highest peak of the steps that were measured"


# What all agree on ----------------------------------------------------------------------------------------------------


def differing_memory() -> float:
    """The limit that "auto" sets where the second process has less free memory."""
    free = 10e9 if int(os.environ["RANK"]) == 0 else 6e9
    budget_module.free_bytes = before_training.free_bytes = lambda device: int(free)
    limits: list[float] = []
    record = PilotedRun._record

    def note(piloted: PilotedRun, *arguments: Any) -> None:
        record(piloted, *arguments)
        limits.append(float(piloted.applier.limit))

    PilotedRun._record = note  # type: ignore[method-assign]
    loop(ddp, policy="signal-mean", budget="auto", steps=2)
    assert len(set(limits)) == 1
    return limits[0]


def test_auto_is_what_every_process_has_free() -> None:
    """Two processes share the host's memory."""
    assert in_processes(2, differing_memory) == [pytest.approx(0.9 * 6e9 / 2)] * 2


def larger_peak(excess: int) -> list[str]:
    """The corrections where the second process takes more bytes from step 4 on."""
    highest = Replicas.highest
    seen: list[int] = []

    def more(replicas: Replicas, peak: int) -> int:
        seen.append(peak)
        return highest(replicas, peak + (excess if replicas.processes.rank == 1 and len(seen) > 3 else 0))

    Replicas.highest = more  # type: ignore[method-assign]
    plans: list[str] = []
    corrected = PilotedRun._corrected

    def note(piloted: PilotedRun, change: PlanChange) -> None:
        corrected(piloted, change)
        plans.append(f"{change.step} {change.reason} {change.plan.ranks.tolist()}")

    PilotedRun._corrected = note  # type: ignore[method-assign]
    loop(ddp, policy="signal-mean", budget="80%", measure_every=1, steps=5)
    return plans


@pytest.mark.long
def test_a_peak_above_the_budget_in_one_process_corrects_all() -> None:
    first, second = in_processes(2, larger_peak, 200_000)
    assert first == second
    assert first[0].startswith(("4 shrunk: peak above the budget", "4 rolled back: peak above the budget"))


def broken_probe() -> None:
    """The loss is NaN in the probe, which the first process runs."""

    def broken(*_: Any, **__: Any) -> Any:
        assert dist.get_rank() == 0
        raise NonFiniteError("The loss of the probe is nan.")

    probing.run_probe = broken
    loop(ddp)


def test_an_error_of_the_probe_is_one_of_all() -> None:
    with pytest.raises(ProcessFailed) as caught:
        in_processes(2, broken_probe, patience_s=30)
    assert caught.value.kinds == {0: "NonFiniteError", 1: "NonFiniteError"}
    assert caught.value.texts[1] == "The loss of the probe is nan."
