"""What the shards of the fixed job are under each option that decides which blocks come out."""

from pathlib import Path
from typing import Any

from clm_dist.files.blocks import EVAL_BYTES, Manifest
from clm_dist.files.hashes import file_sha256
from clm_dist.progress import Silent
from tests.pins.corpus import fixed_job
from tests.support.stores import prepare

GROUPINGS = ("carry", "guide")
SPLIT_METHODS = ("random", "hash")
ENGINES = ("gigatoken", "tokenizers")
CASES: dict[str, tuple[str, ...]] = {
    **{
        f"{grouping}, {method}": (f"data.grouping={grouping}", f"data.split_method={method}")
        for grouping in GROUPINGS
        for method in SPLIT_METHODS
    },
    "append_eos false": ("data.append_eos=false",),
    "block_size 16": ("data.block_size=16",),
    "deduplicate": ("data.deduplicate=true",),
    "document_mask": ("data.document_mask=true",),
    "eval_fraction 0.4, seed 7": ("data.eval_fraction=0.4", "data.seed=7"),
    "hash of the text": ("data.split_method=hash", "data.id=null"),
    "join null": ("data.join=null",),
    "min_score": ("data.score=answers.score", "data.min_score=5"),
    "slice": ("data.split='train[10%:40%]'",),
    "template": ("data.text='{title}: {answers.text}'",),
    "template, join null": ("data.text='{title}: {answers.text}'", "data.join=null"),
    "vocab_size 400": ("tokenizer.train.vocab_size=400",),
}
"""Settings by the name of the case; the engine is the caller's choice, because no shard may depend on it."""
_COUNTS = (
    "num_records",
    "num_skipped",
    "num_documents",
    "num_duplicates",
    "num_text_bytes",
    "num_tokens",
    "num_blocks",
    "num_dropped_tokens",
    "num_document_ends",
)


def pinned_store(directory: Path, case: str, engine: str) -> dict[str, Any]:
    """Fingerprint, sha256 of every file with blocks, and counts of the store of a case."""
    job = fixed_job(directory, *CASES[case], f"tokenizer.engine={engine}")
    store = prepare(job, directory / engine, Silent())
    manifest = Manifest.read(store / "manifest.json")
    assert manifest.engine == engine
    shards = [shard.file for split in manifest.splits.values() for shard in split.shards]
    return {
        "fingerprint": manifest.fingerprint,
        "sha256": {name: file_sha256(store / name) for name in sorted([*shards, EVAL_BYTES])},
        "counts": {
            name: {count: getattr(split, count) for count in _COUNTS} for name, split in manifest.splits.items()
        },
    }


def pinned_stores(directory: Path) -> dict[str, Any]:
    """Every case with the reference engine."""
    return {case: pinned_store(directory, case, "tokenizers") for case in CASES}
