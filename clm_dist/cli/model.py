"""The command `generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.options import (
    is_given,
)
from clm_dist.errors import ConfigError


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Run directory, model directory or Hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from; repeatable.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="File with a prompt a line; - or nothing at all is standard input.")
    ] = None,
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
    """Generate text from prompts."""
    from clm_dist import generate as stage

    sampled = ("max_new_tokens", "top_k", "top_p", "temperature", "greedy")
    given = [f"--{name.replace('_', '-')}" for name in sampled if is_given(context, name)]
    if use_pipeline and given:
        raise ConfigError(
            f"--pipeline has defaults of its own and takes no {', '.join(given)}; leave out the one or the other"
        )
    path = stage.find_model(model)
    sampling = None if use_pipeline else stage.Sampling(max_new_tokens, top_k, top_p, temperature, greedy)
    for text in stage.generate(path, _prompts(prompt, file), seed=seed, sampling=sampling):
        typer.echo(text)
        typer.echo()


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    if given and file:
        raise ConfigError("give prompts with --prompt or with --file, not both")
    try:
        if given:
            prompts = given
        else:
            text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
            prompts = [line for line in text.splitlines() if line.strip()]
        for prompt in prompts:
            prompt.encode()  # Python accepts bytes that are not text on the command line.
    except OSError as error:
        raise ConfigError(f"cannot read the prompts in {file}: {error.strerror}") from None
    except UnicodeError as error:
        where = f" in {file}" if file else ""
        raise ConfigError(f"the prompts{where} are not UTF-8 text: {error}; convert them, e.g. with iconv") from None
    if not prompts:
        raise ConfigError("there is no prompt; give one with --prompt, a file of them with --file, or standard input")
    return prompts
