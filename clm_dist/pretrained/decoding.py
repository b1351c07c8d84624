"""Ids that a model appends to others, several rows at once: each row gets what it gets alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the guide's own values."""

    max_new_tokens: int = 100
    top_k: int = 50
    top_p: float = 0.95
    temperature: float = 1.0
    greedy: bool = False


def append_ids(
    network: Any,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    limit: int,
    seed: int,
    padding: int,
    streamer: Any = None,
) -> list[list[int]]:
    """The new ids of each row, up to the end of its text. Every row is drawn with the seed, as if it was alone.

    Args:
        limit: new ids of a row at most.
        padding: id that is put before shorter rows, which the model does not see.
        streamer: takes ids as they come; for one row alone.
    """
    width = max(map(len, rows))
    output = _run(network, rows, width, sampling, limit=limit, seed=seed, padding=padding, streamer=streamer)
    ends = network.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [_until_end(row[width:], ends) for row in output.tolist()]


def ignores_padding(network: Any, padding: int) -> bool:
    """Whether the model computes the same of ids with padding before them; some types do not mask it.

    Tried with eight different ids and eight that are drawn. A difference of rounding counts as the same.
    """
    import torch

    row, drawn = list(range(8)), Sampling(top_k=0, top_p=1.0)
    scores = [
        torch.stack(_run(network, [row], width, drawn, limit=8, seed=0, padding=padding, output_logits=True).logits)
        for width in (8, 14)
    ]
    if scores[0].shape != scores[1].shape:
        # One of the texts ended before the other.
        return False
    rounding = torch.finfo(network.dtype).eps ** 0.5
    return bool((scores[0] - scores[1]).abs().max() <= rounding * scores[0].abs().max())


def _run(
    network: Any,
    rows: Sequence[Sequence[int]],
    width: int,
    sampling: Sampling,
    *,
    limit: int,
    seed: int,
    padding: int,
    streamer: Any = None,
    output_logits: bool = False,
) -> Any:
    import torch

    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=network.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=network.device)
    options: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        options = {
            "do_sample": True,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
            "custom_generate": _draw_rows(seed, streamer),
        }
    if getattr(network.config, "output_router_logits", False):
        # transformers 5.24 computes the router's loss then, and fails where there are several rows.
        options["output_router_logits"] = False
    with torch.no_grad():
        return network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=limit,
            pad_token_id=padding,
            num_beams=1,
            num_return_sequences=1,
            streamer=streamer,
            output_logits=output_logits,
            return_dict_in_generate=output_logits,
            **options,
        )


def _draw_rows(seed: int, streamer: Any) -> Callable[..., Any]:
    """transformers' sampling, but each row has a generator of its own: what it draws does not depend on the others."""
    import torch

    def sample(model: Any, input_ids: Any, *, logits_processor: Any, **rest: Any) -> Any:
        generators = [torch.Generator(input_ids.device).manual_seed(seed) for _ in input_ids]

        def draw(_ids: Any, scores: Any) -> Any:
            chosen = [
                torch.multinomial(row.softmax(-1), num_samples=1, generator=generator)
                for row, generator in zip(scores, generators, strict=True)
            ]
            # With a single id that is possible, the draw that follows takes it.
            return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(chosen), 0.0)

        logits_processor.append(draw)
        return model._sample(input_ids, logits_processor=logits_processor, streamer=streamer, **rest)

    return sample


def _until_end(ids: list[int], ends: Sequence[int | None]) -> list[int]:
    """The ids up to the first that ends a text; what follows fills the row up."""
    first = next((place for place, each in enumerate(ids) if each in ends), len(ids))
    return ids[: first + 1]
