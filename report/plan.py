"""What a bench measures: the rows, the tables they run along and the model files they need."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from ..bundle.cache import Cache, key_of
from ..bundle.reader import Bundle
from ..loop.errors import StepfoldError, UsageError
from ..loop.spec import LoopSpec
from . import work
from .baselines.build import chain, describe
from .baselines.names import Baseline, missing_packages
from .machine import versions
from .processes import WorkerError, Workers
from .records import Skipped
from .work import Work

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
REFERENCE = "reference"
EXAMPLE = "example.safetensors"


@dataclass(frozen=True)
class RowPlan:
    """One row to measure.

    Attributes:
        name: name of the row.
        kind: `bundle` or `baseline`.
        row: what a worker needs to open it.
        is_reference: whether it computes exactly what quality is measured against.
    """

    name: str
    kind: Literal["bundle", "baseline"]
    row: Mapping[str, Any]
    is_reference: bool = False


@dataclass(frozen=True)
class Prepared:
    """The checkpoint, read once.

    Attributes:
        checkpoint: the folder.
        work: how the model is called, with the loop of the checkpoint.
        class_name: class of the network.
        weights_sha256: digest of its weights.
        tables: baseline name, or `reference`, to the file of its table.
        reasons: baseline name to why it has none.
        example: request file with the recorded inputs.
    """

    checkpoint: Path
    work: Work
    class_name: str
    weights_sha256: str
    tables: Mapping[str, str]
    reasons: Mapping[str, str]
    example: Path

    @property
    def key(self) -> str:
        """Changes with everything that model files and reference samples depend on."""
        parts = [self.weights_sha256, json.dumps(describe(self.work)), json.dumps(versions())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def prepare(
    workers: Workers,
    checkpoint: Path,
    baselines: Sequence[Baseline],
    bundles: Sequence[Bundle],
    folder: Path,
) -> Prepared:
    """Read the checkpoint in a process of its own and fold the samplers.

    Args:
        workers: start the process.
        checkpoint: the folder.
        baselines: whose samplers are folded.
        bundles: their loop is the reference when they share one, else that of the checkpoint.
        folder: folder for tables and example inputs.

    Raises:
        UsageError: it cannot be read, torch is missing, a solver does not exist, or the bundles are of another model.
        StepfoldError: the process died.
    """
    missing = missing_packages("eager")
    if missing is not None:
        raise UsageError(f"--reference: running a checkpoint {missing}")
    bundle_work, shared = replace(work.of_bundles(bundles), call=work.shared_call(bundles)), work.shared_loop(bundles)
    message = {
        "do": "prepare",
        "checkpoint": str(checkpoint),
        "baselines": [baseline.name for baseline in baselines],
        "loop": None if shared is None else shared.model_dump(mode="json"),
        "call": describe(bundle_work)["call"],
        "folder": str(folder),
    }
    try:
        answer = workers.once("prepare", message)
    except WorkerError as error:
        kind = UsageError if error.kind == "UsageError" else StepfoldError
        raise kind(f"--reference {checkpoint}: {error}") from None
    loop = None if answer["loop"] is None else LoopSpec.model_validate(answer["loop"])
    _check_same_model(checkpoint, loop, bundle_work)
    work.write(folder / EXAMPLE, bundle_work.example)
    return Prepared(
        checkpoint,
        replace(bundle_work, loop=loop),
        answer["class"],
        answer["weights_sha256"],
        answer["tables"],
        answer["reasons"],
        folder / EXAMPLE,
    )


def inspected(workers: Workers, prepared: Prepared) -> dict[str, Any] | None:
    """Rates and sites of the checkpoint for the page; None when it cannot be captured here."""
    told = describe(prepared.work)
    message = {
        "do": "inspect",
        "checkpoint": str(prepared.checkpoint),
        "loop": told["loop"],
        "call": told["call"],
    }
    try:
        return workers.once("inspect", message)
    except WorkerError as error:
        logger.warning("the page goes without rates and sites: %s", error)
        return None


def bundle_plans(bundles: Sequence[Bundle], guidance: float | None, allow_native: bool = False) -> list[RowPlan]:
    """A row for each bundle, all at the guidance scale of the reference."""
    return [
        RowPlan(
            bundle_name(bundle.path),
            "bundle",
            {
                "kind": "bundle",
                "path": str(bundle.path.resolve()),
                "guidance": guidance,
                "allow_native": allow_native,
            },
        )
        for bundle in bundles
    ]


def bundle_name(path: Path) -> str:
    """The name of a bundle's row: that of its folder."""
    return path.resolve().name


def reference_plan(prepared: Prepared) -> RowPlan:
    """The full fp32 loop of the checkpoint."""
    if REFERENCE in prepared.reasons:
        raise UsageError(f"--reference {prepared.checkpoint}: {prepared.reasons[REFERENCE]}")
    return RowPlan(REFERENCE, "baseline", _baseline_row(prepared, Baseline(REFERENCE, "eager"), Path()), True)


@dataclass(frozen=True)
class Models:
    """Where the model files of baselines lie.

    Attributes:
        folder: folder of this bench, with a folder for each artifact.
        cache: keeps them for the next bench; None keeps nothing.
    """

    folder: Path
    cache: Cache | None

    def take(self, artifact: str, key: str) -> bool:
        """Whether the files of an artifact were in the cache, and are in the folder now."""
        target = self.folder / artifact
        target.mkdir(parents=True)
        if self.cache is not None and self.cache.take(key_of(_parts(artifact, key)), target) is not None:
            return True
        target.rmdir()
        return False

    def keep(self, artifact: str, key: str) -> None:
        """Keep the files of an artifact."""
        files = sorted((self.folder / artifact).iterdir())
        if self.cache is not None and files and all(file.is_file() for file in files):
            parts = _parts(artifact, key)
            self.cache.keep(key_of(parts), artifact, parts, files)


def _parts(artifact: str, key: str) -> dict[str, JsonValue]:
    """What the files of an artifact depend on; `key` is that of the checkpoint and how it is called."""
    return {"checkpoint": key, "artifact": artifact}


def baseline_plans(
    workers: Workers,
    prepared: Prepared,
    baselines: Sequence[Baseline],
    models: Models,
    threads: int,
    progress: Progress,
) -> tuple[list[RowPlan], list[Skipped]]:
    """A row for each baseline that can run here; its model file is built now.

    Args:
        workers: start the processes that build.
        prepared: the checkpoint.
        baselines: what was asked for.
        models: where model files go; those that are kept are used again.
        threads: number of threads of calibration.
        progress: called with (task, done, total).
    """
    builder = _Builder(workers, prepared, models, threads, progress)
    plans, skipped = [], []
    for baseline in baselines:
        reason = missing_packages(baseline.engine) or prepared.reasons.get(baseline.name)
        reason = reason or builder.reason(baseline.artifact)
        if reason is not None:
            skipped.append(Skipped(name=baseline.name, reason=reason))
            continue
        row = _baseline_row(prepared, baseline, models.folder)
        exact = baseline.engine == "eager" and baseline.is_full_loop
        plans.append(RowPlan(baseline.name, "baseline", row, exact))
    return plans, skipped


class _Builder:
    """Builds each artifact at most once, in a process of its own, and remembers what failed."""

    def __init__(self, workers: Workers, prepared: Prepared, models: Models, threads: int, progress: Progress):
        self._workers, self._prepared, self._models = workers, prepared, models
        self._threads, self._progress = threads, progress
        self._reasons: dict[str, str | None] = {}

    def reason(self, artifact: str) -> str | None:
        """Build an artifact and what it is made from; why that failed, or None."""
        for step in chain(artifact):
            if step not in self._reasons:
                self._reasons[step] = self._build(step)
            if self._reasons[step] is not None:
                return f"its model could not be built: {self._reasons[step]}"
        return None

    def _build(self, artifact: str) -> str | None:
        task = f"building {artifact}"
        self._progress(task, 0, 1)
        if self._models.take(artifact, self._prepared.key):
            return None
        message = {
            "do": "build",
            "artifact": artifact,
            "checkpoint": str(self._prepared.checkpoint),
            "folder": str(self._models.folder),
            "threads": self._threads,
            "table": self._prepared.tables.get(REFERENCE),
            "example": str(self._prepared.example),
            **describe(self._prepared.work),
        }
        try:
            self._workers.once(f"build-{artifact}", message, lambda done, total: self._progress(task, done, total))
        except WorkerError as error:
            return str(error)
        self._models.keep(artifact, self._prepared.key)
        self._progress(task, 1, 1)
        return None


def _baseline_row(prepared: Prepared, baseline: Baseline, folder: Path) -> dict[str, Any]:
    return {
        "kind": "baseline",
        "engine": baseline.engine,
        "checkpoint": str(prepared.checkpoint.resolve()),
        "artifact": str(folder / baseline.artifact),
        "table": prepared.tables.get(baseline.name),
        **describe(prepared.work),
    }


def _check_same_model(checkpoint: Path, loop: LoopSpec | None, bundle_work: Work) -> None:
    """Raise UsageError unless the checkpoint is called as the bundles are."""

    def signature(spec: LoopSpec | None) -> str:
        if spec is None:
            return "a component without a loop"
        return f"a loop over {spec.state} {list(spec.latent.shape)} with the conditions {spec.conditions}"

    if signature(loop) != signature(bundle_work.loop):
        raise UsageError(
            f"--reference {checkpoint}: expected {signature(bundle_work.loop)}, as the bundle has; received "
            f"{signature(loop)}. Name the checkpoint that the bundle was made from."
        )
