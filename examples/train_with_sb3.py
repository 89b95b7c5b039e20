"""Train MaskablePPO of sb3-contrib on stacked fine-tunes: python examples/train_with_sb3.py --updates 5."""

import argparse

import numpy as np
import rankpilot
from rankpilot.agents.sb3_policy import GroupPolicy, clone
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--updates", type=int, default=5, help="updates of the policy, each on 16 episodes")
parser.add_argument("--regime", default="rate", help="what is wrong with the fine-tunes: here their learning rate")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps of an episode")
options = parser.parse_args()

envs = rankpilot.StackVecEnv(16, episodes_per_task=8, regime=options.regime, steps=options.steps, against="rate")
model = MaskablePPO(GroupPolicy, envs, n_steps=12, batch_size=96, gamma=1.0, seed=0, device="cpu")
model.set_logger(Logger(folder=None, output_formats=[]))  # else it makes a folder among the temporary files
print(f"cloned from the rule: it does the same in {clone(model, envs, rounds=2, seed=0):.0%} of what it sees")
for update in range(options.updates):
    model.learn(12 * envs.num_envs, reset_num_timesteps=update == 0)
    returns = np.asarray(model.rollout_buffer.rewards).sum(axis=0)
    print(f"update {update + 1}: mean return of the last {len(returns)} episodes {returns.mean():+.3f}")
