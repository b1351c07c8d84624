"""The model to train, and the loss of a batch."""

import difflib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from clm_dist.config import JobConfig
from clm_dist.errors import ConfigError

logger = logging.getLogger(__name__)


def load_config(job: JobConfig, tokenizer: Any | None = None) -> Any:
    """The model's transformers configuration, checked against the job's block size.

    Args:
        tokenizer: the tokenizer whose size and special tokens a model with random weights takes.

    Raises:
        ConfigError: the model is not reachable or unknown, or its context is shorter than a block.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        if job.model.path:
            config = AutoConfig.from_pretrained(job.model.path, revision=job.model.revision)
        else:
            assert job.model.config is not None
            values = dict(job.model.config)
            if tokenizer is not None:
                values = {
                    "vocab_size": len(tokenizer),
                    "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                } | values
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            _check_keys(values, type(config))
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is no causal language model that transformers knows")
    except OSError as error:
        raise ConfigError(
            f"model.path {job.model.path} is neither a model's directory nor reachable on the Hub: "
            f"{_first_line(error)}; check the spelling, your network and, for a gated model, `hf auth login`",
            field="model.path",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        field = "model.path" if job.model.path else "model.config"
        raise ConfigError(f"{field}: {_first_line(error)}", field=field) from None
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and job.data.block_size > context:
        raise ConfigError(
            f"data.block_size is {job.data.block_size}, above the model's context of {context}; "
            f"set data.block_size to {context} or less",
            field="data.block_size",
        )
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {config.vocab_size}; "
            "use the model's own tokenizer (leave tokenizer.path out)",
            field="tokenizer.path" if job.tokenizer.path else "model",
        )
    return config


def load_model(job: JobConfig, tokenizer: Any) -> nn.Module:
    """The model that training starts from, in fp32, the same on every rank."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = load_config(job, tokenizer)
    config.use_cache = False
    torch.manual_seed(job.train.seed)
    if job.model.path:
        model = AutoModelForCausalLM.from_pretrained(
            job.model.path, config=config, revision=job.model.revision, dtype=torch.float32
        )
    else:
        # The class itself: `from_config` would shard under ZeRO-3, and shards get other random weights.
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    if job.train.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"train.gradient_checkpointing is not supported by {type(model).__name__}; set it to false",
                field="train.gradient_checkpointing",
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(model, nn.Module)
    return model


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Nats of every predicted token, (B, T - 1) float32.

    Position t predicts token t + 1. No label is masked: a block holds no padding, and an end-of-sequence token is a
    token to learn like any other.
    """
    # The last position's label is padded and its loss cut off: cutting the logits would copy them (25 % slower).
    labels_BT = pad(ids_BT[:, 1:], (0, 1), value=-100)
    losses = cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="none")
    return losses.view_as(ids_BT)[:, :-1]


def _check_keys(values: dict[str, Any], kind: type) -> None:
    """Refuse keys that transformers would take and never read."""
    known = {name for name in dir(kind()) if not name.startswith("_")}
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown key model.config.{key} of {kind.__name__}{advice}", field=f"model.config.{key}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
