"""What an engine file holds, kept beside it: nothing of a plan can be read without a GPU that runs it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from ...bundle.manifest import PortEntry
from ...loop.errors import BundleError
from ...loop.ports import Port
from ...loop.spec import Strict

FORMAT_VERSION = 1
SUFFIX = ".json"


class Layer(Strict):
    """A layer of the network definition: its name, kind, and the types of its outputs."""

    name: str
    kind: str
    types: tuple[str, ...]


class Batch(Strict):
    """The batches an engine takes, and the one its kernels were chosen for."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)


class PlanDescription(Strict):
    """The description of an engine file.

    Attributes:
        provider: the package that built it.
        provider_version: of that package; plans are not portable between versions.
        capability: compute capability it was built for.
        precision: of products: `fp32`, `fp16` or `bf16`.
        batch: its profile; None where no input has a batch.
        inputs: what it reads.
        outputs: what it computes.
        layers: the network definition it was built from.
    """

    format_version: int = FORMAT_VERSION
    provider: str
    provider_version: str
    capability: str
    precision: str
    batch: Batch | None
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]
    layers: tuple[Layer, ...]

    def input_ports(self) -> tuple[Port, ...]:
        """What the engine reads."""
        return tuple(entry.port() for entry in self.inputs)

    def output_ports(self) -> tuple[Port, ...]:
        """What the engine computes."""
        return tuple(entry.port() for entry in self.outputs)

    def write(self, engine: Path) -> Path:
        """Write the description of an engine file beside it and return its path."""
        path = beside(engine)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path


def beside(engine: Path) -> Path:
    """The description of an engine file."""
    return engine.with_name(engine.name + SUFFIX)


def read(engine: Path) -> PlanDescription:
    """The description of an engine file.

    Raises:
        BundleError: it is missing, damaged, or of a newer stepfold.
    """
    path = beside(engine)
    try:
        description = PlanDescription.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: expected the description of {engine.name}; {reason}. Build it again.") from error
    if description.format_version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: expected format {FORMAT_VERSION} or older; received {description.format_version}. Upgrade stepfold."
        )
    return description
