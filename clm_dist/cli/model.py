"""The command `generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.complete import complete_run
from clm_dist.cli.options import (
    is_given,
)
from clm_dist.cli.prompts import open_texts, read_prompts, say
from clm_dist.config.shown import printable
from clm_dist.errors import ConfigError


def generate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Run directory, model directory or Hub id.", autocompletion=complete_run)
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from; repeatable.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            help="File with a prompt a line, or of JSON lines (.jsonl) with a field prompt; - or nothing at all is "
            "standard input.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New file for JSON lines with prompt and text, each as it is done; - prints them."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="With --out: prompts that are computed at once.")
    ] = 8,
    use_pipeline: Annotated[
        bool, typer.Option("--pipeline", help="transformers' text-generation pipeline with its own defaults.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    top_k: Annotated[int, typer.Option(min=0)] = 50,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same text.")] = 42,
) -> None:
    """Generate text from prompts. It is printed as it comes, or written to a file of JSON lines."""
    from clm_dist import generate as stage

    sampled = ("max_new_tokens", "top_k", "top_p", "temperature", "greedy", "batch_size")
    given = [f"--{name.replace('_', '-')}" for name in sampled if is_given(context, name)]
    if use_pipeline and given:
        raise ConfigError(
            f"--pipeline has defaults of its own and takes no {', '.join(given)}; leave out the one or the other"
        )
    if out is None and is_given(context, "batch_size"):
        raise ConfigError("--batch-size is only for --out; without it each text is printed as it comes")
    prompts = read_prompts(prompt, file)
    path = stage.find_model(model)
    sampling = None if use_pipeline else stage.Sampling(max_new_tokens, top_k, top_p, temperature, greedy)
    if out is None:
        for _ in stage.generate(path, prompts, seed=seed, sampling=sampling, note=say, stream=_print_piece):
            typer.echo("\n")
        return
    with open_texts(out) as (write, progress):
        progress.start("Generating", total=len(prompts), unit="prompt")
        texts = stage.generate(path, prompts, seed=seed, sampling=sampling, batch_size=batch_size, note=progress.note)
        for number, (given_prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            write(given_prompt, text)
            progress.update(number)


def _print_piece(text: str) -> None:
    # What a model writes may move the cursor or name the window; a file gets it as it is.
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
