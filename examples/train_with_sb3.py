"""Train an agent on tasks whose rate is off by 4 to 8: python examples/train_with_sb3.py --updates 2 --tests 4."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import rankpilot
from rankpilot.agents.policy_file import LearnedPolicy, save_policy
from rankpilot.agents.sb3_policy import GroupPolicy, clone
from rankpilot.common.statistics import estimate
from rankpilot.decide.groups import GROUP_RULES, STEERING
from rankpilot.env.evaluate import beside, compare
from rankpilot.env.tasks import FineTuneTask
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--updates", type=int, default=12, help="updates of the policy, each on 24 fine-tunes")
parser.add_argument("--tests", type=int, default=32, help="tasks of the comparison, which training never sees")
options = parser.parse_args()

draw = np.random.default_rng(0)
new = partial(FineTuneTask, "planted", base="llama-4x32", corpus="documentation", mean_rank=1.0, steps=40)
tasks = [new(seed=seed, offset=draw.choice([-1, 1]) * draw.uniform(2, 3)) for seed in range(options.tests + 64)]
tests, tasks = dict.fromkeys(tasks[: options.tests], "rate"), tasks[options.tests :]
envs = rankpilot.StackVecEnv(24, episodes_per_task=4, tasks=tasks, against="union", scaled=True)
settings = {"n_steps": 12, "batch_size": 96, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 1.0, "device": "cpu"}
model = MaskablePPO(GroupPolicy, envs, seed=0, **settings)
model.set_logger(Logger(folder=None, output_formats=[]))  # else it makes a folder among the temporary files
print(f"cloned from the rule: it does the same in {clone(model, envs, rounds=3, seed=0):.0%} of what it sees")
for update in range(options.updates):
    model.learn(12 * envs.num_envs, reset_num_timesteps=update == 0)
    returns = 5 * np.sinh(model.rollout_buffer.rewards.sum(axis=0))
    print(f"update {update + 1}: losses {np.mean(-returns):+.1f} % above the rule's in {len(returns)} fine-tunes")

agent = LearnedPolicy("agent", model.policy.network, STEERING)
rows = list(compare({"agent": agent, **{name: GROUP_RULES[name] for name in ("union", "left-alone")}}, tests))
for other in ("left-alone", "union"):
    changes = beside(rows, "agent", other)
    print(f"agent: the loss is {estimate(list(changes.values()), list(changes)):+.1f} % above that of {other}")
print("saved in", save_policy(Path("runs/planted-agent"), agent.network, STEERING, {}))
