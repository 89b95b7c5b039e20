"""Exports of saved adapters: how PEFT, vLLM and llama.cpp read the files, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from rankpilot.common.errors import ConfigError, NonFiniteError, RunFolderError, UnsupportedError
from rankpilot.lora.adapter_file import VLLM_RANKS, export_padded, export_rank_pattern, rank_pattern_yaml
from rankpilot.lora.peft_config import make_resizable, sync_config
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from safetensors.torch import load_file, save_file

PLAN = (8, 2, 0, 4, 6, 1)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fill(model: torch.nn.Module) -> None:
    """Give all parameters of the adapter values as after training; growth leaves zeros."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name and parameter.numel():
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def save_mixed(model: PeftModel, folder: Path, plan: tuple[int, ...] = PLAN) -> dict[str, tuple[int, float]]:
    """Save the model with mixed ranks; returns rank and scaling by module name."""
    targets = find_target_modules(model)
    make_resizable(model, targets)
    set_ranks(targets, {t.name: plan[i % len(plan)] for i, t in enumerate(targets)})
    fill(model)
    for target in targets:
        if target.rank == 0 and target.bias is not None:
            target.bias.data.zero_()
    sync_config(model, targets)
    model.save_pretrained(str(folder))
    return {t.name: (t.rank, t.scaling) for t in targets}


def save_plain(family: Any, folder: Path, **options: Any) -> Path:
    """Save an adapter made by PEFT without rankpilot."""
    model = family.model(**options)
    fill(model)
    model.save_pretrained(str(folder))
    return folder


def reloaded(family: Any, folder: Path) -> torch.Tensor:
    """Logits of plain PEFT with an adapter folder on a fresh base, in fp64."""
    logits: torch.Tensor = family.logits(PeftModel.from_pretrained(family.base(), str(folder)).double())
    return logits


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def pairs(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A and B by module name, read from the file as a program without PEFT does."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        for side in "AB":
            for ending in (f".lora_{side}", f".lora_embedding_{side}"):
                if name.endswith(ending):
                    factors.setdefault(name.removesuffix(ending), {})[side] = tensor.double()
    return factors


def test_padded_is_the_same_adapter(family: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On every family: plain PEFT gives the same logits, and one rank and scale hold for the whole file."""
    ranks = save_mixed(family.model(), tmp_path / "mixed")
    if "dora" in family.name:
        with pytest.raises(UnsupportedError, match="use_dora"):
            export_padded(tmp_path / "mixed", tmp_path / "padded")
        assert [path.name for path in tmp_path.iterdir()] == ["mixed"]
        return
    with caplog.at_level(logging.WARNING):
        assert export_padded(tmp_path / "mixed", tmp_path / "padded") == tmp_path / "padded"
    assert bool(caplog.records) == bool(family.options.keys() & {"bias", "lora_bias", "modules_to_save"})
    expected = reloaded(family, tmp_path / "mixed")
    assert relative(reloaded(family, tmp_path / "padded"), expected) < 1e-6
    assert relative(family.logits(family.base()), expected) > 1e-2, "the adapter matters"
    assert {p["A"].shape[0] for p in pairs(tmp_path / "padded").values()} == {8}
    assert pairs(tmp_path / "padded").keys() == {name for name, (rank, _) in ranks.items() if rank}
    config = json.loads((tmp_path / "padded" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["exclude_modules"] == json.loads((tmp_path / "mixed" / CONFIG).read_text())["exclude_modules"]
    assert sorted(path.name for path in (tmp_path / "padded").iterdir()) == [CONFIG, WEIGHTS]


PATTERNS: dict[str, dict[str, Any]] = {
    "layer": {"rank_pattern": {r"^model\.layers\.0\..*": 2}, "alpha_pattern": {r"^model\.layers\.1\..*": 3}},
    "alternation": {
        "rank_pattern": {r"self_attn\.(q_proj|k_proj)": 7, r"(?:gate|up)_proj|down_proj": 1},
        "alpha_pattern": {r"layers\.(0|1)\.mlp\.(gate|up)_proj": 5, "v_proj": 1.5},
    },
    "first match wins": {
        # PEFT saves patterns sorted.
        "rank_pattern": {r".*\.1\.self_attn\.q_proj": 3, r"layers\.1\.self_attn\.(q|k)_proj": 6, "q_proj": 9},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "q_proj": 20, r"self_attn\.q_proj": 5},
    },
    "end of a name": {"rank_pattern": {"proj": 2, "_proj": 3, "q_proj": 5}, "alpha_pattern": {"o_proj": 1}},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {r"^model\.layers\.0\..*": 5}},
    "excluded": {"exclude_modules": ["gate_proj", "layers.1.self_attn.v_proj"], "rank_pattern": {"q_proj": 6}},
    "excluded by regex": {"exclude_modules": r".*layers\.0\..*", "rank_pattern": {"q_proj": 6}},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "rank_pattern": {"q_proj": 6}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_are_read_as_peft_reads_them(case: str, tmp_path: Path, named_family: Any) -> None:
    family = named_family("llama")
    plain = save_plain(family, tmp_path / "plain", **PATTERNS[case])
    padded = export_padded(plain, tmp_path / "padded")
    expected = reloaded(family, plain)
    assert relative(reloaded(family, padded), expected) < 1e-6
    assert relative(family.logits(family.base()), expected) > 1e-2, "the adapter matters"
    before = find_target_modules(family.model(**PATTERNS[case]))
    config = export_rank_pattern(plain)
    assert config.exclude_modules is config.layers_to_transform is None, "full names say it all"
    after = find_target_modules(get_peft_model(family.base(), config))
    assert [(t.name, t.rank, t.scaling) for t in after] == [(t.name, t.rank, t.scaling) for t in before]


def test_rank_of_the_padding(tmp_path: Path, named_family: Any) -> None:
    plain = save_plain(named_family("llama"), tmp_path / "plain", rank_pattern={"q_proj": 9})
    for rank, expected in ((None, 16), (16, 16), (32, 32)):
        folder = export_padded(plain, tmp_path / str(rank), rank)
        assert {pair["A"].shape[0] for pair in pairs(folder).values()} == {expected}
        assert {pair["B"].shape[1] for pair in pairs(folder).values()} == {expected}
    with pytest.raises(ConfigError, match=r"vLLM does not support rank 12.*1, 8, 16, 32, 64, 128, 256, 320, 512"):
        export_padded(plain, tmp_path / "new", 12)
    with pytest.raises(ConfigError, match="rank 9, which exceeds rank 8"):
        export_padded(plain, tmp_path / "new", 8)
    thick = write_adapter(tmp_path / "thick", pair_of("q", VLLM_RANKS[-1] + 1), r=VLLM_RANKS[-1] + 1)
    with pytest.raises(ConfigError, match="rank 513, which exceeds 512, the largest"):
        export_padded(thick, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    """Write an adapter folder from tensors by short key."""
    LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q"]} | options).save_pretrained(str(folder))
    save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def pair_of(name: str, rank: int, d_in: int = 5, d_out: int = 3, **options: Any) -> dict[str, torch.Tensor]:
    a, b = torch.randn(rank, d_in).to(**options), torch.randn(d_out, rank).to(**options)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


@settings(max_examples=30)
@given(
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    alphas=st.lists(st.floats(0.1, 100), min_size=4, max_size=4),
    rslora=st.booleans(),
    above=st.integers(0, 2),
)
def test_padding_keeps_every_product(ranks: list[int], alphas: list[float], rslora: bool, above: int) -> None:
    """For any ranks (0 too), alphas and allowed rank, s B A does not change, and the padding is zero."""
    tensors: dict[str, torch.Tensor] = {}
    for index, rank in enumerate(ranks):
        tensors |= pair_of(f"m{index}.q", rank, dtype=torch.float64)
    patterns = {
        "rank_pattern": {f"m{i}.q": rank for i, rank in enumerate(ranks)},
        "alpha_pattern": {f"m{i}.q": alphas[i] for i in range(len(ranks))},
    }
    slot = [slot for slot in VLLM_RANKS if slot >= max(ranks)][above]
    with tempfile.TemporaryDirectory() as scratch:
        plain = write_adapter(Path(scratch) / "plain", tensors, use_rslora=rslora, **patterns)
        padded = pairs(export_padded(plain, Path(scratch) / "padded", slot if above else None))
    for index, rank in enumerate(ranks):
        a, b = tensors[f"m{index}.q.lora_A.weight"], tensors[f"m{index}.q.lora_B.weight"]
        new = padded[f"m{index}.q"]
        scale = alphas[index] / (math.sqrt(rank) if rslora else rank) if rank else 0.0
        torch.testing.assert_close(new["B"] @ new["A"], scale * b @ a, rtol=1e-12, atol=1e-12)
        assert new["A"].shape == (slot, 5)
        assert new["B"].shape == (3, slot)
        assert not new["A"][rank:].any()
        assert not new["B"][:, rank:].any()


def test_a_start_that_needs_an_even_rank(tmp_path: Path, named_family: Any) -> None:
    """PEFT repeats the orthogonal initialisation on loading, which fails at an odd rank."""
    family = named_family("llama")
    model = family.model(init_lora_weights="orthogonal")
    save_mixed(model, tmp_path / "ones", (1,))
    padded = export_padded(tmp_path / "ones", tmp_path / "padded")
    assert json.loads((padded / CONFIG).read_text())["r"] == 1
    assert relative(reloaded(family, padded), family.logits(model.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_of_the_file_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", pair_of("q", 4, dtype=dtype))
    export_padded(plain, tmp_path / "padded")
    before, after = load_file(plain / WEIGHTS), load_file(tmp_path / "padded" / WEIGHTS)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    key = "base_model.model.q.lora_B.weight"
    assert torch.equal(after[key][:, :4], 2 * before[key]), "a power of two loses nothing"


def test_values_that_stop_being_finite(tmp_path: Path) -> None:
    large = pair_of("q", 4, dtype=torch.float16)
    large["q.lora_B.weight"][0, 0] = 60000.0
    plain = write_adapter(tmp_path / "plain", large)
    with pytest.raises(NonFiniteError, match=r"q\.lora_B\.weight contains NaN or infinity.*scale 2.*float16"):
        export_padded(plain, tmp_path / "padded")
    broken = pair_of("q", 4)
    broken["q.lora_A.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"q\.lora_A\.weight"):
        export_padded(write_adapter(tmp_path / "nan", broken), tmp_path / "padded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan", "plain"], "no output, no scratch"


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_adapter(tmp_path / "plain", pair_of("q", 4))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for taken in (tmp_path / "used", plain, tmp_path / "used" / "notes.txt"):
        with pytest.raises(RunFolderError, match="already exists"):
            export_padded(plain, taken)
    with pytest.raises(RunFolderError, match="Cannot write"):
        export_padded(plain, tmp_path / "used" / "notes.txt" / "deeper")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert pairs(export_padded(plain, tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert pairs(export_padded("plain", "new/one"))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_adapter(tmp_path / "plain", pair_of("q", 4))

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("rankpilot.lora.adapter_file._write_one_by_one", full)
    with pytest.raises(RunFolderError, match="no space left"):
        export_padded(plain, tmp_path / "padded")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def corrupt(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def lose_a_tensor(folder: Path) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.randn(4, 5)}, folder / WEIGHTS)


BAD: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no folder": (shutil.rmtree, RunFolderError, r"plain.* does not exist.*save_pretrained"),
    "no weights": (lambda f: corrupt(f, WEIGHTS, None), RunFolderError, r"adapter_model\.safetensors does not exist"),
    "no config": (lambda f: corrupt(f, CONFIG, None), RunFolderError, r"adapter_config\.json does not exist"),
    "pickle": (pickled, UnsupportedError, "is a pickle, which could run code.*safe_serialization=True"),
    "torn weights": (
        lambda f: corrupt(f, WEIGHTS, b"\x10"),
        RunFolderError,
        "safetensors is corrupt or not an adapter",
    ),
    "torn config": (
        lambda f: corrupt(f, CONFIG, b'{"r": 4'),
        RunFolderError,
        "config.json is corrupt or not an adapter",
    ),
    "unknown type": (
        lambda f: edit_config(f, peft_type="OURS"),
        RunFolderError,
        "config.json is corrupt or not an adapter",
    ),
    "other type": (lambda f: IA3Config().save_pretrained(str(f)), UnsupportedError, "IA3Config. Only LoRA"),
    "no pairs": (lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS), UnsupportedError, "contains no LoRA pair"),
    "half a pair": (lose_a_tensor, RunFolderError, "The pair of q .* is incomplete"),
    "stale config": (lambda f: edit_config(f, r=6), ConfigError, "q has rank 4 in the weights .* but 6 in its config"),
    "bad pattern": (
        lambda f: edit_config(f, rank_pattern={"(q": 4}),
        RunFolderError,
        "Cannot read the ranks and alphas in ",
    ),
    "bad alpha": (lambda f: edit_config(f, lora_alpha="much"), RunFolderError, "lora_alpha is 'much'"),
    "parameters": (
        lambda f: edit_config(f, target_parameters=["w"]),
        UnsupportedError,
        "has unknown target_parameters w",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(case: str, tmp_path: Path) -> None:
    spoil, error, message = BAD[case]
    plain = write_adapter(tmp_path / "plain", pair_of("q", 4))
    spoil(plain)
    for export in (lambda: export_padded(plain, tmp_path / "padded"), lambda: export_rank_pattern(plain)):
        with pytest.raises(error, match=message):
            export()
    assert {path.name for path in tmp_path.iterdir()} <= {"plain"}, "no output, no scratch"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base.*path_initial_model"),
        ({"use_dora": True}, r"more than LoRA \(use_dora\).*merge_and_unload"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    ],
)
def test_more_than_plain_lora(settings_: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", pair_of("q", 4), **settings_)
    with pytest.raises(UnsupportedError, match=message):
        export_padded(plain, tmp_path / "padded")


def test_tensors_of_another_form(tmp_path: Path) -> None:
    tensors = pair_of("q", 4) | {"q.lora_magnitude_vector": torch.ones(3)}
    with pytest.raises(UnsupportedError, match=r"q\.lora_magnitude_vector is not part of a LoRA pair"):
        export_padded(write_adapter(tmp_path / "plain", tensors), tmp_path / "padded")


def test_rank_pattern_and_axolotl_start_a_fresh_model_at_the_learned_ranks(family: Any, tmp_path: Path) -> None:
    ranks = save_mixed(family.model(), tmp_path / "mixed")
    config, text = export_rank_pattern(tmp_path / "mixed"), rank_pattern_yaml(tmp_path / "mixed")
    assert not config.inference_mode
    live = {name: (rank, pytest.approx(scaling)) for name, (rank, scaling) in ranks.items() if rank}
    for each in (config, by_axolotl(text)):
        fresh = find_target_modules(get_peft_model(family.base(), each))
        assert {t.name: (t.rank, t.scaling) for t in fresh} == live
        assert all(t.weight_a.requires_grad for t in fresh)
    assert ("lora_bias" in text) == ("lora-bias" in family.name)
    assert "whole alphas" not in text
    assert "lora_alpha_pattern" not in text, "one alpha for all"


def by_axolotl(text: str) -> LoraConfig:
    """The LoraConfig that axolotl builds from its keys (src/axolotl/loaders/adapter.py)."""
    given = yaml.safe_load(text)
    assert given.pop("adapter") == "lora"
    for patterns in (given["lora_rank_pattern"], given.get("lora_alpha_pattern", {})):
        assert all(type(value) is int and value > 0 for value in patterns.values()), "its schema wants PositiveInt"
    kept = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    names = {key: kept.get(key, key.removeprefix("lora_").removeprefix("peft_")) for key in given}
    return LoraConfig(**{names[key]: value for key, value in given.items()})


def test_one_alpha_that_is_not_whole(tmp_path: Path) -> None:
    text = rank_pattern_yaml(write_adapter(tmp_path / "plain", pair_of("q", 4), lora_alpha=2.5))
    assert "\nlora_alpha: 2\n" in text
    assert "# Ranks by rankpilot. lora_rank_pattern needs axolotl of July 2026 or later\n" in text
    assert "# Axolotl supports whole alphas only: the relative error of a scaling is up to 0.2.\n" in text


def test_lines_for_axolotl(tmp_path: Path) -> None:
    tensors = pair_of("layers.0.q", 2) | pair_of("layers.1.q", 4)
    patterns = {"rank_pattern": {"layers.0.q": 2}, "alpha_pattern": {"layers.0.q": 0.3}}
    plain = write_adapter(tmp_path / "plain", tensors, lora_dropout=0.1, modules_to_save=["head"], **patterns)
    lines = rank_pattern_yaml(plain).splitlines()
    assert "# Ranks by rankpilot. lora_rank_pattern and lora_alpha_pattern need axolotl of July 2026 or later" in lines
    assert "# Axolotl supports whole alphas only: the relative error of a scaling is up to 2.3." in lines
    assert yaml.safe_load("\n".join(lines)) == {
        **{"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_modules_to_save": ["head"]},
        "lora_target_modules": ["layers.0.q", "layers.1.q"],
        "lora_rank_pattern": {r"^layers\.0\.q": 2, r"^layers\.1\.q": 4},
        "lora_alpha_pattern": {r"^layers\.0\.q": 1, r"^layers\.1\.q": 8},
    }


def test_all_modules_at_rank_0(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", pair_of("q", 0))
    with pytest.raises(ConfigError, match=r"All modules of .* are at rank 0"):
        export_rank_pattern(plain)
    padded = pairs(export_padded(plain, tmp_path / "padded"))
    assert padded["q"]["A"].shape == (1, 5)
