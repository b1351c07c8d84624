"""A store's blocks for a person: decoded, with the borders of their documents, and figures of their tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clm_dist.files.blocks import Blocks, Manifest, Split
from clm_dist.prepare.fertility import measure_fertility, sample_of_blocks
from clm_dist.pretrained.tokenizer import load_tokenizer

_BAR_WIDTH = 30
_BORDER = " \u2502 "


def show_store(store: Path, num_blocks: int) -> RenderableType:
    """Figures of a store, and the first blocks of its train split. Raises DataError where the store is broken."""
    manifest = Manifest.read(store / "manifest.json")
    tokenizer = load_tokenizer(store / "tokenizer")
    parts: list[RenderableType] = [_counts(manifest)]
    train = manifest.splits["train"]
    parts += [Text("\nTokens of a document (train)", style="bold"), _histogram(train)]
    blocks = Blocks(store, "train")
    sample = sample_of_blocks(blocks)
    fertility = measure_fertility(tokenizer, sample)
    parts.append(
        Text(
            f"\nFertility: {fertility.tokens_per_word:.2f} tokens a word, {fertility.bytes_per_token:.2f} bytes a "
            f"token (in {len(sample):,} blocks). The words that cost most, tokens x times:"
        )
    )
    parts.append(Text("  " + ", ".join(f"{word!r} {size} x {times}" for word, size, times in fertility.costliest)))
    for index in range(min(num_blocks, len(blocks))):
        parts.append(Text(f"\ntrain block {index}", style="bold"))
        parts.append(_decoded(tokenizer, blocks[np.array([index])][0]))
    return Group(*parts)


def _counts(manifest: Manifest) -> Table:
    table = Table(box=box.HORIZONTALS)
    table.add_column("")
    for name in manifest.splits:
        table.add_column(name, justify="right")

    def row(label: str, *values: object) -> None:
        table.add_row(label, *(f"{value:,}" if isinstance(value, int) else str(value) for value in values))

    splits = list(manifest.splits.values())
    row("records", *(split.num_records for split in splits))
    for reason in splits[0].num_skipped:
        if any(split.num_skipped[reason] for split in splits):
            row(f"  skipped: {reason.replace('_', ' ')}", *(split.num_skipped[reason] for split in splits))
    row("documents", *(split.num_documents for split in splits))
    row("  also in eval", *(split.num_duplicates if name == "train" else "" for name, split in manifest.splits.items()))
    if manifest.splits["train"].num_repeated is not None:
        row("  repeated", *(split.num_repeated if name == "train" else "" for name, split in manifest.splits.items()))
    row("MB of text", *(f"{split.num_text_bytes / 1e6:,.2f}" for split in splits))
    row("tokens", *(split.num_tokens for split in splits))
    row("  dropped", *(split.num_dropped_tokens for split in splits))
    row("tokens a document", *(f"{split.num_tokens / split.num_documents:,.1f}" for split in splits))
    row(f"blocks of {manifest.block_size}", *(split.num_blocks for split in splits))
    row("shards", *(len(split.shards) for split in splits))
    table.caption = f"encoded by {manifest.engine}, ids as {manifest.dtype}"
    return table


def _histogram(split: Split) -> Text:
    most = max(split.document_lengths.values())
    lines, lowest = [], 1
    for highest in sorted(map(int, split.document_lengths)):
        count = split.document_lengths[str(highest)]
        bar = "\u2588" * max(1, round(_BAR_WIDTH * count / most))
        label = f"{lowest}-{highest}" if lowest < highest else str(highest)
        lines.append(f"  {label:>13} {bar:<{_BAR_WIDTH}} {count:,}")
        lowest = highest + 1
    return Text("\n".join(lines))


def _decoded(tokenizer: Any, ids: Any) -> Text:
    """A block's text, with a bar where one document ends and the next begins."""
    text = Text()
    for index, document in enumerate(_documents(ids.tolist(), tokenizer.eos_token_id)):
        if index:
            text.append(_BORDER, style="bold red")
        text.append(tokenizer.decode(document))
    return text


def _documents(ids: list[int], eos: int | None) -> Iterator[list[int]]:
    """The stretches of a block that end with EOS, and what is left."""
    start = 0
    for place, token in enumerate(ids, 1):
        if token == eos or place == len(ids):
            yield ids[start:place]
            start = place
