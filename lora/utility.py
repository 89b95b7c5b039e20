"""The plan with the most utility inside a budget.

Prices of bytes are no sum over the modules: q, k and v share an input, what lies above the deepest adapted module is held for all
of them at once, and the peak is the highest of several moments.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from ..errors import ConfigError
from .cost import FloatArray
from .draft import Draft
from .ladder import IntArray
from .problem import PlanProblem
from .relaxation import Market, Relaxation

ENTRIES = 4
ROUNDS = 3
_LEVELS = np.geomspace(1e-9, 1.0, 1500)


def best_plan(problem: PlanProblem, utility: FloatArray) -> IntArray:
    """best"""
    problem = problem.fresh()
    best = problem.bottoms
    if not problem.fits(problem.ladder.array[best]):
        return problem.ladder.array[best]
    modules = np.arange(len(best))
    relaxed = Relaxation(problem, utility)
    prices = relaxed.start()
    if not prices.any():
        return problem.ladder.array[problem.tops]
    def worth(r): return float(utility[modules, r].sum())
    tried = set()
    for i in range(ENTRIES):
        order, estimates = relaxed.entries(prices)
        places = [p for p in np.argsort(-estimates, kind="stable") if int(order[p]) not in tried][:1]
        for place in places:
            tried.add(int(order[place]))
            for _ in range(ROUNDS):
                plan, fit = _at_entry(problem, relaxed, utility, order[: place + 1], prices)
                if worth(plan) > worth(best):
                    best = plan
                prices = relaxed.shifted(prices, fit)
    best = _improve(problem, utility, best, prices)
    return problem.ladder.array[best]


def _at_entry(problem, relaxed, utility, allowed, prices):
    market = Market(relaxed, allowed, prices)
    ladder = problem.ladder.array
    found = {}
    def fits(i):
        found[i] = market.choose(_LEVELS[i]).rungs
        return problem.fits(ladder[found[i]])
    level = bisect_left(range(len(_LEVELS)), True, key=fits)
    plan = found[level] if level in found else problem.bottoms
    return _spend(problem, utility, plan, prices), plan


def _spend(problem, utility, plan, prices, barred=None):
    units = prices @ problem.cost.per_rank
    ladder = problem.ladder.array
    draft = Draft(problem, np.zeros(len(plan)), plan)
    steps = np.diff(utility, axis=1, prepend=0) / np.maximum(units[:, None] * np.diff(ladder, prepend=0), 1e-300)
    rungs = np.arange(len(ladder))
    def rise():
        m, r = np.nonzero((rungs > draft.rungs[:, None]) & (rungs <= problem.tops[:, None]) & (draft.rungs > 0)[:, None])
        o = np.argsort(-steps[m, r], kind="stable")
        # rungs of one module in rising order
        draft.take(m[o], r[o])
    rise()
    while True:
        add = draft.additions() 
        price = add[:, :, None] + problem.cost.per_rank[:, :, None] * ladder
        ok = ((draft.price[:, None, None] + price) <= problem.limit).all(axis=0) & (draft.rungs == 0)[:, None] & (rungs > 0) & (rungs <= problem.tops[:, None]) & (utility > 0)
        if barred is not None: ok[barred] = False
        if not ok.any(): break
        ratio = np.where(ok, utility / np.maximum(np.tensordot(prices, price, 1), 1e-300), -1)
        m, r = np.unravel_index(ratio.argmax(), ratio.shape)
        draft.lift(int(m), int(r))
    rise()
    return draft.rungs


def _improve(problem, utility, best, prices):
    modules = np.arange(len(best))
    def worth(r): return float(utility[modules, r].sum())
    units = prices @ problem.cost.per_rank
    improved = True
    tries = 0
    while improved and tries < 60:
        improved = False
        cand = np.flatnonzero(best > problem.bottoms)
        cand = cand[np.argsort(utility[cand, best[cand]])][:12]
        for m in cand:
            tries += 1
            trial = best.copy(); trial[m] = problem.bottoms[m]
            trial = _spend(problem, utility, trial, prices, m)
            if worth(trial) > worth(best) * (1 + 1e-12):
                best = trial; improved = True
                break
    return best
