"""Made-up byte costs that hang together as measured ones do, from one module to a thousand."""

from __future__ import annotations

import numpy as np
from rankpilot.cost.cost import ByteCost

LAYER = ("q", "k", "v", "o", "gate", "up", "down")

TENSORS = (
    # name, widths (d: model, f: feed-forward, h: one number a head), own modules that need it, held for upstream too
    ("residual", "d", "", True),
    ("normed", "d", "qkv", False),
    ("queries", "d", "qk", True),
    ("keys", "d", "qk", True),
    ("values", "d", "qkv", True),
    ("attention", "d", "qkvo", True),
    ("softmax sums", "h", "qkv", True),
    ("residual 2", "d", "qkvo", True),
    ("normed 2", "d", "gu", False),
    ("gate", "f", "qkvogu", True),
    ("up", "f", "qkvog", True),
    ("product", "f", "D", False),
)
"""What a Llama layer saves for backward. `g`, `u` and `D` are gate, up and down."""

LETTERS = "qkvoguD"


def random_cost(generator, blocks):
    """Any cost of the contract: inputs that neighbours share, tensors held from some module on, and loose groups.

    Args:
        generator: random numbers.
        blocks: layer of each module, in the forward order, (modules,).
    """
    count = len(blocks)
    isolated = np.append(True, (blocks[1:] != blocks[:-1]) | (generator.random(count - 1) < 0.6))
    shared = np.arange(isolated.sum())[:, None] == np.cumsum(isolated) - 1
    upstream = np.tri(count, dtype=bool)[generator.random(count) < 0.8]
    loose = generator.random((generator.integers(0, 4), count)) < generator.random()
    needs = np.concatenate([shared, upstream, loose])
    moments = int(generator.integers(1, 6))
    present = generator.random((moments, len(needs))) < generator.choice([0.4, 1.0])
    weights = generator.integers(1, generator.choice([2, 400]), size=count)
    return ByteCost(
        moments=tuple(f"moment {moment}" for moment in range(moments)),
        constant=generator.integers(0, 1000, size=moments).astype(np.float64),
        per_rank=(weights + generator.integers(0, 40, size=(moments, count))).astype(np.float64),
        group_bytes=(generator.integers(0, 300, size=len(needs)) * present).astype(np.float64),
        needs=needs,
    )


def fixed_cost(cost, active):
    """What adapting these modules costs at each moment before the first rank: group by group, (moments,)."""
    paid = [any(active[module] for module in np.flatnonzero(row)) for row in cost.needs]
    return cost.constant + sum((sizes for sizes, is_paid in zip(cost.group_bytes.T, paid, strict=True) if is_paid), 0.0)


def reordered(cost, by):
    """The same modules listed in another order."""
    return ByteCost(cost.moments, cost.constant, cost.per_rank[:, by], cost.group_bytes, cost.needs[:, by])


def transformer_cost(generator, layers, *, checkpointing=False, largest_moments=6):
    """What a Llama-like model costs, and the layer and the largest rank of each of its 7 x `layers` modules.

    Sizes are of a random model in half precision, with AdamW on adapters in single precision.

    Args:
        generator: random numbers.
        layers: number of layers.
        checkpointing: hold one small tensor a layer, and at each moment the inside of one layer.
        largest_moments: the most moments that the cost may have, at least 2.
    """
    width = 64 * int(generator.integers(1, 65))
    widths = {"d": width, "f": width * int(generator.integers(2, 5)), "h": width // 64}
    positions = int(generator.choice([64, 512, 4096, 32768]))
    kept = np.array([2 * positions * widths[kind] for _, kind, _, _ in TENSORS], dtype=np.float64)
    needs = np.concatenate([_needs_of_layer(layers, layer) for layer in range(layers)])
    needs = np.concatenate([needs, np.ones((1, needs.shape[1]), dtype=bool)])  # the last norm's input
    loss = 2.0 * positions * int(generator.integers(1000, 128_000))
    stops = np.unique(generator.integers(0, layers, size=int(generator.integers(1, largest_moments))))[::-1]
    moments = (("the loss", layers - 1 if checkpointing else layers), *((f"layer {stop}", int(stop)) for stop in stops))
    sizes = [_held_at(stop, kept, layers, checkpointing, inside=name != "the loss") for name, stop in moments]
    ends = np.array([widths["d"] + (widths["f"] if name in ("gate", "up", "down") else widths["d"]) for name in LAYER])
    hidden = 2.0 * positions
    states = np.tile(ends, layers) * 12.0  # weights and AdamW's moments; a gradient exists once its layer is done
    layer_of = np.repeat(np.arange(layers), len(LAYER))
    per_rank = [
        states + (layer_of > stop) * np.tile(ends, layers) * 4.0 + (layer_of <= stop) * hidden * (not checkpointing)
        for _, stop in moments
    ]
    outside = float(generator.integers(0, 2**20))
    constant = [outside + (2 * loss if name == "the loss" else 4 * kept[-1]) for name, _ in moments]
    cost = ByteCost(tuple(n for n, _ in moments), np.array(constant), np.array(per_rank), np.array(sizes), needs)
    return cost, layer_of, np.full(len(layer_of), width)


def _needs_of_layer(layers, layer):
    """Which modules make each of the layer's tensors be held, bool (tensors, modules)."""
    needs = np.zeros((len(TENSORS), layers * len(LETTERS)), dtype=bool)
    first = layer * len(LETTERS)
    for row, (_, _, needed, chained) in enumerate(TENSORS):
        needs[row, :first] = chained
        needs[row, [first + LETTERS.index(letter) for letter in needed]] = True
    return needs


def _held_at(stop, kept, layers, checkpointing, *, inside):
    """Bytes of each group while layer `stop` is worked on backwards, (groups,)."""
    sizes = np.zeros((layers, len(kept)))
    if checkpointing:
        sizes[: stop + 1, 0] = kept[0]
        if inside:
            sizes[stop] = kept
    else:
        sizes[: stop + 1] = kept
    return np.append(sizes.ravel(), 0.0 if inside else kept[0])
