"""Collect shards in several processes with Ray; each loads the checkpoint itself and writes its own shards."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..loop.errors import StepfoldError, UsageError
from ..loop.pipeline_call import PipelineCall
from .document import StoreDocument
from .plan import Settings

TASK = "calibrating with {} workers"
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes; shards go through files


@dataclass(frozen=True)
class Source:
    """Where a worker gets the program from.

    Attributes:
        checkpoint: folder.
        loop: a loop file that replaces the checkpoint's.
        settings: settings of the run.
        call: arguments of a pipeline's call that replace its defaults.
    """

    checkpoint: Path
    loop: Path | None
    settings: Settings
    call: PipelineCall | None = None


def require_ray() -> None:
    """Raise UsageError unless Ray is installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "--workers: several workers need ray, which is not installed: pip install 'stepfold[distributed]'. "
            "Or leave --workers out; one worker gives the same result."
        )


@dataclass(frozen=True)
class Workers:
    """Collects shards in processes of its own; a `Work` of `calibration.run`.

    Attributes:
        count: processes.
        source: source of the program.
    """

    count: int
    source: Source

    def __call__(self, out: Path, document: StoreDocument, missing: Sequence[int], progress: Any) -> None:
        """Collect these shards; whichever worker is free takes the next.

        Raises:
            StepfoldError: what went wrong in a worker, or that one ended.
        """
        if not missing:
            return
        require_ray()
        import ray  # pyright: ignore[reportMissingImports] (an extra)

        count = min(self.count, len(missing))
        ray.init(
            address="local",
            num_cpus=count,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        try:
            remote = ray.remote(num_cpus=1)(Worker)
            free = [remote.remote(self.source, out.resolve(), document.key) for _ in range(count)]
            _share(ray, free, list(missing), lambda done: progress(TASK.format(count), done, len(missing)))
        finally:
            ray.shutdown()


def _share(ray: Any, free: list[Any], waiting: list[int], on_done: Any) -> None:
    """Give shards to workers as they become free."""
    total, busy = len(waiting), dict[Any, Any]()
    on_done(0)
    try:
        while waiting or busy:
            while waiting and free:
                worker = free.pop()
                busy[worker.collect.remote(waiting.pop(0))] = worker
            (ready, *_), _ = ray.wait(list(busy))
            free.append(busy.pop(ready))
            ray.get(ready)
            on_done(total - len(waiting) - len(busy))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, StepfoldError) else StepfoldError(f"a worker failed: {cause!r}") from None
    except ray.exceptions.RayError as error:
        raise StepfoldError(
            f"a worker ended early ({type(error).__name__}), which happens when memory runs out. Run the same command "
            "again with fewer --workers: finished shards are kept."
        ) from error


class Worker:
    """One process: loads the checkpoint at its first shard."""

    def __init__(self, source: Source, out: Path, key: str):
        self._source, self._out, self._key = source, out, key

    def collect(self, index: int) -> None:
        """Collect and write one shard.

        Raises:
            StepfoldError: see `collect_shard`; or the checkpoint is another one by now.
        """
        from .run import collect_and_write

        prepared = self._prepared
        collect_and_write(prepared.plan, self._out, prepared.document, index, lambda done, total: None)

    @cached_property
    def _prepared(self) -> Any:
        from ..frontend.load import load_checkpoint
        from .run import prepare

        checkpoint = load_checkpoint(self._source.checkpoint, loop=self._source.loop, call=self._source.call)
        prepared = prepare(checkpoint.capture(), self._source.settings)
        if prepared.document.key != self._key:
            raise StepfoldError(
                f"{self._source.checkpoint}: the checkpoint changed while it was calibrated. Start again."
            )
        return prepared
