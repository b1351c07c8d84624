"""Text from a run or a model, in the guide's two ways."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from clm_dist.config.paths import local_path
from clm_dist.files.final import check_final
from clm_dist.files.run_dir import RunDir
from clm_dist.pretrained.decoding import Sampling as Sampling
from clm_dist.pretrained.decoding import append_ids, ignores_padding
from clm_dist.pretrained.prompts import Prompt, read_prompts, special_parts
from clm_dist.pretrained.streamer import Streamer

_PIPELINE_TOKENS = 256
"""New tokens of transformers' pipeline, where the model's context has room for them."""


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
    model: str, prompts: Sequence[str], *, seed: int, sampling: Sampling | None, device: str = "auto", **options: Any
) -> Iterator[str]:
    """Each prompt with its continuation, in order; a prompt's text depends on the seed and on it alone.

    Args:
        model: directory or Hub id.
        sampling: how `generate` draws; None uses transformers' text-generation `pipeline` with its own defaults.
        options: `batch_size`, `note` and `stream` of `go_on`.

    Raises:
        ConfigError: the model is not there or damaged, or a prompt cannot be gone on from. No text is generated then.
        HubError: the Hub is away.
    """
    import transformers

    from clm_dist.pretrained.tokenizer import load_tokenizer
    from clm_dist.pretrained.weights import load_pretrained

    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(model, slow=True)
    network = load_pretrained(model)
    yield from go_on(network, tokenizer, prompts, model=model, seed=seed, sampling=sampling, device=device, **options)


def go_on(
    network: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    model: str,
    seed: int,
    sampling: Sampling | None,
    device: str = "auto",
    batch_size: int = 1,
    note: Callable[[str], None] = lambda text: None,
    stream: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """What `generate` yields, of a model and a tokenizer that are loaded; `model` names them in messages.

    Args:
        batch_size: prompts that are computed at once, at most. The texts are the same up to rounding.
        note: called with what a person should know about the prompts, before the first text.
        stream: called with each piece of a text as it comes; a batch has one prompt then. The pipeline has one piece.
    """
    import torch
    from transformers import set_seed

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = _PIPELINE_TOKENS if sampling is None else sampling.max_new_tokens
    ready = read_prompts(network, tokenizer, prompts, model=model, most=most, note=note)
    if sampling is None:
        for prompt in ready:
            set_seed(seed)
            text = _pipeline(network, tokenizer, prompt)
            if stream:
                stream(text)
            yield text
        return
    # A token for it may have been added that the model has no row for. It is not seen, so any id will do.
    padding = tokenizer.pad_token_id or 0
    if padding >= network.get_input_embeddings().num_embeddings:
        padding = 0
    for batch in _batches(network, ready, 1 if stream else batch_size, padding):
        streamer = Streamer(tokenizer, stream) if stream else None
        rows, limit = [prompt.ids for prompt in batch], batch[0].limit
        added = append_ids(network, rows, sampling, limit=limit, seed=seed, padding=padding, streamer=streamer)
        for prompt, new in zip(batch, added, strict=True):
            yield tokenizer.decode([*prompt.ids, *new], skip_special_tokens=True)


def _batches(network: Any, prompts: Sequence[Prompt], size: int, padding: int) -> Iterator[Sequence[Prompt]]:
    """The prompts in their order, several at a time that may get as many new tokens.

    Shorter prompts are padded. Of a type of model that computes something else then, only prompts of the same length
    come together.
    """
    pads = size == 1 or len({len(prompt.ids) for prompt in prompts}) == 1 or ignores_padding(network, padding)
    for _, alike in groupby(prompts, key=lambda prompt: (prompt.limit, pads or len(prompt.ids))):
        together = list(alike)
        for begin in range(0, len(together), size):
            yield together[begin : begin + size]


def _pipeline(network: Any, tokenizer: Any, prompt: Prompt) -> str:
    from transformers import pipeline

    generator = pipeline("text-generation", model=network, tokenizer=tokenizer)
    given, options = prompt.text or tokenizer.eos_token or tokenizer.decode(prompt.ids), {}
    before, _, after = special_parts(tokenizer, given)
    if after:
        # The pipeline would go on after the end of a text.
        given, options = tokenizer.decode(before) + given, {"add_special_tokens": False}
    text: str = generator(given, max_new_tokens=prompt.limit, **options)[0]["generated_text"]
    return text.removeprefix(tokenizer.decode(before)) if after else text
