"""Work that several threads do at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


def at_once(work: Callable[[int], None], arguments: Sequence[int]) -> None:
    """Call `work` with each argument in a thread of its own and wait for all; an error in one is raised."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(work, arguments))
