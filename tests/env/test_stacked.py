"""Many episodes at once: the same as one PEFT model for each, the same whatever runs beside them, and vector APIs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from rankpilot.decide.observation import Observation
from rankpilot.decide.policy import Decision
from rankpilot.decide.rules import find_rule
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env import bases as adapted
from rankpilot.env import stacked
from rankpilot.env import stacked as stack_trainer
from rankpilot.env.bases import load_base_model
from rankpilot.env.episode import Comparison, Episode, EpisodeRecord, reference_of, rule_losses
from rankpilot.env.proxy_finetune import ProxyFineTune, known_of, load_task
from rankpilot.env.proxy_task import FRESH_SEEDS, ProxyTask, Reference
from rankpilot.env.rank_allocation import TOP, RankAllocationEnv
from rankpilot.env.stacked import StackedEpisodes
from rankpilot.env.vector import StackedVectorEnv
from rankpilot.errors import BudgetError, ConfigError, UnknownNameError
from rankpilot.plan.problem import AllocationProblem

from ..cases import first_cases
from .short_tasks import make_task as make_task
from .short_tasks import schedule as schedule

MakeTask = Callable[..., ProxyTask]
Rollout = Callable[..., list[tuple[Any, ...]]]
BASE = "llama-4x32"
LONG = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.2, 0.4, 0.6), max_step=10)


def random_decision(slot: int, turn: int, problem: AllocationProblem) -> Decision:
    generator, count = np.random.default_rng([slot, turn]), len(problem.ranks)
    return Decision(
        problem.ladder.step(problem.ranks, generator.integers(-10, 11, count)), generator.normal(size=count)
    )


@dataclass
class Story:
    """What one episode went through."""

    observations: list[Any] = field(default_factory=list)
    ranks: list[Any] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    held_out: float | None = None
    reference: Reference | None = None
    reward: float | None = None


def run_stacked(
    tasks: Sequence[ProxyTask], schedule: DecisionSchedule, ids: Sequence[int] | None = None, slots: int | None = None
) -> list[Story]:
    """All tasks at once in a stack; an id decides an episode's actions."""
    ids = ids or range(len(tasks))
    known_of.cache_clear()
    episodes = StackedEpisodes(tasks[0].base, schedule, slots or len(tasks))
    episodes.measure_references(dict(enumerate(tasks)))
    episodes.start_all(tasks)
    stories, records = [], []
    for slot, task in enumerate(tasks):
        reference, episode = episodes.reference(task), episodes.under_way[slot]
        stories.append(Story(reference=reference))
        records.append(EpisodeRecord(task.id, reference, episode.applier, episode.observation))
    active = list(range(len(tasks)))
    for turn in range(len(schedule.fractions)):
        seen = {slot: episodes.under_way[slot].observation for slot in active}
        episodes.step({slot: random_decision(ids[slot], turn, each.problem) for slot, each in seen.items()})
        ended = [slot for slot in active if episodes.under_way[slot].ended]
        held_out = episodes.held_out_losses([slot for slot in ended if not episodes.under_way[slot].failed])
        for slot in active:
            episode, story = episodes.under_way[slot], stories[slot]
            story.observations.append(seen[slot])
            story.ranks.append(episode.ranks)
            story.losses.append(episode.loss)
            story.held_out = held_out.get(slot)
            records[slot].advance(episode.step, episode.loss, episode.observation)
            if slot in ended:
                story.reward = records[slot].end(story.held_out, Comparison.with_uniform(records[slot].reference))
        active = [slot for slot in active if slot not in ended]
    assert not active
    return stories


def run_alone(task: ProxyTask, schedule: DecisionSchedule, identity: int) -> Story:
    """One task on a PEFT model."""
    episode, story = Episode(ProxyFineTune(task), schedule), Story()
    loss: float | None = None
    for turn in range(len(schedule.fractions)):
        seen = episode.observe(loss)
        story.observations.append(seen)
        plan = episode.apply(random_decision(identity, turn, seen.problem))
        story.ranks.append(plan.ranks)
        loss = episode.advance()
        story.losses.append(loss)
    story.held_out = episode.held_out_loss()
    story.reference = reference_of(ProxyFineTune(task), schedule)
    return story


def mixed_tasks(base: str) -> list[ProxyTask]:
    sizes: dict[str, Any] = {"base": base, "steps": 15, "length": 16}
    return [
        ProxyTask("planted", 1, corpus="documentation", budget=0.9, eval_rows=16, **sizes),
        ProxyTask("shift", 2, corpus="code", budget=0.7, eval_rows=24, learning_rate=8e-3, **sizes),
        ProxyTask("classify", 3, corpus="sentiment", budget=1.3, eval_rows=16, learning_rate=2e-3, **sizes),
        ProxyTask("shift", 4, corpus="documentation", budget=0.25, unit="parameters", eval_rows=16, **sizes),
    ]


@pytest.fixture
def _fp64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bases in fp64: in fp32, training makes 1 % of a signal out of rounding."""

    def load(name: str) -> Any:
        return load_base_model(name).double()

    caches = (adapted.adapted_base, adapted.proxy_cost, adapted.proxy_memory, load_task, known_of)
    for module in (adapted, stack_trainer):
        monkeypatch.setattr(module, "load_base_model", load)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("_fp64")
@pytest.mark.parametrize("base", first_cases(1, ["gpt2-4x32", "llama-4x32", "bert-4x64"]))
def test_stacked_episodes_are_those_of_peft_models(base: str) -> None:
    tasks = mixed_tasks(base)
    stories = run_stacked(tasks, LONG)
    assert any((ranks == 0).any() and ranks.any() for story in stories for ranks in story.ranks)
    assert len({tuple(ranks) for story in stories for ranks in story.ranks}) == 16
    for identity, (task, story) in enumerate(zip(tasks, stories, strict=True)):
        alone = run_alone(task, LONG, identity)
        assert [ranks.tolist() for ranks in story.ranks] == [ranks.tolist() for ranks in alone.ranks]
        assert story.losses == pytest.approx(alone.losses, abs=1e-9)
        assert story.held_out == pytest.approx(alone.held_out, abs=1e-9)
        assert story.reference is not None
        assert alone.reference is not None
        assert story.reference.initial == pytest.approx(alone.reference.initial, abs=1e-9)
        assert story.reference.uniform == pytest.approx(alone.reference.uniform, abs=1e-9)
        for one, two in zip(story.observations, alone.observations, strict=True):
            np.testing.assert_allclose(one.modules, two.modules, rtol=0, atol=1e-6)
            np.testing.assert_allclose(one.run, two.run, rtol=0, atol=1e-6)
            assert one.names == two.names
            assert one.problem.limit == two.problem.limit


def assert_equal_stories(one: Story, two: Story) -> None:
    assert one.losses == two.losses
    assert one.held_out == two.held_out
    assert one.reference == two.reference
    assert one.reward == two.reward
    for a, b in zip(one.observations, two.observations, strict=True):
        np.testing.assert_array_equal(a.modules, b.modules)
        np.testing.assert_array_equal(a.run, b.run)
    for a, b in zip(one.ranks, two.ranks, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("base", first_cases(1, ["llama-4x32", "bert-4x64"]))
def test_an_episode_does_not_notice_its_neighbours(make_task: MakeTask, schedule: DecisionSchedule, base: str) -> None:
    tasks = [
        make_task("shift", 1, base=base),
        make_task("planted", 2, base=base),
        make_task("classify", 3, base=base, corpus="sentiment"),
        make_task("shift", 4, base=base, steps=12),
        make_task("planted", 5, base=base, steps=6, eval_rows=8),
        make_task("shift", 6, base=base, learning_rate=1e30),
        make_task("shift", 1, base=base),
        make_task("shift", 8, base=base, unit="parameters", budget=0.25),
    ]
    together = run_stacked(tasks, schedule)
    assert together[5].losses[-1] is None, "one fails, so its slot stops early"
    assert together[5].reward == -3.0
    for index in (0, 1, 2, 3, 5):
        assert_equal_stories(run_stacked([tasks[index]], schedule, ids=[index])[0], together[index])
    wide = run_stacked(tasks[1:4], schedule, ids=[1, 2, 3], slots=8)
    for index, story in enumerate(wide, start=1):
        assert_equal_stories(story, together[index])


# The vector environment of Gymnasium ----------------------------------------------------------------------------------


def make_vector(num_envs: int, **settings: Any) -> StackedVectorEnv:
    envs = gym.make_vec(
        rankpilot.ENV_ID, num_envs=num_envs, vectorization_mode="vector_entry_point", base=BASE, **settings
    )
    assert isinstance(envs, StackedVectorEnv)
    return envs


def test_vectors_refuse_what_they_cannot_do(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    envs = make_vector(2, task=make_task(), schedule=schedule)
    actions = np.zeros(envs.action_space.shape, dtype=np.int64)
    with pytest.raises(ConfigError, match=r"No episode is under way.*call reset"):
        envs.step(actions)
    first, again = (envs.reset(seed=seed)[0] for seed in (3, np.int64(3)))
    np.testing.assert_array_equal(first["module_features"], again["module_features"])
    with pytest.raises(ConfigError, match=r"a whole number, or one for each environment; got 1\.5"):
        envs.reset(seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="The smallest that works is"):
        envs.reset(options={"budget": 1e-9})
    with pytest.raises(ConfigError, match="call reset"):
        envs.step(actions)
    with pytest.raises(ConfigError, match="make an environment of dict alone"):
        make_vector(2, task={"base": BASE})
    with pytest.raises(UnknownNameError, match=r"argument of stacked environments 'bases'\. Did you mean: 'base'"):
        make_vector(1, bases=("llama-4x32",))


@pytest.fixture
def pool(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> tuple[ProxyTask, ...]:
    """A few tiny tasks in place of the suites; their numbers of steps differ."""
    from rankpilot.env import proxy_task as suites

    reference = Reference(3.0, 2.5, 0.5)
    tasks = tuple(
        make_task("shift", 70 + index, steps=(6, 8, 10)[index % 3], budget=0.6 + 0.02 * index, reference=reference)
        for index in range(9)
    )
    monkeypatch.setattr(suites, "load_suite", lambda name, split: tasks if name == "shift" else ())
    return tasks


def test_the_vector_is_single_environments_side_by_side(
    make_task: MakeTask, schedule: DecisionSchedule, info_keys: set[str]
) -> None:
    task = make_task("planted", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own deprecations
        envs = make_vector(3, task=task, schedule=schedule)
    single = RankAllocationEnv(task=task, schedule=schedule)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.single_observation_space == single.observation_space
    assert envs.single_action_space == single.action_space
    assert envs.action_space.shape == (3, 28)
    actions = np.random.default_rng(0).integers(0, 2 * TOP + 1, size=(4, 3, 28))
    observations, infos = envs.reset(seed=0)
    start = observations
    assert envs.observation_space.contains(observations)
    assert info_keys <= set(infos)
    expected = []
    for copy in range(3):
        single.reset(seed=copy)
        expected.append([single.step(action) for action in actions[:, copy]])
    for turn, action in enumerate(actions):
        observations, rewards, terminated, truncated, infos = envs.step(action)
        assert envs.observation_space.contains(observations)
        assert (rewards.shape, rewards.dtype) == ((3,), np.float64)
        assert terminated.dtype == truncated.dtype == np.bool_
        assert terminated.tolist() == [turn == 3] * 3
        assert not truncated.any()
        np.testing.assert_allclose(rewards, [each[turn][1] for each in expected], rtol=0, atol=1e-4)
        final = infos["final_info"] if turn == 3 else infos
        assert info_keys <= set(final)
        assert ("final_obs" in infos) == ("final_info" in infos) == (turn == 3)
        for copy in range(3):
            wanted_observation, _, _, _, wanted = expected[copy][turn]
            seen = infos["final_obs"][copy] if turn == 3 else {key: part[copy] for key, part in observations.items()}
            for key, value in wanted_observation.items():
                np.testing.assert_allclose(seen[key], value, rtol=0, atol=1e-3)
            for key in ("task", "step", "cost", "limit", "ranks", "non_finite", "churn"):
                assert final[key][copy] == wanted[key], key
            assert final["loss"][copy] == pytest.approx(wanted["loss"], abs=1e-4)
            paid = final["improvement"][copy] - final["churn"][copy] if turn == 3 else 0.0
            assert rewards[copy] == pytest.approx(paid)
    assert final["held_out_loss"][0] == pytest.approx(expected[0][3][4]["held_out_loss"], abs=1e-4)
    for key, value in start.items():
        np.testing.assert_array_equal(observations[key], value)
    assert infos["step"].tolist() == [0, 0, 0]


def run_vector(envs: StackedVectorEnv, turns: int, seed: int | list[int]) -> list[tuple[Any, ...]]:
    envs.action_space.seed(0)
    rows: list[tuple[Any, ...]] = [envs.reset(seed=seed)]  # type: ignore[arg-type]
    rows += [envs.step(envs.action_space.sample()) for _ in range(turns)]
    return rows


def assert_equal_parts(one: Any, two: Any) -> None:
    """Equal bit for bit, however dicts, tuples and arrays of objects are nested."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        one, two = list(one.values()), [two[key] for key in one]
    if isinstance(one, np.ndarray) and one.dtype == object:
        one, two = one.tolist(), two.tolist()
    if isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal_parts(a, b)
    else:
        np.testing.assert_array_equal(one, two)


def test_the_same_seed_gives_the_same_steps(pool: tuple[ProxyTask, ...], schedule: DecisionSchedule) -> None:
    one, two = (make_vector(3, schedule=schedule) for _ in range(2))
    first = run_vector(one, 5, 5)
    assert_equal_parts(run_vector(two, 5, 5), first)
    assert_equal_parts(run_vector(one, 5, 5), first)  # with probes and references remembered
    assert_equal_parts(run_vector(one, 5, [5, 6, 7]), first)
    other = run_vector(one, 1, 6)
    assert other[0][1]["task"].tolist() != first[0][1]["task"].tolist()
    assert len({name for row in first for name in row[-1]["task"]}) > 3


def test_slots_that_end_apart_are_reset_alone(pool: tuple[ProxyTask, ...], schedule: DecisionSchedule) -> None:
    """Each slot goes through the tasks and the very numbers that it would meet in a vector of one."""
    schedule = replace(schedule, fractions=(0.0, 0.3, 0.6))
    actions = np.random.default_rng(0).integers(0, 2 * TOP + 1, size=(5, 4, 28))
    failing = replace(pool[0], learning_rate=1e30, seed=79)
    envs = make_vector(4, schedule=schedule)
    together: list[tuple[Any, ...]] = [envs.reset(seed=3)]
    envs.begin({1: failing})
    together += [envs.step(action) for action in actions]
    ends = [row[2].tolist() for row in together[1:]]
    assert any(any(row) and not all(row) for row in ends), "they do end apart"
    for slot in range(4):
        alone = make_vector(1, schedule=schedule)
        alone.reset(seed=3 + slot)
        if slot == 1:
            alone.begin({0: failing})
        for turn, action in enumerate(actions):
            observations, rewards, terminated, _, infos = alone.step(action[slot : slot + 1])
            wide = together[turn + 1]
            assert rewards[0] == wide[1][slot]
            assert terminated[0] == wide[2][slot]
            assert infos["task"][0] == wide[4]["task"][slot]
            np.testing.assert_equal(
                {key: part[0] for key, part in observations.items()}, {key: part[slot] for key, part in wide[0].items()}
            )
            if terminated[0]:
                assert wide[4]["_final_info"][slot]
                np.testing.assert_equal(infos["final_obs"][0], wide[4]["final_obs"][slot])
                for key in ("held_out_loss", "loss", "improvement"):
                    np.testing.assert_equal(_number(infos, key, 0), _number(wide[4], key, slot))


def _number(infos: Mapping[str, Any], key: str, slot: int) -> float:
    value = infos["final_info"][key][slot]
    return np.nan if value is None else float(value)


@pytest.mark.parametrize("against", ["uniform", "signal-mean"])
def test_groups_share_a_task_and_end_together(
    pool: tuple[ProxyTask, ...], schedule: DecisionSchedule, against: str
) -> None:
    envs = make_vector(4, schedule=schedule, episodes_per_task=2, against=against)
    _, infos = envs.reset(seed=1)
    names = infos["task"].tolist()
    assert names[0] == names[1] != names[2] == names[3]
    finals = 0
    for action in np.random.default_rng(0).integers(0, 2 * TOP + 1, size=(8, 4, 28)):
        _, rewards, terminated, _, infos = envs.step(action)
        assert infos["task"][0] == infos["task"][1]
        for first in (0, 2):
            pair = slice(first, first + 2)
            assert terminated[first] == terminated[first + 1]
            if not terminated[first]:
                assert rewards[pair].tolist() == [0.0, 0.0]
                continue
            finals += 1
            final = {key: value[pair] for key, value in infos["final_info"].items()}
            np.testing.assert_allclose(rewards[pair], final["improvement"] - final["churn"])
            assert final["improvement"][0] != final["improvement"][1]
            if against == "uniform":
                assert final["other_loss"].tolist() == final["uniform_loss"].tolist()
            else:
                assert final["other_loss"][0] == final["other_loss"][1]
                assert final["other_loss"][0] not in (*final["uniform_loss"], *final["held_out_loss"])
    assert finals > 2


def test_a_rule_beside_the_episodes_runs_as_it_would_alone(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    """And whoever acts as the rule gets nothing but the cost of its moves."""
    task = make_task("planted", 2, steps=12, reference=Reference(3.0, 2.0, 1.9))
    settings: dict[str, Any] = {"episodes_per_task": 2, "actions": "scores", "against": "signal-mean"}
    envs = make_vector(2, task=task, schedule=schedule, **settings)
    infos = envs.begin(dict.fromkeys(range(2), task))
    assert infos[0]["other_loss"] is None
    rule, generator = find_rule("signal-mean"), np.random.default_rng(0)
    for _ in range(4):
        scores = rule.decide(envs.records[0].observation).scores
        same = np.append(scores, [0.0, 0.0]).astype(np.float32)
        steps = envs.advance({0: same, 1: generator.normal(size=30).astype(np.float32)})
    alone, initial = rule_losses(ProxyFineTune(task), schedule, "signal-mean")
    assert steps[0].terminated
    assert steps[0].info["other_loss"] == steps[1].info["other_loss"] == pytest.approx(alone, abs=1e-4)
    assert steps[0].info["held_out_loss"] == pytest.approx(alone, abs=1e-4)
    assert steps[0].reward == pytest.approx(-steps[0].info["churn"], abs=1e-3)
    assert steps[0].info["churn"] > 0
    shares = 10 * (alone - steps[1].info["held_out_loss"]) / (initial - alone)  # the headroom is a tenth of a gain
    assert steps[1].info["improvement"] == pytest.approx(shares, abs=0.02)


def test_a_failed_episode_waits_for_its_group(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    """Its reward comes with that of the others; those of other groups do not wait."""
    task = make_task(reference=Reference(9.0, 6.0, 1.0))
    envs = make_vector(4, task=task, episodes_per_task=2, schedule=schedule)
    envs.begin(dict.fromkeys(range(2), task) | dict.fromkeys((2, 3), replace(task, learning_rate=1e30)))
    action = np.full(28, 11)
    steps = envs.advance(dict.fromkeys(range(4), action))
    assert [steps[slot].terminated for slot in range(4)] == [False, False, True, True]
    assert [steps[slot].reward for slot in range(4)] == [0.0, 0.0, -3.0, -3.0]
    envs.episodes.under_way[0].failed = True
    seen = envs.records[0].observation.modules
    waited = [envs.advance(dict.fromkeys(range(2), action)) for _ in range(3)]
    assert (
        [steps[0].terminated for steps in waited] == [steps[1].terminated for steps in waited] == [False, False, True]
    )
    assert waited[2][0].reward == -3.0
    assert waited[2][1].reward > -3.0
    assert waited[2][0].info["step"] == 2, "it has not trained any more"
    np.testing.assert_array_equal(envs.records[0].observation.modules, seen)


def test_groups_begin_whole_and_on_one_task(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    envs = make_vector(4, task=make_task(), episodes_per_task=2, schedule=schedule)
    for tasks in ({0: make_task()}, {2: make_task(), 3: make_task(seed=5)}):
        with pytest.raises(ConfigError, match="begin together, on one task"):
            envs.begin(tasks)


def test_fresh_seeds(pool: tuple[ProxyTask, ...], schedule: DecisionSchedule) -> None:
    one, two = (make_vector(4, schedule=schedule, fresh_seeds=True, episodes_per_task=2) for _ in range(2))
    infos = one.reset(seed=3)[1]
    seeds = [int(name.rpartition("/")[2]) for name in infos["task"]]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert min(seeds) >= FRESH_SEEDS
    assert infos["uniform_loss"][0] not in (2.5, infos["uniform_loss"][2]), "measured for each"
    assert two.reset(seed=3)[1]["task"].tolist() == infos["task"].tolist()
    assert one.reset()[1]["task"].tolist() != infos["task"].tolist()
    ruled, one, two = (make_vector(1, schedule=schedule, fresh_seeds=True, against="signal-mean") for _ in range(3))
    assert ruled.reset(seed=3)[1]["uniform_loss"].tolist() == [2.5], "a measure of headroom, as the task has it"
    assert one.reset()[1]["task"].tolist() != two.reset()[1]["task"].tolist(), "without a seed nothing repeats"


def test_probes_and_references_are_found_out_once_and_the_same_again(
    make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, trained = make_task(seed=6, steps=4), []
    train = stack_trainer.StackTrainer.train
    monkeypatch.setattr(
        stack_trainer.StackTrainer, "train", lambda self, lanes: trained.append(len(lanes)) or train(self, lanes)
    )
    known_of.cache_clear()
    first, second = (make_vector(1, task=task, schedule=schedule) for _ in range(2))
    first.begin({0: task})
    assert trained == [1, 1], "the uniform run and the probe"
    seen, reference = first.records[0].observation, first.episodes.reference(task)
    second.begin({0: task})
    assert trained == [1, 1]
    known_of.cache_clear()
    second.begin({0: task})
    assert trained == [1, 1, 1, 1]
    assert second.episodes.reference(task) == reference
    np.testing.assert_array_equal(second.records[0].observation.modules, seen.modules)


def test_a_start_that_fails_leaves_no_episode_under_way(
    make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = make_vector(2, task=make_task(reference=Reference(3.0, 2.5)), schedule=schedule, render_mode="ansi")
    envs.reset(seed=0)
    actions = np.full((2, 28), TOP)
    for _ in schedule.fractions[1:]:
        envs.step(actions)
    with monkeypatch.context() as patch:
        patch.setattr(envs, "begin", lambda tasks: next(iter(())))
        with pytest.raises(StopIteration):
            envs.step(actions)
    with pytest.raises(ConfigError, match="No episode is under way"):
        envs.step(actions)
    assert envs.render() is None
    envs.reset(seed=0)
    envs.step(actions)


def test_a_vector_survives_failed_runs(make_task: MakeTask, schedule: DecisionSchedule, info_keys: set[str]) -> None:
    """The probe and the uniform run fail as well."""
    envs = make_vector(2, task=make_task("planted", learning_rate=1e30), schedule=schedule, episodes_per_task=2)
    envs.reset(seed=0)
    for _ in range(2):
        observations, rewards, terminated, _, infos = envs.step(np.full((2, 28), 12))
        assert rewards.tolist() == [-3.0, -3.0]
        assert terminated.all()
        assert envs.observation_space.contains(observations)
        final = infos["final_info"]
        assert info_keys <= set(final)
        assert final["non_finite"].all()
        assert (final["improvement"] - final["churn"]).tolist() == [-3.0] * 2
        assert np.isfinite(infos["uniform_loss"]).all()


def test_options_of_a_vector(pool: tuple[ProxyTask, ...], make_task: MakeTask, schedule: DecisionSchedule) -> None:
    envs = make_vector(2, schedule=schedule)
    names = envs.reset(seed=2)[1]["task"].tolist()
    mine = make_task("planted", 77)
    assert envs.reset(seed=2, options={"task": mine})[1]["task"].tolist() == [mine.id] * 2
    assert envs.reset()[1]["task"].tolist() == names, "a given task draws none"
    limits = [envs.reset(options={"task": mine, "budget": share})[1]["limit"][0] for share in (0.4, 0.8)]
    assert limits[1] == pytest.approx(2 * limits[0])
    with pytest.raises(ConfigError, match="One seed for each of 2 environments is needed; got 3"):
        envs.reset(seed=[1, 2, 3])


def test_overrides_and_padding_of_a_vector(pool: tuple[ProxyTask, ...], schedule: DecisionSchedule) -> None:
    envs = make_vector(2, schedule=schedule, task_overrides={"steps": 5}, max_modules=30)
    observations, _ = envs.reset(seed=0)
    assert observations["mask"].tolist() == [[1] * 28 + [0] * 2] * 2
    assert envs.single_action_space.shape == (30,)
    assert {task.steps for task in envs.tasks} == {5}
    action = np.full((2, 30), TOP)
    action[:, 28:] = 2 * TOP
    assert envs.step(action)[4]["ranks"].tolist() == envs.step(np.full((2, 30), TOP))[4]["ranks"].tolist()


def test_texts_of_a_vector(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    envs = make_vector(2, task=make_task(), schedule=schedule, render_mode="ansi")
    assert envs.render() is None
    envs.reset(seed=0)
    texts = envs.render()
    assert texts is not None
    assert all(text.startswith(f"{make_task().id}\nstep 0 of 8") for text in texts)
    envs.step(np.stack([np.full(28, 12), np.full(28, 9)]))
    texts = envs.render()
    assert texts is not None
    assert texts[0] != texts[1]
    assert make_vector(1, task=make_task(), schedule=schedule).render() is None


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "actions",
    [
        *(np.full((2, 28), value) for value in (2 * TOP + 1, -1, TOP + 0.5, np.nan)),
        *(np.full(shape, TOP) for shape in ((2, 27), 28, (3, 28), (1, 28))),
    ],
)
def test_wrong_actions_of_a_vector(make_task: MakeTask, schedule: DecisionSchedule, actions: NDArray[Any]) -> None:
    envs = make_vector(2, task=make_task(reference=Reference(3.0, 2.0)), schedule=schedule)
    envs.reset(seed=0)
    with pytest.raises(ConfigError, match=f"28 whole numbers from 0 to {2 * TOP}|One action for each of 2"):
        envs.step(actions)
    assert envs.step(np.full((2, 28), TOP))[4]["step"].tolist() == [2, 2], "and the episodes go on"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 4, "episodes_per_task": 3}, "num_envs is at least 1 and a multiple of episodes_per_task; got 4"),
        ({"num_envs": 0}, "num_envs is at least 1"),
        ({"num_envs": 2, "episodes_per_task": 0}, "multiple of episodes_per_task"),
        ({"num_envs": 1, "base": "llama-4x64"}, "The task is on base llama-4x32, not llama-4x64. Give base="),
        ({"num_envs": 1, "max_modules": 27}, "max_modules is at least 28 for llama-4x32; got 27"),
        ({"max_modules": 100.5}, "max_modules is a whole number of at least 1, or None; got 100.5"),
        ({"episodes_per_task": "1"}, "a multiple of episodes_per_task; got 1 and '1'"),
        ({"against": None}, "or the name of a rule; got None"),
        ({"against": "signal-men"}, "comparison 'signal-men'. Did you mean: 'signal-mean'"),
        ({"render_mode": "human"}, "render mode 'human'"),
        ({"base": "llama", "task": None}, "proxy base 'llama'"),
        ({"suites": ("plantd",), "task": None}, "suite 'plantd'"),
        ({"split": "dev", "task": None}, "split 'dev'"),
        ({"actions": "score"}, "form of actions 'score'. Did you mean: 'scores'"),
    ],
)
def test_wrong_settings_of_a_stack(make_task: MakeTask, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message.replace(".", r"\.")):
        StackedVectorEnv(**{"num_envs": 1, "base": BASE, "task": make_task(), **settings})


def test_batches_of_different_shapes_cannot_be_stacked(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    episodes = StackedEpisodes(BASE, schedule, 2)
    for other in (make_task(batch_size=2), make_task(length=24), make_task(base="gpt2-4x32")):
        with pytest.raises(ConfigError, match="Stacked episodes share one base and one batch shape"):
            episodes.start({0: make_task(), 1: other})
    episodes.start({0: make_task(), 1: make_task("planted")})


# All episodes to their end --------------------------------------------------------------------------------------------

ROLLOUT = DecisionSchedule(probe_steps=2, fractions=(0.0, 0.3, 0.6))


def test_all_begin_and_end_together_as_if_alone(make_task: MakeTask) -> None:
    """Beside one that fails, and sits out the rest."""
    reference = Reference(3.0, 2.5, 2.4)
    tasks = [make_task(kind, seed, steps=8, reference=reference) for seed, kind in enumerate(("shift", "planted"))]
    tasks.append(replace(tasks[0], learning_rate=1e30, seed=9))
    engine = StackedEpisodes(BASE, ROLLOUT, 4)

    def play(tasks: Sequence[ProxyTask]) -> tuple[list[float], list[list[Any]], list[list[int]]]:
        """Losses, the ranks that were seen at each decision, and which episodes went on."""
        ranks: list[list[Any]] = []
        going: list[list[int]] = []

        def decide(seen: list[Observation]) -> list[Decision]:
            turn = len(ranks)
            ranks.append([observation.problem.ranks for observation in seen])
            return [random_decision(task.seed, turn, each.problem) for task, each in zip(tasks, seen, strict=True)]

        engine.start_all(tasks)
        return engine.run_to_the_end(decide, lambda seen, active: going.append(active)), ranks, going

    losses, ranks, going = play(tasks)
    assert going == [[0, 1, 2], [0, 1], [0, 1]]
    assert [np.isfinite(loss) for loss in losses] == [True, True, False]
    assert (ranks[1][2] == ranks[2][2]).all(), "what is seen of it stays as it was"
    assert (ranks[1][0] != ranks[2][0]).any()
    assert all(episode.ended for episode in engine.under_way.values())
    assert [play([task])[0][0] for task in tasks[:2]] == losses[:2]
    assert list(engine.under_way) == [0], "the others are forgotten"
    assert play([tasks[2], tasks[2]])[2] == [[0, 1]], "a round of failures ends"


def test_machines_that_round_alike_have_one_digest() -> None:
    assert stacked.rounding_digest() == stacked.rounding_digest()
