"""Frames are all of one size and show what they were given; the text holds the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from rankpilot.env.rendering import HEIGHT, WIDTH, EpisodeTrace, describe, draw

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def make_trace(layers: int = 4, plans: int = 2) -> EpisodeTrace:
    """An episode after some of its three decisions, with a rank for each module that differs from plan to plan."""
    names = tuple(f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS)
    ladder = np.array([0, 1, 2, 4, 8, 16])
    ranks = ladder[(np.arange(len(names)) + np.arange(plans)[:, None]) % len(ladder)]
    return EpisodeTrace(
        title="llama-words-7",
        names=names,
        blocks=np.repeat(np.arange(layers), len(KINDS)),
        total_steps=100,
        steps=(0, 34, 68)[:plans],
        ranks=ranks,
        costs=(1.0 * 2**20, 0.75 * 2**20, 1.25 * 2**20)[:plans],
        limit=1.25 * 2**20,
        unit="bytes",
        losses=((34, 2.5), (68, 1.75), (100, 1.5))[: plans - 1],
        held_out_loss=None,
        uniform_loss=1.375,
    )


def from_names(names: tuple[str, ...], blocks: list[int], ranks: list[int]) -> EpisodeTrace:
    """An episode after its first decision, with modules as given."""
    trace = make_trace(1, 1)
    return replace(trace, names=names, blocks=np.array(blocks), ranks=np.array([ranks]))


def ended() -> EpisodeTrace:
    trace = make_trace(plans=3)
    return replace(trace, losses=(*trace.losses, (100, 1.5)), held_out_loss=1.25)


def without_ranks() -> EpisodeTrace:
    trace = make_trace(plans=1)
    return replace(trace, ranks=np.zeros_like(trace.ranks), costs=(0.0,), uniform_loss=None)


def without_plan() -> EpisodeTrace:
    trace = make_trace(plans=1)
    return replace(trace, steps=(), ranks=trace.ranks[:0], costs=())


TRACES = {
    "first decision": make_trace(plans=1),
    "middle": make_trace(),
    "end": ended(),
    "eight layers": make_trace(8, 3),
    "many layers": make_trace(32, 3),
    "no ranks": without_ranks(),
    "no plan": without_plan(),
    "NaN loss": replace(make_trace(), losses=((34, math.nan),)),
    "NaN among losses": replace(make_trace(plans=3), losses=((34, 2.0), (68, math.inf))),
    "NaN at the end": replace(ended(), held_out_loss=math.nan, uniform_loss=math.nan),
    "above the budget": replace(make_trace(), costs=(3e6, 2.0**20)),
    "names without numbers": from_names(("alpha", "beta", "top.gamma"), [0, 0, 1], [1, 0, 400]),
    "dollars": replace(make_trace(), title="$a$ $\\frac{$"),
    "long title": replace(make_trace(), title="a very long title " * 40),
    "long names": from_names(tuple(kind * 40 for kind in "abcdefg"), [0] * 7, [1] * 7),
    "many kinds": from_names(tuple(f"h.0.expert.{i}.up" for i in range(64)), [0] * 64, [4] * 64),
}


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_frames_have_one_size(trace: EpisodeTrace) -> None:
    frame = draw(trace)
    assert frame.shape == (HEIGHT, WIDTH, 3)
    assert frame.dtype == np.uint8
    assert frame.flags["C_CONTIGUOUS"]
    assert (frame[[0, -1]] == 255).all()  # nothing touches the edge
    assert (frame[:, [0, -1]] == 255).all()
    assert describe(trace).startswith(trace.title)


def test_equal_episodes_give_equal_frames() -> None:
    assert np.array_equal(draw(make_trace()), draw(make_trace()))


def test_each_part_of_an_episode_shows() -> None:
    trace = make_trace()
    changed = trace.ranks.copy()
    changed[-1, 5] = 32
    others = [
        replace(trace, ranks=changed),
        replace(trace, costs=(2.0**20, 2.0**19)),
        replace(trace, losses=((34, 2.25),)),
        replace(trace, held_out_loss=1.5),
        replace(trace, uniform_loss=None),
        replace(trace, title="another"),
    ]
    frames = [draw(each).tobytes() for each in (trace, *others)]
    assert len(set(frames)) == len(frames)


def test_higher_ranks_are_darker_and_the_bottom_layer_is_at_the_bottom() -> None:
    trace = make_trace(8, 1)
    ranks = np.where(trace.blocks == 7, 16, 1)[None]
    column = draw(replace(trace, ranks=ranks)).astype(int).sum(axis=2)[:, 82]  # left of the numbers, in the first cells
    cells = np.flatnonzero(column < 600)
    assert column[cells[5]] < column[cells[-5]] - 50


def test_text_holds_the_numbers() -> None:
    assert describe(make_trace(2)).splitlines() == [
        "llama-words-7",
        "step 34 of 100, loss 2.500, 60.0 % of 1.25 MiB",
        "layer 1   q_proj  2  k_proj  4  v_proj  8  o_proj 16  gate_proj  0  up_proj  1  down_proj  2",
        "layer 0   q_proj  1  k_proj  2  v_proj  4  o_proj  8  gate_proj 16  up_proj  0  down_proj  1",
    ]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("first decision", "step 0 of 100, 80.0 % of 1.25 MiB"),
        ("end", "step 100 of 100, loss 1.500, 100.0 % of 1.25 MiB, held-out loss 1.250 (uniform 1.375)"),
        ("no ranks", "step 0 of 100, 0.0 % of 1.25 MiB"),
        ("no plan", "step 0 of 100, no plan yet for 1.25 MiB"),
        ("NaN loss", "step 34 of 100, loss nan, 60.0 % of 1.25 MiB"),
    ],
)
def test_text_says_where_the_episode_stands(name: str, status: str) -> None:
    assert describe(TRACES[name]).splitlines()[1] == status


def test_text_counts_parameters() -> None:
    trace = replace(make_trace(), unit="parameters", limit=12_000.0, costs=(9_000.0, 6_000.0))
    assert "50.0 % of 12,000 parameters" in describe(trace)


def test_ranks_before_the_first_plan_are_zero() -> None:
    assert describe(TRACES["no plan"]).splitlines()[2:] == describe(TRACES["no ranks"]).splitlines()[2:]


def test_columns_stay_aligned_where_layers_differ() -> None:
    names = ("h.0.attn.q", "h.0.mlp.up", "h.1.mlp.up", "h.1.mlp.down")
    assert describe(from_names(names, [9, 9, 10, 10], [1, 16, 2, 4])).splitlines()[2:] == [
        "layer 10         up  2  down  4",
        "layer  9   q  1  up 16",
    ]


@pytest.mark.parametrize(
    ("names", "blocks", "kinds"),
    [
        (("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"), [0, 0, 0], "c_attn attn.c_proj mlp.c_proj"),
        (("l.0.attention.output.dense", "l.0.output.dense"), [0, 0], "attention.output.dense output.dense"),
        (("alpha", "top.beta"), [0, 0], "alpha beta"),
        (("a.proj", "b.proj"), [0, 0], "a.proj b.proj"),
        (("a.proj", "b.proj"), [0, 1], "proj"),
        (("encoder.0.q", "decoder.0.q"), [0, 0], "encoder.0.q decoder.0.q"),
        (("0", "1"), [0, 1], "0 1"),
    ],
)
def test_kinds_are_the_shortest_clear_ends(names: tuple[str, ...], blocks: list[int], kinds: str) -> None:
    lines = describe(from_names(names, blocks, [8] * len(names))).splitlines()[2:]
    words = [word for line in reversed(lines) for word in line.split()[2:] if word != "8"]
    assert list(dict.fromkeys(words)) == kinds.split()
