"""How a model computes attention: transformers keeps it in the configuration."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from clm_dist.errors import ConfigError, first_line
from clm_dist.pretrained.passing import raise_if_passing


def attention_of(config: Any) -> str:
    """The name of the attention that a model of this configuration computes with."""
    return str(config.get_text_config()._attn_implementation)


def set_attention(config: Any, name: str) -> None:
    """Let models of a configuration compute attention as a job's `model.attention` says."""
    if name != "auto":
        config._attn_implementation = name


def attention_options(name: str) -> dict[str, str]:
    """What `from_pretrained` is told of a job's `model.attention`."""
    return {} if name == "auto" else {"attn_implementation": name}


def check_attention(config: Any, error: Exception, build: Callable[[Any], Any]) -> None:
    """Raise ConfigError where a model that could not be built can be with the attention that transformers takes.

    Args:
        error: why it could not.
        build: builds a model of a configuration.
    """
    others = copy.deepcopy(config)
    others._attn_implementation = None
    try:
        with torch.device("meta"):
            build(others)
    except Exception:  # so it is another part of the configuration
        return
    name = attention_of(config)
    # A kernel of the Hub may be out of reach.
    raise_if_passing(error, f"model.attention {name}")
    install = "; pip install flash-attn" if name == "flash_attention_2" and isinstance(error, ImportError) else ""
    problem = f"model.attention: {name} cannot be used: {first_line(error)}{install}, or leave model.attention out"
    raise ConfigError(problem, field="model.attention") from error
