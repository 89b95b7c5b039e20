"""The names under which Gymnasium knows the environments; importing this module registers them."""

from ..errors import naming_extras

with naming_extras():
    import gymnasium as gym

ENV_ID = "rankpilot/RankAllocation-v4"
CONTROL_ENV_ID = "rankpilot/RunControl-v2"

if ENV_ID not in gym.registry:
    gym.register(
        id=ENV_ID,
        entry_point="rankpilot.env.rank_allocation:RankAllocationEnv",
        vector_entry_point="rankpilot.env.vector:StackedVectorEnv",
    )

if CONTROL_ENV_ID not in gym.registry:
    gym.register(
        id=CONTROL_ENV_ID,
        entry_point="rankpilot.env.run_control:RunControlEnv",
        vector_entry_point="rankpilot.env.run_control:RunControlVectorEnv",
    )
