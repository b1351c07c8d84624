"""Perplexity as a local `evaluate` metric: `evaluate.load(clm_dist.perplexity.__file__)`; needs no network."""

# One import a line: `evaluate` reads this file's imports line by line.
import datasets
import evaluate

from clm_dist.metrics import perplexity

_DESCRIPTION = "Perplexity of a causal language model: exp of the summed loss over the predicted tokens."
_INPUTS = """
Args:
    loss_sums: summed next-token loss of each batch, in nats.
    num_tokens: predicted tokens of each batch.

Returns:
    perplexity: exp(sum(loss_sums) / sum(num_tokens)), whatever the sizes of the batches are.
"""


class Perplexity(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Perplexity from sums, so that batches of different sizes weigh as they should."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"loss_sums": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}),
        )

    def _compute(self, loss_sums: list[float], num_tokens: list[int]) -> dict[str, float]:
        return {"perplexity": perplexity(sum(loss_sums), sum(num_tokens))}
