# %% [markdown]
# # One run and some tasks
#
# This notebook leads through what `rankpilot.study` can say of a policy: first of one run, decision by decision, then
# of some tasks. Everything that it reads it makes itself, in a minute or two on one core; nothing is
# downloaded.
#
# It is plain Python in jupytext's percent format. Run it with `python docs/notebooks/study.py`, open it in an editor
# that knows cells, or turn it into a notebook with `jupytext --to ipynb docs/notebooks/study.py` (jupytext is on PyPI).
# Pictures and pages go to a new temporary folder, which is printed, or to the folder in `RANKPILOT_NOTEBOOK`.

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rankpilot.agents.policy_file import load_policy
from rankpilot.common.statistics import estimate
from rankpilot.decide.choice import percent
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.plan.goal import Goal
from rankpilot.env.evaluate import beside, compare
from rankpilot.env.stack.episodes import StackedEpisodes
from rankpilot.env.tasks import draw_task
from rankpilot.study.page import page_data, write_page
from rankpilot.study.replay import Question, redecide, replay, what_if
from rankpilot.study.run_data import read_run
from rankpilot.study.why import best_first, explain, explanations

folder = Path(os.environ.get("RANKPILOT_NOTEBOOK") or tempfile.mkdtemp(prefix="rankpilot-study-"))
print("Everything is written to", folder)

# %% [markdown]
# ## Runs with logs
#
# A task is a short fine-tune of a small pretrained model; here its learning rate is off. Eight of them are steered by
# the rule `rate`, stacked on one frozen model, with a log each.

# %%
policy = load_policy("rate")
generator = np.random.default_rng(0)
tasks = [draw_task(generator, base="llama-4x32", regime="rate", steps=60) for _ in range(8)]
episodes = StackedEpisodes("llama-4x32", len(tasks), policy.schedule)
logs = [DecisionLog(folder / "logs" / str(number)) for number in range(len(tasks))]
episodes.begin(dict(enumerate(tasks)), {number: (log, policy) for number, log in enumerate(logs)})
losses = episodes.play(dict.fromkeys(range(len(tasks)), policy))
print(f"{policy.name}: held-out losses from {min(losses.values()):.3f} to {max(losses.values()):.3f}")

# %% [markdown]
# ## One run
#
# The log of a run holds for each decision what the policy saw, what it computed and what came of it. We take the run
# whose learning rate moved most.

# %%
log = max(logs, key=lambda each: sum(bool(record.decision.change) for record in each.read()))
first = log.logged(0)
print(f"{first.run}: {len(log)} decisions")
for number in range(len(log)):
    logged = log.logged(number)
    moved = np.count_nonzero(logged.rank_after != logged.rank_before)
    print(f"  decision {number} at step {logged.step}: {moved} of {len(logged.observation.names)} modules move")

# %% [markdown]
# A log would be worth little if it did not hold all that counts. Taken again from the log, each decision is equal, bit
# for bit: plans, expectations and ranks.

# %%
differences = [redecide(log.logged(number), policy).differences for number in range(len(log))]
print("Decisions that differ when they are taken again:", sum(map(bool, differences)))

# %% [markdown]
# ### Why this plan
#
# A run begins with the plan of the default policy, which makes candidates: one rank on a part of the model. Each has a
# cost, which is computed, and a loss beside that of plain LoRA (rank 8 on every module), which is expected from real
# fine-tunes, with a spread over them. The plan whose loss is surely the lowest is taken: what is expected and half a
# standard deviation.

# %%
why = explain(first, what_ifs=False)
print(why.verdict)
for sentence in why.sentences():
    print(" -", sentence)
found = first.choice
for plan in best_first(found)[:5]:
    print(
        f"  {found.names[plan]}: expected {percent(found.expected[plan])}, "
        f"very likely at most {percent(found.surely[plan])}"
    )

# %% [markdown]
# ### What the expected loss is made of
#
# The prediction is linear, so it is the sum of its parts: how much each feature of the plan adds. The features are
# those of `rankpilot.decide.plan.worth`.

# %%
parts = why.to_json()["parts"]
for part in parts:
    print(f"  {part['name']:45s} {percent(part['value'])}")
print(f"  {'total':45s} {percent(sum(part['value'] for part in parts))}")

# %% [markdown]
# ### What if
#
# How much less of the budget would have led to another plan? The answer is found by deciding again, at the amount that
# is told and at one step less. And with the goal of fewest bytes?

# %%
case = redecide(first, load_policy("default"))
for direction in (-1, 1):
    answer = what_if(case, Question("budget", direction))
    if answer is None:
        print(f"A {'larger' if direction > 0 else 'smaller'} budget: nothing that was tried changes the plan.")
    else:
        print(answer.text, "Checked:", answer.holds(case))
for tolerance in (0.01, 0.03, 0.1):
    thrifty = replace(found, goal=Goal("bytes", tolerance))
    print(f"Fewest bytes, at most {tolerance:.0%} more loss: {thrifty.names[thrifty.best]}")

# %% [markdown]
# ### What another policy would have done
#
# In the states that this run went through, a rule decides instead.

# %%
other = replay(log, load_policy("signal-mean"))
for each in other.agreements:
    print(f"step {each.logged.step}: {each.same} of {len(each.other)} ranks as {other.policy} would have them")

# %% [markdown]
# ### As a page
#
# The page is one HTML file with all of this for every decision; `rankpilot study RUN` writes it on the command line.

# %%
write_page(page_data([read_run(log.folder)], [explanations(log, policy)]), folder / "run.html")
print("Page of the run:", folder / "run.html")

# %% [markdown]
# ## Some tasks
#
# One run tells little. Policies play the same tasks, with the same seeds and batches, and a difference counts where
# its interval leaves out 0: `estimate` gives that of a bootstrap over tasks. On the command line
# `rankpilot policy evaluate` does the same.

# %%
names = ("rate", "left-alone", "uniform")
rows = list(compare({name: load_policy(name) for name in names}, dict.fromkeys(tasks, "rate")))
for name in names[1:]:
    changes = beside(rows, name, "rate")
    print(f"{name}: the loss is {estimate(list(changes.values()), list(changes)):+.1f} % above that of rate")
