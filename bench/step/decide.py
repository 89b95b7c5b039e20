"""How long a decision takes: the shipped policy, its actor alone, its networks alone, and a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from ...agents.learned.policy import LearnedPolicy
from ...agents.learned.policy_file import load_policy
from ...agents.rules import find_rule
from ...allocation.module_shapes import ModuleShapes
from ...allocation.observation import Observation, RunState, observe
from ...allocation.problem import AllocationProblem
from ...common.tables import make_table
from ...common.workers import isolated
from ...errors import ConfigError
from ...lora.signals import SIGNALS
from ...lora.targets import find_target_modules
from ...memory.budget import reference_cost
from ...memory.calibration import calibrate
from ..harness import Figures, clock_for, interleave, machine_facts, paired_ratios, with_progress
from ..models import Size, random_model

RULE = "signal-mean"
QUICK, FULL = (4, 30), (4, 30, 36, 143)
"""Layers of seven modules each."""

BUDGET = 0.6
"""Share of what rank 8 on all modules takes."""


@dataclass(frozen=True)
class Options:
    """Time one first decision on Llama models of 28 to 1,001 target modules, on one thread.

    The models are narrow and random; prices are theirs, signals are random. "Network" is the actor's forward pass,
    "actor" its whole decision, "policy" the decision with the plan value ensemble, which packs and scores 53 plans; all
    take turns with the rule signal-mean. Figures are medians of CPU time.

    Attributes:
        policy: "default" or the folder of a trained policy.
        quick: under a minute: without the largest model, and fewer rounds.
        json: also write the figures to this file, as flat JSON with names like "modules_1001.policy_ms".
    """

    policy: str = "default"
    quick: bool = False
    json: Path | None = None


def observation_of(layers: int) -> Observation:
    """A first decision on a model of so many layers, inside 60 % of the bytes of uniform rank 8."""
    size = Size(layers=layers, width=64, vocabulary=256, rows=2, length=16)
    model = get_peft_model(random_model("llama", size, 0), LoraConfig(r=1, target_modules="all-linear"))
    targets = find_target_modules(model)
    tokens = torch.zeros(size.rows, size.length, dtype=torch.int64)
    cost = calibrate(model, targets, {"input_ids": tokens, "labels": tokens}).cost()
    whole = reference_cost(cost, np.array([target.max_rank for target in targets], dtype=np.int64))
    count = len(targets)
    return observe(
        AllocationProblem.of(targets, cost, BUDGET * whole, ranks=np.ones(count, dtype=np.int64)),
        tuple(target.name for target in targets),
        np.random.default_rng(0).lognormal(size=(count, len(SIGNALS))),
        np.zeros(count, dtype=np.int64),
        ModuleShapes.of(targets),
        RunState(
            0.0, 3, whole, first_loss=5.0, losses=(), total_steps=1000, rows=size.rows, probe_fall=0.1, predicted=1
        ),
    )


def deciders(policy: LearnedPolicy, observation: Observation) -> dict[str, Callable[[int], object]]:
    """What is timed, by name, as work for `interleave`."""
    modules, run = (torch.from_numpy(array).unsqueeze(0) for array in (observation.modules, observation.run))
    mask = torch.ones(1, modules.shape[1])
    network, rule = torch.no_grad()(policy.network.forward), find_rule(RULE)
    actor = replace(policy, value_ensemble=None)
    calls: dict[str, Callable[[int], object]] = {
        RULE: lambda turn: rule.decide(observation),
        "network": lambda turn: network(modules, run, mask),
        "actor": lambda turn: actor.decide(observation),
    }
    return calls | ({"policy": lambda turn: policy.decide(observation)} if policy.value_ensemble else {})


def time_decisions(policy: LearnedPolicy, layers: int, rounds: int) -> tuple[int, Figures]:
    """Number of modules, and the figures of one model."""
    observation = observation_of(layers)
    work = deciders(policy, observation)
    device = torch.device("cpu")
    interleave(work, 1, device)  # to warm up
    seconds = interleave(work, rounds, device, clock=clock_for(device))
    figures: Figures = {f"{name}_ms": 1e3 * float(np.median(times)) for name, times in seconds.items()}
    for name in work.keys() - {RULE}:
        figures[f"{name}_ratio"] = float(np.median(paired_ratios(seconds[name], seconds[RULE], 1)))
    return len(observation.modules), figures


def benchmark(options: Options, console: Console) -> Figures:
    """Time all sizes, print the table, and return all figures.

    Raises:
        ConfigError: the policy is a rule.
        UnknownNameError, PolicyFileError: there is no such policy, or it cannot be read.
    """
    policy = load_policy(options.policy)
    if not isinstance(policy, LearnedPolicy):
        raise ConfigError(f"--policy names a trained policy; {options.policy!r} is a rule.")
    figures: Figures = {**machine_facts(torch.device("cpu")), "threads": 1, "quick": options.quick}
    rows = []
    for layers in with_progress(QUICK if options.quick else FULL, "decisions"):
        with isolated():
            count, medians = time_decisions(policy, layers, 5 if options.quick else 15)
        figures |= {f"modules_{count}.{name}": value for name, value in medians.items()}
        times = [f"{medians[f'{name}_ms']:.2f} ms" for name in (RULE, "network", "actor")]
        rows.append([str(count), *times, f"{medians['policy_ms']:.1f} ms" if "policy_ms" in medians else "actor alone"])
    console.print(make_table("One first decision, medians", ("modules", RULE, "network", "actor", "policy"), rows))
    return figures
