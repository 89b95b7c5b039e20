"""The decision problem: proxy tasks, episodes, observation, reward, the Gymnasium environments."""

import gymnasium as gym

ENV_ID = "rankpilot/RankAllocation-v3"

if ENV_ID not in gym.registry:
    gym.register(
        id=ENV_ID,
        entry_point="rankpilot.env.rank_allocation:RankAllocationEnv",
        vector_entry_point="rankpilot.env.vector:StackedVectorEnv",
    )
