"""The model card: README.md of the trained model."""

from pathlib import Path

from clm_dist.config import yaml_text
from clm_dist.config.job import JobConfig
from clm_dist.files.atomic import write_text
from clm_dist.files.final import CARD
from clm_dist.files.result import Result, last_figures
from clm_dist.report.table import COLUMNS, rows


def write_card(directory: Path, job: JobConfig, result: Result) -> None:
    """Write the card into a model's directory."""
    write_text(directory / CARD, render_card(job, result))


def render_card(job: JobConfig, result: Result) -> str:
    """The card's Markdown, with the front matter that the Hub reads."""
    # The Hub takes ids here, and would take a local path for a wrong one.
    base = job.model.path if job.model.path and _is_hub_id(job.model.path) else None
    dataset = job.data.dataset if job.data.source == "hub" else None
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["clm-dist", "generated_from_trainer"],
        **({"base_model": base} if base else {}),
        **({"datasets": [dataset]} if dataset else {}),
        "model-index": [
            {
                "name": job.name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": _eval_name(job) or _data_name(job), "type": dataset or job.data.source},
                        "metrics": [
                            {"type": name, "name": name, "value": result["final"][name]}
                            for name in ("perplexity", "loss", "bits_per_byte")
                            if result["final"][name] is not None
                        ],
                    }
                ],
            }
        ]
        if result["final"]
        else [],
    }
    start = f"[{base}](https://huggingface.co/{base})" if base else (job.model.path or "random weights")
    lines = [
        f"---\n{yaml_text.dump(front)}---",
        "",
        f"# {job.name}",
        "",
        f"A causal language model, trained from {start} on {_data_name(job)}"
        f"{' (`' + job.data.text + '`)' if job.data.source != 'builtin' else ''} with clm-dist.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| --- |{' ---: |' * (len(COLUMNS) - 1)}",
        *(f"| {' | '.join(cells)} |" for cells in rows(result)),
    ]
    evaluated = last_figures(result) or result["baseline"]
    if evaluated:
        records = f"the {job.data.eval_fraction:.0%} of the records that were held out ({job.data.split_method} split)"
        if job.data.has_own_eval:
            records = f"records of their own ({_eval_name(job)})"
        lines += [
            "",
            f"Evaluated on {evaluated['num_tokens']:,} tokens of {records}, in blocks of "
            f"{job.data.block_size} tokens. The baseline is the same model before training.",
        ]
    lines += ["", "## Training", ""]
    batch, train = job.batch, job.train
    falls = f" (falls in the last {train.decay_ratio:.3g} of the steps)" if train.schedule == "wsd" else ""
    warmup = f"{train.warmup_steps} warm-up steps"
    if train.warmup_ratio is not None:
        warmup = f"warm-up in the first {train.warmup_ratio:.3g} of the steps"
    facts = {
        "steps": f"{result['train']['steps']} of {batch.global_size} blocks of {job.data.block_size} tokens",
        "learning rate": f"{train.learning_rate:g}, {train.schedule}{falls}, {warmup}",
        "optimizer": f"AdamW, betas {train.adam_beta1:g} and {train.adam_beta2:g}, weight decay {train.weight_decay:g}",
        "precision": train.precision,
        "seed": str(train.seed),
        "workers": f"{result['workers']} ({result['strategy']})",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _data_name(job: JobConfig) -> str:
    data = job.data
    if data.source == "hub":
        return f"{data.dataset}, {data.split}"
    if data.source == "builtin":
        return "the Python language reference (pydoc_data.topics)"
    return _names(data.path)


def _eval_name(job: JobConfig) -> str:
    """The files or the split that the eval records are; empty where they are a share of the records."""
    data = job.data
    if not data.has_own_eval:
        return ""
    of = {"hub": data.dataset, "files": _names(data.eval_path or data.path), "builtin": None}[data.source]
    named = [of, data.eval_split]
    return ", ".join(name for name in named if name)


def _names(paths: str | list[str] | None) -> str:
    return ", ".join(Path(path).name for path in ([paths] if isinstance(paths, str) else paths or []))


def _is_hub_id(path: str) -> bool:
    return not Path(path).expanduser().exists() and path.count("/") <= 1 and not path.startswith(("~", ".", "/"))
