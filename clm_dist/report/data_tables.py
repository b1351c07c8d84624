"""The figures of a run's data, from the counts of its manifest."""

from typing import Any

from clm_dist.files.blocks import Manifest, Split
from clm_dist.report.render import Table


def data_tables(manifest: Manifest) -> dict[str, Any]:
    """What the data are, a table of counts, and the lengths of the documents of each split."""
    return {
        "about": f"{manifest.origin}; encoded by {manifest.engine}, ids as {manifest.dtype}",
        "counts": _counts(manifest),
        "lengths": {name: _lengths(split) for name, split in manifest.splits.items() if split.document_lengths},
    }


def _counts(manifest: Manifest) -> Table:
    splits = manifest.splits
    cells: list[tuple[str, ...]] = []

    def row(label: str, *values: int | float | None, spec: str = ",d") -> None:
        if any(value is not None for value in values):
            cells.append((label, *("" if value is None else format(value, spec) for value in values)))

    each = list(splits.values())
    of_train = [split if name == "train" else None for name, split in splits.items()]
    row("records", *(split.num_records for split in each))
    for reason in sorted({reason for split in each for reason, count in split.num_skipped.items() if count}):
        row(f"skipped: {reason.replace('_', ' ')}", *(split.num_skipped.get(reason, 0) for split in each))
    row("documents", *(split.num_documents for split in each))
    row("also in eval", *(split.num_duplicates if split else None for split in of_train))
    row("repeat an earlier one", *(split.num_repeated if split else None for split in of_train))
    row("MB of text", *(split.num_text_bytes / 1e6 for split in each), spec=",.2f")
    row("tokens", *(split.num_tokens for split in each))
    row("dropped tokens", *(split.num_dropped_tokens for split in each))
    row("tokens a document", *(split.num_tokens / max(1, split.num_documents) for split in each), spec=",.1f")
    row("bytes a token", *(split.num_text_bytes / max(1, split.num_tokens) for split in each), spec=".2f")
    if (words := manifest.tokens_per_word) is not None:
        row("tokens a word", *(words if split else None for split in of_train), spec=".2f")
    row(f"blocks of {manifest.block_size:,}", *(split.num_blocks for split in each))
    return Table(("", *splits), cells)


def _lengths(split: Split) -> list[dict[str, Any]]:
    most = max(split.document_lengths.values())
    lengths, lowest = [], 1
    for highest in sorted(map(int, split.document_lengths)):
        count = split.document_lengths[str(highest)]
        span = f"{lowest:,}–{highest:,}" if lowest < highest else f"{highest:,}"
        lengths.append({"range": span, "count": f"{count:,}", "percent": f"{100 * count / most:.1f}"})
        lowest = highest + 1
    return lengths
