"""The name under which Gymnasium knows the environment; importing this module registers it."""

import gymnasium as gym

ENV_ID = "rankpilot/RankAllocation-v4"

if ENV_ID not in gym.registry:
    gym.register(
        id=ENV_ID,
        entry_point="rankpilot.env.rank_allocation:RankAllocationEnv",
        vector_entry_point="rankpilot.env.vector:StackedVectorEnv",
    )
