"""`python -m benchmarks worth`: fits what a plan is worth on real fine-tunes, and judges it on those left out.

Rows come from three places: drawn plans at drawn rates (what ran them is at commit c5bd684f), the plans of 44
fine-tunes of byte models that version 0.2 learned from, and the sweeps of rank and rate that others published. Effects
are fitted by expectation maximisation (Dempster, Laird and Rubin, 1977) with a free level for each fine-tune, since
only differences count.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rankpilot.common.arrays import BoolArray, FloatArray, IntArray
from rankpilot.common.files import write_json
from rankpilot.common.text import make_table
from rankpilot.decide.observation import ModuleShapes
from rankpilot.decide.plan.goal import CAUTION, SURE
from rankpilot.decide.plan.rate import LEAST_SHARE, RULE
from rankpilot.decide.plan.worth import FEATURES, FILE, Modules, PlanWorth, distance
from rankpilot.lora.spec import REFERENCE_RANK, ModuleSpec
from rich.console import Console
from scipy.stats import spearmanr

from .harness import Figures
from .rates import published, width_of

PACKED = Path(__file__).parent / "results" / "loss_runs.json"
EARLIER = Path(__file__).parent / "results" / "plan_losses.json"

ROUNDS = 60
"""Rounds of expectation maximisation."""

FAR = 0.6
"""Runs at a rate further off what the plan wants, in log, or at a scale further off in powers of 2, are not judged: no
decision takes them. They are fitted on."""

BESIDE = ("rate", "its square", "scale", "rate x scale", "rate x rank", "rate x share")
"""What differs between rows beside the features: decisions leave the rate to the rule and the scale to alpha."""

PLAIN = ["all", REFERENCE_RANK, 1.0]
"""Part, rank and power of plain LoRA."""

OUTLIER = 0.08
"""What no feature explains counts as at most this, in log loss."""

SHAPES = {"smollm2-135m": (30, 192, 1536), "smollm2-15": (15, 192, 1536), "smollm2-8": (8, 192, 1536)}
"""Layers, width of keys and values, and of the inside of MLPs."""

Part = Callable[[Sequence[ModuleSpec]], BoolArray]
"""Chooses modules, bool (modules,)."""


def _heights(modules: Sequence[ModuleSpec]) -> IntArray:
    """How many layers are above each module, (modules,)."""
    blocks = np.array([module.block for module in modules])
    return np.asarray(blocks.max() - blocks)


def top(share: float) -> Part:
    """A share of the layers from the top down, rounded up."""
    return lambda modules: _heights(modules) < math.ceil(share * (_heights(modules).max() + 1))


def mlp(modules: Sequence[ModuleSpec]) -> BoolArray:
    """The modules of MLPs: they have the wide inner side of their layer, attention's do not."""
    return ModuleShapes.of(tuple(modules)).wide


_ENDS = ("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj")
PARTS: dict[str, Part] = {
    "all": top(1),
    "attention": lambda modules: ~mlp(modules),
    "mlp": mlp,
    "top-3/4": top(0.75),
    "top-1/2": top(0.5),
    "top-1/4": top(0.25),
    "every-other": lambda modules: _heights(modules) % 2 == 0,
    "attention-top-1/2": lambda modules: ~mlp(modules) & top(0.5)(modules),
    "mlp-top-3/4": lambda modules: mlp(modules) & top(0.75)(modules),
    "mlp-top-1/2": lambda modules: mlp(modules) & top(0.5)(modules),
    "out": lambda modules: np.array([module.name.endswith(_ENDS) for module in modules]),
}
"""Which modules were adapted, by name; "out" is what writes into the residual stream."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fit what a plan is worth, and judge it on fine-tunes and models left out.

    Attributes:
        write: write the fit into the package.
        json: also write figures to this file.
    """

    write: bool = False
    json: Path | None = None


@dataclass(frozen=True, eq=False)
class FineTune:
    """Several plans of one fine-tune; P plans, F features.

    Attributes:
        model: what is left out together.
        name: of the fine-tune.
        features: of the plans, (P, F).
        off: log of the rate over the best rate of plain LoRA times the plan's factor, (P,).
        scale: mean of log2(scale / scale at the same alpha), (P,).
        losses: the log of the held-out loss, (P,).
    """

    model: str
    name: str
    features: FloatArray
    off: FloatArray
    scale: FloatArray
    losses: FloatArray

    @property
    def weights(self) -> FloatArray:
        """How much each row counts: the less, the further it is from plain LoRA at its best rate, (P,)."""
        return np.asarray(1 / np.maximum(distance(self.features) + 0.1 * self.off**2, 0.1))

    @property
    def columns(self) -> FloatArray:
        """The features, and `BESIDE` them, (P, F + len(BESIDE))."""
        names = list(FEATURES)
        rank = sum(self.features[:, names.index(f"rank of {kind} modules")] for kind in ("MLP", "attention")) / 2
        adapted = 1 - np.sqrt(self.features[:, names.index("few modules")])
        share, off = np.log(np.maximum(adapted, LEAST_SHARE)), self.off
        beside = [off, off**2, self.scale, off * self.scale, off * rank, off * share]
        return np.column_stack([self.features, *beside])

    @property
    def plain(self) -> BoolArray:
        """Which rows are plain LoRA, bool (P,)."""
        return np.asarray(~self.features.any(axis=1) & (self.scale == 0))


def specs_of(model: str) -> tuple[ModuleSpec, ...]:
    """The target modules of a model of the drawn plans."""
    width = width_of(model)
    layers, narrow, inner = SHAPES.get(model) or (int(model.rpartition("-")[2].partition("x")[0]), width, 3 * width)
    attention = {"q": (width, width), "k": (width, narrow), "v": (width, narrow), "o": (width, width)}
    sides = {f"self_attn.{name}_proj": side for name, side in attention.items()}
    sides |= {f"mlp.{name}_proj": (width, inner) for name in ("gate", "up")} | {"mlp.down_proj": (inner, width)}
    if model.startswith("gpt2"):
        sides = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        sides |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    return tuple(ModuleSpec(f"layers.{n}.{name}", n, *side) for n in range(layers) for name, side in sides.items())


def loss_runs() -> Iterator[FineTune]:
    """The drawn plans of the repository's file."""
    for packed in json.loads(PACKED.read_text(encoding="utf-8")):
        model, text, steps, rows = packed["task"]
        specs = specs_of(model)
        modules, highest = _modules(specs, width_of(model)), np.array([spec.max_rank for spec in specs])
        ranks, scales, off, losses = [], [], [], []
        plain = min((run for run in packed["runs"] if run[:3] == PLAIN), key=lambda run: float(run[4]))[3]
        for part, rank, power, rate, loss in packed["runs"]:
            found = np.where(PARTS[part](specs), np.minimum(rank, highest), 0)
            extra = (np.maximum(found, 1) / REFERENCE_RANK) ** (1 - power)
            alpha = 2.0 * REFERENCE_RANK / np.maximum(found, 1) * extra
            factor = RULE.factor(found, alpha, np.full(len(specs), 2.0))
            ranks.append(found)
            scales.append(float(np.log2(extra[found > 0]).mean()))
            off.append(math.log(rate / (plain * factor)))
            losses.append(math.log(loss))
        features = modules.features(np.array(ranks, dtype=np.int64))
        name = f"{model} / {text}, {steps} steps of {rows}"
        yield FineTune(model, name, features, np.array(off), np.array(scales), np.array(losses))


def earlier() -> Iterator[FineTune]:
    """The plans of version 0.2's fine-tunes of byte models, each at the rate that was its rule's then."""
    for packed in json.loads(EARLIER.read_text(encoding="utf-8")):
        layers, wide = np.array(packed["layers"]), np.array([kind == "1" for kind in packed["mlp"]])
        modules = Modules(wide, layers / layers.max(), width_of(packed["model"]))
        features = modules.features(np.array(packed["ranks"], dtype=np.int64))
        yield _at_its_rate(packed["model"], packed["name"], features, packed["losses"])


def sweeps() -> Iterator[FineTune]:
    """Ranks of all modules of large models, each at its best rate of those that others published."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    widths = {}
    for sweep in published():
        model = sweep.name.rpartition(" rank ")[0]
        found[model][sweep.rank], widths[model] = min(sweep.losses.values()), sweep.width
    for model, by_rank in found.items():
        if len(by_rank) >= 2:
            modules = _modules(specs_of("smollm2-8"), widths[model])
            ranks = np.array([np.full(len(modules.wide), rank) for rank in by_rank], dtype=np.int64)
            yield _at_its_rate("published", model, modules.features(ranks), list(by_rank.values()))


def _modules(specs: Sequence[ModuleSpec], width: int) -> Modules:
    blocks = np.array([spec.block for spec in specs])
    return Modules(ModuleShapes.of(specs).wide, blocks / blocks.max(), width)


def _at_its_rate(model: str, name: str, features: FloatArray, losses: Sequence[float]) -> FineTune:
    """A fine-tune all of whose plans had the rate that is theirs, and the scale of one alpha."""
    nothing = np.zeros(len(losses))
    return FineTune(model, name, features, nothing, nothing, np.log(losses))


@dataclass(frozen=True, eq=False)
class Effects:
    """What was fitted: of each column its mean effect and the covariance over fine-tunes, and the noise (variance)."""

    mean: FloatArray
    covariance: FloatArray
    noise: float

    @property
    def worth(self) -> PlanWorth:
        """The effects of the features; what is not known of their means counts too."""
        size = len(FEATURES)
        return PlanWorth(self.mean[:size], self.covariance[:size, :size], math.sqrt(self.noise))

    @property
    def powers(self) -> dict[str, float]:
        """By what the best rate's powers of scale, rank and share differ from the rule's."""
        curvature = 2 * self.mean[-5]
        return {
            "scale": -self.mean[-3] / curvature / math.log(2),
            "rank, at one alpha": -self.mean[-2] / curvature / math.log(2),
            "share": -self.mean[-1] / curvature,
        }


def fit(fine_tunes: Sequence[FineTune]) -> Effects:
    """The effects of all columns, by expectation maximisation."""
    tables = [(each.columns, each.losses, each.weights[:, None]) for each in fine_tunes]
    size = tables[0][0].shape[1]
    mean, covariance, noise = np.zeros(size), 4e-4 * np.eye(size), 1e-4
    for _ in range(ROUNDS):
        inverse, means, covariances, squares, count = np.linalg.inv(covariance), [], [], 0.0, 0
        for columns, losses, weights in tables:
            features = columns - (weights * columns).sum(axis=0) / weights.sum()
            centred = losses - float(weights[:, 0] @ losses) / weights.sum()
            posterior = np.linalg.inv((weights * features).T @ features / noise + inverse)
            own = posterior @ ((weights * features).T @ centred / noise + inverse @ mean)
            left = np.clip(centred - features @ own, -OUTLIER, OUTLIER)
            squares += float(weights[:, 0] @ left**2 + np.trace((weights * features) @ posterior @ features.T))
            count += len(losses) - 1
            means.append(own)
            covariances.append(posterior)
        mean = np.mean(means, axis=0)
        spread = [np.outer(own - mean, own - mean) + other for own, other in zip(means, covariances, strict=True)]
        covariance, noise = np.mean(spread, axis=0) + 1e-7 * np.eye(size), max(squares / count, 1e-6)
    return Effects(mean, covariance * (1 + 1 / len(tables)), noise)


@dataclass(frozen=True)
class Judgement:
    """How well one fine-tune was predicted from others.

    Attributes:
        correlation: rank correlation of expected and real losses.
        plans: how many were told a sure end.
        above: how many of them end above it.
        taken: log loss of the plan that "quality" takes among those that were run, beside plain LoRA's.
        best: the same of the best of them.
    """

    correlation: float
    plans: int
    above: int
    taken: float
    best: float


def judge(worth: PlanWorth, fine_tune: FineTune) -> Judgement | None:
    """Hold expectations against one fine-tune; None where it has too few plans, or no plain LoRA."""
    near = (np.abs(fine_tune.off) < FAR) & (np.abs(fine_tune.scale) < FAR)
    features, losses, off = fine_tune.features[near], fine_tune.losses[near], fine_tune.off[near]
    plain, others = fine_tune.plain[near], ~fine_tune.plain[near]
    if others.sum() < 3 or not plain.any():
        return None
    reference = losses[plain][np.argmin(np.abs(off[plain]))]
    expected, spread = worth.parts(features).sum(axis=1), worth.spread(features)
    change = losses - reference
    taken = int(np.argmin(np.where(plain, 0, expected + CAUTION * spread)))
    return Judgement(
        float(spearmanr(expected[others], change[others]).statistic),
        int(others.sum()),
        int((change > expected + SURE * spread)[others].sum()),
        0.0 if plain[taken] else float(change[taken]),
        min(0.0, float(change[others].min())),
    )


def benchmark(options: Options, console: Console) -> Figures:
    """Print how well plans of fine-tunes and models left out are predicted, and the effects."""
    known = [*loss_runs(), *earlier(), *sweeps()]
    figures: Figures = {"fine-tunes": len(known), "plans": sum(len(each.losses) for each in known)}
    console.print(f"{figures['fine-tunes']} fine-tunes, {figures['plans']} runs.")
    ways: dict[str, Callable[[FineTune], str]] = {"text left out": _text_of, "model left out": lambda each: each.model}
    rows = []
    for way, group_of in ways.items():
        judged: dict[str, list[Judgement]] = defaultdict(list)
        for group in sorted({group_of(each) for each in known}):
            worth = fit([each for each in known if group_of(each) != group]).worth
            for each in known:
                if group_of(each) == group and (judgement := judge(worth, each)):
                    judged[each.model].append(judgement)
        judged["all"] = [judgement for found in judged.values() for judgement in found]
        for model, found in judged.items():
            means = {name: float(np.nanmean([getattr(one, name) for one in found])) for name in vars(found[0])}
            plans, above = (sum(getattr(one, name) for one in found) for name in ("plans", "above"))
            figures |= {f"{way} {model} {name}": value for name, value in means.items()}
            figures[f"{way} {model} share above"] = above / plans
            shown = [f"{means['correlation']:.2f}", f"{above} of {plans}"]
            shown += [f"{100 * means[name]:+.2f} %" for name in ("taken", "best")]
            rows.append((way, model, str(len(found)), *shown))
    columns = ("", "model", "fine-tunes", "rank correlation", "above what was sure", "taken", "best")
    console.print(make_table("Expected and real losses of plans; taken and best beside plain LoRA", columns, rows))
    fitted = fit(known)
    worth = fitted.worth
    spread = np.sqrt(np.diag(worth.covariance))
    effects = [
        (name, f"{100 * mean:+.2f} %", f"{100 * deviation:.2f} %")
        for name, mean, deviation in zip(FEATURES, worth.effects, spread, strict=True)
    ]
    console.print(make_table("Effects on the log loss", ("of", "mean", "over fine-tunes"), effects))
    powers = ", ".join(f"{name} {value:+.2f}" for name, value in fitted.powers.items())
    console.print(f"Best rates: powers beside the rule's: {powers}.", markup=False)
    figures |= {f"power {name}": value for name, value in fitted.powers.items()}
    if options.write:
        rounded = replace(worth, effects=worth.effects.round(6), covariance=worth.covariance.round(9))
        write_json(FILE, rounded.to_json())
    return figures


def _text_of(fine_tune: FineTune) -> str:
    return fine_tune.name.partition(" / ")[2].partition(",")[0] or fine_tune.name
