# %% [markdown]
# # One run and one suite
#
# This notebook leads through what `rankpilot.study` can say of a policy: first of one run, decision by decision, then
# of a suite of tasks. Everything that it reads it makes itself, in less than a minute on one core; nothing is
# downloaded.
#
# It is plain Python in jupytext's percent format. Run it with `python docs/notebooks/study.py`, open it in an editor
# that knows cells, or turn it into a notebook with `jupytext --to ipynb docs/notebooks/study.py` (jupytext is on PyPI).
# Pictures and pages go to a new temporary folder, which is printed, or to the folder in `RANKPILOT_NOTEBOOK`.

# %%
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from rankpilot.agents.learned.policy import exploring
from rankpilot.agents.learned.policy_file import load_policy, policy_schedule
from rankpilot.agents.log import DecisionLog
from rankpilot.common.drawing import save_figure
from rankpilot.env.proxy_task import evenly, find_tasks
from rankpilot.study.page import page_data, write_page
from rankpilot.study.pictures import rank_heatmap
from rankpilot.study.replay import DecidedAgain, Question, redecide, replay, stability, what_if
from rankpilot.study.run_data import read_run
from rankpilot.study.shapley import GROUPS, attribute
from rankpilot.study.why import explain, explanations
from rankpilot.training.compare import LOGS, ROWS, STATIC, Replayed, compare, log_folder
from rankpilot.training.results import estimate, read_rows

folder = Path(os.environ.get("RANKPILOT_NOTEBOOK") or tempfile.mkdtemp(prefix="rankpilot-study-"))
print("Everything is written to", folder)

# %% [markdown]
# ## Runs with logs
#
# A proxy task is a short fine-tune of a small pretrained model; `planted` tasks hide a change in some layers, which the
# adapters have to find. Twelve of them are run twice: by the policy that ships with rankpilot, and by the same policy
# exploring, which draws its plans at a temperature and logs the probabilities. `rankpilot evaluate default
# explore-4:default --logs` does the same on the command line.

# %%
policy = load_policy("default")
explorer = exploring(policy, 4.0)
tasks = evenly(find_tasks(("planted",), "validation"), 12)
schedule = policy_schedule("default")
rows = compare([policy, explorer], tasks, schedule, workers=1, file=folder / ROWS, logs=folder / LOGS)
for name in (policy.name, explorer.name):
    gains = [row.improvement for row in rows if row.policy == name]
    print(f"{name}: mean gain over uniform rank {np.mean(gains):+.2f} of the headroom, on {len(gains)} tasks")

# %% [markdown]
# ## One run
#
# The log of a run holds for each decision what the policy saw, what it computed and what came of it. We take the run
# that gained the most.

# %%
best = max((row for row in rows if row.policy == policy.name), key=lambda row: row.improvement)
log = DecisionLog(log_folder(folder / LOGS, best.key))
first = log.logged(0)
print(f"{best.task}: gain {best.improvement:+.2f}, {len(log)} decisions")
for number in range(len(log)):
    logged = log.logged(number)
    moved = np.count_nonzero(logged.rank_after != logged.rank_before)
    print(f"  decision {number} at step {logged.step}: {moved} of {len(logged.observation.names)} modules move")

# %% [markdown]
# A log would be worth little if it did not hold all that counts. Taken again from the log, each decision is equal, bit
# for bit: scores, candidates, votes and ranks.

# %%
differences = [redecide(log.logged(number), policy).differences for number in range(len(log))]
print("Decisions that differ when they are taken again:", sum(map(bool, differences)))

# %% [markdown]
# ### Why this plan
#
# The policy makes candidates, and each of its value networks votes on the plans that they lead to: how much better than
# uniform rank is it, in the unit of the votes (asinh of the difference of log losses in per cent)? The plan with the
# highest lower bound (mean less the spread) is taken; of plans that cannot be told from it, the one nearest to uniform
# rank.

# %%
why = explain(first, policy, what_ifs=False)
print(why.verdict)
for sentence in why.sentences():
    print(" -", sentence)
found = first.deliberation
print("Votes on the plan:", np.round(found.votes[:, found.plan], 3))
print(f"Lower bound: {found.bound[found.plan]:.3f}")

# %% [markdown]
# ### Which features speak for it: Shapley values
#
# Groups of features are hidden behind a baseline in every combination. What a group adds on the mean over all orders is
# its Shapley value. The values are exact, and with the plan's shape alone they sum to the bound.

# %%
parts = attribute(first, policy)
for name, value in sorted(zip(GROUPS, parts.bound, strict=True), key=lambda pair: -abs(pair[1])):
    print(f"  {name:20s} {value:+.3f}")
print(f"  {'shape of the plan':20s} {parts.bound_alone:+.3f}")
print(f"  {'total':20s} {parts.bound_total:+.3f}, missed by {parts.error:.1e}")

# %% [markdown]
# ### What if
#
# How much less of the budget would have led to another plan? The answer is found by deciding again, at the amount that
# is told and at one step less.

# %%
case = DecidedAgain(first, policy)
for question in (Question("budget", -1), Question("budget", 1), Question("caution", 1)):
    answer = what_if(case, question)
    if answer is None:
        print(
            f"{question.kind}, {'more' if question.direction > 0 else 'less'}: nothing that was tried changes the plan."
        )
    else:
        print(answer.text, "Checked:", answer.holds(case))

# %% [markdown]
# ### How sure it is
#
# Signals are measured on a few batches and are noisy. The decision is taken again with noise on them.

# %%
for noise in (0.05, 0.3):
    print(stability(first, policy, noise, draws=20).sentence())

# %% [markdown]
# ### What another policy would have done
#
# In the states that this run went through, a rule decides instead.

# %%
other = replay(log, load_policy("signal-mean"))
for each in other.agreements:
    print(f"step {each.step}: {each.same} of {len(each.ranks)} ranks as {other.policy} would have them")

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
write_page(page_data([read_run(log.folder)], [explanations(log, policy, what_ifs=False)]), folder / "run.html")
print("Picture:", folder / "ranks.png")
print("Page of the run:", folder / "run.html")

# %% [markdown]
# ## One suite
#
# One run tells little. Over the suite, a table of its rows says how often the policy leaves uniform rank, whether runs
# gain where the votes promise it, and what went wrong where. Runs at the final ranks of the logged ones, taken from the
# first step on, tell what later decisions were worth. A difference counts where its interval leaves out 0: `estimate`
# gives that of a bootstrap over tasks.

# %%
compare([Replayed(folder / LOGS / policy.name)], tasks, schedule, workers=1, file=folder / ROWS)
rows = read_rows(folder / ROWS)
table = pd.DataFrame([asdict(row) for row in rows])
mine = table[table["policy"] == policy.name].set_index(["task", "seed"])
firsts = {}
for row in rows:
    if row.policy == policy.name:
        found = DecisionLog(log_folder(folder / LOGS, row.key)).logged(0).deliberation
        votes = {"leaves uniform": found.plan != found.reference, "promised": found.mean[found.plan]}
        firsts[row.task, row.seed] = votes | {"spread": found.std[found.plan]}
runs = pd.MultiIndex.from_tuples(firsts, names=["task", "seed"])
mine = mine.join(pd.DataFrame(list(firsts.values()), index=runs))
gain = estimate(mine["improvement"].to_numpy(), mine.index.get_level_values("task").to_list())
print(f"The gain of {policy.name} over uniform rank is {gain:+.2f} of the headroom.")
print(f"It leaves uniform rank in {mine['leaves uniform'].mean():.0%} of the runs.")
promise = mine.loc[mine["leaves uniform"], ["promised", "improvement"]].corr(method="spearman").iloc[0, 1]
print(f"Rank correlation of what the votes promise and what is gained: {promise:+.2f}")
print(mine.groupby("cost_kind")["improvement"].agg(["count", "mean"]).round(2).to_string())

# %%
static = table[table["policy"].str.endswith(STATIC)].set_index(["task", "seed"])["improvement"]
later = (mine["improvement"] - static).dropna()
worth = estimate(later.to_numpy(), later.index.get_level_values("task").to_list())
print(f"What it changes on the way is worth {worth:+.3f} of the headroom.")
print("The worst runs:")
print(mine.nsmallest(3, "improvement")[["improvement", "family", "cost_kind", "promised"]].round(2).to_string())

# %% [markdown]
# ### What another policy would have gained
#
# Run it: `compare([load_policy("signal-mean")], tasks, ...)`, or `rankpilot evaluate` on the command line, takes
# seconds. The explorer above logged with which probability it took each plan, so one could weigh its runs instead; but
# at the temperatures at which a policy still gains, its logs hardly hold the plans that another one would take
# (docs/experiments.md).

# %%
compare([load_policy("signal-mean")], tasks, schedule, workers=1, file=folder / ROWS)
rows = read_rows(folder / ROWS)
for name in (policy.name, explorer.name, "signal-mean"):
    gains = [row.improvement for row in rows if row.policy == name]
    print(f"{name}: {np.mean(gains):+.2f} of the headroom")
