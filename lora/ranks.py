"""Change the rank of LoRA pairs in the middle of training: real tensors, function and optimiser kept.

For a pair A (r, d_in), B (d_out, r) with delta W = s B A:

* *shrink* to k: the best rank-k approximation of B A (Eckart and Young, 1936), by a singular value decomposition
  of the r x r core between the QR factors of B and A^T; the dense product is never formed;
* *grow*: new rows of A are fresh, new columns of B are zero, so the function does not change;
* *drop* to rank 0 and *revive*: the parameters stay the same objects, with empty storage in between;
* the scaling s stays as it is, so alpha follows the rank;
* the optimiser's moments follow the same linear maps (see `lora/optimizer_state`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import NonFiniteError
from .optimizer_state import StateMap, check_optimizer, map_state, reset_state
from .targets import TargetModule, check_ranks

DEAD_DIRECTION = 1e-6
"""A singular value below this share of the largest carries no function; its pair is seeded anew."""


BEFORE_THE_RUN = -1
"""The step that seeds first rows: growth at step 0 must not draw the same ones again."""


@dataclass(frozen=True)
class RankChange:
    """What happened to one module: its name, and its rank before and after."""

    name: str
    before: int
    after: int


def set_ranks(
    targets: Sequence[TargetModule],
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> list[RankChange]:
    """Give the named modules new ranks, shrinking first so that memory never passes the larger plan's.

    Args:
        targets: all target modules of the adapter.
        ranks: new rank by module name; modules that are not named keep theirs.
        optimizer: its state follows. Without one, only the weights change.
        seed: together with `step` and the module's name, decides the fresh rows of A.
        step: the training step at which the change happens.

    Returns:
        The changes made, in the order made; modules already at their rank are left out.

    Raises:
        UnknownNameError, ConfigError: see `check_ranks`.
        NonFiniteError: a pair that would shrink holds NaN or infinity; nothing has been changed then.
        UnsupportedError: the optimiser's state cannot be mapped; nothing has been changed then.
    """
    check_ranks(targets, dict(ranks))
    if optimizer is not None:
        check_optimizer(optimizer)
    changing = [t for t in targets if t.name in ranks and ranks[t.name] != t.rank]
    shrinking = [t for t in changing if ranks[t.name] < t.rank]
    for target in shrinking:
        if ranks[target.name] and not _finite(target):
            raise NonFiniteError(
                f"The adapter of {target.name!r} holds NaN or infinity, so its rank cannot be lowered. "
                "Lower the learning rate or clip gradients."
            )
    changes = []
    for target in shrinking + [t for t in changing if ranks[t.name] > t.rank]:
        before, after = target.rank, ranks[target.name]
        generator = growth_generator(seed, step, target.name)
        if after < before:
            _shrink(target, after, optimizer, generator)
        else:
            _grow(target, after, optimizer, generator)
        bookkeep(target, after)
        changes.append(RankChange(target.name, before, after))
    return changes


def reset_adapters(targets: Sequence[TargetModule], rank: int, seed: int) -> None:
    """Start over: fresh A, zero B, everywhere at `rank` (or the most that a module allows).

    For a model whose adapters are trained again and again; no optimiser may hold state of them.
    """
    for target in targets:
        width = min(rank, target.max_rank)
        fresh = fresh_rows(target, width, growth_generator(seed, BEFORE_THE_RUN, target.name))
        write_in_place(target.weight_a, fresh)
        write_in_place(target.weight_b, target.weight_b.new_zeros(target.d_out, width))
        bookkeep(target, width)


def growth_generator(seed: int, step: int, name: str) -> torch.Generator:
    """A generator that depends on (seed, step, module) alone, so that every process draws the same rows."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fresh_rows(target: TargetModule, count: int, generator: torch.Generator) -> torch.Tensor:
    """New rows of A as PEFT draws them: uniform in +-1/sqrt(d_in), shape (count, d_in)."""
    bound = 1 / math.sqrt(target.d_in)
    rows = torch.rand(count, target.d_in, generator=generator, dtype=torch.float64) * (2 * bound) - bound
    return rows.to(device=target.weight_a.device, dtype=target.weight_a.dtype)


def _finite(target: TargetModule) -> bool:
    return bool(torch.isfinite(target.weight_a).all() and torch.isfinite(target.weight_b).all())


def write_in_place(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter new storage in place: same object, same hooks, same optimiser group."""
    parameter.grad = None
    with torch.no_grad():
        parameter.set_(value.contiguous())  # type: ignore[call-overload]


def bookkeep(target: TargetModule, rank: int) -> None:
    """PEFT's own records of the rank, with alpha such that the scaling stays."""
    layer, name = target.layer, target.adapter
    root = math.sqrt(max(rank, 1)) if layer.use_rslora.get(name) else max(rank, 1)
    layer.r[name] = rank
    layer.lora_alpha[name] = target.scaling * root
    layer.lora_A[name].out_features = rank
    layer.lora_B[name].in_features = rank
    for weight in (target.weight_a, target.weight_b):
        weight.requires_grad_(rank > 0)


def balanced_factors(
    weight_a: torch.Tensor, weight_b: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The maps that shrink a pair to the best rank-k approximation of B A.

    With R_B R_A^T = U S V^T, P = R_A^T V_k S_k^-1/2 and Q = S_k^-1/2 U_k^T R_B, the new pair is A' = Q A, B' = B P.

    Args:
        weight_a: A, shape (r, d_in).
        weight_b: B, shape (d_out, r).
        rank: k, 0 < k < r.

    Returns:
        P of shape (r, k), Q of shape (k, r), and a bool mask of shape (k,) of directions that carry function.
        Dead directions have zero columns in P and zero rows in Q. Computed in fp64.
    """
    core_b = torch.linalg.qr(weight_b.double(), mode="r").R
    core_a = torch.linalg.qr(weight_a.double().T, mode="r").R
    u, s, vh = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    # d_out or d_in below r leaves fewer directions than asked for: the rest are dead.
    width = min(rank, s.shape[0])
    live = torch.zeros(rank, dtype=torch.bool, device=s.device)
    live[:width] = s[:width] > DEAD_DIRECTION * s[:1].clamp_min(torch.finfo(torch.float64).tiny)
    inverse_root = torch.zeros(rank, dtype=s.dtype, device=s.device)
    inverse_root[live] = s[: live.shape[0]][live[: s.shape[0]]].rsqrt()
    p = torch.zeros(weight_a.shape[0], rank, dtype=s.dtype, device=s.device)
    q = torch.zeros(rank, weight_a.shape[0], dtype=s.dtype, device=s.device)
    p[:, :width] = (core_a.T @ vh[:width].T) * inverse_root[:width]
    q[:width] = inverse_root[:width, None] * (u[:, :width].T @ core_b)
    return p, q, live


def _shrink(
    target: TargetModule, rank: int, optimizer: torch.optim.Optimizer | None, generator: torch.Generator
) -> None:
    a, b = target.weight_a, target.weight_b
    if rank == 0:
        write_in_place(a, a.new_zeros(0, target.d_in))
        write_in_place(b, b.new_zeros(target.d_out, 0))
        reset_state(optimizer, (a, b))
        return
    p, q, live = balanced_factors(a.detach(), b.detach(), rank)
    new_a = (q @ a.detach().double()).to(a.dtype)
    new_b = (b.detach().double() @ p).to(b.dtype)
    if not bool(live.all()):
        new_a[~live] = fresh_rows(target, int((~live).sum()), generator)
    map_state(optimizer, a, StateMap(axis=0, matrix=p.T, fresh=~live))
    map_state(optimizer, b, StateMap(axis=1, matrix=q, fresh=~live, fill_second="mean"))
    write_in_place(a, new_a)
    write_in_place(b, new_b)


def _grow(target: TargetModule, rank: int, optimizer: torch.optim.Optimizer | None, generator: torch.Generator) -> None:
    a, b = target.weight_a, target.weight_b
    old = target.rank
    new_a = torch.cat([a.detach(), fresh_rows(target, rank - old, generator)])
    new_b = torch.cat([b.detach(), b.new_zeros(target.d_out, rank - old)], dim=1)
    if old == 0:
        reset_state(optimizer, (a, b))
    else:
        identity = torch.eye(rank, old, dtype=torch.float64, device=a.device)
        fresh = torch.arange(rank, device=a.device) >= old
        map_state(optimizer, a, StateMap(axis=0, matrix=identity, fresh=fresh))
        map_state(optimizer, b, StateMap(axis=1, matrix=identity, fresh=fresh, fill_second="mean"))
    write_in_place(a, new_a)
    write_in_place(b, new_b)
