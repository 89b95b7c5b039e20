"""Steps in parts train as whole steps do, in fewer bytes; an error takes a part smaller and loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from peft import PeftModel
from rankpilot.common.errors import BudgetError, ConfigError
from rankpilot.decide.rules import AsConfigured
from rankpilot.finetune.step.exact_parts import Exactness
from rankpilot.finetune.step.parts import StepParts
from rankpilot.finetune.step.run import TrainingRun
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, LlamaConfig, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from .test_exact_parts import collate, in_batch_negatives
from .tiny_runs import Recorder, adapted, arguments, is_measured, messages_of, ranks_of

ROWS, STEPS = 6, 4


def texts(lengths: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of these lengths."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(1, 64, size=length) for length in lengths]
    return [{"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in rows]


MIXED = texts(np.random.default_rng(1).integers(2, 25, size=ROWS * STEPS))


class Launched:
    """A Trainer over rows of mixed lengths whose plan stays, in parts or not."""

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        *,
        data: Any = None,
        held_out: Any = None,
        trainer: type[Trainer] = Trainer,
        parts: str = "auto",
        budget: str = "100%",
        policy: Any = None,
        checkpointing: Any = "auto",
        collate: Any = collate,
        goal: Any = "quality",
        measure_every: int = 1,
        **options: Any,
    ) -> None:
        self.model = adapted(config)
        self.recorder = Recorder(lambda step: None)
        settings = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "logging_nan_inf_filter": False}
        self.trainer = trainer(
            model=self.model,
            args=arguments(folder, **settings | options),
            data_collator=collate,
            train_dataset=MIXED if data is None else data,
            eval_dataset=held_out,
            callbacks=[self.recorder],
        )
        self.callback = rankpilot.attach(
            self.trainer,
            policy or AsConfigured(),
            budget=budget,
            parts=parts,  # type: ignore[arg-type]
            measure_every=measure_every,
            keep_rate=True,
            goal=goal,
            gradient_checkpointing=checkpointing,
        )

    def train(self, resume: Any = None) -> Launched:
        self.trainer.train(resume_from_checkpoint=resume)
        return self

    @property
    def guard(self) -> Any:
        return self.callback.pilot._piloted.guard  # type: ignore[union-attr]

    @property
    def logged(self) -> dict[str, float]:
        return next(row for row in reversed(self.trainer.state.log_history) if "parts" in row)

    def adapters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name}


def assert_close(one: Launched, other: Launched, tolerance: float = 2e-4) -> None:
    there = other.adapters()
    for name, value in one.adapters().items():
        assert torch.allclose(value, there[name], atol=tolerance), name


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig) -> Callable[..., Launched]:
    count = iter(range(99))
    return lambda **options: Launched(options.pop("folder", tmp_path / str(next(count))), llama_config, **options)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part costs nothing, so that there are as many as padding asks for."""
    monkeypatch.setattr("rankpilot.cost.streaming.PROCESSOR_LAUNCH", 0.0)


def test_losses_are_those_of_whole_steps_in_fewer_bytes(launch: Callable[..., Launched]) -> None:
    parts, whole = launch(budget="60%").train(), launch(parts="off").train()
    assert parts.recorder.losses == pytest.approx(whole.recorder.losses, abs=2e-5)
    assert_close(parts, whole)
    assert parts.logged["parts"] > 1
    assert parts.logged["padding_saved"] > 0.3
    assert 0 < parts.logged["batches_too_large"] <= STEPS
    assert max(p for _, p in parts.callback.peaks) <= parts.callback.limit < max(p for _, p in whole.callback.peaks)
    for _, predicted, measured in parts.callback.pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("limits", [True, False])
def test_packed_texts_go_into_parts(limits: bool, launch: Callable[..., Launched]) -> None:
    """Their losses are those of the whole row, in a budget in which that row does not fit."""
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=limits, return_seq_idx=limits)

    def collate(rows: list[dict[str, Any]]) -> Any:
        return packed([{name: row[name] for name in ("input_ids", "labels")} for row in rows])

    own: dict[str, Any] = {"collate": collate, "max_grad_norm": 0.1}
    parts, whole = launch(budget="40%", **own).train(), launch(parts="off", **own).train()
    assert parts.recorder.losses == pytest.approx(whole.recorder.losses, abs=2e-5)
    assert_close(parts, whole)
    assert parts.logged["parts"] > 1
    assert parts.logged["batches_too_large"] > 0
    assert max(p for _, p in parts.callback.peaks) <= parts.callback.limit < max(p for _, p in whole.callback.peaks)
    for _, predicted, measured in parts.callback.pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)
    small = launch(budget="40%", parts="off", **own).train()
    assert sum(ranks_of(small.model).values()) < sum(ranks_of(parts.model).values())
    parts.guard.parts.decide(Exactness("sum"), 1)
    assert parts.guard.parts.shape_of(collate(MIXED[:2])).length == sum(len(row["labels"]) for row in MIXED[:2])


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 1e-3}])
def test_what_the_trainer_does_around_a_batch_stays(launch: Callable[..., Launched], options: dict[str, Any]) -> None:
    parts, whole = launch(budget="60%", **options).train(), launch(parts="off", **options).train()
    assert parts.trainer.state.global_step == whole.trainer.state.global_step
    assert parts.recorder.losses == pytest.approx(whole.recorder.losses, abs=2e-2 if "bf16" in options else 2e-5)
    assert parts.logged["parts"] > 1


def test_a_collator_draws_as_in_whole_steps(launch: Callable[..., Launched]) -> None:
    def drawing(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        return batch | {"labels": batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)}

    parts, whole = (launch(parts=how, collate=drawing, budget="100%").train() for how in ("auto", "off"))
    assert parts.recorder.losses == pytest.approx(whole.recorder.losses, abs=2e-5)


def test_layers_follow_the_part(launch: Callable[..., Launched], observing: None) -> None:
    """A long row is checkpointed, and short ones are not."""
    data = texts([30, 4, 4, 4, 4, 4] * STEPS)
    run = launch(data=data, budget="24%")
    seen: list[tuple[int, int]] = []

    def note(model: Any, inputs: Any, options: Any) -> None:
        layers = [layer.gradient_checkpointing for layer in model.model.layers]
        if model.training and run.trainer.state.global_step and not is_measured():
            seen.append((options["input_ids"].shape[1], sum(layers)))

    base = run.model.get_base_model()
    base.register_forward_pre_hook(note, with_kwargs=True)
    run.train()
    assert {layers for length, layers in seen if length == 30} == {1}
    assert {layers for length, layers in seen if length == 4} == {0}
    assert max(p for _, p in run.callback.peaks) <= run.callback.limit


def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path: Path, launch: Callable[..., Launched]) -> None:
    whole = launch(budget="60%", folder=tmp_path / "whole", save_steps=2).train()
    again = launch(budget="60%", folder=tmp_path / "whole", save_steps=2).train(
        str(tmp_path / "whole" / "checkpoint-2")
    )
    there = again.adapters()
    assert all(torch.equal(value, there[name]) for name, value in whole.adapters().items())
    assert again.logged["padding_saved"] == whole.logged["padding_saved"]


@pytest.mark.parametrize("launch_seconds", [0.0, 1.0])
def test_the_fewest_bytes_take_no_more_time_than_a_checkpointed_rectangle(
    launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, launch_seconds: float
) -> None:
    """Parts take what the longest row of the run alone does; where a part costs a second, there is one."""
    monkeypatch.setattr("rankpilot.cost.streaming.PROCESSOR_LAUNCH", launch_seconds)
    run = launch(data=texts([24, 24, *[4] * 22]), goal="bytes", policy="default").train()
    assert (run.guard.parts.tally.parts > STEPS) == (launch_seconds == 0)
    (_, alone), *_ = run.callback.predictions
    if launch_seconds == 0:
        assert max(peak for _, peak in run.callback.peaks) <= 1.02 * alone


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_that_runs_out_of_memory_is_taken_again_smaller(
    launch: Callable[..., Launched], part: int, caplog: pytest.LogCaptureFixture, observing: None
) -> None:
    """In the second step the part of this number fails once."""
    undisturbed, run = launch(budget="45%").train(), launch(budget="45%")
    number, failed = [0, -1], list[int]()

    def fail(model: Any, inputs: Any, options: Any) -> None:
        step = run.trainer.state.global_step
        number[:] = [number[0] + 1, step] if number[1] == step else [1, step]
        if is_measured():
            number[0] -= 1
        elif model.training and step == 1 and number[0] == part and not failed:
            failed.append(part)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run.model.get_base_model().register_forward_pre_hook(fail, with_kwargs=True)
    run.train()
    assert messages_of(caplog, "retried in smaller parts")
    assert run.callback.predictions == undisturbed.callback.predictions, "the plan stays"
    assert run.recorder.losses == pytest.approx(undisturbed.recorder.losses, abs=2e-5)
    assert_close(run, undisturbed)


def test_a_row_that_fails_alone_is_named_with_the_error(launch: Callable[..., Launched], observing: None) -> None:
    run = launch(budget="60%")

    def fail(model: Any, inputs: Any, options: Any) -> None:
        if run.trainer.state.global_step == 1 and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run.model.get_base_model().register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.train()
    assert any("tokens, and ran on its own with 2 layers checkpointed" in note for note in caught.value.__notes__)


def test_what_an_error_took_from_parts_comes_back(launch: Callable[..., Launched]) -> None:
    parts: StepParts = launch(budget="60%").train().guard.parts
    assert parts.ran.shrink()
    assert parts.state()["parts"]["most"] is not None
    parts.before_step(STEPS + 25, [])
    assert parts.state()["parts"]["most"] is None


def test_a_row_that_never_fits_is_named(launch: Callable[..., Launched]) -> None:
    """The first rows are looked at before the run, and a stream hides how long later ones are."""

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([*texts([5] * ROWS), *texts([5, 300, 5, 5, 5, 5])])

    run = launch(data=Stream(), budget="145 KiB step")
    with pytest.raises(BudgetError, match=r"Row 1 has 300 tokens; the longest row that fits on its own has \d+\."):
        run.train()


def test_where_the_trainer_looks_for_its_batch_size_steps_are_whole(
    launch: Callable[..., Launched], capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(auto_find_batch_size=True).train()
    assert not run.guard.parts.on
    assert capsys.readouterr().out.count("Steps run whole") == 1


def test_an_option_that_is_no_way_to_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="parts must be"):
        rankpilot.PilotOptions(parts="on")  # type: ignore[arg-type]


def loop(model: PeftModel, *, in_parts: bool = True, wrapped: Any = None, budget: str = "60%") -> list[float]:
    """Train in a loop of one's own; returns its losses."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2)
    loader = DataLoader(MIXED, batch_size=ROWS, collate_fn=collate)  # type: ignore[arg-type]
    called = wrapped or model
    pilot = rankpilot.RankPilot(AsConfigured(), budget, measure_every=1, keep_rate=True)
    pilot.begin(TrainingRun.of_loader(called, optimizer, loader, total_steps=STEPS, in_parts=in_parts))
    losses = []
    for batch in loader:
        pilot.before_step(batch)
        total = 0.0
        for part, share in pilot.parts(batch):
            loss = share * called(**part).loss
            loss.backward()
            total += float(loss.detach())
        pilot.before_optimizer_step(total)
        optimizer.step()
        optimizer.zero_grad()
        pilot.after_step()
        losses.append(total)
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit
    pilot.finish()
    return losses


def test_a_loop_of_ones_own_runs_in_parts(llama_config: LlamaConfig) -> None:
    one, other = adapted(llama_config), adapted(llama_config)
    assert loop(one) == pytest.approx(loop(other, in_parts=False, budget="100%"), abs=2e-5)
    there = dict(other.named_parameters())
    assert all(torch.allclose(p, there[name], atol=2e-4) for name, p in one.named_parameters() if "lora_" in name)


def test_rows_without_predictions_are_left_out(launch: Callable[..., Launched]) -> None:
    """Their mean would be no number, in the part that they have to themselves."""
    data = [{**row, "labels": [-100] * len(row["labels"])} if len(row["labels"]) < 9 else row for row in MIXED]

    parts, whole = (launch(data=data, parts=how, budget="100%").train() for how in ("auto", "off"))
    assert parts.recorder.losses == pytest.approx(whole.recorder.losses, abs=2e-5)
    assert_close(parts, whole)


def test_processes_hear_of_the_last_part_alone(llama_config: LlamaConfig, tmp_path: Path, observing: None) -> None:
    """Under DistributedDataParallel the others add to gradients without an exchange."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = adapted(llama_config)
        wrapped = DistributedDataParallel(model)
        exchanges: list[bool] = []
        model.get_base_model().register_forward_pre_hook(
            lambda module, inputs: exchanges.append(wrapped.require_backward_grad_sync)
        )
        losses = loop(model, wrapped=wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert losses == pytest.approx(loop(adapted(llama_config)), abs=2e-5)
    last = exchanges[-10:]
    assert not all(last)
    assert exchanges[-1]


# Compiled models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "limit", "on"),
    [({}, 8, True), ({}, 3, False), ({"mode": "reduce-overhead"}, 8, False), ({"dynamic": False}, 8, False)],
)
def test_a_compiled_model_runs_in_parts_if_few_graphs_serve_all_shapes(
    launch: Callable[..., Launched], options: dict[str, Any], limit: int, on: bool
) -> None:
    """Its steps are measured here, and so run uncompiled."""
    run = launch(max_steps=1)
    run.model.compile(**options)
    with torch._dynamo.config.patch(recompile_limit=limit):
        run.train()
    assert ("parts" in run.trainer.state.log_history[0]) == on


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_parts_of_all_shapes_take_four_graphs(launch: Callable[..., Launched]) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"data": MIXED * 2, "max_steps": 2 * STEPS}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "measure_every": 99}
    before = counters["stats"]["unique_graphs"]
    parts, whole = launch(budget="30%", **options, **compiled).train(), launch(parts="off", **options).train()
    assert 1 < parts.recorder.graphs[-1] - before <= 4
    assert parts.recorder.losses == pytest.approx(whole.recorder.losses, abs=2e-5)
    assert parts.logged["parts"] > 3


# A loss that becomes another one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["compute_loss_func", "label_smoother", "loss_function", "forward", "hook"])
def test_a_known_loss_that_is_replaced_runs_whole(
    launch: Callable[..., Launched], capsys: pytest.CaptureFixture[str], many: None, changed: str
) -> None:
    run, expected = (launch(parts=how, budget="100%", max_steps=4) for how in ("auto", "off"))

    def change(own: Launched, step: int) -> None:
        if step != 2:
            return
        if changed == "compute_loss_func":
            own.trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean()
        elif changed == "label_smoother":
            own.trainer.label_smoother = LabelSmoother(0.2)
        elif changed == "loss_function":
            own.model.get_base_model().loss_function = lambda logits, labels, **_: logits.square().mean()
        elif changed == "hook":
            own.model.register_forward_hook(lambda *_: None)
        else:
            forward = own.model.forward
            own.model.forward = lambda *rest, **options: forward(*rest, **options)

    on: list[bool] = []
    expected.recorder.at_step = lambda step: change(expected, step)
    run.recorder.at_step = lambda step: (on.append(run.guard.parts.on), change(run, step))[0]
    run.train()
    assert on == [True, True, False, False]
    assert capsys.readouterr().out.count("from step 3 on") == 1
    assert run.recorder.losses == pytest.approx(expected.train().recorder.losses, abs=2e-5)


def test_a_run_that_goes_on_with_another_loss_is_tested_first(tmp_path: Path, launch: Callable[..., Launched]) -> None:
    class Contrastive(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            return in_batch_negatives(model, inputs)

    launch(budget="100%", folder=tmp_path / "one", save_steps=2).train()
    again = launch(budget="100%", folder=tmp_path / "one", trainer=Contrastive)
    assert not again.train(str(tmp_path / "one" / "checkpoint-2")).guard.parts.on
