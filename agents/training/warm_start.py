"""A start better than the rule: scores learned from tasks whose best allocation is known.

On planted tasks the oracle knows what each module is worth. The network learns to tell that from what a policy sees, at
every decision of runs that it explores; where the worth is not known, its scores stay those of the rule. What signals
cannot tell averages out, so scores of modules that look alike stay close.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ...common.arrays import Arrays, FloatArray
from ...env.tasks.proxy_task import ProxyTask
from .ppo_policy import RankPolicy
from .rollout_env import ProxyVecEnv

SPAN = 4.0
"""Worths lower than the largest by more than this, in log, count alike: their order is noise."""

EXPONENT = 0.5
"""Rank goes as this power of the worth: each further rank of a module captures less."""

PASSES, BATCH, RATE = 30, 64, 2e-3


def target_scores(worth: FloatArray) -> FloatArray:
    """Scores that a module's worth asks for, centred, (modules,).

    Args:
        worth: in nats, at least 0, (modules,).
    """
    logs = np.log(np.maximum(worth, 1e-12))
    scores = EXPONENT * np.maximum(logs - logs.max(), -SPAN)
    return np.asarray(scores - scores.mean())


@dataclass
class ScoreDataset:
    """What was seen and what the scores should have been; one row an observation.

    Attributes:
        rows: the arrays of the observations.
        targets: scores, padded with zeros.
        known: whether the worth is known; else the rule's scores are the target.
    """

    rows: list[Arrays] = field(default_factory=list)
    targets: list[FloatArray] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)

    def note(self, arrays: Arrays, worths: Sequence[FloatArray | None]) -> None:
        """Take in the observations of a stack."""
        for row, worth in enumerate(worths):
            target = np.zeros(arrays["mask"].shape[1])
            if worth is not None:
                target[: len(worth)] = target_scores(worth)
            self.rows.append({key: value[row] for key, value in arrays.items()})
            self.targets.append(target)
            self.known.append(worth is not None)


def explore(policy: RankPolicy) -> Callable[[Arrays], NDArray[np.float32]]:
    """Actions drawn from the policy's distribution."""

    @torch.no_grad()
    def act(arrays: Arrays) -> NDArray[np.float32]:
        actions: NDArray[np.float32] = policy(policy.obs_to_tensor(arrays)[0])[0].cpu().numpy()
        return actions

    return act


def warm_start(
    policy: RankPolicy,
    envs: ProxyVecEnv,
    tasks: Sequence[ProxyTask],
    *,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Teach a policy's network the worth of modules.

    Args:
        policy: explores and is taught.
        envs: runs the tasks.
        tasks: planted ones, and others.
        seed: of the order of the dataset.
        on_progress: called with the tasks that are done and all of them, now and then.

    Returns:
        Mean squared error of the scores where the worth is known: "before" and "after", and "constant" for equal ones.
        Nothing where no task is planted: there is nothing to learn then.
    """
    if not any(task.kind == "planted" for task in tasks):
        return {}
    dataset = ScoreDataset()
    envs.play(tasks, explore(policy), note=dataset.note, on_progress=on_progress)
    keys = dataset.rows[0].keys()
    seen = {key: torch.from_numpy(np.stack([row[key] for row in dataset.rows])) for key in keys}
    known = torch.tensor(dataset.known)
    with torch.no_grad():
        rule = policy.get_distribution(seen).mean[:, : seen["mask"].shape[1]]
        placement = policy.get_distribution(seen).mean[:, seen["mask"].shape[1] :].clone()
    targets = torch.where(known[:, None], torch.from_numpy(np.stack(dataset.targets)).float(), rule)
    weights = seen["mask"].float() / seen["mask"].sum(dim=1, keepdim=True)

    def errors(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = policy.get_distribution({key: value[rows] for key, value in seen.items()}).mean
        count = targets.shape[1]
        difference = mean[:, :count] - targets[rows]
        centred = difference - (difference * weights[rows]).sum(
            dim=1, keepdim=True
        )  # only differences of scores matter
        return (centred.square() * weights[rows]).sum(dim=1), (mean[:, count:] - placement[rows]).square().sum(dim=1)

    everything = torch.arange(len(known))
    with torch.no_grad():
        before = errors(everything)[0][known].mean()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.network.parameters(), lr=RATE, weight_decay=1e-2)
    for _ in range(PASSES):
        order = torch.randperm(len(known), generator=generator)
        for rows in torch.split(order, BATCH):
            scores, steered = errors(rows)
            optimizer.zero_grad()
            (scores.mean() + steered.mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        after = errors(everything)[0][known].mean()
    constant = (targets.square() * weights).sum(dim=1)[known].mean()
    return {"before": float(before), "after": float(after), "constant": float(constant)}
