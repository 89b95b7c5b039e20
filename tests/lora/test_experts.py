"""Adapters of fused experts (`target_parameters`): on routed rows, resized, saved and loaded by plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from rankpilot.common.errors import ConfigError, UnknownNameError, UnsupportedError
from rankpilot.lora.adapter_file import export_padded, export_rank_pattern
from rankpilot.lora.peft_config import fresh_adapters, make_resizable, sync_config
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.routed_rows import route_rows
from rankpilot.lora.targets import TargetModule, find_target_modules
from safetensors.torch import load_file, save_file

from ..finetune.test_architectures import random_base

FAMILIES = ("qwen3-moe", "gpt-oss", "llama4")
OTHERS = ("mixtral", "glm4-moe", "qwen3-next", "deepseek-v3")
ALL = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]
IDS = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted(name: str, dtype: torch.dtype = torch.float32, rank: int = 4) -> tuple[PeftModel, list[TargetModule]]:
    """A model with trained adapters on attention and on all experts."""
    options: dict[str, Any] = {"target_modules": "q_proj,o_proj", "target_parameters": "all-experts", "r": rank}
    if name == "deepseek-v3":
        options["target_modules"] = "o_proj"
    base = random_base(name).to(dtype)
    model = fresh_adapters(base, name, "CAUSAL_LM", new_head=False, lora_alpha=2 * rank, **options).train()
    targets = find_target_modules(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for target in targets:
            target.weight_b.copy_(0.3 * torch.randn(target.weight_b.shape, generator=generator))
    return model, targets


def experts_of(targets: list[TargetModule]) -> list[TargetModule]:
    return [target for target in targets if target.experts > 1]


def run(model: PeftModel, targets: list[TargetModule], autocast: bool = False) -> tuple[torch.Tensor, ...]:
    """Logits, and gradients of all factors."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    factors = [weight for target in targets if target.rank for weight in (target.weight_a, target.weight_b)]
    return output.logits.detach().float(), *(weight.grad.clone() for weight in factors)


@contextmanager
def routed(model: PeftModel) -> Iterator[None]:
    undo = route_rows(model)
    try:
        yield
    finally:
        undo()


def difference(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> float:
    """The largest difference, relative to the largest number of each tensor."""
    pairs = [(a, b, a.abs().max()) for a, b in zip(some, others, strict=True)]
    return max(float((a - b).abs().max() / top) for a, b, top in pairs if top)


@pytest.mark.parametrize("name", ALL)
def test_routed_rows_are_the_same_function(name):
    model, targets = adapted(name)
    plain = run(model, targets)
    with routed(model):
        assert difference(plain, run(model, targets)) < 2e-5
        with model.disable_adapter(), torch.no_grad():
            assert torch.allclose(model(input_ids=IDS).logits, random_base(name)(input_ids=IDS).logits, atol=1e-6)
    assert difference(plain, run(model, targets)) == 0, "undone"


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_routed_rows_in_half_precision_are_as_near_to_the_truth(dtype, autocast):
    """Of tokens that have the experts of full precision: rounding may choose others for a token, on each processor."""
    name = "qwen3-moe"
    model, targets = adapted(name, dtype)
    exact, exact_targets = adapted(name)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    chosen: list[torch.Tensor] = []

    def outcome(model: PeftModel, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        chosen.clear()
        routers = [each for each in model.modules() if type(each).__name__.endswith("TopKRouter")]
        hooks = [each.register_forward_hook(lambda *a: chosen.append(a[2][2].sort(-1).values)) for each in routers]
        logits = run(model, *arguments)[0].flatten(0, 1)
        for hook in hooks:
            hook.remove()
        return logits, torch.cat(chosen, dim=-1)

    truth, experts = outcome(exact, exact_targets)
    plain, of_plain = outcome(model, targets, autocast)
    with routed(model):
        ours, of_ours = outcome(model, targets, autocast)
    same = (of_plain == experts).all(-1) & (of_ours == experts).all(-1)
    assert same.sum() >= 16
    assert float((ours - truth)[same].norm()) < 1.25 * float((plain - truth)[same].norm())


def test_routed_rows_under_checkpointing():
    model, targets = adapted("qwen3-moe")
    plain = run(model, targets)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with routed(model):
        assert difference(plain, run(model, targets)) < 2e-5


def test_experts_of_less_rank_stay_at_less_rank():
    """A direction that is zero in both factors has gradients of zero, on routed rows as in PEFT."""
    model, targets = adapted("qwen3-moe")
    experts = experts_of(targets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad():
        for target in experts:
            for number in range(target.experts):
                target.each_a(target.weight_a)[number, number % 4 :] = 0
                target.each_b(target.weight_b)[number, :, number % 4 :] = 0
    plain = run(model, targets)
    with routed(model):
        assert difference(plain, run(model, targets)) < 2e-5
        for _ in range(3):
            run(model, targets)
            optimizer.step()
    for target in experts:
        for number in range(target.experts):
            assert not target.each_a(target.weight_a)[number, number % 4 :].any()
            assert not target.each_b(target.weight_b)[number, :, number % 4 :].any()
        assert target.each_b(target.weight_b)[3, :, :3].abs().sum() > 0


def test_effective_weights_are_gone():
    model, targets = adapted("qwen3-moe")
    stacks = {tuple(target.layer.get_param().shape) for target in experts_of(targets)}

    def saved() -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage()._cdata not in frozen:
                shapes.add(tuple(tensor.shape))
                shapes.add(tuple(tensor.mT.shape) if tensor.dim() > 1 else ())
            return tensor

        frozen = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run(model, targets)
        return shapes

    assert stacks & saved()
    with routed(model):
        assert not stacks & saved()


# Ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3-moe", "llama4"])
def test_growth_keeps_the_function_and_shrinking_takes_the_least(name):
    model, targets = adapted(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, targets)
    optimizer.step()
    before = run(model, targets)[0]
    set_ranks(targets, {target.name: 8 for target in targets}, optimizer)
    assert torch.equal(run(model, targets)[0], before)
    set_ranks(targets, {target.name: 4 for target in targets}, optimizer)
    assert torch.allclose(run(model, targets)[0], before, atol=1e-5)
    target = experts_of(targets)[0]
    each = target.each_b(target.weight_b.detach()) @ target.each_a(target.weight_a.detach())
    set_ranks(targets, {target.name: 2}, optimizer)
    found = target.each_b(target.weight_b.detach()) @ target.each_a(target.weight_a.detach())
    for number in range(target.experts):  # the best approximation of each expert's product, whatever the others'
        left, values, right = torch.linalg.svd(each[number])
        best = left[:, :2] * values[:2] @ right[:2]
        assert torch.allclose(found[number] * target.scaling / (8 / 4), best, atol=1e-5)


def test_moments_follow_each_expert():
    """Adam's first moment of A follows the same map as the gradient would: here, growth and back."""
    model, targets = adapted("qwen3-moe")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run(model, targets)
    optimizer.step()
    target = experts_of(targets)[0]
    moments = [optimizer.state[weight]["exp_avg"].clone() for weight in (target.weight_a, target.weight_b)]
    set_ranks(targets, {target.name: 6}, optimizer)
    grown_a, grown_b = (optimizer.state[weight]["exp_avg"] for weight in (target.weight_a, target.weight_b))
    assert torch.equal(target.each_a(grown_a)[:, :4], moments[0].reshape(target.experts, 4, -1))
    assert not target.each_a(grown_a)[:, 4:].any()
    factor = target.scaling / 2  # of the scaling, by which gradients of B grow
    assert torch.allclose(target.each_b(grown_b)[:, :, :4], factor * target.each_b(moments[1]), atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_plain_peft_loads_and_merges_what_is_saved(name, tmp_path: Path):
    model, targets = adapted(name)
    experts = experts_of(targets)
    set_ranks(targets, {target.name: 3 + 3 * (i % 2) for i, target in enumerate(experts)} | {experts[0].name: 0})
    make_resizable(model, targets)
    sync_config(model, targets)
    model.eval().save_pretrained(tmp_path)
    wanted = model(input_ids=IDS).logits.detach()
    loaded = PeftModel.from_pretrained(random_base(name), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(input_ids=IDS).logits, wanted, atol=2e-5)


def test_a_padded_file_has_one_rank_and_the_same_function(tmp_path: Path):
    model, targets = adapted("qwen3-moe")
    experts = experts_of(targets)
    set_ranks(targets, {target.name: 3 + 3 * (i % 2) for i, target in enumerate(experts)} | {experts[0].name: 0})
    make_resizable(model, targets)
    sync_config(model, targets)
    model.eval().save_pretrained(tmp_path / "adapter")
    export_padded(tmp_path / "adapter", tmp_path / "padded")
    loaded = PeftModel.from_pretrained(random_base("qwen3-moe"), tmp_path / "padded").eval()
    assert {t.rank for t in find_target_modules(loaded)} == {8}
    wanted = model(input_ids=IDS).logits.detach()
    assert torch.allclose(loaded(input_ids=IDS).logits, wanted, atol=1e-5)
    export_padded(tmp_path / "adapter", tmp_path / "single", per_expert=True)
    found = load_file(tmp_path / "single" / "adapter_model.safetensors")
    target = experts_of(find_target_modules(loaded))[1]
    assert target.name.endswith("gate_up_proj")
    product = target.each_b(target.weight_b.detach()) @ target.each_a(target.weight_a.detach())
    stem = f"base_model.model.{target.name.rpartition('.')[0]}"
    for number in range(target.experts):
        halves = [
            found[f"{stem}.{number}.{name}.lora_B.weight"] @ found[f"{stem}.{number}.{name}.lora_A.weight"]
            for name in ("gate_proj", "up_proj")
        ]
        assert torch.allclose(torch.cat(halves), product[number], atol=1e-6)


def test_ranks_of_experts_start_a_fresh_fine_tune(tmp_path: Path):
    model, targets = adapted("qwen3-moe")
    experts = experts_of(targets)
    set_ranks(targets, {experts[0].name: 2, experts[1].name: 6, targets[0].name: 0})
    make_resizable(model, targets)
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(random_base("qwen3-moe"), export_rank_pattern(tmp_path))
    wanted = {target.name: target.rank for target in targets if target.rank}
    assert {target.name: target.rank for target in find_target_modules(fresh)} == wanted


def of_an_older_version(folder: Path, factors: dict[str, torch.Tensor], version: str | None) -> None:
    """Give a saved adapter other factors, by key, and the version of PEFT that lays them out so."""
    file, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({key: factors.get(key, tensor) for key, tensor in load_file(file).items()}, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": version}))


@pytest.mark.parametrize(("name", "version"), [("qwen3-moe", "0.18.1"), ("gpt-oss", "0.18.0"), ("llama4", None)])
def test_files_of_the_older_layout_are_turned_round_and_told(name, version, tmp_path, caplog):
    """PEFT 0.18 adds s B[o, r, e] A[e, r, i] to the weights at [e, i, o], whichever axis is the one of the inputs."""
    model, targets = adapted(name)
    model.eval().save_pretrained(tmp_path / "old")
    paths = {module: path for path, module in model.named_modules()}
    factors = {}
    with torch.no_grad():
        for target in experts_of(targets):
            weight = target.layer.get_param()
            experts, first, second = weight.shape
            a, b = torch.randn(experts, 4, first), 0.3 * torch.randn(second, 4, experts)
            weight.add_(2 * torch.einsum("ore,eri->eio", b, a))
            target.weight_b.zero_()
            factors[f"{paths[target.layer]}.lora_A.weight"] = a.flatten(0, 1)
            factors[f"{paths[target.layer]}.lora_B.weight"] = b.flatten(1)
    of_an_older_version(tmp_path / "old", factors, version)
    export_padded(tmp_path / "old", tmp_path / "new")
    assert ["They are transposed" in row.message for row in caplog.records] == [True] * (name != "gpt-oss")
    loaded = PeftModel.from_pretrained(random_base(name), tmp_path / "new").eval()
    assert torch.allclose(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_a_file_of_the_older_layout_that_does_not_show_it_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": "q_proj", "target_parameters": "experts.down_proj", "r": 2}
    fresh_adapters(random_base("mixtral"), "m", None, new_head=False, **options).save_pretrained(tmp_path / "old")
    of_an_older_version(tmp_path / "old", {}, "0.18.1")
    with pytest.raises(UnsupportedError, match="orientation is unknown"):
        export_padded(tmp_path / "old", tmp_path / "new")


# Names -------------------------------------------------------------------------------------------------------------


def test_names_of_experts_that_match_nothing_are_refused():
    options: dict[str, Any] = {"new_head": False, "target_modules": "q_proj", "r": 2}
    with pytest.raises(UnknownNameError, match=r"Did you mean: .experts\.gate_up_proj"):
        fresh_adapters(random_base("qwen3-moe"), "m", None, target_parameters="experts.gate_proj", **options)
    with pytest.raises(ConfigError, match="has no fused experts"):
        fresh_adapters(random_base("gemma3n"), "m", None, target_parameters="all-experts", **options)
    with pytest.raises(ConfigError, match="lora_dropout"):
        fresh_adapters(
            random_base("qwen3-moe"), "m", None, target_parameters="all-experts", lora_dropout=0.1, **options
        )
