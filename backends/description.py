"""What an engine file needs and holds, kept beside it in JSON: the file itself may be readable only where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import ValidationError

from ..bundle.manifest import PortEntry
from ..loop.errors import BundleError
from ..loop.held import StageFiles
from ..loop.ports import Port
from ..loop.spec import Strict

FORMAT_VERSION = 1


class Description(Strict):
    """The description of an engine file; a backend adds what its engine needs to know.

    Attributes:
        suffix: suffix of the description, after the name of the engine file.
        inputs: what the engine reads, in its order.
        outputs: what it computes, in its order.
    """

    suffix: ClassVar[str] = ".json"

    format_version: int = FORMAT_VERSION
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]

    def input_ports(self) -> tuple[Port, ...]:
        """What the engine reads."""
        return tuple(entry.port() for entry in self.inputs)

    def output_ports(self) -> tuple[Port, ...]:
        """What the engine computes."""
        return tuple(entry.port() for entry in self.outputs)

    def write(self, engine: Path) -> Path:
        """Write the description of an engine file beside it and return its path."""
        path = self.beside(engine)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def beside(cls, engine: Path) -> Path:
        """The description of an engine file."""
        return engine.with_name(engine.name + cls.suffix)

    @classmethod
    def read(cls, engine: Path, files: StageFiles | None = None) -> Self:
        """The description of an engine file.

        Args:
            engine: the engine file.
            files: files that may be read; None takes those of the folder.

        Raises:
            BundleError: it is missing, damaged, or of a newer stepfold.
        """
        path = cls.beside(engine)
        try:
            description = cls.model_validate_json((files or StageFiles(path.parent)).open(path.name).read())
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise BundleError(
                f"{path}: expected the description of {engine.name}; {reason}. Build it again."
            ) from error
        if description.format_version > FORMAT_VERSION:
            raise BundleError(
                f"{path}: expected format {FORMAT_VERSION} or older; received {description.format_version}. Upgrade "
                "stepfold."
            )
        return description
