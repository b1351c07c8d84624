"""Text from a run or a model, in the guide's two ways."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clm_dist.config.paths import local_path
from clm_dist.errors import ConfigError, first_line
from clm_dist.files.hub_errors import describe_hub_error
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
        ConfigError: the run has written no model yet, or no path can be so.
    """
    run = RunDir(local_path(model, "MODEL"))
    if not run.exists():
        return str(run.root) if run.root.is_dir() else model
    if not run.final.is_dir():
        raise ConfigError(f"the run {model} has no final model yet; `clm-dist run {run.job}` goes on with it")
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
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        message = f"{model} is neither a run, a model's directory nor reachable on the Hub: {first_line(error)}"
        raise describe_hub_error(error, message) from None
    except Exception as error:  # whatever the libraries raise over files that are damaged
        raise ConfigError(
            f"the model of {model} does not load: {first_line(error)}; if its files are damaged or do not belong "
            "together, write or download them again"
        ) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for prompt in prompts:
        set_seed(seed)
        ids = _encode(tokenizer, prompt).to(device)
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
    # The pipeline's own 256 new tokens, where the model's context has room for them.
    text: str = generator(prompt or tokenizer.eos_token, max_new_tokens=min(256, room))[0]["generated_text"]
    return text


def _encode(tokenizer: Any, prompt: str) -> Any:
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        # Generation needs something to go on from.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[first]])
    return ids.long()


def _room(config: Any, num_tokens: int, prompt: str) -> int:
    context = getattr(config, "max_position_embeddings", None) or 2**20
    if num_tokens >= context:
        raise ConfigError(
            f"the prompt {prompt[:40]!r}... has {num_tokens} tokens, the model's context {context}; shorten the prompt"
        )
    return int(context - num_tokens)
