"""The largest `max_pixels` of a model's image processor with which pictures fit a card."""

from __future__ import annotations

import math
from collections.abc import Callable

from .outlook import Outlook
from .pictures import picture_sides

TRIES = 5
"""Most predictions besides the first."""

CLOSE = 0.95
"""A result of at least this share of the least value known not to fit is final."""

BELOW = 0.98
"""The next value to try, as a share of that at which a line through two known ones leaves no room."""

MOST = 4096 * 4096
"""Largest result, in pixels: the largest picture of the published processors."""


def largest_max_pixels(outlook: Outlook, ask: Callable[..., Outlook]) -> int | None:
    """Return the largest `max_pixels` that fits, for pictures of the asked proportions that reach it.

    Rows keep the tokens of their text, so they grow with their pictures. Adapters are on all layers at the asked rank,
    and as many layers are checkpointed as a run may. Each try takes as long as a prediction for the model.

    Args:
        outlook: with pictures whose size `max_pixels` decides, on a card.
        ask: predicts the same with other `image`, `max_pixels` and `max_length`, passed by name.

    Returns:
        Pixels, a multiple of those of a token; None if no picture fits.
    """
    model, loaded, length = outlook.step.model, outlook.step.loaded, outlook.settings.max_length
    tokens = model.picture_tokens // loaded.images - 1  # of a picture
    each, text = model.pixels // tokens, length - model.picture_tokens
    width, height = picture_sides(loaded.image)
    longest = math.inf if model.positions is None else (model.positions - text) // loaded.images - 1

    def room(count: int) -> float:
        """Return the bytes left beside pictures of this many tokens each."""
        scale = math.sqrt(2 * count * each / (width * height))  # larger, for the processor to scale them down
        image = f"{math.ceil(width * scale)}x{math.ceil(height * scale)}"
        return _room(ask(image=image, max_pixels=count * each, max_length=text + loaded.images * (count + 1)))

    known = {tokens: _room(outlook)}
    most = max(tokens, int(min(longest, MOST // each)))
    low, high = (tokens, most + 1) if known[tokens] >= 0 else (0, tokens)
    for _ in range(TRIES):
        if low >= CLOSE * (high - 1):
            break
        guess = min(max(_crossing(known), low + 1), high - 1)
        known[guess] = room(guess)
        low, high = (guess, high) if known[guess] >= 0 else (low, guess)
    return low * each or None


def _crossing(known: dict[int, float]) -> int:
    """Return the tokens to try next, given the bytes left beside others."""
    near, *others = sorted(known, key=lambda count: abs(known[count]))
    if not others:
        return 2 * near if known[near] >= 0 else near // 2
    slope = (known[near] - known[others[0]]) / (near - others[0])
    return int(BELOW * (near - known[near] / slope)) if slope < 0 else 2 * near


def _room(outlook: Outlook) -> float:
    """Return the bytes left on the card, beside its slack, by the choice with the least memory."""
    layers = () if outlook.settings.gradient_checkpointing is False else outlook.checkpointable
    use = outlook.choice(outlook.blocks, outlook.rank, layers).use
    assert use, "there is a card"
    return use.spare_bytes - outlook.slack * use.device.memory_bytes
