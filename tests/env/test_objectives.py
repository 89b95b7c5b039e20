"""What proxies predict: labels that are aligned with logits, hidden bytes, classes, and losses of several runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rankpilot.env.bases import load_base_model
from rankpilot.env.proxy_finetune import (
    FIRST_CLASS,
    IGNORED,
    MASK_SHARE,
    class_inputs,
    divergence,
    label_loss,
    language_inputs,
)
from rankpilot.env.proxy_task import MASK_TOKEN, find_base


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(32, 127, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama-4x32", "gpt2-4x32", "bert-4x64"])
def test_the_loss_of_bytes_is_that_of_transformers(windows: torch.Tensor, name: str) -> None:
    """Of the next one, which transformers shifts itself, or of hidden ones."""
    hidden = name.startswith("bert")
    inputs, labels = language_inputs(find_base(name), windows, np.random.default_rng(0))
    assert hidden or torch.equal(inputs, windows)
    model = load_base_model(name)
    with torch.no_grad():
        output = model(input_ids=inputs, labels=labels if hidden else windows)
    assert float(label_loss(output.logits, labels)) == pytest.approx(float(output.loss), abs=1e-6)
    assert hidden or labels[:, -1].eq(IGNORED).all()


def test_hidden_bytes_are_asked_for_and_the_others_are_not() -> None:
    windows = torch.randint(0, 256, (200, 32), generator=torch.Generator().manual_seed(0))
    before = windows.clone()
    inputs, labels = language_inputs(find_base("bert-4x64"), windows, np.random.default_rng(0))
    hidden = inputs == MASK_TOKEN
    assert torch.equal(windows, before)
    assert torch.equal(labels[hidden], windows[hidden])
    assert labels[~hidden].eq(IGNORED).all()
    assert torch.equal(inputs[~hidden], windows[~hidden])
    assert float(hidden.float().mean()) == pytest.approx(MASK_SHARE, abs=0.02)
    again = language_inputs(find_base("bert-4x64"), windows, np.random.default_rng(0))[0]
    other = language_inputs(find_base("bert-4x64"), windows, np.random.default_rng(1))[0]
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, other)


@pytest.mark.parametrize(("name", "question"), [("llama-4x32", ord("\n")), ("bert-4x64", MASK_TOKEN)])
def test_a_class_is_asked_for_at_the_end(windows: torch.Tensor, name: str, question: int) -> None:
    before, classes = windows.clone(), torch.tensor([0, 1, 2, 6, 0, 3])
    inputs, labels = class_inputs(find_base(name), windows, classes)
    assert torch.equal(windows, before)
    assert inputs[:, -1].eq(question).all()
    assert torch.equal(inputs[:, :-1], windows[:, :-1])
    assert bytes(labels[:, -1].tolist()) == b"012603"
    assert labels[:, -1].tolist() == (FIRST_CLASS + classes).tolist()
    assert labels[:, :-1].eq(IGNORED).all()
    model = load_base_model(name)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    expected = -torch.log_softmax(logits[:, -1], dim=-1)[torch.arange(6), labels[:, -1]].mean()
    assert float(label_loss(logits, labels)) == pytest.approx(float(expected), abs=1e-6)
    assert float(label_loss(logits, torch.full_like(labels, IGNORED))) == 0, "nothing is asked"


def test_runs_that_share_a_batch_have_the_losses_that_they_have_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 8, 20, generator=generator)
    teacher = torch.log_softmax(torch.randn(4, 8, 20, generator=generator), dim=-1)
    labels = torch.randint(0, 20, (12, 8), generator=generator)
    labels[torch.rand(12, 8, generator=generator) < 0.5] = IGNORED  # so groups have different numbers of predictions
    counts = labels.view(3, -1).ne(IGNORED).sum(dim=1)
    assert len(set(counts.tolist())) > 1
    together = label_loss(logits, labels, 3)
    assert together.tolist() == [
        float(label_loss(*part)) for part in zip(logits.chunk(3), labels.chunk(3), strict=True)
    ]
    together = divergence(logits, teacher, 3)
    assert together.tolist() == [float(divergence(part, teacher)) for part in logits.chunk(3)]
    assert float(divergence(logits, torch.log_softmax(logits, dim=-1))) == pytest.approx(0, abs=1e-6)
