"""The list of backends, to which other packages may add; an engine's modules are imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from ..loop.errors import UsageError, nearest
from ..loop.extensions import Extensions
from ..loop.held import StageFiles
from ..loop.options import Options, option_problem
from ..loop.ports import Port, StageCallable
from .capability import Capability
from .identity import code, packages, processor
from .inductor.options import InductorOptions
from .onnxruntime.options import OnnxruntimeOptions
from .openvino.options import OpenvinoOptions
from .shared import Shared
from .tensorrt.options import TensorrtOptions
from .torch_tensorrt.options import TorchTensorrtOptions

NO_OPTIONS = Options()
Activations = Literal["dynamic", "symmetric"]


@dataclass(frozen=True)
class Backend:
    """An engine by name.

    Attributes:
        name: name of the backend, as in `--backend`.
        suffix: suffix of a compiled stage's file.
        device: it runs on where no other is asked for.
        package: package that holds its modules; None for the one of its name beside this module.
        native: whether a stage is code that this process loads and runs, with all rights of the user.
        activations: form of 8-bit activations that integer layers are fastest with; None where the engine has no form for
            quantized layers.
        options: how stages are lowered and run. An engine that has options is registered with their defaults, and its
            `lower` and `open_session` take them as the keyword `options`; one without takes no such keyword.
    """

    name: str
    suffix: str
    options: Options = NO_OPTIONS
    device: str = "cpu"
    native: bool = False
    activations: Activations | None = "dynamic"
    package: str | None = None

    @property
    def default_device(self) -> str:
        """The device it runs on with these options, where no other is asked for."""
        return getattr(self.options, "device", self.device)

    def capability(self) -> Capability:
        """What it can do on this machine."""
        return self.module("capability").capability()

    def capability_here(self) -> Capability:
        """What it can do on this machine with these options; an engine may have `capability_for(options)` for that."""
        module = self.module("capability")
        return module.capability_for(self.options) if hasattr(module, "capability_for") else module.capability()

    def with_options(self, values: Mapping[str, Any]) -> Backend:
        """The backend with options that replace its defaults.

        Raises:
            UsageError: an unknown option or value.
        """
        kind = type(self.options)
        try:
            return replace(self, options=kind.model_validate(dict(values)))
        except ValidationError as error:
            raise UsageError(f"backend {self.name}: {option_problem(kind, 'backend', error)}") from None

    def lower(self, stage: Any, folder: Path) -> Path:
        """Compile a stage into a file; see `lower.py` of the engine.

        Args:
            stage: an `ir.program.Stage`, which this torch-free module does not import.
            folder: an empty one; what is left in it goes into the bundle.

        Returns:
            The main file.

        Raises:
            StepfoldError: the stage has no form for this engine.
        """
        return self.module("lower").lower(stage, folder, **self._keyword())

    def prepared(self, stage: Any) -> Any:
        """The stage as the engine computes it, in PyTorch; an engine may have `lower.prepare(stage, options)` for that.

        Raises:
            StepfoldError: the stage has no form for this engine.
        """
        module = self.module("lower")
        return module.prepare(stage, **self._keyword()) if hasattr(module, "prepare") else stage

    def exact_form(self) -> str | None:
        """What layers whose codes saturate without VNNI become; None for engines that multiply all codes exactly."""
        return getattr(self.module("lower"), "EXACT_FORM", None)

    def float_without_vnni(self, stage: Any) -> bool:
        """Whether a processor without VNNI computes a stage in float that others compute in integers.

        An engine for which that may be so has `lower.float_without_vnni(stage, options)`.
        """
        module = self.module("lower")
        return hasattr(module, "float_without_vnni") and module.float_without_vnni(stage, **self._keyword())

    def share(self, files: Sequence[Path]) -> Shared | None:
        """Store once what several compiled stages hold; an engine that can has `lower.share(files)`.

        Args:
            files: the main files of stages in one folder, with what `lower` left beside them; they are changed.

        Returns:
            What was shared, None for nothing.
        """
        module = self.module("lower")
        return module.share(files) if hasattr(module, "share") and len(files) > 1 else None

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
        """Open a compiled stage; see `session.py` of the engine.

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
        capability = self.capability()
        if not capability.can_run:
            raise UsageError(
                f"backend {self.name!r} cannot run here: {capability.reason}. Install it: {capability.install}"
            )
        keywords = {"threads": threads, "device": device or self.default_device, **self._keyword()}
        if files is not None:
            keywords["files"] = files
        return self.module("session").open_session(file, inputs, outputs, **keywords)

    def identity(self) -> dict[str, JsonValue] | None:
        """What a compiled stage depends on beside the stage; None where the code of the engine cannot be read.

        An engine whose files are for more than this processor says for what in `capability.target(options)`.
        """
        source = getattr(self.module("lower"), "__file__", None)
        if source is None:
            return None
        engine = self.module("capability")
        return {
            "backend": self.name,
            "options": self.options.model_dump(mode="json"),
            "version": self.capability_here().version,
            "packages": dict(packages()),
            "code": code(Path(source).parent),
            "processor": dict(processor()),
            "target": engine.target(self.options) if hasattr(engine, "target") else None,
        }

    def module(self, name: str) -> ModuleType:
        """`capability`, `session` or `lower` of the engine (the last needs the extra `compile`)."""
        return importlib.import_module(f"{self.package or f'{__package__}.{self.name}'}.{name}")

    def _keyword(self) -> dict[str, Options]:
        return {"options": self.options} if type(self.options).model_fields else {}


BACKENDS = (
    Backend("onnxruntime", ".onnx", OnnxruntimeOptions()),
    Backend("openvino", ".xml", OpenvinoOptions(), activations="symmetric"),
    Backend("tensorrt", ".engine", TensorrtOptions(), "cuda", activations="symmetric"),
    Backend("torch_tensorrt", ".engine", TorchTensorrtOptions(), "cuda", activations=None),
    Backend("inductor", ".so", InductorOptions(), native=True),
)


OTHERS: Extensions[Backend] = Extensions("stepfold.backends", "backend", lambda found: isinstance(found, Backend))
"""Backends of other packages: entry points of the group `stepfold.backends`, each a `Backend`."""


def all_backends() -> Sequence[Backend]:
    """The backends of stepfold, then those of other packages."""
    return *BACKENDS, *OTHERS.load_all(_own())


def names() -> list[str]:
    """The names of all backends; nothing is imported for them."""
    return [*_own(), *OTHERS.names()]


def get(name: str) -> Backend:
    """A backend by name.

    Raises:
        UsageError: there is none of that name, or the package that declares it is broken.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    if name not in OTHERS.names():
        raise UsageError(f"backend: expected one that this stepfold has; received {name!r}: {nearest(name, names())}")
    return OTHERS.load(name)


def _own() -> list[str]:
    return [backend.name for backend in BACKENDS]


def backends() -> list[Capability]:
    """What every backend can do here, in the order of registration."""
    return [_capability(backend) for backend in all_backends()]


def _capability(backend: Backend) -> Capability:
    """What a backend can do here; nothing where a package of others fails to say."""
    try:
        return backend.capability()
    except Exception as error:
        if backend in BACKENDS:
            raise
        reason = f"its package fails: {type(error).__name__}: {error}"
        return Capability(backend.name, False, False, None, reason, "mend or uninstall its package")
