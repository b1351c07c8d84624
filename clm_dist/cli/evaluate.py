"""The command `evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from clm_dist.cli.complete import complete_job, complete_run
from clm_dist.cli.options import Overrides, StoreOption, open_stores
from clm_dist.files.stores import DEFAULT_STORES
from clm_dist.progress import err, open_progress, out

if TYPE_CHECKING:
    from clm_dist.evaluation import Evaluated

_FIGURES = ("loss", "perplexity", "bits_per_byte", "accuracy", "num_tokens")


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Run directory, model directory or Hub id.", autocompletion=complete_run)
    ],
    job_file: Annotated[
        Path | None,
        typer.Option(
            "--job", autocompletion=complete_job, help="Job whose eval split is used; a run directory has its own."
        ),
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
    from clm_dist.evaluation import evaluate_model

    with open_progress(err) as progress:
        evaluated = evaluate_model(
            model,
            open_stores(stores),
            progress,
            job_file=job_file,
            overrides=overrides or (),
            files=files or (),
            blocks=blocks,
            category=category,
            context=context,
            stride=stride,
            num_processes=num_processes,
        )
    if as_json:
        typer.echo(json.dumps(evaluated.as_json()))
    else:
        _print_figures(evaluated)


def _print_figures(evaluated: "Evaluated") -> None:
    typer.echo(", ".join(f"{name.replace('_', ' ')} {_shown(name, evaluated.figures)}" for name in _FIGURES))
    typer.echo(f"windows of {evaluated.context:,} tokens, {evaluated.stride:,} from one to the next")
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
                _shown("perplexity", figures),
                f"{_number(ends[0])} to {_number(ends[1])}" if ends else "-",
                _shown("accuracy", figures),
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
