"""The commands `evaluate` and `generate`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from clm_dist.cli.options import (
    DEFAULT_STORES,
    Overrides,
    StoreOption,
    is_given,
    located,
    open_stores,
)
from clm_dist.config.data import TokenizerConfig
from clm_dist.config.job import ModelConfig
from clm_dist.config.load import Job, load_job
from clm_dist.config.paths import local_path
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import err, open_progress


def evaluate(
    model: Annotated[str, typer.Argument(help="Run directory, model directory or Hub id.")],
    job_file: Annotated[
        Path | None, typer.Option("--job", help="Job whose eval split is used; a run directory has its own.")
    ] = None,
    overrides: Overrides = None,
    stores: StoreOption = DEFAULT_STORES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a model on a job's eval split: loss, perplexity, bits per byte."""
    from clm_dist.generate import find_model
    from clm_dist.prepare.pipeline import prepare
    from clm_dist.train.evaluate import evaluate_model
    from clm_dist.train.model import load_config

    path = find_model(model)
    saved = RunDir(local_path(model, "MODEL")).job
    if job_file is None and not saved.is_file():
        raise ConfigError(f"{model} is no run directory, so name the job whose eval split to use: --job JOB")
    job = load_job(job_file or saved, overrides or ())
    update: dict[str, Any] = {"model": ModelConfig(path=path)}
    if job_file is not None or overrides:
        # A model is measured on its own tokens: another tokenizer's ids mean nothing to it.
        update["tokenizer"] = TokenizerConfig(path=path)
    # The lines that name the job's own model and tokenizer are not where an error of this model comes from.
    origins = {field: place for field, place in job.origins.items() if field.partition(".")[0] not in update}
    config = job.config.model_copy(update=update)
    with located(Job(config, origins)), open_progress(err) as progress:
        load_config(config)
        # The untouched job of a run keeps the tokenizer that it names, and so the blocks that are there already.
        tokens = config if "tokenizer" in update else job.config
        store = prepare(tokens, open_stores(stores), progress)
        evaluation = evaluate_model(path, config, store.local, progress)
    figures: Mapping[str, Any] = evaluation.figures()
    if as_json:
        typer.echo(json.dumps({name: figures[name] for name in _FIGURES}))
    else:
        typer.echo(", ".join(f"{name.replace('_', ' ')} {_shown(figures[name])}" for name in _FIGURES))


_FIGURES = ("loss", "perplexity", "bits_per_byte", "num_tokens")


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


def _shown(value: float | int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
