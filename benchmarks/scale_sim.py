"""What 1,024 workers on 10^12 tokens ask of the parts that are not the model, by their own code or by arithmetic.

    python benchmarks/scale_sim.py [--workers 1024] [--tokens 1e12] [--directory DIR]

Shards are sparse files and weights are not there; the counts, the names and the code that reads them are real. Times
are CPU seconds of one process (see growth.py). What is only counted says so.
"""

import argparse
import pickle
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import growth

MICRO_SIZE = 16
"""Blocks in a pass of a worker."""
EVAL_SHARE = 1e-3
"""Of the tokens that are in the eval split."""
CALLS_PER_S = 3500
"""Calls to actors that one process of Ray made in a second, on two cores that other work shared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--directory", type=Path, help="where the files lie meanwhile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print("| what | figure |\n| --- | --- |")
        for what, figure in rows(arguments.workers, int(arguments.tokens), Path(directory)):
            print(f"| {what} | {figure} |", flush=True)


def rows(workers: int, tokens: int, directory: Path) -> Iterator[tuple[str, str]]:
    """What is looked at, and its figure."""
    from clm_dist.files.blocks import _MOST_MAPPED
    from clm_dist.files.shards import SHARD_TOKENS
    from clm_dist.train.ray.cluster import poll_interval_s

    num_blocks = tokens // growth.BLOCK_SIZE
    num_steps = tokens // (workers * MICRO_SIZE * growth.BLOCK_SIZE)
    num_shards = -(-tokens // SHARD_TOKENS)
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    mapped = min(num_shards, _MOST_MAPPED)
    yield "mappings of a worker (counted)", f"{mapped:,} of {num_shards:,} shards; the system allows {most:,}"
    growth.write_store(directory, num_blocks)
    size = (directory / f"store-{num_blocks}" / "manifest.json").stat().st_size
    yield "manifest", f"{size / 1e6:.1f} MB"
    for name, title in growth.STORES.items():
        yield title, growth._measured(directory, name, num_blocks)
    yield from _evaluation(workers, round(tokens * EVAL_SHARE) // growth.BLOCK_SIZE)
    for name, title in growth.MARKERS.items():
        yield f"checkpoint marker, {title}", growth._measured(directory, name, workers)
    # As many as the table of growth.py has.
    growth.write_metrics(directory, num_steps - num_steps % 1000)
    for name, title in growth.METRICS.items():
        yield f"{num_steps:,} records: {title}", growth._measured(directory, name, num_steps)
    interval = poll_interval_s(workers)
    yield (
        "calls of Ray's controller (counted)",
        f"{workers / interval:,.0f} a second, every {interval:.2g} s; a process makes some {CALLS_PER_S:,}",
    )
    yield "beats on the run's storage (counted)", f"{workers / 5:,.0f} files of 1 KB a second"


def _evaluation(workers: int, num_blocks: int) -> Iterator[tuple[str, str]]:
    from clm_dist.metrics import MicroLoss, combine

    num_micros = -(-num_blocks // MICRO_SIZE)
    tokens = MICRO_SIZE * (growth.BLOCK_SIZE - 1)
    rows = [(index, 1.5 * index, tokens, 4 * tokens) for index in range(num_micros)]
    messages: list[Any] = [rows[rank::workers] for rank in range(workers)]
    yield "evaluation: message of a worker", f"{len(pickle.dumps(messages[0])) / 1e3:,.0f} kB"
    began = time.process_time()
    micros = [MicroLoss(*row) for message in messages for row in message]
    combine(micros, step=1, epoch=0.1, num_micros=num_micros, num_tokens=num_micros * tokens)
    spent = time.process_time() - began
    yield "evaluation: sums of all in the driver", f"{num_micros:,} micro-batches, {spent:.2f} s"


if __name__ == "__main__":
    main()
