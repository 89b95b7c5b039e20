"""Plans made slowly: every trial is priced anew. What `rankpilot.lora.plan` must agree with.

Word for word the planner that came first, before prices were kept up to date from move to move.
"""

from __future__ import annotations

import heapq

import numpy as np
from rankpilot.lora.plan import Plan


def pack(problem, scores, floor):
    free = problem.unbounded()
    rungs = np.zeros_like(free.ranks)
    for rung in range(int(np.clip(free.ladder.rung(round(max(floor, 1))), 1, free.ladder.top)), 0, -1):
        rungs = _admit(free, scores, rung)
        if rungs.any():
            break
    if not rungs.any():  # no module of the top layer fits, but a smaller one further down may
        return _fill(free, rungs, scores, upper=free.tops)
    start = np.minimum(rungs, 1)
    return _fill(free, start, scores, upper=np.where(start > 0, free.tops, 0))


def _admit(problem, scores, rung):
    rungs = np.zeros_like(problem.ranks)
    for block in range(int(problem.blocks.max()), -1, -1):
        members = np.flatnonzero(problem.blocks == block)
        whole = rungs.copy()
        whole[members] = np.minimum(rung, problem.tops[members])
        if problem.fits(problem.ladder.array[whole]):
            rungs = whole
            continue
        for member in members[np.argsort(-scores[members], kind="stable")]:
            trial = rungs.copy()
            trial[member] = min(rung, problem.tops[member])
            if problem.fits(problem.ladder.array[trial]):
                rungs = trial
        break
    return rungs


def project(problem, deltas, scores):
    now = problem.ladder.rung(problem.ranks)
    reach = problem.ladder.top if problem.max_step is None else problem.max_step
    upper = np.minimum(now + reach, problem.tops)
    lower = np.minimum(np.maximum(now - reach, 0), upper)
    held = np.zeros(len(now), dtype=bool) if problem.held is None else problem.held
    upper, lower = np.where(held, now, upper), np.where(held, now, lower)
    wished = np.clip(now + np.asarray(deltas, dtype=np.int64), lower, upper)
    rungs = _repair(problem, wished.copy(), scores, (lower, np.where(held, now, 0)))
    if not problem.fits(problem.ladder.array[rungs]):
        rungs, upper = np.where(held, 0, rungs), np.where(held, 0, upper)
    ranks = _fill(problem, rungs, scores, upper)
    return Plan(problem.ladder.array[wished], ranks, problem.price(ranks))


def _level(problem, rung, score):
    return float(np.log(max(problem.ladder.ranks[rung], 0.5)) - score)


def _repair(problem, rungs, scores, bounds):
    for bound in bounds:
        heap = [
            (-_level(problem, int(rungs[m]), scores[m]), problem.blocks[m], m)
            for m in range(len(rungs))
            if rungs[m] > bound[m]
        ]
        heapq.heapify(heap)
        while heap and not problem.fits(problem.ladder.array[rungs]):
            _, block, module = heapq.heappop(heap)
            rungs[module] -= 1
            if rungs[module] > bound[module]:
                heapq.heappush(heap, (-_level(problem, int(rungs[module]), scores[module]), block, module))
    return rungs


def _fill(problem, rungs, scores, upper):
    rungs = rungs.copy()
    ladder = problem.ladder.array
    spent = problem.price(ladder[rungs])
    for module, rise in _rises(problem, rungs, scores, upper, rungs > 0):
        price = float(problem.cost.per_rank[module]) * rise
        if spent + price <= problem.limit:
            spent += price
            rungs[module] += 1
    _add_modules(problem, rungs, scores, upper)
    return np.asarray(ladder[rungs], dtype=np.int64)


def _rises(problem, rungs, scores, upper, among):
    ladder = problem.ladder.ranks
    heap = [
        (_level(problem, int(rungs[m]) + 1, scores[m]), m) for m in np.flatnonzero(among & (rungs < upper)).tolist()
    ]
    heapq.heapify(heap)
    while heap:
        _, module = heapq.heappop(heap)
        rung = int(rungs[module])
        yield module, ladder[rung + 1] - ladder[rung]
        if rungs[module] > rung and rungs[module] < upper[module]:
            heapq.heappush(heap, (_level(problem, rung + 2, scores[module]), module))


def _add_modules(problem, rungs, scores, upper):
    ladder = problem.ladder.array
    added = np.zeros(len(rungs), dtype=bool)
    for module in np.argsort(-scores, kind="stable"):
        if rungs[module] == 0 and upper[module] > 0:
            rungs[module] = 1
            if problem.fits(ladder[rungs]):
                added[module] = True
            else:
                rungs[module] = 0
    for module, _ in _rises(problem, rungs, scores, upper, added):
        rungs[module] += 1
        if not problem.fits(ladder[rungs]):
            rungs[module] -= 1
