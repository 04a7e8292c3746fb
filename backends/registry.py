"""The list of backends, to which other packages may add."""

from __future__ import annotations

from collections.abc import Sequence

from ..loop.errors import UsageError, nearest
from ..loop.extensions import Extensions
from .backend import Backend
from .capability import Capability
from .inductor.backend import Inductor
from .onnxruntime.backend import Onnxruntime
from .openvino.backend import Openvino
from .tensorrt.backend import Tensorrt
from .torch_tensorrt.backend import TorchTensorrt

BACKENDS: tuple[Backend, ...] = (Onnxruntime(), Openvino(), Tensorrt(), TorchTensorrt(), Inductor())

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
