"""Prompts as ids, checked against the model that goes on from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clm_dist.config.shown import shown
from clm_dist.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """A prompt that a model can go on from."""

    text: str
    ids: list[int]
    limit: int
    """New tokens at most: those that were asked for, or those for which the context has room."""


def read_prompts(
    network: Any, tokenizer: Any, texts: Sequence[str], *, model: str, most: int, note: Callable[[str], None]
) -> list[Prompt]:
    """The prompts of a model, all of them checked.

    Args:
        model: names the model in messages.
        most: new tokens that were asked for.
        note: called with what is limited by the context, and with what an empty prompt begins with.

    Raises:
        ConfigError: a prompt fills the context, or has an id that the model does not have, or none at all.
    """
    config = network.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 2**20
    num_rows = network.get_input_embeddings().num_embeddings
    prompts = []
    for number, text in enumerate(texts, 1):
        named = f"the prompt {shown(text, 40)!r}" + (f" ({number} of {len(texts)})" if len(texts) > 1 else "")
        ids = encode(tokenizer, text)
        if not ids:
            raise ConfigError(
                f"{named} is empty, and the tokenizer of {model} has no token to begin with; write a word"
            )
        if max(ids) >= num_rows:
            raise ConfigError(
                f"{named} has the id {max(ids)}, and the embedding of {model} has {num_rows} rows: the tokenizer "
                "beside it is that of another model; put its own there"
            )
        if len(ids) >= context:
            raise ConfigError(f"{named} has {len(ids)} tokens, the model's context {context}; shorten the prompt")
        prompts.append(Prompt(text, ids, min(most, context - len(ids))))
    if any(not text for text in texts):
        note(f"an empty prompt begins with {tokenizer.decode(encode(tokenizer, ''))!r}")
    if limited := [prompt for prompt in prompts if prompt.limit < most]:
        first = limited[0]
        begin = f"{len(limited)} of {len(texts)} prompts leave" if len(texts) > 1 else "the prompt leaves"
        note(
            f"{begin} less room than {most} new tokens in the model's context of {context}: "
            f"{shown(first.text, 40)!r} has {len(first.ids)} tokens, and goes on for {first.limit} at most"
        )
    return prompts


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """The ids to go on from: without what would end the text. Empty where no token can begin a text."""
    before, own, after = special_parts(tokenizer, prompt)
    firsts = (tokenizer.bos_token_id, tokenizer.eos_token_id, *after)
    # Generation needs something to go on from.
    return [*before, *own] or [first for first in firsts if first is not None][:1]


def special_parts(tokenizer: Any, prompt: str) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a prompt, its own ids, and the special tokens that would end it."""
    own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt)["input_ids"]
    for start in range(len(whole) - len(own) + 1):
        end = start + len(own)
        if whole[start:end] == own:
            return whole[:start], own, whole[end:]
    return [], whole, []
