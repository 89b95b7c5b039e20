"""Makes the sample of trials that ships with the package, study/dataset/sample: a dozen tasks, in a few minutes.

Six tasks have plan runs of a training that is too short to be of use; six tasks of the validation split were run by a
rule, by the shipped policy, and by the shipped policy with exploration. The old sample must be gone.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rankpilot.cli import dataset, evaluate, train
from rankpilot.study.dataset.read import SAMPLE

TRAINING = """
    --iterations 1 --stacks 1 --tasks-per-stack 1 --warm-tasks 4 --plan-tasks 6 --validation-tasks 0 --network.width 8
    --seed 1 --bases llama-4x32 bert-4x32 --schedule.fractions 0 0.34 --workers 1
"""
COMPARISON = "signal-mean default explore-0.05:default --tasks 6 --workers 1 --logs"


def main() -> None:
    """Make the sample."""
    with tempfile.TemporaryDirectory() as scratch:
        training, comparison = Path(scratch) / "training", Path(scratch) / "comparison"
        train.main([*TRAINING.split(), "--output", str(training)])
        evaluate.main([*COMPARISON.split(), "--output", str(comparison)])
        dataset.main([str(training), str(comparison), "--output", str(SAMPLE)])


if __name__ == "__main__":
    sys.exit(main())
