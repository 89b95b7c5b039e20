"""Train plain Stable-Baselines3 PPO on stacked fine-tunes: python examples/train_with_sb3.py --updates 5."""

import argparse

import gymnasium as gym
import numpy as np
import rankpilot
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--updates", type=int, default=5, help="updates of the policy, each on 16 episodes")
parser.add_argument("--base", default="llama-4x32", help="the proxy base that is fine-tuned")
parser.add_argument("--task-steps", type=int, default=100, help="optimizer steps of an episode")
options = parser.parse_args()

envs = rankpilot.GymnasiumVecEnv(
    gym.make_vec(
        rankpilot.ENV_ID,
        num_envs=16,
        vectorization_mode="vector_entry_point",
        base=options.base,
        episodes_per_task=4,  # four episodes share each task, so that their returns can be compared
        actions="scores",
        against="signal-mean",  # the reward is what an episode gains over this rule
        fresh_seeds=True,
        task_overrides={"steps": options.task_steps},
    )
)
decisions = 4  # of an episode, by the default schedule
model = PPO("MultiInputPolicy", envs, n_steps=decisions, batch_size=64, gamma=1.0, seed=0, device="cpu")
model.set_logger(Logger(folder=None, output_formats=[]))  # else it makes a folder among the temporary files
for update in range(options.updates):
    model.learn(decisions * envs.num_envs, reset_num_timesteps=update == 0)
    returns = np.asarray(model.rollout_buffer.rewards).sum(axis=0)
    print(f"update {update + 1}: mean return of the last {len(returns)} episodes {returns.mean():+.3f}")
