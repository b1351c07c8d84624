"""What `evaluate` says of a model that is written: on the blocks of a store, or on the documents of files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.config.data import TokenizerConfig
from clm_dist.config.job import JobConfig
from clm_dist.config.load import Job, load_job, located, make_job
from clm_dist.config.model import ModelConfig
from clm_dist.config.paths import local_path
from clm_dist.errors import ConfigError, DataError
from clm_dist.figures import figures_by_category, figures_of
from clm_dist.files.blocks import EVAL_BYTES, Manifest
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Stores
from clm_dist.progress import Progress

_READING = ("text", "join", "records", "encoding", "delimiter", "field", "score", "min_score")
"""Fields of `data` that say how documents are read."""
MOST_CONTEXT = 1024
"""Tokens of a window where neither the call nor a job says how many, and the model takes more."""


@dataclass(frozen=True)
class Evaluated:
    """The figures of a model on some text."""

    figures: dict[str, Any]
    """loss (nats a token), perplexity, bits_per_byte, num_tokens (predicted), accuracy (share of them that the model
    found likeliest), num_documents, and interval: of loss and perplexity, 95 %, or None."""
    categories: dict[str, dict[str, Any]] | None
    """The same for each category, most tokens first."""
    unit: str
    """What the interval is drawn by: `document`, or `block` where blocks do not tell where documents end."""
    context: int
    stride: int

    def as_json(self) -> dict[str, Any]:
        about = {"interval_by": self.unit, "context": self.context, "stride": self.stride}
        return self.figures | about | ({} if self.categories is None else {"categories": self.categories})


def evaluate_model(
    model: str,
    stores: Stores,
    progress: Progress,
    *,
    job_file: Path | None = None,
    overrides: Sequence[str] = (),
    files: Sequence[str] = (),
    blocks: Path | None = None,
    category: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    num_processes: int = 1,
) -> Evaluated:
    """The figures of a model on the eval split of its run or of a job, on a store's, or on documents of files.

    Args:
        model: run directory, model directory or Hub id.
        job_file: job whose eval split is used, instead of that of the model's run; with files, how they are read.
        overrides: `section.field=value` each, over that job.
        files: text, JSON, CSV or Parquet, each by path, glob or URL.
        blocks: directory of a store.
        category, context: see `evaluate_texts`; with files.
        stride: tokens from one window to the next; what overlaps is context.
        num_processes: that share the work.

    Raises:
        ConfigError, DataError: these do not go together, or see `evaluate_texts` and `evaluate_store`.
    """
    from clm_dist.generate import find_model
    from clm_dist.prepare.pipeline import prepare
    from clm_dist.train.model import context_of, load_config

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
        job = _job_of_files(path, files, named, overrides)
    elif named is None:
        job = _job_of_blocks(path, overrides)
    else:
        job = load_job(named, overrides)
    update: dict[str, Any] = {"model": ModelConfig(path=path, attention=job.config.model.attention)}
    if job_file is not None or overrides or files:
        # A model is measured on its own tokens: another tokenizer's ids mean nothing to it.
        update["tokenizer"] = TokenizerConfig(path=path)
    # The lines that name the job's own model and tokenizer are not where an error of this model comes from.
    origins = {field: place for field, place in job.origins.items() if field.partition(".")[0] not in update}
    config = job.config.model_copy(update=update)
    with located(Job(config, origins)):
        if files:
            return evaluate_texts(
                path,
                config,
                progress,
                context=context,
                stride=stride,
                category=category,
                num_processes=num_processes,
            )
        most = context_of(load_config(config))
        if blocks:
            store = find_store(blocks, path, most)
        else:
            # The untouched job of a run keeps the tokenizer that it names, and so the blocks that are there.
            store = prepare(config if "tokenizer" in update else job.config, stores, progress).local
        return evaluate_store(path, config, store, progress, stride=stride, num_processes=num_processes)


def _job_of_files(path: str, files: Sequence[str], named: Path | None, overrides: Sequence[str]) -> Job:
    """A job whose records are those of some files, read and computed as the named job says."""
    from clm_dist.prepare.data_file import DataFile

    for override in overrides:
        field = override.partition("=")[0]
        if field.startswith("data.") and field.removeprefix("data.") not in (*_READING, "split"):
            raise ConfigError(
                f"--set {field} says nothing of the documents of --file; leave it out"
                + (", and name the tokens of a window with --context" if field == "data.block_size" else "")
            )
    values: dict[str, Any] = {"name": "evaluate", "model": {"path": path}, "data": {}}
    if named is not None:
        values = load_job(named).config.model_dump(mode="json")
    kept = {name: values["data"][name] for name in _READING if name in values["data"]}
    if not kept.get("records") and any(DataFile(file, 0).kind_by_suffix == "text" for file in files):
        # Its records have no other field.
        kept |= {"text": "text", "score": None, "min_score": None}
    # No blocks are cut, so none is larger than the model's context.
    values["data"] = kept | {"source": "files", "path": files, "block_size": 2}
    return make_job(values, overrides, path=named or Path("--file"))


def _job_of_blocks(path: str, overrides: Sequence[str]) -> Job:
    """A job that says how a model computes, where nothing is prepared."""
    values = {"name": "evaluate", "model": {"path": path}, "data": {"source": "builtin", "block_size": 2}}
    return make_job(values, overrides, path=Path("--blocks"))


def find_store(directory: Path, model: str, context: int | None) -> Path:
    """The directory of a store that is for a model. Raises ConfigError where it is none, or of another vocabulary.

    Args:
        context: the most tokens that the model sees at once; None where it has no limit.
    """
    from clm_dist.pretrained.tokenizer import load_tokenizer

    if not (directory / "manifest.json").is_file():
        raise ConfigError(f"--blocks {directory} is no store; name the directory that `clm-dist prepare` prints")
    if load_tokenizer(directory / "tokenizer").get_vocab() != load_tokenizer(model).get_vocab():
        raise ConfigError(
            f"the blocks in {directory} are of another tokenizer than that of {model}, to which their ids mean "
            "something else; evaluate it on their text, with --job or --file"
        )
    size = Manifest.read(directory / "manifest.json").block_size
    if context is not None and size > context:
        raise ConfigError(
            f"the blocks in {directory} have {size} tokens, above the context of {model}, which is {context}; name "
            "blocks of at most that"
        )
    return directory


def evaluate_store(
    path: str, job: JobConfig, store: Path, progress: Progress, *, stride: int | None = None, num_processes: int = 1
) -> Evaluated:
    """The figures of a model on a store's eval split; without a stride on its blocks as they are.

    Raises:
        ConfigError, DataError: see `train.scores.score`; or blocks do not follow each other without gaps.
    """
    from clm_dist.train.documents import document_end_of
    from clm_dist.train.evaluate import num_eval_tokens
    from clm_dist.train.scores import score
    from clm_dist.train.windows import Windows, check_stride

    manifest = Manifest.read(store / "manifest.json")
    made_with = manifest.source.get("data", {})
    check_stride(manifest.block_size, stride)
    if stride is not None and made_with.get("grouping") == "guide":
        raise ConfigError("--stride needs blocks without gaps between them; set data.grouping to carry")
    ends, masked = bool(made_with.get("append_eos")), job.data.document_mask
    if masked and not ends:
        raise ConfigError(
            f"data.document_mask is true, and the documents of the blocks in {store} have no ends (data.append_eos was "
            "false); set data.document_mask to false",
            field="data.document_mask",
        )
    expected = num_eval_tokens(manifest, document_mask=masked)
    document_end = document_end_of(store) if ends else None
    windows = Windows.of_store(store, stride=stride, document_end=document_end)
    _begin(progress, len(windows), job, num_processes)
    scores = score(
        path,
        job,
        windows,
        document_mask=document_end if masked else None,
        num_processes=num_processes,
        on_batch=progress.update,
    )
    if stride is None and (found := int(scores.num_tokens.sum())) != expected:
        raise DataError(f"the evaluation covers {found} tokens, the split in {store} has {expected}; prepare it again")
    # With a stride other tokens are predicted than those whose bytes the store knows.
    num_bytes = int(np.load(store / EVAL_BYTES, mmap_mode="r")[:, int(masked)].sum()) if stride is None else None
    sums = [scores.loss_sums, scores.num_tokens, scores.num_correct]
    figures = figures_of(sums, num_bytes, loss_sum=scores.loss_sum)
    unit = "document" if ends else "block"
    return Evaluated(figures, None, unit, manifest.block_size, stride or manifest.block_size)


def evaluate_texts(
    path: str,
    job: JobConfig,
    progress: Progress,
    *,
    context: int | None = None,
    stride: int | None = None,
    category: str | None = None,
    num_processes: int = 1,
) -> Evaluated:
    """The figures of a model on all documents of a job's `data`, each for itself.

    Args:
        context: tokens of a window; None takes as many as the model sees, at most MOST_CONTEXT.
        stride: of the windows; None lets each begin with the last token of the one before, so that every token of a
            document but its first is predicted once.
        category: dotted path of a field of the records; its values get figures of their own.

    Raises:
        ConfigError, DataError: see `train.scores.score` and `prepare.texts.read_texts`; or the model sees less.
    """
    from clm_dist.prepare.texts import read_texts
    from clm_dist.pretrained.tokenizer import load_tokenizer
    from clm_dist.train.model import context_of, load_config
    from clm_dist.train.scores import score
    from clm_dist.train.windows import Windows, check_stride

    most = context_of(load_config(job))
    context = context or min(most or MOST_CONTEXT, MOST_CONTEXT)
    if most is not None and context > most:
        raise ConfigError(f"--context {context} is above the model's context of {most}; name {most} or fewer")
    check_stride(context, stride)
    stride = stride or max(1, context - 1)
    texts = read_texts(job.data, load_tokenizer(path), progress, category=category)
    skipped = ", ".join(f"{count:,} {reason} records skipped" for reason, count in texts.num_skipped.items())
    progress.note(f"{len(texts.num_bytes):,} documents of {texts.num_records:,} records{skipped and f' ({skipped})'}")
    windows = Windows.of_texts(texts.ids, texts.offsets, context=context, stride=stride)
    _begin(progress, len(windows), job, num_processes)
    scores = score(path, job, windows, num_processes=num_processes, on_batch=progress.update)
    sums = [scores.loss_sums, scores.num_tokens, scores.num_correct]
    # Where windows have no token in common, the first of each is not predicted.
    num_bytes = texts.num_bytes if stride < context else None
    total = None if num_bytes is None else int(num_bytes.sum())
    figures = figures_of(sums, total, loss_sum=scores.loss_sum)
    categories = None
    if texts.categories is not None:
        categories = figures_by_category(texts.categories, sums, num_bytes)
    return Evaluated(figures, categories, "document", context, stride)


def _begin(progress: Progress, num_windows: int, job: JobConfig, num_processes: int) -> None:
    if num_processes == 1:
        progress.start("Evaluating", total=-(-num_windows // job.eval.micro_size), unit="batch")
    else:
        progress.start(f"Evaluating in {num_processes} processes")
