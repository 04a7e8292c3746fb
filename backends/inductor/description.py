"""What a shared object needs of the machine that opens it, kept beside it: opening it is what would crash."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ...bundle.manifest import PortEntry
from ...loop.errors import BundleError
from ...loop.ports import Port
from ...loop.spec import Strict

FORMAT_VERSION = 1
SUFFIX = ".description.json"
"""Not `.json` in the place of `.so`, which the loader of PyTorch would read for operators to call back."""


class ObjectDescription(Strict):
    """The description of a shared object.

    Attributes:
        torch: version of PyTorch that compiled it, whose kernels it calls.
        system: `linux` or `darwin`.
        machine: architecture, such as `x86_64`.
        instructions: sets of the processor that its code uses, as `torch.cpu.get_capabilities` names them.
        inputs: what it reads, in this order.
        outputs: what it computes, in this order.
    """

    format_version: int = FORMAT_VERSION
    torch: str
    system: str
    machine: str
    instructions: tuple[str, ...]
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]

    def input_ports(self) -> tuple[Port, ...]:
        """What the object reads, in its order."""
        return tuple(entry.port() for entry in self.inputs)

    def output_ports(self) -> tuple[Port, ...]:
        """What the object computes, in its order."""
        return tuple(entry.port() for entry in self.outputs)

    def write(self, file: Path) -> Path:
        """Write the description of a shared object beside it and return its path."""
        path = beside(file)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path


def beside(file: Path) -> Path:
    """The description of a shared object."""
    return file.with_name(file.name + SUFFIX)


def read(file: Path) -> ObjectDescription:
    """The description of a shared object.

    Raises:
        BundleError: it is missing, damaged, or of a newer stepfold.
    """
    path = beside(file)
    try:
        description = ObjectDescription.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: expected the description of {file.name}; {reason}. Build it again.") from error
    if description.format_version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: expected format {FORMAT_VERSION} or older; received {description.format_version}. Upgrade stepfold."
        )
    return description
