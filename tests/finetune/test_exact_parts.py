"""Whether steps may run in parts is found out by the user's own loss, and how the losses of parts count."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.batch_shape import Batch
from rankpilot.finetune.step.batch_rows import NEXT_TOKENS, ROWS, SUM, TOKENS
from rankpilot.finetune.step.exact_parts import Exactness, exactness_of
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from torch.nn import functional
from torch.utils.data import DataLoader

from ..conftest import MakeModel

Loss = Callable[[Any, Batch], torch.Tensor]


def texts(count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 3 to 12 tokens, some of whose labels no loss counts, with a class each."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in generator.integers(3, 13, size=count):
        ids = generator.integers(1, 64, size=length)
        labels = np.where(np.arange(length) < length // 3, -100, ids)
        rows.append({"input_ids": ids, "labels": labels, "class": int(ids[0]) % 3})
    return rows


def collate(rows: list[dict[str, Any]]) -> Batch:
    length = max(len(row["input_ids"]) for row in rows)
    batch = {name: torch.full((len(rows), length), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    for place, row in enumerate(rows):
        for name, values in batch.items():
            values[place, : len(row[name])] = torch.as_tensor(row[name])
    return batch | {"attention_mask": (batch["input_ids"] > 0).long()}


def classes(rows: list[dict[str, Any]]) -> Batch:
    return collate(rows) | {"labels": torch.tensor([row["class"] for row in rows])}


def run_of(model: Any, loss: Loss, collate: Any = collate, rows: int = 4) -> TrainingRun:
    trains = [p for p in model.parameters() if p.requires_grad]
    loader = DataLoader(texts(), batch_size=rows, collate_fn=collate)  # type: ignore[arg-type]
    return TrainingRun.of_loader(
        model, torch.optim.AdamW(trains), loader, loss=lambda batch: loss(model, batch), total_steps=4, in_parts=True
    )


def exactness(run: TrainingRun) -> Exactness:
    return exactness_of(run, find_target_modules(run.model), 0)


def own(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def summed(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch, num_items_in_batch=torch.tensor(7)).loss  # type: ignore[no-any-return]


def each_token(model: Any, batch: Batch) -> torch.Tensor:
    """A mean over all labelled tokens, as where tokens are classified."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def hidden(model: Any, batch: Batch) -> torch.Tensor:
    """One vector of each row: the mean of its logits without padding."""
    mask = batch["attention_mask"][..., None]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (logits * mask).sum(dim=1) / mask.sum(dim=1)


def each_row(model: Any, batch: Batch) -> torch.Tensor:
    return hidden(model, batch).square().mean()


def in_batch_negatives(model: Any, batch: Batch) -> torch.Tensor:
    rows = functional.normalize(hidden(model, batch), dim=-1)
    return functional.cross_entropy(10 * rows @ rows.detach().T, torch.arange(len(rows)))


def balanced(model: Any, batch: Batch) -> torch.Tensor:
    """A loss whose small second part is of all rows together, as that of experts."""
    return own(model, batch) + 0.1 * hidden(model, batch).softmax(-1).mean(dim=0).square().sum()


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(own, NEXT_TOKENS), (summed, SUM), (each_token, TOKENS), (each_row, ROWS)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_a_loss_is_of_its_rows_is_found_out(make_llama: MakeModel, loss: Loss, kind: str) -> None:
    assert exactness(run_of(make_llama(), loss)).kind == kind


@pytest.mark.parametrize("loss", [in_batch_negatives, balanced])
def test_a_loss_in_which_rows_meet_is_told_with_its_difference(make_llama: MakeModel, loss: Loss) -> None:
    found = exactness(run_of(make_llama(), loss))
    assert found.kind == ""
    assert "rows affect each other" in found.reason


def test_rows_that_all_count_alike_tell_means_apart(make_llama: MakeModel) -> None:
    """Equal rows would let a mean over rows pass for one over tokens."""
    same = [{**row, "input_ids": np.arange(1, 9), "labels": np.arange(1, 9)} for row in texts()]
    run = run_of(make_llama(), own)
    object.__setattr__(run, "dataset", same)
    assert exactness(run).kind == NEXT_TOKENS


def test_dropout_is_no_difference_and_is_noted(make_bert: MakeModel) -> None:
    found = exactness(run_of(make_bert(), own, classes))
    assert (found.kind, found.draws) == (TOKENS, True)
    assert not exactness(run_of(make_bert(lora_dropout=0.0).eval(), own, classes)).reason


def test_half_precision_has_its_own_rounding(make_llama: MakeModel) -> None:
    def under_autocast(model: Any, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return own(model, batch)

    assert exactness(run_of(make_llama(), under_autocast)).kind == NEXT_TOKENS
    assert exactness(run_of(make_llama(), in_batch_negatives)).kind == ""


def test_a_batch_of_one_row_runs_as_it_is(make_llama: MakeModel) -> None:
    assert exactness(run_of(make_llama(), own, rows=1)).kind == SUM


@pytest.mark.parametrize(("most", "found"), [(2, "sum"), (0, "")])
def test_where_memory_is_short_two_rows_are_enough(make_llama: MakeModel, most: int, found: str) -> None:
    def short(model: Any, batch: Batch) -> torch.Tensor:
        if len(batch["input_ids"]) <= most:
            return summed(model, batch)
        raise torch.OutOfMemoryError

    result = exactness(run_of(make_llama(), short))
    assert (result.kind, "2 rows ran out of memory" in result.reason) == (found, not found)


def test_nothing_is_left_behind(make_llama: MakeModel) -> None:
    model = make_llama()
    run = run_of(model, own)
    before = deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    exactness(run)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert functional.dropout.__module__ == "torch.nn.functional"


def test_a_batch_that_is_no_tensors_of_rows_is_told(make_llama: MakeModel) -> None:
    def with_pieces(rows: list[dict[str, Any]]) -> Batch:
        return collate(rows) | {"pieces": torch.zeros(17, 2)}

    def without(model: Any, batch: Batch) -> torch.Tensor:
        return own(model, {name: value for name, value in batch.items() if name != "pieces"})

    found = exactness(run_of(make_llama(), without, with_pieces))
    assert "pieces has 17 entries" in found.reason


def test_a_loss_that_takes_no_part_is_told(make_llama: MakeModel) -> None:
    def of_four(model: Any, batch: Batch) -> torch.Tensor:
        if len(batch["input_ids"]) != 4:
            raise ValueError("four rows, please")
        return own(model, batch)

    assert "four rows, please" in exactness(run_of(make_llama(), of_four)).reason
