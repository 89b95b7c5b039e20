"""The page that tells what fits a card: its arithmetic is Python's, to the byte, and it works by keyboard and link."""

from __future__ import annotations

import base64
import json
import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import transformers as t
from rankpilot.cli.main import run
from rankpilot.common.files import write_text
from rankpilot.cost.cards import device_table
from rankpilot.cost.forecast.card_use import UNDER, CardUse, card_use
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs, Shards
from rankpilot.cost.forecast.known_models import published_models, short_name
from rankpilot.cost.forecast.memory_of import AskedStep, shipped, words_of
from rankpilot.cost.forecast.stored_step import StepFile, StoredStep
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.moments import Files, moments_of_run
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.prices import ACTIVATIONS, free_savers
from rankpilot.cost.step_config import OptimizerName, Quantization, StepConfig
from rankpilot.lora.spec import highest_ranks
from rankpilot.report.trainer_file import read_trainer_file

from tools.make_page import SAVERS, SOURCE, packed_model, packed_step, page, page_models, saver_names
from tools.record_models import steps

from ..cases import first_cases
from .test_browser import BROWSER
from .test_browser import browser as browser

playwright = pytest.importorskip("playwright.sync_api", reason='playwright is missing: pip install -e ".[test]"')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no browser for the page")]

SETTINGS = StepConfig(bf16=True)
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = {
    "llama": t.LlamaConfig(**_SIZES, num_hidden_layers=3, vocab_size=120, max_position_embeddings=4096),
    "windowed": t.Gemma3TextConfig(
        **_SIZES,
        **{"num_hidden_layers": 2, "head_dim": 8, "vocab_size": 120, "sliding_window": 256},
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
    ),
}
SHIPPING: tuple[tuple[str, Quantization], ...] = (
    *(("llama-3.2-1b", "none"), ("qwen3-0.6b", "nf4"), ("smollm2-135m", "none"), ("gemma-3-270m", "nf4")),
)
IN_FOUR_BITS = {name for name, quantization in SHIPPING if quantization == "nf4"}
CARDS = sorted(name for name, card in device_table().items() if card.has_flash_attention)
COMPUTE = """async ([models, cards, asked]) => {
  const found = [], known = {};
  for (const each of asked) {
    const model = (known[each.model] ||= await unpackModel(models[each.model]));
    const step = recordedStep(model, each.savers, each.rows, each.length);
    const checkpointed = Math.min(each.checkpointed, step.segments.length);
    const use = cardUse(model, step, cards[each.card], { ...each, checkpointed });
    const parts = use.parts.reduce((sum, bytes) => sum + bytes, 0);
    found.push([Math.max(use.allocated, use.evaluation), use.reserved, use.margin, use.total, use.verdict, parts]);
    found.at(-1).push([...use.moments, ...use.main]);
  }
  return found;
}"""


def drawn(sources: dict[str, StoredStep], count: int) -> list[dict[str, Any]]:
    """So many random settings."""
    generator, found = random.Random(0), []
    for _ in range(count):
        model, gpus = generator.choice(sorted(sources)), generator.choice([1, 1, 2, 8])
        found.append(
            {
                "model": model,
                "card": generator.choice(CARDS),
                "savers": generator.choice(SAVERS),
                "rank": generator.choice([1, 3, 8, 16, 64, 300]),
                "rows": generator.randint(1, 9),
                "length": generator.randint(2, min(4096, sources[model].model.positions or 4096)),
                "optimizer": generator.choice(get_args(OptimizerName)),
                "gpus": gpus,
                "sharding": generator.choice(["ddp", "fsdp2", "zero3"]) if gpus > 1 else "ddp",
                "checkpointed": generator.choice([0, 1, 2, 999]),
                "accumulates": generator.random() < 0.5,
                "expandable": generator.random() < 0.3,
                "slack": UNDER["none"],
                "evalRows": generator.choice([0, 0, 1, 8]),
                "keepLogits": generator.choice([0, 0, 7, 300]),
            }
        )
    return found


def vocabulary(model: str) -> int:
    """The size of a model's vocabulary."""
    return TINY[model].vocab_size if model in TINY else words_of(published_models()[model]["config"])


def stored_memory(source: StoredStep, asked: dict[str, Any]) -> MemoryModel:
    """The byte model of these settings, on one GPU alone."""
    part = next(part for part, savers in saver_names(source, SETTINGS).items() if savers == asked["savers"])
    names = tuple(part.split(", ")) if part not in ("plain", "") else ()
    source._step = StepConfig(optimizer=asked["optimizer"], accumulation=1 + asked["accumulates"])
    return source.memory(names, BatchShape(asked["rows"], asked["length"]))


def python_use(source: StoredStep, asked: dict[str, Any]) -> CardUse:
    """What the command line would say of these settings."""
    model, shards = replace(source.model, words=vocabulary(asked["model"])), Shards(asked["gpus"], asked["sharding"])
    shape = BatchShape(asked["rows"], asked["length"])
    loaded = LoadedAs(eval_batch_size=asked["evalRows"], keep_logits=asked["keepLogits"])
    memory = shards.of(ConfiguredStep(stored_memory(source, asked), model)).memory
    layers = [segment.name for segment in memory.segments][: asked["checkpointed"]]
    return card_use(
        memory.with_checkpointed(layers),
        np.minimum(asked["rank"], highest_ranks(model.targets)),
        shards.loaded(model),
        device_table()[asked["card"]],
        shape=shape,
        evaluation=loaded.evaluation(shape, model, bf16=True),
        expandable=asked["expandable"],
    )


def in_python(source: StoredStep, asked: dict[str, Any]) -> list[Any]:
    """The same in the order of `COMPUTE`."""
    model, memory, use = source.model, stored_memory(source, asked), python_use(source, asked)
    ranks, allocated = np.minimum(asked["rank"], highest_ranks(model.targets)), use.allocated_bytes
    files = Files.of(memory, ranks, model.frozen_bytes, gpus=asked["gpus"], sharding=asked["sharding"])
    quantised = asked["model"] in IN_FOUR_BITS
    moments = moments_of_run(model.targets, ranks, use.base_bytes, use.peaks, files, quantised=quantised)
    tensors = [each.device_bytes for each in moments] + [each.main_bytes for each in moments]
    return [allocated, use.reserved_bytes, use.margin_bytes, use.total_bytes, use.verdict, allocated, tensors]


def check_same(browser: Any, models: dict[str, bytes], sources: dict[str, StoredStep]) -> None:
    asked = drawn(sources, 500)
    wanted = [in_python(sources[each["model"]], each) for each in asked]
    cards = {
        name: {"memory": card.memory_bytes, "context": card.context_bytes, "workspace": card.workspace_bytes}
        for name, card in device_table().items()
    }
    here = browser.new_page()
    here.add_script_tag(content=(SOURCE / "memory.js").read_text())
    texts = {name: base64.b64encode(content).decode() for name, content in models.items()}
    found = here.evaluate(COMPUTE, [texts, cards, asked])
    here.close()
    apart = [(one, mine, its) for one, mine, its in zip(asked, found, wanted, strict=True) if mine != its]
    assert not apart, f"{len(apart)} of 500, such as {apart[0]}"


@pytest.fixture(scope="module")
def tiny() -> dict[str, StoredStep]:
    """Stored steps of tiny models, with all that the page may be asked about."""
    sources = {}
    for name, config in TINY.items():
        asked = AskedStep(config, SETTINGS)
        sources[name] = source = StoredStep(StepFile(asked.key), asked.recorder, None)
        for step in steps(source, SETTINGS):
            source.configured(step).leaner()
        missing = [(*free_savers(source.model.targets), *more) for more in ((), (ACTIVATIONS,))]
        for length in (200, 512, 513):  # what lowers no peak of a tiny model is asked about as well
            for names in missing:
                source.memory(names, BatchShape(2, length))
    return sources


def test_the_arithmetic_is_that_of_python(browser: Any, tiny: dict[str, StoredStep]) -> None:
    check_same(browser, {name: packed_step(source, SETTINGS, vocabulary(name)) for name, source in tiny.items()}, tiny)


@pytest.mark.long
def test_the_arithmetic_is_that_of_python_for_what_ships(browser: Any) -> None:
    models, sources = {}, {}
    for name, quantization in SHIPPING:
        settings = StepConfig(quantization=quantization, bf16=True)
        file = StepFile.read(shipped(name), AskedStep(name, settings).key)
        content = packed_model(name, quantization)
        assert file
        assert content
        models[name], sources[name] = content, StoredStep(file, AskedStep(name, settings).recorder, None)
    check_same(browser, models, sources)


@pytest.mark.long
def test_the_page_of_all_that_ships_is_small() -> None:
    assert len(page(page_models())) < 6e6


@dataclass
class Visit:
    """A page that is open, and what it complained of or asked a network for."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def wait(self, before: str = "") -> None:
        """Wait until all is shown, and not what was shown before."""
        self.page.wait_for_selector(f"body[data-done]:not([data-done='{before}'])")

    @property
    def done(self) -> str:
        return str(self.page.evaluate("document.body.dataset.done"))

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "memory.html"
    write_text(path, page(page_models(("smollm2-135m", "llama-3.1-8b", "gemma-3-12b", "llama-3.3-70b"))))
    return path


@pytest.fixture
def visit(browser: Any, page_file: Path) -> Iterator[Callable[..., Visit]]:
    visits = []

    def opened(state: str = "", width: int = 1200, scheme: str = "light") -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        here = Visit(context.new_page())
        visits.append(here)
        here.page.on("console", lambda message: here.complaints.append(message.text))
        here.page.on("pageerror", lambda error: here.complaints.append(str(error)))
        here.page.on("request", lambda request: request.is_navigation_request() or here.complaints.append(request.url))
        here.page.goto(f"{page_file.as_uri()}{state}")
        here.wait()
        return here

    yield opened
    for each in visits:
        assert each.complaints == []
        each.page.context.close()


def test_an_answer_is_linked_and_followed(visit: Callable[..., Visit]) -> None:
    here = visit("#model=smollm2-135m&card=RTX+4070&rows=4&savers=no")
    assert here.text(".verdict .mark") == "fits"
    before = here.done
    here.page.get_by_label("Rows in a batch").fill("256")
    here.wait(before)
    assert here.text(".verdict .mark") == "does not fit"
    assert "rows=256" in here.page.url
    again = visit("#" + here.page.url.partition("#")[2])
    assert again.text(".verdict") == here.text(".verdict")
    assert again.text("#ways") == here.text("#ways")


PLANNED = """async (given) => {
  const asked = { ...DEFAULTS, ...given }, model = await modelOf(asked), way = await planned(model, asked);
  const [lines] = programs(asked, way)["command line"];
  const plan = [way.layers, way.savers, timeOf(model, asked, way)];
  return [lines.join("\\n"), way.verdict, way.total, way.spare, plan, [way.moments, way.main]];
}"""


def settings_drawn(count: int) -> list[dict[str, Any]]:
    """So many random settings of the form, on cards of which most steps take a good part."""
    generator, found = random.Random(3), []
    for _ in range(count):
        gpus = generator.choice([1, 1, 2])
        trainer = generator.choice(["trl", "trl", "trainer"])
        asked = {
            "bits": generator.choice(["none", "nf4"]),
            "trainer": trainer,
            "card": "another card",
            "memory": round(generator.choice([2, 3, 4, 6, 8, 12]) * generator.uniform(0.8, 1.2), 2),
            "rank": generator.choice([1, 8, 16, 64, 200]),
            "rows": generator.choice([1, 2, 4, 8]),
            "length": generator.choice([256, 777, 1024, 2048]),
            "accumulation": generator.choice([1, 8]),
            "optimizer": generator.choice(["adamw", "adamw8bit", "sgd"]),
            "checkpointing": generator.choice(["auto", "auto", "auto", "none", "all"]),
            "savers": trainer == "trainer" or generator.random() < 0.7,
            "gpus": gpus,
            "sharding": generator.choice(["ddp", "fsdp2"]) if gpus > 1 else "ddp",
            "expandable": generator.random() < 0.2,
            "evalRows": generator.choice([0, 1, 16]),
            "keepLogits": generator.choice([0, 0, 40]),
        }
        found.append({"model": "smollm2-135m"} | asked)
    return found


@pytest.mark.parametrize("part", first_cases(1, range(5)))
def test_the_command_that_is_pasted_says_what_the_page_says(
    part: int, visit: Callable[..., Visit], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The verdict, bytes on the card, checkpointed layers and time of a plan with adapters on all layers."""
    here, plans = visit("#model=smollm2-135m"), set()
    for asked in settings_drawn(50)[10 * part : 10 * part + 10]:
        lines, verdict, total, spare, (layers, savers, time), moments = here.page.evaluate(PLANNED, asked)
        told, choices = told_by(lines, capsys)
        mine = next((choice for choice in choices if choice["checkpointed"] == layers), None)
        assert mine, (lines, layers, [choice["checkpointed"] for choice in choices])
        found = mine["verdict"], mine["total_bytes"], mine["spare_bytes"]
        assert found == (verdict, total, spare), (lines, layers, savers)
        assert mine["time"] == pytest.approx(time, rel=1e-6), lines
        fitting = [choice["checkpointed"] for choice in choices if choice["verdict"] == "fits"]
        assert verdict != "fits" or layers == min(fitting), lines
        assert verdict == "fits" or not fitting, lines
        if verdict == "fits":
            assert moments == [[each[f"{where}_bytes"] for each in told["moments"]] for where in ("device", "main")]
        plans.add((verdict, layers in (0, 30), savers))
    assert len(plans) > 2, "cases that tell little"


STREAMED = """async (given) => {
  const asked = { ...DEFAULTS, ...given }, model = await modelOf(asked), ways = await streamedWays(model, asked);
  return ways.map(({ asked, way }) => {
    const lines = programs(asked, way)["command line"][0].join("\\n"), there = asked.stream * layerBytes(model);
    const figures = [way.verdict, way.total, way.spare], others = [timeOf(model, asked, way), [way.moments, way.main]];
    return [lines, [asked.stream, there], way.layers, figures, others];
  });
}"""
EIGHT, SEVENTY = {"model": "llama-3.1-8b", "bits": "none"}, {"model": "llama-3.3-70b", "rows": 1}
GEMMA = {"model": "gemma-3-12b", "bits": "none", "trainer": "trainer", "rows": 1, "length": 1024, "card": "RTX 4090"}
TOO_LARGE: list[dict[str, Any]] = [
    *({"memory": 12} | EIGHT, {"memory": 16} | SEVENTY, GEMMA, {"memory": 8} | EIGHT),
    {"memory": 16, "trainer": "trainer", "rank": 8, "length": 1024} | EIGHT,
    *({"memory": 12, "checkpointing": "all"} | EIGHT, {"memory": 12, "savers": False} | EIGHT),
    {"card": "RTX 3090"} | SEVENTY,
]


def test_an_evaluation_that_decides_is_named(visit: Callable[..., Visit]) -> None:
    here = visit("#model=smollm2-135m&card=RTX+4070&rows=2&keepLogits=200")
    assert here.text(".verdict .mark") == "does not fit"
    assert "evaluation, batches of 2 rows (the logits of 100 at once)" in here.text("#moments .chosen")
    assert "Evaluation decides" in here.text("#evaluation")
    fitting = visit("#model=smollm2-135m&card=RTX+4070&rows=2&keepLogits=2&evalRows=1")
    assert (fitting.text(".verdict .mark"), fitting.text("#evaluation")) == ("fits", "")


@pytest.mark.parametrize("asked", first_cases(1, TOO_LARGE))
def test_a_streamed_base_takes_what_the_command_says(
    asked: dict[str, Any], visit: Callable[..., Visit], capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers, bytes in main memory and on the card, and time; with a layer less it does not fit."""
    ways = visit("#model=smollm2-135m").page.evaluate(STREAMED, {"card": "another card"} | asked)
    for lines, streamed, layers, figures, (time, moments) in ways:
        told, choices = told_by(lines, capsys)
        assert [told["streamed"], told["main_memory_bytes"]] == streamed, lines
        mine = next(choice for choice in choices if choice["checkpointed"] == layers)
        assert [mine["verdict"], mine["total_bytes"], mine["spare_bytes"]] == figures, lines
        assert mine["time"] == pytest.approx(time, rel=1e-6), lines
        assert moments == [[each[f"{where}_bytes"] for each in told["moments"]] for where in ("device", "main")], lines
        assert layers == min(choice["checkpointed"] for choice in choices if choice["verdict"] == "fits"), lines
    lines, (fewest, _), *_ = ways[0]
    _, fewer = told_by(lines.replace(f"--stream {fewest}", f"--stream {fewest - 1}"), capsys)
    assert not [choice for choice in fewer if choice["verdict"] == "fits"]


def test_a_streamed_base_is_shown_where_nothing_else_fits(
    visit: Callable[..., Visit], capsys: pytest.CaptureFixture[str]
) -> None:
    large = "#model=llama-3.1-8b&bits=none&card=another+card"
    here = visit(f"{large}&memory=12")
    told = here.text("#streamed").replace("\xa0", " ")
    assert "at least 21 of 32 layers in main memory (8.5 GiB): 10.9 GiB on the card, 1.47x" in told
    whole, _ = told_by(here.text("#streamed code").replace(" --stream 21", ""), capsys)
    assert "streamed from main memory" in whole["verdict"]
    assert "streamed base: 21 of 32 layers, " in here.text("#ways")
    for other in ("&memory=12&gpus=2", "&memory=1", "&memory=24", "&memory=24&checkpointing=none"):
        assert visit(large + other).text("#streamed") == "", other


def told_by(lines: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a pasted command says, and of that its choices with adapters on all layers."""
    words = [word for word in shlex.split(lines.replace("\\\n", " "), comments=True) if word.strip()]
    run([*words[1:], "--json"])
    told = json.loads(capsys.readouterr().out)
    every = ("depth", told["blocks"])
    return told, [choice for choice in told["choices"] if (choice["kind"], choice["layers"]) == every]


def test_lines_are_chosen_by_keyboard(visit: Callable[..., Visit]) -> None:
    here = visit("#model=smollm2-135m&bits=nf4&rank=32")
    assert "rankpilot.attach(trainer" in here.text("#lines code")
    here.page.get_by_role("tab", name="PEFT and TRL").focus()
    here.page.keyboard.press("ArrowRight")
    assert "lora_r: 32" in here.text("#lines code")
    assert here.page.evaluate("document.activeElement.textContent") == "axolotl"


def test_what_cannot_be_asked_is_told(visit: Callable[..., Visit]) -> None:
    here = visit("#model=smollm2-135m")
    here.page.get_by_label("Tokens in a row").fill("100000")
    here.page.wait_for_selector("#answer .mark", state="detached")
    assert "8,192" in here.text("#answer")
    here.page.get_by_label("Tokens in a row").fill("100")
    here.page.evaluate("location.hash = 'model=smollm2-135m&bits=int8'")
    here.page.get_by_text("--quantization int8").wait_for()
    here.page.evaluate("location.hash = 'model=nothing'")
    here.page.get_by_text("no model nothing").wait_for()
    here.page.get_by_label("Rows in a batch").fill("3")
    here.page.wait_for_selector("#answer .mark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(visit: Callable[..., Visit], scheme: str) -> None:
    here = visit("#model=smollm2-135m", width=360, scheme=scheme)
    assert here.page.evaluate("document.documentElement.scrollWidth") == 360
    paper = here.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(16, 19, 23)") == (scheme == "dark")


@pytest.mark.parametrize(("tab", "program"), [("axolotl", "axolotl"), ("LLaMA-Factory", "LLaMA-Factory")])
def test_files_of_other_programs_mean_what_was_asked(
    tab: str, program: str, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    asked = "#model=smollm2-135m&rank=32&rows=3&length=777&accumulation=4&optimizer=paged_adamw8bit&savers=no"
    here = visit(f"{asked}&checkpointing=all")
    here.page.get_by_role("tab", name=tab).click()
    path = tmp_path / "train.yaml"
    path.write_text(here.text("#lines code"))
    found = read_trainer_file(path)
    assert found.program == program
    assert found.unread == ()
    wanted = {"rank": 32, "batch_size": 3, "max_length": 777, "accumulation": 4, "optimizer": "paged_adamw8bit"}
    wanted |= {"quantization": "nf4", "gradient_checkpointing": True}
    assert {name: found.settings[name] for name in wanted} == wanted
    assert short_name(found.settings["model"]) == "smollm2-135m"
