"""The shipped policy's ranks on the validation suite, beside those on record: `python tests/recorded/decisions.py`.

With a new policy they are recorded anew: `python tests/recorded/decisions.py --record`.

A change that is not meant to change decisions leaves them equal: rank of every module at every decision of 48 tasks,
recorded on a 2-core Xeon. Another kind of processor rounds differently, and a near tie may then go the other way.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from itertools import groupby
from pathlib import Path

from rankpilot.agents.learned.policy_file import load_policy, policy_schedule
from rankpilot.agents.observation import Observation
from rankpilot.common.workers import worker_pool
from rankpilot.env.proxy_task import ProxyTask, find_tasks
from rankpilot.env.stacked import StackedEpisodes
from rankpilot.env.suite_names import SUITES

RECORD = Path(__file__).with_name("decisions.json.gz")
SLOTS = 16


def ranks_of(tasks: list[ProxyTask]) -> list[list[list[int]]]:
    """Ranks after each decision, by task; the tasks share a base and a batch shape."""
    policy, schedule = load_policy("default"), policy_schedule("default")
    episodes = StackedEpisodes(tasks[0].base, schedule, SLOTS)
    episodes.start_all(tasks)
    ranks: list[list[list[int]]] = [[] for _ in tasks]

    def note(_: list[Observation], active: list[int]) -> None:
        for slot in active:
            ranks[slot].append(episodes.under_way[slot].ranks.tolist())

    episodes.run_to_the_end(lambda seen: [policy.decide(observation) for observation in seen], note)
    return ranks


def main(*, record: bool) -> int:
    """Compare, or record; returns the exit status."""
    tasks = sorted(find_tasks(SUITES, "validation"), key=lambda task: (task.base, task.batch_size, task.length))
    chunks = []
    for _, alike in groupby(tasks, key=lambda task: (task.base, task.batch_size, task.length)):
        group = list(alike)
        chunks += [group[start : start + SLOTS] for start in range(0, len(group), SLOTS)]
    found = {}
    with worker_pool(os.cpu_count() or 1) as workers:
        for chunk, ranks in workers.spread(ranks_of, chunks):
            found |= {task.id: rows for task, rows in zip(chunk, ranks, strict=True)}
    if record:
        RECORD.write_bytes(gzip.compress(json.dumps(found, sort_keys=True).encode(), mtime=0))
    recorded = json.loads(gzip.decompress(RECORD.read_bytes()))
    different = sorted(task for task, rows in found.items() if rows != recorded[task])
    print(f"{len(tasks) - len(different)} of {len(tasks)} tasks have the recorded ranks.", *different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(record="--record" in sys.argv[1:]))
