"""Does the job `eli5-guide` give what the Hugging Face guide's own program gives?

    python benchmarks/guide_parity.py --peer hf_tutorial.py --data eli5.jsonl.gz --model stories260K \
        --tokenizer gpt2-tokenizer [--rows 5000] [--random-rows 1000] [--work DIR] [--report out.md]

The peer is the guide as one program: transformers' Trainer on blocks from `datasets.map`. Both train from the same
weights, with dropout off, on the same records: the checkpoint `--model`, and a small GPT-2 with random weights and the
tokenizer `--tokenizer`. Compared are the blocks (token for token), the perplexity of the untouched model (1e-5
relative) and the perplexity after each epoch (0.5 %). The order of the batches differs, so the latter is not equal.

transformers 5.23's Trainer divides GPT-2's loss by all labels of a block and not by those that are predicted, 128
instead of 127 (it does not see that GPT2LMHeadModel shifts its labels: `Trainer._loss_shifts_labels` is False). The
peer's loss is put right by that factor before it is compared, where the Trainer says that it is needed; the table has
the printed perplexity beside it.
A last check shows that training learns: `--model` at a learning rate of 1e-3 for 400 steps ends below 12.5.

It takes about an hour on two cores. What `--work` holds of an earlier call is used again, and a run that was cut goes
on; empty it after a change to either program.
"""

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.files.atomic import read_json
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.run_dir import RunDir

JOB = Path(__file__).resolve().parent.parent / "jobs" / "eli5-guide.yaml"
BASELINE_TOLERANCE = 1e-5
EPOCH_TOLERANCE = 5e-3
LEARNING_TARGET = 12.5


@dataclass(frozen=True)
class Comparison:
    model: str
    num_blocks: dict[str, int]
    blocks_equal: bool
    num_records: int
    printed: list[float]
    """The peer's perplexity of the untouched model and after each epoch, as it prints it."""
    peer: list[float]
    """The same of the predicted tokens alone."""
    ours: list[float]

    @property
    def passed(self) -> bool:
        deviations = [abs(a / b - 1) for a, b in zip(self.ours, self.peer, strict=True)]
        return (
            self.blocks_equal
            and deviations[0] <= BASELINE_TOLERANCE
            and all(deviation <= EPOCH_TOLERANCE for deviation in deviations[1:])
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("peer", "data", "model", "tokenizer"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=5000, help="records, with --model")
    parser.add_argument("--random-rows", type=int, default=1000, help="records, with the random GPT-2")
    parser.add_argument("--work", type=Path, default=Path("runs/guide-parity"))
    parser.add_argument("--report", type=Path, help="write the figures as Markdown")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)

    random_gpt2 = write_random_gpt2(arguments.tokenizer, work / "random-gpt2")
    comparisons = []
    for name, model, rows in (
        (arguments.model.name, arguments.model.absolute(), arguments.rows),
        ("random GPT-2", random_gpt2, arguments.random_rows),
    ):
        comparisons.append(compare(name, model, rows, arguments, work))
        print(table(comparisons), flush=True)
    learnt = learn(arguments, work)
    text = f"{table(comparisons)}\n\n{learnt_line(learnt)}"
    print(text)
    if arguments.report:
        arguments.report.write_text(f"{heading(arguments)}\n{text}\n")
    return 0 if all(c.passed for c in comparisons) and learnt < LEARNING_TARGET else 1


def write_random_gpt2(tokenizer: Path, directory: Path) -> Path:
    """A small GPT-2 with random weights and no dropout, with a tokenizer beside it."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = GPT2Config(
        vocab_size=len(loaded),
        n_layer=2,
        n_embd=64,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    loaded.save_pretrained(directory)
    return directory


def compare(name: str, model: Path, rows: int, arguments: argparse.Namespace, work: Path) -> Comparison:
    peer = run_peer(model, rows, arguments, work)
    result, store = run_ours(model, rows, arguments, work, f"guide-{model.name}-{rows}")
    manifest = Manifest.read(store / "manifest.json")
    with np.load(peer["blocks"]) as blocks:
        equal = all(
            manifest.splits[split].num_blocks == len(blocks[split])
            and np.array_equal(Blocks(store, split)[np.arange(len(blocks[split]))], blocks[split])
            for split in ("train", "eval")
        )
    losses = [peer["baseline"], *peer["epochs"]]
    size = manifest.block_size
    predicted = 1.0 if peer["loss_shifts_labels"] else size / (size - 1)
    return Comparison(
        model=name,
        num_blocks={split: manifest.splits[split].num_blocks for split in ("train", "eval")},
        blocks_equal=equal,
        num_records=rows,
        printed=[math.exp(loss) for loss in losses],
        peer=[math.exp(loss * predicted) for loss in losses],
        ours=[result["baseline"]["perplexity"], *(e["perplexity"] for e in result["evals"])],
    )


# Runs the peer unchanged, and writes what it does not print: its blocks, and its losses with all digits.
_PEER = """
import json, math, runpy, sys
import numpy as np
sys.argv = sys.argv[1:]
out = sys.argv.pop(1)
state = runpy.run_path(sys.argv[0], run_name="__main__")
names = {"train": "train", "eval": "test"}
np.savez(out + ".npz", **{ours: np.array(state["lm"][theirs]["input_ids"]) for ours, theirs in names.items()})
trainer, figures = state["tr"], state["r"]
losses = {h["epoch"]: h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h}
json.dump({"blocks": out + ".npz", "baseline": math.log(figures["perplexity_before"]), "epochs": list(losses.values()),
           "loss_shifts_labels": trainer._loss_shifts_labels}, open(out, "w"))
"""


def run_peer(model: Path, rows: int, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The peer's blocks (a file) and its losses (untouched, and after each epoch)."""
    out = work / f"peer-{model.name}-{rows}.json"
    command = [sys.executable, "-c", _PEER, str(arguments.peer.absolute()), str(out)]
    command += ["--data", str(arguments.data.absolute()), "--tokenizer", str(model), "--model", str(model)]
    command += ["--rows", str(rows), "--out", str(work / "peer")]
    if not out.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures: dict[str, Any] = read_json(out)
    return figures


def run_ours(
    model: Path, rows: int, arguments: argparse.Namespace, work: Path, name: str, *overrides: str
) -> tuple[dict[str, Any], Path]:
    """The result of the guide's job on the same records, and its store."""
    settings = [
        f"name={name}",
        "data.source=files",
        f"data.path={arguments.data.absolute()}",
        f"data.split='train[:{rows}]'",
        f"model.path={model}",
        *overrides,
    ]
    command = [sys.executable, "-m", "clm_dist", "run", str(JOB)]
    command += ["--runs", str(work / "ours"), "--store", str(work / "store")]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True)
    result: dict[str, Any] = read_json(RunDir(work / "ours" / name).result)
    return result, work / "store" / result["data"]


def learn(arguments: argparse.Namespace, work: Path) -> float:
    """Perplexity after 400 steps at a learning rate of 1e-3."""
    overrides = ("train.learning_rate=1e-3", "train.max_steps=400")
    result, _ = run_ours(arguments.model.absolute(), arguments.rows, arguments, work, "guide-learns", *overrides)
    perplexity: float = result["final"]["perplexity"]
    return perplexity


def table(comparisons: list[Comparison]) -> str:
    lines = [
        "| model | records | blocks (train, eval) | | evaluation | peer, as printed | peer | clm_dist | difference "
        "| bound |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in comparisons:
        for number, (printed, theirs, ours) in enumerate(zip(c.printed, c.peer, c.ours, strict=True)):
            counts = f"{c.num_blocks['train']:,}, {c.num_blocks['eval']:,}"
            equal = "equal" if c.blocks_equal else "DIFFERENT"
            first = [c.model, f"{c.num_records:,}", counts, equal] if number == 0 else [""] * 4
            bound = EPOCH_TOLERANCE if number else BASELINE_TOLERANCE
            name = f"epoch {number}" if number else "untouched"
            figures = [
                f"{printed:.5f}",
                f"{theirs:.5f}",
                f"{ours:.5f}",
                f"{abs(ours / theirs - 1):.1e}",
                f"{bound:.0e}",
            ]
            lines.append(f"| {' | '.join([*first, name, *figures])} |")
    return "\n".join(lines)


def learnt_line(perplexity: float) -> str:
    return f"Learning: perplexity {perplexity:.3f} after 400 steps of 8 blocks at 1e-3 (bound {LEARNING_TARGET})."


def heading(arguments: argparse.Namespace) -> str:
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "ray", "datasets")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"# Parity with the guide\n\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{versions}. One process of the peer with a batch of 8 against two workers of 4.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
