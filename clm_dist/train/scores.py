"""A written model's figures on windows of text: losses and correct tokens by document, in one process or several."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, ConfigError, DataError, first_line
from clm_dist.pretrained.weights import load_pretrained
from clm_dist.train.attention import attention_options
from clm_dist.train.evaluate import enough_memory
from clm_dist.train.forward import WithLoss, block_logits, unwrapped
from clm_dist.train.local import run_ranks
from clm_dist.train.loss import next_token_loss
from clm_dist.train.mixing import find_mixing
from clm_dist.train.model import autocast, set_matrix_products
from clm_dist.train.windows import Batch, Windows


@dataclass(frozen=True)
class Scores:
    """Sums over the predicted tokens of each document, (num_documents,) each."""

    loss_sum: float
    """Over all documents, nats; added up in the order of the batches, whichever process ran them."""
    loss_sums: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.int64]
    num_correct: npt.NDArray[np.int64]
    """Tokens that the model found likeliest."""


@dataclass(frozen=True)
class _BatchScore:
    """The sums of one batch, by the documents in it."""

    index: int
    loss_sum: float
    documents: npt.NDArray[np.int64]
    loss_sums: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.int64]
    num_correct: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Task:
    path: str
    job: JobConfig
    windows: Windows
    document_mask: int | None


def score(
    path: str,
    job: JobConfig,
    windows: Windows,
    *,
    document_mask: int | None = None,
    num_processes: int = 1,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Scores:
    """The scores of a model on windows, at the job's precision and `eval.micro_size`.

    Args:
        path: directory or Hub id of the model.
        document_mask: id that ends a document, where attention and the loss stop at documents.
        num_processes: that share the batches; each loads the model, and takes one GPU where there are any. On CPUs each
            of several computes with one thread, and one alone with all that torch takes, which rounds otherwise.
        on_batch: called with the number of batches that are done, in one process.

    Raises:
        ConfigError: the model cannot be loaded, does not keep documents apart, or does not fit into memory.
        DataError: an id is above the model's embedding, or no token is predicted.
    """
    task = _Task(path, job, windows, document_mask)
    if num_processes == 1:
        batches = _score_batches(task, 0, 1, on_batch)
    else:
        try:
            found = run_ranks(_score_rank, num_processes, task, preload=["transformers"])
        except ProcessExitedException as error:
            raise ConfigError(
                f"a process of the evaluation ended ({first_line(error)}), probably for lack of memory: each of the "
                f"{num_processes} holds the model and the text; name fewer --workers, or lower eval.micro_size"
            ) from error
        if problem := next((of_rank for of_rank in found if isinstance(of_rank, ClmDistError)), None):
            raise problem
        batches = sorted((batch for of_rank in found for batch in of_rank), key=lambda batch: batch.index)
    num_documents = len(windows.document_ends)
    loss_sums = np.zeros(num_documents)
    num_tokens, num_correct = np.zeros(num_documents, np.int64), np.zeros(num_documents, np.int64)
    loss_sum = 0.0
    for batch in batches:
        loss_sum += batch.loss_sum
        loss_sums[batch.documents] += batch.loss_sums
        num_tokens[batch.documents] += batch.num_tokens
        num_correct[batch.documents] += batch.num_correct
    if not num_tokens.any():
        raise DataError("no document has two tokens, so there is nothing to predict; name longer text")
    if not np.isfinite(loss_sum):
        raise ConfigError(f"the loss of {path} on this text is {loss_sum}; its weights are damaged")
    return Scores(loss_sum, loss_sums, num_tokens, num_correct)


def _score_rank(rank: int, world_size: int, task: _Task) -> list[_BatchScore] | ClmDistError:
    """The scores of a process, or its error, which would reach the others as a traceback."""
    try:
        return _score_batches(task, rank, world_size)
    except ClmDistError as error:
        return error


def _score_batches(
    task: _Task, rank: int, world_size: int, on_batch: Callable[[int], None] = lambda done: None
) -> list[_BatchScore]:
    """The scores of every batch of this process: those whose number is `rank` modulo `world_size`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    job, windows, end = task.job, task.windows, task.document_mask
    set_matrix_products(job.train.precision)
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    model = WithLoss(load_pretrained(task.path, **attention_options(job.model.attention)).float()).to(device).eval()

    def arithmetic() -> contextlib.AbstractContextManager[Any]:
        return autocast(job.train.precision, device)

    if end is not None:
        size = int((windows.ends - windows.begins).max())
        if problem := find_mixing(
            model, end, block_size=size, device=device, precision=job.train.precision, autocast=arithmetic
        ):
            raise ConfigError(problem, field="data.document_mask")
    rows = unwrapped(model).get_input_embeddings().num_embeddings
    size, scores = job.eval.micro_size, []
    for index in range(rank, -(-len(windows) // size), world_size):
        batch = windows.batch(index * size, (index + 1) * size)
        if (highest := int(batch.ids.max())) >= rows:
            raise ConfigError(
                f"the text holds the id {highest}, and the embedding of {task.path} has {rows} rows; its tokenizer "
                "belongs to another model",
                field="tokenizer.path",
            )
        ids_BT = torch.from_numpy(batch.ids).to(device)
        with enough_memory(size), torch.no_grad(), arithmetic():
            logits_BTV = block_logits(model, ids_BT, end)
            losses_BT = next_token_loss(logits_BTV, ids_BT, end)
            correct_BT = logits_BTV[:, :-1].argmax(-1) == ids_BT[:, 1:]
        scores.append(_sums(index, batch, losses_BT, correct_BT, end))
        on_batch(len(scores))
    return scores


def _sums(
    index: int,
    batch: Batch,
    losses_BT: torch.Tensor,
    correct_BT: torch.Tensor,
    end: int | None,
) -> _BatchScore:
    """The sums of a batch; where documents are masked, the first token of each has loss 0 and does not count."""
    in_window = torch.from_numpy(batch.counts).to(losses_BT.device)
    losses = losses_BT.double()[in_window]
    counts = batch.counts if end is None else batch.counts & (batch.ids[:, :-1] != end)
    found, inverse = np.unique(batch.documents[counts], return_inverse=True)
    correct = correct_BT.cpu().numpy()[counts]
    counted = losses.cpu().numpy()[counts[batch.counts]]
    return _BatchScore(
        index=index,
        loss_sum=losses.sum().item(),
        documents=found,
        loss_sums=np.bincount(inverse, counted, minlength=len(found)).astype(np.float64),
        num_tokens=np.bincount(inverse, minlength=len(found)),
        num_correct=np.bincount(inverse[correct], minlength=len(found)),
    )
