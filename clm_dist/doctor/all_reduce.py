"""A collective over all nodes: `python -m clm_dist.doctor.all_reduce`, one process a node.

It says that it has imported torch, waits for a line with the others' meeting point, sums a tensor over all nodes as
training does with gradients, and prints how fast that was.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from clm_dist.doctor.collective import Order, Sum

_TIMEOUT = timedelta(seconds=6)
_ELEMENTS = 2**22
_ROUNDS = 3


def all_reduce(order: Order) -> Sum:
    """Sum a tensor over all ranks, some times; every rank must call it."""
    if order.use_gpu and not torch.cuda.is_available():
        # With another backend than the other ranks it would wait for them.
        raise RuntimeError("torch sees no GPU")
    backend = "nccl" if order.use_gpu else "gloo"
    host = f"[{order.address}]" if ":" in order.address else order.address
    dist.init_process_group(
        backend,
        init_method=f"tcp://{host}:{order.port}",
        rank=order.rank,
        world_size=order.world_size,
        timeout=_TIMEOUT,
    )
    tensor = torch.ones(_ELEMENTS, device="cuda" if order.use_gpu else "cpu")
    best = float("inf")
    # The first makes the connections.
    for _ in range(1 + _ROUNDS):
        tensor.fill_(1)
        dist.barrier()
        begun = time.monotonic()
        dist.all_reduce(tensor)
        total = float(tensor[-1])  # waits for a GPU
        seconds = time.monotonic() - begun
        if total != order.world_size:
            return Sum(backend, problem=f"the sum of {order.world_size} ones is {total:g}")
        best = min(best, seconds)
    num_bytes = tensor.numel() * tensor.element_size() * 2 * (order.world_size - 1) / order.world_size
    return Sum(backend, num_bytes / best)


def main() -> None:
    print("ready", flush=True)
    line = sys.stdin.readline()
    if not line:
        return
    order = Order(**json.loads(line))
    try:
        found = all_reduce(order)
    except Exception as error:  # whatever torch raises
        said = str(error).strip().splitlines() or [type(error).__name__]
        found = Sum(problem=said[0][:300])
    print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
    # The other ranks may be in the group still, which its end would wait for.
    os._exit(0)
