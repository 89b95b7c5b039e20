"""Run folders: one run each, one process at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from rankpilot.common.errors import ConfigError, RunFolderError
from rankpilot.common.files import CONFIG, LOCK, as_json, open_run, read_json, write_json
from rankpilot.finetune.options import FinetuneConfig

SETTINGS = {"steps": 3}

OTHER_PROCESS = """
import sys
from pathlib import Path
from rankpilot.common.files import open_run
with open_run(Path(sys.argv[1]), {"steps": 3}, resume=True):
    print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the folder open until its standard input ends."""
    command = [sys.executable, "-c", OTHER_PROCESS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_folder(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    with open_run(folder, SETTINGS, resume=False):
        assert read_json(folder / CONFIG) == SETTINGS
    with open_run(folder, SETTINGS, resume=True):
        pass
    again = open_run(folder, SETTINGS, resume=False)
    with pytest.raises(RunFolderError, match=r"already exists\. Pass --resume"), again:
        pass


def test_a_second_process_is_refused_at_once_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with other_process(folder) as process:
        for resume, message in ((True, f"Another process is using {folder}"), (False, "already exists")):
            with pytest.raises(RunFolderError, match=message), open_run(folder, SETTINGS, resume=resume):
                pass
        process.kill()
        process.wait()
        with open_run(folder, SETTINGS, resume=True), pytest.raises(Timeout):
            FileLock(folder / LOCK, timeout=0).acquire()


def test_a_run_that_fails_frees_its_folder(tmp_path: Path) -> None:
    """A folder that holds only a lock is new."""
    (tmp_path / LOCK).touch()
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, SETTINGS, resume=False):
        _ = 1 / 0
    with pytest.raises(ConfigError), open_run(tmp_path, SETTINGS, resume=True):
        raise ConfigError("There is no such plan.")
    with open_run(tmp_path, SETTINGS, resume=False):
        assert read_json(tmp_path / CONFIG) == SETTINGS


def test_foreign_folders_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume, message in ((False, "already exists"), (True, "is not a run of rankpilot")):
        with pytest.raises(RunFolderError, match=message), open_run(tmp_path, SETTINGS, resume=resume):
            pass
    with pytest.raises(RunFolderError, match="is a file"), open_run(tmp_path / "notes.txt", SETTINGS, resume=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_settings(tmp_path: Path) -> None:
    write_json(tmp_path / CONFIG, {"steps": 4, "seed": 1})
    message = r"started with other settings \(seed: 1 then, None now; steps: 4 then, 3 now\)"
    with pytest.raises(RunFolderError, match=message), open_run(tmp_path, SETTINGS, resume=True):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"tseps": 3}', "other settings .*accumulation: None then, 0 now"),
        ("{", "cannot continue .*Expecting"),
        ("3", "cannot continue .*must be a mapping of names"),
    ],
)
def test_a_file_that_no_version_wrote(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / CONFIG).write_text(content)
    config = as_json(FinetuneConfig, FinetuneConfig("m", "d"))
    with pytest.raises(RunFolderError, match=words):  # noqa: SIM117
        with open_run(tmp_path, config, resume=True):
            pass
