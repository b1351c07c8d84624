"""Whether compiling passes is worth its time; no torch, so that a plan can say it as well."""

# What compiling costs a GPU, and the share of a pass's time that it saves there: a third to a quarter is left.
_COST_S = 30.0
_SAVED = 0.7
# Share of a GPU's peak that passes reach before.
_USED = 0.12


def is_worth_it(seconds_at_peak: float | None) -> bool:
    """Whether compiling saves more time than it costs.

    On a CPU it does not: 2 % are saved there in fp32 and none in bf16, and 40 s lost.

    Args:
        seconds_at_peak: that the run's passes would take at a GPU's full peak; None where it has none that is known.
    """
    return seconds_at_peak is not None and _SAVED * seconds_at_peak / _USED > _COST_S
