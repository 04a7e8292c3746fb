"""Run a large batch in parts, side by side. Torch-free.

With several threads in one operator, all of them wait for the slowest at the end of every operator, and values between
operators move from one core's cache to another's. Rows of a batch do not need each other, so each core can take some of
them through the whole stage: a core that is late delays nobody, and what it works on stays in its cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import numpy as np

from ...loop.ports import Port, StageCallable
from ..cores import physical_cores

Array = np.ndarray
VECTORS = 2  # dimensions of a batch whose rows are vectors


def divisible(inputs: Sequence[Port], outputs: Sequence[Port]) -> bool:
    """Whether a stage gives the same in parts: all outputs have a batch, and its rows are worth a call of their own.

    Rows that are nothing but vectors are not, such as those of modulations: products of a few vectors wait for the
    weights.
    """
    batched = [port for port in inputs if None in port.shape]
    return all(None in port.shape for port in outputs) and any(len(port.shape) > VECTORS for port in batched)


def number_of_parts(batch: int, rows: int, cores: int) -> int:
    """As many as can be of at least `rows` rows, and a multiple of the cores; 1 where there are not enough rows."""
    return max(1, cores * (batch // (cores * rows)))


class InParts:
    """A stage that is opened with one thread for batches in parts, and with all threads for whole ones."""

    def __init__(
        self,
        open_with: Callable[[int | None], StageCallable],
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        rows: int,
        threads: int | None,
    ):
        """Open it with all threads, so that a damaged file is found at once.

        Args:
            open_with: opens the stage with a number of threads; None leaves the number to the engine.
            inputs: what it reads.
            outputs: what it computes.
            rows: fewest rows of a part.
            threads: number of threads for a whole batch; parts run on as many cores.
        """
        self._open_with = open_with
        self._batched = {port.name: port.shape.index(None) for port in inputs if None in port.shape}
        self._joined = [port.shape.index(None) for port in outputs]
        self._rows = rows
        self._cores = threads or physical_cores()
        self._whole = open_with(threads)
        self._single = self._whole if threads == 1 else None
        self._pool = ThreadPoolExecutor(
            max(1, self._cores - 1), thread_name_prefix="stepfold-rows"
        )  # its threads start when used
        self._opening = threading.Lock()

    def __call__(self, values: Mapping[str, Array]) -> Sequence[Array]:
        """Name -> array to the outputs in order."""
        name, axis = next(iter(self._batched.items()))
        batch = values[name].shape[axis]
        number = number_of_parts(batch, self._rows, self._cores)
        if number == 1:
            return self._whole(values)
        bounds = [batch * part // number for part in range(number + 1)]
        parts = [self._part(values, *bound) for bound in pairwise(bounds)]
        found = self._side_by_side(parts)
        return [
            np.concatenate(pieces, axis) for pieces, axis in zip(zip(*found, strict=True), self._joined, strict=True)
        ]

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown(cancel_futures=True)

    def _side_by_side(self, parts: Sequence[Mapping[str, Array]]) -> list[Sequence[Array]]:
        """The outputs of every part. The calling thread takes parts too: it need not be woken."""
        call, waiting = self._with_one_thread(), deque(enumerate(parts))
        found: list[Sequence[Array]] = [()] * len(parts)

        def take() -> None:
            while waiting:
                try:
                    index, part = waiting.popleft()
                except IndexError:  # another thread has taken the last one
                    return
                found[index] = call(part)

        helpers = [self._pool.submit(take) for _ in range(self._cores - 1)]
        try:
            take()
        finally:
            waiting.clear()  # nothing to do for helpers where a part has failed
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
        return found

    def _part(self, values: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
        """Rows of the inputs that have a batch; the others as they are."""
        part = dict(values)
        for name, axis in self._batched.items():
            part[name] = values[name][(slice(None),) * axis + (slice(start, end),)]
        return part

    def _with_one_thread(self) -> StageCallable:
        """The stage as every part runs it; a session may be called from several threads."""
        with self._opening:
            if self._single is None:
                self._single = self._open_with(1)
            return self._single
