"""Compile stages into a temporary folder and open them on the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.registry import Backend, get
from ..loop.errors import UsageError
from ..loop.ports import BoundProgram, StageCallable

if TYPE_CHECKING:
    from ..ir.program import Program, Stage


@dataclass
class Workshop:
    """Compiles stages into a folder, each once, and opens them.

    A stage is immutable, so its identity is the key: the bundle takes the artifacts the schedule was fitted on. Where
    the engine builds and cannot run (`runs` is false), PyTorch stands in for it.
    """

    backend: Backend
    folder: Path
    runs: bool = True
    _built: dict[int, tuple[Stage, list[Path]]] = field(default_factory=dict)

    def build(self, stage: Stage) -> list[Path]:
        """The files of a compiled stage, the engine file first."""
        if id(stage) not in self._built:
            target = self.folder / f"{len(self._built)}"
            target.mkdir()
            main = self.backend.lower(stage, target)
            others = [path for path in sorted(target.iterdir()) if path != main]
            self._built[id(stage)] = (stage, [main, *others])
        return self._built[id(stage)][1]

    def open(self, program: Program) -> BoundProgram:
        """The program, built, as `measured` gives it."""
        for stage in program.stages:
            self.build(stage)
        return self.measured(program)

    def measured(self, program: Program) -> BoundProgram:
        """The program on the engine; where the engine cannot run, what it would compute, run by PyTorch and not built."""
        stages = tuple(stage.bound(self._callable(stage)) for stage in program.stages)
        return BoundProgram(program.inputs, program.outputs, stages, program.tables)

    def _callable(self, stage: Stage) -> StageCallable:
        if self.runs:
            return self.backend.open_session(self.build(stage)[0], stage.inputs, stage.outputs)
        from ..ir.program import reference

        return reference(self.backend.prepared(stage))


@contextmanager
def workshop(backend: str, options: Mapping[str, Any] | None = None) -> Iterator[Workshop]:
    """A workshop in a temporary folder.

    Args:
        backend: name of the engine.
        options: of the engine, in the place of its defaults.

    Raises:
        UsageError: the backend is unknown or cannot build here, or lacks an option.
    """
    engine = get(backend).with_options(options or {})
    capability = engine.capability_here()
    if not capability.can_build:
        raise UsageError(
            f"backend {backend!r} cannot build here: {capability.reason}. Install it: {capability.install}"
        )
    with tempfile.TemporaryDirectory(prefix="stepfold-") as folder:
        yield Workshop(engine, Path(folder), capability.can_run)
