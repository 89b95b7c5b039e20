"""Change the rank of LoRA pairs in the middle of training: real tensors, function and optimiser kept.

For a pair A (r, d_in), B (d_out, r) with delta W = s B A:

* *shrink* to k: the best rank-k approximation of B A, with half of each singular value on either side (`lora/factors`);
* *grow*: one side of the new directions is random, the other zero, so the function does not change;
* *drop* to rank 0 and *revive*: the parameters stay the same objects, with empty storage in between;
* the scaling s stays as it is, so alpha follows the rank;
* the optimiser's moments follow the same linear maps (see `lora/optimizer_state`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from .factors import BEFORE_THE_RUN, fresh_directions, growth_generator, shrink_maps, write_in_place
from .frozen_weights import real_weight
from .optimizer_layouts import unwrap_optimizer
from .optimizer_state import Fill, StateMap, check_optimizer, map_state, reset_state
from .targets import TargetModule, check_ranks

logger = logging.getLogger(__name__)

BATCHED_ELEMENTS = 2**22
"""Pairs are decomposed together up to this many elements, 32 MiB in fp64."""


_FILLS: dict[bool, tuple[Fill, Fill]] = {False: ("zero", "mean"), True: ("mean", "zero")}
"""How the second moments of fresh directions of A and B start, on linear layers and on embeddings: only the zero side
gets gradients at first, and must not take huge steps."""


@dataclass(frozen=True)
class RankChange:
    """What happened to one module.

    Attributes:
        name: the module.
        before: its rank before.
        after: its rank now.
        note: why it did not get the rank that was asked for; empty if it did.
    """

    name: str
    before: int
    after: int
    note: str = ""


@torch.no_grad()
def set_ranks(
    targets: Sequence[TargetModule],
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
    step: int = 0,
) -> list[RankChange]:
    """Give the named modules new ranks, shrinking first so that memory never passes the larger plan's.

    A rank above min(d_in, d_out) is lowered to it. A module whose factors, gradients or optimiser state hold NaN or
    infinity is left as it is, unless it is to be dropped. Both are told by a note and in one warning.

    Args:
        targets: all target modules of the adapter.
        ranks: new rank by module name; modules that are not named keep theirs.
        optimizer: its state follows. Without one, only the weights change.
        seed: together with `step` and the module's name, decides the random side of new directions.
        step: the training step at which the change happens.

    Returns:
        The changes made, in the order made, and those not made as asked; others are left out.

    Raises:
        UnknownNameError, ConfigError, UnsupportedError: see `check_ranks` and `check_optimizer`. Nothing has been
            changed then.
    """
    check_ranks(targets, ranks)
    if optimizer is not None:
        check_optimizer(optimizer)
    asked = [(target, min(ranks[target.name], target.max_rank)) for target in targets if target.name in ranks]
    moving = [(target, rank) for target, rank in asked if rank != target.rank]
    broken = set(non_finite([target for target, rank in moving if rank > 0], optimizer))
    moving = [(target, rank) for target, rank in moving if target.name not in broken or rank == 0]
    before = {target.name: target.rank for target in targets}
    _drop([target for target, rank in moving if rank == 0], optimizer)
    _shrink([(target, rank) for target, rank in moving if 0 < rank < target.rank], optimizer, seed, step)
    _grow([(target, rank) for target, rank in moving if rank > target.rank], optimizer, seed, step)
    order = sorted(asked, key=lambda item: item[0].rank > before[item[0].name])
    changes = [_report(target, before[target.name], ranks[target.name], target.name in broken) for target, _ in order]
    _warn(changes)
    return [change for change in changes if change.before != change.after or change.note]


def _report(target: TargetModule, before: int, asked: int, broken: bool) -> RankChange:
    note = ""
    if target.rank != asked and broken:
        note = f"not set to {asked}: its factors, gradients or optimizer state hold NaN or infinity"
    elif asked > target.max_rank:
        note = f"asked for {asked}, above min(d_in, d_out) = {target.max_rank}"
    return RankChange(target.name, before, target.rank, note)


def _warn(changes: Sequence[RankChange]) -> None:
    notes = [f"{change.name} has rank {change.after} ({change.note})" for change in changes if change.note]
    if notes:
        more = f"; and {len(notes) - 3} more" if len(notes) > 3 else ""
        logger.warning("Ranks that could not be set as asked: %s%s.", "; ".join(notes[:3]), more)


def non_finite(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Names of modules whose factors, gradients or optimiser state hold NaN or infinity."""
    state = unwrap_optimizer(optimizer).state if optimizer is not None else {}
    tensors: list[torch.Tensor] = []
    owners: list[int] = []
    for index, target in enumerate(targets):
        for weight in (target.weight_a, target.weight_b):
            held = [weight.detach(), weight.grad, *state.get(weight, {}).values()]
            # Low-bit state is checked through its block scales, and not at all inside tensor subclasses.
            found = [t for t in held if type(t) is torch.Tensor and t.is_floating_point() and t.dim() and t.numel()]
            tensors += found
            owners += [index] * len(found)
    if not tensors:
        return []
    norms = torch.stack([norm.float().to(tensors[0].device) for norm in torch._foreach_norm(tensors)])
    wrong = {owners[index] for index in torch.nonzero(~torch.isfinite(norms)).flatten().tolist()}
    return [targets[index].name for index in sorted(wrong)]


def reset_adapters(targets: Sequence[TargetModule], rank: int, seed: int) -> None:
    """Start over, everywhere at `rank` (or the most that a module allows), with no function of its own.

    For a model whose adapters are trained again and again; no optimiser may hold state of them.
    """
    for target in targets:
        width = min(rank, target.max_rank)
        new_a, new_b = fresh_directions(target, width, growth_generator(seed, BEFORE_THE_RUN, target.name))
        _write(target, new_a, new_b)
        reset_extras(target)


def resize(target: TargetModule, rank: int) -> None:
    """Make room for factors of another rank, whose values are about to be loaded; zero until then."""
    _write(target, target.weight_a.new_zeros(rank, target.d_in), target.weight_b.new_zeros(target.d_out, rank))
    if rank == 0:
        reset_extras(target)


def _write(target: TargetModule, weight_a: torch.Tensor, weight_b: torch.Tensor) -> None:
    """Give a pair its new factors, and PEFT its records of them."""
    write_in_place(target.weight_a, weight_a)
    write_in_place(target.weight_b, weight_b)
    update_peft_records(target, target.rank)


@torch.no_grad()
def reset_extras(target: TargetModule) -> None:
    """Bias and magnitude as PEFT starts them, which leaves the frozen module's function alone."""
    if target.bias is not None:
        target.bias.zero_()
    if target.magnitude is not None:
        layer = target.layer.lora_magnitude_vector[target.adapter]
        weight = real_weight(target.layer).to(target.weight_a)
        target.magnitude.copy_(layer.get_weight_norm(weight, weight.new_zeros(()), target.scaling))


def update_peft_records(target: TargetModule, rank: int) -> None:
    """PEFT's own records of the rank, with alpha such that the scaling stays."""
    layer, name = target.layer, target.adapter
    root = math.sqrt(max(rank, 1)) if layer.use_rslora.get(name) else max(rank, 1)
    layer.r[name] = rank
    layer.lora_alpha[name] = target.scaling * root
    if not target.embedding:
        layer.lora_A[name].out_features = rank
        layer.lora_B[name].in_features = rank
    for parameter in target.parameters.values():
        parameter.requires_grad_(rank > 0)
    if rank == 0 and _KeepFrozen(target) not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_KeepFrozen(target))


@dataclass(frozen=True, eq=False)
class _KeepFrozen:
    """A forward pre-hook that freezes a dropped module again, after PEFT has set its whole adapter trainable.

    PEFT does so in `set_adapter`, and at the end of `disable_adapter`; biases and magnitudes would train unseen.
    """

    target: TargetModule

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _KeepFrozen) and other.target.adapter == self.target.adapter

    def __call__(self, *_: object) -> None:
        if self.target.weight_a.requires_grad and self.target.rank == 0:
            for parameter in self.target.parameters.values():
                parameter.requires_grad_(False)


def _drop(targets: Iterable[TargetModule], optimizer: torch.optim.Optimizer | None) -> None:
    for target in targets:
        resize(target, 0)
        reset_state(optimizer, target.parameters.values())


def _shrink(
    moves: Sequence[tuple[TargetModule, int]], optimizer: torch.optim.Optimizer | None, seed: int, step: int
) -> None:
    for group, rank in _batches(moves):
        pairs = [(target.weight_a.detach().double(), target.weight_b.detach().double()) for target in group]
        maps = shrink_maps([a for a, _ in pairs], [b for _, b in pairs], rank)
        whole = maps.live.all(dim=-1).tolist()
        for index, (target, (a, b)) in enumerate(zip(group, pairs, strict=True)):
            p, q, live = maps.p[index], maps.q[index], maps.live[index]
            new_a, new_b = (q @ a).to(target.weight_a), (b @ p).to(target.weight_b)
            fresh = None
            if not whole[index]:
                fresh = ~live
                generator = growth_generator(seed, step, target.name)
                new_a[fresh], new_b[:, fresh] = fresh_directions(target, int(fresh.sum()), generator)
            fill_a, fill_b = _FILLS[target.embedding]
            map_state(optimizer, target.weight_a, StateMap(0, rank, p.mT, fresh, fill_a))
            map_state(optimizer, target.weight_b, StateMap(1, rank, q, fresh, fill_b))
            _write(target, new_a, new_b)


def _batches(moves: Sequence[tuple[TargetModule, int]]) -> Iterator[tuple[list[TargetModule], int]]:
    """Modules on one device that go from one rank to another, as many at a time as BATCHED_ELEMENTS allows."""

    def kind(move: tuple[TargetModule, int]) -> tuple[str, int, int]:
        target, rank = move
        return str(target.weight_a.device), target.rank, rank

    for (_, _, rank), alike in groupby(sorted(moves, key=kind), kind):
        group: list[TargetModule] = []
        elements = 0
        for target, _ in alike:
            group.append(target)
            elements += target.rank * (target.d_in + target.d_out)
            if elements > BATCHED_ELEMENTS:
                yield group, rank
                group, elements = [], 0
        if group:
            yield group, rank


def _grow(
    moves: Sequence[tuple[TargetModule, int]], optimizer: torch.optim.Optimizer | None, seed: int, step: int
) -> None:
    for target, rank in moves:
        a, b = target.weight_a, target.weight_b
        rows, columns = fresh_directions(target, rank - target.rank, growth_generator(seed, step, target.name))
        if target.rank:
            fill_a, fill_b = _FILLS[target.embedding]
            map_state(optimizer, a, StateMap(0, rank, fill_second=fill_a))
            map_state(optimizer, b, StateMap(1, rank, fill_second=fill_b))
        else:
            reset_state(optimizer, target.parameters.values())
        _write(target, torch.cat([a.detach(), rows]), torch.cat([b.detach(), columns], dim=1))
