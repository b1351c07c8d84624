"""How fast does a run train, beside transformers' Trainer and the best plain loop?

    python benchmarks/speed.py [--shapes NAME ...] [--programs NAME ...] [--rounds 3] [--report OUT.md]

Every program trains the same random weights on the same blocks in the same order, in a process of its own, on a GPU
where there is one, else on the CPU. Programs take turns for `--rounds` rounds, because a machine's speed drifts; the
figure is that of the best round, in which the least disturbed it. A step's seconds are between two steps' beginnings,
with all that happens in them. Evaluation, checkpoints and the first steps (compiling, warming up) are not timed.

- `clm-dist`: the loop of this package in one process, compiled (before its first step) and not.
- `Trainer`: transformers', with the same batch, compiled and not.
- `plain`: thirty lines of torch, compiled and not: what the hardware gives.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from processes import environment, markdown

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.files.blocks import Blocks
from clm_dist.metrics import flops_per_token, model_flops_utilization
from clm_dist.progress import Silent
from clm_dist.train.batches import BatchOrder
from clm_dist.train.model import autocast, load_model

SKIPPED = 4
"""First steps that are not timed."""
GPT2 = {"model_type": "gpt2", "vocab_size": 50257}
LLAMA_1B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model and its batches."""

    config: dict[str, Any]
    batch: int
    block: int
    precision: str
    on_gpu: bool
    steps: int
    train: dict[str, Any] = field(default_factory=dict)


DISTILGPT2 = GPT2 | {"n_layer": 6}
SHAPES = {
    "DistilGPT2, 8 x 128, fp32": Shape(DISTILGPT2, 8, 128, "fp32", False, 14),
    "DistilGPT2, 8 x 128, bf16": Shape(DISTILGPT2, 8, 128, "bf16", False, 14),
    "DistilGPT2, 256 x 128, bf16": Shape(DISTILGPT2, 256, 128, "bf16", True, 40),
    "GPT-2 124M, 32 x 1,024, bf16": Shape(GPT2 | {"n_layer": 12}, 32, 1024, "bf16", True, 40),
    "DistilGPT2, 16 x 128, bf16": Shape(DISTILGPT2, 16, 128, "bf16", True, 100),
    "Llama 1.1B, 8 x 2,048, bf16": Shape(LLAMA_1B, 8, 2048, "bf16", True, 14, {"gradient_checkpointing": True}),
}
PROGRAMS = ["clm-dist", "clm-dist, compiled", "Trainer", "Trainer, compiled", "plain", "plain, compiled"]


class Stamps:
    """When each of a program's steps began. The device is waited for before and after those that are timed, only."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.times: list[float] = []

    def __call__(self) -> None:
        if len(self.times) in (SKIPPED, self.num_steps - 1) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """The mean of the timed steps."""
        return (self.times[self.num_steps - 1] - self.times[SKIPPED]) / (self.num_steps - 1 - SKIPPED)


def write_job(directory: Path, shape: Shape) -> JobConfig:
    job = {
        "name": "speed",
        "data": {"source": "builtin", "id": "topic", "block_size": shape.block, "eval_fraction": 0.02},
        "tokenizer": {"train": {"vocab_size": 4096}},
        "model": {"config": shape.config},
        "batch": {"global_size": shape.batch, "micro_size": shape.batch},
        "train": {"max_steps": shape.steps, "epochs": 1000, "precision": shape.precision, **shape.train},
        "eval": {"every": 10**6},
        "checkpoint": {"every": 10**6},
    }
    path = directory / "speed.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_job(path).config


class _EnoughError(Exception):
    pass


def run_clm_dist(job: JobConfig, store: Path, stamp: Stamps, *, compiled: bool) -> None:
    from clm_dist.files.run_dir import RunDir
    from clm_dist.train import loop
    from clm_dist.train.session import Session

    job = job.model_copy(update={"train": job.train.model_copy(update={"compile": compiled})})
    train_step = loop._Loop._train_step

    def stamped(self: loop._Loop) -> Any:
        stamp()
        if len(stamp.times) == job.train.max_steps:
            raise _EnoughError
        return train_step(self)

    loop._Loop._train_step = stamped  # type: ignore[method-assign]
    run = RunDir(store.parent / "run")
    run.root.mkdir()
    session = Session(
        rank=0,
        world_size=1,
        use_gpu=torch.cuda.is_available(),
        num_threads=torch.get_num_threads(),
        run=run,
        store=store,
        report=lambda message: None,
    )
    with contextlib.suppress(_EnoughError):
        loop.train(job, session)


def run_trainer(job: JobConfig, store: Path, stamp: Stamps, *, compiled: bool) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    blocks = Blocks(store, "train")
    order = BatchOrder.of_job(job, len(blocks))
    numbers = np.concatenate([order.global_batch(step) for step in range(order.num_steps)])

    class Dataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(numbers)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(blocks[numbers[index : index + 1]][0])
            return {"input_ids": ids, "labels": ids}

    class Callback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            stamp()

    arguments = TrainingArguments(
        output_dir=str(store.parent / "trainer"),
        max_steps=order.num_steps,
        per_device_train_batch_size=job.batch.micro_size,
        learning_rate=job.train.learning_rate,
        weight_decay=job.train.weight_decay,
        bf16=job.train.precision == "bf16",
        gradient_checkpointing=job.train.gradient_checkpointing,
        torch_compile=compiled,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=load_model_of(job, store), args=arguments, train_dataset=Dataset(), callbacks=[Callback()]).train()


def run_plain(job: JobConfig, store: Path, stamp: Stamps, *, compiled: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = Blocks(store, "train")
    order = BatchOrder.of_job(job, len(blocks))
    model = load_model_of(job, store).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.learning_rate, weight_decay=0.01, fused=True)
    # A head of another size than a multiple of 128 costs a GPU half of its speed; what is added has no probability.
    rows = model.lm_head.weight.shape[0]
    added = -rows % 128 if device.type == "cuda" else 0

    def loss_of(ids_BT: torch.Tensor) -> torch.Tensor:
        with autocast(job.train.precision, device):
            hidden_BTC = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            weight_VC = torch.nn.functional.pad(model.lm_head.weight, (0, 0, 0, added))
            logits_BTV = torch.nn.functional.linear(hidden_BTC, weight_VC)
        if added:
            padded_V = torch.arange(rows + added, device=device) >= rows
            logits_BTV = logits_BTV.masked_fill(padded_V, torch.finfo(logits_BTV.dtype).min)
        labels_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100)
        return torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten())

    compute = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    for step in range(order.num_steps):
        stamp()
        ids_BT = torch.from_numpy(blocks[order.global_batch(step)])
        if device.type == "cuda":
            ids_BT = ids_BT.pin_memory().to(device, non_blocking=True)
        compute(ids_BT).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def load_model_of(job: JobConfig, store: Path) -> Any:
    from clm_dist.pretrained.tokenizer import load_tokenizer

    return load_model(job, load_tokenizer(store / "tokenizer"))


def measure(program: str, shape: Shape) -> dict[str, float]:
    """The figures of one program, in this process."""
    from tests.support.stores import prepare

    with tempfile.TemporaryDirectory() as directory:
        # What is compiled is compiled anew.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        job = write_job(Path(directory), shape)
        store = prepare(job, Path(directory) / "stores", Silent())
        stamp = Stamps(shape.steps)
        name, _, compiled = program.partition(", ")
        if name == "clm-dist":
            run_clm_dist(job, store, stamp, compiled=bool(compiled))
        else:
            {"Trainer": run_trainer, "plain": run_plain}[name](job, store, stamp, compiled=bool(compiled))
        tokens_per_s = shape.batch * shape.block / stamp.seconds()
        figures = {"tokens_per_s": tokens_per_s, "first_step": stamp.times[1] - stamp.times[0]}
        if torch.cuda.is_available():
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            model = load_model_of(job, store)
            flops = flops_per_token(
                sum(p.numel() for p in model.parameters()),
                model.config.num_hidden_layers,
                model.config.hidden_size,
                shape.block,
            )
            figures["mfu"] = model_flops_utilization(tokens_per_s, flops, torch.cuda.get_device_name(), 1) or math.nan
        return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shapes", nargs="+", default=[name for name, s in SHAPES.items() if s.on_gpu == on_gpu])
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="write the figures as Markdown")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one[1], SHAPES[options.one[0]])))
        return 0
    parts = []
    for shape in options.shapes:
        best: dict[str, dict[str, float]] = {}
        for _ in range(options.rounds):
            for program in options.programs:
                one = [sys.executable, __file__, "--one", shape, program]
                done = subprocess.run(one, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{program}: {done.stderr[-2000:]}")
                figures = json.loads(done.stdout.splitlines()[-1])
                if figures["tokens_per_s"] > best.get(program, figures)["tokens_per_s"] or program not in best:
                    best[program] = figures
        parts.append(f"## {shape}\n\n{table(best)}")
        print(parts[-1], flush=True)
    if options.report:
        command = "python benchmarks/speed.py " + " ".join(arguments or sys.argv[1:])
        options.report.write_text("\n\n".join(["# Speed", f"`{command}`", environment(), *parts]) + "\n")
    return 0


def table(figures: dict[str, dict[str, float]]) -> str:
    base = figures["Trainer"]["tokens_per_s"] if "Trainer" in figures else math.nan
    rows = []
    for program, found in figures.items():
        row = [program, f"{found['tokens_per_s']:,.0f}", f"{found['tokens_per_s'] / base:.2f}"]
        row.append(f"{found['first_step']:.1f}")
        if "peak_gib" in found:
            row += [f"{found['peak_gib']:.1f}", f"{found['mfu']:.1%}"]
        rows.append(row)
    more = ["peak memory, GiB", "MFU"] if "peak_gib" in next(iter(figures.values())) else []
    return markdown(["program", "tokens/s", "of Trainer", "first step, s", *more], rows)


if __name__ == "__main__":
    sys.exit(main())
