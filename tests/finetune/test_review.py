"""Plans that a person reviews: the file, the answers, what is refused, and what the log holds of it."""

from __future__ import annotations

import builtins
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rankpilot import RankPilot, RankPilotCallback
from rankpilot.allocation.log import DecisionLog
from rankpilot.allocation.observation import Observation
from rankpilot.allocation.plan import project
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.errors import BudgetError, ConfigError, ReviewError
from rankpilot.finetune import review as review_module
from rankpilot.finetune.proposal import Proposal, parse
from rankpilot.finetune.review import PlanReview, review_notes
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from rankpilot.memory.cost import plan_cost
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

TEXTS = [[i * j % 64 for i in range(20)] for j in range(40)]
ROWS = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in TEXTS])
SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
STEPS, SECOND = 8, 4


@pytest.fixture
def proposal(make_observation: Callable[..., Observation]) -> Proposal:
    observation = make_observation(modules=8, seed=3)
    problem, scores = observation.problem, np.linspace(-1, 1, 8)
    plan = project(problem, np.full(8, 8), scores)
    return Proposal(1, 40, "signal-mean", observation, scores, problem, plan)


def edited(text: str, ranks: dict[str, Any] | None = None, **fields: Any) -> str:
    """The text of a review file after a person has changed it."""
    document = yaml.safe_load(text)
    for name, rank in (ranks or {}).items():
        document["modules"].setdefault(name, {})["rank"] = rank
    return yaml.safe_dump(document | fields)


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_says_what_is_proposed_and_why(proposal: Proposal) -> None:
    text = proposal.text()
    document = yaml.safe_load(text)
    assert document["approved"] is None
    assert (document["decision"], document["step"], document["policy"]) == (1, 40, "signal-mean")
    assert document["predicted_cost"] == f"{proposal.plan.cost:,.0f} parameters"
    assert document["budget"] == f"{proposal.problem.limit:,.0f} parameters"
    assert list(document["modules"]) == list(proposal.names)
    for index, entry in enumerate(document["modules"].values()):
        assert entry["rank"] == entry["proposed"] == proposal.plan.ranks[index]
        assert entry["before"] == proposal.problem.ranks[index]
        assert entry["score"] == pytest.approx(proposal.scores[index], rel=1e-3)
        assert entry["parameters_per_rank"] == proposal.problem.cost.per_rank[0, index]
    reasons = [entry["reason"] for entry in document["modules"].values()]
    assert any(reason.startswith(("high ", "low ")) for reason in reasons)
    assert sum("{rank: " in line and "reason: " in line for line in text.splitlines()) == 8, "a line for each module"
    assert np.array_equal(proposal.ranks_in(document), proposal.plan.ranks)


def test_what_stands_out_is_told_as_high_or_low(proposal: Proposal) -> None:
    features = np.zeros_like(proposal.observation.modules)
    features[:, 1] = (0.1, -0.1, 0, 0, 0, 0, 0, 3)
    proposal = replace(proposal, observation=replace(proposal.observation, modules=features))
    modules = list(yaml.safe_load(proposal.text())["modules"].values())
    assert modules[7]["reason"] == "high snr (+2.6)"
    assert modules[2]["reason"] == "no signal is unusual"


def test_an_approved_file_is_the_same_with_the_ranks_of_the_person(proposal: Proposal) -> None:
    ranks = np.where(np.arange(8) == 2, 1, proposal.plan.ranks)
    document = parse(proposal.text(ranks))
    assert document["approved"] is True
    assert document["predicted_cost"] == f"{plan_cost(proposal.problem.cost, ranks):,.0f} parameters"
    assert np.array_equal(proposal.ranks_in(document), ranks)
    assert proposal.is_in(document)
    assert not replace(proposal, step=41).is_in(document)
    assert not replace(proposal, plan=replace(proposal.plan, ranks=ranks + 1)).is_in(document)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"layers.0.m9": 4}, r"Unknown target module 'layers.0.m9'. Did you mean: 'layers.0.m\d'"),
        ({"layers.0.m1": 5}, r"The rank of 'layers.0.m1' is 5. Allowed: 0, 1, 2, 4, 8, 12, 16, 24, 32\."),
        ({"layers.0.m1": 64}, r"is 64. Allowed: 0, .*, 32\."),
        ({"layers.0.m1": -1}, "is -1. Allowed"),
        ({"layers.0.m1": 2.5}, "is 2.5. Allowed"),
        ({"layers.0.m1": True}, "is True. Allowed"),
        ({"layers.0.m1": None}, "is None. Allowed"),
        ({"layers.0.m1": "8"}, "is '8'. Allowed"),
        (dict.fromkeys((f"layers.{i // 4}.m{i % 4}" for i in range(8)), 0), "No module has a rank above 0"),
        (dict.fromkeys((f"layers.{i // 4}.m{i % 4}" for i in range(8)), 3), r"There are 3 more such problems\."),
    ],
)
def test_what_cannot_be_a_plan_is_refused(proposal: Proposal, ranks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        proposal.ranks_in(parse(edited(proposal.text(), ranks)))


def test_a_plan_above_the_budget_is_refused_with_the_figures(proposal: Proposal) -> None:
    ranks = dict.fromkeys(proposal.names, 32)
    cost = plan_cost(proposal.problem.cost, np.full(8, 32))
    over = f"{cost:,.0f} parameters, which is {cost - proposal.problem.limit:,.0f} parameters above the budget of"
    with pytest.raises(ConfigError, match=over):
        proposal.ranks_in(parse(edited(proposal.text(), ranks)))


def test_bounds_and_broken_modules_limit_a_person_too(proposal: Proposal) -> None:
    low, high = np.zeros(8, dtype=np.int64), np.full(8, 32)
    low[0], high[1] = 2, 4
    pinned = np.arange(8) == 2
    proposal = replace(proposal, problem=replace(proposal.problem, low=low, high=high, pinned=pinned))
    kept = int(proposal.plan.ranks[2])
    text = edited(proposal.text(), {"layers.0.m0": 1, "layers.0.m1": 8, "layers.0.m2": 1 if kept != 1 else 2})
    with pytest.raises(ConfigError) as refused:
        proposal.ranks_in(parse(text))
    assert "'layers.0.m0' is 1. Allowed: 2, 4, 8, 12, 16, 24, 32." in str(refused.value)
    assert "'layers.0.m1' is 8. Allowed: 0, 1, 2, 4." in str(refused.value)
    assert f"Allowed: {kept}, since it holds NaN or infinity." in str(refused.value)


def test_what_is_no_review_file_is_refused(proposal: Proposal) -> None:
    text = proposal.text()
    for wrong, message in (
        ("", "empty or missing"),
        ("- a\n- b\n", "no mapping"),
        ("decision: [1\n", "no YAML in line 2"),
        ("decision: 2024-99-99\n", "no YAML"),
        (edited(text, approved="perhaps"), "`approved` is true or false; got 'perhaps'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(wrong)
    names = yaml.safe_load(text)["modules"]
    for wrong, message in (
        (edited(text, step=0), "holds decision 1 of step 0, but the run waits for decision 1 of step 40"),
        (edited(text, modules=None), "no `modules`"),
        (edited(text, modules=dict.fromkeys(names, 8)), "is None. Allowed"),
        (edited(text, modules={name: names[name] for name in list(names)[1:]}), "Module 'layers.0.m0' is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            proposal.ranks_in(parse(wrong))


def test_arguments_are_checked_at_once(tmp_path: Path, proposal: Proposal) -> None:
    other = tmp_path / "config.yaml"
    other.write_text("learning_rate: 1.0\n")
    for wrong in (other, tmp_path, 7):
        with pytest.raises(ConfigError, match="review is the name of a new file"):
            RankPilot("signal-mean", review=wrong)  # type: ignore[arg-type]
    for seconds in (0, -1, "1", float("nan"), True):
        with pytest.raises(ConfigError, match="review_timeout is a number of seconds above 0"):
            RankPilot("signal-mean", review=tmp_path / "new.yaml", review_timeout=seconds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="review_timeout needs review"):
        RankPilot("signal-mean", review_timeout=5)
    assert other.read_text() == "learning_rate: 1.0\n"
    (tmp_path / "earlier.yaml").write_text(proposal.text())
    RankPilot("signal-mean", review=tmp_path / "earlier.yaml")


# A person at a terminal -----------------------------------------------------------------------------------------------


class Asker:
    """Stands in for `input`: each answer is a text, or changes the file and presses Enter."""

    def __init__(self, path: Path, *answers: str | Callable[[str], str]) -> None:
        self.path, self.answers = path, list(answers)
        self.questions: list[str] = []

    def __call__(self, question: str) -> str:
        self.questions.append(question)
        answer = self.answers.pop(0)
        if callable(answer):
            self.path.write_text(answer(self.path.read_text()))
            return ""
        if answer == "EOF":
            raise EOFError
        return answer


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Asker]:
    def sit_down(*answers: Any) -> Asker:
        asker = Asker(tmp_path / "plan.yaml", *answers)
        monkeypatch.setattr(builtins, "input", asker)
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, closed=False))
        return asker

    return sit_down


@pytest.mark.parametrize("answer", ["", "yes", " Y "])
def test_a_yes_takes_the_plan_as_proposed(proposal: Proposal, terminal: Callable[..., Asker], answer: str) -> None:
    asker = terminal(answer)
    plan = PlanReview(asker.path).plan(proposal)
    assert np.array_equal(plan.ranks, proposal.plan.ranks)
    assert np.array_equal(plan.clipped, proposal.plan.clipped)
    assert plan.cost == proposal.plan.cost
    assert asker.questions == [f"\nrankpilot: Step 40: edit {asker.path} and press Enter, or type yes or no: "]
    assert review_notes(proposal, plan) == {}


def test_the_plan_is_exactly_the_person_s(proposal: Proposal, terminal: Callable[..., Asker]) -> None:
    asker = terminal(lambda text: edited(text, {"layers.1.m0": 1, "layers.0.m1": 0}))
    plan = PlanReview(asker.path).plan(proposal)
    expected = proposal.plan.ranks.copy()
    expected[[4, 1]] = 1, 0
    assert np.array_equal(plan.ranks, expected), "what is left of the budget is not spent"
    assert plan.cost == plan_cost(proposal.problem.cost, expected)
    assert plan.clipped[[4, 1]].tolist() == [1, 0]
    was = proposal.plan.ranks
    assert review_notes(proposal, plan) == {
        name: f"changed in review: {was[index]} -> {expected[index]}"
        for index, name in ((1, "layers.0.m1"), (4, "layers.1.m0"))
        if was[index] != expected[index]
    }
    assert yaml.safe_load(asker.path.read_text())["approved"] is True


def test_what_cannot_be_used_is_asked_for_again(proposal: Proposal, terminal: Callable[..., Asker]) -> None:
    asker = terminal(
        "perhaps",
        lambda text: edited(text, {"layers.0.m1": 5}),
        lambda text: edited(text, dict.fromkeys(proposal.names, 32)),
        lambda text: edited(text, dict.fromkeys(proposal.names, 1)),
    )
    plan = PlanReview(asker.path).plan(proposal)
    assert plan.ranks.tolist() == [1] * 8
    told = asker.questions[1:]
    assert "Answer yes or no; got 'perhaps'." in told[0]
    assert f"{asker.path} cannot be used. The rank of 'layers.0.m1' is 5. Allowed: 0, 1," in told[1]
    assert "above the budget of" in told[2]


def test_a_no_ends_the_run(proposal: Proposal, terminal: Callable[..., Asker]) -> None:
    for answer in ("no", lambda text: edited(text, approved=False)):
        asker = terminal(answer)
        with pytest.raises(ReviewError, match=r"^The plan of step 40 was refused in review, so the run ends there\.$"):
            PlanReview(asker.path).plan(proposal)


# A person elsewhere ---------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, closed=False))
    monkeypatch.setattr(review_module, "POLL_S", 0.01)


class Editor:
    """Another thread that changes the file: each edit follows what the run has told."""

    def __init__(self, path: Path, caplog: pytest.LogCaptureFixture, *edits: Callable[[str], str]) -> None:
        self.path, self.caplog, self.edits = path, caplog, edits
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(10)

    def _work(self) -> None:
        for count, edit in enumerate(self.edits, start=1):
            while sum("review" in m or "cannot be used" in m for m in self.caplog.messages) < count:
                time.sleep(0.005)
            self.path.write_text(edit(self.path.read_text()))


@pytest.mark.usefixtures("elsewhere")
def test_without_a_terminal_the_file_is_the_answer(
    proposal: Proposal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, original = tmp_path / "deep" / "plan.yaml", proposal.text()
    edits = (
        lambda text: text.replace("approved:\n", "approved: [true\n"),
        lambda text: edited(original, {"layers.0.m9": 1}, approved=True),
        lambda text: edited(original, dict.fromkeys(proposal.names, 32), approved=True),
        lambda text: edited(original, {"layers.1.m0": 1}, approved=True),
    )
    with caplog.at_level(logging.WARNING), Editor(path, caplog, *edits):
        plan = PlanReview(path, 20).plan(proposal)
    expected = proposal.plan.ranks.copy()
    expected[4] = 1
    assert np.array_equal(plan.ranks, expected)
    assert caplog.messages[0].startswith(f"Step 40 waits for a review: edit the ranks in {path} if you like, then set")
    assert [m for m in caplog.messages[1:] if "read again after its next change" not in m] == []
    for message, part in zip(
        caplog.messages[1:], ("no YAML", "Unknown target module", "above the budget"), strict=True
    ):
        assert part in message


@pytest.mark.usefixtures("elsewhere")
def test_a_false_in_the_file_ends_the_run(proposal: Proposal, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plan.yaml"
    editor = Editor(path, caplog, lambda text: edited(text, approved=False))
    with caplog.at_level(logging.WARNING), editor, pytest.raises(ReviewError, match="was refused in review"):
        PlanReview(path, 20).plan(proposal)


@pytest.mark.usefixtures("elsewhere")
def test_no_answer_in_time(proposal: Proposal, tmp_path: Path) -> None:
    with pytest.raises(ReviewError, match=r"Nobody approved the plan of step 40 in .*plan.yaml within 0.05 s"):
        PlanReview(tmp_path / "plan.yaml", 0.05).plan(proposal)
    assert parse((tmp_path / "plan.yaml").read_text())["approved"] is None


def test_a_terminal_that_is_gone_leaves_the_file(
    proposal: Proposal, terminal: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(review_module, "POLL_S", 0.01)
    asker = terminal("EOF")
    with caplog.at_level(logging.WARNING), Editor(asker.path, caplog, lambda text: edited(text, approved=True)):
        plan = PlanReview(asker.path, 20).plan(proposal)
    assert np.array_equal(plan.ranks, proposal.plan.ranks)


def test_only_a_resumed_run_takes_an_approved_plan_of_the_same_proposal(
    proposal: Proposal, terminal: Callable[..., Asker]
) -> None:
    asker = terminal(lambda text: edited(text, {"layers.1.m0": 1}), "", "")
    review = PlanReview(asker.path)
    first = review.plan(proposal)
    review.resumed = True
    assert np.array_equal(review.plan(proposal).ranks, first.ranks)
    assert len(asker.questions) == 1
    review.plan(replace(proposal, number=2, step=41))
    assert len(asker.questions) == 2
    review.resumed = False
    review.plan(replace(proposal, number=2, step=41))
    assert len(asker.questions) == 3


# Whole runs -----------------------------------------------------------------------------------------------------------


class Ranks(TrainerCallback):
    def __init__(self) -> None:
        self.after: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.after.append(adapter_ranks(find_target_modules(objects["model"])))


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig) -> Callable[..., Any]:
    def start(resume: str | None = None, **options: Any) -> Any:
        set_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        callback, ranks = RankPilotCallback("signal-mean", "80%", schedule=SCHEDULE, **options), Ranks()
        model = get_peft_model(LlamaForCausalLM(llama_config), lora)
        Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback, ranks]).train(resume)
        return SimpleNamespace(callback=callback, ranks=ranks.after)

    return start


def halved(text: str) -> str:
    """The rank of the first module that has rank 4 or more, halved."""
    modules = yaml.safe_load(text)["modules"]
    name = next(name for name, entry in modules.items() if entry["rank"] in (4, 8, 16, 32))
    return edited(text, {name: modules[name]["rank"] // 2})


def test_a_run_whose_plans_are_reviewed(
    tmp_path: Path, launch: Callable[..., Any], terminal: Callable[..., Asker]
) -> None:
    asker = terminal(halved, halved)
    run = launch(review=asker.path)
    log = DecisionLog(tmp_path / "run" / "decisions")
    table, modules = log.to_pandas(), len(run.callback.controller.names)
    assert len(asker.questions) == len(log) == 2
    for number, step in enumerate((0, SECOND)):
        rows = table.iloc[number * modules : (number + 1) * modules].to_dict("records")
        problem = log.logged(number).problem
        proposed = project(problem, *(np.array([row[name] for row in rows]) for name in ("rank_wanted", "score")))
        changed = [row for row, rank in zip(rows, proposed.ranks.tolist(), strict=True) if row["rank_after"] != rank]
        assert len(changed) == 1
        assert changed[0]["note"] == f"changed in review: {2 * changed[0]['rank_after']} -> {changed[0]['rank_after']}"
        assert not changed[0]["changed_by_projection"]
        assert log.logged(number).notes == {changed[0]["module"]: changed[0]["note"]}
        assert rows[0]["predicted_cost"] == plan_cost(problem.cost, np.array([row["rank_after"] for row in rows]))
        assert rows[0]["predicted_cost"] < proposed.cost
        assert run.ranks[step] == {row["module"]: row["rank_after"] for row in rows}
    assert run.callback.controller.finished


def test_a_refused_plan_ends_a_run(launch: Callable[..., Any], terminal: Callable[..., Asker]) -> None:
    asker = terminal("yes", "no")
    with pytest.raises(ReviewError, match=f"The plan of step {SECOND} was refused"):
        launch(review=asker.path)


def test_a_resumed_run_does_not_ask_twice(
    tmp_path: Path, launch: Callable[..., Any], terminal: Callable[..., Asker]
) -> None:
    asker = terminal("", halved)
    whole = launch(review=asker.path)
    for checkpoint in (SECOND, SECOND - 2):  # the later one first: runs that go on from it leave the other as it is
        resumed = launch(str(tmp_path / "run" / f"checkpoint-{checkpoint}"), review=asker.path)
        assert len(asker.questions) == 2
        assert resumed.ranks == whole.ranks[checkpoint:]


def test_a_plan_of_a_person_has_to_fit(launch: Callable[..., Any], terminal: Callable[..., Asker]) -> None:
    terminal("", "")
    controller = launch().callback.controller
    controller.limit = 1000.0
    with pytest.raises(BudgetError, match="This plan does not fit the budget: it takes"):
        controller.set_plan(controller.ranks, STEPS)
