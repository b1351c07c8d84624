"""The data sets that ELI5 is today, each with records of its shape, as `datasets` loads them from the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Manifest
from clm_dist.prepare.encode import Effort
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.reading import load_records, texts_of
from tests.support.stores import prepare

ANSWERS = [["The sky scatters blue light.", "See _URL_0_ for more."], ["Water expands when it freezes."], []]
QUESTIONS = ["Why is the sky blue?", "Why does ice float?", "Why do cats purr?"]


def category_records() -> list[dict[str, Any]]:
    """dany0407/eli5_category: the guide's nested shape."""
    return [
        {
            "q_id": f"q{i}",
            "title": title,
            "selftext": "",
            "category": "Physics",
            "subreddit": "explainlikeimfive",
            "answers": {
                "a_id": [f"a{i}{j}" for j in range(len(texts))],
                "text": texts,
                "score": [5 - 3 * j for j in range(len(texts))],
                "text_urls": [[] for _ in texts],
            },
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }
        for i, (title, texts) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]


def pair_records() -> list[dict[str, Any]]:
    """sentence-transformers/eli5, configuration `pair`."""
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return [{"question": question, "answer": text} for question, texts in pairs for text in texts]


def original_records() -> list[dict[str, Any]]:
    """Pavithree/eli5: the shape of the data set that the guide was written for."""
    return [
        {
            "q_id": record["q_id"],
            "title": record["title"],
            "selftext": "",
            "document": "",
            "subreddit": "askscience",
            "answers": {key: record["answers"][key] for key in ("a_id", "text", "score")},
            "title_urls": {"url": []},
            "selftext_urls": {"url": []},
            "answers_urls": {"url": ["http://example.com"]},
        }
        for record in category_records()
    ]


def write_category(directory: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(category_records()), directory / "train-00000-of-00001.parquet")


def write_pair(directory: Path) -> None:
    (directory / "pair").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(pair_records()), directory / "pair" / "train-00000.parquet")
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: pair\n  data_files:\n  - split: train\n    path: pair/train-*\n---\n"
    )


def write_original(directory: Path) -> None:
    (directory / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in original_records()))


JOINED = [[" ".join(texts)] if texts else [] for texts in ANSWERS]
SHAPES: dict[str, tuple[Callable[[Path], None], dict[str, Any], list[list[str]]]] = {
    "category": (write_category, {"text": "answers.text"}, JOINED),
    "category, an answer a document": (write_category, {"text": "answers.text", "join": None}, ANSWERS),
    "category, the best answers": (
        write_category,
        {"text": "answers.text", "score": "answers.score", "min_score": 5},
        [["The sky scatters blue light."], ["Water expands when it freezes."], []],
    ),
    "category, with the question": (
        write_category,
        {"text": "{title}\n\n{answers.text}", "join": None},
        [[f"{title}\n\n{text}" for text in texts] for title, texts in zip(QUESTIONS, ANSWERS, strict=True)],
    ),
    "pair": (write_pair, {"text": "answer", "config": "pair"}, [[text] for texts in ANSWERS for text in texts]),
    "original": (write_original, {"text": "answers.text"}, JOINED),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["downloaded", "streamed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_eli5_gives_its_documents(
    tmp_path: Path, shape: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write, settings, expected = SHAPES[shape]
    directory = tmp_path / "eli5"
    directory.mkdir()
    write(directory)
    data = DataConfig.model_validate({"dataset": str(directory), "streaming": streaming} | settings)
    assert texts_of(load_records(data), data) == expected
    if streaming:
        # Nothing of the data set is on this disk a second time.
        assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_streamed_data_set_makes_the_blocks_of_the_downloaded_one(
    make_job: MakeJob, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "texts"
    directory.mkdir()
    (directory / "train.jsonl").write_bytes(corpus.read_bytes())
    settings = ("data.source=hub", f"data.dataset={directory}", "data.split='train[:40]'")
    stores = [
        prepare(make_job(*settings, f"data.streaming={streaming}"), tmp_path / streaming, Silent(), Effort(2, size))
        for streaming, size in (("false", 1 << 20), ("true", 2000))
    ]
    one, other = (Manifest.read(store / "manifest.json") for store in stores)
    assert one.splits == other.splits
    assert sum(split.num_records for split in one.splits.values()) == 40


def test_a_streamed_data_set_has_no_end_to_count_from(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    for split in ("train[-5:]", "train[10%:]"):
        with pytest.raises(ConfigError, match="no end that is known; name rows, such as") as caught:
            load_records(DataConfig(dataset=str(tmp_path), streaming=True, split=split))
        assert caught.value.field == "data.split"
    with pytest.raises(ConfigError, match=r"check data.config, data.split"):
        load_records(DataConfig(dataset=str(tmp_path), streaming=True, split="test"))
    with pytest.raises(ConfigError, match=r"data.dataset nobody/nothing is not reachable on the Hub"):
        load_records(DataConfig(dataset="nobody/nothing", streaming=True))
