"""The command `evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from clm_dist.cli.options import DEFAULT_STORES, Overrides, StoreOption, located, open_stores
from clm_dist.config.data import TokenizerConfig
from clm_dist.config.job import ModelConfig
from clm_dist.config.load import Job, load_job, make_job
from clm_dist.config.paths import local_path
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import err, open_progress, out

if TYPE_CHECKING:
    from clm_dist.evaluation import Evaluated

_FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy", "num_tokens")


def evaluate(
    model: Annotated[str, typer.Argument(help="Run directory, model directory or Hub id.")],
    job_file: Annotated[
        Path | None, typer.Option("--job", help="Job whose eval split is used; a run directory has its own.")
    ] = None,
    overrides: Overrides = None,
    stores: StoreOption = DEFAULT_STORES,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="PATH", help="Text, JSON, CSV or Parquet to evaluate on instead; repeatable."),
    ] = None,
    blocks: Annotated[
        Path | None, typer.Option("--blocks", metavar="DIR", help="Directory of a prepared store, instead of a job's.")
    ] = None,
    category: Annotated[
        str | None, typer.Option("--by", metavar="FIELD", help="With --file: figures for each value of this field.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="With --file: tokens that the model sees at once.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; what overlaps is context.")
    ] = None,
    num_processes: Annotated[int, typer.Option("--workers", min=1, help="Processes that share the work.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a model: loss, perplexity, bits per byte, token accuracy, and an interval by document."""
    from clm_dist.evaluation import evaluate_store, evaluate_texts, find_store
    from clm_dist.generate import find_model
    from clm_dist.prepare.pipeline import prepare
    from clm_dist.train.model import load_config

    if blocks and (files or job_file):
        raise ConfigError("--blocks is a store already; leave out --file and --job")
    if not files and (category or context):
        raise ConfigError(f"{'--by' if category else '--context'} needs the documents of --file")
    path = find_model(model)
    saved = RunDir(local_path(model, "MODEL")).job
    named = job_file or (saved if saved.is_file() else None)
    if named is None and not files and not blocks:
        raise ConfigError(
            f"{model} is no run directory, so say what to evaluate it on: --job JOB, --file PATH or --blocks DIR"
        )
    if files:
        job = _job_of_files(path, files, named, overrides or ())
    elif named is None:
        job = _job_of_blocks(path, overrides or ())
    else:
        job = load_job(named, overrides or ())
    update: dict[str, Any] = {"model": ModelConfig(path=path)}
    if job_file is not None or overrides or files:
        # A model is measured on its own tokens: another tokenizer's ids mean nothing to it.
        update["tokenizer"] = TokenizerConfig(path=path)
    # The lines that name the job's own model and tokenizer are not where an error of this model comes from.
    origins = {field: place for field, place in job.origins.items() if field.partition(".")[0] not in update}
    config = job.config.model_copy(update=update)
    with located(Job(config, origins)), open_progress(err) as progress:
        if files:
            evaluated = evaluate_texts(
                path,
                config,
                progress,
                context=context,
                stride=stride,
                category=category,
                num_processes=num_processes,
            )
        else:
            load_config(config)
            if blocks:
                store = find_store(blocks, path)
            else:
                # The untouched job of a run keeps the tokenizer that it names, and so the blocks that are there.
                tokens = config if "tokenizer" in update else job.config
                store = prepare(tokens, open_stores(stores), progress).local
            evaluated = evaluate_store(path, config, store, progress, stride=stride, num_processes=num_processes)
    if as_json:
        typer.echo(json.dumps(evaluated.as_json()))
    else:
        _print_figures(evaluated)


def _job_of_files(path: str, files: list[str], named: Path | None, overrides: Sequence[str]) -> Job:
    """A job whose records are those of some files, read and computed as the named job says."""
    from clm_dist.prepare.data_file import DataFile

    values: dict[str, Any] = {"name": "evaluate", "model": {"path": path}, "data": {}}
    if named is not None:
        values = load_job(named).config.model_dump(mode="json")
    kept = {name: values["data"][name] for name in ("text", "join") if name in values["data"]}
    if any(DataFile(file, 0).kind_by_suffix == "text" for file in files):
        kept = {"text": "text"}
    # No blocks are cut, so none is larger than the model's context.
    values["data"] = kept | {"source": "files", "path": files, "block_size": 2}
    return make_job(values, overrides, path=named or Path("--file"))


def _job_of_blocks(path: str, overrides: Sequence[str]) -> Job:
    """A job that says how a model computes, where nothing is prepared."""
    values = {"name": "evaluate", "model": {"path": path}, "data": {"source": "builtin"}}
    return make_job(values, overrides, path=Path("--blocks"))


def _print_figures(evaluated: "Evaluated") -> None:
    typer.echo(", ".join(f"{name.replace('_', ' ')} {_shown(name, evaluated.figures)}" for name in _FIGURES))
    num, unit = evaluated.figures["num_documents"], evaluated.unit
    if evaluated.figures["interval"]:
        low, high = evaluated.figures["interval"]["perplexity"]
        typer.echo(f"perplexity {_number(low)} to {_number(high)} (95 % interval, by {unit}: {num:,} of them)")
    if evaluated.categories is not None:
        table = Table(box=box.SIMPLE_HEAVY)
        for column in ("category", "documents", "tokens", "perplexity", "95 % interval", "accuracy"):
            table.add_column(column, justify="left" if column == "category" else "right", overflow="fold")
        for name, figures in evaluated.categories.items():
            ends = figures["interval"]["perplexity"] if figures["interval"] else None
            table.add_row(
                name,
                f"{figures['num_documents']:,}",
                f"{figures['num_tokens']:,}",
                _number(figures["perplexity"]),
                f"{_number(ends[0])} to {_number(ends[1])}" if ends else "-",
                f"{figures['accuracy']:.1%}",
            )
        out.print(table)


def _shown(name: str, figures: dict[str, Any]) -> str:
    value = figures[name]
    if value is None:
        return "unknown"
    if name == "accuracy":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else _number(value)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.6g}"
