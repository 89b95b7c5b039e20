"""Trainers of TRL, and Trainers with a step of their own: what trains, and what is refused before it trains nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rankpilot.common.errors import NoGradientError, UnsupportedError
from rankpilot.cost.batch_shape import in_texts, map_tensors, padded, reshaped
from rankpilot.cost.record.calibration import LOOP_BYTES
from rankpilot.cost.recording import BatchShape
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from transformers import BatchEncoding, BatchFeature, Trainer, TrainerCallback

from ..cases import first_cases
from .tiny_runs import is_measured
from .trainer_kinds import STEPS, TEXTS, classification, conversations, dpo, kto, llama, rollouts, sft, word_tokenizer

SCHEDULE = rankpilot.DecisionSchedule(probe_steps=2, fractions=(0.0, 0.5))


def attached(trainer: Trainer, budget: str = "100%", **options: Any) -> rankpilot.RankPilotCallback:
    return rankpilot.attach(trainer, "signal-mean", budget=budget, measure_every=1, schedule=SCHEDULE, **options)


# TRL ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_under_a_share_trains_and_saves_its_adapter(tmp_path: Path, checkpointing: bool) -> None:
    trainer = sft(tmp_path / "run", gradient_checkpointing=checkpointing, bf16=False, max_steps=16)
    pilot = attached(trainer)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert all(float(row["grad_norm"]) > 0 for row in logs)
    losses = [float(row["loss"]) for row in logs]
    assert sum(losses[-3:]) < 0.96 * sum(losses[:3])
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit

    trainer.model.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([word_tokenizer()(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        trained = trainer.model.eval()(tokens).logits
        assert not torch.allclose(llama().eval()(tokens).logits, trained, atol=0.05)
        reloaded = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).eval()
        assert torch.equal(reloaded(tokens).logits, trained)
    assert any(adapter_ranks(find_target_modules(reloaded)).values())


@pytest.mark.parametrize("long", ["prompts", "answers"])
def test_kto_meets_no_batch_that_is_larger_than_planned(tmp_path: Path, long: str) -> None:
    """Prompts shrink while answers grow, and the other way round."""
    more = [" ".join(TEXTS[0].split()[:3] * (1 + number // 3)) for number in range(40)]
    less = ["after " * (6 - number // 8) for number in range(40)]
    prompts, answers = (more, less) if long == "prompts" else (less, more)
    trainer = kto(tmp_path, [f"{text} " for text in prompts], answers, max_steps=10, bf16=False)
    pilot = attached(trainer, exact_savers=False)
    trainer.train()
    assert trainer.state.global_step == 10
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit
    longest = max(len(row["prompt_ids"] + row["completion_ids"]) for row in trainer.train_dataset)
    assert pilot.pilot.guard.plan.now.shape.length == longest


WHOLE = {"gradient_checkpointing": False}
PHASES = {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.1}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a vocabulary as small as the tests' take what they take, and no tile of thousands of words."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("kind", "budget", "options"),
    first_cases(
        2,
        [
            ("GRPO", "85%", WHOLE | PHASES),
            ("RLOO", "100%", {"bf16": True}),
            ("GRPO", "100%", {"rank": 10, "bf16": True} | WHOLE),
            ("RLOO", "75%", WHOLE | {"gradient_accumulation_steps": 2, "beta": 0.1}),
        ],
    ),
)
def test_rollouts_leave_ranks_and_adapters_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, budget: str, options: dict[str, Any]
) -> None:
    found = []
    for attaches in (False, True):
        trainer = rollouts(kind, tmp_path / str(attaches), **options)
        pilot = rankpilot.attach(trainer, budget=budget, measure_every=1, parts="off") if attaches else None
        trainer.train()
        found.append({name: value for name, value in trainer.model.named_parameters() if "lora_" in name})
    assert pilot is not None
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert {target.rank for target in find_target_modules(trainer.model)} == {options.get("rank", 8)}
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit
    errors = [(measured + LOOP_BYTES) / predicted - 1 for _, predicted, measured in pilot.pilot.checks]
    assert errors
    assert max(map(abs, errors)) <= 0.01
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rankpilot: ")]
    assert any(line.startswith("rankpilot: The LoRA stays as configured") for line in told)
    assert bool(pilot.pilot.figures().get("checkpointed_layers")) == (budget != "100%")


MANY = WHOLE | {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 40}
TIMES = ("step_time", "grad_norm")
SEQUENCES = {"importance_sampling_level": "sequence"}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "options",
    first_cases(
        4,
        [
            {},
            {"loss_type": "cispo"} | PHASES,
            {"loss_type": "grpo", "mask_truncated_completions": True},
            {"loss_type": "luspo", "beta": 0.2} | SEQUENCES,
            {"loss_type": "dr_grpo"},
            {"loss_type": "sapo", "gradient_accumulation_steps": 2},
            {"loss_type": "vespo"},
            {"off_policy_mask_threshold": 0.5, "beta": 0.1} | PHASES,
            {"max_completion_length": 2},
        ],
    ),
)
def test_answers_run_in_parts_with_the_same_gradients(tmp_path: Path, observing: None, options: dict[str, Any]) -> None:
    """No batch fits whole, and in the second step a part runs out of memory."""
    plain = rollouts("GRPO", tmp_path / "plain", **MANY | options)
    plain.train()
    trainer = rollouts("GRPO", tmp_path / "parts", **MANY | options)
    pilot = rankpilot.attach(trainer, budget="30%", measure_every=1)
    passes = list[int]()

    def fail(model: Any, inputs: Any, given: Any) -> None:
        if trainer.state.global_step == 1 and torch.is_grad_enabled() and not is_measured():
            passes.append(len(given["input_ids"]))
            if len(passes) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.get_base_model().register_forward_pre_hook(fail, with_kwargs=True)
    generated = list[int]()
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: (generated.append(len(rows)), generate(rows))[1]
    trainer.train()
    assert passes[0] < 8, "the batch is split"
    assert pilot.pilot.guard.parts.tally.too_large == pilot.pilot.guard.parts.tally.batches > 0
    assert len(generated) == STEPS, "answers are generated once"
    assert trainer._step == plain._step
    first, second = ([row for row in each.state.log_history if "loss" in row] for each in (plain, trainer))
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], abs=2e-5)
    metrics = [[{n: row[n] for n in first[0] if n not in TIMES} for row in each] for each in (first, second)]
    for whole, parts in zip(*metrics, strict=True):
        assert parts == pytest.approx(whole, rel=2e-3, abs=1e-4, nan_ok=True)
    weights = [{n: p.detach() for n, p in each.model.named_parameters() if "lora_" in n} for each in (plain, trainer)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": "bnpo"}, "the loss of bnpo is not known to be a sum over answers"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile compares"),
        ({"entropy_coef": 0.1}, "the entropy bonus is a mean"),
        ({"own": True}, "_compute_loss of .* is not from transformers or TRL"),
    ],
)
def test_answers_that_meet_in_the_loss_run_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], reason: str
) -> None:
    own = options.pop("own", False)
    trainer = rollouts("GRPO", tmp_path, **MANY | {"max_steps": 1} | options)
    if own:
        compute = type(trainer)._compute_loss
        kind = type(
            "Mine", (type(trainer),), {"_compute_loss": lambda self, model, inputs: compute(self, model, inputs)}
        )
        trainer.__class__ = kind
    rankpilot.attach(trainer, budget="60%")
    trainer.train()
    assert re.search(f"Steps run whole, not in parts: {reason}", " ".join(capsys.readouterr().out.split()))


@pytest.mark.usefixtures("small_tiles")
def test_inputs_that_a_callback_changes_are_changed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its wrapper is no code of TRL, so steps run whole from then on; the answers under way are prepared."""
    losses = []
    for attaches in (False, True):
        trainer = rollouts("GRPO", tmp_path / str(attaches), **MANY)

        class Doubles(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, trainer: Any = trainer, **_: Any) -> None:
                if state.global_step == 2:
                    prepare = trainer._prepare_inputs
                    trainer._prepare_inputs = lambda given: (
                        (made := prepare(given)) | {"advantages": 2 * made["advantages"]}
                    )

        trainer.add_callback(Doubles())
        if attaches:
            rankpilot.attach(trainer, budget="80%")
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert "Steps run whole, not in parts: from step 3 on" in capsys.readouterr().out


def test_equal_rewards_are_no_error(tmp_path: Path) -> None:
    """All answers to a prompt may get the same reward, for any number of steps: then gradients are zero."""
    trainer = rollouts("GRPO", tmp_path, **WHOLE, max_steps=6)
    trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    rankpilot.attach(trainer, budget="85%", measure_every=1)
    trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.long
@pytest.mark.usefixtures("small_tiles")
def test_a_run_with_rollouts_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    found = []
    for resume in (None, tmp_path / "run" / "checkpoint-2"):
        trainer = rollouts("GRPO", tmp_path / "run", **WHOLE, save_strategy="steps", save_steps=2)
        rankpilot.attach(trainer, budget="85%")
        trainer.train(resume_from_checkpoint=resume and str(resume))
        found.append([value.detach().clone() for value in trainer.model.parameters() if value.requires_grad])
    assert all(map(torch.equal, *found))


def test_what_would_move_ranks_under_rollouts_is_refused(tmp_path: Path) -> None:
    trainer = rollouts("GRPO", tmp_path)
    with pytest.raises(UnsupportedError, match=r"generates its data.*leave out policy, bounds.*allocate"):
        rankpilot.attach(trainer, "signal-mean", budget="80%", bounds={"q_proj": 4})
    with pytest.raises(UnsupportedError, match=r"generates its data during training, so no plan.*allocate"):
        rankpilot.allocate(trainer, budget="80%")
    pilot = rankpilot.attach(trainer, budget="3k params")
    trainer.train()
    assert pilot.predictions[-1][1] <= pilot.limit == 3000, "ranks shrink where nothing else fits"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("place", "name"),
    [("experimental.gkd", "GKD"), ("trainer", "Distillation"), ("experimental.online_dpo", "OnlineDPO")],
)
def test_other_trainers_that_make_their_data_are_refused(tmp_path: Path, place: str, name: str) -> None:
    """Their models write answers inside the training step, or before it from prompts alone."""
    module = import_module(f"trl.{place}")
    more = {"reward_funcs": len} if name == "OnlineDPO" else {"teacher_model": llama()}
    trainer = getattr(module, f"{name}Trainer")(
        llama(),
        args=getattr(module, f"{name}Config")(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False),
        train_dataset=conversations() if name == "GKD" else Dataset.from_list([{"prompt": text} for text in TEXTS]),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear"),
        **more,
    )
    rankpilot.attach(trainer, budget="80%")
    with pytest.raises(UnsupportedError, match=r"generates its data .*`rankpilot\.allocate`"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "options"), [(sft, {"bf16": True}), (dpo, {"bf16": False}), (classification, {"bf16": False})]
)
def test_exact_savers_leave_losses_and_adapters_as_they_are(
    tmp_path: Path, kind: Callable[..., Trainer], options: dict[str, Any]
) -> None:
    """The plans are equal, since a budget of parameters buys the same with them; tiles may round otherwise."""
    found = []
    for on in (False, True):
        trainer = kind(tmp_path, max_steps=3, **options)
        rankpilot.attach(trainer, "signal-mean", "3k params", exact_savers=on, schedule=SCHEDULE)
        trainer.train()
        trained = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        found.append([torch.tensor([float(row["loss"]) for row in trainer.state.log_history[:3]]), *trained])
    for plain, saving in zip(*found, strict=True):
        torch.testing.assert_close(saving, plain, rtol=0.01 if options["bf16"] else 1e-5, atol=1e-6)


# Steps of one's own ---------------------------------------------------------------------------------------------------


class OwnStep(Trainer):  # type: ignore[misc]
    """Halves the loss of every other batch, in a step of its own, and notes its batches."""

    notes: dict[str, list[int]]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.seen = getattr(self, "seen", 0) + 1
        self.notes["seen"].append(self.seen)
        self.accelerator.backward(loss / (1 + self.seen % 2))
        return loss.detach()


class OwnBackward(OwnStep):
    """Calls `backward` itself, so nobody hears of its loss."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class WithoutAdapter(Trainer):  # type: ignore[misc]
    """Its loss trains the classifier alone."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        classifier = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
        return model(**inputs).loss.detach() + sum(parameter.square().sum() for parameter in classifier)


class Detached(Trainer):  # type: ignore[misc]
    """Its loss is a constant."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return model(**inputs).loss.detach()


class TimesZero(Trainer):  # type: ignore[misc]
    """Its loss is constant, though it hangs on the model."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return 1 + 0 * model(**inputs).logits.sum()


def test_a_training_step_of_its_own_is_measured_and_trains(tmp_path: Path) -> None:
    trainer = classification(tmp_path, OwnStep)
    trainer.notes = {"seen": []}
    pilot = attached(trainer, parts="off")  # a part is a call of the Trainer's step
    trainer.train()
    assert trainer.notes == {"seen": list(range(1, trainer.seen + 1))}
    assert "training_step" not in vars(trainer), "afterwards the Trainer is its own again"
    assert trainer.seen == trainer.state.global_step, "what was measured before training was put back"
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit
    assert all(abs(peak / cost - 1) <= 0.01 for _, cost, peak in pilot.pilot.checks)


class ReadsAttributes(Trainer):  # type: ignore[misc]
    """Reads a part of its batches by attribute, and takes its labels out."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        tokens, labels = inputs.input_ids, inputs.pop("labels")
        outputs = model(tokens, attention_mask=inputs["attention_mask"], labels=labels)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize("parts", ["auto", "off"])
@pytest.mark.parametrize("kind", [BatchEncoding, BatchFeature])
def test_batches_keep_their_type(tmp_path: Path, kind: Callable[[Any], Any], parts: str) -> None:
    trainer = classification(tmp_path, ReadsAttributes)
    pad, trainer.eval_dataset = trainer.data_collator, trainer.train_dataset.select(range(6))
    trainer.data_collator = lambda rows: kind(dict(pad(rows)))
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    attached(trainer, parts=parts)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert sum("eval_loss" in row for row in trainer.state.log_history) == STEPS // 2


def test_batches_of_other_shapes_keep_their_type() -> None:
    ones = torch.ones(2, 5, dtype=torch.int64)
    batch = {"input_ids": ones, "attention_mask": ones, "position_ids": torch.arange(5).expand(2, -1)}
    larger, negative = partial(reshaped, shape=BatchShape(6, 9)), partial(map_tensors, change=torch.neg)
    for changed in (padded, in_texts, larger, negative):
        for kind in (dict, BatchEncoding, BatchFeature):
            assert type(changed(kind(batch))) is kind
        assert type(changed(defaultdict(list, batch))) is dict, "nobody but the class knows how to make one"


@pytest.mark.parametrize("budget", ["100%", "3k params"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OwnBackward, "OwnBackward called `accelerator.backward` 0 times"),
        (Detached, "Detached has a constant loss"),
    ],
)
def test_a_step_whose_loss_is_out_of_reach_is_refused(tmp_path: Path, kind: Any, reason: str, budget: str) -> None:
    trainer = classification(tmp_path, kind)
    attached(trainer, budget)
    with pytest.raises(UnsupportedError, match=reason):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("budget", ["100%", "3k params"])
@pytest.mark.parametrize("kind", [WithoutAdapter, TimesZero])
def test_a_loss_that_does_not_train_the_adapters_is_an_error(tmp_path: Path, kind: Any, budget: str) -> None:
    trainer = classification(tmp_path, kind)
    attached(trainer, budget)
    with pytest.raises(NoGradientError):
        trainer.train()
    assert trainer.state.global_step < 3
