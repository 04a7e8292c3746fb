"""Calibrate a program: what is missing of its store is collected, then the shards are added up."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ..ir.program import Program
from ..loop.errors import StepfoldError
from .collect import OnEvaluation, collect_shard
from .document import StoreDocument, is_finished, read_document
from .key import key_of, run_parts
from .memory import memory
from .plan import CalibrationPlan, Settings, make_plan
from .read import Calibration, open_finished
from .store import finish, missing_shards, write_shard, writing_store

logger = logging.getLogger(__name__)

TASK = "calibrating"
Progress = Callable[[str, int, int], None]
Work = Callable[[Path, StoreDocument, Sequence[int], Progress], None]
"""Collects the shards of these numbers and writes each into the store."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that is planned and not started.

    Attributes:
        plan: what it does.
        document: document of its store, not finished.
    """

    plan: CalibrationPlan
    document: StoreDocument


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        document: document of the finished store.
        resumed: shards that an earlier run had finished.
    """

    document: StoreDocument
    resumed: int


def prepare(program: Program, settings: Settings) -> Prepared:
    """Plan a run, with its memory and its key.

    Raises:
        UsageError: the settings do not fit the program.
    """
    plan = make_plan(program, settings)
    parts = run_parts(plan)
    document = StoreDocument(
        key=key_of(parts),
        parts=parts,
        branches=plan.branches,
        timesteps=plan.timesteps,
        sites=tuple(item.entry for item in plan.watched),
        shards=plan.shards,
        plan=memory(plan),
    )
    return Prepared(plan, document)


def calibrate(
    prepared: Prepared, out: Path, progress: Progress, work: Work | None = None, *, wait: bool = False
) -> Outcome:
    """Fill a store; shards that an earlier run finished are kept, a finished store stays as it is.

    Args:
        prepared: the run.
        out: folder of the store.
        progress: called with (task, done, total).
        work: how shards are collected; None takes this process.
        wait: wait for another process that works on the store, instead of refusing.

    Raises:
        UsageError: the folder belongs to another run, or another process works on it.
        StepfoldError: an activation is not finite, the disk is full, or the store is damaged.
    """
    document = prepared.document
    with writing_store(out, document, wait=wait):
        if is_finished(out):
            return Outcome(read_document(out), len(document.shards))
        missing = missing_shards(out, document)
        (work or one_after_another(prepared.plan))(out, document, missing, progress)
        return Outcome(finish(out, document), len(document.shards) - len(missing))


def one_after_another(plan: CalibrationPlan) -> Work:
    """Collect shards in this process."""

    def work(out: Path, document: StoreDocument, missing: Sequence[int], progress: Progress) -> None:
        total = len(missing) * plan.evaluations
        for n, index in enumerate(missing):
            before = n * plan.evaluations
            collect_and_write(plan, out, document, index, lambda done, _, at=before: progress(TASK, at + done, total))

    return work


def collect_and_write(
    plan: CalibrationPlan, out: Path, document: StoreDocument, index: int, on_evaluation: OnEvaluation
) -> None:
    """Collect one shard and write it; its arrays are gone before the next one begins."""
    write_shard(out, document.key, index, collect_shard(plan, index, on_evaluation))


def collected(
    program: Program,
    seed: int,
    cache: Path,
    progress: Progress,
    *,
    samples: int | None = None,
    gram: bool = True,
) -> Calibration:
    """Statistics of a program without a store of the user's: calibrated now, or read from the cache.

    Args:
        program: program as the passes before left it.
        seed: seed of the samples.
        cache: folder; the store in it is named by the key of the run.
        progress: called with (task, done, total).
        samples: number of samples of the calibration set; None takes the default.
        gram: also collect Gram matrices, which takes about as long as everything else.

    Raises:
        UsageError: see `prepare`.
        StepfoldError: an activation is not finite, or the disk is full.
    """
    settings = Settings(samples=samples, seed=seed) if gram else Settings(samples=samples, seed=seed, gram_width=0)
    prepared = prepare(program, settings)
    with ExitStack() as stack:
        folder = _usable(cache / f"calibration-{prepared.document.key[:24]}", prepared.document)
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepfold-")))
        outcome = calibrate(prepared, folder, progress, wait=True)
        calibration = open_finished(folder)
        weakref.finalize(calibration, stack.pop_all().close)  # it reads its tensors when they are asked for
    reused = outcome.resumed == len(outcome.document.shards)
    logger.info(
        "no calibration store was given: %s over %d samples, %s",
        "statistics from the cache" if reused else "calibrated now",
        prepared.plan.samples,
        folder,
    )
    return calibration


def _usable(folder: Path, document: StoreDocument) -> Path | None:
    """The folder of a store in the cache; None, with a warning, where no store can be written there.

    What lies there and is no store of this run is removed first: nothing in the cache is a user's own.
    """
    for last in (False, True):
        try:
            with writing_store(folder, document, wait=True):
                return folder
        except (StepfoldError, OSError) as error:
            if last:
                logger.warning("%s: the statistics cannot be kept and are not read from there: %s", folder, str(error))
        shutil.rmtree(folder, ignore_errors=True)
        if folder.is_file() or folder.is_symlink():
            with suppress(OSError):
                folder.unlink()
    return None
