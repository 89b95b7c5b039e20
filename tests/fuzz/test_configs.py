"""Configuration files of commands, in JSON and YAML, and the settings in them; files of plans."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from rankpilot.agents.rules import PlanFile, read_plan
from rankpilot.cli.options import read_config_file, with_file_settings
from rankpilot.common.files import as_json
from rankpilot.errors import ConfigError
from rankpilot.finetune.options import FinetuneConfig, rank_bounds_of
from rankpilot.finetune.trainer import new_arguments
from rankpilot.training.config import TrainConfig

from .damage import NAMES, damaged, damaged_json, edited
from .running import fuzz

YAML_PARTS = [
    *"-:?[]{},&*#|>!%@`'\" \n",
    "- ", ": ", "\n  ", "a", "model: x", "&a", "*a", "<<: *a", "!!int ''", "!!float", "!!bool x",
    "!!timestamp x",
    "!!binary x", "!!set", "!!omap", "!!python/object/apply:os.system [ls]", "2001-13-45", "1:99:99",
    "0o9", "0x", "1_000", "...", "---", "%YAML 9.9", "\t", "\x00", "\ud83d", "[" * 60, "{" * 60, "null", "steps: 5",
]  # fmt: skip


@cache
def settings_of(kind: str) -> dict[str, Any]:
    """Settings as a run writes them."""
    if kind == "train":
        return as_json(TrainConfig, TrainConfig())
    config = FinetuneConfig(model="m", data="d", bounds=("q_proj=0:16",), trainer=("warmup_steps=0.1",))
    return as_json(FinetuneConfig, config)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """The kind of a command, and the name and content of its configuration file."""
    kind = draw(st.sampled_from(["train", "finetune"]))
    values = settings_of(kind)
    form = draw(st.sampled_from(["json", "json", "yaml", "parts"]))
    if form == "json":
        return kind, "config.json", draw(damaged_json(values))
    if form == "parts":
        return (
            kind,
            "c.yaml",
            "".join(draw(st.lists(st.sampled_from(YAML_PARTS), max_size=25))).encode("utf-8", "replace"),
        )
    text = yaml.safe_dump(json.loads(json.dumps(draw(edited(values)))), allow_unicode=True)
    return kind, "c.yml", draw(damaged(text.encode("utf-8", "replace")))


@fuzz(files(), examples=200)
def test_config_files(given: tuple[str, str, bytes]) -> None:
    kind, name, content = given
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        base = TrainConfig() if kind == "train" else FinetuneConfig(model="m", data="d")
        settings = with_file_settings(base, read_config_file(str(path)), str(path))
        assert type(settings) is type(base)
        if isinstance(settings, FinetuneConfig):
            rank_bounds_of(settings.bounds)


@fuzz(st.lists(st.sampled_from(YAML_PARTS), max_size=25).map("".join), examples=200)
def test_files_of_plans(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        path.write_text(text, encoding="utf-8", errors="replace")
        assert PlanFile(path).schedule.fractions[0] == 0


@fuzz(
    st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from(["optim", "warmup_steps", "lr_scheduler_type", "fsdp", "x"]),
            st.sampled_from(["1", "null", "[]", "{}", "1e999", "[" * 9999, *NAMES]),
        ),
        max_size=3,
    ),
    examples=40,
)
def test_settings_of_the_trainer(given: list[str]) -> None:
    config = FinetuneConfig(model="m", data="d", trainer=tuple(given))
    with tempfile.TemporaryDirectory() as folder:
        new_arguments(config, "classification", Path(folder))


# What was found -------------------------------------------------------------------------------------------------------


def test_references_in_yaml_cannot_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"references .* are not read; write values out"):
        read_config_file(str(path))


@pytest.mark.parametrize("text", ["!!int ''", "!!float ''", "!!timestamp x", "a: 2001-13-45", "!!bool x", "[" * 3000])
def test_values_at_which_the_yaml_library_falls_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="Cannot read the config file"):
        read_config_file(str(path))
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_plan(path)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path, trap = tmp_path / "config.yaml", tmp_path / "ran"
    path.write_text(f"a: !!python/object/apply:os.system ['touch {trap}']")
    with pytest.raises(ConfigError, match="Cannot read the config file"):
        read_config_file(str(path))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_a_config_file_that_is_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.truncate(2**31)  # sparse: it takes no room
    with pytest.raises(ConfigError, match=r"has more than [0-9,]+ bytes"):
        read_config_file(str(path))


def test_a_config_file_nested_deeply(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_config_file(str(path))


def test_an_error_shows_a_part_of_long_values(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"steps": "x" * 10**6}))
    with pytest.raises(ConfigError) as caught:
        with_file_settings(FinetuneConfig(model="m", data="d"), read_config_file(str(path)), str(path))
    assert len(str(caught.value)) < 500
