"""Every feature of rank changes on every family and LoRA form of the matrix in conftest.py, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.tuners.lora import variants
from rankpilot.common.errors import UnsupportedError
from rankpilot.lora.peft_config import adapter_ranks, finish_load, make_resizable, sync_config
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import check_trains, find_target_modules
from torch import nn

from ..cases import first_cases
from .training import product

PLAN = (8, 2, 0, 4, 6, 1)
"""Ranks by module that grow, shrink, drop, keep, grow and shrink from rank 4."""


def mixed(targets):
    return {t.name: PLAN[i % len(PLAN)] for i, t in enumerate(targets)}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def zero_side(target):
    """The factor that PEFT initialises to zero."""
    return target.weight_a if target.adapter in target.layer.lora_embedding_A else target.weight_b


def check_sizes(targets, optimizer):
    """Check that storage and optimiser state are exactly as large as the rank requires."""
    for t in targets:
        assert t.weight_a.shape == (t.rank, t.d_in)
        assert t.weight_b.shape == (t.d_out, t.rank)
        for weight in (t.weight_a, t.weight_b):
            assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
            assert weight.requires_grad == (t.rank > 0)
    state = [(p, v) for p, s in optimizer.state.items() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert state
    for parameter, value in state:
        assert value.shape == parameter.shape
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def check_new_moments(targets, optimizer):
    """Only the zero side of a new direction gets gradients at first; its second moment is the old ones' mean."""
    for t in (t for t in targets if t.rank > 4):
        for weight, axis in ((t.weight_a, 0), (t.weight_b, 1)):
            second = optimizer.state[weight]["exp_avg_sq"].movedim(axis, 0)
            fill = second[:4].mean(dim=0) if weight is zero_side(t) else torch.zeros_like(second[0])
            torch.testing.assert_close(second[4:], fill.expand_as(second[4:]))


def check_scalings(targets, alphas):
    assert [t.alpha for t in targets] == [t.layer.lora_alpha[t.adapter] for t in targets] == alphas
    for t in targets:
        root = math.sqrt(t.rank) if t.layer.use_rslora[t.adapter] else t.rank
        assert t.scaling == t.alpha / (root or 1)
        assert t.layer.r[t.adapter] == t.rank


def check_dropped(family, model, targets):
    """A module at rank 0 gives exactly what its frozen base gives, with and without dropout."""
    dropped = [t for t in targets if t.rank == 0]
    assert dropped
    seen, handles = {}, []
    for t in dropped:
        for key, module in ((t.name, t.layer), (f"{t.name}/base", t.layer.get_base_layer())):
            hook = lambda _m, _i, out, key=key: seen.setdefault(key, out.detach().clone())  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    for training in (True, False):
        seen.clear()
        model.train(training)(**family.inputs(model))
        assert all(torch.equal(seen[t.name], seen[f"{t.name}/base"]) for t in dropped)
    for handle in handles:
        handle.remove()
    for t in dropped:
        assert not any(p.requires_grad for p in t.parameters.values())


def test_the_modules_that_peft_adapted_are_found(family):
    model = family.model()
    targets = find_target_modules(model)
    assert [t.name for t in targets] == model.base_model.targeted_module_names
    assert len(targets) == family.modules
    for t in targets:
        base = t.layer.get_base_layer()
        shape = tuple(base.weight.shape)
        # Conv1D and embeddings hold their weight the other way round.
        assert (t.d_out, t.d_in) == (shape if isinstance(base, nn.Linear) else shape[::-1])
        assert t.rank == family.start
    blocks = [t.block for t in targets]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(blocks[-1] + 1))
    assert blocks[-1] > 0
    # The rest of an adapter, bias and magnitude, keeps its size and its module, whatever the rank.
    factors = {id(w) for t in targets for w in (t.weight_a, t.weight_b)}
    expected = {n for n, p in model.named_parameters() if "lora_" in n and id(p) not in factors}
    extras = {id(p) for t in targets for p in (t.bias, t.magnitude) if p is not None}
    assert {n for n, p in model.named_parameters() if id(p) in extras} == expected
    assert bool(expected) == bool(family.options.keys() & {"use_dora", "lora_bias"})


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_growth_leaves_the_function_alone(family, dtype, tolerance):
    model = family.model(dtype)
    targets = find_target_modules(model)
    before = family.logits(model)
    with model.disable_adapter():
        assert (before - family.logits(model)).abs().max() > 0.01
    set_ranks(targets, {t.name: 11 for t in targets})
    assert {t.rank for t in targets} == {11}
    assert (family.logits(model) - before).abs().max() <= tolerance


def test_ranks_change_in_the_middle_of_training(family):
    model = family.model()
    targets = find_target_modules(model)
    optimizer = adamw(model)
    alphas = [t.alpha for t in targets]
    parameters = {n: id(p) for n, p in model.named_parameters()}
    losses = family.train(model, optimizer)

    set_ranks(targets, mixed(targets), optimizer, step=3)
    assert adapter_ranks(targets) == mixed(targets)
    check_sizes(targets, optimizer)
    check_new_moments(targets, optimizer)
    check_scalings(targets, alphas)
    check_dropped(family, model, targets)
    losses += family.train(model, optimizer)
    check_sizes(targets, optimizer)
    check_dropped(family, model, targets)

    revived = [t for t in targets if t.rank == 0]
    set_ranks(targets, {t.name: 3 for t in revived}, optimizer, step=6)
    assert all(float(product(t).abs().max()) == 0 for t in revived)
    losses += family.train(model, optimizer)
    assert all(zero_side(t).abs().amax() > 1e-4 for t in revived)
    assert all(p.requires_grad and optimizer.state[p] for t in revived for p in t.parameters.values())
    check_sizes(targets, optimizer)
    check_scalings(targets, alphas)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert all(math.isfinite(loss) for loss in losses)
    # The batch never changes, so training must lower the loss in spite of the changes.
    assert losses[-1] < losses[0]


def test_a_shrunk_pair_is_the_best_one_of_its_rank(family):
    model = family.model()
    targets = find_target_modules(model)
    old = [product(t) for t in targets]
    set_ranks(targets, {t.name: 2 for t in targets})
    for t, before in zip(targets, old, strict=True):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert s[2] > 0.01 * s[0]  # otherwise the drop would change nothing
        assert torch.linalg.matrix_norm(product(t) - best) <= 1e-5 * torch.linalg.matrix_norm(before)


SAVED = {
    "mixed": mixed,
    "lowest layers dropped": lambda targets: {t.name: 0 for t in targets if t.block < targets[-1].block},
    "grown": lambda targets: {t.name: 9 for t in targets},
    "one module left": lambda targets: {t.name: 0 for t in targets[:-1]},
}


@pytest.mark.parametrize("plan", first_cases(2, [*SAVED.values()]), ids=SAVED)
def test_plain_peft_loads_what_is_saved(family, plan, tmp_path):
    model = family.model()
    targets = find_target_modules(model)
    make_resizable(model, targets)
    optimizer = adamw(model)
    set_ranks(targets, plan(targets), optimizer)
    family.train(model, optimizer, 1)
    sync_config(model, targets)
    model.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(family.base(), tmp_path)
    assert adapter_ranks(find_target_modules(again)) == {n: r for n, r in adapter_ranks(targets).items() if r}
    assert torch.equal(family.logits(again), family.logits(model))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_plain_peft_loads_a_file_without_any_adapted_module(named_family, name, tmp_path):
    family = named_family(name)
    model = family.model()
    targets = find_target_modules(model)
    make_resizable(model, targets)
    set_ranks(targets, {t.name: 0 for t in targets})
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.base(), tmp_path)
    assert torch.equal(family.logits(again), family.logits(model))


@pytest.mark.parametrize("name", ["llama", "llama-dora", "bert-lora-bias", "gpt2-dora"])
def test_switching_adapters_off_and_on_wakes_no_dropped_module(named_family, name):
    """PEFT then lets all parameters of the adapter require gradients, as it also does in `set_adapter`."""
    family = named_family(name)
    model = family.model()
    targets = find_target_modules(model)
    make_resizable(model, targets)
    optimizer = adamw(model)
    family.train(model, optimizer, 1)
    set_ranks(targets, mixed(targets), optimizer)
    with model.disable_adapter():
        family.logits(model)
    family.train(model, optimizer, 1)
    check_dropped(family, model, targets)


def test_a_merged_model_computes_the_same_and_keeps_its_ranks(family):
    model = family.model()
    targets = find_target_modules(model)
    set_ranks(targets, mixed(targets))
    adapted = family.logits(model)
    for t in targets:
        # PEFT adds an embedding's adapter to every module that shares its weight, such as a tied head.
        base = t.layer.get_base_layer()
        if isinstance(base, nn.Embedding):
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    merged = copy.deepcopy(model).merge_and_unload()
    assert (family.logits(merged) - adapted).abs().max() <= 1e-5

    model.merge_adapter()
    ranks = adapter_ranks(targets)
    with pytest.raises(UnsupportedError, match=r"merged.*unmerge"):
        set_ranks(targets, {targets[0].name: 1})
    assert adapter_ranks(targets) == ranks
    model.unmerge_adapter()
    assert (family.logits(model) - adapted).abs().max() <= 1e-5
    set_ranks(targets, {t.name: 11 for t in targets if t.rank})
    assert (family.logits(model) - adapted).abs().max() <= 2e-5


def test_a_fresh_model_resumes_from_the_whole_state(family):
    source, goal = family.model(), family.model()
    for model in (source, goal):
        make_resizable(model, find_target_modules(model))
    targets = find_target_modules(source)
    optimizer = adamw(source)
    set_ranks(targets, mixed(targets), optimizer)
    family.train(source, optimizer, 1)
    assert not torch.equal(family.logits(goal), family.logits(source))
    goal.load_state_dict(source.state_dict())
    loaded = find_target_modules(goal)
    assert all(t.weight_a.requires_grad for t in loaded), "until training starts, as for the first optimizer"
    assert len(goal.peft_config["default"].rank_pattern) == sum(t.rank > 0 for t in loaded)
    finish_load(goal, loaded)
    assert adapter_ranks(loaded) == mixed(targets)
    assert [t.scaling for t in loaded] == [t.scaling for t in targets]
    check_dropped(family, goal, loaded)
    assert torch.equal(family.logits(goal), family.logits(source))


def test_a_live_model_takes_an_adapter_file_of_other_ranks(family, tmp_path):
    """`load_best_model_at_end` and resuming call `load_adapter` on the model in training."""
    model = family.model()
    targets = find_target_modules(model)
    make_resizable(model, targets)
    parameters = {n: id(p) for n, p in model.named_parameters()}
    set_ranks(targets, mixed(targets))
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    best = family.logits(model)
    optimizer = adamw(model)
    set_ranks(targets, {t.name: (0, 5, 3)[i % 3] for i, t in enumerate(targets)}, optimizer)
    family.train(model, optimizer)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    finish_load(model, targets)
    assert adapter_ranks(targets) == mixed(targets)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert torch.equal(family.logits(model), best)


@pytest.mark.parametrize("name", ["llama", "llama-dora", "bert-lora-bias", "gpt2"])
def test_only_the_named_adapter_changes(named_family, name):
    family = named_family(name)
    model = family.model()
    model.add_adapter("other", LoraConfig(**family.options | {"r": 3, "lora_alpha": 5}))
    targets = find_target_modules(model)
    model.set_adapter("other")
    others = find_target_modules(model)
    with torch.no_grad():
        for t in others:
            zero_side(t).normal_()
    tensors = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters() if "default" not in n}
    logits, ranks = family.logits(model), adapter_ranks(others)

    assert len(targets) == len(others) == family.modules
    for plan in (mixed(targets), {t.name: 0 for t in targets}, {t.name: 5 for t in targets}):
        set_ranks(targets, plan)
        make_resizable(model, targets)
        sync_config(model, targets)
        for key, (parameter, address, value) in tensors.items():
            assert parameter.data_ptr() == address, key
            assert torch.equal(parameter, value), key
        assert torch.equal(family.logits(model), logits)
    assert adapter_ranks(others) == ranks
    assert not model.peft_config["other"].rank_pattern
    model.set_adapter("default")
    assert adapter_ranks(find_target_modules(model)) == {t.name: 5 for t in targets}


def refused(model, reason):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        find_target_modules(model)
    return str(caught.value)


@pytest.mark.parametrize("plan", [{"q_proj": 2, "down_proj": 0}, {"q_proj": 0, "down_proj": 0}])
def test_an_adapter_shared_between_embedding_and_head_keeps_its_rank(named_family, plan, tmp_path):
    """The two modules are views of one storage; new storage for one would cut the tie without an error."""
    family = named_family("llama-tied-embedding")
    model = family.model(ensure_weight_tying=True, rank_pattern={"embed_tokens": 3, "lm_head": 3})
    targets = find_target_modules(model)
    assert {target.name.rpartition(".")[2] for target in targets} == {"q_proj", "down_proj"}
    make_resizable(model, targets)
    optimizer = adamw(model)
    for ranks in (dict.fromkeys(plan, 6), plan):
        set_ranks(targets, {t.name: ranks[t.name.rpartition(".")[2]] for t in targets}, optimizer)
        family.train(model, optimizer, 1)
    inner = model.get_base_model()
    pair = inner.model.embed_tokens.lora_embedding_A["default"], inner.lm_head.lora_B["default"].weight
    assert pair[0].data_ptr() == pair[1].data_ptr()
    assert pair[0].shape == (3, 48)
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.base(), tmp_path)
    assert torch.equal(family.logits(again), family.logits(model))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "layers.0.self_attn.q_proj.*ALora"),
        pytest.param(
            {"init_lora_weights": "mica"},
            "layers.0.self_attn.q_proj.*MiCA",
            marks=pytest.mark.skipif(not hasattr(variants, "MiCALinearVariant"), reason="of later versions of PEFT"),
        ),
    ],
)
def test_other_variants_are_refused(named_family, options, reason):
    assert "rsLoRA or DoRA" in refused(named_family("llama").model(**options), reason)


def test_convolutions_are_refused(named_family):
    model = named_family("vit").model(target_modules=["projection", "q_proj"])
    text = refused(model, r"vit\.embeddings\.patch_embeddings\.projection'.*Conv2d")
    assert "remove the module from `target_modules`" in text


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_frozen_base_are_refused(named_family, start):
    """Plain PEFT computes the change again from the rank in the file: with PiSSA, rank 4 -> 6 moved logits by 3.5."""
    plain = start.startswith(("pissa", "olora"))  # the others need data or SciPy, and only the setting counts
    model = named_family("llama").model(**{"init_lora_weights": start} if plain else {})
    model.peft_config["default"].init_lora_weights = start
    assert "Use " in refused(model, f"init_lora_weights='{start}'")


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_every_other_start_survives_a_change_of_ranks(named_family, start, tmp_path):
    """Some initialisations allow only certain ranks; a saved file must load nevertheless."""
    family = named_family("llama")
    model = family.model(init_lora_weights=start)
    targets = find_target_modules(model)
    make_resizable(model, targets)
    set_ranks(targets, {t.name: (1, 3, 0, 6)[i % 4] for i, t in enumerate(targets)})
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.base(), tmp_path)
    assert torch.equal(family.logits(again), family.logits(model))


@pytest.mark.parametrize(
    ("config", "reason"),
    [(PrefixTuningConfig(num_virtual_tokens=2), "LoRA"), (IA3Config(), "it is IA3. Adapt it with LoraConfig")],
    ids=["prefix", "ia3"],
)
def test_other_peft_methods_are_refused(named_family, config, reason):
    config.task_type = TaskType.CAUSAL_LM
    refused(get_peft_model(named_family("llama").base(), config), reason)


def test_mixed_kinds_of_adapters_are_refused(named_family):
    mixed = get_peft_model(named_family("llama").base(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    refused(mixed, "PeftMixedModel mixes kinds.*without mixed=True")


def test_disabled_adapters_would_not_train(named_family):
    model = named_family("llama").model()
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(UnsupportedError, match=r"is disabled, so it would not be trained.*enable_adapter_layers"):
        check_trains(find_target_modules(model))


def test_a_model_without_adapters_is_refused(named_family):
    refused(named_family("vit").base(), "ViTForImageClassification is not a PEFT model.*get_peft_model")


@pytest.mark.parametrize("whole_class", [True, False])
def test_a_model_of_unsloth_is_refused_with_the_way_to_plan_first(named_family, monkeypatch, whole_class):
    """It replaces functions of transformers' classes, or of single modules, by its own."""
    model = named_family("llama").model()
    layer = model.get_base_model().model.layers[0].mlp
    forward = eval("lambda self, x: x", {"__name__": "unsloth.models.llama"})  # noqa: S307
    if whole_class:
        monkeypatch.setattr(type(layer), "forward", forward)
    else:
        layer.forward = forward.__get__(layer)
    refused(model, r"Unsloth runs LlamaMLP with its own kernels.*rankpilot plan .*docs/train-anywhere.md")


def test_sharded_factors_are_refused(named_family):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = named_family("llama").model()
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = layer.lora_A["default"].weight
        layer.lora_A["default"].weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
        refused(model, r"model\.layers\.1\.mlp\.up_proj'.*sharded.*DTensor")
    finally:
        destroy_process_group()
