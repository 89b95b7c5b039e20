"""Life under the transformers Trainer: accumulation, checkpointing, precisions, kills, best models, compiling."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.savers.exact import graphs_per_plan
from rankpilot.decide.observation import RUN_FEATURES, Observation
from rankpilot.decide.policy import Decision, decision_from_plan
from rankpilot.decide.rules import SignalRule
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.callback import warn_of_recompiles
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import EarlyStoppingCallback, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from ..cases import first_cases
from .tiny_runs import Run, adapted, counting, logits, messages_of, ranks_of

STEPS, LENGTH = 8, 12
LOW_TO_HIGH = ((0, 16), (4, 12), (16, 0), (0, 16))
"""Ranks of every module in the lower and in the upper layer, by decision: both layers are dropped and revived."""


class Script:
    """Ranks by layer, in turn. Their sum never changes, so each plan spends exactly the same number of parameters."""

    name = "script"

    def __init__(self, plans: tuple[tuple[int, int], ...] = LOW_TO_HIGH) -> None:
        assert {sum(plan) for plan in plans} == {16}
        self.plans = plans

    def decide(self, observation: Observation) -> Decision:
        problem = observation.problem
        left = round(4 * float(observation.run[RUN_FEATURES.index("decisions_left")]))
        lower, upper = self.plans[-1 - left]
        return decision_from_plan(np.where(problem.blocks == 0, lower, upper))


Plans = tuple[tuple[int, int], ...]


def scripted(folder: Path, config: LlamaConfig, plans: Plans = LOW_TO_HIGH, **options: Any) -> Run:
    """A run of a script: decisions at even distances, each as far as it likes, and a budget for just that."""
    lora = {"lora_dropout": 0.1} | options.pop("lora", {})
    targets = find_target_modules(adapted(config, **lora))
    budget = f"{16 * sum(t.d_in + t.d_out for t in targets if t.block == 0)} params"
    schedule = DecisionSchedule(probe_steps=2, fractions=tuple(i / len(plans) for i in range(len(plans))), max_step=10)
    usual = {"policy": Script(plans), "budget": budget, "schedule": schedule, "max_steps": STEPS, "measure_every": 100}
    return Run(folder, config, lora=lora, **usual | options)


def layers(run: Run) -> list[tuple[int, ...]]:
    """The ranks in the lower and upper layer in each step."""
    blocks = {t.name: t.block for t in find_target_modules(run.model)}
    return [
        tuple(max(rank for name, rank in ranks.items() if blocks[name] == block) for block in (0, 1))
        for ranks in run.recorder.ranks
    ]


class Killed(Exception):
    """What a test throws to end a run in its middle."""


Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig) -> Launch:
    def start(name: str = "run", *, resume: int | None = None, **options: Any) -> Run:
        return scripted(tmp_path / name, llama_config, **options).train(resume)

    return start


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """A run with nothing special, for comparison."""
    return scripted(tmp_path_factory.mktemp("plain") / "run", llama_config).train()


def test_the_script_drops_and_revives_both_layers(plain_run: Run) -> None:
    assert layers(plain_run) == [(0, 16)] * 2 + [(4, 12)] * 2 + [(16, 0)] * 2 + [(0, 16)] * 2
    assert plain_run.decided == [0, 2, 4, 6]
    assert len({cost for _, cost in plain_run.pilot.predictions}) == 1


# Accumulation, clipping, checkpointing ------------------------------------------------------------------------------


class MeanLoss(Trainer):
    """Averages the losses of the micro-batches, as for models that know nothing of the number of items."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize(
    ("trainer", "masked"), [(Trainer, True), (MeanLoss, False)], ids=["loss by items", "mean of means"]
)
def test_accumulated_micro_batches_are_as_one_batch(launch: Launch, trainer: type[Trainer], masked: bool) -> None:
    """Masked, the first labels of each row do not count, of some rows more than of others."""
    data = counting(96)
    for number, row in enumerate(data if masked else []):
        hidden = number * 7 % (LENGTH - 2)
        row["labels"] = [-100] * hidden + row["input_ids"][hidden:]
    options = {"trainer": trainer, "data": data, "policy": SignalRule(gain=2.0), "budget": "6k params"}
    options |= {"lora": {"lora_dropout": 0.0}}
    one = launch("one", **options)
    two = launch("two", gradient_accumulation_steps=2, per_device_train_batch_size=2, **options)
    assert len(set(map(str, one.recorder.ranks))) > 1
    assert two.recorder.ranks == one.recorder.ranks
    assert two.recorder.losses == pytest.approx(one.recorder.losses, rel=1e-4)
    for a, b in zip(one.recorder.norms, two.recorder.norms, strict=True):
        assert b == pytest.approx(a, rel=1e-2, abs=1e-5)
    seen = [run.log["loss"].dropna().tolist() for run in (one, two)]
    assert seen[1] == pytest.approx(seen[0], rel=1e-3), "what the policy sees is the same too"


def test_gradients_are_clipped_before_and_after_changes(launch: Launch, plain_run: Run) -> None:
    run = launch(max_grad_norm=0.05)
    assert layers(run) == layers(plain_run)
    for clipped, free in zip(run.recorder.norms, plain_run.recorder.norms, strict=True):
        assert np.sqrt(np.sum(np.square(list(clipped.values())))) == pytest.approx(0.05, rel=1e-3)
        assert np.sqrt(np.sum(np.square(list(free.values())))) > 0.06
    assert run.recorder.losses != plain_run.recorder.losses


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(launch: Launch, plain_run: Run, reentrant: bool) -> None:
    run = launch(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert run.model.base_model.model.is_gradient_checkpointing
    assert layers(run) == layers(plain_run)
    assert run.recorder.losses == pytest.approx(plain_run.recorder.losses, rel=1e-6)
    for norms, plain, (lower, upper) in zip(run.recorder.norms, plain_run.recorder.norms, layers(run), strict=True):
        assert norms.keys() == plain.keys()
        assert norms == pytest.approx(plain, rel=1e-3, abs=1e-6)
        for name in norms:
            assert (lower if ".layers.0." in name else upper) > 0, "a dropped module gets no gradient"
        assert all(value > 0 for name, value in norms.items() if "lora_B" in name)


# Precisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bf16": True}, torch.float32),
        ({"lora": {"dtype": torch.bfloat16}}, torch.float32),
        ({"lora": {"dtype": torch.bfloat16}, "bf16": True}, torch.float32),
        ({"lora": {"dtype": torch.bfloat16, "autocast_adapter_dtype": False}}, torch.bfloat16),
    ],
    ids=["autocast", "bf16 base", "both", "all in bf16"],
)
def test_bf16(launch: Launch, plain_run: Run, options: dict[str, Any], dtype: torch.dtype) -> None:
    run = launch(**options)
    assert layers(run) == layers(plain_run)
    assert run.recorder.losses == pytest.approx(plain_run.recorder.losses, abs=0.1)
    assert run.recorder.losses != plain_run.recorder.losses
    state = run.trainer.optimizer.optimizer.state
    for target in find_target_modules(run.model):
        for weight in (target.weight_a, target.weight_b):
            assert weight.dtype == dtype
            if target.rank:
                assert {state[weight][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {dtype}
                assert bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("overflow_at", [3, 4], ids=["before the change", "after the change"])
def test_a_loss_scaler_skips_a_step_beside_a_change(
    make_llama: Callable[..., PeftModel], llama_batch: dict[str, torch.Tensor], overflow_at: int
) -> None:
    """A raw loop; the ranks change between steps 3 and 4, and one step's gradients overflow."""
    model = make_llama(filled=False)
    targets = find_target_modules(model)
    names = [target.name for target in targets]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    set_ranks(targets, {names[0]: 0, names[1]: 2}, optimizer)
    losses, scales = [], []
    for step in range(10):
        loss = model(**llama_batch).loss
        # The scaled gradients leave the range of fp32, as they would that of fp16.
        (scaler.scale(loss) * (1e38 if step == overflow_at else 1.0)).backward()
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
        assert moved == (step != overflow_at)
        losses.append(float(loss.detach()))
        scales.append(scaler.get_scale())
        if step == 3:
            ranks = {names[0]: 4, names[1]: 8, names[2]: 0, names[3]: 2}
            set_ranks(targets, ranks, optimizer, step=step)
            assert ranks.items() <= {target.name: target.rank for target in targets}.items()
    assert scales[overflow_at] == scales[overflow_at - 1] / 2
    assert scales[-1] > scales[overflow_at], "it grows again after steps without an overflow"
    assert all(np.isfinite(losses))
    # A skipped step repeats its loss; a change of rank that loses little moves it only a little.
    assert losses[-1] < losses[overflow_at] < losses[0]


# Kills and resumes --------------------------------------------------------------------------------------------------

MANY = ((0, 16), (4, 12), (16, 0), (8, 8), (0, 16), (12, 4))
"""A decision every other step of twelve, so that two or three fall between checkpoints."""


def bnb_adamw(parameters: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=64)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "bnb 8-bit": {"optimizer": bnb_adamw},
    "adamw": {"optim": "adamw_torch"},
    "fused": {"optim": "adamw_torch_fused"},
    "amsgrad": {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True)},
    "sgd": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("name", first_cases(1, list(OPTIMIZERS)))
def test_every_checkpoint_of_a_killed_run_resumes_bit_for_bit(launch: Launch, name: str) -> None:
    if name == "bnb 8-bit":
        pytest.importorskip("bitsandbytes")
    options = {"plans": MANY, "max_steps": 12, "save_steps": 5} | OPTIMIZERS[name]
    whole = launch("whole", **options)
    assert layers(whole)[1::2] == [*MANY]

    def kill(step: int) -> None:
        if step == 12:
            raise Killed

    with pytest.raises(Killed):
        launch("cut", at_step=kill, **options)
    cut = whole.folder.parent / "cut"
    assert {path.name for path in cut.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10"}
    for saved in (10, 5):
        resumed = launch("cut", resume=saved, **options)
        assert resumed.recorder.losses == whole.recorder.losses[saved:]
        assert resumed.recorder.ranks == whole.recorder.ranks[saved:]
        assert resumed.log.drop(columns="run").equals(whole.log.drop(columns="run"))
        resumed.assert_same_adapter(whole)
    if name == "bnb 8-bit":
        moments = [state["state1"] for state in whole.trainer.optimizer.optimizer.state.values()]
        assert {moment.dtype for moment in moments} == {torch.uint8}


def test_training_again_starts_over_if_asked_to(launch: Launch) -> None:
    """The last plan's ranks are above the first one's, so that state of the old shape would not fit."""
    run = launch(plans=((8, 8), (0, 16)), lora={"lora_dropout": 0.0}, fresh=True)
    first = run.log
    again = run.train()
    assert layers(again) == layers(run)[:STEPS] * 2
    assert again.recorder.losses[STEPS:] == again.recorder.losses[:STEPS]
    assert again.log.equals(first)
    assert again.decided == [0, 4]


# The best model -----------------------------------------------------------------------------------------------------


ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


class BestAtFour(Trainer):
    """The evaluation loss is least at step 4, between the second and the third plan."""

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = {"eval_loss": abs(self.state.global_step - 4) + 1.0}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """A run that early stopping ended, and whose best checkpoint has other ranks than its last."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2, "max_steps": 12}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return scripted(
        tmp_path_factory.mktemp("stopped") / "run",
        llama_config,
        trainer=BestAtFour,
        eval_data=counting(8),
        callbacks=(EarlyStoppingCallback(early_stopping_patience=2),),
        **options,
    ).train()


def test_early_stopping_brings_the_best_ranks_back(stopped: Run) -> None:
    assert len(stopped.recorder.ranks) == 8, "stopped after two evaluations without gain"
    best, last = stopped.recorder.ranks[3], stopped.recorder.ranks[7]
    assert best != last
    checkpoint = Path(stopped.trainer.state.best_model_checkpoint)
    assert checkpoint.name == "checkpoint-4"
    assert sorted(path.name for path in stopped.folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    targets = find_target_modules(stopped.model)
    assert ranks_of(stopped.model) == best
    assert all(target.weight_a.requires_grad == (target.rank > 0) for target in targets)
    reloaded = stopped.plain(checkpoint)
    assert torch.equal(logits(reloaded), logits(stopped.model))
    ours, saved = stopped.model.peft_config["default"], reloaded.peft_config["default"]
    for field in ("rank_pattern", "alpha_pattern", "exclude_modules"):
        assert getattr(ours, field) == getattr(saved, field)
    assert ranks_of(reloaded) == {name: rank for name, rank in best.items() if rank}


def test_a_saved_model_is_ready_for_the_hub(stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("no network call")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    stopped.trainer.save_model()
    stopped.trainer.create_model_card(model_name="mine")
    folder = stopped.folder
    files = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
    assert files == {*ADAPTER_FILES, "training_args.bin", "decisions"}
    assert all("lora_" in key for key in load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(logits(stopped.plain(folder)), logits(stopped.model))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert "name: mine" in card
    stopped.trainer.save_model(str(tmp_path / "elsewhere"))
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {*ADAPTER_FILES, "training_args.bin"}


# What is not finite -------------------------------------------------------------------------------------------------


class Spoiler(TrainerCallback):
    """Makes one module's optimiser state infinite at step 1: it then stands still, and the others train on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 1:
            target = find_target_modules(objects["model"])[0]
            objects["optimizer"].optimizer.state[target.weight_b]["exp_avg_sq"].fill_(torch.inf)


def test_a_module_that_is_not_finite_is_left_alone(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch(plans=((8, 8), (4, 12), (8, 8), (12, 4)), callbacks=(Spoiler(),))
    names = list(run.recorder.ranks[0])
    assert [ranks[names[0]] for ranks in run.recorder.ranks] == [8] * STEPS
    assert [ranks[names[1]] for ranks in run.recorder.ranks][1::2] == [8, 4, 8, 12]
    assert all(np.isfinite(run.recorder.losses))
    assert run.recorder.losses[-1] < run.recorder.losses[0]
    assert len(messages_of(caplog, names[0])) == 1, "warned once"
    noted = run.log[run.log["note"].notna()]
    assert noted["decision"].tolist() == [1, 2, 3]
    assert set(noted["module"]) == {names[0]}
    assert noted["note"].str.contains("NaN or infinity").all()


# torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """torch.compile without graphs of earlier tests."""
    torch.compiler.set_stance("default")  # a loop that broke off in a measured step has left another
    torch._dynamo.reset()
    counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


SMALL: dict[str, Any] = {"lora": {"target_modules": ["q_proj"]}, "max_steps": 12}  # measured steps run uncompiled


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    return scripted(tmp_path_factory.mktemp("small") / "run", llama_config, **SMALL).train()


@pytest.mark.long
def test_a_compiled_run_takes_one_graph_for_each_set_of_ranks(
    launch: Launch, small_run: Run, dynamo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = launch(torch_compile=True, torch_compile_backend="aot_eager", **SMALL)
    assert layers(run) == layers(small_run)
    assert run.recorder.losses == pytest.approx(small_run.recorder.losses, rel=1e-3)
    # From the third step on, since the loss meter's sum takes a graph at first; the last plan is the first one again.
    start = run.recorder.graphs[2]
    assert [graphs - start for graphs in run.recorder.graphs[2:]] == [0] + [1] * 3 + [2] * 6
    assert messages_of(caplog, "recompile_limit") == []


@pytest.mark.long
def test_beyond_the_limit_a_compiled_run_is_warned_of_and_runs_on(
    launch: Launch, small_run: Run, dynamo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with dynamo.config.patch(recompile_limit=2):
        run = launch(torch_compile=True, torch_compile_backend="eager", **SMALL)
    assert run.recorder.losses == pytest.approx(small_run.recorder.losses, rel=1e-3)
    assert run.recorder.graphs[-1] == run.recorder.graphs[4], "the third plan is not compiled any more"
    assert messages_of(caplog, "recompile_limit") == [
        "This run is compiled and plans 4 sets of ranks, which need 4 graphs, but "
        "torch._dynamo.config.recompile_limit is 2; graphs beyond it run uncompiled. Use a schedule with "
        "fewer decisions in `attach`, or set the limit a little above 4 before training (new batch "
        "lengths and peak corrections need extra graphs)."
    ]


def test_a_model_compiled_by_its_user_is_probed_uncompiled(launch: Launch, dynamo: Any) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled: dict[str, Any] = {"prepare": lambda model: model.compile(backend=counter), "plain": True}
    run = launch(budget="100%", policy="signal-mean", **compiled, **SMALL)
    # The probe and the byte model alone try more than a dozen sets of ranks; two graphs are the loss meter's.
    assert 1 <= counter.frame_count <= len(run.decided) + 2
    assert run.recorder.graphs[-1] == run.recorder.graphs[9], "frozen ranks are not compiled again"


def test_layers_compiled_one_by_one_are_counted_together(
    make_llama: Callable[..., PeftModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama()
    plain = SimpleNamespace(torch_compile=False)
    assert graphs_per_plan(model) == 0
    assert graphs_per_plan(torch.compile(model)) == 1
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    assert graphs_per_plan(model) == 2
    limit = torch._dynamo.config.recompile_limit
    warn_of_recompiles(model, plain, limit // 2)
    assert messages_of(caplog, "recompile_limit") == []
    warn_of_recompiles(model, plain, limit // 2 + 1)
    assert len(messages_of(caplog, f"plans {limit // 2 + 1} sets of ranks, which need {limit + 2} graphs")) == 1


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"n_gpu": 4}, "One process would train on 4 GPUs.*Start one process per device with torchrun"),
        ({"deepspeed": "stage3.json", "deepspeed_plugin": object()}, "DeepSpeed keeps.* flat buffers.*rankpilot plan"),
        ({"deepspeed_plugin": object()}, "DeepSpeed keeps"),  # from the configuration of accelerate
        ({"fsdp": True}, "FSDP shards the adapters.*Start one process.*own loop.*plan.json"),
        (
            {"parallelism_config": SimpleNamespace(tp_size=2)},
            "parallelism_config has tp_size=2.*has the whole model.*rankpilot plan",
        ),
        ({"parallelism_config": SimpleNamespace(cp_size=4)}, "parallelism_config has cp_size=4"),
    ],
    ids=["devices", "deepspeed", "deepspeed by accelerate", "fsdp", "tensor parallel", "context parallel"],
)
def test_what_would_go_wrong_silently_is_refused_before_training(
    llama_config: LlamaConfig, tmp_path: Path, setting: dict[str, Any], reason: str
) -> None:
    run = scripted(tmp_path / "run", llama_config)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    arguments = run.trainer.args
    arguments.__class__ = type("Wrong", (TrainingArguments,), setting)
    for name in setting:
        arguments.__dict__.pop(name, None)
    with pytest.raises(UnsupportedError, match=reason):
        run.pilot.on_train_begin(arguments, run.trainer.state, run.trainer.control, model=run.model, optimizer=None)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert not (tmp_path / "run" / "decisions").exists()
