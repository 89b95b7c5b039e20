"""Writes a data set of allocation decisions: a folder that is complete or absent.

    trials-00000.parquet ...   the rows, see `COLUMNS`
    actor-0/                   of each training: the actor that its plan runs were made with
    more-plan-runs-0.safetensors
                               of a training that also learned from plan runs of real fine-tunes: these
    dataset.json               sizes, sha256 of all files, and where the rows come from
    README.md                  the data card

Until all is there, files are in a hidden folder beside it, from which the same call goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...common.files import atomic_path, sha256, write_json, write_text
from ...common.run_folder import CONFIG, LOCK, open_run
from ...errors import ConfigError, RunFolderError
from .card import data_card
from .columns import COLUMNS, FORMAT, SCHEMA
from .read import CARD, FACTS, TrialsDataset, open_dataset
from .rows import table_of
from .sources import Source, open_source

LEVEL = 15
"""Of zstd. Files are a tenth smaller than at the usual 1, and without dictionaries a quarter smaller than with them."""


def write_dataset(
    sources: Sequence[Path], folder: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> TrialsDataset:
    """Write a data set.

    Args:
        sources: folders of trainings and of comparisons with logs, see `open_source`.
        folder: of the data set; there must be none yet.
        on_progress: called with (files of rows done, files in all).

    Returns:
        The data set, read back and checked.

    Raises:
        ConfigError: no source, or one twice.
        RunFolderError: the folder exists, a source gives no rows, or sources have changed since an interruption.
    """
    if not sources or len({path.resolve() for path in sources}) < len(sources):
        raise ConfigError(
            f"A data set is made from one folder or several different ones; got {list(map(str, sources))}."
        )
    if folder.exists():
        raise RunFolderError(f"{folder} exists already. Pass another --output.")
    opened = [open_source(path, origin) for origin, path in enumerate(sources)]
    work = folder.with_name(f".{folder.name}.unfinished")
    settings = {"schema": SCHEMA, "sources": [str(path.resolve()) for path in sources], "files": _listing(opened)}
    with open_run(work, settings, resume=True):
        tables = _write_rows(opened, work, on_progress or (lambda done, total: None))
        facts = _facts(opened, work, tables)
        write_text(work / CARD, data_card(facts, pa.concat_tables(table.select(_OF_CARD) for table in tables)))
        write_json(work / FACTS, facts)
        with atomic_path(folder) as temporary:
            shutil.copytree(work, temporary, ignore=shutil.ignore_patterns(CONFIG, LOCK, ".*"))
    shutil.rmtree(work)
    return open_dataset(folder)


_FILES = ("trials-*.parquet", "actor-*/*", "more-plan-runs-*.safetensors")
"""Files whose sizes and sha256 `dataset.json` tells."""

_OF_CARD = [column.name for column in COLUMNS if not pa.types.is_list(column.kind)]
"""Columns from which the card counts."""


def _listing(sources: Sequence[Source]) -> str:
    """A digest of names, sizes and times of all that is read."""
    digest = hashlib.sha256()
    for source in sources:
        for path in source.files():
            found = path.stat()
            digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write_rows(sources: Sequence[Source], folder: Path, report: Callable[[int, int], None]) -> list[pa.Table]:
    """Write the files of rows that are not there yet; the tables of all, without their lists."""
    parts = [(source, part) for source in sources for part in range(source.parts)]
    tables = []
    for number, (source, part) in enumerate(parts):
        report(number, len(parts))
        path = folder / f"trials-{number:05}.parquet"
        if not path.exists():
            with atomic_path(path) as temporary:
                table = table_of(source.rows(part))
                pq.write_table(table, temporary, compression="zstd", compression_level=LEVEL, use_dictionary=False)
        tables.append(pq.read_table(path, columns=_OF_CARD))
    report(len(parts), len(parts))
    return tables


def _facts(sources: Sequence[Source], folder: Path, tables: Sequence[pa.Table]) -> dict[str, Any]:
    """What `dataset.json` tells."""
    table = pa.concat_tables(tables)
    told = []
    for origin, source in enumerate(sources):
        actor = f"actor-{origin}"
        source.save_more_plan_runs(folder)
        told.append(source.facts() | {"actor": actor if source.save_actor(folder / actor) else None})
    files = {}
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        rows = {"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {}
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path), **rows}
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "rows": table.num_rows,
        "runs": pc.count_distinct(table["run"]).as_py(),
        "tasks": pc.count_distinct(table["task"]).as_py(),
        "module_features": list(MODULE_FEATURES),
        "run_features": list(RUN_FEATURES),
        "sources": told,
        "files": files,
        "written_with": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rankpilot", "pyarrow")},
        },
    }
