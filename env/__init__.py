"""The decision problem: short fine-tunes steered while they train. Importing this package registers the environment."""

from ..common.errors import naming_extras

with naming_extras():
    import gymnasium


class _Id(str):
    """An id that registers the environment in any process unpickling it, such as the workers of `SubprocVecEnv`."""

    __slots__ = ()


ENV_ID = _Id("rankpilot/FineTune-v8")
"""Id of the environment for `gymnasium.make`, `gymnasium.make_vec` and Stable-Baselines3's `make_vec_env`.

A worker process that gets the name as plain text finds `rankpilot.env:rankpilot/FineTune-v8`.
"""

gymnasium.register(
    ENV_ID,
    entry_point=f"{__name__}.fine_tune:FineTuneEnv",
    vector_entry_point=f"{__name__}.fine_tune:FineTuneVectorEnv",
)

__all__ = ["ENV_ID"]
