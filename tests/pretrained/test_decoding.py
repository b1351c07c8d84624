"""Prompts that are computed together have the texts that they have alone, and pieces of a text are the text."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from clm_dist.files.run_dir import RunDir
from clm_dist.generate import Sampling, go_on
from clm_dist.pretrained.decoding import append_ids, ignores_padding
from clm_dist.pretrained.streamer import Streamer
from tests.support.architectures import ARCHITECTURES

PROMPTS = ["The import statement", "A", "class", "The rule of the names is that", "", "In", "of the", "is"]
GREEDY, SAMPLED = Sampling(12, greedy=True), Sampling(12)


@pytest.fixture
def tokenizer(finished_run: RunDir) -> Any:
    return AutoTokenizer.from_pretrained(finished_run.final)


def network_of(model_type: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **ARCHITECTURES[model_type]})
    network = AutoModelForCausalLM.from_config(config)
    for parameter in network.parameters():
        parameter.data.mul_(2)  # what is drawn at random is nearly the same everywhere
    # Texts end at different tokens.
    network.generation_config.eos_token_id = list(range(40, 60))
    return network


class Shapes:
    """Keeps the rows, their length and the new ids of every call of a model's `generate`."""

    def __init__(self, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int, int]] = []
        generate = network.generate

        def kept(ids: Any, **options: Any) -> Any:
            self.seen.append((*ids.shape, options["max_new_tokens"]))
            return generate(ids, **options)

        monkeypatch.setattr(network, "generate", kept)


def texts(network: Any, tokenizer: Any, sampling: Sampling, **options: Any) -> list[str]:
    return list(go_on(network, tokenizer, PROMPTS, model="m", seed=3, sampling=sampling, device="cpu", **options))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "bart", "rwkv"])
def test_a_text_of_a_batch_is_that_of_its_prompt_alone(
    tokenizer: Any, model_type: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(model_type, tokenizer)
    alone = texts(network, tokenizer, sampling)
    assert len(set(alone)) == 8
    assert len({len(tokenizer(text)["input_ids"]) for text in alone}) > 2
    shapes = Shapes(network, monkeypatch)
    assert texts(network, tokenizer, sampling, batch_size=8) == alone
    if model_type in ("bart", "rwkv"):
        # They see the padding, so only neighbours of the same length are together.
        assert not ignores_padding(network, 0)
        assert max(rows for rows, _, _ in shapes.seen) < 3
    else:
        assert [rows for rows, _, _ in shapes.seen] == [1, 1, 8]
        assert texts(network, tokenizer, sampling, batch_size=3) == alone


def test_what_fills_a_row_that_has_ended_is_not_its_text(tokenizer: Any) -> None:
    network = network_of("gpt2", tokenizer).eval()
    rows = [[5, 6, 7], [8, 9, 10, 11, 12], [20], [3, 4]]
    options: dict[str, Any] = {"limit": 30, "seed": 3, "padding": 5}
    alone = [append_ids(network, [row], Sampling(), **options)[0] for row in rows]
    assert len(set(map(len, alone))) > 2
    assert append_ids(network, rows, Sampling(), **options) == alone


def test_a_padding_token_that_the_model_has_no_row_for_is_not_used(tokenizer: Any) -> None:
    network = network_of("gpt2", tokenizer)
    alone = texts(network, tokenizer, GREEDY)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == network.config.vocab_size
    assert texts(network, tokenizer, GREEDY, batch_size=8) == alone


def test_prompts_with_less_room_are_not_computed_with_others(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("gpt2", tokenizer)
    network.generation_config.eos_token_id = None
    long = tokenizer.decode(tokenizer("The rule of the names " * 20)["input_ids"][:60])
    assert len(tokenizer(long)["input_ids"]) == 60
    given = ["A", "B", long, long, "C"]
    notes: list[str] = []
    shapes = Shapes(network, monkeypatch)
    options: dict[str, Any] = {"model": "m", "seed": 0, "sampling": GREEDY, "device": "cpu"}
    list(go_on(network, tokenizer, given, batch_size=8, note=notes.append, **options))
    # A learned embedding has no position after the context.
    assert shapes.seen[2:] == [(2, 1, 12), (2, 60, 4), (1, 1, 12)]
    assert notes == [
        "2 of 5 prompts leave less room than 12 new tokens in the model's context of 64: "
        f"'{long[:40]}...' has 60 tokens, and goes on for 4 at most"
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_pieces_of_a_text_are_the_text(tokenizer: Any, sampling: Sampling) -> None:
    network = network_of("llama", tokenizer)
    pieces: list[str] = []
    streamed = texts(network, tokenizer, sampling, stream=pieces.append, batch_size=8)
    assert streamed == texts(network, tokenizer, sampling)
    assert "".join(pieces) == "".join(streamed)
    assert len(pieces) > 3 * len(PROMPTS)


def test_a_piece_has_whole_characters(tokenizer: Any) -> None:
    pieces: list[str] = []
    streamer = Streamer(tokenizer, pieces.append)
    ids = tokenizer("Café ☕")["input_ids"]
    assert len(ids) > 6
    for each in ids:
        streamer.put(torch.tensor([each]))
    streamer.end()
    assert "".join(pieces) == "Café ☕"
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:2] == ["C", "a"]


def test_a_text_that_changes_before_its_end_is_told_again() -> None:
    class Cleaning:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(["do", "n", "'t"][each] for each in ids).replace(" n 't", "n't")

    pieces: list[str] = []
    streamer = Streamer(Cleaning(), pieces.append)
    for each in range(3):
        streamer.put(torch.tensor([each]))
    streamer.end()
    assert pieces == ["do", " n", "\ndon't"]
