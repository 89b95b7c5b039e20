# %% [markdown]
# # An agent that wins where winning is possible
#
# On most fine-tunes an agent that steers ranks and learning rate is level with a good rule, since little is left to win
# (docs/train-policy.md). Here much is left: a small Llama learns what a teacher does, at a learning rate that is 4 to 8
# times too low or too high. In some five minutes on one core this notebook trains an agent on such fine-tunes. It
# compares the agent on others with runs that are left alone, with the rule that it began as, and with the plan that
# knows what was planted.
#
# It is plain Python in jupytext's percent format, as docs/notebooks/study.py. The policy and a picture go to a new
# temporary folder, which is printed, or to the folder in `RANKPILOT_NOTEBOOK`. `RANKPILOT_UPDATES` sets how long it
# trains.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
from rankpilot import StackVecEnv
from rankpilot.agents.policy_file import LearnedPolicy, load_policy, save_policy
from rankpilot.agents.sb3_policy import GroupPolicy, clone
from rankpilot.agents.training import learning_curve
from rankpilot.common.drawing import save_figure
from rankpilot.common.statistics import estimate
from rankpilot.decide.groups import GROUP_RULES, STEERING
from rankpilot.env.evaluate import beside, compare, table
from rankpilot.env.tasks import FineTuneTask
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger

folder = Path(os.environ.get("RANKPILOT_NOTEBOOK") or tempfile.mkdtemp(prefix="rankpilot-agent-"))
updates = int(os.environ.get("RANKPILOT_UPDATES", "12"))
count = 32 if updates > 10 else 4
print("Everything is written to", folder)

# %% [markdown]
# ## Tasks
#
# A task is one fine-tune, and its fields determine it: what is learned, by which base, within which budget, at which
# rate. `offset` is the log2 of how far the rate is off. Tasks of the comparison differ from those of training in
# teacher, data and rate.

# %%
draw = np.random.default_rng(0)


def drawn(seed: int) -> FineTuneTask:
    """A planted task at a rate 4 to 8 times too low or too high."""
    offset = float(draw.choice([-1, 1]) * draw.uniform(2, 3))
    return FineTuneTask("planted", seed, "llama-4x32", "documentation", mean_rank=1.0, offset=offset, steps=40)


held_out = dict.fromkeys([drawn(seed) for seed in range(count)], "rate")
tasks = [drawn(seed) for seed in range(100, 164)]
validation = dict.fromkeys([drawn(seed) for seed in range(200, 200 + count // 2)], "rate")
print(f"{len(tasks)} tasks to learn from, such as {tasks[0].id}")

# %% [markdown]
# ## What can be won
#
# Rules play the tasks of the comparison: the run left alone, the rule that corrects the rate and moves ranks, and the
# oracle, whose ranks are where the teacher was changed, at the same wrong rate. Below 0 is better.

# %%
rules = {name: GROUP_RULES[name] for name in ("left-alone", "rate", "union")}
rows = list(compare(rules, held_out, oracle=True))
for name, cells in table(rows, "left-alone").items():
    print(f"{name:10s} {cells['rate']:+.1f} % above the loss of runs left alone")

# %% [markdown]
# ## Training
#
# First the network copies the rule (behaviour cloning). Then MaskablePPO of sb3-contrib goes on from there. Each update
# sees 24 fine-tunes, four of each task; its reward is how much lower the held-out loss is than under the rule, on the
# same task, seed and batches. After every third update it plays validation tasks, and the network that does best on
# them is kept.

# %%
envs = StackVecEnv(24, episodes_per_task=4, tasks=tasks, against="union", scaled=True)
options = {"n_steps": 12, "batch_size": 96, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 1.0, "device": "cpu"}
model = MaskablePPO(GroupPolicy, envs, seed=0, **options)
model.set_logger(Logger(folder=None, output_formats=[]))
agrees = clone(model, envs, rounds=3, seed=0)
print(f"The copy does what the rule does in {agrees:.0%} of what it sees.")
agent = LearnedPolicy("agent", model.policy.network, STEERING)
ruled = list(compare({"union": rules["union"]}, validation))
curve, kept = [], {}


def validate(update: int) -> None:
    """Tell how the agent does on validation tasks, and keep its weights if that is the best so far."""
    changes = beside([*ruled, *compare({"agent": agent}, validation)], "agent", "union")
    above = float(np.mean(list(changes.values())))
    if not kept or above <= min(row["validation"] for row in curve if "validation" in row):
        kept.update({name: value.clone() for name, value in agent.network.state_dict().items()})
    curve.append({"round": update, "validation": above})
    print(f"after update {update}: {above:+.1f} % above the rule's loss on validation tasks")


validate(0)
for update in range(updates):
    model.learn(12 * envs.num_envs, reset_num_timesteps=update == 0)
    returns = 5 * np.sinh(model.rollout_buffer.rewards.sum(axis=0))
    low, middle, high = np.percentile(returns, (10, 50, 90))
    curve.append({"round": update + 1, "over_rule": returns.mean(), "over_rule_p10": low, "over_rule_p90": high})
    print(f"update {update + 1}: {-returns.mean():+.1f} % above the rule's loss, {-middle:+.1f} in the middle run")
    if update % 3 == 2 or update == updates - 1:
        validate(update + 1)
agent.network.load_state_dict(kept)
save_figure(learning_curve(curve), folder / "learning_curve.png")
print("Picture:", folder / "learning_curve.png")

# %% [markdown]
# While it trains it tries actions that it would not take in the end, and tasks differ in what can be won. So the curve
# of validation tells more, and what counts is the comparison on tasks that played no part so far.

# %%
found = list(compare({"agent": agent}, held_out))
for other in rules:
    changes = beside([*rows, *found], "agent", other)
    print(f"agent: the loss is {estimate(list(changes.values()), list(changes)):+.1f} % above that of {other}")

# %% [markdown]
# ## It flies
#
# A saved agent is a folder of safetensors and JSON. It steers a run of yours as it steered these:
# `rankpilot.attach(trainer, policy=FOLDER)`. Whether it is of use there is another question: it has learned from one
# small Llama and one kind of mistake. `python -m benchmarks agent` asks it on models, texts and mistakes that it has
# not seen.

# %%
saved = save_policy(folder / "agent", agent.network, STEERING, {"tasks": len(tasks), "updates": updates})
print("The agent is in", saved, "and decides at", len(load_policy(saved).schedule.steps(200)), "moments of a run")
