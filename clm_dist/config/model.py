"""The section `model` of a job file."""

import re
from typing import Self

from pydantic import JsonValue, field_validator, model_validator
from pydantic_core import PydanticCustomError

from clm_dist.config.section import Section, wrong

ATTENTIONS = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


class ModelConfig(Section):
    """The model to start from: a checkpoint, or a configuration with random weights."""

    path: str | None = None
    """Directory or Hub id of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit of the Hub model."""
    config: dict[str, JsonValue] | None = None
    """Configuration of a model with random weights: `model_type` and whatever transformers' config of it takes."""
    resize: bool = False
    """Enlarge the embedding of `path` to the ids of the tokenizer, such as added tokens; the new rows are drawn around
    the mean of the others."""
    attention: str = "auto"
    """How attention is computed: `eager`, `sdpa`, `flex_attention`, `flash_attention_2`, `flash_attention_3`, or
    `kernels-community/NAME` for a kernel of the Hub. `auto` is what transformers takes, sdpa for most models."""

    @field_validator("attention")
    @classmethod
    def _is_an_attention(cls, value: str) -> str:
        if value not in ATTENTIONS and not re.fullmatch(r"kernels-community/[\w.-]+(:\w+)?", value):
            raise PydanticCustomError(
                "attention", "input should be {known} or kernels-community/NAME", {"known": ", ".join(ATTENTIONS)}
            )
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.path) == bool(self.config):
            raise wrong("model", "model needs either path (a checkpoint) or config (random weights), and not both")
        if self.resize and not self.path:
            raise wrong(
                "model.resize", "model.resize is for model.path; a model.config has the rows of its vocab_size, or all"
            )
        if self.config and "model_type" not in self.config:
            raise wrong("model.config", "model.config needs model_type, for example gpt2 or llama")
        return self
