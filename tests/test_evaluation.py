"""`evaluate` on documents of files and on stores: windows, accuracy, intervals, categories, and several processes."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.figures import figures_by_category
from clm_dist.files.atomic import read_json
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import bootstrap_interval
from clm_dist.prepare.texts import read_texts
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.progress import Silent
from clm_dist.train.windows import Windows
from tests.conftest import MakeJob, WriteJob
from tests.support.command import Said, clm_dist

Evaluate = Callable[..., Said]
CONTEXT = 24


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stores: Path) -> Evaluate:
    return lambda *arguments: clm_dist(capsys, monkeypatch, "evaluate", *arguments, "--store", stores)


def figures(said: Said) -> dict[str, Any]:
    assert said.code == 0, said.err
    printed: dict[str, Any] = json.loads(said.out)
    return printed


@pytest.fixture(scope="module")
def store(finished_run: RunDir, stores: Path) -> Path:
    return stores / str(read_json(finished_run.result)["data"])


@pytest.fixture(scope="module")
def model(finished_run: RunDir) -> Any:
    return AutoModelForCausalLM.from_pretrained(finished_run.final).eval()


@pytest.fixture(scope="module")
def tokenizer(finished_run: RunDir) -> Any:
    return AutoTokenizer.from_pretrained(finished_run.final)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Documents of one window and of several, of three kinds, and records without any."""
    words = "The import statement binds a name in the local namespace, and é may be in it. "
    records = [{"text": words * n, "kind": kind} for n, kind in ((1, "a"), (3, "b"), (2, "a"), (5, None), (1, "b"))]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"text": "", "kind": "a"}]))
    return path


def ids_of(tokenizer: Any, texts: Path) -> list[list[int]]:
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    return [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines if line]


def slid(model: Any, ids: list[int], context: int, stride: int) -> tuple[float, int, int]:
    """Loss sum, predicted and likeliest tokens of a text, as the fixed-length perplexity of transformers' guide slides.

    Its example multiplies the mean of a later window by one token less than it is the mean of; here it is the sum.
    """
    loss, predicted, likeliest = 0.0, 0, 0
    previous_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([ids[begin:end]])
        target = window.clone()
        target[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            output = model(window, labels=target)
        valid = target[0, 1:] != -100
        loss += output.loss.item() * int(valid.sum()) if valid.any() else 0.0
        predicted += int(valid.sum())
        likeliest += int((output.logits[0, :-1].argmax(-1) == window[0, 1:])[valid].sum())
        previous_end = end
        if end == len(ids):
            break
    return loss, predicted, likeliest


@pytest.mark.parametrize("stride", [1, 5, 23, 24, None])
def test_a_sliding_context_is_that_of_transformers_guide(
    stride: int | None, evaluate: Evaluate, finished_run: RunDir, model: Any, tokenizer: Any, texts: Path
) -> None:
    options = ("--context", CONTEXT, *(("--stride", stride) if stride else ()))
    found = figures(evaluate(finished_run.root, "--file", texts, *options, "--json"))
    documents = ids_of(tokenizer, texts)
    assert max(map(len, documents)) > 3 * CONTEXT > min(map(len, documents))
    # By default windows overlap by a token, so that each but a document's first is predicted once.
    sums = [slid(model, ids, CONTEXT, stride or CONTEXT - 1) for ids in documents]
    loss, predicted, likeliest = (sum(values) for values in zip(*sums, strict=True))
    assert found["num_tokens"] == predicted
    if stride != CONTEXT:
        assert predicted == sum(len(ids) - 1 for ids in documents)
    assert found["loss"] == pytest.approx(loss / predicted, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / predicted), rel=1e-5)
    assert found["accuracy"] == likeliest / predicted
    assert (found["context"], found["stride"]) == (CONTEXT, stride or CONTEXT - 1)
    assert found["num_documents"] == len(documents)
    if stride == CONTEXT:
        assert found["bits_per_byte"] is None
        return
    num_bytes = sum(len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode()) for ids in documents)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-5)


def test_categories_have_the_figures_of_their_documents(
    evaluate: Evaluate, finished_run: RunDir, model: Any, tokenizer: Any, texts: Path
) -> None:
    options = (finished_run.root, "--file", texts, "--by", "kind")
    found = figures(evaluate(*options, "--json"))
    documents = ids_of(tokenizer, texts)
    # The fourth has none.
    expected = {"(none)": [3], "b": [1, 4], "a": [0, 2]}
    assert list(found["categories"]) == list(expected)
    for name, numbers in expected.items():
        sums = [slid(model, documents[number], 128, 127) for number in numbers]
        loss, predicted, _ = (sum(values) for values in zip(*sums, strict=True))
        category = found["categories"][name]
        assert (category["num_documents"], category["num_tokens"]) == (len(numbers), predicted)
        # Documents of one window: the perplexity of each is what the metric of `evaluate` gives of it.
        assert category["perplexity"] == pytest.approx(math.exp(loss / predicted), rel=1e-5)
        assert (category["interval"] is None) == (len(numbers) == 1)
    assert sum(category["num_tokens"] for category in found["categories"].values()) == found["num_tokens"]
    said = evaluate(*options)
    assert [line.split()[0] for line in said.out.splitlines() if line.startswith("  ") and line.strip()][1:] == list(
        expected
    )
    assert "5 documents of 6 records (1 empty records skipped)" in " ".join(said.err.split())


def test_any_number_of_processes_gives_the_same_bits(
    evaluate: Evaluate, finished_run: RunDir, store: Path, texts: Path
) -> None:
    """Three processes have two batches, so one of them has none."""
    for what in (("--file", texts, "--context", CONTEXT, "--set", "eval.micro_size=7"), ("--blocks", store)):
        alone, *several = (
            figures(evaluate(finished_run.final, *what, "--workers", number, "--json")) for number in (1, 2, 3)
        )
        assert several == [alone, alone]


def test_a_store_needs_no_job(
    evaluate: Evaluate, finished_run: RunDir, store: Path, tmp_path: Path, texts: Path
) -> None:
    final = json.loads(finished_run.result.read_text())["final"]
    found = figures(evaluate(finished_run.final, "--blocks", store, "--json"))
    assert {name: found[name] for name in ("loss", "bits_per_byte", "num_tokens")} == {
        name: final[name] for name in ("loss", "bits_per_byte", "num_tokens")
    }
    assert found["num_documents"] == 9
    said = evaluate(finished_run.final, "--blocks", tmp_path)
    assert (said.code, "is no store; name the directory that `clm-dist prepare` prints" in said.err) == (2, True)
    said = evaluate(finished_run.final, "--blocks", store, "--file", texts)
    assert (said.code, "leave out --file and --job" in said.err) == (2, True)


def test_blocks_above_the_model_s_context_are_refused(evaluate: Evaluate, run: RunDir, store: Path, model: Any) -> None:
    config = read_json(run.final / "config.json")
    (run.final / "config.json").write_text(json.dumps(config | {"n_positions": 16, "n_ctx": 16}))
    said = evaluate(run.final, "--blocks", store)
    assert said.code == 2
    assert f"have 32 tokens, above the context of {run.final}, which is 16; name blocks of at most that" in said.err


def test_blocks_of_another_tokenizer_are_refused(evaluate: Evaluate, run: RunDir, store: Path) -> None:
    content = json.loads((run.final / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (run.final / "tokenizer.json").write_text(json.dumps(content))
    said = evaluate(run.final, "--blocks", store)
    assert (said.code, "are of another tokenizer than that of" in said.err) == (2, True)


def test_a_stride_goes_over_the_whole_eval_split(
    evaluate: Evaluate, finished_run: RunDir, store: Path, model: Any
) -> None:
    found = figures(evaluate(finished_run.root, "--stride", 20, "--json"))
    blocks = Blocks(store, "eval")
    stream = blocks[np.arange(len(blocks))].ravel().tolist()
    loss, predicted, likeliest = slid(model, stream, blocks.block_size, 20)
    assert found["num_tokens"] == predicted == len(stream) - 1
    assert found["loss"] == pytest.approx(loss / predicted, rel=1e-5)
    assert found["accuracy"] == likeliest / predicted
    # Each token has more before it than in blocks, whose first tokens have nothing.
    assert found["loss"] != figures(evaluate(finished_run.root, "--json"))["loss"]
    said = evaluate(finished_run.root, "--stride", 33)
    assert (said.code, "--stride 33 is more than the 32 tokens of a window; name 32 or fewer" in said.err) == (2, True)
    said = evaluate(finished_run.root, "--stride", 4, "--set", "data.grouping=guide")
    assert (said.code, "--stride needs blocks without gaps" in said.err) == (2, True)


def test_blocks_without_ends_of_documents_count_for_themselves(evaluate: Evaluate, finished_run: RunDir) -> None:
    found = figures(evaluate(finished_run.root, "--set", "data.append_eos=false", "--json"))
    assert found["interval_by"] == "block"
    assert found["num_documents"] * 31 == found["num_tokens"]


def test_a_stretch_of_text_is_in_the_windows_that_it_should_be() -> None:
    windows = Windows.of_texts(np.arange(6, dtype=np.uint32), np.array([0, 6]), context=4, stride=2)
    batch = windows.batch(0, 2)
    assert batch.ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert batch.counts.tolist() == [[True] * 3, [False, True, True]]
    # A text of one token has nothing to predict, and no window.
    offsets = np.array([0, 1, 8, 8, 10])
    windows = Windows.of_texts(np.arange(10, dtype=np.uint32), offsets, context=3, stride=2)
    counted = [
        (int(token), int(document))
        for batch in (windows.batch(start, start + 2) for start in range(0, len(windows), 2))
        for token, document in zip(batch.ids[:, 1:][batch.counts], batch.documents[batch.counts], strict=True)
    ]
    assert sorted(counted) == [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (9, 3)]


def test_an_interval_is_as_wide_as_the_documents_differ() -> None:
    generator = np.random.default_rng(5)
    losses = generator.normal(100.0, 10.0, size=2000)
    tokens = np.full(2000, 50)
    found = bootstrap_interval(losses, tokens)
    assert found
    low, high = found
    half = 1.96 * losses.std() / math.sqrt(2000) / 50
    assert low < losses.sum() / tokens.sum() < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert bootstrap_interval(losses, tokens) == found
    assert bootstrap_interval(losses[:1], tokens[:1]) is None
    # A document weighs by its tokens: in a mean of means these would differ.
    assert bootstrap_interval(np.array([1.0, 30.0]), np.array([1, 30])) == (1.0, 1.0)


def test_a_file_of_text_is_read_as_text_whatever_the_job_reads(
    evaluate: Evaluate, run: RunDir, tmp_path: Path, tokenizer: Any
) -> None:
    job = run.job.read_text().replace("  text: text\n", "  text: answers.text\n")
    assert "answers.text" in job
    run.job.write_text(job)
    (tmp_path / "notes.txt").write_text("The first line.\nThe second line.\n")
    found = figures(evaluate(run.root, "--file", tmp_path / "notes.txt", "--json"))
    lines = [tokenizer(line)["input_ids"] for line in ("The first line.", "The second line.")]
    assert (found["num_documents"], found["num_tokens"]) == (2, sum(len(ids) - 1 for ids in lines))
    found = figures(evaluate(run.root, "--file", tmp_path / "notes.txt", "--set", "data.records=file", "--json"))
    assert found["num_documents"] == 1
    # A model that is of no run reads the field `text`, and sees what its configuration says.
    (tmp_path / "a.jsonl").write_text('{"text": "one two", "n": 1}\n')
    assert figures(evaluate(run.final, "--file", tmp_path / "a.jsonl", "--json"))["context"] == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "is no run directory, so say what to evaluate it on: --job JOB, --file PATH or --blocks DIR"),
        (("--by", "kind"), "--by needs the documents of --file"),
        (("--context", "8"), "--context needs the documents of --file"),
        (("--file", "{}", "--by", "sort"), "--by sort is not in {}; its fields are: text, kind, tags"),
        (("--file", "{}", "--by", "tags"), "--by tags is a list in each record; name a field with one value"),
        (("--file", "{}", "--context", "129"), "--context 129 is above the model's context of 128; name 128 or fewer"),
        (("--file", "{}", "--context", "8", "--stride", "9"), "--stride 9 is more than the 8 tokens of a window"),
        (("--file", "{}", "--set", "data.text=kind"), "no document has two tokens, so there is nothing to predict"),
        (("--file", "{}", "--set", "data.text=body"), "data.text body is not in {}; its fields are: text, kind, tags"),
        (("--file", "{}", "--set", "data.text=none"), "data.text none is"),
        (("--file", "missing.jsonl"), "missing.jsonl"),
        (
            ("--file", "{}", "--set", "data.block_size=64"),
            "--set data.block_size says nothing of the documents of --file; leave it out, and name the tokens of",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    options: tuple[str, ...], message: str, evaluate: Evaluate, finished_run: RunDir, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two", "kind": "a", "tags": ["x", "y"]}\n')
    said = evaluate(finished_run.final, *(option.format(path) for option in options))
    assert said.code == 2
    assert message.format(path) in said.err


@pytest.mark.parametrize(("split", "texts"), [("train[:3]", "abc"), ("train[2:4]", "cd"), ("train[50%:]", "efgh")])
def test_a_slice_is_of_all_files_together(
    split: str, texts: str, evaluate: Evaluate, finished_run: RunDir, tmp_path: Path, tokenizer: Any
) -> None:
    for name, letters in (("1.jsonl", "abcd"), ("2.jsonl", "efgh")):
        lines = [json.dumps({"text": f"{letter} is a letter" * (ord(letter) - 90)}) for letter in letters]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    options = ("--file", f"{tmp_path}/*.jsonl", "--set", f"data.split='{split}'")
    found = figures(evaluate(finished_run.root, *options, "--json"))
    wanted = [f"{letter} is a letter" * (ord(letter) - 90) for letter in texts]
    assert found["num_documents"] == len(wanted)
    windows = [len(tokenizer(text)["input_ids"]) - 1 for text in wanted]
    assert found["num_tokens"] == sum(windows)


def test_files_are_read_as_the_job_reads_its_own(
    evaluate: Evaluate, finished_run: RunDir, write_job: WriteJob, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("The first line.\nThe second.\n\nA second paragraph.\n")
    (tmp_path / "latin.csv").write_bytes("body;score\nun café noir;3\nun thé vert;1\n".encode("latin-1"))
    csv = ("data.encoding=latin-1", "data.delimiter=';'", "data.text=body", "data.score=score", "data.min_score=2")
    for file, settings, count in (
        ("notes.txt", ("data.records=file",), 1),
        ("notes.txt", ("data.records=paragraph",), 2),
        ("notes.txt", (), 3),
        ("notes.txt", csv[2:], 3),
        ("latin.csv", csv, 1),
    ):
        job = write_job("model.config.n_positions=128", "data.path=missing", *settings)
        found = figures(evaluate(finished_run.final, "--job", job, "--file", tmp_path / file, "--json"))
        assert found["num_documents"] == count


def test_a_store_whose_counts_are_others_gives_no_figures(
    evaluate: Evaluate, finished_run: RunDir, store: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(store, tmp_path / "changed"))
    manifest = read_json(changed / "manifest.json")
    manifest["splits"]["eval"]["num_blocks"] += 1
    (changed / "manifest.json").write_text(json.dumps(manifest))
    said = evaluate(finished_run.final, "--blocks", changed)
    assert (said.code, "the evaluation covers 775 tokens, the split in" in said.err) == (2, True)


def test_a_mask_needs_blocks_whose_documents_end(
    evaluate: Evaluate, finished_run: RunDir, make_job: MakeJob, prepared: Callable[[JobConfig], Path]
) -> None:
    blocks = prepared(make_job("data.append_eos=false"))
    said = evaluate(finished_run.final, "--blocks", blocks, "--set", "data.document_mask=true")
    assert said.code == 2
    assert f"the documents of the blocks in {blocks} have no ends" in said.err


def test_a_category_without_a_predicted_token_is_listed(
    evaluate: Evaluate, finished_run: RunDir, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two", "kind": "long"}\n{"text": "a", "kind": "short"}\n')
    short = figures(evaluate(finished_run.root, "--file", path, "--by", "kind", "--json"))["categories"]["short"]
    assert (short["num_tokens"], short["num_documents"], short["loss"], short["interval"]) == (0, 0, None, None)
    said = evaluate(finished_run.root, "--file", path, "--by", "kind")
    assert said.out.splitlines()[1] == "windows of 128 tokens, 127 from one to the next"
    assert "unknown" in next(line for line in said.out.splitlines() if "short" in line)


def test_a_process_that_is_killed_is_told_with_what_helps(
    evaluate: Evaluate, finished_run: RunDir, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clm_dist.train.scores._score_rank", killed)
    said = evaluate(finished_run.root, "--file", texts, "--workers", 2)
    assert said.code == 2
    assert "a process of the evaluation ended (" in said.err
    assert "name fewer --workers, or lower eval.micro_size" in said.err


def killed(rank: int, world_size: int, task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_intervals_of_many_documents_and_categories_take_their_share_of_the_time() -> None:
    generator = np.random.default_rng(3)
    losses, tokens = generator.normal(100.0, 10.0, size=300_000), np.full(300_000, 50)
    found = bootstrap_interval(losses, tokens, num_shares=100)
    assert found
    half = 1.96 * losses.std() / math.sqrt(len(losses)) / 50
    assert (found[1] - found[0]) / 2 == pytest.approx(half, rel=0.2)
    kinds = [f"{'long' * 500} {number % 5000}" for number in range(50_000)]
    sums = [losses[:50_000], tokens[:50_000], np.zeros(50_000, np.int64)]
    categories = figures_by_category(kinds, sums, np.full(50_000, 100))
    assert len(categories) == 5000
    chosen = np.arange(50_000) % 5000 == 7
    seventh = categories[f"{'long' * 500} 7"]
    assert seventh["loss"] == pytest.approx(losses[:50_000][chosen].sum() / (50 * 10), rel=1e-12)
    assert seventh["bits_per_byte"] == pytest.approx(losses[:50_000][chosen].sum() / math.log(2) / 1000, rel=1e-12)


def test_the_bytes_of_a_document_are_those_of_its_predicted_tokens(shared: Path, tmp_path: Path) -> None:
    """Where the tokenizer puts a token before a text, all of the text is predicted; else all but the first token."""
    texts = ["Once upon a time é.", "The dog."]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    data = DataConfig(source="files", path=str(tmp_path / "texts.txt"))
    for name, first in (("stories260K", ["", ""]), ("gpt2-tokenizer", ["Once", "The"])):
        found = read_texts(data, load_tokenizer(shared / "models" / name), Silent())
        expected = [len(text.removeprefix(word).encode()) for text, word in zip(texts, first, strict=True)]
        assert found.num_bytes.tolist() == expected
