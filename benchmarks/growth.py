"""What grows with what: CPU seconds and memory of reading metrics, opening stores and reading markers, by their size.

    python benchmarks/growth.py [--directory DIR]

Each figure is of a process of its own: user and system time of the call, and by how much it raises the peak of the
resident memory. The records are those of a run with a checkpoint every 1,000th and an evaluation every 10th of its
steps. The shards are sparse files: of the blocks that are not read, only the names and sizes are real.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCK_SIZE = 128
BATCH = 256
PARAMETERS = 291
"""Of Llama 2 7B."""
METRICS = {
    "driver": "start of a driver, failure",
    "status": "`status`",
    "restart": "start of workers",
    "result": "result",
    "report": "`report`",
}
STORES = {"open": "open all shards", "order": "order of a step", "read": "open, and read a step"}
MARKERS = {"ddp": "ddp, ZeRO", "fsdp2": "fsdp2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the files lie meanwhile")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.directory)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print("\n\n".join(tables(Path(directory))))


def tables(directory: Path) -> Iterator[str]:
    """The tables, as Markdown."""
    for what, names, sizes, make in (
        ("steps", METRICS, [10**3, 10**4, 10**5, 10**6], write_metrics),
        ("blocks", STORES, [10**4, 10**6, 10**8, 10**9], write_store),
        ("ranks", MARKERS, [8, 64, 512], lambda directory, size: None),
    ):
        rows = [f"| {what} | {' | '.join(names.values())} |", f"| ---: |{' --- |' * len(names)}"]
        for size in sizes:
            make(directory, size)
            cells = [_measured(directory, name, size) for name in names]
            rows.append(f"| {size:,} | {' | '.join(cells)} |")
        yield "\n".join(rows)


def _measured(directory: Path, name: str, size: int) -> str:
    command = [sys.executable, __file__, "--directory", str(directory), "--one", name, str(size)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    return f"{found['note']}{found['cpu']:.2f} s, {found['mib']:.0f} MiB"


def measure(name: str, size: int, directory: Path) -> dict[str, Any]:
    """CPU seconds and MiB of one call in this process."""
    call, note = (metrics_call if name in METRICS else store_call if name in STORES else marker_call)(
        name, size, directory
    )
    # The peak of the process that this one was forked from counts as its own until it is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    peak, before = _peak_mib(), resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "mib": _peak_mib() - peak, "note": note}


def _peak_mib() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def write_metrics(directory: Path, num_steps: int) -> None:
    run = directory / "run"
    run.mkdir(exist_ok=True)
    (run / "job.yaml").write_text("name: run\n")
    start = {"kind": "start", "step": 0, "num_steps": num_steps, "workers": 2, "strategy": "ddp", "device": "cpu"}
    figures = {"loss": 3.1, "perplexity": 22.2, "bits_per_byte": 1.0123456789, "num_tokens": 123456}
    with (run / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(start) + "\n")
        for step in range(1, num_steps + 1):
            at = {"step": step, "epoch": step / num_steps}
            speed = {"tokens": 8128, "seconds": 0.0512345678, "tokens_per_s": 158642.5, "mfu": 0.41234567}
            more = {"loss": 3 + 1 / step, "lr": 1 / step, "grad_norm": 1.2345678, "data_wait": 0.0001234567}
            file.write(json.dumps({"kind": "step"} | at | speed | more | {"blocks": 1234567890123 + step}) + "\n")
            if step % (num_steps // 1000) == 0:
                file.write(json.dumps({"kind": "checkpoint", "step": step, "name": f"step-{step}"}) + "\n")
            if step % (num_steps // 10) == 0:
                file.write(json.dumps({"kind": "eval"} | at | figures) + "\n")


def metrics_call(name: str, num_steps: int, directory: Path) -> tuple[Callable[[], Any], str]:
    from types import SimpleNamespace

    from clm_dist.files.records import read_records, replace_records
    from clm_dist.files.result import build_result
    from clm_dist.files.run_dir import RunDir
    from clm_dist.files.standing import RECENT_STEPS
    from clm_dist.report.page import write_page
    from clm_dist.submit.training import Training
    from clm_dist.train.recorder import outlives_start

    run = RunDir(directory / "run")
    job: Any = SimpleNamespace(
        name="run", cluster=SimpleNamespace(max_workers=2, strategy="ddp"), train=SimpleNamespace(keep="last")
    )
    manifest: Any = SimpleNamespace(fingerprint="0")

    def report() -> None:
        write_page(run, result)

    if name == "report":
        result = build_result(job, run, manifest, "done")
    calls: dict[str, Callable[[], Any]] = {
        "driver": lambda: [record for record in read_records(run.metrics, last_steps=1) if record["kind"] == "failure"],
        "status": lambda: Training.of_records(read_records(run.metrics, last_steps=RECENT_STEPS)),
        "restart": lambda: replace_records(run.metrics, [], keep=outlives_start(num_steps)),
        "result": lambda: build_result(job, run, manifest, "done"),
        "report": report,
    }
    return calls[name], ""


def write_store(directory: Path, num_blocks: int) -> None:
    import numpy as np

    from clm_dist.files.blocks import Manifest, Split
    from clm_dist.files.shards import SHARD_TOKENS, Shard, write_shards

    store = directory / f"store-{num_blocks}"
    most = SHARD_TOKENS // BLOCK_SIZE
    sizes = [most] * (num_blocks // most) + [num_blocks % most] * (num_blocks % most > 0)
    shards = []
    for number, size in enumerate(sizes):
        if number in (0, len(sizes) - 1):
            # A real one of zeros, whose head and tail the others of its size have.
            blocks = np.zeros((size, BLOCK_SIZE), np.uint16)
            (real,) = write_shards(directory / "real", "train", [blocks], BLOCK_SIZE, blocks.dtype)
            content = (directory / "real" / real.file).read_bytes()
            head, tail, whole = content[:4096], content[-4096:], len(content)
        shard = Shard(f"train/{number:05d}.arrow", size, "0" * 64)
        path = store / shard.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(head)
            file.seek(whole - len(tail))
            file.write(tail)
        shards.append(shard)
    counts: Any = dict.fromkeys(("num_records", "num_documents", "num_duplicates", "num_text_bytes", "num_tokens"), 0)
    more: Any = {"num_skipped": {}, "num_dropped_tokens": 0, "num_document_ends": 0, "document_lengths": {}}
    split = Split(**counts, **more, num_blocks=num_blocks, shards=tuple(shards))
    Manifest("0", "", {}, BLOCK_SIZE, "uint16", "", "", {"train": split}).write(store / "manifest.json")


def store_call(name: str, num_blocks: int, directory: Path) -> tuple[Callable[[], Any], str]:
    import numpy as np

    from clm_dist.files.blocks import Blocks
    from clm_dist.train.batches import BatchOrder

    store = directory / f"store-{num_blocks}"
    order = BatchOrder(num_blocks, BATCH, BATCH, epochs=3, max_steps=None, seed=0)
    if name == "order":
        order.global_batch(0)
        return lambda: [order.global_batch(step) for step in range(100)], "100 of them "

    def read() -> None:
        blocks = Blocks(store, "train", shuffled=True)
        if name == "read":
            assert np.array_equal(blocks[order.global_batch(7)], np.zeros((BATCH, BLOCK_SIZE)))

    return read, ""


def marker_call(name: str, num_ranks: int, directory: Path) -> tuple[Callable[[], Any], str]:
    import torch

    from clm_dist.files.checkpoints import Checkpoints
    from clm_dist.files.markers import Marker, RankFile, TrainerState
    from clm_dist.train.checkpointing.fragments import Fragment, own_part

    size = 2**22
    whole = [
        Fragment(
            f"model.layers.{number}.self_attn.q_proj.weight", 0, {"weight": torch.empty(size, device="meta")}, True
        )
        for number in range(PARAMETERS)
    ]
    shares = []
    for rank in range(num_ranks):
        rows = size * rank // num_ranks, size * (rank + 1) // num_ranks
        # fsdp2 gives each rank a piece of every parameter.
        pieces = own_part(whole, rank, num_ranks) if name == "ddp" else [one.cut(*rows) for one in whole]
        named = {piece.parameter: (piece.start, piece.stop) for piece in pieces}
        shares.append(RankFile(f"rank-{rank:05d}.safetensors", 2**30, "0" * 64, named))
    shapes = {one.parameter: (2**11, 2**11) for one in whole}
    state = TrainerState(1, 1, num_ranks, name, "0", 256, 42, parameters=shapes)
    checkpoints = Checkpoints(str(directory / "checkpoints"))
    saved = directory / "checkpoints" / f"step-{name}-{num_ranks}"
    saved.mkdir(parents=True)
    checkpoints.commit(saved.name, Marker(state, tuple(shares)), keep=99)
    num_bytes = sum(file.stat().st_size for file in saved.iterdir())
    num_pieces = sum(len(share.fragments) for share in shares)
    return lambda: checkpoints.read(saved.name), f"{num_pieces:,} pieces, {num_bytes / 1e6:.2f} MB; "


if __name__ == "__main__":
    main()
