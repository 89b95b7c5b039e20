"""Frozen layers that run once a row: the same losses, fewer passes, and what ends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rankpilot
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.finetune.before_training import prefix_cache
from rankpilot.finetune.prefix_cache import CHECKED_FIRST, PATIENCE, PrefixCache, Room, Row, Store, rows_of
from rankpilot.finetune.run import paused
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from ..cases import first_cases
from .several import in_processes
from .tiny_runs import Run, arguments, counting, take_step

LAYERS, LOWEST, ROWS = 4, 2, 12
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
WORDS, HEADS = {"vocab_size": 64}, {"num_attention_heads": 4}
KINDS = ["q_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Two frozen layers below two that have adapters."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**WORDS, **SIZES, **HEADS, num_key_value_heads=2, **options)).to(dtype)
    config = LoraConfig(r=4, target_modules=KINDS, layers_to_transform=[*range(LOWEST, LAYERS)])
    return get_peft_model(base, config).train()


def texts(count: int = ROWS, longest: int = 16) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": row["input_ids"][: 5 + i % (longest - 5)]}
        for i, row in enumerate(counting(count + 1, longest)[1:])
    ]


def padded(rows: list[dict[str, list[int]]], *, left: bool = False, masked: bool = True) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row["input_ids"]), None) if left else slice(len(row["input_ids"]))
        ids[index, place], mask[index, place] = torch.tensor(row["input_ids"]), 1
    labels = ids.masked_fill(mask == 0, -100) if masked else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def cache_of(model: nn.Module, folder: Path, told: list[str] | None = None, **options: Any) -> PrefixCache:
    room = options.pop("room", Room(folder, 2**20, 2**20))
    settings = {"epochs": 3, "tokens": 200, "evaluates": True} | options
    cache = PrefixCache(model, room, tell=(told if told is not None else []).append, **settings)
    cache.ranks_changed()
    return cache


def losses(
    model: PeftModel, batches: Callable[[int], list[dict[str, torch.Tensor]]], epochs: int = 3
) -> list[torch.Tensor]:
    """Of a short training with an evaluation after each epoch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for epoch in range(epochs):
        model.train()
        for batch in batches(epoch):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        model.eval()
        with torch.no_grad():
            found += [model(**batch).loss for batch in batches(0)]
    return found


def shuffled(collate: Callable[[list[Any]], Any], rows: list[Any], size: int = 4) -> Callable[[int], list[Any]]:
    """Batches of an epoch, others each time."""

    def batches(epoch: int) -> list[Any]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        return [collate([rows[i] for i in order[at : at + size]]) for at in range(0, len(rows), size)]

    return batches


def flattened(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """One row that holds all texts, whose positions begin anew with each."""
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])[None]
    places = torch.tensor([place for row in rows for place in range(len(row["input_ids"]))])[None]
    return {"input_ids": ids, "position_ids": places, "labels": ids.clone()}


COLLATORS: dict[str, Callable[[list[Any]], Any]] = {
    "right": padded,
    "left": lambda rows: padded(rows, left=True),
    "padding counts": lambda rows: padded(rows, masked=False),
    "flattened": flattened,
}
LEFT_OUT = {"right": 12, "left": 0, "padding counts": 0, "flattened": 12}
"""At least so many passes. Rows on the left of padding have other positions in another batch."""


@pytest.mark.parametrize("dtype", first_cases(1, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("name", list(COLLATORS))
def test_losses_are_the_same(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    batches = shuffled(COLLATORS[name], texts())
    options = {"use_cache": name != "flattened"}  # with it, transformers lets texts of one row read one another
    plain, model = losses(llama(dtype, **options), batches), llama(dtype, **options)
    cache = cache_of(model, tmp_path, told := [])
    assert cache.layers == LOWEST
    found = losses(model, batches)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(torch.stack(found), torch.stack(plain), rtol=tolerance, atol=0)
    assert [line for line in told if "All layers run" in line] == []
    assert cache.left_out >= LEFT_OUT[name] - 2 * CHECKED_FIRST
    cache.end()
    assert not any("forward" in vars(module) for module in model.modules())


def test_rows_of_one_precision_do_not_serve_another(tmp_path: Path) -> None:
    """Training runs under autocast and evaluations do not, one of them in another precision."""
    batches, found, told = shuffled(padded, texts()), [], list[str]()
    for cached in (False, True):
        model = llama()
        cache = cache_of(model, tmp_path, told) if cached else None
        with torch.autocast("cpu", torch.bfloat16):
            under = losses(model, batches)
        with torch.no_grad():
            fp32 = [model(**batch).loss for _ in range(4) for batch in batches(0)]
            bf16 = [model.to(torch.bfloat16)(**batch).loss for _ in range(2) for batch in batches(0)]
        found.append([torch.stack(values).float() for values in (under, fp32, bf16)])
    for plain, kept, tolerance in zip(*found, (0.02, 1e-6, 0.02), strict=True):
        torch.testing.assert_close(kept, plain, rtol=tolerance, atol=0)
    assert not any("All layers run" in line for line in told)
    assert cache is not None
    assert cache.left_out > 12, "more than under autocast alone"


def test_other_kinds_of_models(tmp_path: Path) -> None:
    images = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    cases: list[tuple[Callable[[], Any], Callable[[int], Any]]] = [
        (
            lambda: ViTForImageClassification(ViTConfig(**SIZES, **HEADS, **undropped, image_size=32, patch_size=8)),
            shuffled(lambda rows: {"pixel_values": images[rows], "labels": torch.tensor(rows) % 2}, [*range(ROWS)]),
        ),
        (
            lambda: BertForSequenceClassification(BertConfig(**WORDS, **SIZES, **HEADS, **undropped)),
            shuffled(lambda rows: {**padded(rows), "labels": torch.arange(len(rows)) % 2}, texts()),
        ),
    ]
    for make, batches in cases:

        def adapted(make: Callable[[], Any] = make) -> PeftModel:
            torch.manual_seed(0)
            kinds = r".*layers?\.[23]\..*(query|q_proj|dense|fc1)"
            return get_peft_model(make(), LoraConfig(r=4, target_modules=kinds)).train()

        plain, model = losses(adapted(), batches), adapted()
        cache = cache_of(model, tmp_path)
        torch.testing.assert_close(torch.stack(losses(model, batches)), torch.stack(plain), rtol=1e-6, atol=0)
        assert cache.left_out > 0


def test_a_run_of_a_loop_and_one_of_the_trainer(tmp_path: Path) -> None:
    """In both the cache begins after the first plan, and ends with the run."""
    told: list[str] = []
    model = llama()
    loader = DataLoader(texts(), batch_size=4, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    pilot = rankpilot.RankPilot("top-down", "100%", tell=told.append)
    pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=9))
    cache = pilot._piloted.prefix
    assert cache is not None
    for _ in range(3):
        for batch in loader:
            pilot.before_step(batch)
            loss = model(**batch).loss
            loss.backward()
            pilot.before_optimizer_step(loss)
            optimizer.step()
            optimizer.zero_grad()
            pilot.after_step()
    assert cache.left_out == 6 - CHECKED_FIRST
    assert any(
        line.startswith(f"The {LOWEST} lowest of {LAYERS} layers train nothing, so they run once") for line in told
    )
    pilot.finish()
    assert cache.layers == 0

    trainer = Trainer(
        llama(),
        arguments(tmp_path / "run", max_steps=9, eval_strategy="steps", eval_steps=3),
        train_dataset=texts(),  # type: ignore[arg-type]
        eval_dataset=texts(),  # type: ignore[arg-type]
        data_collator=padded,
    )
    callback = rankpilot.attach(trainer, "top-down", "100%", parts="off")
    trainer.train()
    cache = callback.pilot._piloted.prefix
    assert cache is not None
    assert cache.left_out == 6, "of six batches of training and four of evaluations, two are compared"
    assert [*(tmp_path / "run").glob("*prefix*")] == []


def test_a_run_that_is_gone_on_with(tmp_path: Path) -> None:
    """Half an epoch and one more are left; the cache begins anew."""
    config = LlamaConfig(**WORDS, **SIZES, **HEADS, num_key_value_heads=2)
    rows = counting(17)[1:]
    upper = {"target_modules": KINDS, "layers_to_transform": [*range(LOWEST, LAYERS)]}
    options: dict[str, Any] = {"policy": "top-down", "budget": "3k params", "data": rows, "eval_data": rows[:8]}
    options |= {"lora": upper, "max_steps": 12, "save_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    plain = Run(tmp_path / "plain", config, prefix_cache="off", **options).train()
    whole = Run(tmp_path / "whole", config, **options).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    half = Run(tmp_path / "half", config, **options).train(resume=6)
    assert plain.recorder.losses == pytest.approx(whole.recorder.losses, rel=1e-5)
    assert half.recorder.losses == pytest.approx(whole.recorder.losses[6:], rel=1e-5)
    assert min(run.pilot.pilot._piloted.prefix.left_out for run in (whole, half)) > 0


def one_of_two() -> list[Any]:
    """The losses of a process without and with a cache, and how many passes left layers out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: list[Any] = []
    for kept in ("off", "auto"):
        model = llama()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sampler: Any = torch.utils.data.DistributedSampler(texts(), shuffle=False)  # type: ignore[arg-type]
        loader = DataLoader(texts(), batch_size=2, sampler=sampler, collate_fn=padded)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        pilot = rankpilot.RankPilot("top-down", "3k params", prefix_cache=kept)
        pilot.begin(rankpilot.TrainingRun.of_loader(wrapped, optimizer, loader, total_steps=9))
        run = lambda batch, wrapped=wrapped: wrapped(**batch).loss  # noqa: E731
        found.append([take_step(pilot, optimizer, batch, run) for _ in range(3) for batch in loader])
        pilot.finish()
    assert pilot._piloted.prefix is not None
    return [*found, pilot._piloted.prefix.left_out]


def test_two_processes_have_a_cache_each() -> None:
    for plain, kept, left_out in in_processes(2, one_of_two):
        assert kept == pytest.approx(plain, rel=1e-6)
        assert left_out == 6 - CHECKED_FIRST


def test_it_follows_the_lowest_layer_that_trains(tmp_path: Path) -> None:
    model, batch = llama(), padded(texts(4))
    cache = cache_of(model, tmp_path)
    layers = model.get_base_model().model.layers
    model(**batch)
    assert len(cache._store._held) == 4
    for parameter in layers[LOWEST].parameters():
        parameter.requires_grad_(False)
    cache.ranks_changed()
    assert (cache.layers, cache._store._held) == (LOWEST + 1, {})
    layers[0].self_attn.q_proj.weight.requires_grad_(True)
    cache.ranks_changed()
    assert cache.layers == 0
    layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    cache.ranks_changed()
    assert cache.layers == 0, "embeddings are below all layers"


# What ends it, or does not let it begin ------------------------------------------------------------------------------


def test_rows_that_change_between_epochs(tmp_path: Path) -> None:
    model, told = llama(), list[str]()
    cache = cache_of(model, tmp_path, told)
    for epoch in range(PATIENCE + 2):
        fresh = {name: value.clone() for name, value in padded(texts(2)).items()}
        if epoch > 1:
            fresh["input_ids"][0, 0] = epoch
        model(**fresh).loss.backward()
    assert told[-1] == "All layers run for every row from now on: the rows are others than in the epoch before."
    assert cache.layers == 0


def test_layers_that_return_something_else_each_time(tmp_path: Path) -> None:
    model, told = llama(), list[str]()
    embedding = model.get_base_model().model.embed_tokens
    embedding.forward = lambda ids: torch.rand(*ids.shape, embedding.embedding_dim)
    cache = cache_of(model, tmp_path, told)
    for _ in range(2):
        model(**padded(texts(2))).loss.backward()
    assert "differs by" in told[-1]
    assert cache.layers == 0


def test_texts_that_read_one_another(tmp_path: Path) -> None:
    batches = shuffled(flattened, texts())
    plain, model = losses(llama(), batches), llama()
    cache = cache_of(model, tmp_path, told := [])
    torch.testing.assert_close(losses(model, batches), plain, rtol=0, atol=0)
    assert told[-1].endswith("from one pass to the next (dropout, noise, or texts that read one another).")
    assert cache.layers == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_dropout": 0.1}, "their attention drops some numbers at random"),
        ({}, "run once a row"),
    ],
)
def test_dropout_is_told_and_evaluations_are_served_all_the_same(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    model, told = llama(**options), list[str]()
    cache = cache_of(model, tmp_path, told)
    assert words in told[0]
    assert cache._wanted == {True: not options, False: True}
    losses(model, shuffled(padded, texts()))
    assert cache.left_out > 0


def test_no_room(tmp_path: Path) -> None:
    told: list[str] = []
    cache = cache_of(llama(), tmp_path, told, room=Room(tmp_path, 1000, 1000), evaluates=False)
    assert "What they return would take 25 KiB, and there is room for 1.953 KiB (prefix_cache)" in told[0]
    assert cache.layers == 0


def test_what_is_expected_before_training(tmp_path: Path) -> None:
    model = llama()
    head, norm = model.get_output_embeddings().weight, model.get_base_model().model.norm.weight
    cache = cache_of(model, tmp_path)
    assert cache.expected_share(LAYERS, [head]) == pytest.approx(2 / 3)
    assert cache.expected_share(LAYERS, [norm]) == 0, "something trains that may lie below the lowest adapter"
    assert cache.expected_share(LAYERS + 1, []) == 0, "the step has other layers"
    for options in ({"epochs": 1.5}, {"room": Room(tmp_path, 1000, 1000)}):
        assert cache_of(llama(), tmp_path, **options).expected_share(LAYERS, []) == 0  # type: ignore[arg-type]
    assert cache_of(llama(attention_dropout=0.1), tmp_path).expected_share(LAYERS, []) == 0


def run_of(folder: Path, model: nn.Module) -> Any:
    """A run of two epochs that begins."""
    replicas = SimpleNamespace(processes=SimpleNamespace(count=1), sharded=False)
    run = SimpleNamespace(evaluations=None, epochs=2.0, folder=folder, dataset=[0], model=model, wrapped=model)
    run.replicas, run.total_steps, run.accumulation = replicas, 2, 1
    run.small_batches, run.measured = None, lambda work: [5]
    return run


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    assert prefix_cache(run_of(tmp_path / "file" / "run", llama()), None, told.append) is None
    assert told[0].startswith("Frozen layers run for every row: [Errno 20] Not a directory")


def test_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    monkeypatch.setattr("rankpilot.finetune.prefix_cache.free_bytes", lambda device: 2**20)
    most, told = rankpilot.PilotOptions(prefix_cache="900TiB").prefix_cache_bytes, list[str]()
    cache = prefix_cache(run_of(tmp_path, model := llama()), most, told.append)
    assert told == [
        "prefix_cache is 900 TiB, and takes 640 KiB at most: an eighth of the main memory and half of the disk that "
        "are free."
    ]
    assert cache is not None
    cache.ranks_changed()
    losses(model, shuffled(padded, texts()))
    assert cache.left_out > 0


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = llama(), list[str]()
    cache = cache_of(model, tmp_path, told, room=Room(tmp_path, 0, 2**20))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left")))
    expected = llama()(**padded(texts(2))).loss
    assert torch.equal(model(**padded(texts(2))).loss, expected)
    assert "cannot be kept ([Errno 28] No space left)" in told[-1]
    assert cache.layers == 0


def test_a_damaged_file(tmp_path: Path) -> None:
    model, told = llama(), list[str]()
    cache = cache_of(model, tmp_path, told, room=Room(tmp_path, 0, 2**20))
    (expected := model(**padded(texts(2))).loss).backward()
    cache._store._file.seek(0)
    cache._store._file.write(b"\0" * 64)
    assert torch.equal(model(**padded(texts(2))).loss, expected)
    assert told[-1].endswith("what was kept cannot be read (its file is damaged).")


def test_models_whose_layers_cannot_be_found(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(**WORDS, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2))
    told: list[str] = []
    model = get_peft_model(t5, LoraConfig(target_modules=["q"]))
    assert prefix_cache(run_of(tmp_path, model), None, told.append) is None
    assert told == ["Frozen layers run for every row: T5ForConditionalGeneration has 2 stacks of layers, not one."]


def mixtral() -> Any:
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**WORDS, **SIZES, **HEADS, num_key_value_heads=2, **experts))


def gemma4() -> Any:
    shared = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    widths = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
    return Gemma4ForCausalLM(Gemma4TextConfig(**WORDS, **SIZES, **HEADS, num_key_value_heads=2, **shared, **widths))


@pytest.mark.parametrize("make", [mixtral, gemma4])
def test_layers_that_tell_later_ones_or_the_loss_more_than_hidden_states(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    """A loss that reads which experts each layer chose; layers that read the keys and values of earlier ones."""
    batches, found = shuffled(padded, texts()), []
    for cached in (False, True):
        torch.manual_seed(0)
        layers = [*range(LOWEST, LAYERS)]
        model = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=layers))
        cache = cache_of(model, tmp_path) if cached else None
        found.append(torch.stack(losses(model, batches, 2)))
    assert torch.equal(*found)
    assert cache is not None
    assert cache.left_out == 0


def test_measured_steps_are_none_of_the_run(tmp_path: Path) -> None:
    model = llama()
    cache = cache_of(model, tmp_path)
    with paused():
        model(**padded(texts(2)))
    assert cache._store._held == {}


# Rows and where they are kept ----------------------------------------------------------------------------------------


def rows(batch: dict[str, Any], *, padding_counts: bool = False) -> list[tuple[int, int, int]] | None:
    found = rows_of(batch, padding_counts=padding_counts, precision="")
    return None if found is None else [(row.row, row.start, row.stop) for row in found]


def test_rows_whose_masks_have_holes_are_told_apart() -> None:
    ids, masks = torch.tensor([[5, 6, 7, 8]] * 3), torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1]])
    found = rows_of({"input_ids": ids, "attention_mask": masks}, padding_counts=False, precision="")
    assert found is not None
    first, second, third = (row.key for row in found)
    assert first == third != second
    boxes = {"input_ids": ids, "attention_mask": masks, "bbox": torch.zeros(3, 4, 4)}
    assert rows_of(boxes, padding_counts=False, precision="") is None, "what else a model reads tells rows apart, too"


def test_rows_of_batches() -> None:
    batch = padded(texts(3))
    lengths = [len(row["input_ids"]) for row in texts(3)]
    assert rows(batch) == [(i, 0, length) for i, length in enumerate(lengths)]
    assert rows(batch, padding_counts=True) == [(i, 0, max(lengths)) for i in range(3)]
    stops = torch.tensor(lengths).cumsum(0).tolist()
    assert rows(flattened(texts(3))) == [(0, a, b) for a, b in zip([0, *stops], stops, strict=False)]
    for other in ({"inputs_embeds": torch.zeros(1, 2, 3)}, {"attention_mask": torch.ones(1, 1, 4, 4)}, {}):
        assert rows({"input_ids": torch.ones(1, 4)} | other if other else {}) is None


def keys(batch: dict[str, Any], precision: str = "") -> Iterator[bytes]:
    return (row.key for row in rows_of(batch, padding_counts=False, precision=precision) or [])


def test_keys_tell_rows_apart() -> None:
    ids = torch.arange(6)[None]
    batches = [
        {"input_ids": ids},
        {"input_ids": ids + 1},
        {"input_ids": ids, "position_ids": ids + 1},
        {"input_ids": ids, "token_type_ids": torch.ones_like(ids)},
        {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
    ]
    assert len({key for batch in batches for key in keys(batch)}) == len(batches)
    assert next(keys(batches[0], "bfloat16")) != next(keys(batches[0]))
    assert next(keys(padded(texts(3)))) == next(keys(padded(texts(1)))), "whatever the batch is"


def test_a_store_goes_on_in_a_file(tmp_path: Path) -> None:
    import numpy as np

    store = Store(Room(tmp_path, 100, 200))
    values = {bytes([number]): np.full(60, number, dtype=np.uint8) for number in range(6)}
    for key, value in values.items():
        store.put(key, value)
    assert [key in store for key in values] == [True] * 4 + [False] * 2
    assert store.full
    assert all((store.get(key) == values[key]).all() for key in values if key in store)
    assert [*tmp_path.iterdir()] == [], "the file has no name"
    store.clear()
    assert store.size == 0


def test_the_default_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr("rankpilot.finetune.prefix_cache.free_bytes", lambda device: 800)
    assert Room.of(tmp_path) == Room(tmp_path, 100, 500)
    assert Room.of(tmp_path, processes=2) == Room(tmp_path, 50, 250)
    assert Room.of(tmp_path, 50) == Room(tmp_path, 50, 0)
    assert Room.of(tmp_path, 10**6).whole == 600, "no more than there is"
    assert Row(0, 0, 1, b"") == Row(0, 0, 1, b"")
