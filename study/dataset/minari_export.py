"""Exports a data set for Minari, the format of data sets for offline reinforcement learning (HDF5)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...allocation.features import FEATURE_PREFIX, MODULE_FEATURES, MOST_FEATURE, RUN_FEATURES, RUN_PREFIX
from ...errors import ConfigError, UnsupportedError, first_line
from .read import TrialsDataset

if TYPE_CHECKING:
    from minari import MinariDataset

LEAST_LOSS = 1e-6
"""In nats; what lies below counts as this, as in `PlanRun.gains`."""


def to_minari(dataset: TrialsDataset, name: str, *, source: str | None = None) -> MinariDataset:
    """Write a data set where Minari keeps its own (MINARI_DATASETS_PATH), one episode a run.

    * An observation is {"modules": (modules, features), "run": (features,), "mask": (modules,)}. Runs of fewer modules
      than the largest are padded with zeros, and the mask is 0 there. The observation after the last decision repeats
      the one before: nothing is seen at the end of a run.
    * An action is the ranks after the decision, int32 (modules,), 0 where the mask is 0.
    * The reward of the last step is ln(initial_loss / min(loss, initial_loss)), and 0 for a run that failed; all other
      rewards are 0. Compare episodes of one task only.
    * infos["probability"], (steps + 1, 1), is that of each plan, NaN where it is not known and after the last one.
    * The metadata of an episode hold the run's seed, and as options its name, task and behaviour.

    Args:
        dataset: what is exported.
        name: id of the Minari data set, such as "rankpilot/trials-v0".
        source: "plan runs" or "policy runs", for these alone.

    Raises:
        UnsupportedError: Minari is not installed.
        ConfigError: Minari refuses the name, or has such a data set already; there are no such rows.
    """
    try:
        import h5py  # noqa: F401  (Minari asks for it late)
        import minari
        from gymnasium import spaces
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise UnsupportedError("Minari is not installed: pip install 'rankpilot[minari]'.") from error
    table = dataset.table(source=source)
    if not table.num_rows:
        raise ConfigError(f"{dataset.folder} has no rows of source {source!r}.")
    most = int(np.max(table["ranks"].combine_chunks().value_lengths().to_numpy()))
    highest = int(np.max(table["ranks"].combine_chunks().flatten().to_numpy()))
    observed = {
        "modules": spaces.Box(-MOST_FEATURE, MOST_FEATURE, (most, len(MODULE_FEATURES)), np.float32),
        "run": spaces.Box(-MOST_FEATURE, MOST_FEATURE, (len(RUN_FEATURES),), np.float32),
        "mask": spaces.MultiBinary(most),
    }
    try:
        with warnings.catch_warnings():
            # Minari recommends an author, a link and an environment; whoever publishes the data set adds their own.
            warnings.filterwarnings("ignore", ".*(is set to None|env_spec is None)")
            return minari.create_dataset_from_buffers(
                name,
                [EpisodeBuffer(**episode) for episode in _episodes(table, most)],
                observation_space=spaces.Dict(observed),
                action_space=spaces.Box(0, highest, (most,), np.int32),
                algorithm_name="rankpilot",
                description=f"LoRA ranks, decided in {table.num_rows} steps of fine-tunes of small models.",
                data_format="hdf5",
            )
    except ValueError as error:
        raise ConfigError(f"Minari cannot write {name!r}: {first_line(error)}") from error


def _episodes(table: pa.Table, most: int) -> Iterator[dict[str, Any]]:
    """The fields of an `EpisodeBuffer` for each run, padded to so many modules."""
    order = table.sort_by([("origin", "ascending"), ("run", "ascending"), ("decision", "ascending")])
    runs = order["run"].to_numpy()
    starts = np.flatnonzero(np.r_[True, runs[1:] != runs[:-1]])
    for number, (start, end) in enumerate(zip(starts, np.r_[starts[1:], len(runs)], strict=True)):
        rows = order.slice(start, end - start)
        facts = {name: rows[name][0].as_py() for name in ("run", "task", "behaviour", "seed", "loss", "initial_loss")}
        steps, count = len(rows), len(rows["ranks"][0])
        modules = np.stack([_padded(rows[FEATURE_PREFIX + name], most) for name in MODULE_FEATURES], axis=-1)
        run = np.stack([rows[RUN_PREFIX + name].to_numpy() for name in RUN_FEATURES], axis=-1)
        mask = np.tile(np.arange(most) < count, (steps, 1)).astype(np.int8)
        ended, rewards = np.zeros(steps, dtype=bool), np.zeros(steps)
        loss = facts["initial_loss"] if facts["loss"] is None else min(facts["loss"], facts["initial_loss"])
        ended[-1], rewards[-1] = True, np.log(facts["initial_loss"] / max(loss, LEAST_LOSS))
        probability = np.append(rows["probability"].to_numpy(zero_copy_only=False).astype(np.float64), np.nan)
        yield {
            "id": number,
            "seed": facts["seed"],
            "options": {name: facts[name] for name in ("run", "task", "behaviour")},
            "observations": {"modules": _after(modules), "run": _after(run), "mask": _after(mask)},
            "actions": _padded(rows["ranks"], most),
            "rewards": rewards.tolist(),
            "terminations": ended.tolist(),
            "truncations": [False] * steps,
            "infos": {"probability": probability[:, None]},
        }


def _padded(column: pa.ChunkedArray, most: int) -> NDArray[Any]:
    """Lists of one length as an array, (rows, most)."""
    lists = column.combine_chunks()
    values: NDArray[Any] = lists.flatten().to_numpy().reshape(len(lists), -1)
    return np.pad(values, ((0, 0), (0, most - values.shape[1])))


def _after(observed: NDArray[Any]) -> NDArray[Any]:
    """Observations with the last one once more."""
    return np.concatenate([observed, observed[-1:]])
