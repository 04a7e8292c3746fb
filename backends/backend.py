"""What an engine is to the rest of stepfold. Torch-free, and without the engine: its modules are imported when they are used."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import JsonValue, ValidationError

from ..loop.errors import UsageError
from ..loop.held import StageFiles
from ..loop.options import Options, option_problem
from ..loop.ports import Port, StageCallable
from .capability import Capability
from .identity import code, packages, processor
from .shared import Shared

if TYPE_CHECKING:
    from ..ir.program import Stage

Activations = Literal["dynamic", "symmetric"]


@dataclass(frozen=True)
class Backend(ABC):
    """An engine, with the options that stages are lowered and run with.

    A subclass has the three methods that are abstract here, and overrides those others whose default does not hold for
    its engine. It lies in a module that imports neither the engine nor torch. One with options is a frozen dataclass
    that declares the field `options` again, with their class and defaults.

    Attributes:
        name: name of the backend, as in `--backend`.
        suffix: suffix of a compiled stage's file.
        device: device that it runs on where no other is asked for and its options name none.
        native: whether a stage is code that this process loads and runs, with all rights of the user.
        activations: form of 8-bit activations that integer layers are fastest with; None where the engine has no form for
            quantized layers.
        exact_form: form that layers get whose codes saturate without VNNI; None for an engine that multiplies all codes
            exactly.
        options: options of the engine.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    device: ClassVar[str] = "cpu"
    native: ClassVar[bool] = False
    activations: ClassVar[Activations | None] = "dynamic"
    exact_form: ClassVar[str | None] = None

    options: Options = field(default_factory=Options)

    @abstractmethod
    def capability(self) -> Capability:
        """What the engine can do on this machine, whatever the options; it never fails."""

    @abstractmethod
    def lower(self, stage: Stage, folder: Path) -> Path:
        """Compile a stage into a file.

        Args:
            stage: stage to compile.
            folder: an empty folder; what is left in it goes into the bundle.

        Returns:
            The main file.

        Raises:
            StepfoldError: the stage has no form for this engine.
        """

    @abstractmethod
    def session(
        self,
        file: Path,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        *,
        threads: int | None,
        device: str,
        files: StageFiles,
    ) -> StageCallable:
        """Open a compiled stage on an engine that can run here; see `open_session` for the arguments.

        Raises:
            UsageError: the device is missing here.
            BundleError: the file is not what the ports say.
        """

    def capability_here(self) -> Capability:
        """What the engine can do on this machine with these options."""
        return self.capability()

    def prepared(self, stage: Stage) -> Stage:
        """The stage as the engine computes it, in PyTorch.

        Raises:
            StepfoldError: the stage has no form for this engine.
        """
        return stage

    def float_without_vnni(self, stage: Stage) -> bool:
        """Whether a processor without VNNI computes a stage in float that others compute in integers."""
        return False

    def share(self, files: Sequence[Path]) -> Shared | None:
        """Store once what several compiled stages hold.

        Args:
            files: the main files of stages in one folder, with what `lower` left beside them; they are changed.

        Returns:
            What was shared, None for nothing.
        """
        return None

    def target(self) -> JsonValue:
        """What files are for beside this processor, such as a GPU; None for an engine that needs nothing else."""
        return None

    def code_folder(self) -> Path | None:
        """The folder of the engine's own code, which compiled stages depend on; None where it cannot be read."""
        source = getattr(sys.modules.get(type(self).__module__), "__file__", None)
        return None if source is None else Path(source).parent

    @property
    def default_device(self) -> str:
        """The device it runs on with these options, where no other is asked for."""
        return getattr(self.options, "device", self.device)

    def with_options(self, values: Mapping[str, Any]) -> Self:
        """The backend with options that replace its defaults.

        Raises:
            UsageError: an unknown option or value.
        """
        kind = type(self.options)
        try:
            return replace(self, options=kind.model_validate(dict(values)))
        except ValidationError as error:
            raise UsageError(f"backend {self.name}: {option_problem(kind, 'backend', error)}") from None

    def open_session(
        self,
        file: Path,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        *,
        threads: int | None = None,
        device: str | None = None,
        files: StageFiles | None = None,
    ) -> StageCallable:
        """Open a compiled stage.

        Args:
            file: the main file.
            inputs: what it must read.
            outputs: what it must compute.
            threads: number of threads to compute with; None leaves it to the engine.
            device: device to run on; None takes that of the engine.
            files: files that the engine may read; None takes those that lie in the folder, which the caller has just
                made.

        Raises:
            UsageError: the engine or the device is missing here.
            BundleError: the file is not what the ports say.
        """
        found = self.capability()
        if not found.can_run:
            raise UsageError(f"backend {self.name!r} cannot run here: {found.reason}. Install it: {found.install}")
        device, files = device or self.default_device, files or StageFiles(file.parent)
        return self.session(file, inputs, outputs, threads=threads, device=device, files=files)

    def identity(self) -> dict[str, JsonValue] | None:
        """What a compiled stage depends on beside the stage; None where the code of the engine cannot be read."""
        folder = self.code_folder()
        if folder is None:
            return None
        return {
            "backend": self.name,
            "options": self.options.model_dump(mode="json"),
            "version": self.capability_here().version,
            "packages": dict(packages()),
            "code": code(folder),
            "processor": dict(processor()),
            "target": self.target(),
        }
