"""Preparation beside the guide's own program, on the same text and in one run: throughput, memory, a second call.

    python benchmarks/prepare_speed.py --peer hf_tutorial.py --data records.jsonl.gz --tokenizer DIR [--repeat 36]

The text is the records repeated; every program runs in a process of its own. Of the peer its own figure is taken
(tokenise and group, with two processes; reading the records, which it does before, is left out in its favour). Ours is
the time from the call to the shards on disk without loading the tokenizer, which the peer's figure leaves out too;
what is left out is stated as start-up.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines in the guide's nested shape, .gz or not")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="the guide's program; takes --data, --tokenizer, --rows, --prep-only")
    parser.add_argument("--repeat", type=int, default=36, help="how often the records are repeated")
    parser.add_argument("--directory", type=Path, help="where text and stores lie meanwhile", default=None)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_one(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(compare(arguments, Path(directory)))


def compare(arguments: argparse.Namespace, directory: Path) -> str:
    """The table of all programs, as Markdown."""
    text = directory / "records.jsonl"
    opened = gzip.open if arguments.data.suffix == ".gz" else open
    with opened(arguments.data, "rb") as file:
        content = file.read()
    with text.open("wb") as file:
        for _ in range(arguments.repeat):
            file.write(content)

    def run_ours(what: str) -> dict[str, Any]:
        command = [
            sys.executable,
            __file__,
            "--one",
            what,
            "--data",
            str(text),
            "--tokenizer",
            str(arguments.tokenizer),
        ]
        results = [_last_json([*command, "--directory", str(directory)]) for _ in range(RUNS)]
        return {key: statistics.median(result[key] for result in results) for key in results[0]}

    ours = {engine: run_ours(engine) for engine in ("gigatoken", "tokenizers")}
    encode = run_ours("encode_batch")
    rows = [_row(f"clm-dist, {engine}", figures) for engine, figures in ours.items()]
    notes = [
        f"gigatoken's own `encode_batch` on the same strings: {encode['mb_per_s']:,.0f} MB/s for an awkward array "
        f"(on all cores {encode['parallel_mb_per_s']:,.0f}), {encode['list_mb_per_s']:,.0f} MB/s for a list of str; "
        f"clm-dist from file to shards is {ours['gigatoken']['mb_per_s'] / encode['best_mb_per_s']:.2f} of the best.",
        f"A second call with the same job, interpreter start included: {ours['gigatoken']['again_s']:.2f} s.",
    ]
    if arguments.peer:
        command = [sys.executable, str(arguments.peer), "--data", str(text), "--tokenizer", str(arguments.tokenizer)]
        command += ["--rows", str(10**9), "--prep-only", "--num-proc", "2", "--out", str(directory / "peer")]
        peer = _last_json(command)
        figures = {
            "seconds": peer["tokenize_s"] + peer["group_s"],
            "mb_per_s": peer["prep_mb_per_s"],
            "startup_s": peer["import_s"] + peer["load_s"],
        }
        rows.insert(0, _row("the guide's program, two processes", figures))
        ratios = (
            f"{engine} {figures['mb_per_s'] / peer['prep_mb_per_s']:.1f} times" for engine, figures in ours.items()
        )
        notes.insert(0, f"Against the guide's program: {', '.join(ratios)}.")
    head = ["| program | MB/s | seconds | start-up, apart | peak memory |", "| --- | ---: | ---: | ---: | ---: |"]
    return "\n".join(
        [f"{ours['gigatoken']['text_mb']:.0f} MB of text, median of {RUNS}:", "", *head, *rows, "", *notes]
    )


def _row(name: str, figures: dict[str, Any]) -> str:
    memory = f"{figures['peak_mib']:,.0f} MiB" if "peak_mib" in figures else ""
    return (
        f"| {name} | {figures['mb_per_s']:,.1f} | {figures['seconds']:.2f} | {figures['startup_s']:.1f} s | {memory} |"
    )


def _last_json(command: list[str]) -> dict[str, Any]:
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    value: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return value


def measure_one(arguments: argparse.Namespace) -> dict[str, float]:
    """One program in this process, which does nothing else."""
    began = time.perf_counter()
    job = directory_job(arguments)
    if arguments.one == "encode_batch":
        return measure_encode_batch(job)
    import awkward  # noqa: F401
    import gigatoken  # noqa: F401

    from clm_dist.config.load import load_job
    from clm_dist.files.stores import Stores
    from clm_dist.prepare import encoded, engines, pipeline, token_bytes
    from clm_dist.prepare.encoding import Encoding
    from clm_dist.pretrained.late_torch import import_without_torch
    from clm_dist.pretrained.tokenizer import load_tokenizer
    from clm_dist.progress import Silent

    loading = [0.0]

    def timed(function: Any) -> Any:
        def call(*values: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*values)
            finally:
                loading[0] += time.perf_counter() - start

        return call

    # Loading the tokenizer, once for each engine.
    setattr(pipeline, "load_tokenizer", timed(load_tokenizer))  # noqa: B010
    setattr(Encoding, "of_tokenizer", timed(Encoding.of_tokenizer))  # noqa: B010
    build_engine = lru_cache(timed(engines.build_engine.__wrapped__))
    for module in (engines, encoded, token_bytes):
        setattr(module, "build_engine", build_engine)  # noqa: B010
    import_without_torch()
    from transformers import AutoTokenizer  # noqa: F401

    config = load_job(job, [f"tokenizer.engine={arguments.one}"]).config
    imported = time.perf_counter() - began
    stores = arguments.directory / "stores"
    shutil.rmtree(stores, ignore_errors=True)
    start = time.perf_counter()
    store = pipeline.prepare(config, Stores(stores), Silent())
    seconds = time.perf_counter() - start - loading[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text_mb = sum(split.num_text_bytes for split in store.manifest().splits.values()) / 1e6
    start = time.perf_counter()
    command = [sys.executable, "-m", "clm_dist", "prepare", str(job), "--store", str(stores)]
    subprocess.run(command, check=True, capture_output=True)
    again = time.perf_counter() - start
    shutil.rmtree(stores)
    return {
        "text_mb": text_mb,
        "seconds": seconds,
        "mb_per_s": text_mb / seconds,
        "startup_s": imported + loading[0],
        "peak_mib": peak,
        "again_s": again,
    }


def directory_job(arguments: argparse.Namespace) -> Path:
    """The job file, in the directory of the run."""
    job = arguments.directory / "job.yaml"
    job.write_text(
        json.dumps(
            {
                "name": "bench",
                "data": {"source": "files", "path": str(arguments.data.absolute()), "text": "answers.text"},
                "tokenizer": {"path": str(arguments.tokenizer.absolute())},
                "model": {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}},
            }
        )
    )
    return Path(job)


def measure_encode_batch(job: Path) -> dict[str, float]:
    """gigatoken alone on all texts, held in memory; warmed up by an eighth of them."""
    import gigatoken
    import pyarrow as pa

    from clm_dist.config.load import load_job
    from clm_dist.prepare.documents import documents_of
    from clm_dist.prepare.encoding import Encoding
    from clm_dist.prepare.engines import Gigatoken
    from clm_dist.prepare.partitions import read_partition
    from clm_dist.prepare.sources import open_source
    from clm_dist.pretrained.tokenizer import load_tokenizer

    config = load_job(job).config
    assert config.tokenizer.path
    encoding = Encoding.of_tokenizer(load_tokenizer(Path(config.tokenizer.path)), config.data)
    partitions = open_source(config.data).partitions(1 << 23)
    texts = pa.concat_arrays(
        [documents_of(read_partition(partition, config.data), config.data).texts for partition in partitions]
    )
    engine = Gigatoken(encoding.tokenizer_json)
    plain = gigatoken.Tokenizer.from_json(encoding.tokenizer_json)
    strings = texts.to_pylist()
    engine.encode(texts[: len(texts) // 8])
    plain.encode_batch(strings[: len(texts) // 8])
    num_bytes = sum(len(text.encode()) for text in strings)
    rates = {}
    calls: dict[str, Callable[[], Any]] = {
        "mb_per_s": lambda: engine.encode(texts),
        "parallel_mb_per_s": lambda: engine.encode(texts, parallel=True),
        "list_mb_per_s": lambda: plain.encode_batch(strings, parallel=True),
    }
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        rates[name] = num_bytes / 1e6 / (time.perf_counter() - start)
    return rates | {"best_mb_per_s": max(rates.values())}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
