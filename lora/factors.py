"""The algebra of LoRA pairs: the best approximation at a lower rank, and fresh directions for a higher one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from .targets import TargetModule

NEGLIGIBLE = 1e-6
"""A direction whose singular value is below this share of the largest counts as unused, and starts anew."""

WELL_CONDITIONED = 1e-4
"""Cholesky is used where the smallest diagonal entry over the largest is above this: errors are about 1e-8 in fp64."""

BEFORE_THE_RUN = -1
"""The step that seeds the first directions, so that growth at step 0 draws others."""


def shrink_maps(
    weights_a: Sequence[torch.Tensor], weights_b: Sequence[torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The linear maps A' = Q A and B' = B P to the best rank-k approximation of each B A (Eckart and Young, 1936).

    Triangular factors of B and A^T leave the r x r core R_B R_A^T = U S V^T; then P = R_A^T V_k S_k^-1/2 and
    Q = S_k^-1/2 U_k^T R_B. The dense product is never formed.

    Args:
        weights_a: A of each pair, fp64 of shape (r, d_in), with one r for all.
        weights_b: B of each pair, fp64 of shape (d_out, r).
        rank: k, 0 < k < r.

    Returns:
        P of the n pairs, fp64 (n, r, k); Q, fp64 (n, k, r); and bool (n, k), False for a negligible direction, whose
        column of P and row of Q are zero.
    """
    core_a, core_b = _cores([weight.mT for weight in weights_a]), _cores(weights_b)
    u, s, vh = torch.linalg.svd(core_b @ core_a.mT)
    used = s[:, :rank] > NEGLIGIBLE * s[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    inverse_root = torch.where(used, s[:, :rank].rsqrt(), 0.0)
    p = (core_a.mT @ vh[:, :rank].mT) * inverse_root[:, None, :]
    q = inverse_root[:, :, None] * (u[:, :, :rank].mT @ core_b)
    return p, q, used


def _cores(tall: Sequence[torch.Tensor]) -> torch.Tensor:
    """R of the QR decomposition of each (d, r) matrix, up to signs, as (n, r, r); zero in rows beyond d."""
    # Cholesky is faster but squares the condition number, so nearly singular matrices (those with new directions, for
    # example) go through Householder's QR.
    grams = torch.stack([factor.mT @ factor for factor in tall])
    cores: torch.Tensor
    cores, failed = torch.linalg.cholesky_ex(grams, upper=True)
    diagonal = cores.diagonal(dim1=-2, dim2=-1)
    accurate = (failed == 0) & (diagonal.amin(-1) > WELL_CONDITIONED * diagonal.amax(-1))
    for index, is_accurate in enumerate(accurate.tolist()):
        if not is_accurate:
            core = torch.linalg.qr(tall[index], mode="r").R
            cores[index] = 0
            cores[index, : core.shape[0]] = core
    return cores


def growth_generator(seed: int, step: int, name: str) -> torch.Generator:
    """A generator that depends only on seed, step and module, so that every process draws the same directions."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fresh_directions(target: TargetModule, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """New directions as PEFT initialises them: random in one factor, zero in the other.

    Returns:
        Rows of A, (count, d_in), and columns of B, (d_out, count). On linear layers A is uniform in
        +-1/sqrt(d_in) and B zero; on embeddings B is standard normal and A zero.
    """
    a, b = target.weight_a, target.weight_b
    if target.embedding:
        columns = torch.randn(target.d_out, count, generator=generator, dtype=torch.float64)
        return a.new_zeros(count, target.d_in), columns.to(b)
    bound = 1 / math.sqrt(target.d_in)
    rows = torch.rand(count, target.d_in, generator=generator, dtype=torch.float64) * (2 * bound) - bound
    return rows.to(a), b.new_zeros(target.d_out, count)


def norms_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The norm of each tensor as one float32 tensor, on the device of the first; (tensors,)."""
    return torch.stack([norm.float().to(tensors[0].device) for norm in torch._foreach_norm(tensors)])


def write_in_place(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Replace a parameter's tensor and clear its gradient; object, hooks and optimiser group stay."""
    parameter.grad = None
    torch.clear_autocast_cache()  # it may hold a cast of the tensor that goes
    with torch.no_grad():
        parameter.set_(value.contiguous())  # type: ignore[call-overload]
