"""Change the rank of LoRA pairs during training, preserving the function and optimizer state.

For a pair A (r, d_in), B (d_out, r) with delta W = s B A:

* *shrink* to k: B A becomes its best rank-k approximation, and A and B each take the root of its singular values;
* *grow*: one side of the new directions is random, the other zero, so the function does not change;
* *drop* to rank 0: A and B become empty, and stay the same parameter objects so they can grow again;
* the scaling becomes s' = alpha / r' (`lora/peft_config.py`), and the side that starts at zero, B, is multiplied by s /
  s', so the function does not change (on embeddings it is A);
* the optimizer's moments follow the same linear maps (`lora/optimizer_state.py`).
"""

import gc
import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from .optimizer_state import Fill, StateMap, check_optimizer, map_state, reset_state, scale_state, unwrap_optimizer
from .spec import REFERENCE_RANK
from .targets import TargetModule, check_ranks, real_weight

NEGLIGIBLE = 1e-6
"""A direction with a singular value below this share of the largest counts as unused, and starts anew."""

WELL_CONDITIONED = 1e-4
"""Cholesky is used if the ratio of smallest to largest diagonal entry is above this: errors are about 1e-8 in fp64."""

BEFORE_THE_RUN = -1
"""The step that seeds the first directions; growth at step 0 draws others."""


def shrink_maps(
    weights_a: Sequence[torch.Tensor], weights_b: Sequence[torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return linear maps A' = Q A, B' = B P to the best rank-k approximation of each B A (Eckart and Young, 1936).

    Triangular factors of B and A^T leave the r x r core R_B R_A^T = U S V^T; then P = R_A^T V_k S_k^-1/2 and Q =
    S_k^-1/2 U_k^T R_B. The dense product is never formed.

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
    """Return R of the QR decomposition of each (d, r) matrix, up to signs, as (n, r, r); zero in rows beyond d."""
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
    """Return a generator seeded by seed, step and module only, so every process draws the same directions."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fresh_directions(target: TargetModule, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new directions as PEFT initialises them: random in one factor, zero in the other.

    Returns:
        Rows of A, (experts, count, d_in), and columns of B, (experts, d_out, count). On linear layers A is uniform in
            +-1/sqrt(d_in) and B zero; on embeddings B is standard normal and A zero.
    """
    a, b = target.weight_a, target.weight_b
    if target.embedding:
        columns = torch.randn(target.d_out, count, generator=generator, dtype=torch.float64)
        return a.new_zeros(1, count, target.d_in), columns.to(b)[None]
    experts, width = target.experts, target.d_in // target.experts
    bound = 1 / math.sqrt(width)
    rows = torch.rand(experts * count, width, generator=generator, dtype=torch.float64) * (2 * bound) - bound
    return rows.to(a).view(experts, count, width), b.new_zeros(experts, target.d_out // experts, count)


def norms_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of each tensor as one float32 tensor, on the device of the first; (tensors,)."""
    return torch.stack([norm.float().to(tensors[0].device) for norm in torch._foreach_norm(tensors)])


def write_in_place(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Replace a parameter's tensor and clear its gradient; object, hooks and optimizer group stay.

    Only hooks on its gradient node may be lost; see `held_nodes`.
    """
    parameter.grad = None
    torch.clear_autocast_cache()  # it may hold a cast of the old tensor
    with torch.no_grad():
        parameter.set_(value.contiguous())  # type: ignore[call-overload]


def gradient_nodes(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Return the node of autograd's graph (AccumulateGrad) that adds to the gradient of each trained parameter."""
    plain = {name: each for name, each in parameters.items() if each.requires_grad and type(each) is nn.Parameter}
    with torch.enable_grad():
        return {name: each.view_as(each).grad_fn.next_functions[0][0] for name, each in plain.items()}  # type: ignore[union-attr]


def held_nodes(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of trained parameters whose gradient node an object of Python holds.

    Such a node has hooks, very likely: it would otherwise end with the graph. torch does not tell its hooks.
    """
    nodes = gradient_nodes({"": nn.Parameter(torch.zeros(())), **parameters})
    kept = [name for name in nodes if sys.getrefcount(nodes[name]) > sys.getrefcount(nodes[""])]
    holders = gc.get_referrers(*map(nodes.get, kept)) if kept else []  # none if only a graph keeps them
    held = {id(each) for holder in holders if holder is not nodes for each in gc.get_referents(holder)}
    return [name for name in kept if id(nodes[name]) in held]


logger = logging.getLogger(__name__)

BATCHED_ELEMENTS = 2**22
"""Pairs are decomposed in batches of about this many elements, 32 MiB in fp64."""

Moves = Sequence[tuple[TargetModule, int]]
"""Modules, and their new ranks."""

_FILLS: dict[bool, tuple[Fill, Fill]] = {False: ("zero", "mean"), True: ("mean", "zero")}
"""Initial second moments of fresh directions of A and B, for modules other than embeddings and for embeddings. At first
only the zero side gets gradients, and "mean" keeps its steps from being huge.
"""


@torch.no_grad()
def set_ranks(
    targets: Sequence[TargetModule],
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Set new ranks of the named modules. Modules shrink before others grow, so memory stays within the larger plan's.

    A rank above min(d_in, d_out) is lowered to it, unless the module has it already. A module with NaN or infinity in
    factors, gradients or optimizer state keeps its rank, unless it is to be dropped. One warning lists all such cases.

    Args:
        targets: all target modules of the adapter.
        ranks: new rank by module name; other modules keep theirs.
        optimizer: the optimizer whose state is mapped. Without one, only the weights change.
        seed: determines the random side of new directions, together with `step` and the module's name.
        step: the training step of the change.

    Raises:
        UnknownNameError, ConfigError, UnsupportedError: see `check_ranks` and `check_optimizer`; no rank has changed.
    """
    check_ranks(targets, ranks)
    if optimizer is not None:
        check_optimizer(optimizer)
    highest = {target.name: max(target.max_rank, target.rank) for target in targets}  # a LoraConfig may ask for more
    wanted = [(target, min(ranks[target.name], highest[target.name])) for target in targets if target.name in ranks]
    moving = [(target, rank) for target, rank in wanted if rank != target.rank]
    broken = set(non_finite([target for target, rank in moving if rank > 0], optimizer))
    moving = [(target, rank) for target, rank in moving if target.name not in broken]
    before = {target.name: target.rank for target in targets}
    if held := held_nodes({t.name: weight for t, _ in moving for weight in (t.weight_a, t.weight_b)}):
        logger.warning("Hooks on gradient nodes of %s are lost with the old rank; use Tensor.register_hook.", held[0])
    for target in [target for target, rank in moving if rank == 0]:
        resize(target, 0)
        reset_state(optimizer, target.parameters.values())
    _shrink([(target, rank) for target, rank in moving if 0 < rank < target.rank], optimizer, seed, step)
    _grow([(target, rank) for target, rank in moving if rank > target.rank], optimizer, seed, step)
    order = sorted(wanted, key=lambda item: item[0].rank > before[item[0].name])
    if notes := [note for target, _ in order if (note := _note(target, ranks[target.name], target.name in broken))]:
        more = f"; and {len(notes) - 3} more" if len(notes) > 3 else ""
        logger.warning("Ranks that could not be set as requested: %s%s.", "; ".join(notes[:3]), more)


def _note(target: TargetModule, wanted: int, broken: bool) -> str:
    """Text for a module whose rank deviates from the requested one; empty for any other."""
    has = f"{target.name} has rank {target.rank}"
    if target.rank != wanted and broken:
        return f"{has} (not set to {wanted}: its factors, gradients or optimizer state contain NaN or infinity)"
    above = f"{has} (requested {wanted}, above min(d_in, d_out) = {target.max_rank})"
    return above if wanted > target.rank and wanted > target.max_rank else ""


def non_finite(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Return the names of modules with NaN or infinity in factors, gradients or optimizer state."""
    state = unwrap_optimizer(optimizer).state if optimizer is not None else {}
    tensors: list[torch.Tensor] = []
    modules: list[int] = []
    for index, target in enumerate(targets):
        for weight in (target.weight_a, target.weight_b):
            values = [weight.detach(), weight.grad, *state.get(weight, {}).values()]
            # Of low-bit state only the block scales are checked; tensor subclasses are not.
            floats = [v for v in values if type(v) is torch.Tensor and v.is_floating_point() and v.dim() and v.numel()]
            tensors += floats
            modules += [index] * len(floats)
    if not tensors:
        return []
    norms = norms_of(tensors)
    broken = {modules[index] for index in torch.nonzero(~torch.isfinite(norms)).flatten().tolist()}
    return [targets[index].name for index in sorted(broken)]


def reset_adapters(targets: Sequence[TargetModule], rank: int, seed: int) -> None:
    """Give every module a new pair with B A = 0, of `rank` or its highest; no optimizer may hold its state."""
    for target in targets:
        width = min(rank, target.max_rank)
        new = fresh_directions(target, width, growth_generator(seed, BEFORE_THE_RUN, target.name))
        _write(target, *target.joined(*new))
        reset_extras(target)


@torch.no_grad()
def is_trained(target: TargetModule) -> bool:
    """True if a module's adapter changes its function: B A or the bias of B is nonzero."""
    if target.bias is not None and bool(target.bias.any()):
        return True
    a, b = target.each_a(target.weight_a.detach()).double(), target.each_b(target.weight_b.detach()).double()
    square = ((b.mT @ b) * (a @ a.mT)).sum()  # of the norm of B A
    return bool(square > 1e-12 * a.square().sum() * b.square().sum())


def resize(target: TargetModule, rank: int) -> None:
    """Give a module zero factors of another rank, to load values into."""
    _write(target, *target.zeros(rank))
    if rank == 0:
        reset_extras(target)


def _write(target: TargetModule, weight_a: torch.Tensor, weight_b: torch.Tensor) -> None:
    write_in_place(target.weight_a, weight_a)
    write_in_place(target.weight_b, weight_b)
    update_peft_records(target, target.rank)


@torch.no_grad()
def reset_extras(target: TargetModule) -> None:
    """Reset bias and magnitude to PEFT's initial values, which do not change the module's function."""
    if target.bias is not None:
        target.bias.zero_()
    if target.magnitude is not None:
        layer = target.layer.lora_magnitude_vector[target.adapter]
        weight = real_weight(target.layer).to(target.weight_a)
        target.magnitude.copy_(layer.get_weight_norm(weight, weight.new_zeros(()), target.scaling))


def update_peft_records(target: TargetModule, rank: int) -> None:
    """Write rank, alpha and scaling into PEFT's layer, and freeze the pair at rank 0; unfreeze it as it leaves that."""
    layer, name = target.layer, target.adapter
    dropped = layer.r[name] == 0
    alpha, scaling = target.alpha_at(rank), target.scaling_at(rank)
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = rank, alpha, scaling
    if not target.embedding:
        layer.lora_A[name].out_features = rank * target.experts
        layer.lora_B[name].in_features = rank * target.experts
    for parameter in target.parameters.values() if rank == 0 or dropped else ():
        parameter.requires_grad_(rank > 0)
    if rank == 0 and _KeepFrozen(target) not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_KeepFrozen(target))


@dataclass(frozen=True, eq=False)
class _KeepFrozen:
    """A forward pre-hook that freezes a dropped module again after PEFT has made the whole adapter trainable.

    PEFT does so in `set_adapter` and at the end of `disable_adapter`; the module's bias and magnitude would then train.
    """

    target: TargetModule

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _KeepFrozen) and other.target.adapter == self.target.adapter

    def __call__(self, *_: object) -> None:
        if self.target.exists and self.target.rank == 0 and self.target.weight_a.requires_grad:
            for parameter in self.target.parameters.values():
                parameter.requires_grad_(False)


def _shrink(moves: Moves, optimizer: torch.optim.Optimizer | None, seed: int, step: int) -> None:
    for group, rank in _batches(moves):
        each = [(t.each_a(t.weight_a.detach()).double(), t.each_b(t.weight_b.detach()).double()) for t in group]
        # A and B are balanced as if all modules had the scaling of one rank.
        shares = [target.scaling / (target.scaling_at(REFERENCE_RANK) or 1.0) for target in group]
        scaled = [pair * share for (_, b), share in zip(each, shares, strict=True) for pair in b]
        counts = [target.experts for target in group]
        maps = shrink_maps([pair for a, _ in each for pair in a], scaled, rank)
        of_targets = zip(*(torch.split(part, counts) for part in maps), strict=True)
        for target, (a, b), (p, q, used) in zip(group, each, of_targets, strict=True):
            new_a, new_b = (q @ a).to(target.weight_a), (b @ p).to(target.weight_b)
            fresh = None if bool(used.all()) else ~used
            if fresh is not None:
                generator = growth_generator(seed, step, target.name)
                drawn_a, drawn_b = fresh_directions(target, int(fresh.sum(1).max()), generator)
                place = fresh.cumsum(1) - 1  # index of each fresh direction among the drawn ones
                number, direction = fresh.nonzero(as_tuple=True)
                new_a[number, direction] = drawn_a[number, place[fresh]]
                new_b[number, :, direction] = drawn_b[number, :, place[fresh]]
            fill_a, fill_b = _FILLS[target.embedding]
            map_state(optimizer, target.weight_a, _state_map(0, p.mT, fresh, fill_a))
            map_state(optimizer, target.weight_b, _state_map(1, q, fresh, fill_b))
            _write_scaled(target, *target.joined(new_a, new_b), optimizer)


def _state_map(axis: Literal[0, 1], each: torch.Tensor, fresh: torch.Tensor | None, fill: Fill) -> StateMap:
    """Return the state map for a map per expert, (experts, new rank, old rank); `fresh` is bool (experts, new rank)."""
    experts, new, old = each.shape
    if experts == 1:
        return StateMap(axis, new, each[0], None if fresh is None else fresh[0], fill)
    number = torch.arange(experts, device=each.device)
    if axis == 0:  # the expert axis is slowest in A, and fastest in B
        whole = each.new_zeros(experts, new, experts, old)
        whole[number, :, number] = each
    else:
        whole = each.new_zeros(new, experts, old, experts)
        whole[:, number, :, number] = each
    marked = None if fresh is None else (fresh if axis == 0 else fresh.mT).flatten()
    return StateMap(axis, new * experts, whole.flatten(2).flatten(0, 1), marked, fill)


def _batches(moves: Moves) -> Iterator[tuple[list[TargetModule], int]]:
    """Yield batches of modules with equal device, old rank and new rank, and the new rank; see `BATCHED_ELEMENTS`."""

    def kind(move: tuple[TargetModule, int]) -> tuple[str, int, int]:
        target, rank = move
        return str(target.weight_a.device), target.rank, rank

    for (_, _, rank), equal_moves in groupby(sorted(moves, key=kind), kind):
        group: list[TargetModule] = []
        elements = 0
        for target, _ in equal_moves:
            group.append(target)
            elements += target.rank * (target.d_in + target.d_out)
            if elements > BATCHED_ELEMENTS:
                yield group, rank
                group, elements = [], 0
        if group:
            yield group, rank


def _grow(moves: Moves, optimizer: torch.optim.Optimizer | None, seed: int, step: int) -> None:
    for target, rank in moves:
        a, b = target.weight_a, target.weight_b
        rows, columns = fresh_directions(target, rank - target.rank, growth_generator(seed, step, target.name))
        if not target.rank:
            reset_state(optimizer, target.parameters.values())
            _write_scaled(target, *target.joined(rows, columns), optimizer)
            continue
        fill_a, fill_b = _FILLS[target.embedding]
        if target.experts == 1:
            maps = StateMap(0, rank, fill_second=fill_a), StateMap(1, rank, fill_second=fill_b)
        else:
            kept = torch.eye(rank, target.rank, device=a.device).expand(target.experts, -1, -1)
            new = (torch.arange(rank, device=a.device) >= target.rank).expand(target.experts, -1)
            maps = _state_map(0, kept, new, fill_a), _state_map(1, kept, new, fill_b)
        for weight, change in zip((a, b), maps, strict=True):
            map_state(optimizer, weight, change)
        each_a = torch.cat([target.each_a(a.detach()), rows], dim=1)
        each_b = torch.cat([target.each_b(b.detach()), columns], dim=2)
        _write_scaled(target, *target.joined(each_a, each_b), optimizer)


def _write_scaled(
    target: TargetModule, weight_a: torch.Tensor, weight_b: torch.Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write factors given at the current scaling, rescaled to that of their rank, which is above 0."""
    after = target.scaling_at(len(weight_a) // target.experts)
    factor = after / target.scaling if after else 1.0  # a scaling of 0 stays 0
    if target.embedding:
        trained, weight_a = [target.weight_a], weight_a / factor
    else:
        trained, weight_b = [target.weight_b], weight_b / factor
    if target.bias is not None:  # PEFT multiplies it by the scaling too
        trained.append(target.bias)
        target.bias.div_(factor)
    for parameter in trained:
        scale_state(optimizer, parameter, factor)
    _write(target, weight_a, weight_b)
