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
from dataclasses import replace
from pathlib import Path

import numpy as np
from rankpilot.agents.evaluation.evaluate import LOGS, ROWS
from rankpilot.agents.evaluation.replayed import Replayed
from rankpilot.agents.evaluation.runs import compare, log_folder
from rankpilot.agents.learned.exploring import exploring
from rankpilot.agents.learned.policy_file import load_policy, policy_schedule
from rankpilot.allocation.log import DecisionLog
from rankpilot.common.drawing import save_figure
from rankpilot.env.tasks.suites import evenly, find_tasks
from rankpilot.study.dataset import sample
from rankpilot.study.decision.case import Case
from rankpilot.study.decision.explain import explain, explanations
from rankpilot.study.decision.redecide import redecide
from rankpilot.study.decision.replay import replay
from rankpilot.study.decision.shapley import GROUPS, attribute
from rankpilot.study.decision.stability import stability
from rankpilot.study.decision.what_if import Question, what_if
from rankpilot.study.off_policy.from_logs import logged_suite
from rankpilot.study.off_policy.targets import TargetPolicy
from rankpilot.study.off_policy.weighted import importance, self_normalised
from rankpilot.study.page.data import page_data
from rankpilot.study.page.html import write_page
from rankpilot.study.policy.suite_page import suite_data, write_suite_page
from rankpilot.study.policy.suite_study import study_suite
from rankpilot.study.run.heatmap import rank_heatmap
from rankpilot.study.run.run_data import read_run

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
case = Case(first, policy)
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
# One run tells little. Over the suite, each figure comes with the 95 % interval of a bootstrap over tasks; a difference
# whose interval holds 0 decides nothing. Runs at the final ranks of the logged ones, taken from the first step on, tell
# what later decisions were worth.

# %%
compare([Replayed(folder / LOGS / policy.name)], tasks, schedule, workers=1, file=folder / ROWS)
study = study_suite(folder, policy.name, policy)
data = suite_data(study)
for sentence in (*data["sentences"]["verdict"], *data["sentences"]["promise"], *data["sentences"]["traits"]):
    print(" -", sentence)
write_suite_page(data, folder / "suite.html")
print("Page of the suite:", folder / "suite.html")

# %% [markdown]
# ### What another policy would have gained: off-policy estimates
#
# The explorer logged with which probability it took each plan. So its runs tell what another policy would have gained
# with its first plan, if the explorer took such plans often enough. Where it did not, there is no number: an estimate
# from a handful of tasks would mislead. A policy that draws at half the temperature overlaps; one that always
# takes the rule top-down does not.

# %%
suite = logged_suite(folder, explorer.name)
cooler = replace(explorer, temperature=2.0)
drawn = [replace(each.deliberation, temperature=cooler.temperature).probabilities for each in suite.decisions]
close = TargetPolicy("half as hot", np.concatenate(drawn))
far = suite.target(load_policy("top-down"))
print(f"as logged: {suite.choices.outcomes.mean():+.3f} in log loss below uniform rank")
for target in (close, far):
    for estimate in (importance, self_normalised):
        found = estimate(suite.choices, target)
        told = found.refused or f"{found:+.3f}, effective sample size {found.effective_size:.1f}"
        print(f"{target.name}, {found.method}: {told}")

# %% [markdown]
# ## A data set of decisions
#
# Rankpilot ships a sample of the decisions from which its value networks learned: what was seen, which ranks were
# given, how the run ended. `rankpilot study dataset` writes such a data set from runs of your own.

# %%
trials = sample()
table = trials.table(["task", "kind", "budget", "source"])
columns = len(trials.table().column_names)
tasks_of_sample = set(table["task"].to_pylist())
print(f"{table.num_rows} decisions on {len(tasks_of_sample)} tasks, of {columns} columns")
print("kinds of task:", ", ".join(sorted(set(table["kind"].to_pylist()))))
