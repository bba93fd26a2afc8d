"""Work that is done ahead, by threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int = 2,
    initializer: Callable[[], None] | None = None,
    *,
    pool: ThreadPoolExecutor | None = None,
) -> Iterator[Result]:
    """Yield ``work(item)`` in order, computed a few items ahead by a pool of threads.

    Whoever stops early does not wait for what is being computed. A pool that is given is left open.
    """
    waiting: deque[Future[Result]] = deque()
    own = pool is None
    pool = pool or ThreadPoolExecutor(threads, initializer=initializer)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        if own:
            pool.shutdown(wait=False, cancel_futures=True)
