"""What a run's model writes after one prompt, before and after training."""

import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clm_dist.config.job import JobConfig
from clm_dist.config.shown import shown
from clm_dist.errors import ClmDistError, first_line
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import Samples, read_samples, write_samples
from clm_dist.progress import Progress

_MOST_BYTES = 2 * 2**30
"""Of weights, which this process loads twice, one model after the other, on its CPU or a GPU of its machine."""
_PROMPT, _SEED, _NUM_TOKENS = "The", 42, 60
_MOST_LINES = 2


def keep_samples(job: JobConfig, run: RunDir, progress: Progress) -> None:
    """Write samples.json of a run that is done, but not of a large model."""
    if sum(file.stat().st_size for file in run.final.glob("*.safetensors")) <= _MOST_BYTES:
        progress.start("Generating text", kind="end")
        write_samples(run, make_samples(job, run, progress))


def show_samples(run: RunDir, out: Console) -> None:
    """Print what samples.json has; where it is missing, the command that generates text."""
    samples = read_samples(run)
    if samples is None:
        out.print(f"sample: clm-dist generate {run.root} --prompt 'Once upon a time'", soft_wrap=True)
        return
    texts = {"before training": samples.get("before"), "after training": samples["after"]}
    table = Table.grid(padding=(0, 2))
    width = max(20, out.width - 2 - max(map(len, texts)) - 2)
    for name, text in texts.items():
        if text is not None:
            # What an untrained model writes may have control characters.
            plain = shown(" ".join(text.split()), 10 * len(text))
            lines = textwrap.wrap(plain, width, max_lines=_MOST_LINES, placeholder=" ...")
            table.add_row(f"  {name}", Text("\n".join(lines), style="italic"))
    out.print(f"The model's text after the prompt {samples['prompt']!r}:")
    out.print(table)
    out.print()


def make_samples(job: JobConfig, run: RunDir, progress: Progress) -> Samples:
    """Texts of the model that training starts from and of the final one, with the same seed.

    The first is loaded as the workers load it, and is the same: weights that are random come from `train.seed`.
    """
    from clm_dist.generate import Sampling, generate, go_on
    from clm_dist.pretrained.tokenizer import load_tokenizer
    from clm_dist.train.model import load_model

    sampling = Sampling(max_new_tokens=_NUM_TOKENS)
    (after,) = generate(str(run.final), [_PROMPT], seed=_SEED, sampling=sampling)
    samples: Samples = {"prompt": _PROMPT, "seed": _SEED, "after": after}
    try:
        tokenizer = load_tokenizer(run.final)
        network = load_model(job, tokenizer)
        slow = load_tokenizer(run.final, slow=True)
        (samples["before"],) = go_on(
            network, slow, [_PROMPT], model="the untouched model", seed=_SEED, sampling=sampling
        )
    except ClmDistError as error:  # it may be gone, or the Hub away; the run is done all the same
        progress.note(f"No text of the untouched model: {first_line(error)}")
    return samples
