# %% [markdown]
# # One run and one suite
#
# This notebook leads through what `rankpilot.study` can say of a policy: first of one run, decision by decision, then
# of a suite of tasks. Everything that it reads it makes itself, in a minute or two on one core; nothing is
# downloaded.
#
# It is plain Python in jupytext's percent format. Run it with `python docs/notebooks/study.py`, open it in an editor
# that knows cells, or turn it into a notebook with `jupytext --to ipynb docs/notebooks/study.py` (jupytext is on PyPI).
# Pictures and pages go to a new temporary folder, which is printed, or to the folder in `RANKPILOT_NOTEBOOK`.

# %%
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from rankpilot.agents.policy_file import load_policy, policy_schedule
from rankpilot.common.drawing import save_figure
from rankpilot.decide.choice import PLAIN, percent
from rankpilot.decide.log import DecisionLog
from rankpilot.env.proxy_task import evenly, find_tasks
from rankpilot.plan.goal import Goal
from rankpilot.study.page import page_data, write_page
from rankpilot.study.pictures import rank_heatmap
from rankpilot.study.replay import Question, redecide, replay, what_if
from rankpilot.study.run_data import read_run
from rankpilot.study.why import best_first, explain, explanations
from rankpilot.training.compare import LOGS, ROWS, compare, log_folder
from rankpilot.training.results import estimate, read_rows

folder = Path(os.environ.get("RANKPILOT_NOTEBOOK") or tempfile.mkdtemp(prefix="rankpilot-study-"))
print("Everything is written to", folder)

# %% [markdown]
# ## Runs with logs
#
# A proxy task is a short fine-tune of a small pretrained model; `planted` tasks hide a change in some layers, which the
# adapters have to find. Eight of them are run by the policy that ships with rankpilot. On the command line
# `rankpilot policy evaluate default --logs` does the same.

# %%
policy = load_policy("default")
tasks = evenly(find_tasks(("planted",), "validation"), 8)
schedule = policy_schedule("default")
rows = compare([policy], tasks, schedule, workers=1, file=folder / ROWS, logs=folder / LOGS)
gains = [row.improvement for row in rows if row.policy == policy.name]
print(f"{policy.name}: mean gain over uniform rank {np.mean(gains):+.2f} of the headroom, on {len(gains)} tasks")

# %% [markdown]
# ## One run
#
# The log of a run holds for each decision what the policy saw, what it computed and what came of it. We take the run
# with the largest choice of plans.

# %%
logs = {(row.task, row.seed): DecisionLog(log_folder(folder / LOGS, row.key)) for row in rows}
choices = {key: log.logged(0).choice for key, log in logs.items()}
shown = max(rows, key=lambda row: len(choices[row.task, row.seed].plans))
log = logs[shown.task, shown.seed]
first = log.logged(0)
print(f"{shown.task}: gain {shown.improvement:+.2f}, {len(log)} decisions")
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
# The policy makes candidates: one rank on a part of the model. Each has a cost, which is computed, and a loss beside
# that of plain LoRA (rank 8 on every module), which is expected from real fine-tunes, with a spread over them. The plan
# whose loss is surely the lowest is taken: what is expected and one standard deviation.

# %%
why = explain(first, policy, what_ifs=False)
print(why.verdict)
for sentence in why.sentences():
    print(" -", sentence)
found = first.choice
for plan in best_first(found)[:5]:
    print(
        f"  {found.names[plan]}: expected {percent(found.expected[plan])}, surely at most {percent(found.surely[plan])}"
    )

# %% [markdown]
# ### What the expected loss is made of
#
# The prediction is linear, so it is the sum of its parts: how much each feature of the plan adds. The features are
# those of `rankpilot.plan.worth`.

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
case = redecide(first, policy)
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
# ### As a picture and as a page
#
# The page is one HTML file with all of this for every decision; `rankpilot study RUN` writes it on the command line.

# %%
logged = [log.logged(number) for number in range(len(log))]
ranks = np.stack([each.rank_after for each in logged])
steps = [each.step for each in logged]
picture = rank_heatmap(steps, ranks, first.observation.names, first.problem.blocks, total_steps=tasks[0].steps)
save_figure(picture, folder / "ranks.png")
write_page(page_data([read_run(log.folder)], [explanations(log, policy)]), folder / "run.html")
print("Picture:", folder / "ranks.png")
print("Page of the run:", folder / "run.html")

# %% [markdown]
# ## One suite
#
# One run tells little. Over the suite, a table of its rows says how often the policy leaves plain LoRA, what it gains,
# and what went wrong where. A difference counts where its interval leaves out 0: `estimate` gives that of a bootstrap
# over tasks. What the policy expects was learned from real fine-tunes of larger models: on proxies it need not hold.

# %%
mine = pd.DataFrame([asdict(row) for row in rows if row.policy == policy.name]).set_index(["task", "seed"])
mine["plan"] = [choices[key].names[choices[key].taken] for key in mine.index]
mine["expected"] = [choices[key].expected[choices[key].taken] for key in mine.index]
gain = estimate(mine["improvement"].to_numpy(), mine.index.get_level_values("task").to_list())
print(f"The gain of {policy.name} over uniform rank is {gain:+.2f} of the headroom.")
print(f"It leaves plain LoRA in {(mine['plan'] != PLAIN).mean():.0%} of the runs.")
print(mine.groupby("cost_kind")["improvement"].agg(["count", "mean"]).round(2).to_string())
print("The worst runs:")
print(mine.nsmallest(3, "improvement")[["improvement", "cost_kind", "plan", "expected"]].round(2).to_string())

# %% [markdown]
# ### What another policy would have gained
#
# Run it: that takes seconds, on the command line with `rankpilot policy evaluate`.

# %%
compare([load_policy("signal-mean")], tasks, schedule, workers=1, file=folder / ROWS)
rows = read_rows(folder / ROWS)
for name in (policy.name, "signal-mean"):
    gains = [row.improvement for row in rows if row.policy == name]
    print(f"{name}: {np.mean(gains):+.2f} of the headroom")
