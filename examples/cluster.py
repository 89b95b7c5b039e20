"""A policy trained on a Ray cluster: python examples/cluster.py, with --cluster HOST:PORT on one that runs already."""

import argparse
from dataclasses import replace
from pathlib import Path

from rankpilot.agents.training.config import PRESETS
from rankpilot.agents.training.train import finish, train
from rankpilot.common.cluster import running_on_cluster
from rankpilot.env.episodes.stacked import rounding_digest

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cluster", default="local", help="HOST:PORT, auto, or local: a cluster of this machine alone")
parser.add_argument("--iterations", type=int, default=8)
parser.add_argument("--task-steps", type=int, help="optimiser steps of an episode; as the suite sets by default")
parser.add_argument("--output", type=Path, default=Path("runs/cluster"))
options = parser.parse_args()

config = replace(
    PRESETS["quick"], iterations=options.iterations, task_steps=options.task_steps, validation_tasks=0, device="cpu"
)
with running_on_cluster(options.cluster, rounding_digest, print):  # nodes that compute other bits are left out
    policy = train(config, options.output, on_stage=lambda stage: print(stage.name, f"{stage.done} of {stage.total}"))
finish(options.output, policy, config)
print(f"trained on the cluster: rankpilot finetune MODEL DATA --policy {options.output}")
