"""Compile stages into a temporary folder and open them on the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from ..backends import Backend, get
from ..bundle.cache import Cache, key_of
from ..loop.calls import named, text
from ..loop.errors import UsageError
from ..loop.ports import BoundProgram, StageCallable
from .wrong_stages import require_right

if TYPE_CHECKING:
    from ..ir.program import Program, Stage


@dataclass(frozen=True)
class _Built:
    """A compiled stage: its files, the engine file first, and whether an earlier build had compiled it."""

    stage: Stage
    files: list[Path]
    reused: bool


@dataclass
class Workshop:
    """Compiles stages into a folder, each once, and opens them.

    A stage is immutable, so its identity is the key: the bundle takes the artifacts the schedule was fitted on. What
    was compiled by earlier builds is taken from a cache, by the hash of all that went into it. Where the engine builds
    and cannot run (`runs` is false), PyTorch stands in for it. The sessions of the program that was opened last stay
    open for the next one that has the same stages; the others are let go before anything is built for it.
    """

    backend: Backend
    folder: Path
    runs: bool = True
    cache: Cache | None = None
    _built: dict[int, _Built] = field(default_factory=dict)
    _keys: set[str] = field(default_factory=set)  # of stages that were compiled here
    _compared: set[int] = field(default_factory=set)  # stages that compute what their graphs say
    _open: dict[int, tuple[Stage, StageCallable]] = field(default_factory=dict)  # of the program that was opened last

    def build(self, stage: Stage) -> list[Path]:
        """The files of a compiled stage, the engine file first."""
        if id(stage) not in self._built:
            target = self.folder / f"{len(self._built)}"
            target.mkdir()
            self._built[id(stage)] = self._taken(stage, target)
        return self._built[id(stage)].files

    def reused(self, stage: Stage) -> bool:
        """Whether an earlier build had compiled a stage that was built here."""
        return self._built[id(stage)].reused

    def open(self, program: Program) -> BoundProgram:
        """The program, built, as `measured` gives it.

        Raises:
            StepfoldError: the engine computes something else than the graph of a stage.
        """
        self._keep_open(program)
        for stage in program.stages:
            self.build(stage)
        bound = self.measured(program)
        if self.runs:
            require_right(program, bound, self.backend, self._compared)
            self._compared |= {id(stage) for stage in program.stages if program.example}
        return bound

    def measured(self, program: Program) -> BoundProgram:
        """The program on the engine; where the engine cannot run, what it would compute, run by PyTorch and not built."""
        self._keep_open(program)
        for stage in program.stages:
            if id(stage) not in self._open:
                self._open[id(stage)] = stage, self._callable(stage)
        return program.bound_by(lambda stage: self._open[id(stage)][1])

    def _keep_open(self, program: Program) -> None:
        """Let go of the sessions of stages that a program does not have; whoever still runs one keeps it alive."""
        wanted = {id(stage) for stage in program.stages}
        self._open = {key: item for key, item in self._open.items() if key in wanted}

    def _taken(self, stage: Stage, target: Path) -> _Built:
        """A stage from the cache, or compiled and put there."""
        parts = self._parts(stage)
        if self.cache is None or parts is None:
            return _Built(stage, self._compiled(stage, target), False)
        key = key_of(parts)
        files = self.cache.take(key, target)
        if files is not None:
            return _Built(stage, files, key not in self._keys)
        files = self._compiled(stage, target)
        self.cache.keep(key, stage.name, parts, files)
        self._keys.add(key)
        return _Built(stage, files, False)

    def _compiled(self, stage: Stage, target: Path) -> list[Path]:
        main = self.backend.lower(stage, target)
        return [main, *(path for path in sorted(target.iterdir()) if path != main)]

    def _parts(self, stage: Stage) -> dict[str, JsonValue] | None:
        """All that a compiled stage depends on; None where it cannot be told."""
        from ..ir.digest import stage_digest

        digest, identity = stage_digest(stage), self.backend.identity()
        return None if digest is None or identity is None else {"stage": digest, **identity}

    def _callable(self, stage: Stage) -> StageCallable:
        if self.runs:
            return self.backend.open_session(self.build(stage)[0], stage.inputs, stage.outputs)
        from ..ir.program import reference

        return reference(self.backend.prepared(stage))


@contextmanager
def workshop(backend: str, options: Mapping[str, Any] | None = None, cache: Cache | None = None) -> Iterator[Workshop]:
    """A workshop in a temporary folder.

    Args:
        backend: name of the engine.
        options: options of the engine that replace its defaults.
        cache: cache of the stages that earlier builds compiled; without one every stage is compiled.

    Raises:
        UsageError: the backend is unknown or cannot build here, or lacks an option.
    """
    engine = get(text("backend", backend)).with_options(named("options", {} if options is None else options))
    capability = engine.capability_here()
    if not capability.can_build:
        raise UsageError(
            f"backend {backend!r} cannot build here: {capability.reason}. Install it: {capability.install}"
        )
    with tempfile.TemporaryDirectory(prefix="stepfold-") as folder:
        yield Workshop(engine, Path(folder), capability.can_run, cache)
