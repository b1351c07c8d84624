"""The architecture of a job's model, without loading it."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError, first_line
from clm_dist.files.hub_errors import describe_hub_error, downloading
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.families import architecture_of, known_families


def model_architecture(job: JobConfig, vocabulary: int) -> tuple[Architecture, str | None]:
    """The architecture of a job's model, and what is to be said of how it is known.

    Args:
        vocabulary: one more than the tokenizer's highest id.

    Raises:
        ConfigError: the model is not there, or of a family without a formula where torch is not installed.
        HubError: the Hub is away.
    """
    values = _values_of(job, vocabulary)
    field = "model.path" if job.model.path else "model.config"
    try:
        found = architecture_of(values)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}", field=field) from None
    return (found, None) if found else _of_built_model(job, vocabulary, str(values.get("model_type")))


def _values_of(job: JobConfig, vocabulary: int) -> dict[str, Any]:
    """The values of the model's configuration."""
    if job.model.config:
        return {"vocab_size": vocabulary} | dict(job.model.config)
    values = read_config(str(job.model.path), job.model.revision)
    if job.model.resize and isinstance(values.get("vocab_size"), int):
        values["vocab_size"] = max(values["vocab_size"], vocabulary)
    return values


def read_config(path: str, revision: str | None) -> dict[str, Any]:
    """The content of a model's config.json. Raises what `model_architecture` raises."""
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        file = Path(path) / "config.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = Path(downloading(hf_hub_download, path, "config.json", revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise describe_hub_error(
                error,
                f"model.path {path} is neither a directory nor reachable on the Hub: {first_line(error)}; check the "
                "spelling, your network and, for a private or gated model, `hf auth login`",
                field="model.path",
            ) from None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path {path} has no config.json that can be read: {first_line(error)}; name a directory that "
            "`save_pretrained` wrote",
            field="model.path",
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path {path}: its config.json is not an object", field="model.path")
    return values


def _of_built_model(job: JobConfig, vocabulary: int, model_type: str) -> tuple[Architecture, str]:
    """The architecture of a model of another family, which is built without weights for its count of parameters."""
    field = "model.path" if job.model.path else "model.config"
    if find_spec("torch") is None:
        raise ConfigError(
            f"{field}: {model_type} has no formula here ({', '.join(known_families())} have), and torch is not "
            "installed to count its parameters; install torch, or plan where it is",
            field=field,
        )
    import torch

    from clm_dist.train.model import build_model, load_config
    from clm_dist.train.probe import Vocabulary

    config = load_config(job, Vocabulary(vocabulary))
    try:
        with torch.device("meta"):
            model: Any = build_model(config)
    except Exception as error:  # whatever a model's constructor raises, its configuration is at fault
        raise ConfigError(f"{field}: no {model_type} can be built: {first_line(error)}", field=field) from error
    number = sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    as_llama = Architecture(
        family=model_type,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        context=getattr(text, "max_position_embeddings", None),
        is_tied=bool(getattr(text, "tie_word_embeddings", False)),
    )
    described = as_llama.with_parameters(number)
    return described, (
        f"{model_type} has no formula here: its parameters are counted in the model itself, and its activations are "
        "taken to be those of a Llama of the same sizes"
    )
