"""The decision problem: short fine-tunes steered while they train. Importing this package registers the environment."""

from ..common.errors import naming_extras


class _Id(str):
    """An id that registers the environment in any process unpickling it, such as the workers of `SubprocVecEnv`."""

    __slots__ = ()


ENV_ID = _Id("rankpilot/FineTune-v5")
"""Id of the environment for `gymnasium.make`, `gymnasium.make_vec` and Stable-Baselines3's `make_vec_env`."""


def _register() -> None:
    with naming_extras():
        import gymnasium
    if ENV_ID not in gymnasium.registry:
        module = f"{__name__}.fine_tune"
        one, many = f"{module}:FineTuneEnv", f"{module}:FineTuneVectorEnv"
        gymnasium.register(ENV_ID, entry_point=one, vector_entry_point=many)


_register()

__all__ = ["ENV_ID"]
