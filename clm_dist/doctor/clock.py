"""How far the clocks of nodes are apart, within the time that a message takes."""

from collections.abc import Iterator, Sequence

from clm_dist.doctor.finding import Finding, error, ok, on, unchecked, warning
from clm_dist.doctor.peer import Reach

_APART_S = 1.0
_REFUSED_S = 300.0


def judge_clocks(first: str, reaches: Sequence[Reach], others: Sequence[str], *, uses_urls: bool) -> Iterator[Finding]:
    """The findings of the clocks of nodes, against that of the first.

    Args:
        reaches: what the first node measured.
        others: the other nodes.
        uses_urls: whether the job writes to object storage.
    """
    best = {
        peer: min(
            (one for one in reaches if one.peer == peer and one.rtt_s is not None),
            key=lambda one: one.rtt_s or 0.0,
            default=None,
        )
        for peer in others
    }
    if silent := [peer for peer, one in best.items() if one is None]:
        yield unchecked("clock", f"the clocks of {', '.join(silent)}, because {first} does not reach these nodes")
    within = 0.0
    measured = {peer: one for peer, one in best.items() if one is not None}
    for peer, one in measured.items():
        offset, uncertainty = one.offset_s or 0.0, (one.rtt_s or 0.0) / 2
        if abs(offset) - uncertainty <= _APART_S:
            within = max(within, abs(offset) + uncertainty)
            continue
        make = error if uses_urls and abs(offset) > _REFUSED_S else warning
        found = make(
            "clock",
            f"its clock is {abs(offset):,.3f} s {'ahead of' if offset > 0 else 'behind'} that of {first} "
            f"(give or take {uncertainty * 1e3:.2f} ms)",
            "records and logs of several nodes are in a wrong order; object storage, Slurm's munge and TLS refuse "
            "requests of a clock that is minutes off",
            "chronyc makestep, or timedatectl set-ntp true, on the node that is off",
        )
        yield from on(peer, [found])
    if measured and within:
        yield ok("clock", f"{len(measured) + 1} nodes, at most {within * 1e3:,.2f} ms apart (with what is uncertain)")
