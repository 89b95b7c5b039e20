"""PPO's checkpoints: a run that goes on from one is the same as a run that was not interrupted.

They hold tensors and numbers only, so reading one never unpickles code.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO

from ...common.archives import load_archive
from ...common.files import atomic_path
from ...errors import RunFolderError
from ..learned.policy_file import SCHEMA
from .validation import Validation

CHECKPOINT = "checkpoint.pt"


def write_checkpoint(path: Path, model: PPO, iteration: int, validation: Validation) -> None:
    """Tensors and numbers only, so that reading it back never unpickles code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (SB3 shuffles with it)
    state = {
        "schema": SCHEMA,
        "iteration": iteration,
        "timesteps": model.num_timesteps,
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "validation": validation.state(),
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            gauss,
        ],
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def restore(path: Path, model: PPO, validation: Validation) -> int:
    """Go on from a checkpoint; returns the iterations done."""
    try:
        state = load_archive(path)
        if state.get("schema") != SCHEMA:
            raise ValueError("it was written by another version of rankpilot")
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        model.num_timesteps = int(state["timesteps"])
        validation.restore(state["validation"])
        torch.set_rng_state(state["torch_rng"])
        kind, keys, position, has_gauss, gauss = state["numpy_rng"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        return int(state["iteration"])
    except Exception as error:  # whatever torch makes of a damaged file
        raise RunFolderError(f"The checkpoint {path} cannot be read ({error}). Delete it to start over.") from error
