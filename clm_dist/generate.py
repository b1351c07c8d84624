"""Text from a run or a model, in the guide's two ways."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clm_dist.config.paths import local_path
from clm_dist.errors import ConfigError
from clm_dist.files.final import check_final
from clm_dist.files.run_dir import RunDir


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the guide's own values."""

    max_new_tokens: int = 100
    top_k: int = 50
    top_p: float = 0.95
    temperature: float = 1.0
    greedy: bool = False


def find_model(model: str) -> str:
    """A model's directory or Hub id; of a run directory, the model that it wrote.

    Raises:
        ConfigError: the run has written no model yet, or its files are damaged, or no path can be so.
    """
    run = RunDir(local_path(model, "MODEL"))
    if not run.exists():
        return str(run.root) if run.root.is_dir() else model
    check_final(run)
    return str(run.final)


def generate(
    model: str, prompts: Sequence[str], *, seed: int, sampling: Sampling | None, device: str = "auto"
) -> Iterator[str]:
    """Each prompt with its continuation, in order; a prompt's text depends on the seed and on it alone.

    Args:
        model: directory or Hub id.
        sampling: how `generate` draws; None uses transformers' text-generation `pipeline` with its own defaults.

    Raises:
        ConfigError: the model is not there or damaged, or a prompt fills its context.
        HubError: the Hub is away.
    """
    import transformers

    from clm_dist.pretrained.tokenizer import load_tokenizer
    from clm_dist.pretrained.weights import load_pretrained

    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(model, slow=True)
    yield from go_on(
        load_pretrained(model), tokenizer, prompts, model=model, seed=seed, sampling=sampling, device=device
    )


def go_on(
    network: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    model: str,
    seed: int,
    sampling: Sampling | None,
    device: str = "auto",
) -> Iterator[str]:
    """What `generate` yields, of a model and a tokenizer that are loaded; `model` names them in messages."""
    import torch
    from transformers import set_seed

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for prompt in prompts:
        set_seed(seed)
        ids = _encode(tokenizer, prompt).to(device)
        rows = network.get_input_embeddings().num_embeddings
        if ids.max() >= rows:
            raise ConfigError(
                f"the prompt {prompt[:40]!r}... has the id {int(ids.max())}, and the embedding of {model} has {rows} "
                "rows: the tokenizer beside it is that of another model; put its own there"
            )
        room = _room(network.config, ids.shape[1], prompt)
        if sampling is None:
            yield _pipeline(network, tokenizer, prompt, room)
            continue
        draw = (
            {"do_sample": False}
            if sampling.greedy
            else {
                "do_sample": True,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "temperature": sampling.temperature,
            }
        )
        with torch.no_grad():
            output = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(sampling.max_new_tokens, room),
                pad_token_id=tokenizer.pad_token_id,
                **draw,
            )
        yield tokenizer.decode(output[0], skip_special_tokens=True)


def _pipeline(network: Any, tokenizer: Any, prompt: str, room: int) -> str:
    from transformers import pipeline

    generator = pipeline("text-generation", model=network, tokenizer=tokenizer)
    given, options = prompt or tokenizer.eos_token, {}
    before, _, after = _parts(tokenizer, given)
    if after:
        # The pipeline would go on after the end of a text.
        given, options = tokenizer.decode(before) + given, {"add_special_tokens": False}
    # The pipeline's own 256 new tokens, where the model's context has room for them.
    text: str = generator(given, max_new_tokens=min(256, room), **options)[0]["generated_text"]
    return text.removeprefix(tokenizer.decode(before)) if after else text


def _encode(tokenizer: Any, prompt: str) -> Any:
    import torch

    before, own, after = _parts(tokenizer, prompt)
    ids = [*before, *own]
    if not ids:
        # Generation needs something to go on from.
        firsts = (tokenizer.bos_token_id, tokenizer.eos_token_id, *after)
        ids = [first for first in firsts if first is not None][:1]
    return torch.tensor([ids])


def _parts(tokenizer: Any, prompt: str) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a prompt, its own ids, and the special tokens that would end it."""
    own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt)["input_ids"]
    for start in range(len(whole) - len(own) + 1):
        end = start + len(own)
        if whole[start:end] == own:
            return whole[:start], own, whole[end:]
    return [], whole, []


def _room(config: Any, num_tokens: int, prompt: str) -> int:
    context = getattr(config, "max_position_embeddings", None) or 2**20
    if num_tokens >= context:
        raise ConfigError(
            f"the prompt {prompt[:40]!r}... has {num_tokens} tokens, the model's context {context}; shorten the prompt"
        )
    return int(context - num_tokens)
