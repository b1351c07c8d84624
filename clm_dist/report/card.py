"""The model card: README.md of the trained model, and the picture of its loss."""

import json
import re
from pathlib import Path
from typing import Any

from clm_dist import __version__
from clm_dist.config import yaml_text
from clm_dist.config.job import JobConfig
from clm_dist.config.public import changed_fields, data_name, eval_name, hub_dataset, hub_model
from clm_dist.config.shown import shown
from clm_dist.files.atomic import write_text
from clm_dist.files.blocks import Manifest
from clm_dist.files.final import CARD, PICTURE
from clm_dist.files.records import read_records
from clm_dist.files.result import Result, last_figures
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import Samples, read_samples
from clm_dist.report.picture import draw_loss
from clm_dist.report.table import COLUMNS, rows, show
from clm_dist.timing import clock

_HUB = "https://huggingface.co"
_MOST_SAMPLE = 1000


def write_card(directory: Path, run: RunDir, job: JobConfig, result: Result, *, repo: str | None = None) -> None:
    """Write card and picture into a model's directory.

    Args:
        repo: the Hub's name of the model, where it is known.
    """
    starts = (record for record in read_records(run.metrics, last_steps=0) if record["kind"] == "start")
    for start in starts:
        # What a run found, or halved, is what the job says that reproduces it.
        job = job.with_micro_size(start.get("micro_size", job.batch.known_micro_size))
    has_picture = draw_loss(read_records(run.metrics), directory / PICTURE)
    manifest = Manifest.read(run.data) if run.data.is_file() else None
    card = render_card(job, result, manifest, read_samples(run), repo=repo, has_picture=has_picture)
    write_text(directory / CARD, card)


def render_card(
    job: JobConfig,
    result: Result,
    manifest: Manifest | None = None,
    samples: Samples | None = None,
    *,
    repo: str | None = None,
    has_picture: bool = False,
) -> str:
    """The card's Markdown, with the front matter that the Hub reads.

    Args:
        manifest: of the blocks, for their counts.
        repo: the Hub's name of the model, where it is known.
    """
    sections = {
        "": _summary(job, result),
        "Usage": _usage(repo or job.hub.repo or ""),
        "Sample": _sample(samples) if samples else [],
        "Evaluation": _evaluation(job, result, has_picture=has_picture),
        "Data": _data(job, manifest),
        "Training": _training(job, result),
        "Limitations": _limitations(job),
        "Reproduce": _reproduce(job, result),
    }
    lines = [f"---\n{render_front_matter(job, result)}---", "", f"# {job.name}"]
    for heading, section in sections.items():
        if section:
            lines += ["", *([f"## {heading}", ""] if heading else []), *section]
    # A name that is not UTF-8 may be in it.
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace").decode()


def render_front_matter(job: JobConfig, result: Result | None = None) -> str:
    """The YAML that the Hub reads; before there is a result, without figures."""
    dataset = hub_dataset(job)
    final = result["final"] if result else None
    front: dict[str, Any] = {
        **({"language": job.hub.language} if job.hub.language else {}),
        **({"license": job.hub.license} if job.hub.license else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["clm-dist", "generated_from_trainer"],
        **({"base_model": base} if (base := hub_model(job)) else {}),
        **({"datasets": [dataset]} if dataset else {}),
    }
    if final:
        metrics = [
            {"type": name, "name": name, "value": final[name]}
            for name in ("perplexity", "loss", "bits_per_byte")
            if final[name] is not None
        ]
        evaluated_on = {"name": eval_name(job) or data_name(job), "type": dataset or job.data.source}
        results = [{"task": {"type": "text-generation"}, "dataset": evaluated_on, "metrics": metrics}]
        front["model-index"] = [{"name": job.name, "results": results}]
    return yaml_text.dump(front)


def _summary(job: JobConfig, result: Result) -> list[str]:
    base, dataset = hub_model(job), hub_dataset(job)
    if base:
        begun = f"trained from [{base}]({_HUB}/{base})"
    elif job.model.path:
        begun = f"trained from {_code(Path(job.model.path).name)}"
    else:
        begun = f"of type {(job.model.config or {})['model_type']}, trained from random weights"
    on = f"[{dataset}]({_HUB}/datasets/{dataset})" if dataset else _code(data_name(job))
    lines = [f"A causal language model {begun}, on {on}, with clm-dist."]
    if evaluated := last_figures(result):
        before = result["baseline"]
        lines[0] += f" Its perplexity is **{show(evaluated['perplexity'], ',.2f')}**" + (
            f", and was {show(before['perplexity'], ',.2f')} before training." if before else "."
        )
    return lines


def _usage(repo: str) -> list[str]:
    # Without its owner it would be another model of that name, or none.
    place = repo if "/" in repo else "path/to/this/directory"
    code = f'''from transformers import pipeline

generator = pipeline("text-generation", model="{place}")
print(generator("The", max_new_tokens=60)[0]["generated_text"])'''
    return _fenced(code, "python")


def _sample(samples: Samples) -> list[str]:
    lines = [f"What the model writes after {_code(samples['prompt'])}, with the seed {samples['seed']}:", ""]
    for name, text in (("Before training", samples.get("before")), ("After training", samples["after"])):
        if text is not None:
            # A text could end a block of code with fences, but not one that is indented.
            lines += [f"{name}:", "", *(f"    {shown(line, _MOST_SAMPLE)}" for line in text.splitlines()), ""]
    return lines[:-1]


def _evaluation(job: JobConfig, result: Result, *, has_picture: bool) -> list[str]:
    columns = list(COLUMNS)
    table = [list(cells) for cells in rows(result)]
    if losses := result.get("train_losses"):
        place = columns.index("loss")
        columns[place : place + 1] = ["training loss", "eval loss"]
        before = [None] * (len(table) - len(losses))
        for cells, loss in zip(table, [*before, *losses], strict=True):
            cells.insert(place, show(loss, ".4f"))
    lines = [
        f"| {' | '.join(columns)} |",
        f"| --- |{' ---: |' * (len(columns) - 1)}",
        *(f"| {' | '.join(cells)} |" for cells in table),
    ]
    if evaluated := last_figures(result) or result["baseline"]:
        records = f"the {job.data.eval_fraction:.0%} of the records that were held out ({job.data.split_method} split)"
        if job.data.has_own_eval:
            records = f"records of their own ({_code(eval_name(job))})"
        lines += [
            "",
            f"Evaluated on {evaluated['num_tokens']:,} tokens of {records}, in blocks of "
            f"{job.data.block_size} tokens. The baseline is the same model before training"
            + (", and a training loss the mean over the steps since the evaluation before." if losses else "."),
        ]
    if result.get("keep") == "best" and (final := result["final"]):
        lines += ["", f"This is the model of step {final['step']}, the best of all that were evaluated."]
    if has_picture:
        lines += ["", f"![Loss by step]({PICTURE})"]
    return lines


def _data(job: JobConfig, manifest: Manifest | None) -> list[str]:
    data, dataset = job.data, hub_dataset(job)
    source = f"[{dataset}]({_HUB}/datasets/{dataset}), {_code(data.split)}" if dataset else _code(data_name(job))
    lines = [f"- source: {source}"]
    if data.source != "builtin":
        lines.append(f"- text of a record: {_code(data.text)}")
    if data.revision:
        lines.append(f"- revision: {_code(data.revision)}")
    if manifest is None:
        return lines
    lines += ["", "| | records | skipped | documents | tokens | blocks |", f"| --- |{' ---: |' * 5}"]
    for name, split in manifest.splits.items():
        skipped = {reason.replace("_", " "): count for reason, count in split.num_skipped.items() if count}
        why = f" ({', '.join(f'{count:,} {reason}' for reason, count in skipped.items())})" if skipped else ""
        counts = f"{split.num_documents:,} | {split.num_tokens:,} | {split.num_blocks:,}"
        lines.append(f"| {name} | {split.num_records:,} | {sum(skipped.values()):,}{why} | {counts} |")
    return lines


def _training(job: JobConfig, result: Result) -> list[str]:
    batch, train, totals = job.batch, job.train, result["train"]
    falls = f" (falls in the last {train.decay_ratio:.3g} of the steps)" if train.schedule == "wsd" else ""
    warmup = f"{train.warmup_steps} warm-up steps"
    if train.warmup_ratio is not None:
        warmup = f"warm-up in the first {train.warmup_ratio:.3g} of the steps"
    early = f", then stopped: {train.stop_after} evaluations were no better" if result.get("stopped_early") else ""
    optimizer = ", ".join(
        [train.optimizer, *(f"{name} {json.dumps(value)}" for name, value in train.optimizer_options.items())]
    )
    if train.optimizer == "adamw":
        optimizer = f"AdamW, betas {train.adam_beta1:g} and {train.adam_beta2:g}"
    facts = {
        "steps": f"{totals['steps']:,} of {batch.global_size} blocks of {job.data.block_size} tokens{early}",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}{falls}, {warmup}",
        "optimizer": f"{optimizer}, weight decay {train.weight_decay:g}",
        "precision": train.precision,
        "seed": str(train.seed),
        "workers": f"{result['workers']} ({result['strategy']})",
        "time": f"{clock(totals['seconds'])} of training steps, {show(totals['tokens_per_s'], ',.0f')} tokens/s",
        "hardware": result["hardware"]["device"] or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    return [f"- {name}: {value}" for name, value in facts.items()]


def _limitations(job: JobConfig) -> list[str]:
    unknown = (
        "The model was evaluated for its loss on text of the same source, and for nothing else. It may repeat what "
        "is wrong or offensive in that text or in that of its base model."
    )
    return [job.hub.limitations.strip() if job.hub.limitations else unknown]


def _reproduce(job: JobConfig, result: Result) -> list[str]:
    version = result["versions"].get("clm-dist", __version__)
    and_options = " and `data.options` are left out" if job.data.options else ""
    return [
        f"With `job.yaml` as below, in which local paths are names alone{and_options}, and clm-dist {version}:",
        "",
        *_fenced("clm-dist run job.yaml", "bash"),
        "",
        *_fenced(yaml_text.dump(changed_fields(job)).rstrip("\n"), "yaml"),
    ]


def _fenced(text: str, language: str) -> list[str]:
    """A block of code, whatever stands in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def _code(text: str) -> str:
    """Inline code, whatever stands in it, on one line."""
    plain = shown(text, 200).replace("|", "\\|")
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"
