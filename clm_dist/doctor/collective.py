"""A sum over all nodes, as the gradients of a step are summed: its order, its result, and the findings of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clm_dist.doctor.finding import Finding, error, ok, on


@dataclass(frozen=True)
class Order:
    """Where the ranks meet."""

    address: str
    port: int
    rank: int
    world_size: int
    use_gpu: bool


@dataclass(frozen=True)
class Sum:
    """What a rank measured."""

    backend: str = ""
    bytes_per_s: float = 0.0
    """What each node sends, and receives; comparable between numbers of nodes (NCCL's tests call it busbw)."""
    problem: str | None = None


def judge_sums(sums: Mapping[str, Sum]) -> Iterator[Finding]:
    """The findings of a collective that all nodes took part in."""
    failed = {node: one.problem for node, one in sums.items() if one.problem}
    for node, problem in failed.items():
        found = error(
            "network",
            f"an all-reduce over {len(sums)} nodes fails: {problem}",
            "the workers sum the gradients of each step so",
            "see what is found of the network and of GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells what NCCL does",
        )
        yield from on(node, [found])
    if sums and not failed:
        slowest = min(sums.values(), key=lambda one: one.bytes_per_s)
        rate = slowest.bytes_per_s * 8 / 1e9
        yield ok("network", f"{slowest.backend} sums over {len(sums)} nodes with {rate:.3g} Gbit/s each way")
