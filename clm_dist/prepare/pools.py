"""The same function over many partitions: by threads of this process, or by tasks of the Ray that there is."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from clm_dist.config.ray_address import check_ray_address, no_ray
from clm_dist.errors import NotReadyError, first_line

T = TypeVar("T")
R = TypeVar("R")


class Pool(Protocol):
    """Where functions run."""

    num_tasks: int

    def submit(self, function: Callable[..., R], *arguments: Any) -> Callable[[], R]:
        """Begin a call; what comes back waits for its result, or raises what the call raised."""

    def share(self, value: Any) -> Any:
        """A handle to pass to `submit` in place of a value that many calls take."""

    def close(self) -> None: ...


class Threads:
    """Threads of this process: reading, encoding and hashing all release the interpreter's lock."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self._executor = ThreadPoolExecutor(num_tasks, thread_name_prefix="prepare")

    def submit(self, function: Callable[..., R], *arguments: Any) -> Callable[[], R]:
        return self._executor.submit(function, *arguments).result

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


class RayTasks:
    """Tasks of one CPU each, on whatever nodes the Ray that is initialised has."""

    def __init__(self, num_tasks: int) -> None:
        import ray

        self.num_tasks = num_tasks
        self._call = ray.remote(_call_on_one_core).options(num_cpus=1)
        self._running: dict[Any, None] = {}

    def submit(self, function: Callable[..., R], *arguments: Any) -> Callable[[], R]:
        import ray

        ref = self._call.remote(function, *arguments)
        self._running[ref] = None

        def result() -> R:
            try:
                value: R = ray.get(ref)
                return value
            except ray.exceptions.RayTaskError as error:
                raise getattr(error, "cause", None) or error from None
            except ray.exceptions.RayError as error:
                raise NotReadyError(
                    f"Ray has lost a task of the preparation ({first_line(error)}); the same command goes on with the "
                    "partitions that are left"
                ) from error
            finally:
                del self._running[ref]

        return result

    def share(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def close(self) -> None:
        import ray

        for ref in self._running:
            ray.cancel(ref, force=True)


def _call_on_one_core(function: Callable[..., R], *arguments: Any) -> R:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    return function(*arguments)


@contextlib.contextmanager
def open_pool(num_tasks: int | None, *, is_small: bool) -> Iterator[Pool]:
    """Where a preparation's tasks run: on the Ray that is initialised or that RAY_ADDRESS names, else in this process.

    Args:
        num_tasks: how many at once; None takes as many as there are CPUs.
        is_small: whether starting Ray's worker processes would take longer than the work.
    """
    initialised = ray_is_initialised()
    address = os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        pool: Pool
        if is_small or not (initialised or address):
            pool = Threads(num_tasks or len(os.sched_getaffinity(0)))
        else:
            import ray

            if not initialised:
                check_ray_address(str(address))
                try:
                    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
                except (ConnectionError, ValueError) as error:
                    raise no_ray(str(address), first_line(error)) from None
                stack.callback(ray.shutdown)
            pool = RayTasks(num_tasks or max(1, int(ray.cluster_resources().get("CPU", 1))))
        stack.callback(pool.close)
        yield pool


def ray_is_initialised() -> bool:
    # Importing Ray takes longer than most preparations.
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def in_order(pool: Pool, items: Iterable[T], begin: Callable[[T], Callable[[], R]]) -> Iterator[tuple[T, R]]:
    """Items with their results, in their order; two more than there are tasks are in flight, so memory is bounded."""
    waiting: deque[tuple[T, Callable[[], R]]] = deque()
    for item in items:
        waiting.append((item, begin(item)))
        if len(waiting) > pool.num_tasks + 1:
            first, result = waiting.popleft()
            yield first, result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        # A list, since StopIteration does not come out of a thread.
        following = thread.submit(lambda: list(islice(items, 1)))
        while item := following.result():
            following = thread.submit(lambda: list(islice(items, 1)))
            yield item[0]
