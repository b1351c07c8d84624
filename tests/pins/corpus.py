"""A small fixed job: text that no library and no Python version changes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from tests.conftest import TINY_GPT2

NUM_RECORDS = 1300
"""The train split of the guide's grouping needs more than 1,000 records, so that a remainder is dropped inside it."""
_WORDS = (
    "the a of and model loss token block step learns reads writes 12 2026 naïve Zürich 漢字 🙂 don't end. begin, x=y"
)


def _numbers(seed: int) -> Iterator[int]:
    """Pseudo-random numbers of 31 bits (a linear congruential generator; Knuth, MMIX)."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield state >> 33


def records() -> list[dict[str, Any]]:
    """Questions with up to three scored answers; some have no answer, and some repeat another's text."""
    numbers, words = _numbers(42), _WORDS.split()

    def text(num_words: int) -> str:
        chosen = [words[next(numbers) % len(words)] for _ in range(num_words)]
        return " ".join(chosen) + ("\n" if next(numbers) % 3 == 0 else "")

    made: list[dict[str, Any]] = []
    for index in range(NUM_RECORDS):
        num_answers = next(numbers) % 4
        answers = [text(2 + next(numbers) % 8) for _ in range(num_answers)]
        if index % 9 == 8:
            answers = made[index - 5]["answers"]["text"]
        scores = [next(numbers) % 10 for _ in answers]
        made.append({"id": f"q{index}", "title": text(3), "answers": {"text": answers, "score": scores}})
    return made


def fixed_job(directory: Path, *settings: str, num_records: int = NUM_RECORDS) -> JobConfig:
    """The fixed job with `section.field=value` settings; its corpus and its job file are written into `directory`."""
    corpus = directory / f"corpus-{num_records}.jsonl"
    if not corpus.exists():
        lines = [json.dumps(record) + "\n" for record in records()[:num_records]]
        corpus.write_text("".join(lines), encoding="utf-8")
    path = directory / f"fixed-{num_records}.yaml"
    job = {
        "name": "fixed",
        "data": {"source": "files", "path": str(corpus), "text": "answers.text", "id": "id", "block_size": 32},
        "tokenizer": {"train": {"vocab_size": 300}},
        "model": {"config": dict(TINY_GPT2)},
        "batch": {"global_size": 8, "micro_size": 2},
        "train": {"learning_rate": 1e-3},
    }
    path.write_text(yaml.safe_dump(job))
    return load_job(path, settings).config
