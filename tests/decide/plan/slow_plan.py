"""Plans made slowly: every trial is priced anew. What `rankpilot.decide.plan.plan` must agree with."""

from __future__ import annotations

import heapq

import numpy as np
from rankpilot.decide.plan.plan import Plan

from .synthetic_costs import fixed_cost


def cost_of(problem, ranks):
    return float((fixed_cost(problem.cost, ranks > 0) + problem.cost.per_rank @ ranks).max())


def fits(problem, rungs):
    return cost_of(problem, problem.ladder.array[rungs]) <= problem.limit


def lowest_rungs(problem):
    """The lowest rung that each module must keep: the first one at or above its lower bound, if it can have that."""
    if problem.low is None:
        return np.zeros_like(problem.ranks)
    rungs = []
    for low, most in zip(problem.low.tolist(), problem.max_ranks.tolist(), strict=True):
        able = [rung for rung, rank in enumerate(problem.ladder.ranks) if rank <= most]
        rungs.append(next((rung for rung in able if problem.ladder.ranks[rung] >= low), able[-1]))
    return np.array(rungs)


def highest_rungs(problem):
    """The highest rung that each module may have."""
    most = problem.max_ranks if problem.high is None else np.minimum(problem.max_ranks, problem.high)
    return np.array([max(r for r, rank in enumerate(problem.ladder.ranks) if rank <= m) for m in most.tolist()])


def bounds_of(problem):
    """The lowest and the highest rung of each module that a decision may choose."""
    bottoms, tops, now = lowest_rungs(problem), highest_rungs(problem), problem.ladder.rung(problem.ranks)
    reach = problem.ladder.top if problem.max_step is None else problem.max_step
    upper = np.maximum(np.minimum(now + reach, tops), bottoms)
    lower = np.minimum(np.maximum(now - reach, bottoms), upper)
    if problem.pinned is not None:
        kept = np.where((now > tops) & (bottoms == 0), 0, now)
        lower, upper = (np.where(problem.pinned, kept, bound) for bound in (lower, upper))
    return lower, upper


def pack(problem, scores, rank_floor):
    bottoms, tops = lowest_rungs(problem), highest_rungs(problem)
    for rung in range(int(np.clip(problem.ladder.rung(round(max(rank_floor, 1))), 1, problem.ladder.top)), 0, -1):
        rungs = _admit(problem, scores, rung, bottoms, tops)
        if (rungs > bottoms).any():
            start = np.maximum(np.minimum(rungs, 1), bottoms)
            return _fill(problem, start, scores, upper=np.where(start > 0, tops, 0))
    # no module of the top layer fits, but a smaller one further down may
    return _fill(problem, bottoms, scores, upper=tops)


def _admit(problem, scores, rung, bottoms, tops):
    rungs = bottoms.copy()
    for block in range(int(problem.blocks.max()), -1, -1):
        members = np.flatnonzero(problem.blocks == block)
        whole = rungs.copy()
        whole[members] = np.maximum(np.minimum(rung, tops[members]), bottoms[members])
        if fits(problem, whole) or (whole == rungs).all():
            rungs = whole
            continue
        for member in _precedence(problem, scores):
            if member in members:
                candidate = rungs.copy()
                candidate[member] = whole[member]
                if fits(problem, candidate):
                    rungs = candidate
        break
    return rungs


def project(problem, wanted, scores):
    lower, upper = bounds_of(problem)
    bottoms = lowest_rungs(problem)
    wished = np.clip(problem.ladder.rung(wanted), lower, upper)
    pinned = np.zeros(len(lower), dtype=bool) if problem.pinned is None else problem.pinned
    rungs = _repair(problem, wished.copy(), scores, (lower, np.where(pinned, lower, bottoms)))
    if not fits(problem, rungs):
        droppable = pinned & (bottoms == 0)
        rungs, upper = np.where(droppable, 0, rungs), np.where(droppable, 0, upper)
    ranks = _fill(problem, rungs, scores, upper)
    return Plan(problem.ladder.array[wished], ranks, cost_of(problem, ranks))


def _precedence(problem, scores):
    return np.argsort(-(scores + problem.hysteresis * (problem.ladder.rung(problem.ranks) > 0)), kind="stable")


def _level(problem, module, rung, scores):
    kept = problem.hysteresis * (rung <= problem.ladder.rung(problem.ranks[module]))
    return float(np.log(max(problem.ladder.ranks[rung], 0.5)) - scores[module] - kept)


def _repair(problem, rungs, scores, bounds):
    for bound in bounds:
        heap = [
            (-_level(problem, m, int(rungs[m]), scores), problem.blocks[m], m)
            for m in range(len(rungs))
            if rungs[m] > bound[m]
        ]
        heapq.heapify(heap)
        while heap and not fits(problem, rungs):
            _, block, module = heapq.heappop(heap)
            rungs[module] -= 1
            if rungs[module] > bound[module]:
                heapq.heappush(heap, (-_level(problem, module, int(rungs[module]), scores), block, module))
    return rungs


def _fill(problem, rungs, scores, upper):
    rungs = rungs.copy()
    _raise(problem, rungs, scores, upper, rungs > 0)
    added = np.zeros(len(rungs), dtype=bool)
    for module in _precedence(problem, scores):
        if rungs[module] == 0 and upper[module] > 0:
            rungs[module] = 1
            added[module] = fits(problem, rungs)
            rungs[module] = int(added[module])
    _raise(problem, rungs, scores, upper, added)
    return np.asarray(problem.ladder.array[rungs], dtype=np.int64)


def _raise(problem, rungs, scores, upper, among):
    heap = [
        (_level(problem, m, int(rungs[m]) + 1, scores), m) for m in np.flatnonzero(among & (rungs < upper)).tolist()
    ]
    heapq.heapify(heap)
    while heap:
        _, module = heapq.heappop(heap)
        rungs[module] += 1
        if not fits(problem, rungs):
            rungs[module] -= 1
        elif rungs[module] < upper[module]:
            heapq.heappush(heap, (_level(problem, module, int(rungs[module]) + 1, scores), module))
