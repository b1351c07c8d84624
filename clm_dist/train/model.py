"""The model to train."""

import contextlib
import difflib
import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError, first_line
from clm_dist.files.blocks import Blocks
from clm_dist.pretrained.tokenizer import num_ids
from clm_dist.pretrained.weights import check_pretrained, load_pretrained, load_pretrained_config
from clm_dist.train.attention import check_attention, set_attention

logger = logging.getLogger(__name__)

_MOST_LAYERS = 10_000
"""Each is objects of Python, also where no weight is loaded."""


def load_config(job: JobConfig, tokenizer: Any | None = None) -> Any:
    """The model's transformers configuration, checked against the job's block size.

    Args:
        tokenizer: the tokenizer whose size and special tokens a model with random weights takes.

    Raises:
        ConfigError: the model is not there or unknown, or its context is shorter than a block.
        HubError: the Hub is away.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if job.model.path:
        config = load_pretrained_config(job.model.path, revision=job.model.revision, field="model.path")
    else:
        try:
            config = _config_of(job.model.config or {}, tokenizer)
        except (ValueError, KeyError, TypeError, NotImplementedError, StrictDataclassError) as error:
            raise ConfigError(f"model.config: {_cause(error)}", field="model.config") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        field = "model.path" if job.model.path else "model.config"
        raise ConfigError(
            f"{field}: {config.model_type} is no causal language model that transformers knows", field=field
        )
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", 0) > _MOST_LAYERS:
        field = "model.path" if job.model.path else "model.config"
        raise ConfigError(
            f"{field}: {text.num_hidden_layers:,} layers, more than the {_MOST_LAYERS:,} that are built", field=field
        )
    context = context_of(config)
    if context is not None and context < job.data.block_size:
        raise ConfigError(
            f"data.block_size is {job.data.block_size}, above the model's context of {context}; "
            f"set data.block_size to {context} or less",
            field="data.block_size",
        )
    set_attention(config, job.model.attention)
    return config


def context_of(config: Any) -> int | None:
    """The most tokens that a model of a configuration sees at once; None where it has no limit."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet says -1.
    return context if context is not None and context > 0 else None


def _config_of(given: dict[str, Any], tokenizer: Any | None) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(given)
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {model_type}{_nearest(model_type, CONFIG_MAPPING)}")
    kind = CONFIG_MAPPING[model_type]
    _check_keys(values, kind)
    if tokenizer is not None:
        of_tokenizer = {
            "vocab_size": num_ids(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        # Where the language model is a part of a model that also sees, its configuration has them.
        text = kind().get_text_config()
        pad_may_be_none = "None" in str(type(text).__annotations__.get("pad_token_id", ""))
        if pad_may_be_none and (text.pad_token_id or 0) >= of_tokenizer["vocab_size"]:
            # It is of the vocabulary that the type is known for, and nothing is padded here.
            of_tokenizer["pad_token_id"] = None
        if "text_config" in kind.sub_configs:
            values["text_config"] = of_tokenizer | (values.get("text_config") or {})
        else:
            values = of_tokenizer | values
    return AutoConfig.for_model(model_type, **values)


def check_tokenizer(job: JobConfig, tokenizer: Any) -> None:
    """Raise ConfigError where the vocabulary that a tokenizer was trained with is not that of the job's model.

    Of a model with random weights, whose vocabulary it is, also where none of that size can be built. Tokens that were
    added to it may have no row, as long as no text has them; see `check_ids`.
    """
    config = load_config(job, tokenizer)
    if job.model.config:
        _check_builds(config, "model.config")
    rows = config.get_text_config().vocab_size
    added = tokenizer.get_added_vocab()
    highest = max((number, token) for token, number in tokenizer.get_vocab().items() if token not in added)
    if highest[0] >= rows and not job.model.resize:
        raise _above(job, rows, f"the tokenizer has the id {highest[0]} ({highest[1]!r})")


def check_ids(job: JobConfig, tokenizer: Any, store: Path) -> None:
    """Raise ConfigError where the blocks hold an id that the job's model has no row for; see also `load_config`."""
    rows = load_config(job, tokenizer).get_text_config().vocab_size
    if num_ids(tokenizer) <= rows or job.model.resize:
        return
    highest = max(Blocks(store, split).highest_id() for split in ("train", "eval"))
    if highest >= rows:
        raise _above(job, rows, f"the blocks hold the id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r})")


def _above(job: JobConfig, rows: int, found: str) -> ConfigError:
    if job.model.path:
        own = "use the model's own tokenizer (leave tokenizer.path out), or " if job.tokenizer.path else ""
        advice = f"{own}set model.resize to true, which gives it rows for them"
    else:
        advice = "leave vocab_size out of model.config"
    field = "tokenizer.path" if job.tokenizer.path else "model"
    return ConfigError(f"{found}, and the embedding of the model has {rows} rows; {advice}", field=field)


def check_model(job: JobConfig) -> None:
    """Raise ConfigError for what would fail in every worker; see `load_config`. Loads no weights."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = load_config(job)
    field = "model.path" if job.model.path else "model.config"
    # XLM says `causal` where the others say `is_decoder`.
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False) or config.is_encoder_decoder
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise ConfigError(
            f"{field}: {config.model_type} is an encoder, which sees the tokens that it is to predict; use a decoder "
            "such as gpt2",
            field=field,
        )
    model = _check_builds(config, field)
    if config.get_text_config().num_hidden_layers < 1:
        raise ConfigError(f"{field}: a model without layers learns nothing; give it one or more", field=field)
    for name in ("layerdrop", "decoder_layerdrop"):
        if getattr(config.get_text_config(), name, 0.0):
            raise ConfigError(
                f"{field}: {name} is {getattr(config.get_text_config(), name)}, so every pass leaves out other layers, "
                f"and workers wait for each other; set {name} to 0 in the model's configuration",
                field=field,
            )
    if job.data.document_mask and (problem := why_no_positions(model)):
        raise ConfigError(problem, field="data.document_mask")
    if job.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"train.gradient_checkpointing is not supported by {type(model).__name__}; set it to false",
            field="train.gradient_checkpointing",
        )
    if job.model.path and Path(job.model.path).is_dir():
        check_pretrained(Path(job.model.path), field="model.path")


def _check_builds(config: Any, field: str) -> Any:
    """The model of a configuration, without weights. Raise ConfigError where there can be none."""
    try:
        with torch.device("meta"):
            return build_model(config)
    except Exception as error:  # whatever a model's constructor raises, its configuration is at fault
        check_attention(config, error, build_model)
        advice = "; set pad_token_id to an id of the tokenizer" if "adding_idx" in str(error) else ""
        raise ConfigError(
            f"{field}: no {config.model_type} can be built: {_cause(error)}{advice}", field=field
        ) from error


def why_no_positions(model: nn.Module) -> str | None:
    """The problem of a model that cannot be told about the documents in a block; None if it can."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        return None
    return (
        f"data.document_mask is not supported by {type(model).__name__}, which takes no position_ids; set it to false, "
        "or use a model such as gpt2 or llama"
    )


def load_model(job: JobConfig, tokenizer: Any) -> nn.Module:
    """The model that training starts from, in fp32, the same on every rank."""
    config = load_config(job, tokenizer)
    config.use_cache = False
    torch.manual_seed(job.train.seed)
    if job.model.path:
        model = load_pretrained(
            job.model.path, field="model.path", config=config, revision=job.model.revision, dtype=torch.float32
        )
        if job.model.resize and num_ids(tokenizer) > config.get_text_config().vocab_size:
            model.resize_token_embeddings(num_ids(tokenizer))
    else:
        # The class itself: `from_config` would shard under ZeRO-3, and shards get other random weights.
        model = build_model(config)
    if job.train.gradient_checkpointing:
        recompute_activations(model)
    assert isinstance(model, nn.Module)
    return model


def recompute_activations(model: Any) -> None:
    """Let a model compute its activations again in the backward pass."""
    # transformers renamed it; 5.17 has the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_model(config: Any) -> nn.Module:
    """A causal language model with random weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Of some models that also see there is a class of the language part alone; AutoModel takes it the same way.
    part = config.sub_configs.get("text_config")
    model: nn.Module = kind(config.get_text_config() if kind.config_class is part else config)
    return model


def set_matrix_products(precision: str) -> None:
    """Let this process multiply fp32 matrices as a job's precision says: on a GPU it may keep fewer bits."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The arithmetic of a forward pass over fp32 weights."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def _check_keys(values: dict[str, Any], kind: Any, where: str = "model.config") -> None:
    """Refuse keys that transformers would take and never read, in the configurations of a model's parts too."""
    from transformers import CONFIG_MAPPING

    default = kind()
    known = {name for name in dir(default) if not name.startswith("_")}
    text = getattr(default, "text_config", None)
    for key in values.keys() - known:
        is_of_text = hasattr(text, key)
        advice = f"; it belongs into text_config: {{{key}: ...}}" if is_of_text else _nearest(key, known)
        raise ConfigError(f"unknown key {where}.{key} of {kind.__name__}{advice}", field=f"{where}.{key}")
    for key in kind.sub_configs.keys() & values.keys():
        if isinstance(values[key], dict):
            part = CONFIG_MAPPING.get(values[key].get("model_type"), type(getattr(default, key)))
            _check_keys(values[key], part, f"{where}.{key}")


def _cause(error: BaseException) -> str:
    """The line of an error of transformers that says the cause; a check of a whole configuration says it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(("Class validation error", "Validation error")):
        return lines[1].removeprefix("ValueError: ") if len(lines) > 1 else lines[0]
    return first_line(error)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
